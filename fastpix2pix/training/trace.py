"""The kernel launches of a training step, without running it: for reports, and to compile them beforehand."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastpix2pix.kernels.launch import Launch, observed
from fastpix2pix.models import NetworkOptions, PatchDiscriminator, UNetGenerator, build_networks
from fastpix2pix.presets import PRESETS
from fastpix2pix.training.distributed import Unconnected
from fastpix2pix.training.options import Precision, StepOptions
from fastpix2pix.training.precision import WORKING_TYPES
from fastpix2pix.training.step import TrainStep


class _ChannelsLastConvolutions(TorchDispatchMode):
    """Convolutions return channels-last images, as cuDNN does for channels-last operands; on the meta device
    they would be contiguous, and the launches those of an epilogue that has to copy its input.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            return result

        def channels_last(t: Tensor) -> Tensor:
            return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

        return tree_map_only(Tensor, channels_last, result)


def step_launches(
    make: Callable[[], tuple[UNetGenerator, PatchDiscriminator]],
    options: StepOptions,
    *,
    size: int,
    batch_size: int = 1,
    ranks: int = 1,
    keep_gradients: bool = False,
) -> list[Launch]:
    """Every launch of one whole step, in order, of the networks that ``make`` makes; of one of ``ranks``.

    ``options.precision`` must be chosen. The step runs on the meta device: nothing is computed and no memory
    is taken, on no machine's GPU; which kind of GPU it is for, ``kernels.launch.assuming`` says. The global
    random state is left alone.
    """
    meta = torch.device("meta")
    launches: list[Launch] = []
    with torch.random.fork_rng(devices=()), meta, observed(launches.append, run=False):
        networks = generator, _ = make()
        exchange = None if ranks == 1 else Unconnected(ranks)
        step = TrainStep(*networks, options, exchange, keep_gradients=keep_gradients)
        dtype = WORKING_TYPES[options.precision]
        source, target = (
            torch.empty((batch_size, channels, size, size), dtype=dtype, memory_format=torch.channels_last)
            for channels in (generator.in_channels, generator.out_channels)
        )
        with _ChannelsLastConvolutions():
            step.body(source, target)
    return launches


def kernel_launches(precision: Precision) -> list[tuple[str, Launch]]:
    """All different launches of a step of both presets at batch 1 and 256x256, with a label for each; of one
    that keeps its gradients too.

    precision: bf16, fp16 or fp32. Launches that differ in nothing but their tensors are returned once.
    """
    labelled: list[tuple[str, Launch]] = []
    seen = set()
    for preset, keep in product(PRESETS.values(), (False, True)):
        make = partial(build_networks, NetworkOptions(preset=preset.name), "meta")
        options = StepOptions(preset=preset.name, precision=precision)
        for launch in step_launches(make, options, size=256, keep_gradients=keep):
            identity = _identity(launch)
            if identity not in seen:
                seen.add(identity)
                labelled.append((f"{preset.name} {_description(launch)}", launch))
    return labelled


def _identity(launch: Launch) -> tuple:
    """Equal for launches of the same kernel, constants, types, shapes and strides."""
    tensors = (*launch.reads, *launch.writes)
    operands = tuple(None if t is None else (t.shape, t.stride()) for t in tensors)
    return launch.variant, launch.grid, operands


def _description(launch: Launch) -> str:
    """The layer's images as height x width x channels, or the vectors' sizes, and what is special."""
    tensors = [t for t in (*launch.reads, *launch.writes) if t is not None]
    image = next((t for t in tensors if t.ndim == 4), None)  # not always the first: partial sums have three
    vectors, options = launch.args[0], launch.options.get("CONSTANTS")
    if image is not None:
        n, c, h, w = image.shape
        words = [f"{h}x{w}x{c}"] if n == 1 else [f"{n} of {h}x{w}x{c}"]
    elif type(vectors) is tuple and len(vectors) > 1 and isinstance(vectors[0], torch.Tensor):
        words = [f"{len(vectors)} tensors, {sum(t.numel() for t in vectors)} values"]
    else:
        words = [f"{tensors[0].numel()} values"]
    if options is not None and options.skip_slope is not None:
        words.append("skip")
    if options is not None and options.threshold:
        words.append("dropout")
    if any(launch.options.get(name) for name in ("SPLITS", "DSKIP_SPLITS")):
        words.append("sums")
    return " ".join(words)

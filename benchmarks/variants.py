"""Variants of one training step, from what everybody writes to ours, on the same weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import outsiders
from benchmarks.peers import FUSED, PLAIN, PeerStep, Tuning, tuned
from benchmarks.workload import Workload
from fastpix2pix.models import build_networks
from fastpix2pix.training.precision import WORKING_TYPES, choose_precision, set_float32_math
from fastpix2pix.training.prepare import prepare_step


@dataclass(frozen=True)
class StepVariant:
    """A way to run the step.

    rung: its place on the ladder from plain to fast, in words. tuning: of a peer, None for ours. precision,
    captured: of ours. outsider: makes the step of a program that is not ours to write; it can be pickled.
    """

    name: str
    rung: str
    tuning: Tuning | None = None
    precision: str = "fp32"
    captured: bool = False
    outsider: Callable[[Workload], outsiders.Step] | None = None

    @property
    def arithmetic(self) -> str:
        """Of the convolutions, on a GPU: unless told otherwise, PyTorch has those of float32 use tf32."""
        if self.tuning is None:
            return self.precision
        return {None: "tf32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.tuning.autocast]


def all_variants(device: torch.device, *, compiled: bool = False) -> list[StepVariant]:
    """All that make sense on ``device``, slowest first as one expects it; with ``compiled`` the tuned peer is
    compiled, too.
    """
    best = tuned(device)
    peers = [
        StepVariant("plain PyTorch", "eager", PLAIN),
        StepVariant("channels-last PyTorch", "+ channels_last", Tuning(channels_last=True)),
    ]
    if best.autocast is not None:
        both = Tuning(channels_last=True, adam=FUSED)
        peers.append(StepVariant("fused-Adam PyTorch", "+ fused Adam", both))
    rung = "+ 16-bit autocast" if best.autocast else "+ fused Adam"
    if compiled:
        peers.append(StepVariant("eager tuned PyTorch", rung, best))
        rung, best = "+ torch.compile, max-autotune with CUDA graphs", replace(best, compiled=True)
    peers.append(StepVariant("tuned PyTorch", rung, best))
    return peers + our_variants(device)


def outsider_variants(preset: str, junyanz: Path | None = None) -> list[StepVariant]:
    """Other people's programs that compute the same step: TensorFlow where it is installed, and the checkout
    ``junyanz`` of pytorch-CycleGAN-and-pix2pix."""
    found = []
    if preset == "tutorial" and outsiders.has_tensorflow():
        found.append(
            StepVariant("TensorFlow tutorial", "its own tf.function", outsider=outsiders.tensorflow_tutorial)
        )
    if preset == "junyanz" and junyanz is not None:
        program = partial(outsiders.junyanz_program, junyanz)
        found.append(StepVariant("pytorch-CycleGAN-and-pix2pix", "its own code", outsider=program))
    return found


def our_variants(device: torch.device) -> list[StepVariant]:
    """Our step in fp32 and, where it is another, in the precision that training would choose."""
    best = choose_precision(None, device)
    if device.type != "cuda":
        rung = "fastpix2pix: convolutions as products of tiles, one pass of D"
        return [
            StepVariant(f"fastpix2pix {precision}", f"{rung}, {precision}", precision=precision)
            for precision in dict.fromkeys(("fp32", best))
        ]
    rung = "fastpix2pix: fused epilogues, one pass of D, master Adam"
    return [
        StepVariant(f"fastpix2pix {best}", f"{rung}, {best}", precision=best),
        *(
            StepVariant(
                f"fastpix2pix {precision}, captured",
                f"{rung}, captured graph, {precision}",
                precision=precision,
                captured=True,
            )
            for precision in ("fp32", "tf32", best)
        ),
    ]


class RunningVariant:
    """A variant with its networks: ``step()`` takes one step on the next pair of a few that go round.

    It starts from the weights of every other variant of the same ``workload``; images are uniform noise, in
    the memory format and type that the variant trains in.
    """

    def __init__(self, variant: StepVariant, workload: Workload, device: torch.device, pairs: int = 4):
        if variant.outsider is not None:
            self.step = variant.outsider(workload)  # type: ignore[method-assign]
            return
        networks = build_networks(workload.network_options(), device)
        layout = torch.channels_last
        if variant.tuning is None:
            self._step = prepare_step(
                *networks,
                workload.step_options(variant.precision),
                device,
                image_size=workload.size,
                graph=variant.captured,
                check=False,
            ).run
        else:
            self._step = PeerStep(workload, variant.tuning, device).load_ours(*networks)
            layout = torch.channels_last if variant.tuning.channels_last else torch.contiguous_format
        dtype = WORKING_TYPES[variant.precision]
        self._pairs = [
            [image.to(device, dtype, memory_format=layout) for image in pair]
            for pair in workload.pairs(pairs)
        ]
        self._arithmetic, self._taken = variant.arithmetic, 0

    def step(self) -> object:
        set_float32_math(self._arithmetic)  # a setting of the process, which others have changed
        self._taken += 1
        return self._step(*self._pairs[self._taken % len(self._pairs)])

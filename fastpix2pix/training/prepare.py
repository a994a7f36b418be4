"""From networks and options to a step that runs on a device, with all that is decided on the way.

Training, ``doctor``, the junyanz backend and the benchmarks get their steps here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpix2pix.host_memory import keep_freed_memory
from fastpix2pix.kernels import deep_conv, launch
from fastpix2pix.kernels.language import HAS_TRITON
from fastpix2pix.kernels.launch import Launch
from fastpix2pix.kernels.precompile import precompile
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training.deep_choice import ColdTimer, choose, problems_of
from fastpix2pix.training.diagnosis import explain
from fastpix2pix.training.distributed import ALONE, Ranks
from fastpix2pix.training.graph import CapturedStep
from fastpix2pix.training.losses import Losses
from fastpix2pix.training.options import Precision, StepOptions
from fastpix2pix.training.precision import WORKING_TYPES, choose_precision, set_float32_math
from fastpix2pix.training.selfcheck import (
    TOLERANCE,
    Networks,
    compare_with_reference,
    verify_or_fall_back,
)
from fastpix2pix.training.step import TrainStep
from fastpix2pix.training.trace import step_launches


@dataclass(frozen=True)
class PreparedStep:
    """A step, how to run it, and what was resolved.

    step: holds networks, optimizers and losses. run: ``losses = run(source, target)``, captured or eager.
    device, precision: as chosen. deep_conv: who computes the deep layers' convolutions, in words.
    """

    step: TrainStep
    run: Callable[[Tensor, Tensor], Losses]
    device: torch.device
    precision: Precision
    deep_conv: str = "library"

    @property
    def dtype(self) -> torch.dtype:
        """The type of images that the step takes."""
        return WORKING_TYPES[self.precision]

    def capture(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Capture every (N, H, W) of images that a run will meet, before anything else that uses the GPU is
        started; nothing where steps run eagerly."""
        if not isinstance(self.run, CapturedStep):
            return
        generator = self.step.generator
        assert isinstance(generator, UNetGenerator)
        for n, h, w in shapes:
            source, target = (
                torch.zeros((n, c, h, w), dtype=self.dtype, device=self.device).contiguous(
                    memory_format=torch.channels_last
                )
                for c in (generator.in_channels, generator.out_channels)
            )
            self.run.capture(source, target)

    def release(self) -> None:
        """Let go of all graphs, before the ranks of a training leave their group."""
        if isinstance(self.run, CapturedStep):
            self.run.release()

    def resolved(self) -> dict[str, str]:
        """What this machine made of the request, in words, for people and for the run's record."""
        if not isinstance(self.run, CapturedStep):
            graph = "no"
        else:
            graph = "yes" if self.run.failure is None else f"no: {self.run.failure}"
        triton = launch.use_triton(self.step.ring.rows)
        return {
            "device": str(self.device),
            "precision": self.precision,
            "cuda_graph": graph,
            "kernels": "Triton" if triton else "PyTorch",
            "deep_conv": self.deep_conv if triton else "library",
        }


def compile_kernels(
    networks: Networks,
    options: StepOptions,
    device: torch.device,
    image_size: int,
    batch_sizes: Sequence[int],
    say: Callable[[str], None],
    ranks: int = 1,
) -> list[Launch]:
    """Compile what a step of every batch size launches in each of ``ranks``, in parallel and once a machine,
    and say so.

    Whatever fails here fails again at the launch, where the self-check sees it. Returns the launches.
    """
    if not (HAS_TRITON and launch.kernels_on_gpu):
        return []
    capability = torch.cuda.get_device_capability(device)
    with launch.assuming(capability):
        launches = [
            one
            for batch_size in sorted({1, *batch_sizes})
            for one in step_launches(
                networks.fresh, options, size=image_size, batch_size=batch_size, ranks=ranks
            )
        ]
    began = time.perf_counter()

    def progress(done: int, count: int) -> None:
        if done == 1:
            say(f"compiling {count} variants of the Triton kernels, once on this machine")

    try:
        compiled = precompile(launches, capability, progress=progress)
    except OSError as error:
        say(f"  not compiled beforehand, so the first step takes longer: {explain(error)}")
        return launches
    if compiled:
        say(f"  {compiled} compiled in {time.perf_counter() - began:.1f} s")
    return launches


def choose_deep_convolutions(
    launches: Sequence[Launch], options: StepOptions, device: torch.device, say: Callable[[str], None]
) -> str:
    """Measure who computes the deep layers' convolutions, and let ``kernels.deep_conv`` know; in words."""
    problems = problems_of(launches)
    if not problems:
        return "library"
    try:
        choice = choose(problems, options.deep_conv, device, ColdTimer(device), say)
    except Exception as error:  # no memory for the measurement, for instance
        say(f"deep convolutions: the library's, for they could not be measured: {explain(error)}")
        return "library"
    deep_conv.chosen = choice.chosen
    return str(choice)


def prepare_step(
    generator: UNetGenerator,
    discriminator: PatchDiscriminator,
    options: StepOptions,
    device: torch.device,
    *,
    image_size: int,
    batch_sizes: Sequence[int] = (1,),
    graph: bool = True,
    check: bool = True,
    say: Callable[[str], None] = print,
    ranks: Ranks = ALONE,
) -> PreparedStep:
    """A ``TrainStep`` on ``device``, ready to train.

    The networks are moved there. ``options.precision`` None becomes the best for the device, how float32 is
    computed is set, a CPU process keeps its freed memory. On a GPU the kernels for ``batch_sizes`` images of
    ``image_size`` pixels a side are compiled in parallel and the deep layers' convolutions are chosen; then
    (``check``) the step is held against its
    reference on one image, and what does not work is given up (``verify_or_fall_back``); with ``graph`` it is
    captured when it first runs, or by ``capture``. ``ranks``: that train together, all of which call this.

    Raises UserError for a precision that the device lacks, and as ``verify_or_fall_back`` does.
    """
    precision = choose_precision(options.precision, device)
    options = replace(options, precision=precision)
    on_gpu, deep = device.type == "cuda", "library"
    if on_gpu:
        set_float32_math(precision)
        networks = Networks(generator, discriminator)
        deep_conv.offered, deep_conv.chosen = options.deep_conv != "library", {}
        with ranks.machine_by_machine():  # the others find the first one's kernels in Triton's cache
            launches = compile_kernels(networks, options, device, image_size, batch_sizes, say, ranks.size)
        deep = choose_deep_convolutions(launches, options, device, say)
        if check:
            graph = verify_or_fall_back(
                lambda captured: compare_with_reference(
                    networks, options, device, size=image_size, graph=captured
                ),
                TOLERANCE[precision],
                graph=graph,
                say=say,
            ).graph
            torch.cuda.empty_cache()  # what the check took is free again before training allocates
        graph = not ranks.agree(not graph)  # capturing takes exchanges that an eager step has not
    else:
        keep_freed_memory()
    step = TrainStep(generator.to(device), discriminator.to(device), options, ranks.exchange)
    return PreparedStep(step, CapturedStep(step) if on_gpu and graph else step, device, precision, deep)

"""Which convolution computes each product of the deep layers on this GPU, ours or the library's: measured.

As cuDNN searches among its own algorithms: once, before the first step, for each shape that the run will
meet. A product goes to our kernels only where they were right and faster: no step gets slower by them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpix2pix.kernels import deep_conv
from fastpix2pix.kernels.deep_conv import Problem, Product
from fastpix2pix.kernels.launch import Launch
from fastpix2pix.training.diagnosis import explain
from fastpix2pix.training.options import DeepConv

Timer = Callable[[Callable[[], object]], float]
"""Microseconds that the device takes for what a function enqueues, with a cold cache."""

PRODUCTS: dict[str, Product] = {
    "deep_conv_to_small": "small",
    "deep_conv_to_big": "big",
    "deep_conv_to_weight": "weight",
}
"""Of each kernel."""

BOUND = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest difference of two results over their size (both in the Euclidean norm) that rounding explains: of
tf32's factors, or of the results."""


class ColdTimer:
    """Median time on a GPU of what a function enqueues, each time after the L2 cache was overwritten, since a
    step comes back to a weight only after all the others.

    Overwriting takes longer than the host needs to enqueue a few kernels, so it hides their launches, as the
    captured graph does.
    """

    FLUSH_BYTES = 2**28  # twice the L2 cache of a B200
    WARM_UP, REPEATS = 3, 15

    def __init__(self, device: torch.device):
        self._flush = torch.empty(self.FLUSH_BYTES, dtype=torch.int8, device=device)
        self._device = device

    def __call__(self, run: Callable[[], object]) -> float:
        for _ in range(self.WARM_UP):
            run()
        stream, spans = torch.cuda.current_stream(self._device), []
        for _ in range(self.REPEATS):
            span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            span[0].record(stream)
            run()
            span[1].record(stream)
            spans.append(span)
        torch.cuda.synchronize(self._device)
        return median(1e3 * begin.elapsed_time(end) for begin, end in spans)


class Verdict(NamedTuple):
    """Of one problem. ours, library: microseconds, None where they were not measured. failure: why ours is
    out of the question.
    """

    problem: Problem
    ours: float | None = None
    library: float | None = None
    failure: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether our kernels solve it."""
        return self.failure is None and (self.ours is None or self.ours < self.library)


class DeepChoice(NamedTuple):
    """What was found."""

    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> Mapping[Problem, bool]:
        """For ``deep_conv.chosen``."""
        return {verdict.problem: verdict.is_ours for verdict in self.verdicts}

    def __str__(self) -> str:
        ours = sum(verdict.is_ours for verdict in self.verdicts)
        if not ours:
            return "library"
        text = f"Triton for {ours} of {len(self.verdicts)} products"
        timed = [verdict for verdict in self.verdicts if verdict.ours is not None]
        if not timed:
            return text
        alone = sum(verdict.library for verdict in timed)
        best = sum(min(verdict.ours, verdict.library) for verdict in timed)
        return f"{text}, {best:.0f} us instead of {alone:.0f}"


def problems_of(launches: Iterable[Launch]) -> list[Problem]:
    """The different products of deep layers among the launches of a step (``trace.step_launches``)."""
    found: dict[Problem, None] = {}
    for launch in launches:
        if launch.name in PRODUCTS:
            pixels, height, width, small_channels, big_channels = launch.args[3:8]
            n, dtype = pixels // (height * width), launch.reads[0].dtype
            problem = Problem(PRODUCTS[launch.name], n, height, width, small_channels, big_channels, dtype)
            found[problem] = None
    return list(found)


def choose(
    problems: Sequence[Problem],
    asked: DeepConv,
    device: torch.device,
    time: Timer | None,
    say: Callable[[str], None] = print,
) -> DeepChoice:
    """Solve each problem on ``device`` both ways, and time both unless ``asked`` is "triton".

    Whatever goes wrong with ours, an exception or another result than the library's, is said in a line and
    leaves the problem to the library.
    """
    verdicts = []
    for problem in problems:
        try:
            verdict = _judge(problem, device, None if asked == "triton" else time)
        except Exception as error:  # of Triton, its compiler or launcher, the allocator: all mean the library
            verdict = Verdict(problem, failure=explain(error))
        if verdict.failure is not None:
            say(f"  deep convolution {describe(problem)}: the library's, for ours failed: {verdict.failure}")
        verdicts.append(verdict)
    choice = DeepChoice(tuple(verdicts))
    if verdicts:
        say(f"deep convolutions: {choice}")
    return choice


def describe(problem: Problem) -> str:
    """One product in a few words."""
    n, h, w = problem.n, problem.height, problem.width
    small, big = f"{h}x{w}x{problem.small_channels}", f"{2 * h}x{2 * w}x{problem.big_channels}"
    of = {"small": f"{big} to {small}", "big": f"{small} to {big}", "weight": f"weight of {big} and {small}"}
    return f"{of[problem.product]}{f', batch {n}' if n > 1 else ''}"


def _judge(problem: Problem, device: torch.device, time: Timer | None) -> Verdict:
    def ours() -> Tensor:
        return deep_conv.solve(problem, *operands)

    def library() -> Tensor:
        return solve_by_library(problem, *operands)

    operands = _operands(problem, device)
    expected, got = library().float(), ours().float()
    difference = ((got - expected).norm() / expected.norm()).item()
    if not difference <= BOUND[problem.dtype]:
        return Verdict(problem, failure=f"results differ from the library's by {difference:.1e}")
    return Verdict(problem) if time is None else Verdict(problem, time(ours), time(library))


def solve_by_library(problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    """The product by PyTorch's convolution; operands as for ``deep_conv.solve``."""
    if problem.product == "small":
        return F.conv2d(first, second, stride=2, padding=1)
    if problem.product == "big":
        return F.conv_transpose2d(first, second, stride=2, padding=1)
    small, big = first, second
    weight = torch.empty(
        (problem.small_channels, problem.big_channels, 4, 4),
        dtype=small.dtype,
        device=small.device,
        memory_format=torch.channels_last,
    )
    sides, ones, only_weight = [2, 2], [1, 1], [False, True, False]
    return torch.ops.aten.convolution_backward(
        small, big, weight, None, sides, ones, ones, False, [0, 0], 1, only_weight
    )[1]


def _operands(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two tensors of noise, always the same."""
    n, h, w = problem.n, problem.height, problem.width
    small = n, problem.small_channels, h, w
    big = n, problem.big_channels, 2 * h, 2 * w
    weight = problem.small_channels, problem.big_channels, 4, 4
    shapes = {"small": (big, weight), "big": (small, weight), "weight": (small, big)}[problem.product]
    random = torch.Generator(device).manual_seed(0)
    first, second = (
        torch.randn(shape, generator=random, dtype=torch.float32, device=device)
        .to(problem.dtype)
        .contiguous(memory_format=torch.channels_last)
        for shape in shapes
    )
    return first, second

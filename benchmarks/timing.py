"""How things are timed: in turns, so that whatever slows the machine for a while slows all of them."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch


class Seconds(NamedTuple):
    """What a call takes: on the clock, and of all the process's threads together on the CPU.

    The second is nearly the same on a machine that others use at the same time.
    """

    wall: float
    cpu: float


def clock() -> float:
    """Seconds, when what a GPU was given so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], object], times: int = 1) -> Seconds:
    """What a call takes, on average over ``times`` in a row.

    Several at once are for what is too short for the clock, or for a GPU's queue to fill.
    """
    began, began_cpu = clock(), time.process_time()
    for _ in range(times):
        call()
    wall, cpu = clock() - began, time.process_time() - began_cpu
    return Seconds(wall / times, cpu / times)


def interleaved(turns: Mapping[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """What every one of ``turns`` says it took, in every round; each round has an order of its own."""
    order, seconds = list(turns), {name: [] for name in turns}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(turns[name]())
    return seconds


def speedup(slow: Iterable[float], fast: Iterable[float]) -> float:
    """How many times as fast: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Replays ``calls``, one after the other, from a CUDA graph: the GPU's time without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay

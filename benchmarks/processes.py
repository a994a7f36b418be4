"""Variants timed in turns: each in a process of its own, as people run it, with its memory and settings."""

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection

import torch

from benchmarks.timing import Seconds, interleaved, timed
from benchmarks.variants import RunningVariant, StepVariant
from benchmarks.workload import Workload

WARM_UP_STEPS = 3
STEPS_ON_GPU = 20  # timed together


class VariantProcess:
    """An ``RunningVariant`` in a process of its own, warmed up."""

    def __init__(self, variant: StepVariant, workload: Workload, device: torch.device):
        spawn = multiprocessing.get_context("spawn")
        self._name = variant.name
        self._connection, theirs = spawn.Pipe()
        arguments = theirs, variant, workload, device, torch.get_num_threads()
        spawn.Process(target=_take_turns, args=arguments).start()
        theirs.close()
        self.turn()  # so that it is warm before the next one starts

    def turn(self) -> Seconds:
        """What a step takes now; on a GPU, of several in a row. RuntimeError if the process has ended."""
        try:
            self._connection.send(None)
            return self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"{self._name} has stopped; its error stands above") from None

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()


def _take_turns(
    connection: Connection, variant: StepVariant, workload: Workload, device: torch.device, threads: int
) -> None:
    torch.set_num_threads(threads)
    running = RunningVariant(variant, workload, device)
    for _ in range(WARM_UP_STEPS):
        running.step()
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(timed(running.step, STEPS_ON_GPU if device.type == "cuda" else 1))


def time_in_turns(
    variants: Sequence[StepVariant], workload: Workload, device: torch.device, rounds: int
) -> dict[str, list[Seconds]]:
    """What a step takes each variant, in every round. RuntimeError names one that can't run."""
    with ExitStack() as stack:
        processes = {
            variant.name: stack.enter_context(closing(VariantProcess(variant, workload, device)))
            for variant in variants
        }
        return interleaved({name: process.turn for name, process in processes.items()}, rounds)

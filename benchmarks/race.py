"""Contenders race: each in a process of its own, as people run it, with its own memory and settings."""

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection

import torch

from benchmarks.contenders import Contender, Entrant
from benchmarks.timing import Seconds, interleaved, timed
from fastpix2pix.config import TrainConfig

WARM_UP_STEPS = 3
STEPS_ON_GPU = 20  # timed together


class Racer:
    """An ``Entrant`` in a process of its own, warmed up."""

    def __init__(self, contender: Contender, config: TrainConfig, device: torch.device):
        spawn = multiprocessing.get_context("spawn")
        self._name = contender.name
        self._connection, theirs = spawn.Pipe()
        arguments = theirs, contender, config, device, torch.get_num_threads()
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
    connection: Connection, contender: Contender, config: TrainConfig, device: torch.device, threads: int
) -> None:
    torch.set_num_threads(threads)
    entrant = Entrant(contender, config, device)
    for _ in range(WARM_UP_STEPS):
        entrant.step()
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(timed(entrant.step, STEPS_ON_GPU if device.type == "cuda" else 1))


def race(
    contenders: Sequence[Contender], config: TrainConfig, device: torch.device, rounds: int
) -> dict[str, list[Seconds]]:
    """What a step takes each contender, in every round. RuntimeError names one that can't run."""
    with ExitStack() as stack:
        racers = {
            contender.name: stack.enter_context(closing(Racer(contender, config, device)))
            for contender in contenders
        }
        return interleaved({name: racer.turn for name, racer in racers.items()}, rounds)

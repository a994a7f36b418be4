"""Pairs decoded by Pillow in worker processes, where DALI cannot be had.

Each worker has a pipe of its own and nothing else in common with this process: no shared memory, of which a
container may have next to none, and no lock that a killed worker could take with it. When it ends, its pipe
says so.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpix2pix.cores import usable_cores
from fastpix2pix.data.pairs import Pair, Sides
from fastpix2pix.data.resize import Interpolation, resize
from fastpix2pix.errors import UserError
from fastpix2pix.signals import STOPS

log = logging.getLogger(__name__)

Halves = tuple[Tensor, Tensor]  # A and B


class ResizedPairs(NamedTuple):
    """``decode(indices)`` reads and resizes a whole request. sides: of A and B, as all files hold them."""

    pairs: list[Pair]
    sides: Sides
    load_size: int
    interpolation: Interpolation

    def decode(self, indices: np.ndarray, into: Halves) -> None:
        """Write A and B of the pairs to ``into``, which is as ``empty`` makes it."""
        for number, i in enumerate(indices):
            for side, image, half in zip(self.sides, self.pairs[i].read(), into, strict=True):
                half[number] = resize(side.kept(image), self.load_size, self.interpolation)[0]

    def empty(self, indices: np.ndarray, *, pinned: bool = False) -> Halves:
        """Room for A and B: uint8 or float32 (n, load_size, load_size, channels), as ``Side.kept`` says."""
        a, b = (
            torch.empty(
                (len(indices), self.load_size, self.load_size, side.channels),
                dtype=side.kept_as,
                pin_memory=pinned,
            )
            for side in self.sides
        )
        return a, b


def resized_chunks(
    pairs: list[Pair],
    sides: Sides,
    requests: Iterator[np.ndarray],
    *,
    load_size: int,
    interpolation: Interpolation,
    device: torch.device,
    num_threads: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each request (int64 (n,), indices into ``pairs``): (A, B), (n, load_size, load_size, channels),
    uint8 of a side that is 8-bit RGB, else float32 in [-1, 1].

    Up to ``num_threads`` worker processes run ahead of the consumer; to a GPU the pixels travel from
    pinned memory. Where no process can be started, which is said, this one decodes. Raises ``UserError``
    naming the file that cannot be decoded, or when a worker ends.
    """
    dataset = ResizedPairs(pairs, sides, load_size, interpolation)
    try:
        workers = _start(dataset, min(num_threads, usable_cores()))
    except OSError as error:
        log.warning(f"no process to decode images can be started ({error}): this one decodes them")
        decoded = _decoded_here(dataset, requests, device)
    else:
        decoded = _decoded_by(workers, dataset, requests, device)
    with closing(decoded) as chunks:
        for chunk in chunks:
            a, b = (half.to(device, non_blocking=True) for half in chunk)
            yield a, b


def _decoded_here(
    dataset: ResizedPairs, requests: Iterator[np.ndarray], device: torch.device
) -> Iterator[Halves]:
    for indices in requests:
        chunk = dataset.empty(indices, pinned=device.type == "cuda")
        dataset.decode(indices, chunk)
        yield chunk


# ------------------------------------------------------------------------------------------ processes


def _bytes(half: Tensor) -> np.ndarray:
    return half.numpy().reshape(-1).view(np.uint8)


class Worker(NamedTuple):
    process: BaseProcess
    connection: Connection

    def ask(self, indices: np.ndarray) -> None:
        try:
            self.connection.send(indices)
        except OSError as error:
            raise self._ended() from error

    def answer(self, into: Halves) -> None:
        """Wait for the decoded request. Raises UserError for a file, or when the process has ended."""
        try:
            error = self.connection.recv()
            if error is None:
                for half in into:
                    self.connection.recv_bytes_into(_bytes(half))
        except (EOFError, OSError) as gone:
            raise self._ended() from gone
        if error is not None:
            raise error

    def _ended(self) -> UserError:
        self.process.join(1.0)
        code = self.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return UserError(
            f"a process that decodes images ended {how}; go on with --continue_train, with fewer "
            "--num_threads if memory is short"
        )


def _decoded_by(
    workers: list[Worker], dataset: ResizedPairs, requests: Iterator[np.ndarray], device: torch.device
) -> Iterator[Halves]:
    """In the order of ``requests``, of which each worker has one."""
    asked: deque[tuple[Worker, np.ndarray]] = deque()

    def ask(worker: Worker, indices: np.ndarray) -> None:
        worker.ask(indices)
        asked.append((worker, indices))

    try:
        for worker, indices in zip(workers, requests, strict=False):
            ask(worker, indices)
        while asked:
            worker, indices = asked.popleft()
            chunk = dataset.empty(indices, pinned=device.type == "cuda")
            worker.answer(chunk)
            if (following := next(requests, None)) is not None:
                ask(worker, following)
            yield chunk
    finally:
        _stop(workers)


def _start(dataset: ResizedPairs, count: int) -> list[Worker]:
    """Fork ``count`` workers, with no garbage of this process to collect. Raises OSError if that can't be.

    A forgotten DALI pipeline, collected in a worker, would wait for threads that were not forked with it.
    """
    context = get_context("fork" if sys.platform == "linux" else None)
    workers: list[Worker] = []
    gc.collect()
    gc.freeze()
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            # Without the others' ends: the last of them closes when this process is gone, however it went.
            inherited = [ours, *(worker.connection for worker in workers)]
            process = context.Process(
                target=_work,
                args=(os.getpid(), dataset, theirs, inherited if sys.platform == "linux" else []),
                daemon=True,
            )
            process.start()
            theirs.close()
            workers.append(Worker(process, ours))
    except OSError:
        _stop(workers)
        raise
    finally:
        gc.unfreeze()
    return workers


def _stop(workers: list[Worker]) -> None:
    for process, connection in workers:
        connection.close()
        process.kill()  # it has nothing to lose, and may wait for a file for ever
    for process, _ in workers:
        process.join()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, though it may wait for a file for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(parent: int, dataset: ResizedPairs, connection: Connection, inherited: list[Connection]) -> None:
    """Answer requests until the other end of the pipe is closed."""
    for number in STOPS:  # they may reach the whole process group, of which the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    for end in inherited:
        end.close()
    with suppress(EOFError, OSError):
        while True:
            indices = connection.recv()
            chunk, error = dataset.empty(indices), None
            try:
                dataset.decode(indices, chunk)
            except UserError as refusal:
                error = refusal
            except MemoryError:
                error = UserError("no memory to decode images; give fewer --num_threads, or --cache 0")
            connection.send(error)
            if error is None:
                for half in chunk:
                    connection.send_bytes(_bytes(half))

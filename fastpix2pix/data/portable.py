"""Pairs decoded by Pillow in the worker processes of a torch DataLoader, where DALI cannot be had."""

import gc
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastpix2pix.cores import usable_cores
from fastpix2pix.data.pairs import Pair
from fastpix2pix.data.resize import Interpolation, resize
from fastpix2pix.errors import UserError


class ResizedPairs(Dataset):
    """``dataset[indices]`` decodes and resizes a whole request: (A, B), uint8 (n, size, size, 3)."""

    def __init__(self, pairs: list[Pair], load_size: int, interpolation: Interpolation):
        self.pairs = pairs
        self.load_size = load_size
        self.interpolation = interpolation

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor] | UserError:
        try:
            pairs = [self.pairs[i].read() for i in indices]
        except UserError as error:
            return error  # as a value: an exception would arrive wrapped in the worker's traceback
        a, b = (torch.cat([self._resized(pair[half]) for pair in pairs]) for half in (0, 1))
        return a, b

    def _resized(self, image: np.ndarray) -> Tensor:
        return resize(torch.from_numpy(np.ascontiguousarray(image))[None], self.load_size, self.interpolation)


def resized_chunks(
    pairs: list[Pair],
    requests: Iterator[np.ndarray],
    *,
    load_size: int,
    interpolation: Interpolation,
    device: torch.device,
    num_threads: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each request (int64 (n,), indices into ``pairs``): (A, B), uint8 (n, load_size, load_size, 3).

    Up to ``num_threads`` worker processes run ahead of the consumer; to a GPU the pixels travel from
    pinned memory. Raises ``UserError`` naming the file that cannot be decoded.
    """
    loader = DataLoader(
        ResizedPairs(pairs, load_size, interpolation),
        batch_size=None,
        sampler=requests,
        num_workers=min(num_threads, usable_cores()),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for chunk in _forked(loader):
        if isinstance(chunk, UserError):
            raise chunk
        yield tuple(half.to(device, non_blocking=True) for half in chunk)


def _forked(loader: DataLoader) -> Iterator:
    """The loader's iterator, its workers started with no garbage of this process to collect.

    A forgotten DALI pipeline, collected in a worker, would wait for threads that were not forked with it.
    """
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group, and handlers of the parent are inherited by a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

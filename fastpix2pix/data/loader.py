"""Batches without end, in the order and with the crops of the plan, whichever decoder runs."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import tee
from math import ceil
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpix2pix.data.jitter import jitter
from fastpix2pix.data.pairs import Pair, find_pairs
from fastpix2pix.data.plan import epoch_plan
from fastpix2pix.data.resize import Interpolation, resize
from fastpix2pix.errors import UserError
from fastpix2pix.pixels import normalize

log = logging.getLogger(__name__)

Direction = Literal["AtoB", "BtoA"]


class Batch(NamedTuple):
    """What one training step takes, and where the stream stands after it."""

    source: Tensor  # (n, 3, crop_size, crop_size), channels-last memory, in [-1, 1]
    target: Tensor  # as source
    epoch: int  # store epoch and position in a checkpoint, and Loader.stream goes on from there
    position: int  # samples of this epoch consumed
    names: tuple[str, ...]


class Chunk(NamedTuple):
    """The plan of consecutive samples of one epoch that are decoded together."""

    epoch: int
    start: int  # the first sample's position in the epoch
    which: np.ndarray  # int64 (n,): indices of the pairs
    top: np.ndarray
    left: np.ndarray
    mirror: np.ndarray


@dataclass(eq=False)
class Loader:
    """Endless batches of one split. Made by :func:`open_loader`, which explains the settings."""

    pairs: list[Pair]
    kind: Literal["dali", "portable"]
    direction: Direction
    load_size: int
    crop_size: int
    interpolation: Interpolation
    flip: bool
    shuffle: bool
    batch_size: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    num_threads: int
    chunk_size: int  # in samples; whole batches
    cached: bool
    _cache: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _streams: list[Iterator[Batch]] = field(default_factory=list, init=False)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def batches_per_epoch(self) -> int:
        """The last batch of an epoch is smaller when the batch size does not divide the number of pairs."""
        return ceil(len(self.pairs) / self.batch_size)

    def stream(self, epoch: int = 0, position: int = 0) -> Iterator[Batch]:
        """Batches from sample ``position`` of ``epoch`` on, over all later epochs.

        The next chunk is decoded while the present one is used. Raises ``UserError`` naming a file whose
        pixels cannot be decoded.
        """
        self._streams.append(self._batches(epoch, position))
        return self._streams[-1]

    def close(self) -> None:
        """Ends every stream of this loader, with its threads and processes."""
        while self._streams:
            self._streams.pop().close()

    def _batches(self, epoch: int, position: int) -> Iterator[Batch]:
        with closing(self._jittered(epoch, position)) as made, closing(self._ahead(made)) as chunks:
            for chunk, a, b in chunks:
                source, target = (a, b) if self.direction == "AtoB" else (b, a)
                names = [self.pairs[i].name for i in chunk.which]
                for low in range(0, len(names), self.batch_size):
                    part = slice(low, low + self.batch_size)
                    after = chunk.epoch, chunk.start + min(part.stop, len(names))
                    if after[1] == len(self.pairs):
                        after = chunk.epoch + 1, 0
                    yield Batch(source[part], target[part], *after, tuple(names[part]))

    def _ahead(self, chunks: Iterator) -> Iterator:
        """Has the next chunk made in a thread; a GPU works in advance of its host without one."""
        if self.device.type == "cuda":
            yield from chunks
            return
        chunk = next(chunks)  # in the caller's thread: from here the decoder's processes are forked
        # One core for the maker (the setting is the thread's own): the others belong to the training step.
        with ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,)) as maker:
            while True:
                coming = maker.submit(next, chunks)
                yield chunk
                chunk = coming.result()

    def _jittered(self, epoch: int, position: int) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        chunks, same_chunks = tee(self._chunks(epoch, position))
        if self.cached:
            self._cache = self._cache or self._decode_all()
            for chunk in chunks:
                yield chunk, *(self._jitter(half, chunk.which, chunk) for half in self._cache)
        with closing(self._decoded(chunk.which for chunk in same_chunks)) as decoded:
            for chunk, halves in zip(chunks, decoded, strict=True):
                in_order = np.arange(len(chunk.which))
                yield chunk, *(self._jitter(half, in_order, chunk) for half in halves)

    def _jitter(self, images: Tensor, which: np.ndarray, chunk: Chunk) -> Tensor:
        return jitter(images, which, chunk.top, chunk.left, chunk.mirror, self.crop_size, self.dtype)

    def _chunks(self, epoch: int, position: int) -> Iterator[Chunk]:
        while True:
            plan = epoch_plan(
                self.seed,
                epoch,
                len(self.pairs),
                load_size=self.load_size,
                crop_size=self.crop_size,
                flip=self.flip,
                shuffle=self.shuffle,
            )
            for start in range(position, len(self.pairs), self.chunk_size):
                part = slice(start, start + self.chunk_size)
                yield Chunk(epoch, start, *(decisions[part] for decisions in plan))
            epoch, position = epoch + 1, 0

    def _decoded(self, requests: Iterator[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each request (indices of pairs) A and B on the device: uint8 (n, load_size, load_size, 3)."""
        settings = {
            "load_size": self.load_size,
            "interpolation": self.interpolation,
            "device": self.device,
            "num_threads": self.num_threads,
        }
        if self.kind == "dali":
            from fastpix2pix.data import dali  # cannot be imported everywhere

            return dali.resized_chunks(self.pairs, requests, largest_request=self.chunk_size, **settings)
        from fastpix2pix.data import portable

        return portable.resized_chunks(self.pairs, requests, **settings)

    def _decode_all(self) -> tuple[Tensor, Tensor]:
        """A and B of every pair on the device: uint8 (count, load_size, load_size, 3)."""
        shape = (len(self.pairs), self.load_size, self.load_size, 3)
        a, b = (torch.empty(shape, dtype=torch.uint8, device=self.device) for _ in range(2))
        log.info(f"decoding {len(self.pairs)} pairs into a cache of {2 * a.nbytes / 2**20:.0f} MiB")
        everything = np.arange(len(self.pairs))
        requests = np.split(everything, everything[self.chunk_size :: self.chunk_size])
        with closing(self._decoded(iter(requests))) as decoded:
            for which, halves in zip(requests, decoded, strict=True):
                part = slice(which[0], which[-1] + 1)
                a[part], b[part] = halves
        return a, b


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader does with a data set."""

    direction: Direction = "BtoA"
    load_size: int = 286
    crop_size: int = 256
    interpolation: Interpolation = "nearest"
    flip: bool = True
    shuffle: bool = True
    batch_size: int = 1
    seed: int = 0
    loader: Literal["auto", "dali", "portable"] = "auto"
    num_threads: int = 4
    cache_bytes: int = 0
    chunk: int | None = None

    def __post_init__(self):
        for name in ("load_size", "crop_size", "batch_size", "num_threads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give a number of at least 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: must be 0 or more")
        if self.load_size < self.crop_size:
            raise UserError(
                f"load_size {self.load_size} is smaller than --crop_size {self.crop_size}: a crop does not "
                "fit; make load_size at least crop_size"
            )


def open_loader(
    root: str | Path,
    options: LoaderOptions | None = None,
    *,
    split: str = "train",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """Opens ``split`` of the data set in ``root``."""
    o = LoaderOptions() if options is None else options
    device = torch.device(device)
    pairs = find_pairs(root, split)
    kind = _choose(o.loader)
    needed = 2 * len(pairs) * o.load_size**2 * 3
    chunk = o.chunk or (16 if device.type == "cpu" else 64)
    return Loader(
        pairs,
        kind,
        o.direction,
        o.load_size,
        o.crop_size,
        o.interpolation,
        o.flip,
        o.shuffle,
        o.batch_size,
        o.seed,
        device,
        dtype,
        o.num_threads,
        chunk_size=max(1, chunk // o.batch_size) * o.batch_size,
        cached=o.cache_bytes >= needed,
    )


def _choose(loader: Literal["auto", "dali", "portable"]) -> Literal["dali", "portable"]:
    if loader == "portable":
        return "portable"
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a library that it needs is missing
        if loader == "dali":
            raise UserError(
                f"--loader dali: NVIDIA DALI can't be imported here ({error}); use --loader portable"
            ) from error
        return "portable"
    return "dali"


def load_pair(
    pair: Pair, *, direction: Direction, size: int, interpolation: Interpolation
) -> tuple[Tensor, Tensor]:
    """(source, target) of one pair without jitter: resized to ``size`` squared, as the tutorial tests.

    Each is float32 (1, 3, size, size) in channels-last memory, in [-1, 1]. Decoded by Pillow, whichever
    loader trains. Raises ``UserError`` naming a file that cannot be decoded.
    """
    a, b = (
        normalize(resize(torch.from_numpy(half[None].copy()), size, interpolation), torch.float32)
        for half in pair.read()
    )
    return (a, b) if direction == "AtoB" else (b, a)

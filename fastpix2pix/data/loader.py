"""Batches without end, in the order and with the crops of the plan, whichever decoder runs."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from itertools import tee
from math import ceil
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpix2pix.data.jitter import jitter, normalize
from fastpix2pix.data.pairs import Pair, find_pairs
from fastpix2pix.data.plan import epoch_plan
from fastpix2pix.data.resize import Interpolation, resize
from fastpix2pix.errors import UserError

log = logging.getLogger(__name__)

Direction = Literal["AtoB", "BtoA"]
ResizedChunks = Iterator[tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """What one training step takes, and where the stream stands after it."""

    source: Tensor  # (n, 3, crop_size, crop_size), channels-last memory, in [-1, 1]
    target: Tensor  # as source
    epoch: int  # store epoch and position in a checkpoint, and Loader.stream goes on from there
    position: int  # samples of this epoch consumed
    names: tuple[str, ...]


class _Chunk(NamedTuple):
    """Decisions for consecutive samples of one epoch that are decoded together."""

    epoch: int
    start: int  # the first sample's position in the epoch
    which: np.ndarray  # int64 (n,): indices of the pairs
    top: np.ndarray
    left: np.ndarray
    mirror: np.ndarray


class Loader:
    """Endless batches of one split; make it with :func:`open_loader`."""

    def __init__(
        self,
        pairs: list[Pair],
        kind: Literal["dali", "portable"],
        *,
        direction: Direction,
        load_size: int,
        crop_size: int,
        interpolation: Interpolation,
        flip: bool,
        shuffle: bool,
        batch_size: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        num_threads: int,
        chunk: int,
        cache_bytes: int,
    ):
        self.pairs = pairs
        self.kind = kind
        self.batch_size = batch_size
        self._direction = direction
        self._plan = {"load_size": load_size, "crop_size": crop_size, "flip": flip, "shuffle": shuffle}
        self._seed = seed
        self._interpolation = interpolation
        self._device = device
        self._dtype = dtype
        self._num_threads = num_threads
        self._samples_per_chunk = max(1, chunk // batch_size) * batch_size
        self._cached: tuple[Tensor, Tensor] | None = None
        self._streams: list[Iterator[Batch]] = []
        needed = 2 * len(pairs) * load_size**2 * 3
        self._cache = cache_bytes >= needed
        if cache_bytes and not self._cache:
            log.warning(
                f"a cache of {cache_bytes} bytes is too small for {len(pairs)} pairs ({needed} bytes)"
            )

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
        stream = self._stream(epoch, position)
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        """Ends every stream of this loader and its workers."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    def _stream(self, epoch: int, position: int) -> Iterator[Batch]:
        with closing(self._jittered(epoch, position)) as chunks, closing(self._ahead(chunks)) as ready:
            for chunk, a, b in ready:
                source, target = (a, b) if self._direction == "AtoB" else (b, a)
                names = [self.pairs[i].name for i in chunk.which]
                for low in range(0, len(names), self.batch_size):
                    part = slice(low, low + self.batch_size)
                    after = chunk.epoch, chunk.start + min(part.stop, len(names))
                    if after[1] == len(self.pairs):
                        after = chunk.epoch + 1, 0
                    yield Batch(source[part], target[part], *after, tuple(names[part]))

    def _ahead(self, chunks: Iterator) -> Iterator:
        """Makes one chunk in advance in a thread; a GPU works in advance of its host by itself."""
        if self._device.type == "cuda":
            yield from chunks
        # One core for the maker (the setting is the thread's own): the others belong to the training step.
        with ThreadPoolExecutor(1, "loader", torch.set_num_threads, (1,)) as maker:
            future = maker.submit(next, chunks)
            while True:
                chunk = future.result()
                future = maker.submit(next, chunks)
                yield chunk

    def _jittered(self, epoch: int, position: int) -> Iterator[tuple[_Chunk, Tensor, Tensor]]:
        cut = {"crop_size": self._plan["crop_size"], "dtype": self._dtype}
        if self._cache:
            images = self._cached = self._cached or self._decode_all()
            for chunk in self._chunks(epoch, position):
                yield chunk, *(jitter(half, *chunk[2:], **cut) for half in images)
        chunks, same_chunks = tee(self._chunks(epoch, position))
        with closing(self._decoded(chunk.which for chunk in same_chunks)) as decoded:
            for chunk, halves in zip(chunks, decoded, strict=True):
                own = np.arange(len(chunk.which))
                yield chunk, *(jitter(half, own, *chunk[3:], **cut) for half in halves)

    def _chunks(self, epoch: int, position: int) -> Iterator[_Chunk]:
        count = len(self.pairs)
        while True:
            plan = epoch_plan(self._seed, epoch, count, **self._plan)
            for start in range(position, count, self._samples_per_chunk):
                part = slice(start, start + self._samples_per_chunk)
                yield _Chunk(epoch, start, *(decisions[part] for decisions in plan))
            epoch, position = epoch + 1, 0

    def _decoded(self, requests: Iterator[np.ndarray]) -> ResizedChunks:
        settings = {
            "load_size": self._plan["load_size"],
            "interpolation": self._interpolation,
            "device": self._device,
            "num_threads": self._num_threads,
        }
        if self.kind == "dali":
            from fastpix2pix.data import dali

            return dali.resized_chunks(
                self.pairs, requests, largest_request=self._samples_per_chunk, **settings
            )
        from fastpix2pix.data import portable

        return portable.resized_chunks(self.pairs, requests, **settings)

    def _decode_all(self) -> tuple[Tensor, Tensor]:
        """Every pair, decoded and resized, in the device's memory: uint8 (count, load_size, load_size, 3)."""
        count, size = len(self.pairs), self._plan["load_size"]
        log.info(f"decoding {count} pairs into a cache of {2 * count * size**2 * 3 / 2**20:.0f} MiB")
        a, b = (torch.empty(count, size, size, 3, dtype=torch.uint8, device=self._device) for _ in range(2))
        requests = np.split(np.arange(count), range(self._samples_per_chunk, count, self._samples_per_chunk))
        with closing(self._decoded(iter(requests))) as decoded:
            for which, halves in zip(requests, decoded, strict=True):
                part = slice(which[0], which[-1] + 1)
                a[part], b[part] = halves
        return a, b


def open_loader(
    root: str | Path,
    *,
    split: str = "train",
    direction: Direction = "BtoA",
    load_size: int = 286,
    crop_size: int = 256,
    interpolation: Interpolation = "nearest",
    flip: bool = True,
    shuffle: bool = True,
    batch_size: int = 1,
    seed: int = 0,
    loader: Literal["auto", "dali", "portable"] = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_threads: int = 4,
    chunk: int | None = None,
    cache_bytes: int = 0,
) -> Loader:
    """Opens ``split`` of the data set in ``root`` (layouts: :func:`find_pairs`) for training.

    ``direction="AtoB"`` makes A, the left half, the source and B the target. Every half is resized to
    ``load_size`` squared and cropped to ``crop_size`` squared by the decisions of :func:`epoch_plan`.
    ``chunk`` pairs (64 on a GPU, 16 on the CPU), rounded down to whole batches, are decoded in one run.
    A data set whose resized pixels (8 bit) fit into ``cache_bytes`` is decoded once and kept in the memory
    of ``device``. ``num_threads`` threads (DALI) or processes (portable) decode.

    Raises ``UserError`` for a data set, a size or a loader that cannot be used.
    """
    if not 0 < crop_size <= load_size:
        raise UserError(f"crop_size {crop_size}: must lie between 1 and load_size {load_size}")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be 1 or more")
    if seed < 0:
        raise UserError(f"seed {seed}: must be 0 or more")
    has_dali = _has_dali()
    if loader == "dali" and not has_dali:
        raise UserError(
            "--loader dali: NVIDIA DALI is not installed here (Linux only); use --loader portable"
        )
    kind = "portable" if loader == "portable" or not has_dali else "dali"
    device = torch.device(device)
    pairs = find_pairs(root, split)
    log.info(f"{len(pairs)} pairs from {root}, {split}, decoded by the {kind} loader")
    return Loader(
        pairs,
        kind,
        direction=direction,
        load_size=load_size,
        crop_size=crop_size,
        interpolation=interpolation,
        flip=flip,
        shuffle=shuffle,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        num_threads=num_threads,
        chunk=chunk or (16 if device.type == "cpu" else 64),
        cache_bytes=cache_bytes,
    )


def _has_dali() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the namespace package nvidia
        return False


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

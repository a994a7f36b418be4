"""Batches without end, in the order and with the crops of the plan, whichever decoder runs."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpix2pix.data.jitter import Images, jittered_chunks
from fastpix2pix.data.options import Direction, Kind, LoaderOptions, Requested, oriented
from fastpix2pix.data.pairs import Pair, Sides, find_pairs
from fastpix2pix.data.plan import Chunk, GlobalBatch, epoch_plan, global_batches
from fastpix2pix.data.resize import Interpolation, resize
from fastpix2pix.data.sides import widest
from fastpix2pix.errors import UserError
from fastpix2pix.pixels import normalize

log = logging.getLogger(__name__)

Halves = tuple[Tensor, Tensor]  # A and B


class Batch(NamedTuple):
    """What one training step takes of one rank, and where the stream of all ranks stands after it."""

    source: Tensor  # (n, input_nc, crop_size, crop_size), channels-last memory, in [-1, 1]
    target: Tensor  # (n, output_nc, crop_size, crop_size)
    epoch: int  # store epoch and position in a checkpoint, and Loader.stream goes on from there
    position: int  # samples of this epoch consumed, by all ranks
    names: tuple[str, ...]


@dataclass(eq=False)
class Loader:
    """Endless batches of one split. Made by :func:`open_loader`.

    ``kind`` says who decodes. DALI is asked to work only when the first batch of a stream is: until then
    nothing of it lives that could disturb the capture of a CUDA graph. If it fails then, and it was not
    asked for by name, ``kind`` becomes "portable".
    """

    pairs: list[Pair]
    sides: Sides  # of A and B, as all of their files hold them
    options: LoaderOptions
    kind: Kind
    device: torch.device
    dtype: torch.dtype
    _cache: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _streams: list[Iterator[Batch]] = field(default_factory=list, init=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def rest_of_epoch(self, position: int = 0) -> list[GlobalBatch]:
        """The batches from sample ``position`` of an epoch to its end; the last one may be smaller."""
        options = self.options
        return list(global_batches(len(self.pairs), position, options.batch_size, options.ranks))

    @property
    def batches_per_epoch(self) -> int:
        return len(self.rest_of_epoch())

    @property
    def cached(self) -> bool:
        """Whether the resized data set is kept on the device."""
        return self.options.cache_bytes >= self.resized_bytes

    @property
    def resized_bytes(self) -> int:
        """Of the whole data set, as the cache keeps it."""
        pixel = sum(side.channels * side.kept_as.itemsize for side in self.sides)
        return len(self.pairs) * self.options.load_size**2 * pixel

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
                source, target = oriented(a, b, self.options.direction)
                names = [self.pairs[i].name for i in chunk.which]
                low = 0
                for batch in chunk.batches:
                    part = slice(low, low := low + batch.share)
                    epoch, position = chunk.epoch, batch.end
                    if position == len(self):
                        epoch, position = epoch + 1, 0
                    yield Batch(source[part], target[part], epoch, position, tuple(names[part]))

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
        if self.kind == "dali":
            from fastpix2pix.data.dali_chunks import DaliFails

            try:
                yield from self._in_order(self._by_dali, epoch, position)
            except DaliFails as error:  # in place of the first chunk
                self.kind = _instead_of_dali(self.options.loader, error)
        yield from self._in_order(self._portably, epoch, position)

    def _in_order(
        self, jittered: Callable[[Iterator[Chunk]], Iterator[Halves]], epoch: int, position: int
    ) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        chunks, same_chunks = tee(self._chunks(epoch, position))
        with closing(jittered(same_chunks)) as made:
            for chunk, halves in zip(chunks, made, strict=True):
                yield chunk, *halves

    def _by_dali(self, chunks: Iterator[Chunk]) -> Iterator[Halves]:
        """(A, B) of each chunk, ready for training."""
        from fastpix2pix.data.dali_chunks import DaliDecoder

        decoder = DaliDecoder(self.pairs, self.options, self.device, self.dtype)
        if not self.cached:
            return decoder.jittered(chunks)
        chunks, same_chunks = tee(chunks)
        return decoder.jittered_images(self._resident(chunks, decoder.resized), same_chunks)

    def _portably(self, chunks: Iterator[Chunk]) -> Iterator[Halves]:
        """As :meth:`_by_dali`."""
        from fastpix2pix.data.portable import resized_chunks

        def resized(requests: Iterator[np.ndarray]) -> Iterator[Halves]:
            return resized_chunks(
                self.pairs,
                self.sides,
                requests,
                load_size=self.options.load_size,
                interpolation=self.options.interpolation,
                device=self.device,
                num_threads=self.options.num_threads,
            )

        chunks, same_chunks = tee(chunks)
        decoded = self._resident(chunks, resized) if self.cached else resized(c.which for c in chunks)
        with closing(decoded) as images:
            yield from jittered_chunks(images, same_chunks, self.options.crop_size, self.dtype)

    def _chunks(self, epoch: int, position: int) -> Iterator[Chunk]:
        batches_a_chunk = self.options.chunk_size(self.device) // self.options.batch_size
        while True:
            plan = epoch_plan(
                self.options.seed,
                epoch,
                len(self.pairs),
                load_size=self.options.load_size,
                crop_size=self.options.crop_size,
                flip=self.options.flip,
                shuffle=self.options.shuffle,
            )
            batches = self.rest_of_epoch(position)
            for first in range(0, len(batches), batches_a_chunk):
                some = tuple(batches[first : first + batches_a_chunk])
                mine = [place for batch in some for place in batch.of(self.options.rank)]
                yield Chunk(epoch, some, *(decisions[mine] for decisions in plan))
            epoch, position = epoch + 1, 0

    def _resident(
        self, chunks: Iterator[Chunk], resized: Callable[[Iterator[np.ndarray]], Iterator[Halves]]
    ) -> Iterator[tuple[Images, Images]]:
        """Each chunk's resized (A, B), from the device's memory, which ``resized`` fills at the first use."""
        self._cache = self._cache or self._filled_cache(resized)
        for chunk in chunks:
            if self.device.type == "cpu":
                yield tuple([half[i] for i in chunk.which] for half in self._cache)
            else:
                # non_blocking: a GPU's queue of steps is not drained for these few numbers
                which = torch.from_numpy(chunk.which).to(self.device, non_blocking=True)
                yield tuple(half.index_select(0, which) for half in self._cache)

    def _filled_cache(self, resized: Callable[[Iterator[np.ndarray]], Iterator[Halves]]) -> Halves:
        """A and B of every pair on the device: (count, load_size, load_size, channels)."""
        shape = (len(self.pairs), self.options.load_size, self.options.load_size)
        a, b = (
            torch.empty((*shape, side.channels), dtype=side.kept_as, device=self.device)
            for side in self.sides
        )
        log.info(f"decoding {len(self.pairs)} pairs into a cache of {self.resized_bytes / 2**20:.0f} MiB")
        chunk_size = self.options.chunk_size(self.device)
        everything = np.arange(len(self.pairs))
        requests = np.split(everything, everything[chunk_size::chunk_size])
        with closing(resized(iter(requests))) as decoded:
            for which, halves in zip(requests, decoded, strict=True):
                part = slice(which[0], which[-1] + 1)
                a[part], b[part] = halves
        return a, b


def open_loader(
    root: str | Path,
    options: LoaderOptions = LoaderOptions(),  # noqa: B008 (frozen)
    *,
    split: str = "train",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """Opens ``split`` of the data set in ``root`` (layouts: :func:`find_pairs`) for training.

    Batches are of ``dtype``, in the memory of ``device``. Raises ``UserError`` for a data set or a loader
    that cannot be used.
    """
    pairs = find_pairs(root, split, options.sides)[: options.max_dataset_size]
    if len(pairs) < options.ranks:
        raise UserError(f"{root}: {len(pairs)} pairs do not give each of {options.ranks} processes one; use "
                        "fewer processes")  # fmt: skip
    sides = widest(pair.sides[0] for pair in pairs), widest(pair.sides[1] for pair in pairs)
    loader = Loader(pairs, sides, options, _choose(options.loader, sides), torch.device(device), dtype)
    log.info(f"{len(pairs)} pairs of {root}, {split}, decoded by the {loader.kind} loader")
    if options.cache_bytes and not loader.cached:
        log.warning(
            f"{len(pairs)} pairs take {loader.resized_bytes} bytes: too many for a cache of "
            f"{options.cache_bytes} bytes"
        )
    return loader


def _choose(requested: Requested, sides: Sides) -> Kind:
    if requested == "portable":
        return "portable"
    if others := [str(side) for side in sides if not side.plain]:
        line = f"DALI reads 8-bit RGB, and the files hold {' and '.join(others)}"
        if requested == "dali":
            raise UserError(f"--loader dali: {line}; use --loader portable")
        log.warning(f"{line}: the portable loader reads them")
        return "portable"
    try:
        import fastpix2pix.data.dali_chunks  # noqa: F401
    except Exception as error:  # DALI is absent or too old, or a library that it needs is
        return _instead_of_dali(requested, error)
    return "dali"


def _instead_of_dali(requested: Requested, error: Exception) -> Kind:
    """What serves where DALI fails, said in one line. Raises ``UserError`` if DALI was asked for by name."""
    fails = f"NVIDIA DALI can't be used here ({error})"
    remedy = "pip install -U 'nvidia-dali-cuda120>=2.2'"
    if requested == "dali":
        raise UserError(f"--loader dali: {fails}; use --loader portable, or {remedy}") from error
    log.warning(f"{fails}: the portable loader takes its place; {remedy} may mend it")
    return "portable"


def load_pair(
    pair: Pair, *, direction: Direction, size: int, interpolation: Interpolation
) -> tuple[Tensor, Tensor]:
    """(source, target) of one pair without jitter: resized to ``size`` squared, as the tutorial tests.

    Each is float32 (1, channels, size, size) in channels-last memory, in [-1, 1]. Decoded as by the portable
    loader, whichever trains. Raises ``UserError`` naming a file that cannot be decoded.
    """
    a, b = (
        normalize(resize(side.kept(half), size, interpolation), torch.float32)
        for side, half in zip(pair.sides, pair.read(), strict=True)
    )
    return oriented(a, b, direction)

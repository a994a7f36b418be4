"""DALI's pipelines at work: fed with the files of pairs in the plan's order, and what fails is named."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from io import BytesIO
from itertools import tee
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import Pipeline
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from PIL import Image
from torch import Tensor

from fastpix2pix.data import dali
from fastpix2pix.data.jitter import jittered_chunks
from fastpix2pix.data.options import LoaderOptions
from fastpix2pix.data.pairs import Pair
from fastpix2pix.data.pictures import read
from fastpix2pix.data.plan import Chunk
from fastpix2pix.data.resize import resize
from fastpix2pix.errors import UserError

Halves = tuple[TensorListCPU | TensorListGPU, ...]  # A and B of a chunk
Request = tuple[np.ndarray, tuple[np.ndarray, ...]]  # indices of pairs, and a pipeline's further inputs


class DaliFails(Exception):
    """DALI cannot work on this machine, whatever the files; says why."""


@dataclass(frozen=True)
class DaliDecoder:
    """DALI at work on ``pairs``, with results in the memory of ``device``.

    Its methods read, and decode, what comes next while earlier results are used. They raise
    ``UserError`` naming a file that cannot be decoded, and ``DaliFails`` in place of the first result.
    """

    pairs: list[Pair]
    options: LoaderOptions
    device: torch.device
    dtype: torch.dtype

    def jittered(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Tensor, Tensor]]:
        """(A, B) of each chunk for training: (n, 3, crop_size, crop_size), channels-last, in [-1, 1]."""
        if not self._resizes_exactly():
            chunks, same_chunks = tee(chunks)
            with closing(self.resized(chunk.which for chunk in chunks)) as images:
                yield from self.jittered_images(images, same_chunks)
            return
        requests = ((chunk.which, self._decisions(chunk)) for chunk in chunks)
        settings = {"load_size": self.options.load_size, **self._crops()}
        for halves in self._run_on_files(dali.training_pipeline, requests, **settings):
            yield tuple(self._for_training(half) for half in halves)

    def resized(self, requests: Iterator[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each request (int64 (n,), indices of pairs) (A, B): uint8 (n, load_size, load_size, 3)."""
        load_size = self.options.load_size if self._resizes_exactly() else None
        requests = ((which, ()) for which in requests)
        for halves in self._run_on_files(dali.resizing_pipeline, requests, load_size=load_size):
            yield tuple(self._resized(half) for half in halves)

    def jittered_images(
        self, images: Iterator[tuple[Tensor, Tensor]], chunks: Iterator[Chunk]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`jittered`, from the chunks' (A, B) as of :meth:`resized`."""
        if self.device.type == "cpu":  # there the tensor operations take half of DALI's time
            return jittered_chunks(images, chunks, self.options.crop_size, self.dtype)
        return self._jittered_by_dali(images, chunks)

    def _jittered_by_dali(
        self, images: Iterator[tuple[Tensor, Tensor]], chunks: Iterator[Chunk]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        def no_file_fails(error: Exception) -> Exception:
            return DaliFails(_reason(error))

        sources = {"images": lambda: next(images), "decisions": lambda: self._decisions(next(chunks))}
        make = self._prepared(dali.jitter_pipeline, **sources, **self._crops())
        for halves in self._run(make, no_file_fails):
            yield tuple(self._for_training(half) for half in halves)

    def _resizes_exactly(self) -> bool:
        options = self.options
        return dali.resizes_exactly(self.pairs, options.load_size, options.interpolation, self.device)

    def _decisions(self, chunk: Chunk) -> tuple[np.ndarray, ...]:
        return dali.decisions(chunk, self.options.load_size, self.options.crop_size)

    def _crops(self) -> dict:
        return {"crop_size": self.options.crop_size, "dtype": self.dtype}

    def _for_training(self, half: TensorListCPU | TensorListGPU) -> Tensor:
        return torch.from_dlpack(half.as_tensor()).view(self.dtype).permute(0, 3, 1, 2)

    def _resized(self, half: TensorListCPU | TensorListGPU) -> Tensor:
        size, interpolation = self.options.load_size, self.options.interpolation
        if half.is_dense_tensor():
            return resize(torch.from_dlpack(half.as_tensor()), size, interpolation)
        images = (torch.from_dlpack(half[i])[None] for i in range(len(half)))
        return torch.cat([resize(image, size, interpolation) for image in images])

    # ---- running a pipeline --------------------------------------------------------------------

    def _run_on_files(
        self, definition: Callable[..., Pipeline], requests: Iterator[Request], **settings
    ) -> Iterator[Halves]:
        asked: deque[np.ndarray] = deque()
        with ThreadPoolExecutor(self.options.num_threads) as readers:
            make = self._prepared(
                definition,
                source=_read_ahead(self.pairs, requests, asked, readers),
                files_per_pair=len(self.pairs[0].files),
                **settings,
            )
            for halves in self._run(make, lambda error: self._blame(asked[0], error)):
                asked.popleft()
                yield halves

    def _prepared(self, definition: Callable[..., Pipeline], **settings) -> Callable[[], Pipeline]:
        settings |= {
            "device": "gpu" if self.device.type == "cuda" else "cpu",
            "device_id": self._device_id(),
            "num_threads": self.options.num_threads,
            "batch_size": self.options.chunk_size(self.device),
        }
        return lambda: definition(**settings)

    def _run(
        self, make: Callable[[], Pipeline], explain: Callable[[Exception], Exception]
    ) -> Iterator[Halves]:
        """The pipeline's results; ``explain`` says what to raise for a run that failed."""
        try:
            with self._current_device():
                pipeline = make()
                pipeline.build()
        except Exception as error:  # whatever this machine or this release of DALI lacks
            raise DaliFails(_reason(error)) from error
        first = True
        while True:
            try:
                with self._current_device():
                    # Ready for what follows on this stream; DALI frees them after all work of the device.
                    halves = pipeline.run(torch.cuda.current_stream() if self.device.type == "cuda" else None)
            except StopIteration:
                return
            except (UserError, DaliFails):
                raise
            except Exception as error:  # a RuntimeError mostly
                explained = explain(error)
                if isinstance(explained, DaliFails) and not first:
                    explained = UserError(f"DALI fails ({explained}); try --loader portable")
                raise explained from error
            first = False
            yield halves

    def _current_device(self) -> AbstractContextManager:
        """DALI takes torch's current stream, which is that of the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _device_id(self) -> int | None:
        if self.device.type == "cpu":
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    # ---- finding out what failed ---------------------------------------------------------------

    def _blame(self, which: np.ndarray, error: Exception) -> Exception:
        """What to raise when a run on the pairs ``which`` failed: the file that either decoder refuses."""
        files = [(path, self.pairs[i].plain) for i in which for path in self.pairs[i].files]
        for path, _ in files:
            read(path)  # raises UserError with Pillow's reason
        refused = {path: reason for path, plain in files if (reason := self._refusal(path, plain))}
        if not refused or len(refused) == len(files) > 1:
            return DaliFails(_reason(error))
        path, reason = next(iter(refused.items()))
        return UserError(
            f"{path}: DALI cannot decode it ({reason}) though Pillow can; save it anew, remove it, or use "
            "--loader portable"
        )

    def _refusal(self, path: Path, plain: bool) -> str:
        """Why DALI does not decode this file alone; nothing if it does."""
        make = self._prepared(dali.decoding_pipeline, source=lambda: [_encoded(path, plain)])
        try:
            with self._current_device():
                make().run()
        except Exception as error:
            return _reason(error)
        return ""


def _read_ahead(
    pairs: list[Pair], requests: Iterator[Request], asked: deque, readers: ThreadPoolExecutor
) -> Callable[[], tuple]:
    """A DALI source that has the next request's files read while it hands out the present one's."""

    def submit() -> tuple[Request, list[list[Future]]] | None:
        request = next(requests, None)
        if request is None:
            return None
        chosen = [pairs[i] for i in request[0]]
        batches = zip(*(pair.files for pair in chosen), strict=True)
        plain = [pair.plain for pair in chosen]
        return request, [
            [readers.submit(_encoded, *job) for job in zip(b, plain, strict=True)] for b in batches
        ]

    waiting = submit()

    def source() -> tuple:
        nonlocal waiting
        if waiting is None:
            raise StopIteration
        ((which, further), batches), waiting = waiting, submit()
        asked.append(which)
        return *([file.result() for file in batch] for batch in batches), *further

    return source


def _encoded(path: Path, plain: bool) -> np.ndarray:
    """The file's bytes; of a kind that decoders read differently, those of its 8-bit RGB conversion."""
    if plain and os.path.isfile(path):  # opening a pipe would wait for ever
        try:
            return np.fromfile(path, np.uint8)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); replace or remove it") from error
    converted = BytesIO()
    Image.fromarray(read(path, 3)).save(converted, "PNG", compress_level=0)
    return np.frombuffer(converted.getvalue(), np.uint8)


def _reason(error: Exception) -> str:
    """What DALI says of an error, without the traceback of the pipeline's definition around it."""
    text = str(error).split("encountered:")[-1].split("Current pipeline object")[0]
    return " ".join(text.split())[:200] or type(error).__name__

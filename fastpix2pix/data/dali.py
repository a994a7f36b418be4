"""Pairs decoded by NVIDIA DALI: one pipeline for the CPU and the GPU, the device is an argument."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline, pipeline_def
from PIL import Image
from torch import Tensor

from fastpix2pix.data.pairs import Pair, read_rgb
from fastpix2pix.data.resize import Interpolation, resize
from fastpix2pix.errors import UserError


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=2)
def pair_pipeline(source: Callable, files_per_pair: int, device: str):
    """Encoded files -> (A, B), uint8 HWC, in the memory of ``device`` ("cpu" or "gpu").

    ``source()`` gives for each run a batch of encoded files (uint8 arrays) per file of a pair: one batch
    when the halves stand side by side, else A's and B's.
    """
    encoded = fn.external_source(source=source, num_outputs=files_per_pair, batch=True, dtype=types.UINT8)
    pictures = [
        fn.decoders.image(
            file,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # as the tutorial and Pillow read it
            jpeg_fancy_upsampling=True,  # nvJPEG's default repeats chroma; libjpeg, and so Pillow, blends it
        )
        for file in encoded
    ]
    if files_per_pair == 2:
        return tuple(pictures)
    both = pictures[0]
    return tuple(fn.slice(both, rel_start=(0, x), rel_shape=(1, 0.5), axes=(0, 1)) for x in (0, 0.5))


def resized_chunks(
    pairs: list[Pair],
    requests: Iterator[np.ndarray],
    *,
    load_size: int,
    interpolation: Interpolation,
    device: torch.device,
    num_threads: int,
    largest_request: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each request (int64 (n,), indices into ``pairs``): (A, B), uint8 (n, load_size, load_size, 3).

    Files of later requests are read, and decoded, while earlier results are used. Raises ``UserError``
    naming the file that cannot be decoded.
    """
    files_per_pair = len(pairs[0].files)
    asked: deque[np.ndarray] = deque()
    with ThreadPoolExecutor(num_threads) as readers:
        source = _read_ahead(pairs, requests, asked, readers)
        pipeline = pair_pipeline(
            source=source,
            files_per_pair=files_per_pair,
            device="gpu" if device.type == "cuda" else "cpu",
            batch_size=largest_request,
            num_threads=num_threads,
            device_id=_device_id(device),
        )
        while halves := _run(pipeline, device, pairs, asked):
            asked.popleft()
            yield tuple(_resized(half, load_size, interpolation) for half in halves)


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _read_ahead(
    pairs: list[Pair], requests: Iterator[np.ndarray], asked: deque, readers: ThreadPoolExecutor
) -> Callable[[], tuple[list[np.ndarray], ...]]:
    """A DALI source that has the next request's files read while it hands out the present one's."""

    def submit() -> tuple[np.ndarray, list[list[Future]]] | None:
        indices = next(requests, None)
        if indices is None:
            return None
        chosen = [pairs[i] for i in indices]
        batches = zip(*(pair.files for pair in chosen), strict=True)
        plain = [pair.plain for pair in chosen]
        return indices, [
            [readers.submit(_encoded, *job) for job in zip(b, plain, strict=True)] for b in batches
        ]

    waiting = submit()

    def source() -> tuple[list[np.ndarray], ...]:
        nonlocal waiting
        if waiting is None:
            raise StopIteration
        (indices, batches), waiting = waiting, submit()
        asked.append(indices)
        return tuple([file.result() for file in batch] for batch in batches)

    return source


def _encoded(path: Path, plain: bool) -> np.ndarray:
    """The file's bytes; of a kind that decoders read differently, those of its 8-bit RGB conversion."""
    if plain:
        try:
            return np.fromfile(path, np.uint8)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); replace or remove it") from error
    converted = BytesIO()
    Image.fromarray(read_rgb(path)).save(converted, "PNG", compress_level=0)
    return np.frombuffer(converted.getvalue(), np.uint8)


def _run(pipeline: Pipeline, device: torch.device, pairs: list[Pair], asked: deque) -> tuple:
    """The next (A, B) as DALI tensor lists; nothing when the requests have come to their end."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        return pipeline.run(stream)
    except StopIteration:
        return ()
    except RuntimeError as error:
        if not asked:
            raise
        for i in asked[0]:
            pairs[i].read()  # raises UserError at the file that is broken
        files = f"{pairs[asked[0][0]].a} ... {pairs[asked[0][-1]].a}"
        raise UserError(
            f"{files}: DALI fails though Pillow reads them; try --loader portable ({error})"
        ) from error


def _resized(half, load_size: int, interpolation: Interpolation) -> Tensor:
    if half.is_dense_tensor():
        return resize(torch.from_dlpack(half.as_tensor()), load_size, interpolation)
    images = [torch.from_dlpack(image)[None] for image in (half[i] for i in range(len(half)))]
    return torch.cat([resize(image, load_size, interpolation) for image in images])

"""NVIDIA DALI's part: one pipeline decodes, splits, resizes, crops and flips, on the CPU or the GPU.

Its pixels are those of ``resize`` and ``jitter``, to the last bit: nearest where :func:`resizes_exactly`
holds. Bicubic, and the sizes at which DALI's float32 coordinates hit another pixel, are decoded and split
here, resized by ``resize``, and jittered by a second pipeline.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import nvidia.dali
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.data_node import DataNode

from fastpix2pix.data.pairs import Pair
from fastpix2pix.data.plan import Chunk
from fastpix2pix.data.resize import Interpolation, nearest_indices
from fastpix2pix.pixels import normalize

OLDEST = (2, 2)  # before it, the decoder always turned pictures by their EXIF orientation
if tuple(map(int, nvidia.dali.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"DALI {nvidia.dali.__version__} is older than {'.'.join(map(str, OLDEST))}")

# DALI has no bfloat16: its bits travel as int16.
DALI_TYPES = {
    torch.float32: (types.FLOAT, torch.float32),
    torch.float16: (types.FLOAT16, torch.float16),
    torch.bfloat16: (types.INT16, torch.int16),
}


# ---- the pipelines -----------------------------------------------------------------------------


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=2)
def training_pipeline(
    source: Callable, files_per_pair: int, device: str, load_size: int, crop_size: int, dtype: torch.dtype
):
    """Encoded files and the plan's decisions -> (A, B) in [-1, 1], HWC, in the memory of ``device``.

    ``device`` is "cpu" or "gpu". ``source()`` gives for each run a batch of encoded files (uint8 arrays)
    per file of a pair, one batch when the halves stand side by side, else A's and B's; then what
    :func:`decisions` makes of the plan. bfloat16 comes as its bits.
    """
    *files, left, top, mirror = fn.external_source(
        source=source,
        num_outputs=files_per_pair + 3,
        batch=True,
        dtype=[types.UINT8] * files_per_pair + [types.FLOAT, types.FLOAT, types.INT32],
    )
    halves = _nearest([_decoded(file, device) for file in files], load_size)
    return tuple(_jittered(half, left, top, mirror, crop_size, dtype) for half in halves)


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=2)
def resizing_pipeline(source: Callable, files_per_pair: int, device: str, load_size: int | None):
    """Encoded files -> (A, B), uint8 HWC; resized by nearest neighbour unless ``load_size`` is None."""
    files = fn.external_source(source=source, num_outputs=files_per_pair, batch=True, dtype=types.UINT8)
    pictures = [_decoded(file, device) for file in files]
    return tuple(_split(pictures) if load_size is None else _nearest(pictures, load_size))


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=2)
def jitter_pipeline(images: Callable, decisions: Callable, device: str, crop_size: int, dtype: torch.dtype):
    """Resized (A, B), uint8 (n, size, size, 3) on ``device``, -> (A, B) as of :func:`training_pipeline`."""
    # The images are copied: DALI mixes up shared batches of which some are contiguous and some are not.
    halves = fn.external_source(
        source=images, num_outputs=2, batch=True, dtype=types.UINT8, layout="HWC", device=device
    )
    left, top, mirror = fn.external_source(
        source=decisions, num_outputs=3, batch=True, dtype=[types.FLOAT, types.FLOAT, types.INT32]
    )
    return tuple(_jittered(half, left, top, mirror, crop_size, dtype) for half in halves)


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def decoding_pipeline(source: Callable, device: str):
    """Encoded files -> pictures, uint8 HWC."""
    return _decoded(fn.external_source(source=source, batch=True, dtype=types.UINT8), device)


def _decoded(file: DataNode, device: str) -> DataNode:
    return fn.decoders.image(
        file,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,  # as the tutorial and Pillow read it
        jpeg_fancy_upsampling=True,  # nvJPEG's default repeats chroma; libjpeg, and so Pillow, blends it
        hw_decoder_load=0.0,  # else another decoder, which may round otherwise, takes some of each chunk
    )


def _split(pictures: list[DataNode]) -> list[DataNode]:
    if len(pictures) == 2:
        return pictures
    return [fn.slice(pictures[0], rel_start=(0, x), rel_shape=(1, 0.5), axes=(0, 1)) for x in (0, 0.5)]


def _nearest(pictures: list[DataNode], load_size: int) -> list[DataNode]:
    """Splits and resizes in one pass: each half is a region of interest of its picture.

    The region is moved by a quarter of the distance between two ties of the half-pixel-centre rule, which
    lies further from either than float32 errs (:func:`_dali_indices` tells where).
    """
    step = _quarter_step(load_size)
    resized = []
    for picture, columns, first in _regions(pictures):
        size = picture.shape(dtype=types.FLOAT)[0:2] * np.float32([1, columns])
        start = size * np.float32([0, first]) + step
        resized.append(
            fn.resize(
                picture,
                interp_type=types.INTERP_NN,
                size=[load_size, load_size],
                roi_start=start,
                roi_end=start + size,
            )
        )
    return resized


def _regions(pictures: list[DataNode]) -> list[tuple[DataNode, float, int]]:
    """(picture, share of its columns, which such share) of A and of B."""
    if len(pictures) == 2:
        return [(picture, 1.0, 0) for picture in pictures]
    return [(pictures[0], 0.5, half) for half in (0, 1)]


def _jittered(
    image: DataNode, left: DataNode, top: DataNode, mirror: DataNode, crop_size: int, dtype: torch.dtype
) -> DataNode:
    """Crop, flip and, by a table, the step to [-1, 1]: the operator's own is off in the last place."""
    pixels = fn.crop_mirror_normalize(
        image,
        crop=(crop_size, crop_size),
        crop_pos_x=left,
        crop_pos_y=top,
        mirror=mirror,
        dtype=types.UINT8,
        output_layout="HWC",
    )
    dali_type, torch_type = DALI_TYPES[dtype]
    levels = normalize(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256, 1), dtype).flatten()
    return fn.lookup_table(
        pixels, keys=list(range(256)), values=levels.view(torch_type).tolist(), dtype=dali_type
    )


def decisions(chunk: Chunk, load_size: int, crop_size: int) -> tuple[np.ndarray, ...]:
    """The chunk's (left, top, mirror) as DALI takes them: the corner as a share of the room it has."""
    room = np.float32(max(1, load_size - crop_size))
    return (
        chunk.left.astype(np.float32) / room,
        chunk.top.astype(np.float32) / room,
        chunk.mirror.astype(np.int32),
    )


# ---- where DALI's nearest is exact ---------------------------------------------------------------


def resizes_exactly(
    pairs: Iterable[Pair], load_size: int, interpolation: Interpolation, device: torch.device
) -> bool:
    """Whether :func:`_nearest` gives the pixels of ``resize`` for all of ``pairs``."""
    sizes = {(*pair.size, pair.b is None) for pair in pairs}
    if interpolation != "nearest":
        return all(size[:2] == (load_size, load_size) for size in sizes)
    return all(_is_exact(*size, load_size, device.type) for size in sizes)


@lru_cache(maxsize=4096)
def _is_exact(height: int, width: int, side_by_side: bool, load_size: int, device: str) -> bool:
    regions = [("rows", height, 0), ("columns", width, 0)]
    if side_by_side:
        regions.append(("columns", width, width))
    return all(
        np.array_equal(indices - first, nearest_indices(size, load_size, torch.device("cpu")))
        for axis, size, first in regions
        for indices in _dali_indices(axis, size, first, load_size, device)
    )


def _dali_indices(axis: str, size: int, first: int, load_size: int, device: str) -> list[np.ndarray]:
    """The source rows or columns that DALI's nearest takes for ``size`` of them from ``first`` on.

    Several answers, as a compiler may or may not fuse a product with a sum, and DALI may or may not count
    columns from the region's first. A GPU computes each coordinate by itself, and so does a CPU in a row;
    from row to row it adds up the step and its error.
    """
    start = np.float32(first) + _quarter_step(load_size)
    step = (start + np.float32(size) - start) / np.float32(load_size)
    half = np.float32(0.5)
    if axis == "rows" and device == "cpu":
        steps = np.full(load_size, step)
        steps[0] = start + half * step
        return [np.floor(np.add.accumulate(steps))]
    x = np.arange(load_size, dtype=np.float32)
    answers = []
    for shift in {first, 0}:
        origin = start - np.float32(shift)
        floors = (
            _floors(x, step, origin + half * step) if device == "cuda" else _floors(x + half, step, origin)
        )
        answers += [indices + shift for indices in floors]
    return answers


def _floors(x: np.ndarray, factor: np.float32, summand: np.float32) -> list[np.ndarray]:
    fused = (x.astype(np.float64) * factor + summand).astype(np.float32)
    return [np.floor(x * factor + summand), np.floor(fused)]


def _quarter_step(load_size: int) -> np.float32:
    return np.float32(0.25 / load_size)

"""How Triton kernels are chosen, launched and observed, and how large their blocks are."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: kernels are defined as plain functions that nobody calls
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda decorated: decorated))
    tl = SimpleNamespace(constexpr=None, float32=None, float64=None)
    HAS_TRITON = False
else:
    HAS_TRITON = True

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
"""Types that kernels compute in, as a kernel's constants."""

INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""The kernels were defined for Triton's interpreter: they take CPU tensors and are never compiled.

Triton reads the variable when a kernel is defined, so it must be set before the first import.
"""

kernels_on_cpu = INTERPRETING
"""Whether CPU tensors go to the interpreter; the tests turn it on where they mean it (tests/conftest.py)."""


REGISTERS = 2**16  # of a multiprocessor, in 32 bits
MAX_REGISTERS = 255  # of a thread
WARP = 32


def _compilation(num_warps: int = 4, **_: Any) -> dict[str, Any]:
    """How every kernel is compiled.

    Whether a * b + c is fused by itself differs between GPUs, the interpreter and versions of Triton. Kernels
    that want it say tl.fma, so that what is tested is what runs. A limit to the registers is named because
    without one ptxas spills a few of some layers to reach the next step of occupancy; it is the hardware's.
    """
    return {"enable_fp_fusion": False, "maxnreg": min(REGISTERS // (WARP * num_warps), MAX_REGISTERS)}


kernels_on_gpu = True
"""Whether CUDA tensors go to the kernels; turned off where they are found to disagree with the reference."""


class Launch(NamedTuple):
    """One kernel launch: what ``launch`` was called with.

    reads, writes: the tensors (slices of larger buffers included) of which every element is read or written,
    or None for one that this launch does without.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    reads: Sequence[Tensor | None]
    writes: Sequence[Tensor | None]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def bytes_moved(self) -> int:
        """Bytes of all operands, each counted once."""
        return sum(t.numel() * t.element_size() for t in (*self.reads, *self.writes) if t is not None)

    def run(self) -> None:
        """Enqueue the kernel (again), on the same tensors."""
        self.kernel[self.grid](*self.args, **self.options, **_compilation(**self.options))

    def compile(self) -> Any:
        """The compiled kernel (``triton.compiler.CompiledKernel``), without launching it."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.options, **_compilation(**self.options))


_observer: Callable[[Launch], None] | None = None
_running = True


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    reads: Sequence[Tensor | None],
    writes: Sequence[Tensor | None],
    **options: Any,
) -> None:
    """Enqueue ``kernel`` on ``grid``: the only way in which this package starts a kernel.

    args: the kernel's pointers and numbers, by position. options: its compile-time constants, and num_warps.
    reads, writes: see ``Launch``.
    """
    this = Launch(kernel, grid, args, options, reads, writes)
    if _observer is not None:
        _observer(this)
    if _running:
        this.run()


@contextmanager
def observed(observer: Callable[[Launch], None], *, run: bool = True) -> Iterator[None]:
    """Show every launch made inside to ``observer``, in order, each before it is enqueued.

    run=False enqueues nothing: the ops choose their kernels, for tensors of any device, and their results
    are left as they were allocated. Not to be nested.
    """
    global _observer, _running
    _observer, _running = observer, run
    try:
        yield
    finally:
        _observer, _running = None, True


def use_triton(x: Tensor) -> bool:
    """Whether an op on ``x`` runs its Triton kernels (else its reference)."""
    if not HAS_TRITON:
        return False
    return (x.is_cuda and kernels_on_gpu) or not _running or (kernels_on_cpu and x.device.type == "cpu")


# ------------------------------------------------------------------------------------- images as matrices


def pixel_stride(image: Tensor) -> int | None:
    """Elements from one pixel of (N, C, H, W) to the next, or None if they don't lie at equal distances.

    A channels-last image, a slice of its channels and a range of its batch have one. Dimensions of size 1
    can have any stride.
    """
    n, c, h, w = image.shape
    per_image, per_channel, per_row, per_column = image.stride()
    if c > 1 and per_channel != 1:
        return None
    # The innermost dimension of more than one pixel decides; the others must agree with it.
    stride = per_column if w > 1 else per_row if h > 1 else per_image if n > 1 else c
    agrees = (h == 1 or per_row == w * stride) and (n == 1 or per_image == h * w * stride)
    return stride if agrees and stride >= c else None


def as_pixels(image: Tensor) -> Tensor:
    """``image`` itself if it has a pixel stride, else a channels-last copy."""
    return image.contiguous(memory_format=torch.channels_last) if pixel_stride(image) is None else image


# -------------------------------------------------------------------------------------------- block sizes

VECTOR_BYTES = 16
"""The widest access of one thread. Triton narrows it where threads would be left without work, so a tile has
a vector for every thread wherever the image has the values."""

SECTOR_BYTES = 32
"""What caches and memory move at least: to read less of a pixel wastes bandwidth."""


@dataclass(frozen=True)
class Regime:
    """How the programs of a kernel are cut out of an image.

    sectors: of each pixel, at least. vectors: of a tile, held by each thread. max_warps: of one program.
    """

    sectors: int
    vectors: int
    max_warps: int


# A program that walks over all pixels of its channels. There are few (32 for 512 channels in 16 bit), so each
# takes the narrowest slice that wastes no bandwidth, and many warps. Forward, a thread has two vectors in
# flight. Backward it reads three images, so one of each will do; what it knows about its channels (eight
# numbers each) takes 64 registers in 16 bit, too many of the 128 that 16 warps would leave it.
WHOLE_FORWARD = Regime(sectors=1, vectors=2, max_warps=16)
WHOLE_BACKWARD = Regime(sectors=1, vectors=1, max_warps=8)

# Programs that share the pixels. With two sectors of each pixel, a warp's load touches 8 lines of the L1,
# which looks them up as fast as the L2 delivers; with 8 warps, two or more programs fit on a multiprocessor
# and hide each other's waiting.
CHUNK_FORWARD = Regime(sectors=2, vectors=2, max_warps=8)
CHUNK_BACKWARD = Regime(sectors=2, vectors=1, max_warps=8)


@dataclass(frozen=True)
class Tile:
    """The pixels and channels that a program holds in registers at a time, and the warps that hold them."""

    pixels: int
    channels: int
    num_warps: int


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def choose_tile(pixels: int, channels: int, itemsize: int, regime: Regime) -> Tile:
    """As many pixels as the warps can hold; if there are too few, more channels."""
    vector = VECTOR_BYTES // itemsize
    of_a_warp = WARP * vector * regime.vectors
    all_channels = next_power_of_2(channels)
    block_channels = min(regime.sectors * SECTOR_BYTES // itemsize, all_channels)
    block_pixels = min(next_power_of_2(pixels), regime.max_warps * of_a_warp // block_channels)
    block_channels = min(max(block_channels, WARP * vector // block_pixels), all_channels)
    num_warps = block_pixels * block_channels // of_a_warp
    return Tile(block_pixels, block_channels, min(max(num_warps, 1), regime.max_warps))


@dataclass(frozen=True)
class Chunks:
    """How the pixels of a group are shared: ``count`` programs take ``pixels`` each, the last one fewer."""

    count: int
    pixels: int


def _chunks(pixels: int, tile: Tile, values_each: int, most: int | None = None) -> Chunks:
    each = max(values_each // tile.channels, tile.pixels)
    if most is not None:
        each = max(each, cdiv(cdiv(pixels, most), tile.pixels) * tile.pixels)
    return Chunks(cdiv(pixels, each), each)


def reduction_chunks(pixels: int, tile: Tile) -> Chunks:
    """For partial sums: 2**14 values each, which makes 64 programs of a 128x128x64 image.

    Every program of the next launch reads the partial sums of all chunks: there are never more than 128.
    """
    return _chunks(pixels, tile, 2**14, most=128)


def elementwise_chunks(pixels: int, tile: Tile) -> Chunks:
    """For everything else: 2**13 values each, against which reading the per-channel numbers weighs little."""
    return _chunks(pixels, tile, 2**13)


FEW_PIXELS = 1024
"""Up to so many pixels, all groups together, one launch does it all. Model: a program's slice is then at most
32 KiB an image, read again from the L1 cache, and takes about as long as a second launch would."""

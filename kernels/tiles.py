"""Block sizes: how the programs of a kernel divide an image, and how many warps each has."""

from dataclasses import dataclass

from fastpix2pix.kernels.variants import WARP

VECTOR_BYTES = 16
"""The widest memory access of one thread. Triton narrows it where a tile has too few values for all threads,
so a tile has a vector for every thread wherever the image is large enough."""

SECTOR_BYTES = 32
"""The smallest unit that caches and memory transfer: to read less of a pixel wastes bandwidth."""


@dataclass(frozen=True)
class Regime:
    """How a kernel's tiles are cut.

    sectors: the fewest of each pixel that a tile has. vectors: how many of a tile each thread holds.
    max_warps: the most of one program.
    """

    sectors: int
    vectors: int
    max_warps: int


# Kernels whose programs hold all pixels of a group. There are few such programs (32 for 512 channels in 16
# bit), so each takes the narrowest slice that wastes no bandwidth, and many warps. Forward, a thread has two
# vectors in flight. Backward it reads three images, so one vector of each will do.
WHOLE_FORWARD = Regime(sectors=1, vectors=2, max_warps=16)
WHOLE_BACKWARD = Regime(sectors=1, vectors=1, max_warps=16)

# Kernels whose programs share the pixels. With two sectors of each pixel, a warp's load touches 8 lines of
# the L1, whose tag lookups then keep up with what the L2 delivers. Forward, two or more programs of 8 warps
# fit on a multiprocessor and hide each other's latency; backward, three images fill the registers of 16.
CHUNK_FORWARD = Regime(sectors=2, vectors=2, max_warps=8)
CHUNK_BACKWARD = Regime(sectors=2, vectors=1, max_warps=16)


MOST_VECTORS = 2
"""Of each image that a thread of the first kind holds where there are many pixels: with more, the values of
three images and the statistics of eight channels no longer fit in the registers that 16 warps leave it."""


@dataclass(frozen=True)
class Tile:
    """The block of pixels and channels that a program holds in registers at a time, and its warps."""

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
    """As many of a group's pixels as the warps can hold; where there are fewer, more channels."""
    held = regime.max_warps * regime.vectors * WARP * VECTOR_BYTES // itemsize
    narrowest = min(regime.sectors * SECTOR_BYTES // itemsize, next_power_of_2(channels))
    return _tile(min(next_power_of_2(pixels), held // narrowest), narrowest, channels, itemsize, regime)


def choose_whole_tile(pixels: int, channels: int, itemsize: int, regime: Regime) -> Tile:
    """All of a group's pixels, with more channels where they are few.

    Where they are many, a program has one vector of each pixel, half a sector, and its neighbour the other.
    """
    held = regime.max_warps * MOST_VECTORS * WARP * VECTOR_BYTES // itemsize
    vector = VECTOR_BYTES // itemsize
    narrowest = max(min(regime.sectors * SECTOR_BYTES // itemsize, held // next_power_of_2(pixels)), vector)
    narrowest = min(narrowest, next_power_of_2(channels))
    return _tile(next_power_of_2(pixels), narrowest, channels, itemsize, regime)


def _tile(block_pixels: int, narrowest: int, channels: int, itemsize: int, regime: Regime) -> Tile:
    vector_each = WARP * VECTOR_BYTES // itemsize
    block_channels = max(narrowest, min(vector_each // block_pixels, next_power_of_2(channels)))
    num_warps = block_pixels * block_channels // (vector_each * regime.vectors)
    return Tile(block_pixels, block_channels, min(max(num_warps, 1), regime.max_warps))


@dataclass(frozen=True)
class Chunks:
    """``count`` programs share the pixels of a group: ``pixels`` each, and the rest for the last one.

    tiles: of one program, walked through one after the other.
    """

    count: int
    pixels: int
    tiles: int


MOST_CHUNKS = 128
"""Of a group: every program of the next launch reads the partial sums of all of them at once."""

ONE_WAVE = 256
"""Programs that large GPUs run at the same time, two on each of 132 multiprocessors: as long as there are no
more, one tile each takes the least time."""

TILES_IN_FLIGHT = 2
"""A program that walks through its tiles loads the next one before it waits for this one."""


def _chunks(pixels: int, tile: Tile, tiles: int) -> Chunks:
    return Chunks(cdiv(pixels, tiles * tile.pixels), tiles * tile.pixels, tiles)


def reduction_chunks(pixels: int, tile: Tile) -> Chunks:
    """Chunks for partial sums: as many tiles as are in flight, 128 programs of a 128x128x64 image in 16 bit;
    larger ones where there would be more than ``MOST_CHUNKS``.
    """
    return _chunks(pixels, tile, max(TILES_IN_FLIGHT, cdiv(cdiv(pixels, tile.pixels), MOST_CHUNKS)))


def elementwise_chunks(pixels: int, tile: Tile, others: int) -> Chunks:
    """Chunks for everything else, in a grid of ``others`` times as many programs."""
    return _chunks(pixels, tile, 1 if cdiv(pixels, tile.pixels) * others <= ONE_WAVE else TILES_IN_FLIGHT)


def trips(tiles: int, loaded_before: int = 0) -> int:
    """How often a program waits for memory in so many tiles; ``loaded_before``: those whose values have come
    with something else that it had to wait for.
    """
    return cdiv(tiles - loaded_before, TILES_IN_FLIGHT)


def pipelined_trips(blocks: int, num_stages: int) -> int:
    """How often a program waits for memory in a loop over so many blocks, of which Triton loads
    ``num_stages - 1`` ahead.
    """
    return cdiv(blocks, max(num_stages - 1, 1))


FEW_PIXELS = 1024
"""The most pixels, all groups together, for which one launch computes both statistics and results. Model: a
program's slice is then at most 32 KiB an image, fits in its registers, and takes less time than a second
launch would."""

"""The Triton kernel of ``deep_update``: a tile of a weight gradient, and Adam on the weights of that tile.

A weight (Cs, Cb, 4, 4) is channels-last in memory: Cs rows of 16 taps, and for each tap Cb values. A tile is
a block of rows and of columns (channels of the big image) of one tap.
"""

from fastpix2pix.kernels.adam_kernels import adam_step, join_master, split_master
from fastpix2pix.kernels.language import tl, triton


@triton.jit(do_not_specialize=["pixels", "height", "width"])  # one machine code for all sizes of the images
def deep_update(
    small,
    big,
    exp_avg,
    exp_avg_sq,
    master,
    working,
    remainder,
    pixels,
    height,
    width,
    rows,
    columns,
    clock,
    grad_scale,
    found_inf,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Reads small and big; reads and writes the moments and the master in either form, writes a working copy
    of a whole master. Nothing is written where found_inf is not zero.

    Arguments:

    * small, big: ``ImagePointer`` to the images (N, Cs, h, w) and (N, Cb, 2 h, 2 w) of whose pixels the
      weight gradient is a sum of products.
    * exp_avg, exp_avg_sq, master, working, remainder: pointers to the fields of an ``adam.AdamTensors``.
    * pixels, height, width: N * h * w, h and w. rows, columns: Cs and Cb, the latter a multiple of 16.
    * clock: an ``adam.AdamClock`` of pointers to scalars.
    * grad_scale, found_inf: pointers to float32 scalars, or None without a loss scale.

    Compile-time constants:

    * BETA1, BETA2: those of an ``adam.AdamForm``. BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_PIXELS: those of a
      ``deep_update.Tile``. PRECISION: of products of float32 values, "tf32" or "ieee". WIDEN: multiply in
      float32, as the interpreter's products of 16-bit values are not summed in float32.
    """
    if found_inf is not None:  # noqa: SIM102 (compile time; the next one is decided at run time)
        if tl.load(found_inf) != 0.0:
            return
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    tap = tl.program_id(0) // column_blocks
    first_column = tl.program_id(0) % column_blocks * BLOCK_COLUMNS
    first_row = tl.program_id(1) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)

    g = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, pixels, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        image, within = pixel // (height * width), pixel % (height * width)
        y = 2 * (within // width) + tap // 4 - 1
        x = 2 * (within % width) + tap % 4 - 1
        there = pixel < pixels
        inside = there & (y >= 0) & (y < 2 * height) & (x >= 0) & (x < 2 * width)
        at = (image * 2 * height + y) * 2 * width + x
        a = tl.load(
            small.pointer + row[:, None] + pixel[None, :] * small.stride,
            mask=(row < rows)[:, None] & there[None, :],
            other=0.0,
        )
        b = tl.load(
            big.pointer + at[:, None] * big.stride + column[None, :],
            mask=inside[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        g = tl.dot(a, b, g, input_precision=PRECISION)

    # From here on in one dimension, with the streams loaded only now: so Triton brings the gradient, once,
    # to the layout in which the streams move in full vectors. Were they loaded before, or in two dimensions,
    # each of them would be brought to the accumulator's layout, through shared memory.
    g = tl.reshape(g, BLOCK_ROWS * BLOCK_COLUMNS)
    if grad_scale is not None:
        g = g / tl.load(grad_scale)
    element = tl.arange(0, BLOCK_ROWS * BLOCK_COLUMNS)
    row = first_row + element // BLOCK_COLUMNS
    column = first_column + tl.max_contiguous(element % BLOCK_COLUMNS, 4)
    position = (row * 16 + tap) * columns + column
    inside = (row < rows) & (column < columns)

    m = tl.load(exp_avg + position, mask=inside)
    v = tl.load(exp_avg_sq + position, mask=inside)
    if master is None:
        rounded = tl.load(working + position, mask=inside)
        weight = join_master(rounded, tl.load(remainder + position, mask=inside))
    else:
        weight = tl.load(master + position, mask=inside)
    weight, m, v = adam_step(weight, g, m, v, clock, BETA1, BETA2)
    tl.store(exp_avg + position, m, mask=inside)
    tl.store(exp_avg_sq + position, v, mask=inside)
    if master is None:
        rounded, rest = split_master(weight, rounded.dtype)
        tl.store(working + position, rounded, mask=inside)
        tl.store(remainder + position, rest, mask=inside)
    else:
        tl.store(master + position, weight, mask=inside)
        if working is not None:
            tl.store(working + position, weight, mask=inside)

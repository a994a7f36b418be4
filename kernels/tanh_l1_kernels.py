"""Triton kernels of ``tanh_l1``: tanh and L1 loss of the generator's last layer, forward and backward.

An image of 3 channels has no full vector in a pixel, so images are walked through value by value: position
p * channels + c is channel c of pixel p. Program i works on the i-th BLOCK of positions.

Arguments:

* x, fake, target, dfake, dx: ``ImagePointer``s to (N, C, H, W) in the storage type: the last convolution's
  output, the generated image, the image that it should be, and the gradients of the first two. A stride of
  None means that the pixels are C elements apart, so that all values move in full vectors; a slice of a wider
  buffer is addressed pixel by pixel. dfake may be None.
* bias: pointer to (C,), or None. dl1: pointer to the loss's gradient, a scalar, or None.
* partials: pointer to (programs, sums) in the type that is computed in: each program's share of the results.
* total: number of values of one image.

Compile-time constants:

* CHANNELS: C. DTYPE: the type that is computed in.
* BLOCK: values of one program (``tanh_l1.BLOCK``).
"""

from fastpix2pix.kernels.language import tl, triton


@triton.jit
def _start(BLOCK: tl.constexpr):
    """Position of this program's first value; in 64 bits, for batches of more than 2**31 values."""
    return tl.program_id(0).to(tl.int64) * BLOCK


@triton.jit
def _split(CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's values as (pixel, channel), pixels counted from that of the first value, in 32 bits."""
    i = (_start(BLOCK) % CHANNELS).to(tl.int32) + tl.arange(0, BLOCK)
    return i // CHANNELS, i % CHANNELS


@triton.jit
def _pointers(image, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    start = _start(BLOCK)
    if image.stride is None:
        return image.pointer + start + tl.arange(0, BLOCK)
    else:
        pixel, channel = _split(CHANNELS, BLOCK)
        return image.pointer + start // CHANNELS * image.stride + pixel * image.stride + channel


@triton.jit
def _load(image, inside, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    return tl.load(_pointers(image, CHANNELS, BLOCK), mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _tanh(x):
    """-m / (2 + m) with m = expm1(-2 |x|), which keeps its relative accuracy for small x.

    expm1 is corrected by the logarithm of the rounded exponential (Kahan; Higham, 2002, section 1.14.1).
    """
    y = -2.0 * tl.abs(x)
    y = tl.where(y < -40.0, -40.0, y)  # there tanh is 1, also in fp64
    e = tl.exp(y)
    m = tl.where(e == 1.0, y, (e - 1.0) * (y / tl.where(e == 1.0, 1.0, tl.log(e))))
    t = -m / (2.0 + m)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_l1_forward_map(
    x,
    bias,
    target,
    fake,
    partials,
    total,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads x, bias and target; writes fake and, into partials, the sums of |fake - target|."""
    inside = _start(BLOCK) + tl.arange(0, BLOCK) < total
    z = _load(x, inside, CHANNELS, DTYPE, BLOCK)
    if bias is not None:
        _, channel = _split(CHANNELS, BLOCK)
        z += tl.load(bias + channel, mask=inside, other=0.0).to(DTYPE)
    value = _tanh(z).to(fake.pointer.dtype.element_ty)
    tl.store(_pointers(fake, CHANNELS, BLOCK), value, mask=inside)
    distance = tl.abs(value.to(DTYPE) - _load(target, inside, CHANNELS, DTYPE, BLOCK))
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(inside, distance, 0.0)))


@triton.jit
def tanh_l1_backward_map(
    dfake,
    dl1,
    fake,
    target,
    dx,
    partials,
    total,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads dfake, dl1, fake and target; writes dx and, where there is a bias, its gradient's partials."""
    inside = _start(BLOCK) + tl.arange(0, BLOCK) < total
    value = _load(fake, inside, CHANNELS, DTYPE, BLOCK)
    gradient = tl.zeros_like(value)
    if dfake is not None:
        gradient += _load(dfake, inside, CHANNELS, DTYPE, BLOCK)
    if dl1 is not None:
        distance = value - _load(target, inside, CHANNELS, DTYPE, BLOCK)
        each = tl.load(dl1).to(DTYPE) / total
        gradient += tl.where(distance > 0, each, tl.where(distance < 0, -each, 0.0))
    gradient *= (1.0 - value) * (1.0 + value)
    tl.store(_pointers(dx, CHANNELS, BLOCK), gradient, mask=inside)
    if partials is not None:
        _, channel = _split(CHANNELS, BLOCK)
        for c in range(CHANNELS):
            mine = inside & (channel == c)
            tl.store(partials + tl.program_id(0) * CHANNELS + c, tl.sum(tl.where(mine, gradient, 0.0)))


@triton.jit
def tanh_l1_sums(
    partials, result, programs, divisor, SUMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUMS: tl.constexpr
):
    """``result[i]``: the sum of ``partials[:, i]``, always in the same order, divided by ``divisor``.

    One program. partials: pointer to (programs, SUMS). result: pointer to (SUMS,). BLOCK: partial sums of
    each column that are read at a time (``tanh_l1.SUM_BLOCK`` over the columns). BLOCK_SUMS: a power of two,
    at least SUMS.
    """
    column = tl.arange(0, BLOCK_SUMS)
    sums = tl.zeros((BLOCK, BLOCK_SUMS), partials.dtype.element_ty)
    for start in range(0, programs, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < programs)[:, None] & (column < SUMS)[None, :]
        sums += tl.load(partials + row[:, None] * SUMS + column[None, :], mask=inside, other=0.0)
    tl.store(result + column, tl.sum(sums, 0) / divisor, mask=column < SUMS)

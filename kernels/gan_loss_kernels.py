"""Triton kernels of ``gan_loss``: the PatchGAN loss and its gradient, in one program.

Arguments:

* logits, disc_grad: pointers to (2 * half,), the logits of both halves of the batch and the discriminator's
  gradient, in the storage type; gen_grad: pointer to (half,), the generator's gradient for the fake half. In
  ``gan_loss_target``, logits and gradient: pointers to (count,), one set of logits and its gradient.
* bias: pointer to a scalar that is added to the logits, or None. bias_grad: pointer to its gradient, that of
  the discriminator's loss, or None.
* losses, loss: pointers to the results, in the type that is computed in.
* scale: pointer to the loss scale, a float32 scalar, or None.

Compile-time constants:

* DISC_FACTOR: of the discriminator's loss. VANILLA: cross-entropy, else least squares. REAL_FIRST: whether
  the first half is the real one. REAL: whether the target is. DTYPE: the type that is computed in.
* BLOCK: logits that the program holds at a time (``gan_loss.BLOCK``).
"""

from fastpix2pix.kernels.language import tl, triton


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], corrected for the rounding of 1 + x (Goldberg, 1991, theorem 4)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _criterion(x, REAL: tl.constexpr, VANILLA: tl.constexpr):
    """Loss of each logit against real or fake, and its derivative; accurate for every |x|."""
    if VANILLA:
        toward = -x if REAL else x  # the loss is log(1 + exp(toward))
        e = tl.exp(-tl.abs(x))
        loss = tl.where(toward > 0, toward, 0.0) + _log1p(e)
        sigmoid = tl.where(toward > 0, 1.0, e) / (1.0 + e)
        derivative = -sigmoid if REAL else sigmoid
        return loss, derivative
    else:
        distance = x - 1.0 if REAL else x
        return distance * distance, 2.0 * distance


@triton.jit
def _load_scale(scale, count, DTYPE: tl.constexpr):
    """Factor from the derivative of one logit's loss to the scaled gradient of the mean over ``count``."""
    factor = 1.0 / tl.full((), count, DTYPE)
    return factor if scale is None else factor * tl.load(scale).to(DTYPE)


@triton.jit
def _load_logits(logits, bias, at, inside, DTYPE: tl.constexpr):
    x = tl.load(logits + at, mask=inside, other=0.0).to(DTYPE)
    return x if bias is None else x + tl.load(bias).to(DTYPE)


@triton.jit
def gan_loss_both(
    logits,
    bias,
    losses,
    disc_grad,
    gen_grad,
    bias_grad,
    scale,
    half,
    DISC_FACTOR: tl.constexpr,
    VANILLA: tl.constexpr,
    REAL_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both players' losses and gradients.

    Reads logits, bias and scale; writes disc_grad, gen_grad, bias_grad and, into losses, the discriminator's
    loss, the generator's, and the discriminator's terms for real and fake.
    """
    real_start = 0 if REAL_FIRST else half
    fake_start = half if REAL_FIRST else 0
    gen_scale = _load_scale(scale, half, DTYPE)
    disc_scale = gen_scale * DISC_FACTOR
    real_sum = tl.zeros((BLOCK,), DTYPE)
    fake_sum = tl.zeros((BLOCK,), DTYPE)
    gen_sum = tl.zeros((BLOCK,), DTYPE)
    derivative_sum = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, half, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < half
        real = _load_logits(logits, bias, real_start + i, inside, DTYPE)
        fake = _load_logits(logits, bias, fake_start + i, inside, DTYPE)
        real_loss, real_derivative = _criterion(real, True, VANILLA)
        fake_loss, fake_derivative = _criterion(fake, False, VANILLA)
        gen_loss, gen_derivative = _criterion(fake, True, VANILLA)
        real_sum += tl.where(inside, real_loss, 0.0)
        fake_sum += tl.where(inside, fake_loss, 0.0)
        gen_sum += tl.where(inside, gen_loss, 0.0)
        derivative_sum += tl.where(inside, real_derivative + fake_derivative, 0.0)
        tl.store(disc_grad + real_start + i, real_derivative * disc_scale, mask=inside)
        tl.store(disc_grad + fake_start + i, fake_derivative * disc_scale, mask=inside)
        tl.store(gen_grad + i, gen_derivative * gen_scale, mask=inside)
    real_mean, fake_mean = tl.sum(real_sum) / half, tl.sum(fake_sum) / half
    tl.store(losses, (real_mean + fake_mean) * DISC_FACTOR)
    tl.store(losses + 1, tl.sum(gen_sum) / half)
    tl.store(losses + 2, real_mean)
    tl.store(losses + 3, fake_mean)
    if bias_grad is not None:
        tl.store(bias_grad, tl.sum(derivative_sum) * disc_scale)


@triton.jit
def gan_loss_target(
    logits,
    bias,
    loss,
    gradient,
    scale,
    count,
    REAL: tl.constexpr,
    VANILLA: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of one set of logits against one target.

    Reads logits, bias and scale; writes loss and gradient.
    """
    factor = _load_scale(scale, count, DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        each, derivative = _criterion(_load_logits(logits, bias, i, inside, DTYPE), REAL, VANILLA)
        total += tl.where(inside, each, 0.0)
        tl.store(gradient + i, derivative * factor, mask=inside)
    tl.store(loss, tl.sum(total) / count)

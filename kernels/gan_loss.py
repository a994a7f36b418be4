"""PatchGAN loss with its gradient: both players from one launch, or one set of logits against one target."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.launch import DTYPES, launch, tl, triton, use_triton
from fastpix2pix.kernels.reference import GanLoss, check_gan_mode, check_halves, compute_dtype

BLOCK = 1024
"""Logits that the one program holds at a time: those of a 30x30 map. A batch of one needs a single pass, and
larger ones are so few bytes that sharing them between programs would cost more, in a second launch for the
sums, than it gains."""

NUM_WARPS = 8

# ------------------------------------------------------------------------------------------------ kernels
#
# logits, disc_grad: the 2 * half logits of both halves and their gradient; in ``gan_target_loss`` one set of
#     logits and its gradient. gen_grad: (half,), the generator's gradient for the fake half.
# losses: the results in the type that is computed in. scale: a float32 scalar, or None.
# DISC_FACTOR: of the discriminator's loss. VANILLA: cross-entropy, else least squares. REAL_FIRST: the order
#     of the halves. DTYPE: the type that is computed in.


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1]; what rounding takes from 1 + x is put back (Goldberg, 1991, theorem 4)."""
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
    """What turns the derivative of one logit's loss into the scaled gradient of the mean over ``count``."""
    factor = 1.0 / tl.full((), count, DTYPE)
    return factor if scale is None else factor * tl.load(scale).to(DTYPE)


@triton.jit
def gan_loss_both(
    logits,
    losses,
    disc_grad,
    gen_grad,
    scale,
    half,
    DISC_FACTOR: tl.constexpr,
    VANILLA: tl.constexpr,
    REAL_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    real_start = 0 if REAL_FIRST else half
    fake_start = half if REAL_FIRST else 0
    gen_scale = _load_scale(scale, half, DTYPE)
    disc_scale = gen_scale * DISC_FACTOR
    real_sum = tl.zeros((BLOCK,), DTYPE)
    fake_sum = tl.zeros((BLOCK,), DTYPE)
    gen_sum = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, half, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < half
        real = tl.load(logits + real_start + i, mask=inside, other=0.0).to(DTYPE)
        fake = tl.load(logits + fake_start + i, mask=inside, other=0.0).to(DTYPE)
        real_loss, real_derivative = _criterion(real, True, VANILLA)
        fake_loss, fake_derivative = _criterion(fake, False, VANILLA)
        gen_loss, gen_derivative = _criterion(fake, True, VANILLA)
        real_sum += tl.where(inside, real_loss, 0.0)
        fake_sum += tl.where(inside, fake_loss, 0.0)
        gen_sum += tl.where(inside, gen_loss, 0.0)
        tl.store(disc_grad + real_start + i, real_derivative * disc_scale, mask=inside)
        tl.store(disc_grad + fake_start + i, fake_derivative * disc_scale, mask=inside)
        tl.store(gen_grad + i, gen_derivative * gen_scale, mask=inside)
    real_mean, fake_mean = tl.sum(real_sum) / half, tl.sum(fake_sum) / half
    tl.store(losses, (real_mean + fake_mean) * DISC_FACTOR)
    tl.store(losses + 1, tl.sum(gen_sum) / half)
    tl.store(losses + 2, real_mean)
    tl.store(losses + 3, fake_mean)


@triton.jit
def gan_loss_target(
    logits,
    loss,
    gradient,
    scale,
    count,
    REAL: tl.constexpr,
    VANILLA: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = _load_scale(scale, count, DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        each, derivative = _criterion(tl.load(logits + i, mask=inside, other=0.0).to(DTYPE), REAL, VANILLA)
        total += tl.where(inside, each, 0.0)
        tl.store(gradient + i, derivative * factor, mask=inside)
    tl.store(loss, tl.sum(total) / count)


# -------------------------------------------------------------------------------------------------- ops


def gan_loss(
    logits: Tensor,
    *,
    mode: str = "vanilla",
    real_first: bool = True,
    disc_factor: float = 1.0,
    scale: Tensor | None = None,
) -> GanLoss:
    """``reference.gan_loss``, in one launch on a GPU."""
    if not use_triton(logits):
        return reference.gan_loss(
            logits, mode=mode, real_first=real_first, disc_factor=disc_factor, scale=scale
        )
    check_gan_mode(mode)
    check_halves(logits)
    logits = logits.contiguous()
    losses = torch.empty(4, dtype=compute_dtype(logits.dtype), device=logits.device)
    disc_grad = torch.empty_like(logits)
    gen_grad = torch.empty_like(logits[: len(logits) // 2])
    launch(
        gan_loss_both,
        (1,),
        logits,
        losses,
        disc_grad,
        gen_grad,
        scale,
        gen_grad.numel(),
        DISC_FACTOR=disc_factor,
        **_constants(logits, mode),
        REAL_FIRST=real_first,
        reads=(logits, scale),
        writes=(losses, disc_grad, gen_grad),
    )
    return GanLoss(losses, disc_grad, gen_grad)


def gan_target_loss(
    logits: Tensor, real: bool, *, mode: str = "vanilla", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``reference.gan_target_loss``, in one launch on a GPU."""
    if not use_triton(logits):
        return reference.gan_target_loss(logits, real, mode=mode, scale=scale)
    check_gan_mode(mode)
    logits = logits.contiguous()
    loss = torch.empty((), dtype=compute_dtype(logits.dtype), device=logits.device)
    gradient = torch.empty_like(logits)
    launch(
        gan_loss_target,
        (1,),
        logits,
        loss,
        gradient,
        scale,
        logits.numel(),
        REAL=real,
        **_constants(logits, mode),
        reads=(logits, scale),
        writes=(loss, gradient),
    )
    return loss, gradient


def _constants(logits: Tensor, mode: str) -> dict[str, Any]:
    return {
        "VANILLA": mode == "vanilla",
        "DTYPE": DTYPES[compute_dtype(logits.dtype)],
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }


# ----------------------------------------------------------------------------------------------- specimens


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """The logits of one real and one fake 256x256 image, for both losses (see report.py)."""
    logits = torch.empty(2, 1, 30, 30, dtype=dtype)
    scale = torch.empty(()) if dtype == torch.float16 else None
    for mode in ("vanilla", "lsgan"):
        yield f"{mode} 30x30", partial(gan_loss, logits, mode=mode, scale=scale)
        yield f"{mode} 30x30", partial(gan_target_loss, logits[1:], True, mode=mode, scale=scale)

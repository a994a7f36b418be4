"""PatchGAN loss with its gradient: both players in one launch, or one set of logits against one target."""

from typing import Any

import torch
from torch import Tensor

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.gan_loss_kernels import gan_loss_both, gan_loss_target
from fastpix2pix.kernels.launch import DTYPES, launch, use_triton
from fastpix2pix.kernels.reference import GanLoss, check_gan_mode, check_halves, compute_dtype
from fastpix2pix.kernels.tiles import cdiv

BLOCK = 1024
"""Logits that the one program holds at a time: at least a 30x30 map, so a batch of one takes a single pass.
Larger batches are so few bytes that several programs would gain less than the second launch, for their sums,
costs."""

NUM_WARPS = 8
"""Four logits a thread, and their three losses and gradients, in registers."""


def gan_loss(
    logits: Tensor,
    *,
    mode: str = "vanilla",
    real_first: bool = True,
    disc_factor: float = 1.0,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> GanLoss:
    """``reference.gan_loss``, in one launch on a GPU."""
    if not use_triton(logits):
        return reference.gan_loss(
            logits, mode=mode, real_first=real_first, disc_factor=disc_factor, bias=bias, scale=scale
        )
    check_gan_mode(mode)
    check_halves(logits)
    logits = logits.contiguous()
    losses = torch.empty(4, dtype=compute_dtype(logits.dtype), device=logits.device)
    disc_grad = torch.empty_like(logits)
    gen_grad = torch.empty_like(logits[: len(logits) // 2])
    bias_grad = None if bias is None else torch.empty_like(bias)
    launch(
        gan_loss_both,
        (1,),
        logits,
        bias,
        losses,
        disc_grad,
        gen_grad,
        bias_grad,
        scale,
        gen_grad.numel(),
        DISC_FACTOR=disc_factor,
        **_constants(logits, mode),
        REAL_FIRST=real_first,
        reads=(logits, bias, scale),
        writes=(losses, disc_grad, gen_grad, bias_grad),
        trips=cdiv(gen_grad.numel(), BLOCK),
    )
    return GanLoss(losses, disc_grad, gen_grad, bias_grad)


def gan_target_loss(
    logits: Tensor,
    real: bool,
    *,
    mode: str = "vanilla",
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``reference.gan_target_loss``, in one launch on a GPU."""
    if not use_triton(logits):
        return reference.gan_target_loss(logits, real, mode=mode, bias=bias, scale=scale)
    check_gan_mode(mode)
    logits = logits.contiguous()
    loss = torch.empty((), dtype=compute_dtype(logits.dtype), device=logits.device)
    gradient = torch.empty_like(logits)
    launch(
        gan_loss_target,
        (1,),
        logits,
        bias,
        loss,
        gradient,
        scale,
        logits.numel(),
        REAL=real,
        **_constants(logits, mode),
        reads=(logits, bias, scale),
        writes=(loss, gradient),
        trips=cdiv(logits.numel(), BLOCK),
    )
    return loss, gradient


def _constants(logits: Tensor, mode: str) -> dict[str, Any]:
    return {
        "VANILLA": mode == "vanilla",
        "DTYPE": DTYPES[compute_dtype(logits.dtype)],
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }

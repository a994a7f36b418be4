"""The deep layers' convolutions, 4x4 with stride 2 and padding 1: the weight is far larger than the images.

A convolution relates a *big* image (N, Cb, 2 h, 2 w) to a *small* one (N, Cs, h, w); going down it is conv2d,
going up conv_transpose2d. Its weight is (Cs, Cb, 4, 4) in either. There are three products:

* ``small = big * weight``: conv2d forward, and the input gradient of conv_transpose2d;
* ``big = small * weight``: conv_transpose2d forward, and the input gradient of conv2d;
* the weight gradient, of which each value is a sum over the pixels of the small image.

The backward pass computes the input gradient first. Then nothing reads the weight any more, and its gradient
may be taken by somebody who updates the weight at once (``TakeGradient``).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpix2pix.kernels.cpu_conv import (
    TRANSPOSED_STRIDE,
    ConvContext,
    conv2d_backward,
    conv2d_forward,
    conv_transpose2d_backward,
    conv_transpose2d_forward,
)
from fastpix2pix.kernels.norm_act import norm_act_backward, norm_act_forward
from fastpix2pix.kernels.reference import NormActConfig

MAX_PIXELS = 256
"""The most pixels of a deep layer's small image, the whole batch together."""

MIN_WEIGHTS = 2**20
"""The fewest elements of a deep layer's weight."""

TakeGradient = Callable[[Tensor, Tensor], bool]
"""Called in a backward pass with (small, big): the two images of which the weight gradient is a product, one
of them a gradient. True: taken, the weight is updated by whoever was called, and autograd gets no gradient.
False: the gradient is computed and returned as usual."""


def is_deep(x: Tensor, weight: Tensor, *, transposed: bool) -> bool:
    """Whether a 4x4 convolution of ``x`` with stride 2 and padding 1 and without bias is a deep layer's.

    Never while a graph is exported or compiled: it should say "convolution".
    """
    n, _, h, w = x.shape
    pixels = n * h * w if transposed else n * (h // 2) * (w // 2)
    return (
        pixels <= MAX_PIXELS
        and weight.numel() >= MIN_WEIGHTS
        and (transposed or h % 2 == w % 2 == 0)
        and x.dtype == weight.dtype
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


class DeepContext(NamedTuple):
    """State of a deep convolution saved for backward.

    transposed: whether x is the small image. x: the input. kept: state of the library's convolution.
    """

    transposed: bool
    x: Tensor
    kept: ConvContext


def forward(x: Tensor, weight: Tensor, *, transposed: bool) -> tuple[Tensor, DeepContext]:
    """The convolution's output and its state for ``backward``. Not differentiable by itself."""
    if transposed:
        y, kept = conv_transpose2d_forward(x, weight)
    else:
        y, kept = conv2d_forward(x, weight, None, TRANSPOSED_STRIDE)
    return y, DeepContext(transposed, x, kept)


def backward(
    dy: Tensor,
    state: DeepContext,
    take_gradient: TakeGradient | None,
    *,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, in this order; None for one that is not needed or that was taken."""
    dx = _library_backward(dy, state, needs_x=True) if needs_x else None
    small, big = (state.x, dy) if state.transposed else (dy, state.x)
    if not needs_weight or (take_gradient is not None and take_gradient(small, big)):
        return dx, None
    return dx, _library_backward(dy, state, needs_x=False)


def _library_backward(dy: Tensor, state: DeepContext, *, needs_x: bool) -> Tensor:
    """The gradient of x, or that of the weight."""
    differentiate = conv_transpose2d_backward if state.transposed else conv2d_backward
    dx, dweight, *_ = differentiate(dy, state.kept, needs_x=needs_x, needs_weight=not needs_x)
    return dx if needs_x else dweight


def _save(ctx, state: DeepContext, *others: Tensor | None) -> None:
    ctx.save_for_backward(state.x, state.kept.x, state.kept.weight, *others)
    ctx.transposed, ctx.kept = state.transposed, state.kept[:3]


def _saved(ctx) -> tuple[DeepContext, tuple[Tensor | None, ...]]:
    x, kept_x, kept_weight, *others = ctx.saved_tensors
    return DeepContext(ctx.transposed, x, ConvContext(*ctx.kept, kept_x, kept_weight)), tuple(others)


class _DeepConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, transposed, take_gradient):
        y, state = forward(x, weight, transposed=transposed)
        _save(ctx, state)
        ctx.take_gradient = take_gradient
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        state, _ = _saved(ctx)
        return *backward(dy, state, ctx.take_gradient, needs_x=needs_x, needs_weight=needs_weight), None, None


class _DeepConvNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, conv_weight, weight, bias, running, rng, config, slots, transposed, take_gradient):
        pre, state = forward(x, conv_weight, transposed=transposed)
        y, skip, mean, rstd = norm_act_forward(pre, weight, bias, *running, rng, config, *slots)
        _save(ctx, state, pre, weight, bias, mean, rstd)
        ctx.rng, ctx.config, ctx.take_gradient = rng, config, take_gradient
        ctx.set_materialize_grads(False)
        # Detached: a result in memory handed in as a view must not join that view's autograd history.
        return (y.detach(), skip.detach()) if skip is not None else y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dskip=None):
        needs_x, needs_weight, *needs_affine = ctx.needs_input_grad[:4]
        state, saved = _saved(ctx)
        dpre, dweight, dbias = norm_act_backward(dy, dskip, *saved, ctx.rng, ctx.config, any(needs_affine))
        gradients = backward(dpre, state, ctx.take_gradient, needs_x=needs_x, needs_weight=needs_weight)
        return *gradients, dweight, dbias, None, None, None, None, None, None


def conv2d(x: Tensor, weight: Tensor, take_gradient: TakeGradient | None = None) -> Tensor:
    """``F.conv2d`` with stride 2 and padding 1, from (N, Cb, 2 h, 2 w) to (N, Cs, h, w), differentiable once.

    weight: (Cs, Cb, 4, 4), channels-last. take_gradient: see ``TakeGradient``.
    """
    return _DeepConv.apply(x, weight, False, take_gradient)


def conv_transpose2d(x: Tensor, weight: Tensor, take_gradient: TakeGradient | None = None) -> Tensor:
    """``F.conv_transpose2d`` with stride 2 and padding 1, from (N, Cs, h, w) to (N, Cb, 2 h, 2 w),
    differentiable once.

    weight: (Cs, Cb, 4, 4), channels-last. take_gradient: see ``TakeGradient``.
    """
    return _DeepConv.apply(x, weight, True, take_gradient)


def conv_norm_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    transposed: bool,
    config: NormActConfig,
    rng: Tensor | None = None,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
    take_gradient: TakeGradient | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``norm_act`` of ``conv2d``, or with ``transposed`` of ``conv_transpose2d``, as one differentiable op.

    weight, bias and what follows: as for ``norm_act``.
    """
    return _DeepConvNormAct.apply(
        x,
        conv_weight,
        weight,
        bias,
        (running_mean, running_var),
        rng,
        config,
        (out, skip_out),
        transposed,
        take_gradient,
    )

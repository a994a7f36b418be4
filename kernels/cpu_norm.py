"""Normalisation and activation on the CPU, by PyTorch's batch norm, in the memory layout that comes in.

An instance norm is a batch norm of views: of (1, N * C, H, W) where the images are contiguous, and of one
image at a time where they are channels-last, which ``F.instance_norm`` copies to contiguous memory and leaves
there. The activation works in place on the norm's result, which has the sign that its gradient asks for.

Our own networks, whose images are channels-last and may be 16-bit, take ``epilogue_forward`` and
``epilogue_backward``: the reference's results, rounded once like those, in half as many passes over memory.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpix2pix.kernels.launch import use_triton
from fastpix2pix.kernels.reference import (
    NormActBackward,
    NormActConfig,
    NormActForward,
    compute_dtype,
    dropout_mask,
)

channels_last = torch.channels_last


def covers(x: Tensor, weight: Tensor | None, config: NormActConfig) -> bool:
    """Whether PyTorch's batch norm computes what the reference does, rounding included.

    It rounds 16-bit values before the activation too; and where a statistic is that of a single value, its
    running variance is 0 / 0.
    """
    return (
        x.device.type == "cpu"
        and not use_triton(x)
        and x.dtype in (torch.float32, torch.float64)
        and (weight is None or weight.dtype == x.dtype)
        and config.norm
        and config.unbiased
        and not config.dropout
        and config.groups in (1, x.shape[0])
        and x.numel() > config.groups * x.shape[1]
    )


def activate(y: Tensor, slope: float) -> Tensor:
    """(Leaky)ReLU in place; slope 1 is the identity. Where y is channels-last, so is its gradient."""
    if slope != 1.0:
        y = y.relu_() if slope == 0.0 else F.leaky_relu_(y, slope)
    if y.requires_grad and _is_channels_last(y) and not y.is_contiguous():
        y.register_hook(_to_channels_last)
    return y


def _to_channels_last(gradient: Tensor) -> Tensor:
    """From contiguous memory, in which the mean of a loss leaves the gradient of an image of any layout.

    PyTorch's kernels walk through images of two layouts value by value: twenty times as long as this copy.
    """
    return gradient.contiguous(memory_format=channels_last) if gradient.is_contiguous() else gradient


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=channels_last)


def _tiled(parameter: Tensor | None, n: int) -> Tensor | None:
    return None if parameter is None else parameter.repeat(n)


def norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    config: NormActConfig,
) -> Tensor:
    """Norm and activation by PyTorch's own differentiable operators; x as ``nn.BatchNorm2d`` takes it.

    ``config.groups`` is 1 or N; running statistics are updated with 1.
    """
    n, c, h, w = x.shape
    rest = config.training, config.momentum, config.eps, False
    if config.groups == 1 or not config.training:
        y = torch.batch_norm(x, weight, bias, running_mean, running_var, *rest)
    elif _is_channels_last(x):
        return _ImageByImage.apply(x, weight, bias, config)
    else:
        flat = torch.batch_norm(
            x.reshape(1, n * c, h, w), _tiled(weight, n), _tiled(bias, n), None, None, *rest
        )
        # Before it is a view: autograd copies gradients where views are written.
        return activate(flat, config.slope).view(n, c, h, w)
    return activate(y, config.slope)


def norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    config: NormActConfig,
) -> NormActForward:
    """``reference.norm_act_forward`` for what it ``covers``, in the layout of ``x``; not differentiable."""
    if not config.training:
        y = torch.batch_norm(
            x, weight, bias, running_mean, running_var, False, config.momentum, config.eps, False
        )
        rstd = torch.rsqrt(running_var + config.eps)
        saved = (t.expand(config.groups, -1).clone() for t in (running_mean, rstd))
        return NormActForward(activate(y, config.slope), None, *saved)
    y, mean, rstd = _by_group(x, weight, bias, running_mean, running_var, config)
    return NormActForward(activate(y, config.slope), None, mean, rstd)


def norm_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    config: NormActConfig,
    needs_affine: bool,
) -> NormActBackward:
    """``reference.norm_act_backward`` for what it ``covers``, in the layout of ``x``."""
    if _is_channels_last(x):
        dy = _to_channels_last(dy)
    if config.slope != 1.0:  # the sign of the norm's result, once more from x
        z = _affine(x, weight, bias, mean, rstd)
        dy = torch.ops.aten.leaky_relu_backward(dy, z, config.slope, False)
    return _backward_by_group(dy, x, weight, mean, rstd, config.eps, needs_affine)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """Normalised by what was saved: one pass."""
    factor = rstd if weight is None else rstd * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    per_image = (t.view(len(mean), -1, 1, 1) for t in (offset, factor))
    return torch.addcmul(next(per_image), x, next(per_image))


def _by_group(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    config: NormActConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout of x, and (groups, C) mean and rstd."""
    (n, c, h, w), groups = x.shape, config.groups
    if groups == 1:
        y, mean, rstd = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, config.momentum, config.eps
        )
        return y, mean.unsqueeze(0), rstd.unsqueeze(0)
    y = torch.empty_like(x, memory_format=channels_last if _is_channels_last(x) else torch.contiguous_format)
    mean, rstd = x.new_empty(n, c), x.new_empty(n, c)
    if not _is_channels_last(x):
        flat = _tiled(weight, n), _tiled(bias, n), None, None, True, 0.0, config.eps
        made = {"out": y.view(1, n * c, h, w), "save_mean": mean.view(-1), "save_invstd": rstd.view(-1)}
        torch.ops.aten.native_batch_norm.out(x.reshape(1, n * c, h, w), *flat, **made)
        return y, mean, rstd
    for i in range(n):
        part = slice(i, i + 1)
        made = {"out": y[part], "save_mean": mean[i], "save_invstd": rstd[i]}
        torch.ops.aten.native_batch_norm.out(x[part], weight, bias, None, None, True, 0.0, config.eps, **made)
    return y, mean, rstd


def _backward_by_group(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, needs_affine: bool
) -> NormActBackward:
    """Gradients of ``_by_group`` from that of y."""
    (n, c, h, w), groups = x.shape, len(mean)
    wanted = [True, needs_affine and weight is not None, needs_affine and weight is not None]
    backward = torch.ops.aten.native_batch_norm_backward
    if groups == 1:
        return NormActBackward(*backward(dy, x, weight, None, None, mean[0], rstd[0], True, eps, wanted))
    if not _is_channels_last(x):
        flat = (t.reshape(1, n * c, h, w) for t in (dy, x))
        saved = mean.flatten(), rstd.flatten()
        dx, *affine = backward(*flat, _tiled(weight, n), None, None, *saved, True, eps, wanted)
        sums = (t.view(n, c).sum(0) if want else None for t, want in zip(affine, wanted[1:], strict=True))
        return NormActBackward(dx.view(n, c, h, w), *sums)
    dy = dy.contiguous(memory_format=channels_last)  # a slice of channels, say
    dx, totals = torch.empty_like(x, memory_format=channels_last), [None, None]
    for i in range(n):
        part, saved = slice(i, i + 1), (mean[i], rstd[i])
        dx[part], *affine = backward(dy[part], x[part], weight, None, None, *saved, True, eps, wanted)
        if wanted[1]:
            totals = affine if i == 0 else [total + t for total, t in zip(totals, affine, strict=True)]
    return NormActBackward(dx, *totals)


class _ImageByImage(torch.autograd.Function):
    """Instance norm and activation of channels-last images."""

    @staticmethod
    def forward(ctx, x, weight, bias, config):
        y, mean, rstd = _by_group(x, weight, bias, None, None, config)
        activate(y, config.slope)
        ctx.save_for_backward(x, weight, mean, rstd, None if config.slope == 1.0 else y)
        ctx.config = config
        return y

    @staticmethod
    def backward(ctx, dy):
        *saved, y = ctx.saved_tensors
        dy = _to_channels_last(dy)
        if y is not None:  # it has the sign of what was activated
            dy = torch.ops.aten.leaky_relu_backward(dy, y, ctx.config.slope, True)
        return *_backward_by_group(dy, *saved, ctx.config.eps, any(ctx.needs_input_grad[1:3])), None


# --------------------------------------------------------------------------------- of our own networks


def serves(x: Tensor, weight: Tensor | None, bias: Tensor | None, config: NormActConfig) -> bool:
    """Whether ``epilogue_forward`` and ``epilogue_backward`` compute what the reference does.

    A norm by statistics of more than a value, or an activation alone.
    """
    if x.device.type != "cpu":
        return False
    if not config.norm:
        return bias is None and not config.dropout and config.skip_slope in (None, config.slope)
    known = weight is None or weight.dtype == compute_dtype(x.dtype)
    return known and config.training and x.numel() > config.groups * x.shape[1]


def epilogue_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rng: Tensor | None,
    config: NormActConfig,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
) -> NormActForward:
    """``reference.norm_act_forward`` for what is ``serves``d."""
    if config.norm and weight is None:
        bias = None  # of a convolution, which the mean takes with it
    y = torch.empty_like(x, memory_format=channels_last) if out is None else out
    skip = None
    if config.skip_slope is not None:
        skip = torch.empty_like(x, memory_format=channels_last) if skip_out is None else skip_out
    if not config.norm:
        torch.ops.aten.leaky_relu.out(x, config.slope, out=y)
        return NormActForward(y, skip if skip is None else skip.copy_(y), None, None)
    (n, c, h, w), groups, dtype = x.shape, config.groups, compute_dtype(x.dtype)
    values = n * h * w // groups
    mask = dropout_mask(x, config.dropout, rng, config.layer) if config.dropout else None
    mean, rstd, own_mean, own_var = x.new_zeros(4, groups, c, dtype=dtype)
    for group, part in enumerate(_parts(n, groups)):
        # With a momentum of 1, running statistics are the batch's; PyTorch's variance is the unbiased one.
        own = own_mean[group], own_var[group]
        z, mean[group], rstd[group] = torch.native_batch_norm(
            _wide(x[part]), weight, bias, *own, True, 1.0, config.eps
        )
        if running_mean is not None:
            if not config.unbiased:
                own[1].mul_((values - 1) / values)
            running_mean.lerp_(own[0].to(running_mean.dtype), config.momentum)
            running_var.lerp_(own[1].to(running_var.dtype), config.momentum)
        if mask is not None:
            z *= mask[part]
        if skip is not None and config.skip_slope != config.slope:
            skip[part] = F.leaky_relu(z, config.skip_slope)
        y[part] = activate(z, config.slope)
    if skip is not None and config.skip_slope == config.slope:
        skip.copy_(y)
    return NormActForward(y, skip, mean, rstd)


def epilogue_backward(
    dy: Tensor | None,
    dskip: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rng: Tensor | None,
    config: NormActConfig,
    needs_affine: bool = True,
) -> NormActBackward:
    """``reference.norm_act_backward`` for what is ``serves``d, of at least one gradient."""
    gradients = [(g, s) for g, s in ((dy, config.slope), (dskip, config.skip_slope)) if g is not None]
    if config.norm and weight is None:
        bias = None
    if not config.norm and len(gradients) == 1:  # of an activation in 16 bits, rounded once too
        dx = torch.ops.aten.leaky_relu_backward(gradients[0][0], x, config.slope, False)
        return NormActBackward(dx.contiguous(memory_format=channels_last), None, None)
    n, groups = x.shape[0], 1 if mean is None else len(mean)
    dx, totals = torch.empty_like(x, memory_format=channels_last), [None, None]
    mask = dropout_mask(x, config.dropout, rng, config.layer) if config.dropout else None
    wants_affine = needs_affine and weight is not None
    for group, part in enumerate(_parts(n, groups)):
        wide = _wide(x[part])
        saved = None if mean is None else (mean[group : group + 1], rstd[group : group + 1])
        z = wide if saved is None else _affine(wide, weight, bias, *saved)
        dz = _through_activation([(g[part], slope) for g, slope in gradients], z)
        if mask is not None:
            dz *= mask[part]
        if saved is None:
            dx[part] = dz
            continue
        dx[part], *affine = torch.ops.aten.native_batch_norm_backward(
            dz,
            wide,
            weight,
            None,
            None,
            mean[group],
            rstd[group],
            True,
            config.eps,
            [True, wants_affine, wants_affine],
        )
        if wants_affine:
            totals = affine if group == 0 else [total + t for total, t in zip(totals, affine, strict=True)]
    return NormActBackward(dx, *totals)


def _parts(n: int, groups: int) -> list[slice]:
    """The images of each group."""
    size = n // groups
    return [slice(i * size, (i + 1) * size) for i in range(groups)]


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype), memory_format=channels_last)


def _through_activation(gradients: list[tuple[Tensor, float]], z: Tensor) -> Tensor:
    """The gradient of z from those of its activations with several slopes."""
    (first, slope), *others = gradients
    if others and others[0][1] == slope:
        first, others = first.to(z.dtype) + others[0][0], []
    dz = torch.ops.aten.leaky_relu_backward(first.to(z.dtype), z, slope, False)
    for gradient, other_slope in others:
        dz += torch.ops.aten.leaky_relu_backward(gradient.to(z.dtype), z, other_slope, False)
    return dz

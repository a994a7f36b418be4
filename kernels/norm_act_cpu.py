"""Normalisation + activation + dropout on the CPU: the reference's arithmetic in PyTorch's fused passes.

``reference`` says what the op is and takes some ten passes over an image to say it; here a result takes two,
a gradient three.
"""

import torch
from torch import Tensor

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.reference import NormActBackward, NormActConfig, NormActForward, dropout_mask


def _has_fused_passes(x: Tensor, weight: Tensor | None, config: NormActConfig) -> bool:
    """Whether this file computes the op, else the reference does.

    It does with running statistics, in 16 bits, and over a single value per channel, whose normalisation
    must be exactly 0 whatever the rounding.
    """
    if x.dtype not in (torch.float32, torch.float64) or (weight is not None and weight.dtype != x.dtype):
        return False
    return not config.norm or (config.training and x.numel() > config.groups * x.shape[1])


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _activate(z: Tensor, slope: float, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.ops.aten.leaky_relu(z, slope)
    return torch.ops.aten.leaky_relu.out(z, slope, out=out)


def norm_act_forward(
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
    """``reference.norm_act_forward``."""
    if not _has_fused_passes(x, weight, config):
        return reference.norm_act_forward(
            x, weight, bias, running_mean, running_var, rng, config, out, skip_out
        )
    mean = rstd = None
    if config.norm:
        z, (mean, rstd) = torch.empty_like(x), x.new_empty(2, config.groups, x.shape[1])
        bias = None if weight is None else bias
        for g, (x_group, z_group) in enumerate(zip(_groups(x, config), _groups(z, config), strict=True)):
            torch.ops.aten.native_batch_norm.out(
                x_group,
                weight,
                bias,
                None,
                None,
                True,
                0.0,
                config.eps,
                out=z_group,
                save_mean=mean[g],
                save_invstd=rstd[g],
            )
        if running_mean is not None:
            _update_running_statistics(running_mean, running_var, mean, rstd, x, config)
    else:
        z = x if bias is None else x + _per_channel(bias)
    if config.dropout:
        z = z * dropout_mask(x, config.dropout, rng, config.layer)
    skip = None if config.skip_slope is None else _activate(z, config.skip_slope, skip_out)
    return NormActForward(_activate(z, config.slope, out), skip, mean, rstd)


def _groups(image: Tensor, config: NormActConfig) -> tuple[Tensor, ...]:
    return image.chunk(config.groups)


def _update_running_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, config: NormActConfig
) -> None:
    n = x.numel() // (config.groups * x.shape[1])
    var = (rstd**-2 - config.eps) * (n / (n - 1) if config.unbiased else 1.0)
    for g in range(config.groups):
        running_mean.lerp_(mean[g].to(running_mean.dtype), config.momentum)
        running_var.lerp_(var[g].to(running_var.dtype), config.momentum)


def norm_act_backward(
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
    """``reference.norm_act_backward``."""
    if not _has_fused_passes(x, weight, config) or (dy is None and dskip is None):
        return reference.norm_act_backward(dy, dskip, x, weight, bias, mean, rstd, rng, config, needs_affine)
    z = _before_activation(x, weight, bias, mean, rstd, config)
    dz = None
    for gradient, slope in ((dy, config.slope), (dskip, config.skip_slope)):
        if gradient is not None:
            part = torch.ops.aten.leaky_relu_backward(gradient, z, slope, False)
            dz = part if dz is None else dz.add_(part)
    if config.dropout:
        dz = dz * dropout_mask(x, config.dropout, rng, config.layer)
    if mean is None:
        return NormActBackward(dz, None, dz.sum((0, 2, 3)) if needs_affine and bias is not None else None)

    dx = torch.empty_like(x)
    dweight, dbias = x.new_empty(2, config.groups, x.shape[1])
    images = (_groups(image, config) for image in (dz, x, dx))
    for g, (dz_group, x_group, dx_group) in enumerate(zip(*images, strict=True)):
        torch.ops.aten.native_batch_norm_backward.out(
            dz_group,
            x_group,
            weight,
            None,
            None,
            mean[g],
            rstd[g],
            True,
            config.eps,
            [True, True, True],
            out0=dx_group,
            out1=dweight[g],
            out2=dbias[g],
        )
    if weight is None or not needs_affine:
        return NormActBackward(dx, None, None)
    return NormActBackward(dx, dweight.sum(0), dbias.sum(0))


def _before_activation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    config: NormActConfig,
) -> Tensor:
    """Normalised, times weight plus bias, in one pass."""
    if mean is None:
        return x if bias is None else x + _per_channel(bias)
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if weight is None else bias - mean * scale
    z = torch.empty_like(x)
    for g, (x_group, z_group) in enumerate(zip(_groups(x, config), _groups(z, config), strict=True)):
        torch.addcmul(_per_channel(shift[g]), x_group, _per_channel(scale[g]), out=z_group)
    return z

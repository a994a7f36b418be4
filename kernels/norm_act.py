"""Normalisation + activation + dropout of a convolution's output, as one differentiable op."""

import torch
from torch import Tensor

from fastpix2pix.kernels.reference import NormActConfig, norm_act_backward, norm_act_forward  # noqa: F401


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running, rng, config, slots):
        running_mean, running_var = running
        out, skip_out = slots
        y, skip, mean, rstd = norm_act_forward(
            x, weight, bias, running_mean, running_var, rng, config, out, skip_out
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.rng, ctx.config = rng, config
        ctx.set_materialize_grads(False)
        # Detached: memory that was handed in as a view must not tie the result to that view's history.
        return (y.detach(), skip.detach()) if skip is not None else y.detach()

    @staticmethod
    def backward(ctx, dy, dskip=None):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = norm_act_backward(
            dy, dskip, x, weight, bias, mean, rstd, ctx.rng, ctx.config
        )
        return dx, dweight, dbias, None, None, None, None


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    config: NormActConfig,
    rng: Tensor | None = None,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Differentiable ``reference.norm_act_forward``: y, or (y, skip) when ``config.skip_slope`` is a number.

    ``out`` and ``skip_out`` are plain memory to write into, not inputs of the autograd graph: the results
    are new tensors that share it.
    """
    return _NormAct.apply(x, weight, bias, (running_mean, running_var), rng, config, (out, skip_out))

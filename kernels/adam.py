"""Adam on fp32 masters: gradient, moments, master and working copy are each touched once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a 16-bit parameter updated at a time on the CPU: the chunk's fp32 gradient and its new masters
# (two times 256 KiB) are still in the L2 cache when the next operator reads them.
CPU_CHUNK = 2**16

# A step count at which beta ** step is exactly 0, so that PyTorch's bias corrections are exactly 1.
_FAR = 2**62


class AdamClock(NamedTuple):
    """What changes from step to step in one parameter group: scalars on the parameters' device.

    step: int64, steps taken so far. lr: float64, the learning rate. alpha, eps_hat: float64, of the step
    under way, so that both forms of Adam read  w -= alpha * m / (sqrt(v) + eps_hat)  (Kingma & Ba, 2015, end
    of section 2). far: int64, a constant of the CPU path.
    """

    step: Tensor
    lr: Tensor
    alpha: Tensor
    eps_hat: Tensor
    far: Tensor

    @classmethod
    def create(cls, device: torch.device) -> "AdamClock":
        step = torch.zeros((), dtype=torch.int64, device=device)
        lr, alpha, eps_hat = torch.zeros(3, dtype=torch.float64, device=device).unbind()
        return cls(step, lr, alpha, eps_hat, torch.full_like(step, _FAR))


class AdamForm(NamedTuple):
    """What is fixed about one parameter group; ``keras_eps`` as in ``reference.adam_step``."""

    beta1: float
    beta2: float
    eps: float
    keras_eps: bool


def advance(clock: AdamClock, form: AdamForm, found_inf: Tensor | None = None) -> None:
    """Count one step, unless ``found_inf`` is non-zero, and set alpha and eps_hat for it."""
    clock.step.add_(1 if found_inf is None else found_inf == 0)
    t = clock.step.to(torch.float64)
    root_c2 = (1 - torch.pow(form.beta2, t)).sqrt()
    clock.alpha.copy_(clock.lr * root_c2 / (1 - torch.pow(form.beta1, t)))
    clock.eps_hat.copy_(torch.full_like(root_c2, form.eps) if form.keras_eps else form.eps * root_c2)


def non_finite(grads: Sequence[Tensor], found_inf: Tensor) -> None:
    """Set ``found_inf`` (float32 scalar) to 1 if any value of ``grads`` is infinite or NaN, else to 0."""
    largest = torch.stack([torch.linalg.vector_norm(grad, torch.inf) for grad in grads])
    found_inf.copy_(largest.isfinite().all().logical_not())


def update(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    workings: Sequence[Tensor] | None,
    clock: AdamClock,
    form: AdamForm,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``reference.adam_step`` for several tensors of one group, after ``advance``, in place.

    All tensors are flat and contiguous. workings: 16-bit copies of the masters, or None where the network
    computes with the masters. grad_scale, found_inf: float32 scalars or None.
    """
    lr, step = (clock.alpha, clock.far) if form.keras_eps else (clock.lr, clock.step)

    def fused(masters, grads, exp_avgs, exp_avg_sqs):
        torch._fused_adam_(
            masters,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [step] * len(masters),
            lr=lr,
            beta1=form.beta1,
            beta2=form.beta2,
            eps=form.eps,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    if workings is None:
        fused(masters, grads, exp_avgs, exp_avg_sqs)
        return
    scratch = torch.empty(CPU_CHUNK, dtype=torch.float32)
    for tensors in zip(masters, grads, exp_avgs, exp_avg_sqs, workings, strict=True):
        for master, grad, exp_avg, exp_avg_sq, working in zip(
            *(t.split(CPU_CHUNK) for t in tensors), strict=True
        ):
            fused([master], [scratch[: grad.numel()].copy_(grad)], [exp_avg], [exp_avg_sq])
            working.copy_(master)

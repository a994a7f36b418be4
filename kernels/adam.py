"""Adam on fp32 masters: gradient, moments, master and working copy are each touched once.

The master of a 16-bit weight is split: the weight itself is the master rounded, and what rounding took away
is kept beside it in 16 more bits (``reference.split_master``, which says how exact that is). That moves 26
bytes a weight where a copy of the master in float32 moves 28.

One kernel serves every parameter. A large one has a launch of its own, which can start as soon as its
gradient is there; small ones (norm weights, biases, the outer convolutions) share launches, because at a few
microseconds each their number would cost more than their bytes. The tensors of a launch are passed as tuples
of pointers, ordinary kernel arguments: a captured launch keeps the addresses that it was captured with, an
eager one takes those of the current gradients, and there is no table of addresses on the device to keep up to
date.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.adam_kernels import Rates, adam_advance, adam_mark_non_finite, adam_update
from fastpix2pix.kernels.launch import launch, use_triton
from fastpix2pix.kernels.tiles import cdiv

LARGE = 2**20
"""Elements from which a tensor has its own launch. The gradients of all smaller ones, 1.6 million elements of
both networks together, can wait in a GPU's L2 cache for a launch that they share."""

MAX_TENSORS = 40
"""The most tensors of one launch. Every program searches them for its own, a few scalar instructions each;
the pointers (5 * 40 * 8 bytes) stay far below the 4 KiB that a kernel's arguments may take."""

DIVISOR = 16
"""Triton knows of an integer argument whether it is a multiple of this. Only if all sizes of a launch are, it
can prove that no vector crosses a tensor's end, and moves all of them in full vectors."""

NUM_WARPS = 4
BLOCK = NUM_WARPS * 32 * 8
"""Elements of one program, eight a thread: two 16-byte vectors of each fp32 stream, two 8-byte vectors of
each 16-bit one. The streams take about 56 registers, which leaves 9 programs to a multiprocessor and 120
KB of loads in flight."""

CPU_CHUNK = 2**18
"""Elements of a 16-bit parameter updated at a time on the CPU: the chunk's fp32 gradient and its new masters
(1 MiB each) are still in the cache when the next operator reads them. Smaller chunks were measured slower,
as each costs three operator calls, and no chunks at all slower by half."""

_FAR = 2**62  # a step count at which beta ** step is exactly 0, and PyTorch's bias corrections exactly 1


class AdamForm(NamedTuple):
    """The constants of one parameter group; ``keras_eps`` as in ``reference.adam_step``."""

    beta1: float
    beta2: float
    eps: float
    keras_eps: bool


class AdamClock(NamedTuple):
    """The state of one parameter group that changes with every step: scalars on the parameters' device.

    step: int64, steps taken so far. lr: float64, the learning rate. alpha, eps_hat: float64, those of the
    current step, with which both forms of Adam are  w -= alpha * m / (sqrt(v) + eps_hat)  (Kingma & Ba, 2015,
    end of section 2). far: int64, a constant that the CPU path needs.
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


class Tick(NamedTuple):
    """One parameter group that begins a step. found_inf: float32 scalar, or None without a loss scale."""

    clock: AdamClock
    form: AdamForm
    found_inf: Tensor | None = None


def advance(*ticks: Tick, seen: Tensor | None = None) -> None:
    """Count one step of each clock whose ``found_inf`` is not non-zero, and set alpha and eps_hat for it.

    All in one launch, on one device. seen: float32 scalar, non-zero afterwards if it was or a ``found_inf``
    is; None without a loss scale.
    """
    if use_triton(ticks[0].clock.step):
        clocks, forms, found_infs = zip(*ticks, strict=True)
        counted = [number for clock in clocks for number in (clock.step, clock.alpha, clock.eps_hat)]
        launch(
            adam_advance,
            (1,),
            clocks,
            found_infs,
            seen,
            RATES=tuple(
                Rates(_log2(form.beta1), _log2(form.beta2), form.eps, form.keras_eps) for form in forms
            ),
            num_warps=1,
            reads=(*(number for clock in clocks for number in (clock.step, clock.lr)), *found_infs, seen),
            writes=(*counted, seen),
        )
        return
    for clock, form, found_inf in ticks:
        if seen is not None:
            torch.maximum(seen, found_inf, out=seen)
        clock.step.add_(1 if found_inf is None else found_inf == 0)
        t = clock.step.to(torch.float64)
        root_c2 = (1 - torch.pow(form.beta2, t)).sqrt()
        clock.alpha.copy_(clock.lr * root_c2 / (1 - torch.pow(form.beta1, t)))
        clock.eps_hat.copy_(torch.full_like(root_c2, form.eps) if form.keras_eps else form.eps * root_c2)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -1e6  # exp2 of that is 0, as a power of 0 is


def mark_non_finite(grads: Sequence[Tensor], found_inf: Tensor) -> None:
    """Set ``found_inf`` (float32 scalar) to 1 if any value of ``grads`` is infinite or NaN, else leave it.

    grads: flat contiguous tensors of one floating type.
    """
    if not use_triton(found_inf):
        largest = torch.stack([torch.linalg.vector_norm(grad, torch.inf) for grad in grads])
        torch.maximum(found_inf, largest.isfinite().all().logical_not(), out=found_inf)
        return
    for some in _launches(grads):
        mine = _members(grads, some)
        launch(
            adam_mark_non_finite,
            _grid(mine),
            mine,
            _sizes(mine),
            found_inf,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            reads=mine,
            writes=(found_inf,),
        )


class AdamTensors(NamedTuple):
    """What Adam keeps of one parameter: vectors of fewer than 2**31 elements, flat and contiguous.

    exp_avg, exp_avg_sq: the moments, fp32 (or fp64). master: the weight in their type, or None where it is
    split. working: the 16-bit weight, or None where the network computes with the master. remainder: int16,
    which with the working weight makes a split master, else None.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    working: Tensor | None = None
    remainder: Tensor | None = None

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """What an update reads: a working copy of a whole master is only written."""
        if self.master is None:
            return self.writes
        return self.exp_avg, self.exp_avg_sq, self.master

    @property
    def writes(self) -> tuple[Tensor, ...]:
        """What an update writes: everything there is."""
        return tuple(tensor for tensor in self if tensor is not None)


def update(
    parameters: Sequence[AdamTensors],
    grads: Sequence[Tensor],
    clock: AdamClock,
    form: AdamForm,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``reference.adam_step`` for several parameters of one group, after ``advance``, in place.

    parameters: all of the same types and the same form. grads: one for each, flat, contiguous, of one type.
    grad_scale, found_inf: float32 scalars, or None.
    """
    if not use_triton(clock.step):
        # PyTorch's fused Adam for CUDA takes another type of step and learning rate than the CPU's.
        on_cpu = clock.step.device.type == "cpu" and parameters[0].remainder is None
        plain = _update_on_cpu if on_cpu else update_by_reference
        plain(parameters, grads, clock, form, grad_scale, found_inf)
        return
    for some in _launches(grads):
        my_grads, mine = _members(grads, some), [parameters[index] for index in some]
        # A tuple of each kind of tensor, or None where these parameters have none of the kind.
        state = [None if kind[0] is None else kind for kind in zip(*mine, strict=True)]
        launch(
            adam_update,
            _grid(my_grads),
            my_grads,
            *state,
            _sizes(my_grads),
            clock,
            grad_scale,
            found_inf,
            BETA1=form.beta1,
            BETA2=form.beta2,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            reads=(
                *my_grads,
                *(tensor for p in mine for tensor in p.reads),
                *(clock.alpha, clock.eps_hat, grad_scale, found_inf),
            ),
            writes=[tensor for p in mine for tensor in p.writes],
        )


def _launches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The indices of ``tensors`` launch by launch: large ones alone, small ones together.

    Those whose size is no multiple of ``DIVISOR`` (the networks' last biases) would cost the others their
    vectors: they share launches of their own, unless the others are norms' and biases too, a block at most.
    """
    whole, odd = [], []
    for index, tensor in enumerate(tensors):
        if tensor.numel() >= LARGE:
            yield [index]
        else:
            (odd if tensor.numel() % DIVISOR else whole).append(index)
    if all(tensors[index].numel() <= BLOCK for index in whole):
        whole, odd = [*whole, *odd], []
    for small in (whole, odd):
        for start in range(0, len(small), MAX_TENSORS):
            yield small[start : start + MAX_TENSORS]


def _members(tensors: Sequence[Tensor], indices: list[int]) -> tuple[Tensor, ...]:
    return tuple(tensors[index] for index in indices)


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.numel() for tensor in tensors)


def _grid(tensors: Sequence[Tensor]) -> tuple[int]:
    return (sum(cdiv(tensor.numel(), BLOCK) for tensor in tensors),)


def update_by_reference(
    parameters: Sequence[AdamTensors],
    grads: Sequence[Tensor],
    clock: AdamClock,
    form: AdamForm,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """On a GPU whose kernels were given up: slow, and as right as the specification."""
    for p, grad in zip(parameters, grads, strict=True):
        split = p.remainder is not None
        master = reference.join_master(p.working, p.remainder) if split else p.master
        reference.adam_step(
            master,
            grad,
            p.exp_avg,
            p.exp_avg_sq,
            None if split else p.working,
            lr=clock.lr,
            step=clock.step,
            **form._asdict(),
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        if split:
            halves = reference.split_master(master, p.working.dtype)
            for tensor, half in zip((p.working, p.remainder), halves, strict=True):
                tensor.copy_(half)


def _update_on_cpu(
    parameters: Sequence[AdamTensors],
    grads: Sequence[Tensor],
    clock: AdamClock,
    form: AdamForm,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """PyTorch's fused Adam, one pass as fast as the memory; Keras's form is torch's at step infinity.

    For masters that are not split: to join and split them in PyTorch's operators took 1.6 times as long.
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

    exp_avgs, exp_avg_sqs, masters, workings, _ = map(list, zip(*parameters, strict=True))
    if workings[0] is None:
        fused(masters, list(grads), exp_avgs, exp_avg_sqs)
        return
    scratch = torch.empty(CPU_CHUNK, dtype=masters[0].dtype)
    for tensors in zip(masters, grads, exp_avgs, exp_avg_sqs, workings, strict=True):
        chunks = (tensor.split(CPU_CHUNK) for tensor in tensors)
        for master, grad, exp_avg, exp_avg_sq, working in zip(*chunks, strict=True):
            if grad.dtype != master.dtype:
                grad = scratch[: grad.numel()].copy_(grad)
            fused([master], [grad], [exp_avg], [exp_avg_sq])
            working.copy_(master)

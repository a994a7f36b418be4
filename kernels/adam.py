"""Adam on fp32 masters: gradient, moments, master and working copy are each touched once.

One kernel serves every parameter. A large one has a launch of its own, which can start as soon as its
gradient is there; small ones (norm weights, biases, the outer convolutions) share launches, because at a few
microseconds each their number would cost more than their bytes. The tensors of a launch are passed as
tuples of pointers, ordinary arguments: a captured launch keeps the addresses that it saw, an eager one sees
those of today's gradients, and no table of addresses has to be kept true.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastpix2pix.kernels.launch import cdiv, launch, tl, triton, use_triton

LARGE = 2**20
"""Elements from which a tensor has its own launch. The gradients of all smaller ones, 1.6 million elements of
both networks together, can wait in a GPU's L2 cache for a launch that they share."""

MAX_TENSORS = 40
"""Tensors of one launch. Every program looks for its own among them, a few scalar instructions for each; the
pointers (5 * 40 * 8 bytes) stay far below the 4 KiB that a kernel's arguments may take."""

NUM_WARPS = 4
BLOCK = NUM_WARPS * 32 * 8
"""Eight elements a thread: one 16-byte vector of 16-bit values, two of fp32, so that every stream is read and
written in full vectors; six streams of them take about 50 registers, which leaves 16 programs to a
multiprocessor and over 200 KB of loads in flight."""

CPU_CHUNK = 2**18
"""Elements of a 16-bit parameter updated at a time on the CPU: the chunk's fp32 gradient and its new masters
(1 MiB each) are still in the cache when the next operator reads them. Smaller chunks were measured slower,
as each costs three operator calls, and no chunks at all slower by half."""

_FAR = 2**62  # a step count at which beta ** step is exactly 0, and PyTorch's bias corrections exactly 1


class AdamForm(NamedTuple):
    """What is fixed about one parameter group; ``keras_eps`` as in ``reference.adam_step``."""

    beta1: float
    beta2: float
    eps: float
    keras_eps: bool


class AdamClock(NamedTuple):
    """What changes from step to step in one parameter group: scalars on the parameters' device.

    step: int64, steps taken so far. lr: float64, the learning rate. alpha, eps_hat: float64, of the step
    under way, with which both forms of Adam read  w -= alpha * m / (sqrt(v) + eps_hat)  (Kingma & Ba, 2015,
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


# ------------------------------------------------------------------------------------------------ kernels
#
# masters, exp_avgs, exp_avg_sqs: tuples of fp32 (or fp64) vectors. grads: the same in any float type.
# workings: 16-bit vectors that receive the rounded masters, or None. sizes: tuple of the vectors' lengths.
# clock: an ``AdamClock``. grad_scale, found_inf: float32 scalars, or None without a loss scale.
# BETA1, BETA2, EPS, KERAS_EPS: of an ``AdamForm``.
#
# Programs are numbered through the blocks of the first vector, then those of the second, and so on.


@triton.jit
def _own_block(sizes, BLOCK: tl.constexpr):
    """Which vector this program works on, and which block of it."""
    program = tl.program_id(0)
    which = 0
    block = program
    first = 0
    for i in tl.static_range(1, len(sizes)):
        first += tl.cdiv(sizes[i - 1], BLOCK)
        which = tl.where(program >= first, i, which)
        block = tl.where(program >= first, program - first, block)
    return which, block


@triton.jit
def _pick(choices, which):
    """``choices[which]`` of a tuple whose members are known when compiling, and ``which`` is not."""
    chosen = choices[0]
    for i in tl.static_range(1, len(choices)):
        chosen = tl.where(which == i, choices[i], chosen)
    return chosen


@triton.jit
def adam_update(
    masters,
    grads,
    exp_avgs,
    exp_avg_sqs,
    workings,
    sizes,
    clock,
    grad_scale,
    found_inf,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if found_inf is not None:  # noqa: SIM102 (decided when compiling, the next one when running)
        if tl.load(found_inf) != 0.0:
            return
    which, block = _own_block(sizes, BLOCK)
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < _pick(sizes, which)
    master_at = _pick(masters, which) + position
    exp_avg_at = _pick(exp_avgs, which) + position
    exp_avg_sq_at = _pick(exp_avg_sqs, which) + position

    master = tl.load(master_at, mask=inside)
    m = tl.load(exp_avg_at, mask=inside)
    v = tl.load(exp_avg_sq_at, mask=inside)
    g = tl.load(_pick(grads, which) + position, mask=inside).to(master.dtype)
    if grad_scale is not None:
        g = g / tl.load(grad_scale).to(master.dtype)
    alpha = tl.load(clock.alpha).to(master.dtype)
    eps_hat = tl.load(clock.eps_hat).to(master.dtype)

    m = m + (g - m) * (1 - BETA1)
    v = v * BETA2 + g * g * (1 - BETA2)
    master = master - alpha * m / (tl.sqrt(v) + eps_hat)

    tl.store(master_at, master, mask=inside)
    tl.store(exp_avg_at, m, mask=inside)
    tl.store(exp_avg_sq_at, v, mask=inside)
    if workings is not None:
        tl.store(_pick(workings, which) + position, master, mask=inside)


@triton.jit
def adam_advance(
    clock,
    found_inf,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    KERAS_EPS: tl.constexpr,
):
    """One program, once a step, so that no other has to raise anything to a power in fp64."""
    step = tl.load(clock.step)
    if found_inf is not None:
        step += tl.load(found_inf) == 0.0
    else:
        step += 1
    t = step.to(tl.float64)
    root_c2 = tl.sqrt(1 - tl.exp2(t * LOG2_BETA2))
    tl.store(clock.step, step)
    tl.store(clock.alpha, tl.load(clock.lr) * root_c2 / (1 - tl.exp2(t * LOG2_BETA1)))
    tl.store(clock.eps_hat, tl.full((), EPS, tl.float64) if KERAS_EPS else EPS * root_c2)


@triton.jit
def adam_mark_non_finite(grads, sizes, found_inf, BLOCK: tl.constexpr):
    """Every offender stores the same 1, so that nobody has to wait for anybody."""
    which, block = _own_block(sizes, BLOCK)
    position = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(_pick(grads, which) + position, mask=position < _pick(sizes, which), other=0.0)
    value = g if g.dtype == tl.float64 else g.to(tl.float32)
    finite = tl.abs(value) < float("inf")  # false for NaN
    tl.store(found_inf + tl.zeros((BLOCK,), tl.int32), 1.0, mask=finite == 0)


# -------------------------------------------------------------------------------------------------- ops


def advance(clock: AdamClock, form: AdamForm, found_inf: Tensor | None = None) -> None:
    """Count one step, unless ``found_inf`` is non-zero, and set alpha and eps_hat for it."""
    if use_triton(clock.step):
        launch(
            adam_advance,
            (1,),
            clock,
            found_inf,
            LOG2_BETA1=_log2(form.beta1),
            LOG2_BETA2=_log2(form.beta2),
            EPS=form.eps,
            KERAS_EPS=form.keras_eps,
            num_warps=1,
            reads=(clock.step, clock.lr, found_inf),
            writes=(clock.step, clock.alpha, clock.eps_hat),
        )
        return
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
            writes=(),
        )


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

    All tensors are flat and contiguous, of fewer than 2**31 elements, and each sequence has one type.
    workings: 16-bit copies of the masters, or None where the network computes with the masters. grad_scale,
    found_inf: float32 scalars, or None.
    """
    if not use_triton(clock.step):
        _update_on_cpu(masters, grads, exp_avgs, exp_avg_sqs, workings, clock, form, grad_scale, found_inf)
        return
    for some in _launches(masters):
        state = [_members(tensors, some) for tensors in (masters, grads, exp_avgs, exp_avg_sqs)]
        mine, my_grads, my_exp_avgs, my_exp_avg_sqs = state
        my_workings = None if workings is None else _members(workings, some)
        launch(
            adam_update,
            _grid(mine),
            *state,
            my_workings,
            _sizes(mine),
            clock,
            grad_scale,
            found_inf,
            BETA1=form.beta1,
            BETA2=form.beta2,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            reads=(*mine, *my_grads, *my_exp_avgs, *my_exp_avg_sqs),
            writes=(*mine, *my_exp_avgs, *my_exp_avg_sqs, *(my_workings or ())),
        )


def _launches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The indices of ``tensors`` launch by launch: small ones together, large ones alone."""
    small = []
    for index, tensor in enumerate(tensors):
        if tensor.numel() >= LARGE:
            yield [index]
        else:
            small.append(index)
    for start in range(0, len(small), MAX_TENSORS):
        yield small[start : start + MAX_TENSORS]


def _members(tensors: Sequence[Tensor], indices: list[int]) -> tuple[Tensor, ...]:
    return tuple(tensors[index] for index in indices)


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.numel() for tensor in tensors)


def _grid(tensors: Sequence[Tensor]) -> tuple[int]:
    return (sum(cdiv(tensor.numel(), BLOCK) for tensor in tensors),)


def _update_on_cpu(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    workings: Sequence[Tensor] | None,
    clock: AdamClock,
    form: AdamForm,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """PyTorch's fused Adam, one pass as fast as the memory; Keras's form is torch's at step infinity."""
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
    scratch = torch.empty(CPU_CHUNK, dtype=masters[0].dtype)
    for tensors in zip(masters, grads, exp_avgs, exp_avg_sqs, workings, strict=True):
        chunks = (tensor.split(CPU_CHUNK) for tensor in tensors)
        for master, grad, exp_avg, exp_avg_sq, working in zip(*chunks, strict=True):
            fused([master], [scratch[: grad.numel()].copy_(grad)], [exp_avg], [exp_avg_sq])
            working.copy_(master)


# ----------------------------------------------------------------------------------------------- specimens


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """A large weight and the small ones of both networks, of the tutorial at 256x256 (see report.py)."""
    channels = (128, 256, *(7 * (512,)), 256, 128, 64)
    norms = [size for size in channels for _ in ("weight", "bias")]
    outer = [128 * 64 * 16, 256 * 128 * 16]
    scaled = dtype == torch.float16
    number = torch.empty(()) if scaled else None
    clock, form = AdamClock.create(torch.device("cpu")), AdamForm(0.5, 0.999, 1e-7, True)

    def vectors(sizes: Sequence[int], kind: torch.dtype) -> list[Tensor]:
        return [torch.empty(size, dtype=kind) for size in sizes]

    for label, sizes in (
        ("weight 512x512x4x4", [512 * 512 * 16]),
        ("small weights of G", [64 * 3 * 16, *outer, *norms, 256 * 64 * 16, 128 * 3 * 16, 3]),
        ("small weights of D", [64 * 6 * 16, *outer, 128, 128, 256, 256, 512, 512, 512 * 16, 1]),
    ):
        grads, states = vectors(sizes, dtype), [vectors(sizes, torch.float32) for _ in range(3)]
        workings = None if dtype == torch.float32 else vectors(sizes, dtype)
        yield label, partial(update, states[0], grads, *states[1:], workings, clock, form, number, number)
        if scaled:
            yield label, partial(mark_non_finite, grads, number)
    yield "step count", partial(advance, clock, form, number)

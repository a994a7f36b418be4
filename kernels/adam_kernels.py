"""Triton kernels of ``adam``: the update, its step count, and the search for non-finite gradients.

Arguments:

* exp_avgs, exp_avg_sqs: tuples of pointers to fp32 (or fp64) vectors. grads: the same, in any floating type.
* masters: the same, or None where they are split into workings and remainders.
* workings: tuple of pointers to the weights in 16 bits, to which the rounded masters are written; None where
  the network computes with the masters.
* remainders: tuple of pointers to int16 vectors, the low halves of split masters; else None.
* sizes: tuple of the vectors' lengths.
* clock: an ``adam.AdamClock`` of pointers to scalars. clocks: a tuple of them.
* grad_scale, found_inf: pointers to float32 scalars, or None without a loss scale. found_infs: a tuple, one
  for each clock. seen: pointer to a float32 scalar, the largest of all that were there, or None.

Compile-time constants:

* BETA1, BETA2: those of an ``adam.AdamForm``. RATES: a tuple of ``Rates``, one for each clock.
* BLOCK: elements of one program (``adam.BLOCK``).

Programs are numbered through the blocks of the first vector, then those of the second, and so on.
"""

from typing import NamedTuple

from fastpix2pix.kernels.language import tl, triton


class Rates(NamedTuple):
    """An ``adam.AdamForm`` as compile-time constants, with the logarithms of both betas."""

    log2_beta1: float
    log2_beta2: float
    eps: float
    keras_eps: bool


@triton.jit
def _own_block(sizes, BLOCK: tl.constexpr):
    """The index of this program's vector, and of its block in that vector."""
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
    """``choices[which]``, for a ``which`` that is only known at run time."""
    chosen = choices[0]
    for i in tl.static_range(1, len(choices)):
        chosen = tl.where(which == i, choices[i], chosen)
    return chosen


@triton.jit
def _binade(rounded):
    """The bits of the power of two at or below a float16 weight, in float32; of the smallest and the largest
    normal one for weights beyond them."""
    return tl.minimum(tl.maximum(tl.abs(rounded), 2.0**-14), 65504.0).to(tl.int32, bitcast=True) & 0x7F800000


@triton.jit
def join_master(working, remainder):
    """The fp32 master of a 16-bit weight and its int16 remainder: ``reference.join_master``."""
    if working.dtype == tl.float16:
        rounded = working.to(tl.float32)
        unit = _binade(rounded).to(tl.float32, bitcast=True) * 2.0**-25
        master = rounded + remainder.to(tl.float32) * unit
    else:
        high = working.to(tl.int16, bitcast=True).to(tl.int32) << 16
        master = (high + remainder.to(tl.int32)).to(tl.float32, bitcast=True)
    return master


@triton.jit
def split_master(master, dtype: tl.constexpr):
    """The weight in ``dtype`` and the int16 remainder of an fp32 master: ``reference.split_master``."""
    if dtype == tl.float16:
        near_zero = tl.floor(master * 2.0**39 + 0.5) * 2.0**-39
        master = tl.where(tl.abs(master) < 2.0**-16, near_zero, master)
        working = master.to(tl.float16)
        rounded = working.to(tl.float32)
        inverse = (0x7F000000 - _binade(rounded)).to(tl.float32, bitcast=True)  # to divide costs registers
        rest = (master - rounded) * (inverse * 2.0**25)
        remainder = tl.where(tl.abs(rounded) < float("inf"), rest, 0.0).to(tl.int16)
    else:
        bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
        working = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        remainder = bits.to(tl.int16)
    return working, remainder


@triton.jit
def adam_step(master, g, m, v, clock, BETA1: tl.constexpr, BETA2: tl.constexpr):
    """New master, first and second moment of a gradient ``g`` in their type, by the clock's numbers."""
    alpha = tl.load(clock.alpha).to(master.dtype)
    eps_hat = tl.load(clock.eps_hat).to(master.dtype)
    m = m + (g - m) * (1 - BETA1)
    v = v * BETA2 + g * g * (1 - BETA2)
    return master - alpha * m / (tl.sqrt(v) + eps_hat), m, v


@triton.jit
def adam_update(
    grads,
    exp_avgs,
    exp_avg_sqs,
    masters,
    workings,
    remainders,
    sizes,
    clock,
    grad_scale,
    found_inf,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads and writes exp_avgs, exp_avg_sqs and the masters in either form, reads grads and writes workings.

    Nothing is written where found_inf is not zero.
    """
    if found_inf is not None:  # noqa: SIM102 (compile time; the next one is decided at run time)
        if tl.load(found_inf) != 0.0:
            return
    which, block = _own_block(sizes, BLOCK)
    # Four elements in a row are one vector of fp32. Were a thread given eight, so that 16-bit streams move in
    # 16-byte vectors too, Triton would send all results through shared memory before it stores them.
    position = tl.max_contiguous(block * BLOCK + tl.arange(0, BLOCK), 4)
    inside = position < _pick(sizes, which)
    exp_avg_at = _pick(exp_avgs, which) + position
    exp_avg_sq_at = _pick(exp_avg_sqs, which) + position

    m = tl.load(exp_avg_at, mask=inside)
    v = tl.load(exp_avg_sq_at, mask=inside)
    g = tl.load(_pick(grads, which) + position, mask=inside).to(m.dtype)
    if masters is None:
        working = tl.load(_pick(workings, which) + position, mask=inside)
        master = join_master(working, tl.load(_pick(remainders, which) + position, mask=inside))
    else:
        master = tl.load(_pick(masters, which) + position, mask=inside)
    if grad_scale is not None:
        g = g / tl.load(grad_scale).to(m.dtype)
    master, m, v = adam_step(master, g, m, v, clock, BETA1, BETA2)

    tl.store(exp_avg_at, m, mask=inside)
    tl.store(exp_avg_sq_at, v, mask=inside)
    if masters is None:
        working, remainder = split_master(master, working.dtype)
        tl.store(_pick(workings, which) + position, working, mask=inside)
        tl.store(_pick(remainders, which) + position, remainder, mask=inside)
    else:
        tl.store(_pick(masters, which) + position, master, mask=inside)
        if workings is not None:
            tl.store(_pick(workings, which) + position, master, mask=inside)


@triton.jit
def adam_advance(clocks, found_infs, seen, RATES: tl.constexpr):
    """Counts a step in each clock and computes alpha and eps_hat for it; raises seen where a found_inf is.

    One program, once a step, so that no program of ``adam_update`` has to raise anything to a power in fp64.
    """
    if seen is not None:
        any_of_them = tl.load(seen)
        for i in tl.static_range(len(clocks)):
            any_of_them = tl.maximum(any_of_them, tl.load(found_infs[i]))
        tl.store(seen, any_of_them)
    for i in tl.static_range(len(clocks)):
        clock, found_inf, rates = clocks[i], found_infs[i], RATES[i]
        step = tl.load(clock.step)
        if found_inf is not None:
            step += tl.load(found_inf) == 0.0
        else:
            step += 1
        t = step.to(tl.float64)
        root_c2 = tl.sqrt(1 - tl.exp2(t * rates.log2_beta2))
        tl.store(clock.step, step)
        tl.store(clock.alpha, tl.load(clock.lr) * root_c2 / (1 - tl.exp2(t * rates.log2_beta1)))
        tl.store(
            clock.eps_hat, tl.full((), rates.eps, tl.float64) if rates.keras_eps else rates.eps * root_c2
        )


@triton.jit
def adam_mark_non_finite(grads, sizes, found_inf, BLOCK: tl.constexpr):
    """Sets found_inf to 1 if a value of grads is infinite or NaN, else leaves it.

    Several programs may find one: the flag is raised atomically, which needs no order between them.
    """
    which, block = _own_block(sizes, BLOCK)
    position = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(_pick(grads, which) + position, mask=position < _pick(sizes, which), other=0.0)
    value = g if g.dtype == tl.float64 else g.to(tl.float32)
    finite = tl.abs(value) < float("inf")  # false for NaN
    tl.atomic_max(found_inf, 1.0, mask=tl.max((finite == 0).to(tl.int32)) > 0, sem="relaxed")

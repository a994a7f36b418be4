"""The update of kernels/adam.py, by Triton and by PyTorch's fused Adam, against the fp64 reference."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import RTOL, assert_stored

from fastpix2pix.kernels import adam, launch, reference
from fastpix2pix.kernels.adam import BLOCK, AdamClock, AdamForm, AdamTensors

KERAS, TORCH = AdamForm(0.5, 0.999, 1e-7, True), AdamForm(0.9, 0.99, 1e-8, False)

SIZES = (3, 1, 64, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5)


@pytest.fixture(params=["triton", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the inputs: of the kernels, then of the CPU's own path."""
    return request.getfixturevalue("triton_device") if request.param == "triton" else "cpu"


class Tensors:
    """The tensors of one update, and fp64 copies that the reference updates."""

    def __init__(self, sizes, dtype, working_dtype, device, seed=0, split=False):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.grad_dtype = device, working_dtype or dtype
        masters = [self._random(n, dtype) for n in sizes]
        self.exp_avgs = [torch.zeros_like(master) for master in masters]
        self.exp_avg_sqs = [torch.zeros_like(master) for master in masters]
        moments = list(zip(self.exp_avgs, self.exp_avg_sqs, strict=True))
        if split:
            halves = [(None, *reference.split_master(master, working_dtype)) for master in masters]
        elif working_dtype:
            halves = [(master.clone(), master.to(working_dtype)) for master in masters]
        else:
            halves = [(master.clone(),) for master in masters]
        self.parameters = [AdamTensors(*both, *half) for both, half in zip(moments, halves, strict=True)]
        self.exact = [
            [t.to(torch.float64, copy=True) for t in some]
            for some in (masters, self.exp_avgs, self.exp_avg_sqs)
        ]
        self.clock = AdamClock.create(torch.device(device))

    def _random(self, n, dtype):
        return torch.randn(n, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    @property
    def masters(self):
        return [
            p.master if p.remainder is None else reference.join_master(p.working, p.remainder)
            for p in self.parameters
        ]

    @property
    def everything(self):
        return [tensor for p in self.parameters for tensor in p.writes]

    def step(self, form, lr, magnitude=1.0, grad_scale=None, found_inf=None):
        grads = [self._random(len(m), self.grad_dtype) * magnitude for m in self.exact[0]]
        self.clock.lr.fill_(lr)
        adam.advance(adam.Tick(self.clock, form, found_inf))
        # The kernel leaves the gradients alone, the CPU's path may not.
        mine = [grad.clone() for grad in grads]
        adam.update(self.parameters, mine, self.clock, form, grad_scale, found_inf)
        for master, grad, exp_avg, exp_avg_sq in zip(self.exact[0], grads, *self.exact[1:], strict=True):
            reference.adam_step(
                master,
                grad.double(),
                exp_avg,
                exp_avg_sq,
                None,
                lr=self.clock.lr,
                step=self.clock.step,
                **form._asdict(),
                grad_scale=grad_scale,
                found_inf=found_inf,
            )

    def check(self):
        for actual, exact in zip((self.masters, self.exp_avgs, self.exp_avg_sqs), self.exact, strict=True):
            for a, e in zip(actual, exact, strict=True):
                # A value may have come close to 0 from afar: its error is relative to that.
                assert_stored(a, e, slack=RTOL[a.dtype] * 0.1 * e.abs().max().item())
        for p in self.parameters:
            if p.master is not None and p.working is not None:
                assert_stored(p.working, p.master.double())


DTYPES = {
    "float32": (torch.float32, None, False),
    "float64": (torch.float64, None, False),
    "float16": (torch.float32, torch.float16, False),
    "bfloat16": (torch.float32, torch.bfloat16, False),
    "split bfloat16": (torch.float32, torch.bfloat16, True),
    "split float16": (torch.float32, torch.float16, True),
}


@pytest.mark.parametrize("dtype, working_dtype, split", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("form", [KERAS, TORCH], ids=["keras", "torch"])
def test_equals_the_reference_over_steps_with_a_changing_rate(
    device, form, dtype, working_dtype, split, monkeypatch
):
    monkeypatch.setattr(adam, "LARGE", 2 * BLOCK)  # so that the last tensor has a launch of its own
    monkeypatch.setattr(adam, "MAX_TENSORS", 4)  # and the others two
    monkeypatch.setattr(adam, "CPU_CHUNK", 700)
    tensors = Tensors(SIZES, dtype, working_dtype, device, split=split)
    for lr in (1e-2, 1e-2, 3e-3, 1e-3):
        tensors.step(form, lr)
    tensors.check()
    assert tensors.clock.step.item() == 4


@pytest.mark.parametrize("form", [KERAS, TORCH], ids=["keras", "torch"])
def test_epsilon_counts_where_gradients_are_tiny(device, form):
    tensors = Tensors((100,), torch.float32, None, device)
    before = [master.clone() for master in tensors.masters]
    for _ in range(3):
        tensors.step(form, lr=1.0, magnitude=1e-8)
    tensors.check()
    moved = (tensors.masters[0] - before[0]).abs().mean().item()
    # At these gradients torch's form takes nearly whole steps and Keras's a small fraction of one.
    assert (moved < 0.1) if form is KERAS else (moved > 0.3)


@pytest.mark.parametrize("beta1", [0.0, 0.5])
@pytest.mark.parametrize("keras_eps", [True, False])
def test_rate_of_the_first_and_of_late_steps(device, beta1, keras_eps):
    form = AdamForm(beta1, 0.999, 1e-7, keras_eps)
    clock = AdamClock.create(torch.device(device))
    clock.lr.fill_(2e-4)
    other, stopped = (AdamClock.create(torch.device(device)) for _ in range(2))
    found_infs = [torch.full((), number, device=device) for number in (0.0, 1.0)]
    for before in (0, 1, 40_000, 2**40):
        clock.step.fill_(before)
        others = zip((other, stopped), (TORCH, KERAS), found_infs, strict=True)
        adam.advance(*itertools.starmap(adam.Tick, others), adam.Tick(clock, form))
        t = before + 1
        root_c2 = (1 - 0.999**t) ** 0.5
        assert clock.step.item() == t
        assert clock.alpha.item() == pytest.approx(2e-4 * root_c2 / (1 - beta1**t), rel=1e-12, abs=0)
        assert clock.eps_hat.item() == pytest.approx(1e-7 if keras_eps else 1e-7 * root_c2, rel=1e-12, abs=0)
    assert (other.step.item(), stopped.step.item()) == (4, 0)
    assert other.eps_hat.item() == pytest.approx(TORCH.eps * (1 - TORCH.beta2**4) ** 0.5, rel=1e-12, abs=0)


@pytest.mark.parametrize("working_dtype", [None, torch.float16], ids=["fp32", "fp16"])
def test_gradients_are_divided_by_the_loss_scale(device, working_dtype):
    scale = torch.tensor(1024.0, device=device)
    tensors = Tensors((40, BLOCK + 3), torch.float32, working_dtype, device)
    for _ in range(2):
        tensors.step(
            KERAS, 1e-2, magnitude=1024.0, grad_scale=scale, found_inf=torch.zeros((), device=device)
        )
    tensors.check()
    assert tensors.exact[2][0].mean() < 1.0  # unscaled, the second moment would be a million times this


@pytest.mark.parametrize("kind", ["float32", "float16", "split bfloat16"])
def test_an_overflow_leaves_everything_as_it_was(device, kind):
    dtype, working_dtype, split = DTYPES[kind]
    tensors = Tensors((40, BLOCK + 3), dtype, working_dtype, device, split=split)
    scale = torch.ones((), device=device)
    tensors.step(KERAS, 1e-2)
    mine, masters = tensors.everything, [t.clone() for t in tensors.masters]
    before = [t.clone() for t in mine]
    tensors.step(KERAS, 1e-2, grad_scale=scale, found_inf=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
    assert tensors.clock.step.item() == 1
    tensors.step(KERAS, 1e-2, grad_scale=scale, found_inf=torch.zeros((), device=device))
    assert not any(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(tensors.masters, masters, strict=True))
    tensors.check()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=9),
    st.sampled_from(list(DTYPES.values())),
    st.integers(0, 99),
)
def test_any_sizes_in_one_call(sizes, kind, seed):
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(launch, "kernels_on_cpu", launch.INTERPRETING)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype, working_dtype, split = kind
        tensors = Tensors(sizes, dtype, working_dtype, device, seed, split)
        for _ in range(2):
            tensors.step(KERAS, 1e-2)
        tensors.check()


LARGEST = {torch.float16: 65504.0, torch.bfloat16: 3e38, torch.float32: 3e38, torch.float64: 1e300}


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_finds_every_value_that_is_not_finite(device, dtype):
    found_inf = torch.zeros((), device=device)
    grads = [torch.full((n,), LARGEST[dtype], dtype=dtype, device=device) for n in (3, BLOCK + 2, 700)]
    grads[1][7] = -LARGEST[dtype]
    adam.mark_non_finite(grads, found_inf)
    assert found_inf.item() == 0
    for which, position in ((0, 0), (1, BLOCK + 1), (1, 0), (2, 699)):
        for bad in (torch.inf, -torch.inf, torch.nan):
            good = grads[which][position].item()
            grads[which][position] = bad
            adam.mark_non_finite(grads, found_inf.zero_())
            assert found_inf.item() == 1
            grads[which][position] = good
            adam.mark_non_finite(grads, found_inf)
            assert found_inf.item() == 1, "what one network found must not be taken back"


@pytest.mark.parametrize("split, per_element", [(False, 28), (True, 26)])
def test_small_tensors_share_launches_and_large_ones_do_not(triton_device, monkeypatch, split, per_element):
    monkeypatch.setattr(adam, "LARGE", 5000)
    sizes = (5, 6000, 16, 5000, 7, 2048)
    tensors = Tensors(sizes, torch.float32, torch.bfloat16, triton_device, split=split)
    seen = []
    with launch.observed(seen.append):
        tensors.step(KERAS, 1e-2)
    tensors.check()
    assert [(seen.name, len(seen.writes)) for seen in seen[1:]] == [("adam_update", n) for n in (4, 4, 8, 8)]
    # Apart by whether vectors of 16 bytes fill them; alpha and eps_hat are read too.
    moved = [seen.bytes_moved for seen in seen[1:]]
    assert moved == [per_element * n + 16 for n in (6000, 5000, 2064, 12)]


def test_short_tensors_share_a_launch_whatever_their_length(triton_device):
    """Norms' parameters and last biases: at most a block each, so vectors make no difference."""
    tensors = Tensors((64, 3, BLOCK, 1), torch.float32, None, triton_device)
    seen = []
    with launch.observed(seen.append):
        tensors.step(KERAS, 1e-2)
    tensors.check()
    assert [(this.name, this.grid) for this in seen] == [("adam_advance", (1,)), ("adam_update", (4,))]


# -------------------------------------------------------------------------------------------- split masters


def master_bits() -> torch.Tensor:
    """int32 bits of masters: every upper half with selected lower halves, and a million at random."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    randoms = torch.randint(-(2**31), 2**31, (10**6,), generator=generator).to(torch.int32)
    return torch.cat(((high | low).flatten(), randoms))


def rounded_half_away(master: torch.Tensor) -> torch.Tensor:
    """To bfloat16, ties away from zero, by numpy's and torch's own arithmetic rather than by bits."""
    down = (master.view(torch.int32) & -(2**16)).view(torch.float32)  # towards zero
    step = (down.view(torch.int32) + 2**16).view(torch.float32)  # the next one away from zero
    middle = (down.double() + step.double().clamp(-(2.0**128), 2.0**128)) / 2
    return torch.where(master.double().abs() >= middle.abs(), step, down).to(torch.bfloat16)


def test_a_master_is_split_and_joined_exactly():
    master = master_bits().view(torch.float32)
    working, remainder = reference.split_master(master)
    assert (working.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    joined, number = reference.join_master(working, remainder), ~master.isnan()
    assert torch.equal(joined[number].view(torch.int32), master[number].view(torch.int32))
    assert joined[~number].isnan().all() and working[~number].isnan().all()
    # The weight is the master's bfloat16 value, a conversion's in all cases but ties.
    finite = master.isfinite()
    exact = rounded_half_away(master[finite])
    assert torch.equal(working[finite].view(torch.int16), exact.view(torch.int16))
    assert torch.equal(working[master.isinf()], master[master.isinf()].to(torch.bfloat16))
    ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(working[number & ~ties], master[number & ~ties].to(torch.bfloat16))
    assert 0 < (working[ties & finite] != master[ties & finite].to(torch.bfloat16)).sum() <= 2**15


def test_in_fp16_a_master_is_split_and_joined_exactly_but_for_the_smallest():
    """The weight by numpy's rounding; the masters nearest to zero become multiples of 2**-39."""
    master = master_bits().view(torch.float32)
    working, remainder = reference.split_master(master, torch.float16)
    assert (working.dtype, remainder.dtype) == (torch.float16, torch.int16)
    number, near_zero = ~master.isnan(), master.abs() < 2.0**-16
    joined = reference.join_master(working, remainder)
    assert joined[~number].isnan().all() and working[~number].isnan().all()
    overflown = number & working.isinf()
    assert master[overflown].abs().min() >= 65520
    assert torch.equal(joined[overflown], master[overflown].sign() * torch.inf)
    exact = number & ~overflown & ~near_zero
    assert torch.equal(joined[exact].view(torch.int32), master[exact].view(torch.int32))
    units = joined[near_zero].double() * 2.0**39
    assert torch.equal(units, units.round())
    assert (units - master[near_zero].double() * 2.0**39).abs().max() <= 0.5 + 2.0**-24
    nearest = torch.from_numpy(joined.numpy().astype(np.float16))
    assert torch.equal(working[number].view(torch.int16), nearest[number].view(torch.int16))
    assert min(int(some.sum()) for some in (~number, overflown, near_zero, exact)) > 1000
    again = reference.split_master(joined, torch.float16)  # as of a checkpoint
    assert torch.equal(again[0][number].view(torch.int16), working[number].view(torch.int16))
    assert torch.equal(again[1], remainder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_kernel_splits_and_joins_every_master_as_the_reference_does(triton_device, dtype):
    """A step at rate 0 joins each master, adds nothing and splits it."""
    master = master_bits()[:-900_000].view(torch.float32)
    working, remainder = reference.split_master(master, dtype)
    before = [half.to(triton_device, copy=True) for half in (working, remainder)]
    moments = torch.zeros(2, len(master), device=triton_device)
    parameter = AdamTensors(*moments, None, *before)
    clock = AdamClock.create(torch.device(triton_device))
    adam.advance(adam.Tick(clock, TORCH))
    adam.update([parameter], [torch.zeros_like(before[0])], clock, TORCH)
    for half, expected in zip(before, (working, remainder), strict=True):
        assert torch.equal(half.cpu().view(torch.int16), expected.view(torch.int16))


def test_the_nan_of_a_gpu_stays_one(triton_device):
    """Its bits, 0x7fffffff, would be rounded up to those of -0."""
    working = torch.tensor([-(2**15)], dtype=torch.int16, device=triton_device).view(torch.bfloat16)
    parameter = AdamTensors(
        *torch.zeros(2, 1, device=triton_device),
        None,
        working,
        torch.full_like(working, -1, dtype=torch.int16),
    )
    assert reference.join_master(*parameter[3:]).view(torch.int32).item() == 0x7FFFFFFF
    clock = AdamClock.create(torch.device(triton_device))
    adam.advance(adam.Tick(clock, TORCH))
    adam.update([parameter], [torch.zeros_like(working)], clock, TORCH)
    assert working.isnan().all()


def test_the_kernel_rounds_small_fp16_masters_as_the_reference_does(triton_device):
    """A step from zero to between multiples of 2**-39, beside one of whole masters."""
    size, form = 3 * BLOCK, TORCH
    grads = torch.randn(size, generator=torch.Generator().manual_seed(0)).half().to(triton_device)
    working = torch.zeros_like(grads)
    split = AdamTensors(*torch.ones(2, size), None, working, torch.zeros_like(working, dtype=torch.int16))
    whole = AdamTensors(*torch.ones(2, size), torch.zeros(size), working.clone())
    clock = AdamClock.create(torch.device(triton_device))
    clock.lr.fill_(2.0**-16)
    adam.advance(adam.Tick(clock, form))
    for parameter in (split, whole):
        parameter = AdamTensors(*(None if t is None else t.to(triton_device) for t in parameter))
        adam.update([parameter], [grads], clock, form)
        if parameter.remainder is None:
            expected = reference.split_master(parameter.master, torch.float16)
            assert (parameter.master.abs() < 2.0**-16).float().mean() > 0.8
        else:
            mine = parameter
    assert torch.equal(mine.working, expected[0])
    assert torch.equal(mine.remainder, expected[1])


def test_in_fp16_split_masters_go_the_way_of_separate_ones(triton_device):
    """Fifty steps with the same gradients: bit for bit, but for masters that came below 2**-16."""
    size = 6 * BLOCK
    ways = [Tensors((size,), torch.float32, torch.float16, triton_device, split=split) for split in (1, 0)]
    for way in ways:
        for p in way.parameters:  # as small as a network's: some pass through zero
            small = way._random(size, torch.float32) * 2e-3
            if p.remainder is None:
                p.master.copy_(small)
                continue
            for tensor, half in zip(p[3:], reference.split_master(small, torch.float16), strict=True):
                tensor.copy_(half)
    came_near_zero = ways[1].masters[0].abs() < 2.0**-16
    for _ in range(50):
        for way in ways:
            way.clock.lr.fill_(2e-4)
            adam.advance(adam.Tick(way.clock, KERAS))
            adam.update(way.parameters, [way._random(size, torch.float16)], way.clock, KERAS)
        (split,), (whole,) = (way.masters for way in ways)
        came_near_zero |= whole.abs() < 2.0**-16
        same = split.view(torch.int32) == whole.view(torch.int32)
        assert same[~came_near_zero].all()
        # What a passage rounds, 2**-40 at most, may round larger values the other way later, by an ulp.
        assert (split - whole).abs().max() < 2.0**-31
    assert 100 < came_near_zero.sum() < size / 2


@pytest.mark.parametrize("device", ["triton", "reference"])
def test_split_masters_go_the_way_of_separate_ones_bit_for_bit(device, request):
    """Fifty steps with the same gradients. The working weights differ in ties alone."""
    device = request.getfixturevalue("triton_device") if device == "triton" else "cpu"
    ways = [
        Tensors((6 * BLOCK,), torch.float32, torch.bfloat16, device, split=split) for split in (True, False)
    ]
    if device == "cpu" and not launch.kernels_on_cpu:  # the CPU's own path rounds otherwise
        plain = partial(adam.update_by_reference, grad_scale=None, found_inf=None)
    else:
        plain = adam.update
    ties = 0
    for _ in range(50):
        for way in ways:
            grads = [way._random(6 * BLOCK, torch.bfloat16)]
            way.clock.lr.fill_(2e-4)
            adam.advance(adam.Tick(way.clock, KERAS))
            plain(way.parameters, grads, way.clock, KERAS)
        split, whole = (way.parameters[0] for way in ways)
        (master,) = ways[0].masters
        assert torch.equal(master.view(torch.int32), whole.master.view(torch.int32))
        nearest = whole.master.to(torch.bfloat16)  # the interpreter cuts off what it stores in bfloat16
        differ = split.working != nearest
        assert ((master.view(torch.int32)[differ] & 0xFFFF) == 0x8000).all()
        ties += int(differ.sum())
    print(f"{ties} ties in {50 * 6 * BLOCK} roundings")
    assert ties < 50 * 6 * BLOCK / 2**15  # one in 2**17 is expected


def test_the_search_for_non_finite_gradients_declares_what_it_writes(triton_device):
    found_inf, seen = torch.zeros((), device=triton_device), []
    with launch.observed(seen.append):
        adam.mark_non_finite([torch.ones(5, device=triton_device)], found_inf)
    assert [made is found_inf for made in seen[0].writes] == [True]

"""The update of kernels/adam.py, by Triton and by PyTorch's fused Adam, against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import RTOL, assert_stored

from fastpix2pix.kernels import adam, launch, reference
from fastpix2pix.kernels.adam import BLOCK, AdamClock, AdamForm

KERAS, TORCH = AdamForm(0.5, 0.999, 1e-7, True), AdamForm(0.9, 0.99, 1e-8, False)

SIZES = (3, 1, 64, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5)


@pytest.fixture(params=["triton", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the inputs: of the kernels, then of the CPU's own path."""
    return request.getfixturevalue("triton_device") if request.param == "triton" else "cpu"


class Tensors:
    """The tensors of one update, and fp64 copies that the reference updates."""

    def __init__(self, sizes, dtype, working_dtype, device, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.grad_dtype = device, working_dtype or dtype
        self.masters = [self._random(n, dtype) for n in sizes]
        self.exp_avgs = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sqs = [torch.zeros_like(master) for master in self.masters]
        self.workings = working_dtype and [master.to(working_dtype) for master in self.masters]
        self.exact = [[t.double() for t in some] for some in (self.masters, self.exp_avgs, self.exp_avg_sqs)]
        self.clock = AdamClock.create(torch.device(device))

    def _random(self, n, dtype):
        return torch.randn(n, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def step(self, form, lr, magnitude=1.0, grad_scale=None, found_inf=None):
        grads = [self._random(len(m), self.grad_dtype) * magnitude for m in self.masters]
        self.clock.lr.fill_(lr)
        adam.advance(self.clock, form, found_inf)
        state = self.exp_avgs, self.exp_avg_sqs, self.workings
        # The kernel leaves the gradients alone, the CPU's path may not.
        mine = [grad.clone() for grad in grads]
        adam.update(self.masters, mine, *state, self.clock, form, grad_scale, found_inf)
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
        if self.workings:
            for working, master in zip(self.workings, self.masters, strict=True):
                assert_stored(working, master.double())


DTYPES = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("dtype, working_dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("form", [KERAS, TORCH], ids=["keras", "torch"])
def test_equals_the_reference_over_steps_with_a_changing_rate(
    device, form, dtype, working_dtype, monkeypatch
):
    monkeypatch.setattr(adam, "LARGE", 2 * BLOCK)  # so that the last tensor has a launch of its own
    monkeypatch.setattr(adam, "MAX_TENSORS", 4)  # and the others two
    monkeypatch.setattr(adam, "CPU_CHUNK", 700)
    tensors = Tensors(SIZES, dtype, working_dtype, device)
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
    for before in (0, 1, 40_000, 2**40):
        clock.step.fill_(before)
        adam.advance(clock, form)
        t = before + 1
        root_c2 = (1 - 0.999**t) ** 0.5
        assert clock.step.item() == t
        assert clock.alpha.item() == pytest.approx(2e-4 * root_c2 / (1 - beta1**t), rel=1e-12, abs=0)
        assert clock.eps_hat.item() == pytest.approx(1e-7 if keras_eps else 1e-7 * root_c2, rel=1e-12, abs=0)


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


@pytest.mark.parametrize("working_dtype", [None, torch.float16], ids=["fp32", "fp16"])
def test_an_overflow_leaves_everything_as_it_was(device, working_dtype):
    tensors = Tensors((40, BLOCK + 3), torch.float32, working_dtype, device)
    scale = torch.ones((), device=device)
    tensors.step(KERAS, 1e-2)
    mine = [*tensors.masters, *tensors.exp_avgs, *tensors.exp_avg_sqs, *(tensors.workings or [])]
    before = [t.clone() for t in mine]
    tensors.step(KERAS, 1e-2, grad_scale=scale, found_inf=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
    assert tensors.clock.step.item() == 1
    tensors.step(KERAS, 1e-2, grad_scale=scale, found_inf=torch.zeros((), device=device))
    assert not any(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
    tensors.check()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=9), st.sampled_from(DTYPES), st.integers(0, 99)
)
def test_any_sizes_in_one_call(sizes, dtypes, seed):
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(launch, "kernels_on_cpu", launch.INTERPRETING)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tensors = Tensors(sizes, *dtypes, device, seed)
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


def test_small_tensors_share_launches_and_large_ones_do_not(triton_device, monkeypatch):
    monkeypatch.setattr(adam, "LARGE", 5000)
    tensors = Tensors((5, 6000, 16, 5000, 7, 48), torch.float32, torch.bfloat16, triton_device)
    seen = []
    with launch.observed(seen.append):
        tensors.step(KERAS, 1e-2)
    tensors.check()
    assert [(seen.name, len(seen.writes)) for seen in seen[1:]] == [("adam_update", n) for n in (4, 4, 8, 8)]
    # Apart by whether vectors of 16 bytes fill them; alpha and eps_hat are read too.
    assert [seen.bytes_moved for seen in seen[1:]] == [(14 + 14) * n + 16 for n in (6000, 5000, 64, 12)]


def test_the_search_for_non_finite_gradients_declares_what_it_writes(triton_device):
    found_inf, seen = torch.zeros((), device=triton_device), []
    with launch.observed(seen.append):
        adam.mark_non_finite([torch.ones(5, device=triton_device)], found_inf)
    assert [made is found_inf for made in seen[0].writes] == [True]

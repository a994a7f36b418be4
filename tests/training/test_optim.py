"""MasterAdam as a torch optimizer: against torch's Adam, an independent Keras-form one, and its promises."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from fastpix2pix.kernels import adam
from fastpix2pix.training import optim
from fastpix2pix.training.optim import LossScale, MasterAdam


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Weights of every layout and size: channels-last, 1x1, vectors, a single bias."""
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(3, 8, 4),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 6, 3, bias=False),
        nn.Conv2d(6, 1, 1),
    )
    return nn.Sequential(*layers).to(dtype).to(memory_format=torch.channels_last)


def give_gradients(module: nn.Module, seed: int, magnitude: float = 1.0) -> None:
    """The same gradients, element by element, whatever the parameters' type and layout."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator) * magnitude)


def values(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


# ------------------------------------------------------------------------------------------ the numbers


def linear_decay(step: int) -> float:
    return 1 - step / 10


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torch_form_is_torch_adam_under_a_scheduler(dtype, fused):
    ours, theirs = network(dtype), network(dtype)
    optimizer = MasterAdam(ours.parameters(), 1e-3, (0.5, 0.999), 1e-8, keras_eps=False)
    peer = torch.optim.Adam(theirs.parameters(), 1e-3, (0.5, 0.999), 1e-8, fused=fused)
    schedulers = [LambdaLR(each, linear_decay) for each in (optimizer, peer)]
    for i in range(6):
        for module, each in ((ours, optimizer), (theirs, peer)):
            give_gradients(module, i)
            each.step()
            each.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == peer.param_groups[0]["lr"] == pytest.approx(4e-4)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    if fused:
        assert_equal(values(ours), values(theirs))


def keras_adam(w, gradients, rates, beta1=0.5, beta2=0.999, eps=1e-7):
    """As keras.optimizers.Adam computes it, step by step, in numpy's float64."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        alpha = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
        m = m + (g - m) * (1 - beta1)
        v = v + (g * g - v) * (1 - beta2)
        w = w - m * alpha / (np.sqrt(v) + eps)
    return w


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_keras_form_is_keras_adam_with_a_changing_rate(dtype):
    module, rates = network(dtype), (2e-4, 2e-4, 1e-4, 5e-5, 1e-3)
    optimizer = MasterAdam(module.parameters())
    # Gradients from far below epsilon's reach to far above it.
    magnitudes = np.logspace(-9, 2, len(list(module.parameters())))
    start = [p.detach().double().numpy().copy() for p in module.parameters()]
    gradients = []
    for i, lr in enumerate(rates):
        give_gradients(module, seed=i)
        for p, magnitude in zip(module.parameters(), magnitudes, strict=True):
            p.grad *= magnitude
        gradients.append([p.grad.double().numpy().copy() for p in module.parameters()])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for i, p in enumerate(module.parameters()):
        exact = torch.from_numpy(keras_adam(start[i], [some[i] for some in gradients], rates))
        master = optimizer.state[p].get("master", p.detach())
        tolerance = 1e-13 if dtype == torch.float64 else 3e-7
        torch.testing.assert_close(master.double(), exact, rtol=tolerance, atol=tolerance)
        assert torch.equal(p, master.to(dtype))


def test_updates_too_small_for_a_16_bit_weight_add_up_in_its_master():
    p = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    optimizer = MasterAdam([p], lr=1e-4)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p[0].item() == pytest.approx(1 - 200 * 1e-4, abs=2**-8)


def test_gradients_of_another_layout_reach_their_own_elements():
    straight, transposed = network(), network()
    optimizers = [MasterAdam(module.parameters()) for module in (straight, transposed)]
    for i in range(2):
        for module in (straight, transposed):
            give_gradients(module, i)
        for p in transposed.parameters():
            p.grad = p.grad.contiguous() if p.dim() == 4 else p.grad
        assert transposed[0].weight.grad.stride() != transposed[0].weight.stride()
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(values(straight), values(transposed))


def test_parameters_without_a_gradient_rest():
    module = network()
    optimizer, before = MasterAdam(module.parameters()), values(module)
    give_gradients(module, 0)
    module[0].weight.grad = None
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(values(module), before, strict=True)]
    assert moved == [False] + [True] * (len(moved) - 1)


def test_groups_have_their_own_settings():
    a, b, c, peer = (nn.Parameter(torch.ones(5)) for _ in range(4))
    optimizer = MasterAdam(
        [
            {"params": [a], "lr": 1e-2},
            {"params": [b], "betas": (0.9, 0.99), "keras_eps": False},
            {"params": [c], "betas": (0.9, 0.99)},
        ]
    )
    theirs = torch.optim.Adam([peer], 2e-4, (0.9, 0.99), 1e-7, fused=True)
    for value in (1.0, -2.0):
        for p in (a, b, c, peer):
            p.grad = torch.full_like(p, value)
        optimizer.step()
        theirs.step()
    assert torch.equal(b, peer)
    gradients = [np.full(5, 1.0), np.full(5, -2.0)]
    for p, exact in (
        (a, keras_adam(np.ones(5), gradients, [1e-2, 1e-2])),
        (c, keras_adam(np.ones(5), gradients, [2e-4, 2e-4], beta1=0.9, beta2=0.99)),
    ):
        torch.testing.assert_close(p.detach().double(), torch.from_numpy(exact), rtol=1e-7, atol=0)


# ----------------------------------------------------------------------------------- as gradients arrive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updating_in_the_backward_pass_changes_no_bit(dtype):
    at_once, early = network(dtype), network(dtype)
    first, second = MasterAdam(at_once.parameters()), MasterAdam(early.parameters())

    def update(p):
        second.step_parameters([p])
        p.grad = None

    for p in early.parameters():
        p.register_post_accumulate_grad_hook(update)
    for i in range(4):
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(i)).to(dtype)
        at_once(x).square().mean().backward()
        first.step()
        first.zero_grad()
        second.begin_step()
        early(x).square().mean().backward()
    assert_equal(values(at_once), values(early))
    for p, q in zip(at_once.parameters(), early.parameters(), strict=True):
        for name, tensor in first.state[p].items():
            assert torch.equal(tensor, second.state[q][name]), name
        assert first.state[p]["step"].item() == 4


# ------------------------------------------------------------------------------------------- loss scale


def overflow(module: nn.Module) -> None:
    list(module.parameters())[-1].grad.fill_(torch.nan)


def test_scale_follows_grad_scaler():
    module = network(torch.float16)
    ours = LossScale(initial=2.0**10, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    optimizer = MasterAdam(module.parameters(), loss_scale=ours)
    peer_parameter = nn.Parameter(torch.ones(1))
    peer = torch.optim.SGD([peer_parameter], 0.0)
    for i, bad in enumerate((0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)):
        give_gradients(module, i)
        if bad:
            overflow(module)
        optimizer.step()
        ours.update()
        theirs.scale(peer_parameter.sum())
        peer_parameter.grad = torch.full((1,), torch.inf if bad else 1.0)
        theirs.step(peer)
        theirs.update()
        assert ours.scale.item() == theirs.get_scale()
        assert ours.growth_tracker.item() == theirs._get_growth_tracker()
    assert optimizer.state_dict()["state"][0]["step"].item() == 12
    assert ours.scale.item() == 2.0**10


def test_first_scale_growth_and_backoff_are_those_promised():
    scale = LossScale()
    assert scale.scale.item() == 2**16
    for _ in range(1999):
        scale.update()
    assert scale.scale.item() == 2**16
    scale.update()
    assert scale.scale.item() == 2**17
    scale.found_inf.fill_(1)
    scale.update()
    assert scale.scale.item() == 2**16 and scale.found_inf.item() == 0


def test_only_the_network_that_overflowed_is_skipped_and_the_scale_is_shared():
    gen, disc, scale = network(torch.float16), network(torch.float16, seed=1), LossScale()
    optimizers = [MasterAdam(module.parameters(), lr=0.1, loss_scale=scale) for module in (gen, disc)]
    for bad in (disc, gen):
        for module in (gen, disc):
            give_gradients(module, 0)
        overflow(bad)
        before = {module: values(module) for module in (gen, disc)}
        at = scale.scale.item()
        for optimizer in optimizers:
            optimizer.step()
        scale.update()
        for module in (gen, disc):
            same = [torch.equal(a, b) for a, b in zip(values(module), before[module], strict=True)]
            assert same == [module is bad] * len(same)
        assert scale.scale.item() == at / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_scale_changes_nothing_but_the_range(dtype):
    plain, scaled = network(dtype), network(dtype)
    scale = LossScale(initial=2.0**7)
    first = MasterAdam(plain.parameters())
    second = MasterAdam(scaled.parameters(), loss_scale=scale)
    for i in range(3):
        give_gradients(plain, i)
        give_gradients(scaled, i, magnitude=2.0**7)
        first.step()
        second.step()
    assert_equal(values(plain), values(scaled))


# ------------------------------------------------------------------------------------------------ state


def trained(dtype: torch.dtype, steps: int = 3) -> tuple[nn.Module, MasterAdam]:
    module = network(dtype)
    optimizer = MasterAdam(module.parameters(), 1e-3)
    for i in range(steps):
        give_gradients(module, i)
        optimizer.step()
    return module, optimizer


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("target", KINDS, ids=str)
@pytest.mark.parametrize("source", KINDS, ids=str)
def test_state_passes_between_precisions(source, target):
    module, optimizer = trained(source)
    state = through_a_file(optimizer.state_dict())
    for each in state["state"].values():
        assert {each[name].dtype for name in ("exp_avg", "exp_avg_sq", "master")} == {
            torch.float64 if source == torch.float64 else torch.float32
        }
    other = network(target, seed=9)
    loaded = MasterAdam(other.parameters(), lr=123.0)
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["lr"] == 1e-3
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        master = optimizer.state[p].get("master", p.detach())
        assert torch.equal(q.detach(), master.to(target))
        assert loaded.state[q]["step"].item() == 3
    if target != torch.float64 and source != torch.float64:
        back = trained(source, steps=1)[1]
        back.load_state_dict(through_a_file(loaded.state_dict()))
        for ours, theirs in zip(back.state_dict()["state"].values(), state["state"].values(), strict=True):
            for name, tensor in theirs.items():
                assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_loaded_run_continues_bit_for_bit(dtype):
    module, optimizer = trained(dtype)
    other = network(dtype, seed=9)
    resumed = MasterAdam(other.parameters())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for i in range(3, 6):
        for each, its in ((module, optimizer), (other, resumed)):
            give_gradients(each, i)
            its.param_groups[0]["lr"] *= 0.5
            its.step()
    assert_equal(values(module), values(other))


def test_loading_and_stepping_leave_every_tensor_where_it_is():
    module, optimizer = trained(torch.float16)
    clock = optimizer._clocks[0]

    def addresses():
        state = [t for p in module.parameters() for t in (p, *optimizer.state[p].values())]
        return [t.data_ptr() for t in (*state, *clock)]

    before = addresses()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients(module, 0)
    optimizer.step()
    assert addresses() == before


def test_states_that_do_not_fit_are_refused():
    optimizer = MasterAdam(network().parameters())
    other = MasterAdam(nn.Linear(3, 4).parameters())
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
        MasterAdam(nn.Linear(2, 4).parameters()).load_state_dict(other.state_dict())
    module = nn.Linear(3, 4)
    torchs = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    torchs.step()
    with pytest.raises(ValueError, match="has no master"):
        other.load_state_dict(torchs.state_dict())


def test_loss_scale_state_returns():
    scale = LossScale()
    scale.found_inf.fill_(1)
    scale.update()
    scale.update()
    other = LossScale()
    tensor = other.scale
    other.load_state_dict(through_a_file(scale.state_dict()))
    assert tensor.item() == 2**15 and other.growth_tracker.item() == 1


def test_masters_follow_weights_that_someone_else_wrote():
    module = network(torch.bfloat16)
    optimizer = MasterAdam(module.parameters())
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(3.0)
    optimizer.adopt_parameters()
    give_gradients(module, 0)
    optimizer.step()
    for p in module.parameters():
        torch.testing.assert_close(p.detach().float(), torch.full(p.shape, 3.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_masters_can_be_read_and_set(dtype):
    module = network(dtype)
    optimizer = MasterAdam(module.parameters())
    weights = [master * 1.001 for master in optimizer.masters()]
    optimizer.set_masters(weights)
    assert_equal(optimizer.masters(), weights)
    assert_equal(values(module), [weight.to(dtype) for weight in weights])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tensors_are_all_that_a_step_writes(dtype):
    def snapshot():
        return [tensor.detach().clone() for tensor in everything]

    module = network(dtype)
    optimizer = MasterAdam(module.parameters(), loss_scale=LossScale() if dtype == torch.float16 else None)
    everything = [*optimizer.tensors(), *module.parameters()]
    before = snapshot()
    steps = []
    for _ in range(2):
        give_gradients(module, 0)
        optimizer.step()
        steps.append(snapshot())
        for tensor, value in zip(everything, before, strict=True):
            tensor.detach().copy_(value)
    assert_equal(*steps)
    moved = [not torch.equal(a, b) for a, b in zip(steps[0], before, strict=True)]
    assert sum(moved) >= 3 * len(list(module.parameters())), "both moments and the masters change"


@pytest.mark.parametrize(
    "p",
    [torch.ones(4, dtype=torch.int64), torch.ones(4, 6)[:, ::2], torch.ones(1, 4).expand(3, 4)],
    ids=["integers", "gaps", "overlap"],
)
def test_parameters_that_it_cannot_update_are_refused(p):
    with pytest.raises(ValueError, match="dense"):
        MasterAdam([nn.Parameter(p, requires_grad=False)])


# ------------------------------------------------------------------------------------------ on a device


class Operators(TorchDispatchMode):
    """Names of all operators inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = getattr(self, "seen", []) + [func]
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_and_an_unchanged_rate_is_not_written():
    module = network(torch.float16)
    scale = LossScale()
    optimizer = MasterAdam(module.parameters(), loss_scale=scale)
    give_gradients(module, 0)
    with Operators() as operators:
        optimizer.step()
        scale.update()
    names = {func.name() for func in operators.seen}
    assert "aten::_fused_adam_.tensor_lr" in names
    assert not names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::fill_.Scalar"}
    optimizer.param_groups[0]["lr"] = 1e-5
    with Operators() as operators:
        optimizer.begin_step()
    assert [func.name() for func in operators.seen].count("aten::fill_.Scalar") == 1
    assert optimizer._clocks[0].lr.item() == 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_take_the_same_steps_as_the_cpu_path(triton_device, dtype, monkeypatch):
    monkeypatch.setattr(adam, "LARGE", 256)
    ours = network(dtype).to(triton_device)
    theirs = network(dtype)
    scales = [LossScale(triton_device, initial=8.0), LossScale(initial=8.0)]
    optimizer = MasterAdam(ours.parameters(), loss_scale=scales[0])
    with monkeypatch.context() as patch:
        patch.setattr(optim, "use_triton", lambda tensor: False)
        peer = MasterAdam(theirs.parameters(), loss_scale=scales[1])
    for i, bad in enumerate((False, True, False, False)):
        for module in (ours, theirs):
            give_gradients(module, i, magnitude=8.0)
            if bad:
                overflow(module)
        optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(adam, "use_triton", lambda tensor: False)
            peer.step()
        for scale in scales:
            scale.update()
    assert scales[0].scale.item() == scales[1].scale.item() == 4.0
    mine, expected = (one.state_dict()["state"] for one in (optimizer, peer))
    for index, state in expected.items():
        for name, tensor in state.items():
            actual = mine[index][name].cpu().double()
            torch.testing.assert_close(actual, tensor.double(), rtol=1e-5, atol=1e-7, msg=name)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=2**-10, atol=1e-6)

"""Which weights a step updates within its backward pass, and who prevents it."""

import copy
import pickle

import pytest
import torch
from small_steps import call_small_weights_large, launch_updates_alone, small_step

from fastpix2pix.kernels import launch
from fastpix2pix.models import UNetGenerator
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.step import TrainStep


def masters(step: TrainStep) -> list[torch.Tensor]:
    return [m.clone() for each in (step.gen_optimizer, step.disc_optimizer) for m in each.masters()]


def assert_close(mine: list[torch.Tensor], theirs: list[torch.Tensor], start: list[torch.Tensor]) -> None:
    """Up to the rounding of gradients, which decides about Adam's first steps where one is nearly 0."""
    for a, b, before in zip(mine, theirs, start, strict=True):
        assert (a - b).abs().mean() <= 0.05 * (b - before).abs().max()


def launched(step: TrainStep, source, target, steps: int = 1) -> list[str]:
    seen = []
    with launch.observed(seen.append):
        for _ in range(steps):
            step(source, target)
    return [each.name for each in seen]


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    call_small_weights_large(monkeypatch)
    launch_updates_alone(monkeypatch)


# Deep layers have a kernel where the big image has 16, 32, ... channels: down 4 and 5, up 1 and 2. The
# tutorial's down 5 does not learn at batch 1.
@pytest.mark.parametrize(
    "preset, precision, fused",
    [("tutorial", "bf16", 3), ("junyanz", "bf16", 4), ("junyanz", "fp32", 4), ("tutorial", "fp16", 3)],
)
def test_deep_layers_gradients_are_not_stored(triton_device, preset, precision, fused):
    step, source, target = small_step(preset, precision, device=triton_device)
    names = launched(step, source, target)
    assert names.count("deep_update") == fused
    updates = step.gen_optimizer.updates + step.disc_optimizer.updates
    assert updates >= sum(name in ("deep_update", "adam_update") for name in names) > 2, "each is counted"
    assert all(p.grad is None for p in step.generator.parameters())


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp32"])
def test_kept_gradients_are_those_of_a_step_that_stores_none(triton_device, precision):
    ways = []
    for keep in (False, True):
        step, source, target = small_step("tutorial", precision, device=triton_device, keep_gradients=keep)
        start, names = masters(step), launched(step, source, target)
        assert ("deep_update" in names) is not keep
        ways.append(masters(step))
    assert_close(*ways, start)
    step.set_lr(0.0)
    rng = step.generator.rng.clone()
    step(source, target)
    gradients = {name: p.grad for name, p in step.generator.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    first = [gradient.clone() for gradient in gradients.values()]
    # The same step again, on the same weights: gradients are not added up.
    step.generator.rng.copy_(rng)
    step(source, target)
    second = [p.grad for p in step.generator.parameters() if p.grad is not None]
    for mine, theirs in zip(second, first, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_hooks_of_others_see_the_gradient_and_may_change_it(triton_device):
    step, source, target = small_step("tutorial", "bf16", device=triton_device)
    weights = [block.conv.weight for block in (step.generator.downs[3], step.generator.ups[1])]
    seen = []
    weights[0].register_hook(lambda gradient: seen.append(gradient.clone()) or torch.zeros_like(gradient))

    def no_update(p: torch.nn.Parameter) -> None:
        seen.append(p.grad.clone())
        p.grad.zero_()

    weights[1].register_post_accumulate_grad_hook(no_update)
    before = [weight.detach().clone() for weight in weights]
    assert launched(step, source, target).count("deep_update") == 1, "the other layer goes on as before"
    assert len(seen) == 2 and all(gradient.any() for gradient in seen)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("where", ["small", "big"])
def test_an_infinity_in_an_image_stops_the_generator_alone(triton_device, monkeypatch, where):
    """In fp16 a deep layer's gradient is known to be finite by the images of which it would be a product."""
    step, source, target = small_step("tutorial", "fp16", device=triton_device)
    step.loss_scale.scale.fill_(2.0**8)
    keep = step.gen_optimizer.keep_images

    def keep_with_an_infinity(weight, small, big):
        images = {"small": small, "big": big}
        images[where] = images[where].clone(memory_format=torch.channels_last)
        images[where][0, 1, 0, 0] = -torch.inf
        keep(weight, **images)

    def moved(before, after):
        equal = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        return not all(equal[:count]), not all(equal[count:])

    count = len(step.gen_optimizer.masters())
    start = masters(step)
    with monkeypatch.context() as patch:
        patch.setattr(step.gen_optimizer, "keep_images", keep_with_an_infinity)
        step(source, target)
    stopped = masters(step)
    assert moved(start, stopped) == (False, True)
    assert float(step.loss_scale.scale) == 2.0**7
    step(source, target)
    assert moved(stopped, masters(step)) == (True, True), "it is forgotten with the step"
    assert float(step.loss_scale.scale) == 2.0**7


def test_what_a_step_found_before_it_failed_is_forgotten(triton_device, monkeypatch):
    step, source, target = small_step("tutorial", "fp16", device=triton_device)
    step.loss_scale.scale.fill_(2.0**8)
    look_at, start = step.gen_optimizer.look_at, masters(step)

    def find_and_fail(weight):
        weight.grad.fill_(torch.inf)
        look_at(weight)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(step.gen_optimizer, "look_at", find_and_fail)
        with pytest.raises(MemoryError):
            step(source, target)
    step.forget_gradients()
    step(source, target)
    assert float(step.loss_scale.scale) == 2.0**8
    assert not torch.equal(start[0], masters(step)[0])


def test_a_gradient_that_is_there_already_counts(triton_device):
    step, source, target = small_step("tutorial", "fp32", device=triton_device)
    weight = step.generator.ups[0].conv.weight
    weight.grad = torch.full_like(weight, 1e3)
    assert launched(step, source, target).count("deep_update") == 2, "it is updated once"
    m = step.gen_optimizer.state[weight]["exp_avg"]
    torch.testing.assert_close(m, torch.full_like(m, 500.0), rtol=1e-2, atol=0)


def test_a_backward_pass_outside_a_step_makes_gradients(triton_device):
    step, source, _ = small_step("tutorial", "bf16", device=triton_device)
    before = masters(step)
    step.generator(source).float().square().mean().backward()
    assert step.generator.ups[1].conv.weight.grad.any()
    assert all(torch.equal(a, b) for a, b in zip(masters(step), before, strict=True))


def test_copies_of_a_network_belong_to_no_step():
    step, source, target = small_step("tutorial", "fp32", num_downs=5)
    for copied in (copy.deepcopy(step.generator), pickle.loads(pickle.dumps(step.generator))):
        assert isinstance(copied, UNetGenerator)
        assert not copied.ups[0].take_gradient(source, target)
        other = TrainStep(copied, step.discriminator.fresh(), StepOptions(precision="fp32"))
        other(source, target)

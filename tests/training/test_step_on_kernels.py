"""The whole step on Triton kernels against the whole step on the reference ops."""

import pytest
import torch
from small_steps import call_small_weights_large

from fastpix2pix.kernels import deep_conv, launch
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.step import TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative bounds of a loss, and of the largest change of a weight (Adam divides gradients that are mostly
# rounding by their own size, so single weights of a 16-bit network go their own way by a step or two).
LOSS_BOUND = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}
WEIGHT_BOUND = {"fp32": 2e-2, "bf16": 1.0, "fp16": 1.0}


def run(preset: str, precision: str, *, steps: int, size: int, num_downs: int, ngf: int):
    torch.manual_seed(2)
    networks = UNetGenerator(preset, ngf=ngf, num_downs=num_downs), PatchDiscriminator(preset, ndf=ngf)
    step = TrainStep(*networks, StepOptions(preset=preset, precision=precision))
    # Not the networks' own: fp16's split masters are rounded near zero.
    before = [m.clone() for m in (*step.gen_optimizer.masters(), *step.disc_optimizer.masters())]
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(2.0**8)  # at the initial 2**16 both sides would skip the update
    losses = []
    for _ in range(steps):
        images = torch.rand(2, 1, 3, size, size) * 2 - 1
        source, target = images.to(DTYPES[precision])
        losses.append(torch.stack(step(source, target)).clone())
    masters = [*step.gen_optimizer.masters(), *step.disc_optimizer.masters()]
    changes = [after - start for after, start in zip(masters, before, strict=True)]
    return torch.stack(losses), changes, [*networks[0].buffers(), *networks[1].buffers()]


def compare(monkeypatch, preset, precision, *, some_deep=False, **options):
    on_kernels, launches = [], []
    with launch.observed(on_kernels.append):
        losses, changes, buffers = run(preset, precision, **options)
    monkeypatch.setattr(launch, "kernels_on_cpu", False)
    with launch.observed(launches.append):
        expected_losses, expected_changes, expected_buffers = run(preset, precision, **options)
    assert not launches
    if some_deep:
        names = {this.name for this in on_kernels}
        assert {"deep_conv_to_small", "deep_conv_to_big"} <= names
        assert "deep_update" in names
    torch.testing.assert_close(
        losses, expected_losses, rtol=LOSS_BOUND[precision], atol=LOSS_BOUND[precision]
    )
    # At batch 1 the bottleneck of fresh weights is LeakyReLU(beta) = 0; the ReLU of the next block stays
    # at 0 with it, and neither learns: six tensors.
    assert sum(bool(change.any()) for change in expected_changes) >= len(expected_changes) - 6
    for mine, theirs in zip(changes, expected_changes, strict=True):
        largest = theirs.abs().max()
        mean_difference = (mine - theirs).abs().mean()
        assert mean_difference <= WEIGHT_BOUND[precision] * largest
    if precision == "fp32":
        for mine, theirs in zip(buffers, expected_buffers, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_two_steps(triton_device, monkeypatch, preset, precision):
    compare(monkeypatch, preset, precision, steps=2, size=32, num_downs=5, ngf=4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_ten_steps(triton_device, monkeypatch, preset, precision):
    compare(monkeypatch, preset, precision, steps=10, size=64, num_downs=6, ngf=8)


def small_layers_are_deep(monkeypatch):
    """Layers count as deep whatever their weight, and are ours on a GPU too; all weights count as large."""
    call_small_weights_large(monkeypatch)
    ours = deep_conv.solved_here
    monkeypatch.setattr(
        deep_conv,
        "solved_here",
        lambda problem, x: (
            (launch.use_triton(x) and deep_conv.fits(problem)) if x.is_cuda else ours(problem, x)
        ),
    )


@pytest.mark.parametrize("preset, precision", [("tutorial", "bf16"), ("junyanz", "fp32")])
def test_a_step_with_deep_convolutions(triton_device, monkeypatch, preset, precision):
    small_layers_are_deep(monkeypatch)
    compare(monkeypatch, preset, precision, some_deep=True, steps=1, size=32, num_downs=5, ngf=4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_ten_steps_with_deep_convolutions(triton_device, monkeypatch, preset, precision):
    small_layers_are_deep(monkeypatch)
    compare(monkeypatch, preset, precision, some_deep=True, steps=10, size=64, num_downs=6, ngf=8)

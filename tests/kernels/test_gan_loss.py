"""PatchGAN losses and gradients: kernels against the fp64 reference, that against torch and Keras."""

import math

import numpy as np
import pytest
import torch
from golden import recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_stored
from torch import Tensor
from torch.nn import functional as F

from fastpix2pix.kernels import launch, reference
from fastpix2pix.kernels.gan_loss import BLOCK, gan_loss, gan_target_loss

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MODES = ["vanilla", "lsgan"]
# Relative, against Keras in float32. The exp and log of a GPU's kernels are approximate.
FLOAT32 = {"cpu": 2e-6, "cuda": 1e-5}


@pytest.fixture(params=["triton", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the inputs: of the kernels, then of the reference on the CPU."""
    return request.getfixturevalue("triton_device") if request.param == "triton" else "cpu"


def logits(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Logits near 0, of usual size and extreme."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4
    x.view(-1)[::7] *= 1e-3
    x.view(-1)[3::11] *= 25
    return x.to(device, dtype)


def check(
    x: Tensor,
    mode: str,
    real_first: bool,
    disc_factor: float,
    scale: Tensor | None,
    bias: float | None = None,
) -> None:
    options = {"mode": mode, "real_first": real_first, "disc_factor": disc_factor, "scale": scale}
    kind = reference.compute_dtype(x.dtype)
    bias = None if bias is None else torch.tensor([bias], dtype=kind, device=x.device)
    # Where they cancel, the sum with the bias has no more digits than the type.
    biased = x.double() if bias is None else (x.to(kind) + bias).double()
    exact, actual = reference.gan_loss(biased, **options), gan_loss(x, bias=bias, **options)
    assert actual.losses.dtype == kind
    assert actual.disc_grad.dtype == actual.gen_grad.dtype == x.dtype
    for a, e in zip(actual[:3], exact[:3], strict=True):
        assert_stored(a, e)
    assert (actual.bias_grad is None) == (bias is None)
    if bias is not None:
        assert actual.bias_grad.dtype == kind
        # A sum that may come to nothing: of terms no larger than the largest gradient.
        slack = (1e-13 if x.dtype == torch.float64 else 1e-6) * exact.disc_grad.abs().sum().item()
        assert_stored(actual.bias_grad, exact.disc_grad.sum().reshape(1), slack=slack)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("real_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_players_equal_the_reference(triton_device, dtype, real_first, mode):
    for batch, factor, scale in ((2, 1.0, None), (6, 0.5, 64.0)):
        scale = scale and torch.tensor(scale, device=triton_device)
        x = logits((batch, 1, 30, 30), dtype, triton_device, seed=batch)
        for bias in (None, -0.4):
            check(x, mode, real_first, factor, scale, bias)


@settings(max_examples=20, deadline=None)
@given(
    half=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    real_first=st.booleans(),
)
def test_any_shape_equals_the_reference(half, height, width, dtype, mode, real_first):
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(launch, "kernels_on_cpu", launch.INTERPRETING)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        check(logits((2 * half, 1, height, width), dtype, device), mode, real_first, 0.5, None)


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_target_equals_the_reference(triton_device, dtype, mode, real):
    scale = torch.tensor(8.0, device=triton_device)
    for shape in ((1, 1, 30, 30), (3, 2, 5, 7), (1,), (BLOCK + 1,)):
        x = logits(shape, dtype, triton_device)
        bias = torch.tensor([0.3], dtype=reference.compute_dtype(dtype), device=triton_device)
        for added in (None, bias):
            biased = x.double() if added is None else (x.to(bias.dtype) + added).double()
            exact = reference.gan_target_loss(biased, real, mode=mode, scale=scale)
            actual = gan_target_loss(x, real, mode=mode, bias=added, scale=scale)
            for a, e in zip(actual, exact, strict=True):
                assert_stored(a, e)


def torch_losses(x: Tensor, mode: str, real_first: bool, disc_factor: float) -> tuple[Tensor, ...]:
    """The same from torch's own losses and autograd."""
    x = x.double().requires_grad_()
    criterion = F.binary_cross_entropy_with_logits if mode == "vanilla" else F.mse_loss
    real, fake = x.chunk(2) if real_first else x.chunk(2)[::-1]
    real_loss = criterion(real, torch.ones_like(real))
    fake_loss = criterion(fake, torch.zeros_like(fake))
    gen_loss = criterion(fake, torch.ones_like(fake))
    disc_loss = disc_factor * (real_loss + fake_loss)
    (disc_grad,) = torch.autograd.grad(disc_loss, x, retain_graph=True)
    gen_grad = torch.autograd.grad(gen_loss, x)[0].chunk(2)[1 if real_first else 0]
    return torch.stack((disc_loss, gen_loss, real_loss, fake_loss)).detach(), disc_grad, gen_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("real_first", [True, False])
def test_equals_torch_losses_and_autograd(device, real_first, mode):
    x = torch.randn(4, 1, 9, 11, dtype=torch.float64, device=device) * 4
    actual = gan_loss(x, mode=mode, real_first=real_first, disc_factor=0.5)
    for a, e in zip(actual[:3], torch_losses(x, mode, real_first, 0.5), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-16)
    bias = torch.tensor([0.7], dtype=torch.float64, device=device)
    actual = gan_loss(x, mode=mode, real_first=real_first, disc_factor=0.5, bias=bias)
    losses, disc_grad, gen_grad = torch_losses(x + bias, mode, real_first, 0.5)
    for a, e in zip(actual, (losses, disc_grad, gen_grad, disc_grad.sum().reshape(1)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_losses_and_gradients(device, golden, dtype):
    numbers, inputs = golden("losses"), recipe.loss_inputs()
    assert recipe.digest(inputs.values()) == numbers["inputs_sha256"]
    exact = numbers[str(dtype).removeprefix("torch.")]
    both = np.concatenate((inputs["real_logits"], inputs["fake_logits"]))
    x = torch.from_numpy(both).permute(0, 3, 1, 2).to(device, dtype)
    losses, disc_grad, gen_grad, _ = gan_loss(x)
    rtol = 1e-13 if dtype == torch.float64 else FLOAT32[device]
    expected = [exact[name] for name in ("disc", "gan", "real_loss", "generated_loss")]
    assert losses.tolist() == pytest.approx(expected, rel=rtol)
    for gradient, name in (
        (gen_grad, "d gan/d fake_logits"),
        (disc_grad[:2], "d disc/d real_logits"),
        (disc_grad[2:], "d disc/d fake_logits"),
    ):
        flat = gradient.permute(0, 2, 3, 1).reshape(-1).double()
        # Keras's gradients subtract the target from the sigmoid, so in float32 they end at 1e-7 / 1800.
        atol = 0.0 if dtype == torch.float64 else 1e-10
        assert flat[exact[name]["sample_idx"]].tolist() == pytest.approx(
            exact[name]["sample"], rel=rtol, abs=atol
        )
        assert flat.norm().item() == pytest.approx(exact[name]["l2"], rel=rtol)
        assert flat.min().item() == pytest.approx(exact[name]["min"], rel=rtol, abs=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_extreme_logits(device, golden, dtype):
    for x, exact in golden("losses")["extreme_logits"].items():
        x = float(x)
        one = torch.full((1,), x, dtype=dtype, device=device)
        for real, expected in ((True, exact["ones"]), (False, exact["zeros"])):
            loss, gradient = gan_target_loss(one, real)
            assert loss.item() == pytest.approx(expected, rel=FLOAT32[device], abs=1e-38)
            sigmoid = 1 / (1 + math.exp(x if real else -x))
            assert gradient.item() == pytest.approx(-sigmoid if real else sigmoid, rel=1e-5, abs=1e-38)


def test_vanishing_gradients_survive_in_fp16_under_a_loss_scale(device):
    x = torch.full((2, 1, 30, 30), 12.0, dtype=torch.float16, device=device)
    scale = torch.tensor(2.0**16, device=device)
    _, gradient = gan_target_loss(x, True, scale=scale)
    exact = -(2.0**16) / 1800 / (1 + math.exp(12.0))
    torch.testing.assert_close(gradient.float(), torch.full_like(x, exact).float(), rtol=2**-10, atol=0)


def test_a_nan_is_not_hidden(device):
    for mode in MODES:
        x = torch.zeros(2, 1, 3, 3, device=device)
        x[0, 0, 1, 1] = torch.nan
        losses, disc_grad, gen_grad, _ = gan_loss(x, mode=mode)
        assert losses.isnan().tolist() == [True, False, True, False]
        assert disc_grad.isnan().sum() == 1 and gen_grad.isfinite().all()


def test_logits_of_any_layout(device):
    x = torch.randn(4, 1, 6, 10, device=device)
    spread = torch.empty(4, 1, 10, 12, device=device).transpose(2, 3)[:, :, ::2].copy_(x)
    for a, e in zip(gan_loss(spread)[:3], gan_loss(x)[:3], strict=True):
        torch.testing.assert_close(a, e)


def test_bad_arguments_are_refused(device):
    x = torch.zeros(3, 1, 2, 2, device=device)
    with pytest.raises(ValueError, match="a batch of 3"):
        gan_loss(x)
    for call in (lambda: gan_loss(x[:2], mode="wgangp"), lambda: gan_target_loss(x, True, mode="wgangp")):
        with pytest.raises(ValueError, match="'wgangp'; it can be 'vanilla' or 'lsgan'"):
            call()


def test_one_launch(triton_device):
    x = torch.randn(2, 1, 30, 30, device=triton_device)
    seen = []
    with launch.observed(seen.append):
        gan_loss(x)
        gan_target_loss(x, True)
    assert [each.name for each in seen] == ["gan_loss_both", "gan_loss_target"]
    assert seen[0].bytes_moved == 4 * (1800 + 4 + 1800 + 900)

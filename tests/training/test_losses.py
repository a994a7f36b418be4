"""PatchGANLoss as people use a GAN loss: a scalar that trains."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastpix2pix.losses import PatchGANLoss


@pytest.fixture(params=["triton", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("triton_device") if request.param == "triton" else "cpu"


def expected(prediction, real, mode):
    criterion = F.binary_cross_entropy_with_logits if mode == "vanilla" else F.mse_loss
    return criterion(prediction, torch.full_like(prediction, float(real)))


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("mode", ["vanilla", "lsgan"])
def test_equals_torch_and_passes_gradcheck(device, mode, real):
    loss = PatchGANLoss(mode)
    x = torch.randn(2, 1, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    torch.testing.assert_close(loss(x, real), expected(x, real, mode), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: loss(x, real) * 3, (x,))


@pytest.mark.parametrize("mode", ["vanilla", "lsgan"])
def test_trains_a_discriminator_as_torch_does(device, mode):
    torch.manual_seed(0)
    ours = nn.Conv2d(6, 1, 4, padding=1).to(device)
    theirs = nn.Conv2d(6, 1, 4, padding=1).to(device)
    theirs.load_state_dict(ours.state_dict())
    criterion, pairs = PatchGANLoss(mode), torch.randn(2, 3, 6, 9, 9, device=device)
    loss = 0.5 * (criterion(ours(pairs[0]), True) + criterion(ours(pairs[1]), False))
    peer = 0.5 * (expected(theirs(pairs[0]), True, mode) + expected(theirs(pairs[1]), False, mode))
    loss.backward()
    peer.backward()
    torch.testing.assert_close(loss, peer)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_16_bit_gradient_is_scaled_before_it_is_rounded(device):
    x = torch.full((1, 1, 30, 30), 12.0, dtype=torch.float16, device=device, requires_grad=True)
    loss = PatchGANLoss()(x, True)
    assert loss.dtype == torch.float32 and loss.shape == ()
    (loss * 2.0**16).backward()
    exact = torch.full_like(x, -(2.0**16) / 900 * torch.tensor(-12.0).sigmoid().item()).detach()
    torch.testing.assert_close(x.grad, exact, rtol=2**-10, atol=0)


def test_refuses_what_it_does_not_compute():
    with pytest.raises(ValueError, match="'wgangp'; it can be 'vanilla' or 'lsgan'"):
        PatchGANLoss("wgangp")
    x = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(PatchGANLoss()(x, True).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="patchgan_loss can be differentiated once"):
        gradient.sum().backward()


def test_is_a_module_without_parameters():
    loss = PatchGANLoss("lsgan").to("cpu")
    assert not list(loss.parameters()) and not loss.state_dict() and "lsgan" in repr(loss)

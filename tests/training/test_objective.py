"""``TrainStep`` over other people's networks, against the training loops that these come with."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_graph import FakeGraphBackend, static_tensors
from torch import nn
from torch.nn import functional as F

import fastpix2pix
from fastpix2pix import Objective, StepOptions, TrainStep, accelerate
from fastpix2pix.errors import UserError
from fastpix2pix.presets import UpdateRule
from fastpix2pix.training import step as step_module
from fastpix2pix.training.graph import CapturedStep

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
from published_networks import GANDiscriminator, GANUNet, HDGlobal, HDMultiscale  # noqa: E402

STEPS = 10
HD_RULE = UpdateRule(simultaneous=True, real_first=False, disc_factor=0.5, adam_eps=1e-8, keras_eps=False)
"""pix2pixHD's: both losses at the same weights, the discriminator's halved, torch's Adam."""


def feature_matching(judged):
    """Mean distance of the features of both images, of every layer but the last, at every scale."""
    pairs = zip(judged.fake_output, judged.real_output, strict=True)
    return sum(F.l1_loss(a, b) for fake, real in pairs for a, b in zip(fake[:-1], real[:-1], strict=True))


def hd_pair(dtype=torch.float64):
    torch.manual_seed(0)
    return HDGlobal(4, downs=2, blocks=1).to(dtype), HDMultiscale(4, scales=2, n_layers=2).to(dtype)


def pairs(count=STEPS, dtype=torch.float64, side=32):
    random = torch.Generator().manual_seed(1)
    images = torch.rand(count, 2, 1, 3, side, side, generator=random, dtype=dtype) * 2 - 1
    return [tuple(pair) for pair in images]


HD_OPTIONS = StepOptions(gan_mode="lsgan", lambda_L1=10.0, lr=1e-3)
HD_OBJECTIVE = Objective(image_loss=feature_matching, rule=HD_RULE)


def hd_loop(generator, discriminator):
    """pix2pixHD's training loop in plain PyTorch; (generator's total, discriminator's) loss of every step."""

    def gan(outputs, real):
        return sum(F.mse_loss(each[-1], torch.full_like(each[-1], float(real))) for each in outputs)

    optimizers = [torch.optim.Adam(n.parameters(), 1e-3, (0.5, 0.999)) for n in (generator, discriminator)]
    losses = []
    for source, target in pairs():
        fake = generator(source)
        fake_pool = discriminator(torch.cat((source, fake.detach()), 1))
        real = discriminator(torch.cat((source, target), 1))
        loss_d = 0.5 * (gan(fake_pool, False) + gan(real, True))
        seen = discriminator(torch.cat((source, fake), 1))
        matching = sum(
            F.l1_loss(a, b.detach())
            for one, other in zip(seen, real, strict=True)
            for a, b in zip(one[:-1], other[:-1], strict=True)
        )
        loss_g = gan(seen, True) + 10.0 * matching
        for loss, optimizer in zip((loss_g, loss_d), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(torch.stack((loss_g, loss_d)).detach())
    return torch.stack(losses)


def assert_same_weights(networks, expected):
    """A bias before an instance norm has no gradient but rounding, of which Adam makes up to 1e-9 a step."""
    for network, other in zip(networks, expected, strict=True):
        for mine, theirs in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("large", [1, 10**9], ids=["early", "at the end"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_pix2pix_hd_training_is_that_of_plain_pytorch(monkeypatch, accelerated, large):
    monkeypatch.setattr(step_module, "LARGE", large)
    networks, plain = hd_pair(), hd_pair()
    expected = hd_loop(*plain)
    if accelerated:
        assert all(not accelerate(network).left for network in networks)
    step = TrainStep(*networks, HD_OPTIONS, objective=HD_OBJECTIVE)
    losses = [step(*pair) for pair in pairs()]
    losses = torch.stack([torch.stack((loss.gen_total_loss, loss.disc_loss)) for loss in losses])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)  # the ring keeps them in float32
    assert_same_weights(networks, plain)


def test_a_discriminator_that_takes_two_images():
    """PyTorch-GAN's, by junyanz's rule: the discriminator steps, then judges again."""
    torch.manual_seed(0)
    networks = GANUNet(4, depth=5, dropout=0.0).double(), GANDiscriminator(4).double()
    plain = copy.deepcopy(networks)
    options = StepOptions(preset="junyanz", gan_mode="lsgan", lambda_L1=100.0, lr=1e-3)
    step = TrainStep(*networks, options, objective=Objective(pairs="apart"))
    generator, discriminator = plain
    optimizers = [torch.optim.Adam(n.parameters(), 1e-3, (0.5, 0.999)) for n in plain]
    for source, target in pairs(4, side=64):
        step(source, target)
        fake = generator(source)
        real_logits, fake_logits = discriminator(source, target), discriminator(source, fake.detach())
        loss = 0.5 * ((real_logits - 1).square().mean() + fake_logits.square().mean())
        discriminator.zero_grad()
        loss.backward()
        optimizers[1].step()
        loss = (discriminator(source, fake) - 1).square().mean() + 100 * F.l1_loss(fake, target)
        generator.zero_grad()
        loss.backward()
        optimizers[0].step()
    assert_same_weights(networks, plain)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_masters_and_norms_in_float32(precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
    discriminator = nn.Sequential(nn.Conv2d(6, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4))
    options = StepOptions(preset="junyanz", precision=precision, lr=1e-3)
    full = TrainStep(*copy.deepcopy((generator, discriminator)), StepOptions(preset="junyanz", lr=1e-3))
    before = [p.detach().clone() for p in generator.parameters()]
    step = TrainStep(generator, discriminator, options)
    assert generator[0].weight.dtype == discriminator[0].weight.dtype == dtype
    assert generator[1].weight.dtype == generator[1].running_mean.dtype == torch.float32
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(2.0**8)
    for source, target in pairs(3, torch.float32, side=16):
        losses = step(source.to(dtype), target.to(dtype))
        expected = full(source, target)
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=3e-2, atol=3e-2)
    for master, start in zip(step.gen_optimizer.masters(), before, strict=True):
        assert master.dtype == torch.float32 and not torch.equal(master, start)


def test_it_can_be_captured():
    """Rehearsed: the recorded step, replayed, is the eager one."""
    eager = TrainStep(*hd_pair(torch.float32), HD_OPTIONS, objective=HD_OBJECTIVE)
    recorded = TrainStep(*hd_pair(torch.float32), HD_OPTIONS, objective=HD_OBJECTIVE)
    run = CapturedStep(recorded, FakeGraphBackend(partial(static_tensors, recorded)))
    for pair in pairs(3, torch.float32):
        assert torch.equal(torch.stack(run(*pair)), torch.stack(eager(*pair)))
    assert run.failure is None


def test_an_unknown_way_to_pair_is_refused():
    assert fastpix2pix.Objective is Objective
    with pytest.raises(UserError, match="pairs is 'beside'; choose stacked or apart"):
        Objective(pairs="beside")

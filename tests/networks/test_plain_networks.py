"""Both presets against an independent construction from plain PyTorch layers, in float64."""

import pytest
import torch
from plain_networks import PRESETS

from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.step import TrainStep

WIDTH, DEPTH, SIZE = 4, 6, 64


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_three_steps_equal_plain_pytorch(preset, batch):
    torch.manual_seed(5)
    generator = UNetGenerator(preset, ngf=WIDTH, num_downs=DEPTH, dropout=0.0).double()
    discriminator = PatchDiscriminator(preset, ndf=WIDTH).double()
    with torch.no_grad():
        for tensor in (*generator.state_dict().values(), *discriminator.state_dict().values()):
            tensor.add_(torch.randn_like(tensor) * 0.05)  # biases and norms away from their initial 0 and 1
    plain = PRESETS[preset](WIDTH, DEPTH, torch.float64)
    pairs = plain.copy_weights(generator, discriminator)
    step = TrainStep(generator, discriminator, StepOptions(preset=preset))
    for i in range(3):
        source, target = torch.rand(2, batch, 3, SIZE, SIZE, dtype=torch.float64) * 2 - 1
        expected, gradients = plain.step(source, target)
        losses = torch.stack(step(source, target)).double()
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
        if i == 0:
            states = {**step.gen_optimizer.state, **step.disc_optimizer.state}
            ours = {id(theirs): parameter for parameter, theirs in pairs}
            for parameter, gradient in gradients.items():
                first_moment = states[ours[id(parameter)]]["exp_avg"]  # (1 - beta1) times the gradient
                torch.testing.assert_close(first_moment / 0.5, gradient, rtol=1e-9, atol=1e-12)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_initial_weights():
    """Convolutions N(0, 0.02), norm weights N(1, 0.02), biases 0; the tutorial's norm weights exactly 1."""
    torch.manual_seed(0)
    networks = {
        preset: (UNetGenerator(preset), PatchDiscriminator(preset)) for preset in ("tutorial", "junyanz")
    }
    for preset, pair in networks.items():
        for network in pair:
            for name, parameter in network.named_parameters():
                n = parameter.numel()
                if parameter.ndim == 4:
                    assert abs(parameter.mean()) < 5 * 0.02 / n**0.5, name
                    assert abs(parameter.std() / 0.02 - 1) < 5 / n**0.5, name
                elif name.endswith("bias"):
                    assert torch.count_nonzero(parameter) == 0, name
                elif preset == "tutorial":
                    assert torch.all(parameter == 1), name
                else:
                    assert abs(parameter.mean() - 1) < 5 * 0.02 / n**0.5, name
                    assert abs(parameter.std() / 0.02 - 1) < 5 / n**0.5, name

"""The junyanz preset against an independent construction from plain PyTorch layers, in float64."""

import torch
from torch import nn

from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.step import TrainStep

DOWNS, NGF, NDF, SIZE = 6, 4, 4, 64


class PlainUNet(nn.Module):
    """The published architecture, block inside block: the skip carries what the next block's in-place
    LeakyReLU made of it, then ReLU runs over the concatenation."""

    def __init__(self):
        super().__init__()
        widths = [NGF * min(2**i, 8) for i in range(DOWNS)]
        self.down = nn.ModuleList(
            nn.Conv2d(i, o, 4, 2, 1, bias=False) for i, o in zip([3, *widths], widths, strict=False)
        )
        self.down_norm = nn.ModuleList(nn.BatchNorm2d(w) for w in widths[1:-1])
        up_widths = widths[-2::-1]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(widths[-1] if i == 0 else 2 * up_widths[i - 1], w, 4, 2, 1, bias=False)
            for i, w in enumerate(up_widths)
        )
        self.up_norm = nn.ModuleList(nn.BatchNorm2d(w) for w in up_widths)
        self.last = nn.ConvTranspose2d(2 * NGF, 3, 4, 2, 1)

    def forward(self, x):
        skips = [self.down[0](x)]
        for i in range(1, DOWNS - 1):
            x = self.down[i](nn.functional.leaky_relu(skips[-1], 0.2))
            skips.append(self.down_norm[i - 1](x))
        x = self.down[-1](nn.functional.leaky_relu(skips[-1], 0.2))
        for up, norm in zip(self.up, self.up_norm, strict=True):
            x = norm(up(torch.relu(x)))
            x = torch.cat([nn.functional.leaky_relu(skips.pop(), 0.2), x], 1)
        return torch.tanh(self.last(torch.relu(x)))


def plain_discriminator():
    layers = [nn.Conv2d(6, NDF, 4, 2, 1), nn.LeakyReLU(0.2)]
    for n, stride in ((1, 2), (2, 2), (3, 1)):
        i, o = NDF * 2 ** (n - 1), NDF * 2**n
        layers += [nn.Conv2d(i, o, 4, stride, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(NDF * 8, 1, 4, 1, 1))


def make_pair():
    """Our networks and plain ones with the same weights, and [(our tensor, plain tensor)] of everything."""
    torch.manual_seed(5)
    ours = UNetGenerator("junyanz", ngf=NGF, num_downs=DOWNS, dropout=0.0).double()
    our_d = PatchDiscriminator("junyanz", ndf=NDF).double()
    plain, plain_d = PlainUNet().double(), plain_discriminator().double()
    tensors = []
    for block, conv in zip([*ours.downs, *ours.ups], [*plain.down, *plain.up], strict=True):
        tensors.append((block.conv.weight, conv.weight))
    norms = [b.epilogue for b in [*ours.downs, *ours.ups] if b.epilogue.norm]
    norms += [b.epilogue for b in our_d.blocks[1:]]
    plain_norms = [*plain.down_norm, *plain.up_norm]
    plain_norms += [layer for layer in plain_d if isinstance(layer, nn.BatchNorm2d)]
    for norm, plain_norm in zip(norms, plain_norms, strict=True):
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors.append((getattr(norm, part), getattr(plain_norm, part)))
    convs = [layer for layer in plain_d if isinstance(layer, nn.Conv2d)]
    for block, conv in zip(our_d.blocks, convs[:-1], strict=True):
        tensors.append((block.conv.weight, conv.weight))
    tensors.append((our_d.blocks[0].epilogue.bias, convs[0].bias))
    for layer, other in ((ours.last, plain.last), (our_d.last, convs[-1])):
        tensors += [(layer.weight, other.weight), (layer.bias, other.bias)]
    ours_all = {*ours.state_dict(), *(f"d.{k}" for k in our_d.state_dict())}
    assert len(tensors) == len(ours_all)
    with torch.no_grad():
        for mine, other in tensors:
            mine.add_(torch.randn_like(mine) * 0.05)  # biases and norms away from their initial 0 and 1
            other.copy_(mine)
    return (ours, our_d), (plain, plain_d), tensors


def plain_step(generator, discriminator, optimizers, source, target):
    """The published order: fake = G(A); D step on (fake + real) / 2; then D(fake) again for the G step."""
    bce, l1 = nn.BCEWithLogitsLoss(), nn.L1Loss()
    fake = generator(source)
    optimizers[1].zero_grad()
    fake_logits = discriminator(torch.cat((source, fake.detach()), 1))
    real_logits = discriminator(torch.cat((source, target), 1))
    loss_fake = bce(fake_logits, torch.zeros_like(fake_logits))
    loss_real = bce(real_logits, torch.ones_like(real_logits))
    disc = (loss_fake + loss_real) * 0.5
    disc.backward()
    disc_grads = [p.grad.clone() for p in discriminator.parameters()]
    optimizers[1].step()
    optimizers[0].zero_grad()
    logits = discriminator(torch.cat((source, fake), 1))
    gan, pixel = bce(logits, torch.ones_like(logits)), l1(fake, target)
    (gan + 100 * pixel).backward()
    gen_grads = [p.grad.clone() for p in generator.parameters()]
    optimizers[0].step()
    return (gan + 100 * pixel, gan, pixel, disc, loss_real, loss_fake), gen_grads + disc_grads


def test_three_alternating_steps_equal_plain_pytorch():
    ours, plain, tensors = make_pair()
    step = TrainStep(*ours, StepOptions(preset="junyanz"))
    optimizers = [torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in plain]
    for i in range(3):
        source, target = (torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64) * 2 - 1 for _ in range(2))
        expected, gradients = plain_step(*plain, optimizers, source, target)
        losses = step(source, target)
        torch.testing.assert_close(
            torch.stack(losses).double(), torch.stack(expected).detach(), rtol=1e-6, atol=0
        )
        if i == 0:
            mine = {id(other): p for p, other in tensors}
            states = {**step.gen_optimizer.state, **step.disc_optimizer.state}
            plain_parameters = [*plain[0].parameters(), *plain[1].parameters()]
            for parameter, gradient in zip(plain_parameters, gradients, strict=True):
                ours_gradient = states[mine[id(parameter)]]["exp_avg"] / 0.5
                torch.testing.assert_close(ours_gradient, gradient, rtol=1e-9, atol=1e-12)
    for mine, other in tensors:
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-8)


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

"""A pix2pix of one's own, before and after: plain PyTorch, then the same networks on fastpix2pix.

    python examples/plain_pix2pix.py

The networks are written as PyTorch-GAN writes its pix2pix: blocks of convolution, instance norm and
activation, and a discriminator that takes both images. Sizes are small, so that it runs anywhere in seconds.
"""

import copy

import torch
from torch import nn

from fastpix2pix import Objective, StepOptions, TrainStep, accelerate


def down(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 4, 2, 1, bias=False), nn.InstanceNorm2d(outside), nn.LeakyReLU(0.2)
    )


def up(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(inside, outside, 4, 2, 1, bias=False),
        nn.InstanceNorm2d(outside),
        nn.ReLU(inplace=True),
    )


class Generator(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.down1, self.down2 = down(3, width), down(width, 2 * width)
        self.up1, self.up2 = up(2 * width, width), up(2 * width, width)
        self.last = nn.Sequential(nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d1 = self.down1(x)
        u1 = self.up1(self.down2(d1))
        return self.last(self.up2(torch.cat((u1, d1), 1)))


class Discriminator(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.model = nn.Sequential(
            down(6, width), down(width, 2 * width), nn.Conv2d(2 * width, 1, 4, padding=1)
        )

    def forward(self, source: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.model(torch.cat((source, image), 1))


def before(generator, discriminator, pairs) -> torch.Tensor:
    """Plain PyTorch: least squares, 100 times L1, two Adams; the generator's loss in the last step."""
    mse, l1 = nn.MSELoss(), nn.L1Loss()
    adam = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in (generator, discriminator)]
    for source, target in pairs:
        fake = generator(source)
        real_logits, fake_logits = discriminator(source, target), discriminator(source, fake.detach())
        ones, zeros = torch.ones_like(real_logits), torch.zeros_like(real_logits)
        loss_d = 0.5 * (mse(real_logits, ones) + mse(fake_logits, zeros))
        adam[1].zero_grad()
        loss_d.backward()
        adam[1].step()

        logits = discriminator(source, fake)
        loss_g = mse(logits, ones) + 100 * l1(fake, target)
        adam[0].zero_grad()
        loss_g.backward()
        adam[0].step()
    return loss_g.detach()


def after(generator, discriminator, pairs) -> torch.Tensor:
    """The same on fastpix2pix."""
    print(accelerate(generator))
    print(accelerate(discriminator))
    options = StepOptions(preset="junyanz", gan_mode="lsgan", lambda_L1=100.0, lr=2e-4)
    step = TrainStep(generator, discriminator, options, objective=Objective(pairs="apart"))
    for source, target in pairs:
        losses = step(source, target)
    return losses.gen_total_loss


def main() -> None:
    torch.manual_seed(0)
    networks = Generator(), Discriminator()
    pairs = [tuple(pair) for pair in torch.rand(5, 2, 1, 3, 32, 32) * 2 - 1]
    plain = before(*copy.deepcopy(networks), pairs)
    ours = after(*networks, pairs)
    print(f"generator's loss in step {len(pairs)}: before {plain:.3f}, after {ours:.3f}")


if __name__ == "__main__":
    main()

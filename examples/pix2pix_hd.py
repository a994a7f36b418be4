"""A pix2pixHD-like training on ``TrainStep``: two scales, feature matching, instance norm, residual blocks.

    python examples/pix2pix_hd.py

What Wang et al. (CVPR 2018) change in pix2pix, each in one line of an ``Objective``. Sizes are small, so that
it runs anywhere in seconds.
"""

import torch
from torch import nn
from torch.nn import functional as F

from fastpix2pix import Objective, StepOptions, TrainStep, accelerate
from fastpix2pix.presets import UpdateRule


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        again = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.conv_block = nn.Sequential(*half, nn.ReLU(True), *again)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_block(x)


def generator(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.ReflectionPad2d(3),
        nn.Conv2d(3, width, 7),
        nn.InstanceNorm2d(width),
        nn.ReLU(True),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.InstanceNorm2d(2 * width),
        nn.ReLU(True),
        Block(2 * width),
        nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1),
        nn.InstanceNorm2d(width),
        nn.ReLU(True),
        nn.ReflectionPad2d(3),
        nn.Conv2d(width, 3, 7),
        nn.Tanh(),
    )


class Multiscale(nn.Module):
    """The features of every layer, logits last, of the image and of its half."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(nn.Conv2d(6, width, 4, 2, 2), nn.LeakyReLU(0.2, True)),
                    nn.Sequential(
                        nn.Conv2d(width, 2 * width, 4, 2, 2),
                        nn.InstanceNorm2d(2 * width),
                        nn.LeakyReLU(0.2, True),
                    ),
                    nn.Conv2d(2 * width, 1, 4, 1, 2),
                ]
            )
            for _ in range(2)
        )

    def forward(self, pair: torch.Tensor) -> list[list[torch.Tensor]]:
        outputs = []
        for layers in self.scales:
            features = [pair]
            for layer in layers:
                features.append(layer(features[-1]))
            outputs.append(features[1:])
            pair = F.avg_pool2d(pair, 3, 2, 1, count_include_pad=False)
        return outputs


def feature_matching(judged) -> torch.Tensor:
    """Distance of the discriminator's features of both images, but for the logits."""
    scales = zip(judged.fake_output, judged.real_output, strict=True)
    return sum(F.l1_loss(a, b) for fake, real in scales for a, b in zip(fake[:-1], real[:-1], strict=True))


HD = UpdateRule(simultaneous=True, real_first=False, disc_factor=0.5, adam_eps=1e-8, keras_eps=False)


def main() -> None:
    torch.manual_seed(0)
    networks = generator(), Multiscale()
    for network in networks:
        print(accelerate(network))
    step = TrainStep(
        *networks,
        StepOptions(gan_mode="lsgan", lambda_L1=10.0, lr=2e-4),
        objective=Objective(image_loss=feature_matching, rule=HD),
    )
    pairs = torch.rand(5, 2, 1, 3, 32, 32) * 2 - 1
    for number, (source, target) in enumerate(pairs, start=1):
        losses = step(source, target)
        gan = f"D {losses.disc_loss:.3f}, G {losses.gen_gan_loss:.3f}"
        print(f"step {number}: {gan}, features {losses.gen_l1_loss:.3f}")


if __name__ == "__main__":
    main()

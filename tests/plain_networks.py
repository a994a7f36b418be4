"""Both references in plain PyTorch, of any width, depth and type: the independent truth of the tests.

Written from the publications, layer by layer, and sharing no line with fastpix2pix: the TensorFlow tutorial
"pix2pix: Image-to-image translation with a conditional GAN", and pytorch-CycleGAN-and-pix2pix. Both without
dropout, and always with the batch's own statistics, as in training.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, leaky_relu


class KerasBatchNorm(nn.BatchNorm2d):
    """Keras's defaults, and its running variance: that of the batch as it is, not an estimate by n - 1."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten(), self.momentum)
        normalised = (x - mean) / torch.sqrt(var + self.eps)
        return normalised * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class KerasAdam(torch.optim.Adam):
    """Adam that adds epsilon to the root of the moment before its bias is corrected; torch adds it after."""

    steps = 0

    def step(self) -> None:
        self.steps += 1
        for group in self.param_groups:
            group["eps"] = 1e-7 / (1 - group["betas"][1] ** self.steps) ** 0.5
        super().step()


class UNet(nn.Module):
    """Convolutions and norms of a U-Net with ``depth`` halvings, the first to ``width`` channels."""

    def __init__(self, width: int, depth: int, norm: Callable[[int], nn.Module], *, bottleneck_norm: bool):
        super().__init__()
        down = [width * min(2**i, 8) for i in range(depth)]
        up = down[-2::-1]
        self.down = nn.ModuleList(
            nn.Conv2d(i, o, 4, 2, 1, bias=False) for i, o in zip([3, *down[:-1]], down, strict=True)
        )
        self.down_norm = nn.ModuleList(map(norm, down[1:] if bottleneck_norm else down[1:-1]))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False)
            for i, o in zip([down[-1], *(2 * w for w in up[:-1])], up, strict=True)
        )
        self.up_norm = nn.ModuleList(map(norm, up))
        self.last = nn.ConvTranspose2d(2 * width, 3, 4, 2, 1)


class TutorialUNet(UNet):
    """A block ends with its activation, which is also what the skip carries; [up, skip]."""

    def __init__(self, width: int, depth: int):
        super().__init__(width, depth, KerasBatchNorm, bottleneck_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        x = leaky_relu(self.down[0](x), 0.3)
        skips = []
        for down, norm in zip(self.down[1:], self.down_norm, strict=True):
            skips.append(x)
            x = leaky_relu(norm(down(x)), 0.3)
        for up, norm in zip(self.up, self.up_norm, strict=True):
            x = torch.cat([torch.relu(norm(up(x))), skips.pop()], 1)
        return torch.tanh(self.last(x))


class JunyanzUNet(UNet):
    """A block begins with its activation, in place: the skip carries what the next block's LeakyReLU made of
    it, and ReLU runs over the concatenation, [skip, up]. The bottleneck has no norm.
    """

    def __init__(self, width: int, depth: int):
        super().__init__(width, depth, nn.BatchNorm2d, bottleneck_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        skips = [leaky_relu(self.down[0](x), 0.2)]
        for down, norm in zip(self.down[1:-1], self.down_norm, strict=True):
            skips.append(leaky_relu(norm(down(skips[-1])), 0.2))
        x = self.down[-1](skips[-1])
        for up, norm in zip(self.up, self.up_norm, strict=True):
            x = torch.cat([skips.pop(), norm(up(torch.relu(x)))], 1)
        return torch.tanh(self.last(torch.relu(x)))


def patchgan(
    width: int, norm: Callable[[int], nn.Module], *, slope: float, first_bias: bool
) -> nn.Sequential:
    """The 70x70 discriminator of input and output image."""
    layers = [nn.Conv2d(6, width, 4, 2, 1, bias=first_bias), nn.LeakyReLU(slope)]
    for below, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
        conv = nn.Conv2d(below, 2 * below, 4, stride, 1, bias=False)
        layers += [conv, norm(2 * below), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


def cross_entropy(logits: Tensor, real: bool) -> Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


class PlainPix2Pix:
    """A generator, a discriminator and their optimizers; ``step`` is the reference's update."""

    generator: nn.Module
    discriminator: nn.Module

    def _train_with(self, adam: Callable[..., torch.optim.Adam], dtype: torch.dtype) -> None:
        self.generator.to(dtype)
        self.discriminator.to(dtype)
        self.g_adam, self.d_adam = (
            adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for network in (self.generator, self.discriminator)
        )

    def step(self, source: Tensor, target: Tensor) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Update both networks. The six losses as ``fastpix2pix`` lists them (total, adversarial, L1,
        discriminator's, and its parts for the real and the fake image), and the gradient of each parameter.
        """
        raise NotImplementedError

    def copy_weights(self, generator: nn.Module, discriminator: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Take over the weights and running statistics of fastpix2pix's networks.

        Returns (tensor of fastpix2pix, tensor of this) for each of them.
        """
        pairs = []
        d_convs = [layer for layer in self.discriminator if isinstance(layer, nn.Conv2d)]
        d_norms = [layer for layer in self.discriminator if isinstance(layer, nn.BatchNorm2d)]
        blocks = [*generator.downs, *generator.ups, *discriminator.blocks]
        convs = [*self.generator.down, *self.generator.up, *d_convs[:-1]]
        pairs += [(block.conv.weight, conv.weight) for block, conv in zip(blocks, convs, strict=True)]
        epilogues = [block.epilogue for block in blocks if block.epilogue.running_mean is not None]
        norms = [*self.generator.down_norm, *self.generator.up_norm, *d_norms]
        for epilogue, norm in zip(epilogues, norms, strict=True):
            for name in ("weight", "bias", "running_mean", "running_var"):
                pairs.append((getattr(epilogue, name), getattr(norm, name)))
        if d_convs[0].bias is not None:
            pairs.append((discriminator.blocks[0].epilogue.bias, d_convs[0].bias))
        for ours, plain in ((generator.last, self.generator.last), (discriminator.last, d_convs[-1])):
            pairs += [(ours.weight, plain.weight), (ours.bias, plain.bias)]
        assert len(pairs) == len(generator.state_dict()) + len(discriminator.state_dict())
        with torch.no_grad():
            for ours, plain in pairs:
                plain.copy_(ours)
        return pairs


class Tutorial(PlainPix2Pix):
    def __init__(self, width: int, depth: int, dtype: torch.dtype):
        self.generator = TutorialUNet(width, depth)
        self.discriminator = patchgan(width, KerasBatchNorm, slope=0.3, first_bias=False)
        self._train_with(KerasAdam, dtype)

    def step(self, source: Tensor, target: Tensor) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Both gradients are taken before either network changes."""
        fake = self.generator(source)
        real_logits = self.discriminator(torch.cat([source, target], 1))
        fake_logits = self.discriminator(torch.cat([source, fake], 1))
        gan, l1 = cross_entropy(fake_logits, True), (target - fake).abs().mean()
        real_loss, fake_loss = cross_entropy(real_logits, True), cross_entropy(fake_logits, False)
        total, disc = gan + 100 * l1, real_loss + fake_loss
        g_gradients = _gradients(total, self.generator)
        d_gradients = _gradients(disc, self.discriminator)
        _update(self.g_adam, g_gradients)
        _update(self.d_adam, d_gradients)
        return _values(total, gan, l1, disc, real_loss, fake_loss), g_gradients | d_gradients


class Junyanz(PlainPix2Pix):
    def __init__(self, width: int, depth: int, dtype: torch.dtype):
        self.generator = JunyanzUNet(width, depth)
        self.discriminator = patchgan(width, nn.BatchNorm2d, slope=0.2, first_bias=True)
        self._train_with(torch.optim.Adam, dtype)

    def step(self, source: Tensor, target: Tensor) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """The discriminator goes first, fake before real; the generator's loss is by the updated one."""
        fake = self.generator(source)
        fake_logits = self.discriminator(torch.cat([source, fake.detach()], 1))
        real_logits = self.discriminator(torch.cat([source, target], 1))
        fake_loss, real_loss = cross_entropy(fake_logits, False), cross_entropy(real_logits, True)
        disc = (fake_loss + real_loss) * 0.5
        d_gradients = _gradients(disc, self.discriminator)
        _update(self.d_adam, d_gradients)

        fake_logits = self.discriminator(torch.cat([source, fake], 1))
        gan, l1 = cross_entropy(fake_logits, True), (fake - target).abs().mean()
        total = gan + 100 * l1
        g_gradients = _gradients(total, self.generator)
        _update(self.g_adam, g_gradients)
        return _values(total, gan, l1, disc, real_loss, fake_loss), g_gradients | d_gradients


PRESETS = {"tutorial": Tutorial, "junyanz": Junyanz}


def _gradients(loss: Tensor, network: nn.Module) -> dict[nn.Parameter, Tensor]:
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return dict(zip(parameters, gradients, strict=True))


def _update(adam: torch.optim.Adam, gradients: dict[nn.Parameter, Tensor]) -> None:
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    adam.step()


def _values(*losses: Tensor) -> Tensor:
    return torch.stack(losses).detach()

"""Networks that other pix2pix repositories publish, written anew from their architecture, at any width.

* NVIDIA/pix2pixHD (Wang et al., CVPR 2018): global generator, local enhancer, multiscale discriminator.
* PyTorch-GAN: generator and discriminator of its pix2pix.
* CUT (Park et al., ECCV 2020): the ResNet generator with and without anti-aliasing, and its PatchGAN.

All of them normalise by instance, without affine parameters or running statistics, as their defaults do.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def norm(width: int) -> nn.Module:
    return nn.InstanceNorm2d(width, affine=False)


# --------------------------------------------------------------------------------------------- pix2pixHD


class HDBlock(nn.Module):
    """Residual block: the norm of its second convolution is added to what came in."""

    def __init__(self, width: int, activation: nn.Module):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            norm(width),
            activation,
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            norm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.conv_block(x)
        return out


def hd_body(width: int, downs: int, blocks: int) -> list[nn.Module]:
    """The global generator up to its last convolution; one activation module serves the first half."""
    activation = nn.ReLU(True)
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), norm(width), activation]
    for i in range(downs):
        layers += [
            nn.Conv2d(width * 2**i, width * 2 ** (i + 1), 3, 2, 1),
            norm(width * 2 ** (i + 1)),
            activation,
        ]
    layers += [HDBlock(width * 2**downs, activation) for _ in range(blocks)]
    for i in reversed(range(downs)):
        up = nn.ConvTranspose2d(width * 2 ** (i + 1), width * 2**i, 3, 2, 1, output_padding=1)
        layers += [up, norm(width * 2**i), activation]
    return layers


class HDGlobal(nn.Module):
    def __init__(self, width: int = 64, downs: int = 4, blocks: int = 9):
        super().__init__()
        last = [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*hd_body(width, downs, blocks), *last)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)


class HDLocal(nn.Module):
    """Local enhancer: the global generator's features at half the size join its own."""

    def __init__(self, width: int = 32, downs: int = 4, blocks: int = 9, local_blocks: int = 3):
        super().__init__()
        self.n_local_enhancers = 1
        self.model = nn.Sequential(*hd_body(2 * width, downs, blocks))
        self.model1_1 = nn.Sequential(
            nn.ReflectionPad2d(3),
            nn.Conv2d(3, width, 7),
            norm(width),
            nn.ReLU(True),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            norm(2 * width),
            nn.ReLU(True),
        )
        self.model1_2 = nn.Sequential(
            *(HDBlock(2 * width, nn.ReLU(True)) for _ in range(local_blocks)),
            nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1),
            norm(width),
            nn.ReLU(True),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, 3, 7),
            nn.Tanh(),
        )
        self.downsample = nn.AvgPool2d(3, 2, [1, 1], count_include_pad=False)

    def forward(self, image: Tensor) -> Tensor:
        pyramid = [image]
        for _ in range(self.n_local_enhancers):
            pyramid.append(self.downsample(pyramid[-1]))
        out = self.model(pyramid[-1])
        for n in range(1, self.n_local_enhancers + 1):
            down, up = getattr(self, f"model{n}_1"), getattr(self, f"model{n}_2")
            out = up(down(pyramid[self.n_local_enhancers - n]) + out)
        return out


class HDMultiscale(nn.Module):
    """PatchGANs on an image and its halves; returns the features of every layer of each, logits last."""

    def __init__(self, width: int = 64, scales: int = 2, n_layers: int = 3, channels: int = 6):
        super().__init__()
        self.num_D, self.n_layers = scales, n_layers
        for scale in range(scales):
            widths = [width * min(2**i, 8) for i in range(n_layers + 1)]
            layers = [[nn.Conv2d(channels, width, 4, 2, 2), nn.LeakyReLU(0.2, True)]]
            for i in range(1, n_layers + 1):
                conv = nn.Conv2d(widths[i - 1], widths[i], 4, 2 if i < n_layers else 1, 2)
                layers.append([conv, norm(widths[i]), nn.LeakyReLU(0.2, True)])
            layers.append([nn.Conv2d(widths[-1], 1, 4, 1, 2)])
            for i, layer in enumerate(layers):
                setattr(self, f"scale{scale}_layer{i}", nn.Sequential(*layer))
        self.downsample = nn.AvgPool2d(3, 2, [1, 1], count_include_pad=False)

    def forward(self, pair: Tensor) -> list[list[Tensor]]:
        result = []
        for scale in reversed(range(self.num_D)):
            features = [pair]
            for i in range(self.n_layers + 2):
                features.append(getattr(self, f"scale{scale}_layer{i}")(features[-1]))
            result.append(features[1:])
            pair = self.downsample(pair)
        return result


# ------------------------------------------------------------------------------------------- PyTorch-GAN


class GANDown(nn.Module):
    def __init__(self, inside: int, outside: int, normalize: bool = True, dropout: float = 0.0):
        super().__init__()
        layers = [nn.Conv2d(inside, outside, 4, 2, 1, bias=False)]
        layers += [norm(outside)] if normalize else []
        layers += [nn.LeakyReLU(0.2)]
        layers += [nn.Dropout(dropout)] if dropout else []
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class GANUp(nn.Module):
    def __init__(self, inside: int, outside: int, dropout: float = 0.0):
        super().__init__()
        layers = [
            nn.ConvTranspose2d(inside, outside, 4, 2, 1, bias=False),
            norm(outside),
            nn.ReLU(inplace=True),
        ]
        layers += [nn.Dropout(dropout)] if dropout else []
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip_input: Tensor) -> Tensor:
        x = self.model(x)
        return torch.cat((x, skip_input), 1)


class GANUNet(nn.Module):
    def __init__(self, width: int = 64, depth: int = 8, dropout: float = 0.5):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(depth)]
        self.depth = depth
        for i, outside in enumerate(widths):
            inside = widths[i - 1] if i else 3
            drop = dropout if i > 2 else 0.0
            setattr(self, f"down{i + 1}", GANDown(inside, outside, 0 < i < depth - 1, drop))
        for i in range(depth - 1):
            inside = widths[-1] if i == 0 else 2 * widths[-1 - i]
            setattr(self, f"up{i + 1}", GANUp(inside, widths[-2 - i], dropout if i < depth - 4 else 0.0))
        self.final = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.ZeroPad2d((1, 0, 1, 0)),
            nn.Conv2d(2 * width, 3, 4, padding=1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        downs = []
        for i in range(self.depth):
            x = getattr(self, f"down{i + 1}")(x)
            downs.append(x)
        for i in range(self.depth - 1):
            x = getattr(self, f"up{i + 1}")(x, downs[-2 - i])
        return self.final(x)


class GANDiscriminator(nn.Module):
    """Takes source and image apart."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers, inside = [], 6
        for i in range(4):
            layers.append(nn.Conv2d(inside, width * 2**i, 4, 2, 1))
            layers += [norm(width * 2**i)] if i else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            inside = width * 2**i
        layers += [nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(inside, 1, 4, padding=1, bias=False)]
        self.model = nn.Sequential(*layers)

    def forward(self, img_A: Tensor, img_B: Tensor) -> Tensor:  # noqa: N803
        return self.model(torch.cat((img_A, img_B), 1))


# --------------------------------------------------------------------------------------------------- CUT


def blur_filter(size: int) -> Tensor:
    row = torch.tensor({3: [1.0, 2.0, 1.0], 4: [1.0, 3.0, 3.0, 1.0]}[size])
    square = row[:, None] * row[None, :]
    return square / square.sum()


class BlurDown(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("filt", blur_filter(3).repeat(width, 1, 1, 1))
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.filt, stride=2, groups=x.shape[1])


class BlurUp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("filt", 4 * blur_filter(4).repeat(width, 1, 1, 1))
        self.pad = nn.ReplicationPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(self.pad(x), self.filt, stride=2, padding=2, groups=x.shape[1])
        return y[:, :, 1:, 1:][:, :, :-1, :-1]


class CUTBlock(nn.Module):
    def __init__(self, width: int, dropout: bool):
        super().__init__()
        drop = [nn.Dropout(0.5)] if dropout else []
        convolutions = [[nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), norm(width)] for _ in range(2)]
        self.conv_block = nn.Sequential(*convolutions[0], nn.ReLU(True), *drop, *convolutions[1])

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.conv_block(x)
        return out


class CUTResNet(nn.Module):
    """``layers`` asks for features of the encoder, which a contrastive loss compares."""

    def __init__(self, width: int = 64, blocks: int = 9, antialias: bool = True, dropout: bool = False):
        super().__init__()
        model = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), norm(width), nn.ReLU(True)]
        for i in range(2):
            inside, outside = width * 2**i, width * 2 ** (i + 1)
            stride = 1 if antialias else 2
            model += [nn.Conv2d(inside, outside, 3, stride, 1), norm(outside), nn.ReLU(True)]
            model += [BlurDown(outside)] if antialias else []
        model += [CUTBlock(4 * width, dropout) for _ in range(blocks)]
        for i in (2, 1):
            inside, outside = width * 2**i, width * 2 ** (i - 1)
            if antialias:
                model += [BlurUp(inside), nn.Conv2d(inside, outside, 3, 1, 1)]
            else:
                model += [nn.ConvTranspose2d(inside, outside, 3, 2, 1, output_padding=1)]
            model += [norm(outside), nn.ReLU(True)]
        model += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*model)

    def forward(self, image: Tensor, layers: list = [], encode_only: bool = False):  # noqa: B006
        if not layers:
            return self.model(image)
        features = []
        for i, layer in enumerate(self.model):
            image = layer(image)
            if i in layers:
                features.append(image)
            if i == layers[-1] and encode_only:
                return features
        return image, features


class CUTDiscriminator(nn.Module):
    def __init__(self, width: int = 64, n_layers: int = 3):
        super().__init__()
        model = [nn.Conv2d(3, width, 4, 1, 1), nn.LeakyReLU(0.2, True), BlurDown(width)]
        widths = [width * min(2**i, 8) for i in range(n_layers + 1)]
        for i in range(1, n_layers):
            conv = nn.Conv2d(widths[i - 1], widths[i], 4, 1, 1)
            model += [conv, norm(widths[i]), nn.LeakyReLU(0.2, True), BlurDown(widths[i])]
        model += [nn.Conv2d(widths[-2], widths[-1], 4, 1, 1), norm(widths[-1]), nn.LeakyReLU(0.2, True)]
        model += [nn.Conv2d(widths[-1], 1, 4, 1, 1)]
        self.model = nn.Sequential(*model)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)


# ----------------------------------------------------------------------------------------------- all eight


class Published(NamedTuple):
    """build: the network, from a width; full: its published width and pixels a side. inputs: the channels
    of each image that it takes.
    """

    build: Callable[..., nn.Module]
    full: tuple[int, int]
    inputs: tuple[int, ...] = (3,)


PUBLISHED = {
    "pix2pixHD global generator": Published(HDGlobal, (64, 256)),
    "pix2pixHD local enhancer": Published(HDLocal, (32, 512)),
    "pix2pixHD multiscale discriminator": Published(HDMultiscale, (64, 256), (6,)),
    "PyTorch-GAN generator": Published(GANUNet, (64, 256)),
    "PyTorch-GAN discriminator": Published(GANDiscriminator, (64, 256), (3, 3)),
    "CUT generator": Published(CUTResNet, (64, 256)),
    "CUT generator without anti-aliasing": Published(partial(CUTResNet, antialias=False), (64, 256)),
    "CUT discriminator": Published(CUTDiscriminator, (64, 256)),
}

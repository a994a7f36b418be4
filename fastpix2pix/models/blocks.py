"""The parts of both networks: a convolution with its fused epilogue, and the joint of a skip connection."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastpix2pix.kernels.cpu_conv import conv2d, conv_transpose2d
from fastpix2pix.kernels.deep_conv import Passage, TakeGradient, conv_norm_act, is_deep
from fastpix2pix.kernels.norm_act import norm_act
from fastpix2pix.kernels.reference import NormActConfig
from fastpix2pix.presets import Architecture

KERNEL_SIZE = 4
INIT_STD = 0.02


class Epilogue(nn.Module):
    """What follows a convolution: normalisation, dropout and activation in one op (``kernels.norm_act``).

    ``norm`` is "batch" (affine, running statistics), "instance" (neither) or None (then ``bias`` is the
    convolution's, added here). Parameters and running statistics stay in float32 in a 16-bit network.
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        channels: int,
        norm: str | None,
        architecture: Architecture,
        *,
        slope: float,
        skip_slope: float | None = None,
        dropout: float = 0.0,
        layer: int = 0,
        bias: bool = False,
    ):
        super().__init__()
        self.norm, self.gamma_std = norm, architecture.gamma_std
        self.config = NormActConfig(
            norm=norm is not None,
            eps=architecture.eps,
            momentum=architecture.momentum,
            unbiased=architecture.unbiased,
            slope=slope,
            skip_slope=skip_slope,
            dropout=dropout,
            layer=layer,
        )
        affine = norm == "batch"
        self.weight = nn.Parameter(1 + architecture.gamma_std * torch.randn(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine or bias else None
        self.register_buffer("running_mean", torch.zeros(channels) if affine else None)
        self.register_buffer("running_var", torch.ones(channels) if affine else None)

    def configured(self, batch: int, parts: int = 1) -> NormActConfig:
        """The op's configuration for ``batch`` images that are ``parts`` separate batches side by side."""
        # Without running statistics, instance norm normalises by the image itself in evaluation too.
        training = self.training or self.norm == "instance"
        return self.config._replace(
            training=training,
            groups=batch if self.norm == "instance" else parts,
            dropout=self.config.dropout if self.training else 0.0,
        )

    def ignores(self, n: int, height: int, width: int) -> bool:
        """Whether the results are the same for any (n, C, height, width) that comes in.

        Each statistic is then taken of a single value, and normalising a value by itself leaves nothing.
        """
        config = self.configured(n)
        return config.norm and config.training and n * height * width == config.groups

    def forward(
        self, x: Tensor, rng: Tensor | None = None, out: Tensor | None = None, skip_out: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(N, C, H, W) to the same, or to (y, skip) where the block feeds a skip connection."""
        return norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            config=self.configured(x.shape[0]),
            rng=rng,
            out=out,
            skip_out=skip_out,
        )


class Block(nn.Module):
    """A convolution and its epilogue. Normalised convolutions have a bias with instance norm only.

    ``take_gradient``: who is asked to take a deep layer's weight gradient (``kernels.deep_conv``).
    """

    take_gradient: TakeGradient | None = None

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, epilogue: Epilogue):
        super().__init__()
        self.conv = conv
        self.epilogue = epilogue

    def forward(
        self,
        x: Tensor,
        rng: Tensor | None = None,
        out: Tensor | None = None,
        skip_out: Tensor | None = None,
        *,
        train_conv: bool = True,
        before: Passage | None = None,
        after: Passage | None = None,
        skip_after: Passage | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(N, C, H, W) to y of ``out_shape``, or to (y, skip) where the block feeds a skip connection.

        train_conv=False stops the gradient at the convolution's output. before, after, skip_after: of a deep
        block, see ``kernels.deep_conv.conv_norm_act``; others have none.
        """
        if not self.is_deep(x):
            with torch.set_grad_enabled(train_conv and torch.is_grad_enabled()):
                pre = self.convolve(x)
            return self.epilogue(pre, rng, out, skip_out)
        weight, epilogue = self.conv.weight, self.epilogue
        if not train_conv:
            x, weight = x.detach(), weight.detach()
        return conv_norm_act(
            x,
            weight,
            epilogue.weight,
            epilogue.bias,
            epilogue.running_mean,
            epilogue.running_var,
            transposed=self.transposed,
            config=epilogue.configured(x.shape[0]),
            rng=rng,
            out=out,
            skip_out=skip_out,
            take_gradient=self.take_gradient,
            before=before,
            after=after,
            skip_after=skip_after,
        )

    @property
    def transposed(self) -> bool:
        """Whether it goes up."""
        return isinstance(self.conv, nn.ConvTranspose2d)

    def passage(self, x: Tensor) -> Passage | None:
        """What stands between this block, given ``x``, and the reader of a result, if the block is deep."""
        return Passage() if self.is_deep(x) else None

    def is_deep(self, x: Tensor) -> bool:
        """Whether convolution and epilogue of ``x`` are one op, a deep layer's."""
        conv = self.conv
        strided = conv.kernel_size == (KERNEL_SIZE, KERNEL_SIZE) and conv.stride == (2, 2)
        return strided and conv.bias is None and is_deep(x, conv.weight, transposed=self.transposed)

    def out_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """(N, C, H, W) of y for ``x``, of a convolution that halves or doubles the image."""
        n, _, h, w = x.shape
        sides = (2 * h, 2 * w) if self.transposed else (h // 2, w // 2)
        return n, self.conv.out_channels, *sides

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        conv = self.conv
        if isinstance(conv, nn.ConvTranspose2d):
            return conv_transpose2d(x, conv.weight, conv.bias)
        return conv2d(x, conv.weight, conv.bias, stride=conv.stride[0])


def set_working_type(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert the convolutions of one of our networks to ``dtype``, in place.

    What an epilogue adds in float32 stays there: normalisation, its statistics, the last layer's bias.
    """
    for block in network.modules():
        if isinstance(block, Block):
            block.conv.to(dtype)
    network.last.weight.data = network.last.weight.data.to(dtype)


INITIALISERS: dict[str, Callable[[Tensor, float], object]] = {
    "normal": lambda weight, gain: nn.init.normal_(weight, 0.0, gain),
    "xavier": nn.init.xavier_normal_,
    "kaiming": lambda weight, gain: nn.init.kaiming_normal_(weight),  # which has a gain of its own
    "orthogonal": nn.init.orthogonal_,
}


@torch.no_grad()
def initialise(module: nn.Module, init_type: str = "normal", gain: float = INIT_STD) -> None:
    """Weights of the convolutions by ``init_type``, biases zero.

    By default weights are from N(0, 0.02) (Isola et al., section 6.2; both references); the other types and
    the gain are pytorch-CycleGAN-and-pix2pix's, with which norm weights that are drawn at all spread by the
    gain too.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            # Into contiguous memory: orthogonal_ refuses channels-last.
            drawn = torch.empty_like(layer.weight, memory_format=torch.contiguous_format)
            INITIALISERS[init_type](drawn, gain)
            layer.weight.copy_(drawn)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, Epilogue) and layer.weight is not None and layer.gamma_std not in (0.0, gain):
            nn.init.normal_(layer.weight, 1.0, gain)


class Join(torch.autograd.Function):
    """Two tensors that already lie side by side in ``buffer``, as one tensor: torch.cat without the copy."""

    @staticmethod
    def forward(ctx, first, second, buffer_holder):
        ctx.split = first.shape[1]
        return buffer_holder[0].detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, : ctx.split], gradient[:, ctx.split :], None

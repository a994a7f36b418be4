"""The two networks of pix2pix (Isola et al., 2017, section 3.2): U-Net generator and PatchGAN discriminator.

Each follows one of two references, named by ``preset``: the TensorFlow tutorial or
pytorch-CycleGAN-and-pix2pix ("junyanz"). They are different networks; ``DIALECTS`` says where.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastpix2pix.config import TrainConfig
from fastpix2pix.errors import UserError
from fastpix2pix.kernels.cpu_conv import (
    ConvContext,
    conv2d,
    conv2d_backward,
    conv2d_forward,
    conv_transpose2d,
)
from fastpix2pix.kernels.norm_act import norm_act, norm_act_backward, norm_act_forward
from fastpix2pix.kernels.reference import NormActConfig, compute_dtype

KERNEL_SIZE = 4
MIN_DOWNS = 5


@dataclass(frozen=True)
class Dialect:
    """What one reference implementation chooses where the paper leaves a choice."""

    encoder_slope: float
    """Negative slope of the LeakyReLU after every encoder and discriminator convolution."""
    skip_slope: float
    """The same for the copy that the skip connection carries (0: ReLU)."""
    bottleneck_norm: bool
    """Whether the 1x1 bottleneck is normalised."""
    bottleneck_slope: float
    skip_first: bool
    """Order of the concatenation: [skip, up], or [up, skip]."""
    innermost_dropout: bool
    """Whether the innermost decoder block has dropout."""
    eps: float
    momentum: float
    """Weight of the newest batch in the running statistics (torch's sense)."""
    unbiased: bool
    """Whether the running variance is the unbiased one."""
    gamma_std: float
    """Standard deviation of the norm weights' initial values around 1."""
    discriminator_first_bias: bool


DIALECTS = {
    "tutorial": Dialect(
        encoder_slope=0.3,
        skip_slope=0.3,
        bottleneck_norm=True,
        bottleneck_slope=0.3,
        skip_first=False,
        innermost_dropout=True,
        eps=1e-3,
        momentum=0.01,
        unbiased=False,
        gamma_std=0.0,
        discriminator_first_bias=False,
    ),
    "junyanz": Dialect(
        encoder_slope=0.2,
        skip_slope=0.0,
        bottleneck_norm=False,
        bottleneck_slope=0.0,
        skip_first=True,
        innermost_dropout=False,
        eps=1e-5,
        momentum=0.1,
        unbiased=True,
        gamma_std=0.02,
        discriminator_first_bias=True,
    ),
}


def _dialect(preset: str) -> Dialect:
    if preset not in DIALECTS:
        raise UserError(f"preset is {preset!r}; choose one of {', '.join(DIALECTS)}")
    return DIALECTS[preset]


class Epilogue(nn.Module):
    """What follows a convolution: normalisation, dropout and activation in one op (``kernels.norm_act``).

    ``norm`` is "batch" (affine, running statistics), "instance" (neither) or None (then ``bias`` is the
    convolution's, added here). Parameters and running statistics stay in float32 in a 16-bit network.
    """

    def __init__(
        self,
        channels: int,
        norm: str | None,
        dialect: Dialect,
        *,
        slope: float,
        skip_slope: float | None = None,
        dropout: float = 0.0,
        layer: int = 0,
        bias: bool = False,
    ):
        super().__init__()
        self.norm = norm
        self.config = NormActConfig(
            norm=norm is not None,
            eps=dialect.eps,
            momentum=dialect.momentum,
            unbiased=dialect.unbiased,
            slope=slope,
            skip_slope=skip_slope,
            dropout=dropout,
            layer=layer,
        )
        affine = norm == "batch"
        self.weight = nn.Parameter(1 + dialect.gamma_std * torch.randn(channels)) if affine else None
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
    """A convolution and its epilogue. Normalised convolutions have a bias with instance norm only."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, epilogue: Epilogue):
        super().__init__()
        self.conv = conv
        self.epilogue = epilogue

    def forward(self, x: Tensor, *memory: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        return self.epilogue(self.convolve(x), *memory)

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


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), biases zero (Isola et al., section 6.2; both references)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class _Join(torch.autograd.Function):
    """Two tensors that already lie side by side in ``buffer``, as one tensor: torch.cat without the copy."""

    @staticmethod
    def forward(ctx, first, second, buffer_holder):
        ctx.split = first.shape[1]
        return buffer_holder[0].detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, : ctx.split], gradient[:, ctx.split :], None


class UNetGenerator(nn.Module):
    """U-Net from (N, in_channels, H, W) to (N, out_channels, H, W), both in [-1, 1].

    H and W are multiples of 2 ** num_downs (8 is junyanz's unet_256 and the tutorial's network, 7 his
    unet_128). ``ngf`` is the width of the first layer; ``norm`` is "batch" or "instance"; ``dropout`` is the
    probability in the decoder blocks that have dropout. In training mode statistics are the batch's and
    dropout is on, which is also how both references generate images; in evaluation mode neither.

    ``rng`` holds (seed, step) of the dropout masks as int64; every forward pass in training mode uses one
    step, so the next one draws new masks, also when it is replayed from a captured graph.
    """

    def __init__(
        self,
        preset: str = "tutorial",
        in_channels: int = 3,
        out_channels: int = 3,
        ngf: int = 64,
        num_downs: int = 8,
        norm: str = "batch",
        dropout: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        dialect = _dialect(preset)
        if num_downs < MIN_DOWNS:
            raise UserError(f"num_downs is {num_downs}; the U-Net has at least {MIN_DOWNS} downsamplings")
        if norm not in ("batch", "instance"):
            raise UserError(f"norm is {norm!r}; choose batch or instance")
        self.preset, self.norm, self.num_downs, self.skip_first = preset, norm, num_downs, dialect.skip_first
        self.in_channels, self.out_channels, self.ngf, self.dropout = in_channels, out_channels, ngf, dropout
        widths = [ngf * min(2**i, 8) for i in range(num_downs)]
        use_bias = norm == "instance"

        self.downs = nn.ModuleList()
        for i, width in enumerate(widths):
            innermost = i == num_downs - 1
            normed = i > 0 and (dialect.bottleneck_norm or not innermost)
            conv = nn.Conv2d(
                widths[i - 1] if i else in_channels, width, KERNEL_SIZE, 2, 1, bias=use_bias and normed
            )
            epilogue = Epilogue(
                width,
                norm if normed else None,
                dialect,
                slope=dialect.bottleneck_slope if innermost else dialect.encoder_slope,
                skip_slope=None if innermost else dialect.skip_slope,
                bias=use_bias,
            )
            self.downs.append(Block(conv, epilogue))

        # The tutorial drops in its three innermost blocks; junyanz in all of width 8 * ngf but the innermost.
        dropping = range(3) if dialect.innermost_dropout else range(1, num_downs - 4)
        self.ups = nn.ModuleList()
        for i, width in enumerate(reversed(widths[:-1])):
            conv = nn.ConvTranspose2d(
                widths[-1] if i == 0 else 2 * widths[-1 - i], width, KERNEL_SIZE, 2, 1, bias=use_bias
            )
            epilogue = Epilogue(
                width, norm, dialect, slope=0.0, dropout=dropout if i in dropping else 0.0, layer=i
            )
            self.ups.append(Block(conv, epilogue))
        self.last = nn.ConvTranspose2d(2 * ngf, out_channels, KERNEL_SIZE, 2, 1)
        self.register_buffer("rng", torch.tensor([seed, 0]), persistent=False)
        _initialise(self)
        self.to(memory_format=torch.channels_last)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError unless an image of this size goes through all the downsamplings."""
        multiple = 2**self.num_downs
        if height % multiple or width % multiple or not height or not width:
            raise UserError(
                f"image size {width}x{height} does not fit this U-Net: with {self.num_downs} downsamplings "
                f"both sides must be multiples of {multiple}"
            )

    def before_tanh(self, source: Tensor) -> Tensor:
        """The last transposed convolution's output without its bias: (N, out_channels, H, W)."""
        self.check_size(*source.shape[-2:])
        rng = None
        if self.training and self.dropout:
            rng = self.rng.clone()  # the backward pass of this forward needs the counter as it was
            self.rng[1:].add_(1)

        x = source.contiguous(memory_format=torch.channels_last)
        skips = []
        for down in self.downs[:-1]:
            pre = down.convolve(x)
            n, c, h, w = pre.shape
            joined = torch.empty(
                (n, 2 * c, h, w), dtype=pre.dtype, device=pre.device, memory_format=torch.channels_last
            )
            first, second = joined[:, :c], joined[:, c:]
            skip_out, up_out = (first, second) if self.skip_first else (second, first)
            x, skip = down.epilogue(pre, None, None, skip_out)
            skips.append((joined, skip, up_out))
        x = self._innermost(x)
        for up, (joined, skip, up_out) in zip(self.ups, reversed(skips), strict=True):
            y = up(x, rng, up_out)
            x = _Join.apply(*((skip, y) if self.skip_first else (y, skip)), (joined,))
        return conv_transpose2d(x, self.last.weight)

    def _innermost(self, x: Tensor) -> Tensor:
        """At batch 1 the tutorial's bottleneck is the constant LeakyReLU(beta).

        The convolution below it runs for the running statistics only. Its weight has no gradient then,
        rather than one of zeros for Adam to carry through four million numbers that stay as they are.
        """
        down = self.downs[-1]
        n, _, h, w = x.shape
        learns = not down.epilogue.ignores(n, h // 2, w // 2)
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            pre = down.convolve(x)
        return down.epilogue(pre)

    def forward(self, source: Tensor) -> Tensor:
        """Translate ``source`` (N, in_channels, H, W); raises UserError for a size that does not fit."""
        pre = self.before_tanh(source)
        bias = self.last.bias.to(compute_dtype(pre.dtype)).view(1, -1, 1, 1)
        return torch.tanh(pre + bias).to(pre.dtype)


class PatchDiscriminator(nn.Module):
    """PatchGAN from (N, in_channels, H, W), input and output image stacked, to logits (N, 1, h, w).

    ``n_layers=3`` is the 70x70 receptive field of the paper: 30x30 logits for 256x256. ``ndf`` is the width
    of the first layer; ``norm`` is "batch" or "instance". Logits are float32 in a 16-bit network.
    """

    def __init__(
        self,
        preset: str = "tutorial",
        in_channels: int = 6,
        ndf: int = 64,
        n_layers: int = 3,
        norm: str = "batch",
    ):
        super().__init__()
        dialect = _dialect(preset)
        if norm not in ("batch", "instance"):
            raise UserError(f"norm is {norm!r}; choose batch or instance")
        if n_layers < 1:
            raise UserError(f"n_layers is {n_layers}; the discriminator has at least 1 strided layer")
        self.preset, self.norm, self.n_layers = preset, norm, n_layers
        self.in_channels, self.ndf = in_channels, ndf
        use_bias = norm == "instance"
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        self.blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            conv = nn.Conv2d(
                widths[i - 1] if i else in_channels,
                width,
                KERNEL_SIZE,
                stride=1 if i == n_layers else 2,
                padding=1,
                bias=use_bias and i > 0,
            )
            epilogue = Epilogue(
                width,
                norm if i else None,
                dialect,
                slope=dialect.encoder_slope,
                bias=i == 0 and dialect.discriminator_first_bias,
            )
            self.blocks.append(Block(conv, epilogue))
        self.last = nn.Conv2d(widths[-1], 1, KERNEL_SIZE, 1, 1)
        _initialise(self)
        self.to(memory_format=torch.channels_last)

    def with_bias(self, logits: Tensor) -> Tensor:
        """What the last convolution makes without its bias, as logits."""
        dtype = compute_dtype(logits.dtype)
        return logits.to(dtype) + self.last.bias.to(dtype)

    def forward(self, pair: Tensor) -> Tensor:
        """Logits of ``pair``, all of it one batch for the normalisation."""
        x = pair.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        return self.with_bias(conv2d(x, self.last.weight, stride=1))

    def shared_forward(
        self, pairs: Tensor, fake: Tensor, fake_rows: slice, *, parts: int = 2, train: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One forward pass with two ways back: for the discriminator's weights and for the fake image.

        pairs: (N, in_channels, H, W), ``parts`` batches side by side, each normalised by itself. fake: the
        generated image, whose pixels already lie in the last channels of ``pairs[fake_rows]``.

        Returns the logits of all pairs, whose gradient reaches the weights only (nothing at all if
        ``train`` is False), and the logits of the fake ones, whose gradient reaches ``fake`` only. The two
        losses of a simultaneous update so share one forward pass, as on the tutorial's two tapes.
        """
        parameters = tuple(self.parameters()) if train else ()
        return _SharedForward.apply(self, pairs, fake, fake_rows, parts, *parameters)


class _LayerContext(NamedTuple):
    """What the way back needs of one block of the discriminator."""

    block: Block
    config: NormActConfig
    kept: ConvContext
    pre: Tensor
    mean: Tensor | None
    rstd: Tensor | None


class _SharedForward(torch.autograd.Function):
    """``PatchDiscriminator.shared_forward``: the chain is short enough to be differentiated by hand."""

    @staticmethod
    def forward(ctx, discriminator, pairs, fake, fake_rows, parts, *parameters):
        layers, x = [], pairs
        for block in discriminator.blocks:
            conv, epilogue = block.conv, block.epilogue
            config = epilogue.configured(pairs.shape[0], parts)
            pre, kept = conv2d_forward(x, conv.weight, conv.bias, conv.stride[0])
            x, _, mean, rstd = norm_act_forward(
                pre, epilogue.weight, epilogue.bias, epilogue.running_mean, epilogue.running_var, None, config
            )
            layers.append(_LayerContext(block, config, kept, pre, mean, rstd))
        logits, ctx.last = conv2d_forward(x, discriminator.last.weight, None, 1)
        ctx.discriminator, ctx.layers = discriminator, layers
        ctx.fake_rows, ctx.fake_channels = fake_rows, fake.shape[1]
        ctx.type = logits.dtype
        ctx.set_materialize_grads(False)
        logits = discriminator.with_bias(logits)
        return logits, logits[fake_rows].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits, dfake_logits):
        by_weights = [] if dlogits is None else _SharedForward._weight_gradients(ctx, dlogits)
        dfake = None
        if dfake_logits is not None and ctx.needs_input_grad[2]:
            dfake = _SharedForward._image_gradient(ctx, dfake_logits)
        absent = [None] * (len(ctx.needs_input_grad) - 5 - len(by_weights))
        return None, None, dfake, None, None, *by_weights, *absent

    @staticmethod
    def _weight_gradients(ctx, dlogits):
        """In the order of ``discriminator.parameters()``."""
        last = ctx.discriminator.last
        gradients = {last.bias: dlogits.sum((0, 2, 3)).to(last.bias.dtype)}
        dy, gradients[last.weight], _ = conv2d_backward(dlogits.to(ctx.type), ctx.last)
        for layer in reversed(ctx.layers):
            conv, epilogue = layer.block.conv, layer.block.epilogue
            dpre, gradients[epilogue.weight], gradients[epilogue.bias] = norm_act_backward(
                dy,
                None,
                layer.pre,
                epilogue.weight,
                epilogue.bias,
                layer.mean,
                layer.rstd,
                None,
                layer.config,
            )
            dy, gradients[conv.weight], gradients[conv.bias] = conv2d_backward(
                dpre, layer.kept, needs_x=layer is not ctx.layers[0], needs_bias=conv.bias is not None
            )
        return [gradients[parameter] for parameter in ctx.discriminator.parameters()]

    @staticmethod
    def _image_gradient(ctx, dfake_logits):
        """Gradient of the fake image: the fake rows alone, backwards through their own statistics."""
        rows = ctx.fake_rows
        dy, _, _ = conv2d_backward(dfake_logits.to(ctx.type), ctx.last, needs_weight=False, rows=rows)
        for layer in reversed(ctx.layers):
            epilogue, config, pre = layer.block.epilogue, layer.config, layer.pre
            mean, rstd = layer.mean, layer.rstd
            if mean is not None:
                per_group = pre.shape[0] // config.groups
                groups = slice(*(bound // per_group for bound in rows.indices(pre.shape[0])[:2]))
                mean, rstd = mean[groups], rstd[groups]
                config = config._replace(groups=mean.shape[0])
            dpre, _, _ = norm_act_backward(
                dy, None, pre[rows], epilogue.weight, epilogue.bias, mean, rstd, None, config, False
            )
            dy, _, _ = conv2d_backward(dpre, layer.kept, needs_weight=False, rows=rows)
        return dy[:, -ctx.fake_channels :]


def build_networks(config: TrainConfig, device: torch.device) -> tuple[UNetGenerator, PatchDiscriminator]:
    """Freshly initialised networks, the same for the same seed on every device."""
    torch.manual_seed(config.seed)
    generator = UNetGenerator(
        config.preset,
        ngf=config.ngf,
        num_downs=config.num_downs,
        norm=config.norm,
        dropout=0.0 if config.no_dropout else 0.5,
        seed=config.seed,
    )
    discriminator = PatchDiscriminator(
        config.preset, ndf=config.ndf, n_layers=config.n_layers_D, norm=config.norm
    )
    return generator.to(device), discriminator.to(device)

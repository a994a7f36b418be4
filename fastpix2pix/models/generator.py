"""The U-Net generator of pix2pix (Isola et al., 2017, section 3.2.1)."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastpix2pix.errors import UserError
from fastpix2pix.kernels.cpu_conv import conv_transpose2d
from fastpix2pix.kernels.deep_conv import Passage
from fastpix2pix.kernels.reference import compute_dtype
from fastpix2pix.models.blocks import KERNEL_SIZE, Block, Epilogue, Join, initialise
from fastpix2pix.presets import find_preset

MIN_DOWNS = 5


def size_multiple(num_downs: int) -> int:
    """Both sides of an image must be multiples of this to go through ``num_downs`` downsamplings."""
    return 2**num_downs


class UNetGenerator(nn.Module):
    """U-Net from (N, in_channels, H, W) to (N, out_channels, H, W), both in [-1, 1].

    H and W are multiples of 2 ** num_downs (8 is junyanz's unet_256 and the tutorial's network, 7 his
    unet_128). ``ngf`` is the width of the first layer; ``norm`` is "batch" or "instance"; ``dropout`` is the
    probability in the decoder blocks that have dropout. In training mode statistics are the batch's and
    dropout is on, which is also how both references generate images; in evaluation mode neither.

    ``rng`` holds (seed, step) of the dropout masks as int64; every forward pass in training mode uses one
    step, so the next one draws new masks, also when it is replayed from a captured graph.
    """

    rng: Tensor

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
        architecture = find_preset(preset).architecture
        if num_downs < MIN_DOWNS:
            raise UserError(f"num_downs is {num_downs}; the U-Net has at least {MIN_DOWNS} downsamplings")
        if norm not in ("batch", "instance"):
            raise UserError(f"norm is {norm!r}; choose batch or instance")
        self.preset, self.norm, self.num_downs = preset, norm, num_downs
        self.skip_first = architecture.skip_first
        self.in_channels, self.out_channels, self.ngf, self.dropout = in_channels, out_channels, ngf, dropout
        widths = [ngf * min(2**i, 8) for i in range(num_downs)]
        use_bias = norm == "instance"

        self.downs = nn.ModuleList()
        for i, width in enumerate(widths):
            innermost = i == num_downs - 1
            normed = i > 0 and (architecture.bottleneck_norm or not innermost)
            conv = nn.Conv2d(
                widths[i - 1] if i else in_channels, width, KERNEL_SIZE, 2, 1, bias=use_bias and normed
            )
            epilogue = Epilogue(
                width,
                norm if normed else None,
                architecture,
                slope=architecture.bottleneck_slope if innermost else architecture.encoder_slope,
                skip_slope=None if innermost else architecture.skip_slope,
                bias=use_bias,
            )
            self.downs.append(Block(conv, epilogue))

        # The tutorial drops in its three innermost blocks; junyanz in all of width 8 * ngf but the innermost.
        dropping = range(3) if architecture.innermost_dropout else range(1, num_downs - 4)
        self.ups = nn.ModuleList()
        for i, width in enumerate(reversed(widths[:-1])):
            transposed = nn.ConvTranspose2d(
                widths[-1] if i == 0 else 2 * widths[-1 - i], width, KERNEL_SIZE, 2, 1, bias=use_bias
            )
            epilogue = Epilogue(
                width, norm, architecture, slope=0.0, dropout=dropout if i in dropping else 0.0, layer=i
            )
            self.ups.append(Block(transposed, epilogue))
        self.last = nn.ConvTranspose2d(2 * ngf, out_channels, KERNEL_SIZE, 2, 1)
        self.register_buffer("rng", torch.tensor([seed, 0]), persistent=False)
        initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among torch's overloads

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError unless an image of this size goes through all the downsamplings."""
        multiple = size_multiple(self.num_downs)
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
        passage: Passage | None = None
        for down in self.downs[:-1]:
            # A deep block is one op. Elsewhere autocast may give the convolution's output another type.
            pre = None if down.is_deep(x) else down.convolve(x)
            n, c, h, w = down.out_shape(x)
            dtype = x.dtype if pre is None else pre.dtype
            joined = torch.empty(
                (n, 2 * c, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last
            )
            first, second = joined[:, :c], joined[:, c:]
            skip_out, up_out = (first, second) if self.skip_first else (second, first)
            before, passage, of_joined = passage, down.passage(x), down.passage(x)
            if pre is None:
                x, skip = down(x, skip_out=skip_out, before=before, after=passage, skip_after=of_joined)
            else:
                x, skip = down.epilogue(pre, None, None, skip_out)
            skips.append((joined, skip, up_out, of_joined))
        before, passage = passage, self.downs[-1].passage(x)
        x = self._innermost(x, before, passage)
        for up, (joined, skip, up_out, of_joined) in zip(self.ups, reversed(skips), strict=True):
            before, passage = passage, of_joined if up.is_deep(x) else None
            y = up(x, rng, up_out, before=before, after=passage)
            x = Join.apply(*((skip, y) if self.skip_first else (y, skip)), (joined,))
        return conv_transpose2d(x, self.last.weight)

    def _innermost(self, x: Tensor, before: Passage | None, after: Passage | None) -> Tensor:
        """At batch 1 the tutorial's bottleneck is the constant LeakyReLU(beta).

        The convolution below it runs for the running statistics only. Its weight has no gradient then,
        rather than one of zeros for Adam to carry through four million numbers that stay as they are.
        """
        down = self.downs[-1]
        n, _, h, w = x.shape
        learns = not down.epilogue.ignores(n, h // 2, w // 2)
        return down(x, train_conv=learns, before=before, after=after)

    def forward(self, source: Tensor) -> Tensor:
        """Translate ``source`` (N, in_channels, H, W); raises UserError for a size that does not fit."""
        pre = self.before_tanh(source)
        bias = self.last.bias.to(compute_dtype(pre.dtype)).view(1, -1, 1, 1)
        return torch.tanh(pre + bias).to(pre.dtype)

    def leave_out_dropout(self) -> None:
        """Generate without dropout from now on, in training mode too."""
        self.dropout = 0.0
        for up in self.ups:
            up.epilogue.config = up.epilogue.config._replace(dropout=0.0)

    def fresh(self) -> "UNetGenerator":
        """Another generator of this architecture, with newly drawn weights, on the CPU."""
        return UNetGenerator(
            self.preset,
            self.in_channels,
            self.out_channels,
            self.ngf,
            self.num_downs,
            self.norm,
            self.dropout,
            seed=int(self.rng[0]),
        )


@torch.no_grad()
def generate_without_trace(generator: nn.Module, source: Tensor) -> Tensor:
    """The generator's image for ``source``, leaving its running statistics and dropout counter as they are.

    In training mode, as both references generate: statistics of this very batch, dropout on.
    """
    buffers = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    return functional_call(generator, buffers, (source,))

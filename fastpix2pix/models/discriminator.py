"""The PatchGAN discriminator of pix2pix (Isola et al., 2017, section 3.2.2), and its pass for both losses."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastpix2pix.errors import UserError
from fastpix2pix.kernels.cpu_conv import ConvContext, conv2d, conv2d_backward, conv2d_forward
from fastpix2pix.kernels.norm_act import norm_act_backward, norm_act_forward
from fastpix2pix.kernels.reference import NormActConfig, compute_dtype
from fastpix2pix.models.blocks import KERNEL_SIZE, Block, Epilogue, initialise
from fastpix2pix.presets import find_preset


def min_size(n_layers: int) -> int:
    """Pixels a side that ``n_layers`` strided layers need to have logits: two are left for the last ones."""
    return 2 * 2 ** (n_layers + 1)


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
        architecture = find_preset(preset).architecture
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
                architecture,
                slope=architecture.encoder_slope,
                bias=i == 0 and architecture.discriminator_first_bias,
            )
            self.blocks.append(Block(conv, epilogue))
        self.last = nn.Conv2d(widths[-1], 1, KERNEL_SIZE, 1, 1)
        initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among torch's overloads

    def with_bias(self, logits: Tensor) -> Tensor:
        """What the last convolution makes without its bias, as logits."""
        # One operator widens 16-bit logits and adds.
        return logits + self.last.bias.to(compute_dtype(logits.dtype))

    def forward(self, pair: Tensor) -> Tensor:
        """Logits of ``pair``, all of it one batch for the normalisation."""
        x = pair.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        return self.with_bias(conv2d(x, self.last.weight, stride=1))

    def shared_forward(
        self, pairs: Tensor, fake: Tensor, fake_rows: slice, *, parts: int = 2, train: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One forward pass with two independent backward paths, to the weights and to the fake image.

        pairs: (N, in_channels, H, W), ``parts`` batches side by side, each normalised by itself. fake: the
        generated image, whose pixels already lie in the last channels of ``pairs[fake_rows]``.

        Returns the logits of all pairs, whose gradient reaches the weights only (nothing at all if
        ``train`` is False), and the logits of the fake ones, whose gradient reaches ``fake`` only, both
        without the last bias: the loss adds it, and has its gradient. The two losses of a simultaneous update
        so share one forward pass, as under the tutorial's two gradient tapes.
        """
        parameters = tuple(self.parameters()) if train else ()
        return _SharedForward.apply(self, pairs, fake, fake_rows, parts, *parameters)

    def fresh(self) -> "PatchDiscriminator":
        """Another discriminator of this architecture, with newly drawn weights, on the CPU."""
        return PatchDiscriminator(self.preset, self.in_channels, self.ndf, self.n_layers, self.norm)


class _LayerContext(NamedTuple):
    """State of one block of the discriminator saved for backward."""

    block: Block
    config: NormActConfig
    conv: ConvContext
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
            pre, saved = conv2d_forward(x, conv.weight, conv.bias, conv.stride[0])
            x, _, mean, rstd = norm_act_forward(
                pre, epilogue.weight, epilogue.bias, epilogue.running_mean, epilogue.running_var, None, config
            )
            layers.append(_LayerContext(block, config, saved, pre, mean, rstd))
        logits, ctx.last = conv2d_forward(x, discriminator.last.weight, None, 1)
        ctx.discriminator, ctx.layers = discriminator, layers
        ctx.fake_rows, ctx.fake_channels = fake_rows, fake.shape[1]
        ctx.set_materialize_grads(False)
        # Detached: the same memory, and an output of its own to autograd.
        return logits, logits[fake_rows].detach()

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
        gradients: dict[nn.Parameter | None, Tensor | None] = {last.bias: None}
        dy, gradients[last.weight], _ = conv2d_backward(dlogits, ctx.last)
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
                dpre, layer.conv, needs_x=layer is not ctx.layers[0], needs_bias=conv.bias is not None
            )
        return [gradients[parameter] for parameter in ctx.discriminator.parameters()]

    @staticmethod
    def _image_gradient(ctx, dfake_logits):
        """Gradient of the fake image: the fake rows alone, backwards through their own statistics."""
        rows = ctx.fake_rows
        dy, _, _ = conv2d_backward(dfake_logits, ctx.last, needs_weight=False, rows=rows)
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
            dy, _, _ = conv2d_backward(dpre, layer.conv, needs_weight=False, rows=rows)
        return dy[:, -ctx.fake_channels :]

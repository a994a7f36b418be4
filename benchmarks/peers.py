"""What people run today: pix2pix as it is usually written in PyTorch, plain, tuned and compiled.

The networks and the update are op for op those of the public implementations: the TensorFlow tutorial
carried over to PyTorch, and pytorch-CycleGAN-and-pix2pix. They are written here so that they can be timed,
and counted, in the same run as ours and from the same weights; and because they share no line with
``fastpix2pix``, equal losses are a check of both.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workload import Workload


class OnePixelBatchNorm(nn.BatchNorm2d):
    """Batch norm of the tutorial's 1x1 bottleneck, where ``nn.BatchNorm2d`` refuses a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, x.is_cuda)


class Block(nn.Module):
    """Convolution, norm, dropout, activation: a module each, as in the public code."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, dropout: float, activation: nn.Module):
        super().__init__()
        self.conv = conv
        self.norm = nn.Identity() if norm is None else norm
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dropout(self.norm(self.conv(x))))


def _tutorial_norm(channels: int, one_pixel: bool = False) -> nn.BatchNorm2d:
    return (OnePixelBatchNorm if one_pixel else nn.BatchNorm2d)(channels, eps=1e-3, momentum=0.01)


def _downs(
    widths: Sequence[int], norms: Iterable[nn.Module | None], activation: Callable[[], nn.Module]
) -> nn.ModuleList:
    """The U-Net's halvings, from three channels."""
    return nn.ModuleList(
        Block(nn.Conv2d(below, width, 4, 2, 1, bias=False), norm, 0.0, activation())
        for below, width, norm in zip((3, *widths[:-1]), widths, norms, strict=True)
    )


def _ups(
    widths: Sequence[int],
    norm: Callable[[int], nn.Module],
    dropouts: Iterable[float],
    activation: Callable[[], nn.Module],
) -> nn.ModuleList:
    """The U-Net's doublings but the last; what goes into all but the first carries a skip."""
    above = (widths[-1], *(2 * width for width in reversed(widths[1:-1])))
    return nn.ModuleList(
        Block(nn.ConvTranspose2d(before, width, 4, 2, 1, bias=False), norm(width), dropout, activation())
        for before, width, dropout in zip(above, reversed(widths[:-1]), dropouts, strict=True)
    )


class TutorialGenerator(nn.Module):
    """The tutorial's U-Net: LeakyReLU before the skip, [up, skip], dropout in the three innermost blocks."""

    def __init__(self, num_downs: int = 8, ngf: int = 64, dropout: float = 0.5):
        super().__init__()
        widths = [ngf * min(2**i, 8) for i in range(num_downs)]
        norms = [_tutorial_norm(width) for width in widths[1:-1]]
        norms = [None, *norms, _tutorial_norm(widths[-1], one_pixel=True)]
        dropouts = [dropout if i < 3 else 0.0 for i in range(num_downs - 1)]
        self.downs = _downs(widths, norms, partial(nn.LeakyReLU, 0.3))
        self.ups = _ups(widths, _tutorial_norm, dropouts, nn.ReLU)
        self.last = nn.ConvTranspose2d(2 * ngf, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
        for up, skip in zip(self.ups, reversed(skips[:-1]), strict=True):
            x = torch.cat([up(x), skip], 1)
        return torch.tanh(self.last(x))


class JunyanzGenerator(nn.Module):
    """junyanz's unet: the activation comes before the convolution, in place, so the skip is ReLU(x)."""

    def __init__(self, num_downs: int = 8, ngf: int = 64, dropout: float = 0.5):
        super().__init__()
        widths = [ngf * min(2**i, 8) for i in range(num_downs)]
        norms = [None, *map(nn.BatchNorm2d, widths[1:-1]), None]
        dropouts = [dropout if 0 < i < num_downs - 4 else 0.0 for i in range(num_downs - 1)]
        self.downs = _downs(widths, norms, nn.Identity)
        self.ups = _ups(widths, nn.BatchNorm2d, dropouts, nn.Identity)
        self.last = nn.ConvTranspose2d(2 * ngf, 3, 4, 2, 1)
        self.leaky, self.relu = nn.LeakyReLU(0.2, True), nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, down in enumerate(self.downs):
            x = down(self.leaky(x) if i else x)
            skips.append(x)
        for up, skip in zip(self.ups, reversed(skips[:-1]), strict=True):
            x = torch.cat([skip, up(self.relu(x))], 1)
        return torch.tanh(self.last(self.relu(x)))


class PatchGAN(nn.Module):
    """Both discriminators: they differ in the norm, the slope and the bias of the first convolution."""

    def __init__(
        self,
        ndf: int,
        n_layers: int,
        *,
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module],
        first_bias: bool,
    ):
        super().__init__()
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        self.blocks = nn.ModuleList(
            Block(
                nn.Conv2d(before, width, 4, 1 if i == n_layers else 2, 1, bias=first_bias and i == 0),
                norm(width) if i else None,
                0.0,
                activation(),
            )
            for i, (before, width) in enumerate(zip((6, *widths[:-1]), widths, strict=True))
        )
        self.last = nn.Conv2d(widths[-1], 1, 4, 1, 1)

    def forward(self, pair: Tensor) -> Tensor:
        for block in self.blocks:
            pair = block(pair)
        return self.last(pair)


NETWORKS = {
    "tutorial": (
        TutorialGenerator,
        partial(PatchGAN, norm=_tutorial_norm, activation=partial(nn.LeakyReLU, 0.3), first_bias=False),
    ),
    "junyanz": (
        JunyanzGenerator,
        partial(PatchGAN, norm=nn.BatchNorm2d, activation=partial(nn.LeakyReLU, 0.2, True), first_bias=True),
    ),
}


def load_ours(peer: nn.Module, ours: nn.Module) -> None:
    """Copy the weights and running statistics of one of our networks into the peer's."""
    names = set(peer.state_dict())
    state = {}
    for name, value in ours.state_dict().items():
        theirs = name.replace("epilogue", "norm")
        # What our epilogue adds where there is no norm is the convolution's bias.
        state[theirs if theirs in names else theirs.replace("norm", "conv")] = value.float()
    missing, unexpected = peer.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"the weights do not fit: {unexpected} are too many, {missing} are missing")


@dataclass(frozen=True)
class Tuning:
    """What people switch on to make the same code faster.

    channels_last: memory format of weights and images. autocast: 16-bit type of the forward pass, or None;
    float16 brings a GradScaler. adam: what ``torch.optim.Adam`` is given beside its hyperparameters.
    compiled: both networks by ``torch.compile`` with ``compile_options``, where that works.
    """

    channels_last: bool = False
    autocast: torch.dtype | None = None
    adam: tuple[tuple[str, bool], ...] = ()
    compiled: bool = False


FUSED = (("fused", True),)
PLAIN = Tuning()


def compile_options() -> dict[str, Any]:
    """Those of ``torch.compile(mode="max-autotune")``, CUDA graphs among them, and Triton templates for the
    gradients of convolutions too: torch 2.13 has them, and tries them on AMD's GPUs only unless told to.
    """
    from torch._inductor import config, list_mode_options

    gradients = "max_autotune_conv_bwd_weight_backends", "max_autotune_conv_bwd_input_backends"
    options = list_mode_options("max-autotune")
    return options | {name: "ATEN,TRITON" for name in gradients if hasattr(config, name)}


def tuned(device: torch.device | str) -> Tuning:
    """The usual advice for ``device``: on a CPU without 16-bit arithmetic, autocast is left out."""
    device = torch.device(device)
    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return Tuning(channels_last=True, autocast=torch.bfloat16 if bf16 else torch.float16, adam=FUSED)
    # The vendors' names for 16-bit arithmetic in hardware; without it bf16 is emulated, many times slower.
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Tuning(channels_last=True, autocast=torch.bfloat16 if bf16 else None, adam=FUSED)


class PeerStep:
    """One update of both networks: ``losses = step(source, target)``, named as ``training.losses.Losses``.

    ``workload.preset`` chooses networks and rule: the tutorial's simultaneous update, or junyanz's
    alternating one. source, target: (N, 3, H, W) float32 in [-1, 1]. Everything is computed as the public
    code does: two passes through the discriminator, ``torch.cat`` for pairs and skips, a target tensor for
    the cross-entropy.
    """

    def __init__(self, workload: Workload, tuning: Tuning = PLAIN, device: torch.device | str = "cpu"):
        generator, discriminator = NETWORKS[workload.preset]
        networks, options = workload.network_options(), workload.step_options()
        dropout = 0.0 if networks.no_dropout else 0.5
        self.generator = generator(networks.num_downs, networks.ngf, dropout).to(device)
        self.discriminator = discriminator(networks.ndf, networks.n_layers_D).to(device)
        self.tuning, self.device = tuning, torch.device(device)
        if tuning.channels_last:
            self.generator.to(memory_format=torch.channels_last)
            self.discriminator.to(memory_format=torch.channels_last)
        rule = options.rules.update
        adam = {"lr": options.lr, "betas": (options.beta1, 0.999), "eps": rule.adam_eps, **dict(tuning.adam)}
        self.gen_optimizer = torch.optim.Adam(self.generator.parameters(), **adam)
        self.disc_optimizer = torch.optim.Adam(self.discriminator.parameters(), **adam)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=tuning.autocast == torch.float16)
        self.bce, self.l1 = nn.BCEWithLogitsLoss(), nn.L1Loss()
        self.lambda_l1, self.rule, self.steps = options.lambda_L1, rule, 0
        self.run_generator, self.run_discriminator = self.generator, self.discriminator
        if tuning.compiled:
            # The tutorial's rule goes back through the same forward pass twice.
            torch._functorch.config.donated_buffer = False
            self.run_generator = torch.compile(self.generator, options=compile_options())
            self.run_discriminator = torch.compile(self.discriminator, options=compile_options())

    def load_ours(self, generator: nn.Module, discriminator: nn.Module) -> "PeerStep":
        load_ours(self.generator, generator)
        load_ours(self.discriminator, discriminator)
        return self

    def __call__(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        layout = torch.channels_last if self.tuning.channels_last else torch.contiguous_format
        source, target = source.contiguous(memory_format=layout), target.contiguous(memory_format=layout)
        self.steps += 1
        if self.rule.keras_eps:  # Keras's place of epsilon, in torch's form: it differs from step to step
            for optimizer in (self.gen_optimizer, self.disc_optimizer):
                optimizer.param_groups[0]["eps"] = self.rule.adam_eps / (1 - 0.999**self.steps) ** 0.5
        update = self._simultaneous if self.rule.simultaneous else self._alternating
        if not self.tuning.compiled:
            return update(source, target)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return update(source, target)
        except Exception as error:  # whatever the compiler raises
            if self.steps > 1:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"torch.compile gave up, so this runs eagerly: {reason}", flush=True)
            self.run_generator, self.run_discriminator = self.generator, self.discriminator
            return update(source, target)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.tuning.autocast, enabled=self.tuning.autocast is not None):
            yield

    def _against(self, logits: Tensor, real: bool) -> Tensor:
        return self.bce(logits, torch.ones_like(logits) if real else torch.zeros_like(logits))

    def _simultaneous(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            fake = self.run_generator(source)
            real_logits = self.run_discriminator(torch.cat([source, target], 1))
            fake_logits = self.run_discriminator(torch.cat([source, fake], 1))
            gen_gan_loss, gen_l1_loss = self._against(fake_logits, True), self.l1(fake, target)
            gen_total_loss = gen_gan_loss + self.lambda_l1 * gen_l1_loss
            disc_real_loss, disc_fake_loss = (
                self._against(real_logits, True),
                self._against(fake_logits, False),
            )
            disc_loss = disc_real_loss + disc_fake_loss
        for loss, module, more in (
            (gen_total_loss, self.generator, True),
            (disc_loss, self.discriminator, False),
        ):
            parameters = list(module.parameters())
            gradients = torch.autograd.grad(
                self.scaler.scale(loss), parameters, retain_graph=more, allow_unused=True
            )
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        self.scaler.step(self.gen_optimizer)
        self.scaler.step(self.disc_optimizer)
        self.scaler.update()
        return _losses(gen_total_loss, gen_gan_loss, gen_l1_loss, disc_loss, disc_real_loss, disc_fake_loss)

    def _alternating(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            fake = self.run_generator(source)

        self.discriminator.requires_grad_(True)
        self.disc_optimizer.zero_grad()
        with self._autocast():
            fake_logits = self.run_discriminator(torch.cat([source, fake], 1).detach())
            disc_fake_loss = self._against(fake_logits, False)
            real_logits = self.run_discriminator(torch.cat([source, target], 1))
            disc_real_loss = self._against(real_logits, True)
            disc_loss = (disc_fake_loss + disc_real_loss) * 0.5
        self.scaler.scale(disc_loss).backward()
        self.scaler.step(self.disc_optimizer)

        self.discriminator.requires_grad_(False)
        self.gen_optimizer.zero_grad()
        with self._autocast():
            fake_logits = self.run_discriminator(torch.cat([source, fake], 1))
            gen_gan_loss, gen_l1_loss = self._against(fake_logits, True), self.l1(fake, target)
            gen_total_loss = gen_gan_loss + gen_l1_loss * self.lambda_l1
        self.scaler.scale(gen_total_loss).backward()
        self.scaler.step(self.gen_optimizer)
        self.scaler.update()
        return _losses(gen_total_loss, gen_gan_loss, gen_l1_loss, disc_loss, disc_real_loss, disc_fake_loss)


def _losses(*losses: Tensor) -> dict[str, Tensor]:
    names = ("gen_total_loss", "gen_gan_loss", "gen_l1_loss", "disc_loss", "disc_real_loss", "disc_fake_loss")
    return {name: loss.detach() for name, loss in zip(names, losses, strict=True)}

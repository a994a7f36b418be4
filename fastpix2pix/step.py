"""One GAN update as one plain function: forward passes, losses, backward passes, both Adams."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpix2pix.config import TrainConfig
from fastpix2pix.kernels.gan_loss import gan_loss, gan_target_loss
from fastpix2pix.kernels.pixel_loss import pixel_loss
from fastpix2pix.kernels.reference import compute_dtype
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.optim import MasterAdam


class Losses(NamedTuple):
    """Scalar tensors on the training device; it is reading a value that waits for the step.

    The first four are the TensorFlow tutorial's. disc_real_loss and disc_fake_loss are the discriminator's
    two terms before the preset's factor: log 2 = 0.69 each where it can't tell real from fake.
    """

    gen_total_loss: Tensor
    gen_gan_loss: Tensor
    gen_l1_loss: Tensor
    disc_loss: Tensor
    disc_real_loss: Tensor
    disc_fake_loss: Tensor


class TrainStep:
    """``losses = step(source, target)`` updates both networks once, by the rule of ``config.preset``.

    tutorial: both gradients are taken at the same weights, and one forward pass over the generated image
    serves both players. junyanz: the discriminator steps first, and the generator is judged by the
    discriminator after its step.

    source, target: (N, C, H, W) in [-1, 1], on the networks' device and in their type. ``fake`` is the last
    generated image, (N, C, H, W).

    ``generator`` and ``discriminator`` may be any modules: the first maps the source to an image, the
    second maps [source, image], stacked on channels, to logits. Our own two run fused: the generated image
    is written where the discriminator reads it, and real and fake go through it as one batch.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, config: TrainConfig):
        self.generator, self.discriminator = generator, discriminator
        self.recipe, self.gan_mode = config.recipe, config.gan_mode
        adam = {
            "lr": config.lr,
            "betas": (config.beta1, 0.999),
            "eps": self.recipe.adam_eps,
            "keras_eps": self.recipe.keras_eps,
        }
        self.gen_optimizer = MasterAdam(generator.parameters(), **adam)
        self.disc_optimizer = MasterAdam(discriminator.parameters(), **adam)
        weight = next(generator.parameters())
        self.lambda_l1 = torch.tensor(
            config.lambda_L1, dtype=compute_dtype(weight.dtype), device=weight.device
        )
        self.fake: Tensor | None = None
        fused = isinstance(generator, UNetGenerator) and isinstance(discriminator, PatchDiscriminator)
        if self.recipe.simultaneous:
            self._update = self._simultaneous if fused else self._simultaneous_modules
        else:
            self._update = self._alternating if fused else self._alternating_modules

    def __call__(self, source: Tensor, target: Tensor) -> Losses:
        losses = self._update(source, target)
        self.fake = self.fake.detach()
        return losses

    def set_lr(self, lr: float) -> None:
        """Learning rate of both players from the next step on."""
        for optimizer in (self.gen_optimizer, self.disc_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = lr

    # ------------------------------------------------------------------------------- our own networks

    def _pairs(self, source: Tensor, target: Tensor) -> tuple[Tensor, slice]:
        """The discriminator's input, [source, target] and [source, yet unwritten], and the latter's rows."""
        n, c, h, w = source.shape
        pairs = torch.empty(
            (2 * n, c + target.shape[1], h, w),
            dtype=source.dtype,
            device=source.device,
            memory_format=torch.channels_last,
        )
        first, second = slice(0, n), slice(n, 2 * n)
        real_rows, fake_rows = (first, second) if self.recipe.real_first else (second, first)
        pairs[first, :c] = source
        pairs[second, :c] = source
        pairs[real_rows, c:] = target
        return pairs, fake_rows

    def _generate(self, source: Tensor, target: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The generated image, written into the last channels of ``memory``, and its L1 loss."""
        out = memory[:, source.shape[1] :]
        return pixel_loss(self.generator.before_tanh(source), self.generator.last.bias, target, out=out)

    def _gan_loss(self, logits: Tensor):
        return gan_loss(
            logits.detach(),
            mode=self.gan_mode,
            real_first=self.recipe.real_first,
            disc_factor=self.recipe.disc_factor,
        )

    def _simultaneous(self, source: Tensor, target: Tensor) -> Losses:
        pairs, fake_rows = self._pairs(source, target)
        self.fake, l1 = self._generate(source, target, pairs[fake_rows])
        logits, fake_logits = self.discriminator.judge(pairs, self.fake, fake_rows)
        gan = self._gan_loss(logits)
        # The two ways back share no weight, so one backward pass gives each network its own gradient.
        torch.autograd.backward((logits, fake_logits, l1), (gan.disc_grad, gan.gen_grad, self.lambda_l1))
        _apply(self.gen_optimizer)
        _apply(self.disc_optimizer)
        disc, gen, real, fake = gan.losses.unbind()
        return self._losses(gen, l1, disc, real, fake)

    def _alternating(self, source: Tensor, target: Tensor) -> Losses:
        pairs, fake_rows = self._pairs(source, target)
        self.fake, l1 = self._generate(source, target, pairs[fake_rows])
        logits, _ = self.discriminator.judge(pairs, self.fake.detach(), fake_rows)
        gan = self._gan_loss(logits)
        logits.backward(gan.disc_grad)
        _apply(self.disc_optimizer)

        _, fake_logits = self.discriminator.judge(
            pairs[fake_rows], self.fake, slice(None), parts=1, train=False
        )
        gen, gen_grad = gan_target_loss(fake_logits.detach(), True, mode=self.gan_mode)
        torch.autograd.backward((fake_logits, l1), (gen_grad, self.lambda_l1))
        _apply(self.gen_optimizer)
        disc, _, real, fake = gan.losses.unbind()
        return self._losses(gen, l1, disc, real, fake)

    # ------------------------------------------------------------------------------------ any modules

    def _discriminate(self, source: Tensor, target: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the real and of the fake pair, in the preset's order of running statistics."""
        real_pair, fake_pair = torch.cat((source, target), 1), torch.cat((source, fake), 1)
        if self.recipe.real_first:
            return self.discriminator(real_pair), self.discriminator(fake_pair)
        fake_logits = self.discriminator(fake_pair)
        return self.discriminator(real_pair), fake_logits

    def _halves(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return torch.cat((real_logits, fake_logits) if self.recipe.real_first else (fake_logits, real_logits))

    def _simultaneous_modules(self, source: Tensor, target: Tensor) -> Losses:
        self.fake = self.generator(source)
        l1 = (target - self.fake).abs().mean()
        logits = self._halves(*self._discriminate(source, target, self.fake))
        fake_logits = logits.chunk(2)[1 if self.recipe.real_first else 0]
        gan = self._gan_loss(logits)
        disc_parameters, gen_parameters = _parameters(self.disc_optimizer), _parameters(self.gen_optimizer)
        logits.backward(gan.disc_grad, inputs=disc_parameters, retain_graph=True)
        torch.autograd.backward(
            (fake_logits, l1), (gan.gen_grad, self.lambda_l1), inputs=gen_parameters
        )
        _apply(self.gen_optimizer)
        _apply(self.disc_optimizer)
        disc, gen, real, fake = gan.losses.unbind()
        return self._losses(gen, l1, disc, real, fake)

    def _alternating_modules(self, source: Tensor, target: Tensor) -> Losses:
        self.fake = self.generator(source)
        l1 = (target - self.fake).abs().mean()
        logits = self._halves(*self._discriminate(source, target, self.fake.detach()))
        gan = self._gan_loss(logits)
        logits.backward(gan.disc_grad)
        _apply(self.disc_optimizer)

        fake_logits = self.discriminator(torch.cat((source, self.fake), 1))
        gen, gen_grad = gan_target_loss(fake_logits.detach(), True, mode=self.gan_mode)
        torch.autograd.backward(
            (fake_logits, l1), (gen_grad, self.lambda_l1), inputs=_parameters(self.gen_optimizer)
        )
        _apply(self.gen_optimizer)
        disc, _, real, fake = gan.losses.unbind()
        return self._losses(gen, l1, disc, real, fake)

    def _losses(self, gen: Tensor, l1: Tensor, disc: Tensor, real: Tensor, fake: Tensor) -> Losses:
        l1 = l1.detach()
        return Losses(gen + self.lambda_l1 * l1, gen, l1, disc, real, fake)


def _parameters(optimizer: MasterAdam) -> Sequence[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _apply(optimizer: MasterAdam) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

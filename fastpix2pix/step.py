"""One GAN update as one plain function: forward passes, losses, backward passes, both Adams."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpix2pix.config import TrainConfig
from fastpix2pix.kernels.adam import LARGE
from fastpix2pix.kernels.gan_loss import gan_loss, gan_target_loss
from fastpix2pix.kernels.reference import GanLoss, compute_dtype
from fastpix2pix.kernels.tanh_l1 import tanh_l1
from fastpix2pix.models import PatchDiscriminator, UNetGenerator, set_working_type
from fastpix2pix.optim import LossScale, MasterAdam
from fastpix2pix.precision import WORKING_TYPES


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


class LossRing:
    """The losses of the last ``capacity`` steps, on the training device, so that no step waits for the host.

    ``write`` is part of the step's body; it finds its row by a counter on the device.
    """

    def __init__(self, capacity: int, device: torch.device):
        self.rows = torch.zeros(capacity, len(Losses._fields), device=device)
        self.written = torch.zeros(1, dtype=torch.int64, device=device)

    def write(self, losses: Losses) -> None:
        row = torch.stack([loss.to(self.rows.dtype) for loss in losses]).unsqueeze(0)
        self.rows.index_copy_(0, self.written % len(self.rows), row)
        self.written.add_(1)

    def last(self, count: int, done: int) -> Tensor:
        """(count, 6) float32, oldest first: the newest ``count`` steps, when ``done`` have been written."""
        return self.rows[[i % len(self.rows) for i in range(done - count, done)]]


class TrainStep:
    """``losses = step(source, target)`` updates both networks once, by the rule of ``config.preset``.

    tutorial: both gradients are taken at the same weights, and one forward pass over the generated image
    serves both players. junyanz: the discriminator steps first, and the generator is judged by the
    discriminator after its step.

    source, target: (N, C, H, W) in [-1, 1], on the networks' device and in their type. The losses are views
    of ``ring``, which the ``config.print_freq``-th next step overwrites. ``fake`` is the last generated
    image, (N, C, H, W).

    ``generator`` and ``discriminator`` may be any modules: the first maps the source to an image, the
    second maps [source, image], stacked on channels, to logits. Our own two run fused: the generated image
    is written where the discriminator reads it, real and fake go through it as one batch, and a large
    weight is updated as soon as its gradient is there, while that is still in the cache.

    ``config.precision`` bf16 or fp16 converts our own networks' convolutions; the optimizers keep the
    float32 weights they came with as masters. Weights in float16 get a dynamic ``loss_scale``.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, config: TrainConfig):
        self.generator, self.discriminator = generator, discriminator
        self.recipe, self.gan_mode = config.recipe, config.gan_mode
        fused = isinstance(generator, UNetGenerator) and isinstance(discriminator, PatchDiscriminator)
        networks = (generator, discriminator)
        masters = [[p.detach().clone() for p in network.parameters()] for network in networks]
        if fused and config.precision in ("bf16", "fp16"):
            for network in networks:
                set_working_type(network, WORKING_TYPES[config.precision])
        weight = next(generator.parameters())
        self.loss_scale = LossScale(weight.device) if weight.dtype == torch.float16 else None
        adam = {
            "lr": config.lr,
            "betas": (config.beta1, 0.999),
            "eps": self.recipe.adam_eps,
            "keras_eps": self.recipe.keras_eps,
            "loss_scale": self.loss_scale,
        }
        self.gen_optimizer = MasterAdam(generator.parameters(), **adam)
        self.disc_optimizer = MasterAdam(discriminator.parameters(), **adam)
        self.gen_optimizer.set_masters(masters[0])
        self.disc_optimizer.set_masters(masters[1])
        self.lambda_l1 = torch.tensor(
            config.lambda_L1, dtype=compute_dtype(weight.dtype), device=weight.device
        )
        self.ring = LossRing(config.print_freq, weight.device)
        self.steps_taken = 0
        self.fake: Tensor | None = None
        if self.recipe.simultaneous:
            self._update = self._simultaneous if fused else self._simultaneous_modules
        else:
            self._update = self._alternating if fused else self._alternating_modules
        self._updating_early = False
        if fused and self.loss_scale is None:
            for optimizer in (self.gen_optimizer, self.disc_optimizer):
                self._update_large_weights_early(optimizer)

    def __call__(self, source: Tensor, target: Tensor) -> Losses:
        self.upload_lr()
        self.body(source, target)
        return self.stepped()

    def body(self, source: Tensor, target: Tensor) -> None:
        """The step as the device sees it: it talks to the host nowhere, so it can be captured."""
        losses = self._update(source, target)
        if self.loss_scale is not None:
            self.loss_scale.update()
        self.fake = self.fake.detach()
        self.ring.write(losses)

    def stepped(self) -> Losses:
        """Count a step whose body has run, or been replayed, and return its losses."""
        row = self.steps_taken % len(self.ring.rows)
        self.steps_taken += 1
        return Losses(*self.ring.rows[row].unbind())

    def last_losses(self, count: int) -> Tensor:
        """(count, 6) float32 on the device: the losses of the newest ``count`` steps, oldest first."""
        return self.ring.last(count, self.steps_taken)

    def state(self) -> list[Tensor]:
        """Every tensor that outlives a step and that a step changes."""
        tensors = [self.ring.rows, self.ring.written]
        for network in (self.generator, self.discriminator):
            tensors += [*network.parameters(), *network.buffers()]
        for optimizer in (self.gen_optimizer, self.disc_optimizer):
            tensors += optimizer.tensors()
        if self.loss_scale is not None:
            tensors += [self.loss_scale.scale, self.loss_scale.growth_tracker, self.loss_scale.found_inf]
        return [tensor.detach() for tensor in tensors]

    def forget_gradients(self) -> None:
        """Drop what a body that did not get to its end left behind."""
        self.gen_optimizer.zero_grad(set_to_none=True)
        self.disc_optimizer.zero_grad(set_to_none=True)

    def _update_large_weights_early(self, optimizer: MasterAdam) -> None:
        """Update a large weight when its gradient arrives in a backward pass of this step.

        Nothing reads the weight after that: the backward pass of its layer, which made the gradient, was
        the last to need it.
        """

        def update(parameter: nn.Parameter) -> None:
            if self._updating_early:
                optimizer.step_parameters([parameter])
                parameter.grad = None

        for parameter in optimizer.parameters():
            if parameter.numel() >= LARGE:
                parameter.register_post_accumulate_grad_hook(update)

    def _backward(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], *optimizers: MasterAdam
    ) -> None:
        """Backward pass from ``outputs``, and the update of the weights of ``optimizers`` that it reaches."""
        early = self.loss_scale is None
        if early:
            for optimizer in optimizers:
                optimizer.begin_step()
        self._updating_early = early
        try:
            torch.autograd.backward(outputs, gradients)
        finally:
            self._updating_early = False
        for optimizer in optimizers:
            if not early:
                optimizer.begin_step()
            optimizer.step_parameters([p for p in optimizer.parameters() if p.grad is not None])
            optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        """Learning rate of both players from the next step on."""
        for optimizer in (self.gen_optimizer, self.disc_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = lr

    def upload_lr(self) -> None:
        """Copy learning rates to the device where they changed: the one thing a step takes from the host."""
        self.gen_optimizer.upload_lr()
        self.disc_optimizer.upload_lr()

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
        return tanh_l1(self.generator.before_tanh(source), self.generator.last.bias, target, out=out)

    @property
    def _scale(self) -> Tensor | None:
        return None if self.loss_scale is None else self.loss_scale.scale

    @property
    def _l1_weight(self) -> Tensor:
        """The gradient of the total loss by the L1 loss."""
        return self.lambda_l1 if self.loss_scale is None else self.lambda_l1 * self.loss_scale.scale

    def _gan_loss(self, logits: Tensor) -> GanLoss:
        return gan_loss(
            logits.detach(),
            mode=self.gan_mode,
            real_first=self.recipe.real_first,
            disc_factor=self.recipe.disc_factor,
            scale=self._scale,
        )

    def _simultaneous(self, source: Tensor, target: Tensor) -> Losses:
        pairs, fake_rows = self._pairs(source, target)
        self.fake, l1 = self._generate(source, target, pairs[fake_rows])
        logits, fake_logits = self.discriminator.shared_forward(pairs, self.fake, fake_rows)
        gan = self._gan_loss(logits)
        # The two ways back share no weight, so one backward pass gives each network its own gradient.
        self._backward(
            (logits, fake_logits, l1),
            (gan.disc_grad, gan.gen_grad, self._l1_weight),
            self.gen_optimizer,
            self.disc_optimizer,
        )
        disc, gen, real, fake = gan.losses.unbind()
        return self._losses(gen, l1, disc, real, fake)

    def _alternating(self, source: Tensor, target: Tensor) -> Losses:
        pairs, fake_rows = self._pairs(source, target)
        self.fake, l1 = self._generate(source, target, pairs[fake_rows])
        logits, _ = self.discriminator.shared_forward(pairs, self.fake.detach(), fake_rows)
        gan = self._gan_loss(logits)
        self._backward((logits,), (gan.disc_grad,), self.disc_optimizer)

        _, fake_logits = self.discriminator.shared_forward(
            pairs[fake_rows], self.fake, slice(None), parts=1, train=False
        )
        gen, gen_grad = self._generator_loss(fake_logits)
        self._backward((fake_logits, l1), (gen_grad, self._l1_weight), self.gen_optimizer)
        disc, _, real, fake = gan.losses.unbind()
        return self._losses(gen, l1, disc, real, fake)

    def _generator_loss(self, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
        return gan_target_loss(fake_logits.detach(), True, mode=self.gan_mode, scale=self._scale)

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
        disc_parameters = list(self.disc_optimizer.parameters())
        logits.backward(gan.disc_grad, inputs=disc_parameters, retain_graph=True)
        torch.autograd.backward(
            (fake_logits, l1), (gan.gen_grad, self._l1_weight), inputs=list(self.gen_optimizer.parameters())
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
        gen, gen_grad = self._generator_loss(fake_logits)
        torch.autograd.backward(
            (fake_logits, l1), (gen_grad, self._l1_weight), inputs=list(self.gen_optimizer.parameters())
        )
        _apply(self.gen_optimizer)
        disc, _, real, fake = gan.losses.unbind()
        return self._losses(gen, l1, disc, real, fake)

    def _losses(self, gen: Tensor, l1: Tensor, disc: Tensor, real: Tensor, fake: Tensor) -> Losses:
        l1 = l1.detach()
        return Losses(gen + self.lambda_l1 * l1, gen, l1, disc, real, fake)


def _apply(optimizer: MasterAdam) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

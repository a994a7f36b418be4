"""One GAN update as one plain function: forward passes, losses, backward passes, both Adams."""

import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastpix2pix.kernels import deep_update
from fastpix2pix.kernels.adam import LARGE
from fastpix2pix.kernels.loss_row import LossTerms
from fastpix2pix.kernels.reference import GanLoss, compute_dtype
from fastpix2pix.models.blocks import Block, set_working_type
from fastpix2pix.training.distributed import Exchange
from fastpix2pix.training.losses import Losses, LossRing
from fastpix2pix.training.objective import Objective, set_module_working_type
from fastpix2pix.training.optim import LossScale, MasterAdam, begin_steps
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.players import Backward, Drawn, FusedPlayers, players_for
from fastpix2pix.training.precision import WORKING_TYPES
from fastpix2pix.training.sharded import ShardedAdam, exchanged_updates
from fastpix2pix.training.streams import SideStream

Between = Callable[[], None]
"""What the host does between two segments of a step: an exchange with the other ranks."""

Updates = Generator[Between, None, LossTerms]


class TrainStep:
    """``losses = step(source, target)`` updates both networks once, by the rule of ``options.preset``.

    tutorial: both gradients are taken at the same weights, and one forward pass over the generated image
    serves both players. junyanz: the discriminator steps first, and the generator's gradient is taken
    through the discriminator as it is after that.

    source, target: (N, C, H, W) in [-1, 1], on the networks' device and in their type. The losses are views
    of ``ring``, which the ``options.print_freq``-th next step overwrites. ``fake`` is the last generated
    image, (N, C, H, W).

    ``generator`` and ``discriminator`` may be any modules: the first maps the source to an image, the
    second source and image to logits; how it is called, and which losses there are, ``objective`` says. A
    large weight is updated as soon as its gradient is there, beside the backward pass of the layers before
    it; with a loss scale its gradient is looked at by then, as no weight may move before all are known to be
    finite. Our own two run fused, too: the generated image is written where the discriminator reads it, real
    and fake go through it as one batch, and on a GPU the gradients of the generator's deep layers are never
    stored (``kernels.deep_update``).

    ``options.precision`` bf16 or fp16 converts the networks, their normalisations excepted; the optimizers
    keep the float32 weights they came with as masters. Weights in float16 get a dynamic ``loss_scale``.

    ``exchange``: of several ranks, which make the same calls, each on its own images. Gradients are the mean
    over all ranks, and so are the losses; batch statistics are each rank's own, and so is dropout. Weights
    are rank 0's to begin with, and stay equal bit for bit.

    ``keep_gradients`` leaves all gradients of a step that runs eagerly in ``p.grad`` until the next one, and
    updates the weights at its end, from those; ValueError with an ``exchange``, which sends them away. A
    weight with hooks of others on it is updated at the end in any case: they see its gradient, and may change
    it.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        options: StepOptions | None = None,
        exchange: Exchange | None = None,
        *,
        objective: Objective | None = None,
        keep_gradients: bool = False,
    ):
        if keep_gradients and exchange is not None:
            raise ValueError("keep_gradients is for one process: an exchange sends gradients away")
        options = StepOptions() if options is None else options
        self.generator, self.discriminator, self.options = generator, discriminator, options
        self.rule = options.rules.update if objective is None or objective.rule is None else objective.rule
        self.players = players_for(
            generator, discriminator, real_first=self.rule.real_first, objective=objective
        )
        fused = isinstance(self.players, FusedPlayers)
        networks = (generator, discriminator)
        masters = [[p.detach().clone() for p in network.parameters()] for network in networks]
        if options.precision in ("bf16", "fp16"):
            convert = set_working_type if fused else set_module_working_type
            for network in networks:
                convert(network, WORKING_TYPES[options.precision])
        weight = next(generator.parameters())
        self.loss_scale = LossScale(weight.device) if weight.dtype == torch.float16 else None
        adam: dict[str, Any] = {
            "lr": options.lr,
            "betas": (options.beta1, 0.999),
            "eps": self.rule.adam_eps,
            "keras_eps": self.rule.keras_eps,
            "loss_scale": self.loss_scale,
        }
        self.exchange = exchange
        optimizer_of = MasterAdam if exchange is None else partial(ShardedAdam, exchange=exchange)
        self.gen_optimizer: Any = optimizer_of(generator.parameters(), **adam)
        self.disc_optimizer: Any = optimizer_of(discriminator.parameters(), **adam)
        self.gen_optimizer.set_masters(masters[0])
        self.disc_optimizer.set_masters(masters[1])
        self.lambda_l1 = torch.tensor(
            options.lambda_L1, dtype=compute_dtype(weight.dtype), device=weight.device
        )
        self.ring = LossRing(options.print_freq, weight.device)
        self.steps_taken = 0
        self.fake: Tensor | None = None
        self._exchanged = torch.zeros(len(LossTerms._fields), device=weight.device)
        self.side = SideStream(weight.device)
        self._keep_gradients = keep_gradients
        self._taking_gradients = False
        if fused and exchange is not None:
            self.set_dropout_rng(cast(Tensor, generator.rng))
        elif self._may_take_gradients:
            for optimizer in (self.gen_optimizer, self.disc_optimizer):
                for parameter in optimizer.parameters():
                    if parameter.numel() >= LARGE:
                        hook = _Taker(self, optimizer, parameter)
                        parameter.register_post_accumulate_grad_hook(hook)
            # Of our own generator alone: a weight that is used twice in a step has two gradients to add up.
            for block in generator.modules() if fused else ():
                if isinstance(block, Block):
                    block.take_gradient = _Taker(self, self.gen_optimizer, block.conv.weight).take

    def __call__(self, source: Tensor, target: Tensor) -> Losses:
        self.upload_lr()
        self.body(source, target)
        return self.stepped()

    def body(self, source: Tensor, target: Tensor) -> None:
        """The step as the device sees it, with the exchanges between its segments."""
        for between in self.segments(source, target):
            between()

    def segments(self, source: Tensor, target: Tensor) -> Iterator[Between]:
        """The step in segments that talk to the host nowhere, so that each can be captured.

        A generator of what the host does between two of them; without an exchange it is one segment.
        """
        update = self._simultaneous if self.rule.simultaneous else self._alternating
        terms = yield from update(source, target)
        if self.exchange is not None:
            mine = torch.stack([term.to(self._exchanged.dtype) for term in terms])
            torch.mul(mine, 1 / self.exchange.size, out=self._exchanged)
            yield partial(self.exchange.sum_, self._exchanged)
            terms = LossTerms(*self._exchanged.unbind())
        if self.loss_scale is not None:
            self.loss_scale.update()
        self.ring.write(terms, self.lambda_l1)

    def stepped(self) -> Losses:
        """Count a step whose body has run, or been replayed, and return its losses."""
        self.steps_taken += 1
        return self.ring.row(self.steps_taken - 1)

    def last_losses(self, count: int) -> Tensor:
        """(count, 6) float32 on the device: the losses of the newest ``count`` steps, oldest first."""
        return self.ring.last(count, self.steps_taken)

    def set_lr(self, lr: float) -> None:
        """Learning rate of both players from the next step on."""
        for optimizer in (self.gen_optimizer, self.disc_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = lr

    def upload_lr(self) -> None:
        """Copy learning rates to the device where they changed: the one thing a step takes from the host."""
        self.gen_optimizer.upload_lr()
        self.disc_optimizer.upload_lr()

    def set_dropout_rng(self, rng: Tensor) -> None:
        """Let the dropout of our own generator go on from rank 0's ``rng``, int64 (seed, step).

        The other ranks draw from seeds of their own.
        """
        own = cast(Tensor, self.generator.rng).copy_(rng)
        if self.exchange is not None:
            own[0] += self.exchange.rank << 32

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Give all ranks the mean of their running statistics. All ranks call it together."""
        if self.exchange is None:
            return
        for network in (self.generator, self.discriminator):
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    self.exchange.sum_(buffer.div_(self.exchange.size))

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
        self.side.abandon()
        if self.loss_scale is not None:
            self.loss_scale.forget()

    # ----------------------------------------------------------------------------------- update rules

    def _simultaneous(self, source: Tensor, target: Tensor) -> Updates:
        """The tutorial's: both gradients at the same weights, one forward pass of D over the fake image."""
        drawn = self._draw(source, target)
        logits, fake_logits = self.players.logits_of_both(drawn, through_fake=True)
        gan = self._gan_loss(logits)
        yield from self._update(
            *self._disc_paths(logits, gan),
            Backward(fake_logits, gan.gen_grad, self.gen_optimizer),
            Backward(drawn.l1, self._l1_gradient, self.gen_optimizer),
        )
        disc, gen, real, fake = gan.losses.unbind()
        return LossTerms(gen, drawn.l1.detach(), disc, real, fake)

    def _alternating(self, source: Tensor, target: Tensor) -> Updates:
        """junyanz's: D steps on the image, then G against the new D."""
        drawn = self._draw(source, target)
        logits, _ = self.players.logits_of_both(drawn, through_fake=False)
        gan = self._gan_loss(logits)
        yield from self._update(*self._disc_paths(logits, gan))

        fake_logits = self.players.logits_of_fake(drawn)
        gen, gen_grad = self.players.gan_target_loss(
            fake_logits.detach(),
            True,
            mode=self.options.gan_mode,
            bias=self._logit_bias,
            scale=self._scale,
        )
        yield from self._update(
            Backward(fake_logits, gen_grad, self.gen_optimizer),
            Backward(drawn.l1, self._l1_gradient, self.gen_optimizer),
        )
        disc, _, real, fake = gan.losses.unbind()
        return LossTerms(gen, drawn.l1.detach(), disc, real, fake)

    def _draw(self, source: Tensor, target: Tensor) -> Drawn:
        drawn = self.players.draw(source, target)
        self.fake = drawn.fake.detach()
        return drawn

    def _gan_loss(self, logits: Tensor) -> GanLoss:
        return self.players.gan_loss(
            logits.detach(),
            mode=self.options.gan_mode,
            real_first=self.rule.real_first,
            disc_factor=self.rule.disc_factor,
            bias=self._logit_bias,
            scale=self._scale,
        )

    def _disc_paths(self, logits: Tensor, gan: GanLoss) -> list[Backward]:
        paths = [Backward(logits, gan.disc_grad, self.disc_optimizer)]
        if gan.bias_grad is not None:
            paths.append(Backward(self.players.logit_bias, gan.bias_grad, self.disc_optimizer))
        return paths

    @property
    def _logit_bias(self) -> Tensor | None:
        bias = self.players.logit_bias
        return None if bias is None else bias.detach()

    @property
    def _scale(self) -> Tensor | None:
        return None if self.loss_scale is None else self.loss_scale.scale

    @property
    def _l1_gradient(self) -> Tensor:
        """The gradient of the total loss by the L1 loss."""
        return self.lambda_l1 if self.loss_scale is None else self.lambda_l1 * self.loss_scale.scale

    # ----------------------------------------------------------------------------------------- updates

    @property
    def _may_take_gradients(self) -> bool:
        """Whether a large gradient is dealt with when it arrives: see ``_Taker``."""
        return self.exchange is None and not self._keep_gradients

    def _update(self, *paths: Backward) -> Iterator[Between]:
        """Send the gradients back, and update the weights of the optimizers that they are for."""
        optimizers = list(dict.fromkeys(path.optimizer for path in paths))
        if self.exchange is not None:
            self.players.backward(paths)
            sharded = cast(list[ShardedAdam], optimizers)
            for one in sharded:
                one.pack()
            yield from exchanged_updates(sharded)
            return
        early = self._may_take_gradients and self.loss_scale is None
        if self._keep_gradients:  # those of the step before
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
        if early:
            begin_steps(optimizers)
        self._taking_gradients = self._may_take_gradients
        try:
            self.players.backward(paths)
        finally:
            self._taking_gradients = False
        if not early:
            self.side.join()  # with what was found to be not finite
            begin_steps(optimizers)
        for optimizer in optimizers:
            optimizer.step_parameters([p for p in optimizer.parameters() if p.grad is not None])
            if not self._keep_gradients:
                optimizer.zero_grad(set_to_none=True)
        self.side.join()


class _Taker:
    """Deals with a large weight's gradient within the backward pass of a step, on its side stream: updates
    the weight, or, with a loss scale, looks whether the gradient is finite.

    Called by autograd when the gradient is there: nothing reads the weight after that, as the backward pass
    of its layer, which made the gradient, was the last to need it. ``take`` is called by a deep layer in
    place of making the gradient, also when all else is done (``deep_conv.TakeGradient``); with a loss scale
    the images are kept for an update at the end of the step.

    It refers weakly: autograd and the networks would keep a step that holds them. In a network's copy, or
    pickled with it, it belongs to no step.
    """

    def __init__(self, *of: Any):
        """of: the step, its optimizer and the weight; or nothing."""
        self._of = [weakref.ref(each) for each in of]

    def __reduce__(self) -> tuple[type, tuple]:
        return _Taker, ()

    def __call__(self, weight: nn.Parameter) -> None:
        # Autograd calls for a gradient that was taken too, when there is none.
        if weight.grad is not None and (now := self._at_work()) is not None:
            side, optimizer, _ = now
            if optimizer.loss_scale is not None:
                side.fork(partial(optimizer.look_at, weight), uses=())
                return
            gradient, weight.grad = weight.grad, None
            side.fork(partial(optimizer.step_parameter, weight, gradient), uses=[gradient])

    def take(self, small: Tensor, big: Tensor) -> bool:
        now = self._at_work()
        if now is None:
            return False
        side, optimizer, weight = now
        if weight.grad is not None or not deep_update.serves(small, big, weight):
            return False
        if optimizer.loss_scale is not None:
            optimizer.keep_images(weight, small, big)
        else:
            side.fork(partial(optimizer.step_deep_weight, weight, small, big), uses=[small, big])
        return True

    def _at_work(self) -> tuple[SideStream, MasterAdam, nn.Parameter] | None:
        """Where and with what, while the step takes gradients and nobody else wants this weight's."""
        if not self._of:
            return None
        step, optimizer, weight = (reference() for reference in self._of)
        if step is None or not step._taking_gradients or weight._backward_hooks:
            return None
        hooks = (weight._post_accumulate_grad_hooks or {}).values()
        if not all(isinstance(hook, _Taker) for hook in hooks):
            return None
        return step.side, optimizer, weight

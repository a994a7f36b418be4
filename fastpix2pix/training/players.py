"""The two networks of a step behind one interface, whether they are ours, fused, or any modules.

A step draws an image, has it looked at by the discriminator, and sends gradients back to one network or
both; the update rules (``training.step``) are written in these words.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastpix2pix.kernels.gan_loss import gan_loss, gan_target_loss
from fastpix2pix.kernels.reference import GanLoss
from fastpix2pix.kernels.tanh_l1 import tanh_l1
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training.objective import Judged, Objective, l1_loss, without_gradient
from fastpix2pix.training.optim import MasterAdam


class Drawn(NamedTuple):
    """A generated image on its way through a step.

    source, target, fake: (N, C, H, W). l1: scalar, its mean absolute distance from the target. pairs, rows:
    of fused players, the discriminator's input, [source; source] beside [target; fake] in the order of the
    update rule, and the rows of it that hold the fake pair.
    """

    source: Tensor
    target: Tensor
    fake: Tensor
    l1: Tensor
    pairs: Tensor | None = None
    rows: slice | None = None


class Backward(NamedTuple):
    """One output of a step, its gradient, and the optimizer whose parameters the gradient is for."""

    output: Tensor
    gradient: Tensor
    optimizer: MasterAdam


class Players(Protocol):
    """Generator and discriminator, as an update rule sees them.

    logit_bias: the discriminator's last bias, where it is for the loss to add to the logits.
    """

    logit_bias: nn.Parameter | None

    def draw(self, source: Tensor, target: Tensor) -> Any:
        """The generated image for ``source`` and its L1 distance from ``target``."""

    def logits_of_both(self, drawn: Any, *, through_fake: bool) -> tuple[Tensor, Tensor]:
        """(2 N, ...) logits of the real and the fake pairs, in the rule's order, for the discriminator's
        gradient; and the (N, ...) logits of the fake pairs, whose gradient reaches the generator if
        ``through_fake``."""

    def logits_of_fake(self, drawn: Any) -> Tensor:
        """(N, ...) logits of the fake pairs by the discriminator as it now is, for the generator alone."""

    gan_loss: Callable[..., GanLoss]
    """``kernels.gan_loss.gan_loss`` of what ``logits_of_both`` returned."""

    gan_target_loss: Callable[..., tuple[Tensor, Tensor]]
    """``kernels.gan_loss.gan_target_loss`` of what ``logits_of_fake`` returned."""

    def backward(self, paths: Sequence[Backward]) -> None:
        """Add each path's gradient to the parameters of its optimizer, and to no others."""


class FusedPlayers:
    """Our own two networks: the image is drawn where the discriminator reads it, real and fake go through it
    as one batch, and the paths of one backward pass share no weight.
    """

    def __init__(self, generator: UNetGenerator, discriminator: PatchDiscriminator, *, real_first: bool):
        self.generator, self.discriminator, self.real_first = generator, discriminator, real_first
        self.logit_bias: nn.Parameter = discriminator.last.bias

    def draw(self, source: Tensor, target: Tensor) -> Drawn:
        n, c, h, w = source.shape
        pairs = torch.empty(
            (2 * n, c + target.shape[1], h, w),
            dtype=source.dtype,
            device=source.device,
            memory_format=torch.channels_last,
        )
        first, second = slice(0, n), slice(n, 2 * n)
        real_rows, fake_rows = (first, second) if self.real_first else (second, first)
        pairs.unflatten(0, (2, n))[:, :, :c] = source  # beside both, in one copy
        pairs[real_rows, c:] = target
        before_tanh = self.generator.before_tanh(source)
        fake, l1 = tanh_l1(before_tanh, self.generator.last.bias, target, out=pairs[fake_rows, c:])
        return Drawn(source, target, fake, l1, pairs, fake_rows)

    def logits_of_both(self, drawn: Drawn, *, through_fake: bool) -> tuple[Tensor, Tensor]:
        fake = drawn.fake if through_fake else drawn.fake.detach()
        return self.discriminator.shared_forward(drawn.pairs, fake, drawn.rows)

    def logits_of_fake(self, drawn: Drawn) -> Tensor:
        _, logits = self.discriminator.shared_forward(
            drawn.pairs[drawn.rows], drawn.fake, slice(None), parts=1, train=False
        )
        return logits

    gan_loss = staticmethod(gan_loss)
    gan_target_loss = staticmethod(gan_target_loss)

    def backward(self, paths: Sequence[Backward]) -> None:
        bias = self.logit_bias
        if not bias._backward_hooks and not bias._post_accumulate_grad_hooks:
            # Autograd would copy a gradient that others hold too.
            for path in paths:
                if path.output is bias:
                    bias.grad = path.gradient
            paths = [path for path in paths if path.output is not bias]
        torch.autograd.backward(
            [path.output for path in paths],
            [path.gradient for path in paths],
        )


class ModulePlayers:
    """Any two modules: the first maps the source to an image, the second source and image to logits, as
    ``objective`` says. Logits of several maps go through a step side by side, as (N, logits of all maps).
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        real_first: bool,
        objective: Objective | None = None,
    ):
        self.generator, self.discriminator, self.real_first = generator, discriminator, real_first
        self.objective = Objective() if objective is None else objective
        self._sizes: list[int] = []  # of the maps
        self.logit_bias: nn.Parameter | None = None

    def draw(self, source: Tensor, target: Tensor) -> Judged:
        return Judged(source, target, self.generator(source), self.objective.image_loss)

    def logits_of_both(self, drawn: Judged, *, through_fake: bool) -> tuple[Tensor, Tensor]:
        fake = drawn.fake if through_fake else drawn.fake.detach()
        images = (drawn.target, fake) if self.real_first else (fake, drawn.target)
        # One after the other: running statistics see the halves in this order.
        outputs = [self._judge(drawn.source, image) for image in images]
        real, drawn.fake_output = outputs if self.real_first else reversed(outputs)
        drawn.real_output = without_gradient(real)
        halves = [self._side_by_side(output) for output in outputs]
        return torch.cat(halves), halves[1 if self.real_first else 0]

    def logits_of_fake(self, drawn: Judged) -> Tensor:
        drawn.fake_output = self._judge(drawn.source, drawn.fake)
        if self.objective.image_loss is not l1_loss:  # of features, by D as it now is
            with torch.no_grad():
                drawn.real_output = self._judge(drawn.source, drawn.target)
        return self._side_by_side(drawn.fake_output)

    def _judge(self, source: Tensor, image: Tensor) -> Any:
        if self.objective.pairs == "apart":
            return self.discriminator(source, image)
        return self.discriminator(torch.cat((source, image), 1))

    def _side_by_side(self, output: Any) -> Tensor:
        maps = [logits.flatten(1) for logits in self.objective.logits(output)]
        self._sizes = [logits.shape[1] for logits in maps]
        return torch.cat(maps, 1)

    def gan_loss(self, logits: Tensor, **rule: Any) -> GanLoss:
        """Sums over maps; the gradients side by side again."""
        made = [gan_loss(part, **rule) for part in self._maps(logits)]
        gradients = (torch.cat([getattr(one, name) for one in made], 1) for name in ("disc_grad", "gen_grad"))
        return GanLoss(_sum([one.losses for one in made]), *gradients)

    def gan_target_loss(self, logits: Tensor, real: bool, **rule: Any) -> tuple[Tensor, Tensor]:
        made = (gan_target_loss(part, real, **rule) for part in self._maps(logits))
        losses, gradients = zip(*made, strict=True)
        return _sum(losses), torch.cat(gradients, 1)

    def _maps(self, logits: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in logits.split(self._sizes, 1)]

    def backward(self, paths: Sequence[Backward]) -> None:
        """The generator's first: its gradients pass the discriminator's weights, which the other pass may
        update, while that one needs none of the generator's.
        """
        optimizers = list(dict.fromkeys(path.optimizer for path in reversed(paths)))
        for optimizer in optimizers:
            own = [path for path in paths if path.optimizer is optimizer]
            torch.autograd.backward(
                [path.output for path in own],
                [path.gradient for path in own],
                inputs=list(optimizer.parameters()),
                retain_graph=optimizer is not optimizers[-1],
            )


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum(0)


def players_for(
    generator: nn.Module, discriminator: nn.Module, *, real_first: bool, objective: Objective | None = None
) -> Players:
    """Fused players where both networks are ours and no other objective is given, else players that take any
    modules.
    """
    if (
        objective is None
        and isinstance(generator, UNetGenerator)
        and isinstance(discriminator, PatchDiscriminator)
    ):
        return FusedPlayers(generator, discriminator, real_first=real_first)
    return ModulePlayers(generator, discriminator, real_first=real_first, objective=objective)  # type: ignore[return-value]  # its drawn image is another

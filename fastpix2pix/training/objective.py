"""What a step over any two modules is to optimise: pairs, logits and losses of other people's networks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from fastpix2pix.errors import UserError
from fastpix2pix.kernels.reference import compute_dtype
from fastpix2pix.presets import UpdateRule

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


class Judged:
    """A generated image on its way through a step, for a loss to look at.

    source, target, fake: (N, C, H, W). real_output, fake_output: what the discriminator returned for the
    pairs (source, target), without gradient, and (source, fake): logits, or features with logits at their
    ends.
    """

    def __init__(self, source: Tensor, target: Tensor, fake: Tensor, loss: Callable[["Judged"], Tensor]):
        self.source, self.target, self.fake = source, target, fake
        self.real_output: Any = None
        self.fake_output: Any = None
        self._loss = loss
        self._l1: Tensor | None = None

    @property
    def l1(self) -> Tensor:
        """The loss beside the GAN's, taken when first asked for, which is when the outputs are there."""
        if self._l1 is None:
            self._l1 = self._loss(self).to(compute_dtype(self.fake.dtype))
        return self._l1


def l1_loss(judged: Judged) -> Tensor:
    """Mean absolute difference of the generated image from the target."""
    dtype = compute_dtype(judged.fake.dtype)
    return (judged.target.to(dtype) - judged.fake.to(dtype)).abs().mean()


def last_logits(output: Any) -> list[Tensor]:
    """Logits among what a discriminator returned: a tensor, a list of them, or one of lists of features (of
    several scales) whose last are the logits, as pix2pixHD's are.
    """
    if isinstance(output, Tensor):
        return [output]
    return [part if isinstance(part, Tensor) else part[-1] for part in output]


@dataclass(frozen=True)
class Objective:
    """How a ``TrainStep`` over any two modules calls the discriminator, and what its losses are.

    pairs: "stacked", D(torch.cat([source, image], 1)), or "apart", D(source, image).
    logits: the logits maps in what D returns. A GAN loss is the sum over maps of its mean over a map.
    image_loss: the generator's loss beside the GAN's, a scalar of a ``Judged``; ``lambda_L1`` is its weight,
        and ``gen_l1_loss`` its value. It may look at D's outputs, for feature matching.
    rule: how both networks are updated; None is that of the preset.
    """

    pairs: Literal["stacked", "apart"] = "stacked"
    logits: Callable[[Any], list[Tensor]] = last_logits
    image_loss: Callable[[Judged], Tensor] = l1_loss
    rule: UpdateRule | None = None

    def __post_init__(self) -> None:
        if self.pairs not in ("stacked", "apart"):
            raise UserError(f"pairs is {self.pairs!r}; choose stacked or apart")


def without_gradient(output: Any) -> Any:
    """The same tensors, detached, in the same lists."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)


def set_module_working_type(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert what any network computes with to ``dtype``, in place, its normalisations excepted.

    They take 16-bit images with float32 parameters and statistics.
    """
    for layer in network.modules():
        if isinstance(layer, NORMS):
            continue
        for parameter in layer._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                layer._buffers[name] = buffer.to(dtype)

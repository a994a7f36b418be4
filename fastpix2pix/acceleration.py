"""Fuse normalisation, activation and dropout inside other people's networks.

    print(fastpix2pix.accelerate(network))

Where an ``nn.Sequential`` runs a norm, then an activation or dropout or both, the norm takes over their work
(``kernels.norm_act``) and what it took over becomes an identity, so that positions, parameters, buffers and
state_dict keys stay as they were.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastpix2pix.kernels.norm_act import norm_act
from fastpix2pix.kernels.reference import NormActConfig


class Acceleration(NamedTuple):
    """What ``accelerate`` did: one line for each norm, as ``name: ...``. ``str()`` shows all of them."""

    changed: list[str]
    left: list[str]

    def __str__(self) -> str:
        total = len(self.changed) + len(self.left)
        lines = [f"fused {len(self.changed)} of {total} norms"]
        lines += [f"  fused  {line}" for line in self.changed]
        lines += [f"  left   {line}" for line in self.left]
        return "\n".join(lines)


class FusedDropout(nn.Dropout):
    """A dropout whose work the norm before it does; that norm asks it for its mode and probability."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _FusedNorm(_NormBase):
    """What the two fused norms share. ``slope`` is the activation's, 1.0 for none.

    The classes keep the names of torch's own at the front and descend from them, because programs look for
    "BatchNorm2d" or ``InstanceNorm2d`` to initialise, freeze or convert layers.
    """

    slope: float
    dropout: tuple[FusedDropout, ...]
    """The dropout that this norm does the work of, if any; in a tuple it is not registered twice."""

    def _fused(self, x: Tensor, config: NormActConfig, *running: Tensor | None) -> Tensor:
        probability = next((layer.p for layer in self.dropout if layer.training), 0.0)
        rng = None
        if probability:  # from torch's generator, which seeds, checkpointing and captured graphs know about
            rng = torch.randint(2**63 - 1, (2,), device=x.device)
        config = config._replace(eps=self.eps, slope=self.slope, dropout=probability)
        y: Tensor = norm_act(  # type: ignore[assignment]  # a pair only where a skip is asked for
            x, self.weight, self.bias, *running, config=config, rng=rng
        )
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

    def extra_repr(self) -> str:
        dropout = "".join(f", dropout={layer.p}" for layer in self.dropout)
        return f"{super().extra_repr()}, slope={self.slope}{dropout}"


class BatchNorm2dAct(_FusedNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d``, then (Leaky)ReLU and dropout. A single value per channel gives ``bias``."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        by_batch = self.training or self.running_mean is None
        running = (self.running_mean, self.running_var)
        if self.training and not self.track_running_stats:
            running = (None, None)
        elif self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return self._fused(x, NormActConfig(training=by_batch, momentum=self.momentum), *running)


class InstanceNorm2dAct(_FusedNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` without running statistics, then (Leaky)ReLU and dropout."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if x.dim() == self._get_no_batch_dim():
            return self(x.unsqueeze(0)).squeeze(0)
        return self._fused(x, NormActConfig(groups=x.shape[0]))


FUSED: dict[type[nn.Module], type[_FusedNorm]] = {
    nn.BatchNorm2d: BatchNorm2dAct,
    nn.InstanceNorm2d: InstanceNorm2dAct,
}


def _slope(layer: nn.Module) -> float | None:
    """The activation's slope below zero, or None for what norm_act doesn't compute."""
    if type(layer) is nn.ReLU:
        return 0.0
    if type(layer) is nn.LeakyReLU and 0 <= layer.negative_slope <= 1:
        return layer.negative_slope
    return None


def _is_dropout(layer: nn.Module) -> bool:
    return type(layer) is nn.Dropout and layer.p < 1


def _hooked(layer: nn.Module) -> bool:
    """Whether something watches what goes in or comes out of the layer itself."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def _followers(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """What a norm can take over of the ``layers`` after it: an activation, a dropout, or both in any order.

    Both orders are the same op: a dropped value is zero before and after the activation, and scaling by a
    positive number commutes with it.
    """
    taken: list[nn.Module] = []
    for layer in layers[:2]:
        same_kind = any(_is_dropout(other) == _is_dropout(layer) for other in taken)
        if same_kind or _hooked(layer) or (_slope(layer) is None and not _is_dropout(layer)):
            break
        taken.append(layer)
    return taken


def _obstacle(norm: nn.Module) -> str | None:
    """Why this norm is not one that norm_act computes, or None."""
    if type(norm) not in FUSED:
        return f"{type(norm).__name__} is not BatchNorm2d or InstanceNorm2d"
    if (norm.weight is None) != (norm.bias is None):
        return "it has a weight without a bias, or the reverse"
    if type(norm) is nn.BatchNorm2d and norm.momentum is None:
        return "its running statistics are cumulative averages (momentum=None)"
    if type(norm) is nn.InstanceNorm2d and norm.running_mean is not None:
        return "it normalises by running statistics of instances (track_running_stats=True)"
    return "hooks watch it" if _hooked(norm) else None


def _fuse(norm: nn.Module, slope: float, dropout: FusedDropout | None) -> nn.Module:
    """A fused norm with the parameters, buffers, settings and mode of ``norm``."""
    fused = FUSED[type(norm)].__new__(FUSED[type(norm)])
    fused.__dict__.update(norm.__dict__)
    fused.slope, fused.dropout = slope, () if dropout is None else (dropout,)
    return fused


def _norms(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None, str]]:
    """(full name, norm, the module that holds it, its key there)."""
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm) and not isinstance(layer, _FusedNorm):
            holder, _, key = name.rpartition(".")
            yield name or "(root)", layer, module.get_submodule(holder) if name else None, key


def accelerate(module: nn.Module) -> Acceleration:
    """Fuse norms of ``module``, in place, with the activations and dropouts after them; say what was done.

    Fused: ``nn.BatchNorm2d``, and ``nn.InstanceNorm2d`` without running statistics, directly followed in the
    same ``nn.Sequential`` by ``nn.ReLU`` or ``nn.LeakyReLU``, by ``nn.Dropout``, or by both in any order.
    Results, gradients and running statistics stay the same to rounding; dropout masks follow the same
    distribution and torch's seed, but are other masks than ``nn.Dropout`` draws. Parameters, buffers and
    state_dict keys are the same, so optimizers and checkpoints from before go on working. Everything else is
    left as it was, each norm with its reason.

    What a program can't do any more: look at a result between a norm and its activation, and differentiate
    twice through a fused norm (a gradient penalty), which raises RuntimeError. Tensors keep the memory format
    that they come in; the kernels work on channels-last, so ``module.to(memory_format=torch.channels_last)``
    spares copies.
    """
    places = Counter(id(child) for parent in module.modules() for child in parent._modules.values())
    report = Acceleration([], [])
    for name, norm, holder, key in list(_norms(module)):
        obstacle = _obstacle(norm)
        if obstacle is None and (not isinstance(holder, nn.Sequential) or _overrides_forward(holder)):
            obstacle = "it is not in an nn.Sequential, so what follows it is not known"
        if obstacle is None and places[id(norm)] > 1:
            obstacle = "it is used in more than one place"
        if obstacle is None:
            keys = list(holder._modules)
            after = keys[keys.index(key) + 1 :]
            taken = _followers([holder._modules[other] for other in after])
            if not taken:
                obstacle = "no ReLU, LeakyReLU or Dropout follows it directly"
        if obstacle is not None:
            report.left.append(f"{name}: {obstacle}")
            continue

        slope, dropout = 1.0, None
        for other, layer in zip(after, taken, strict=False):
            if _is_dropout(layer):
                dropout = FusedDropout(layer.p).train(layer.training)
                holder._modules[other] = dropout
            else:
                slope = _slope(layer)
                holder._modules[other] = nn.Identity().train(layer.training)
        holder._modules[key] = _fuse(norm, slope, dropout)
        report.changed.append(
            " + ".join([f"{name}: {type(norm).__name__}", *(type(x).__name__ for x in taken)])
        )
    return report


def _overrides_forward(sequential: nn.Sequential) -> bool:
    return type(sequential).forward is not nn.Sequential.forward

"""Fuse normalisation, activation, dropout and residual sums inside other people's networks.

    print(fastpix2pix.accelerate(network))

Where an ``nn.Sequential`` runs a norm, then an activation or dropout or both, the norm takes over their work
(``kernels.ops``) and what it took over becomes an identity, so that positions, parameters, buffers and
state_dict keys stay as they were. What a ``forward`` of its own does after a norm is found by ``torch.fx``
(``rewriting``).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from fastpix2pix import rewriting
from fastpix2pix.errors import UserError
from fastpix2pix.kernels import cpu_norm
from fastpix2pix.kernels.launch import use_triton
from fastpix2pix.kernels.ops import apply_norm_act
from fastpix2pix.kernels.reference import NormActConfig

Layout = Literal["auto", "channels_last", "keep"]


class Acceleration(NamedTuple):
    """What ``accelerate`` did, one line each as ``name: ...``; ``str()`` shows all of it.

    changed, left: one line for each norm. biases: convolutions that add their bias and activate in one op.
    layout: what became of the memory format.
    """

    changed: list[str]
    left: list[str]
    biases: list[str]
    layout: str

    def __str__(self) -> str:
        total = len(self.changed) + len(self.left)
        lines = [f"fused {len(self.changed)} of {total} norms; {self.layout}"]
        lines += [f"  fused  {line}" for line in (*self.changed, *self.biases)]
        lines += [f"  left   {line}" for line in self.left]
        return "\n".join(lines)


class FusedDropout(nn.Dropout):
    """A dropout whose work the norm before it does; that norm asks it for its mode and probability."""

    def forward(self, x: Tensor) -> Tensor:
        return x


# ---------------------------------------------------------------------------------------------------- norms


class _FusedNorm(_NormBase):
    """What the fused norms share. ``slope`` is the activation's, 1.0 for none.

    The classes keep the names of torch's own at the front and descend from them, because programs look for
    "BatchNorm2d" or ``InstanceNorm2d`` to initialise, freeze or convert layers.
    """

    slope: float
    dropout: tuple[FusedDropout, ...]
    """The dropout that this norm does the work of, if any; in a tuple it is not registered twice."""

    def _fused(
        self, x: Tensor, config: NormActConfig, slope: float | None, *running: Tensor | None
    ) -> Tensor:
        """The norm as configured, then activation and dropout; ``slope`` in place of the module's own."""
        config = config._replace(eps=self.eps, slope=self.slope if slope is None else slope)
        probability = next((layer.p for layer in self.dropout if layer.training), 0.0)
        if x.is_cuda or use_triton(x):
            rng = None
            if probability:  # from torch's generator, which seeds and captured graphs know about
                rng = torch.randint(2**63 - 1, (2,), device=x.device)
            config = config._replace(dropout=probability)
            return apply_norm_act(x, self.weight, self.bias, *running, config=config, rng=rng)
        one_value = config.training and x.numel() == config.groups * x.shape[1]
        if torch.compiler.is_compiling() or one_value:
            y = apply_norm_act(x, self.weight, self.bias, *running, config=config)
        else:
            running_mean, running_var = running
            y = cpu_norm.norm_act(x, self.weight, self.bias, running_mean, running_var, config)
        return F.dropout(y, probability) if probability else y

    def extra_repr(self) -> str:
        dropout = "".join(f", dropout={layer.p}" for layer in self.dropout)
        return f"{super().extra_repr()}, slope={self.slope}{dropout}"


class BatchNorm2dAct(_FusedNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d``, then (Leaky)ReLU and dropout. A single value per channel gives ``bias``."""

    def forward(self, x: Tensor, slope: float | None = None) -> Tensor:
        self._check_input_dim(x)
        by_batch = self.training or self.running_mean is None
        running = (self.running_mean, self.running_var)
        if self.training and not self.track_running_stats:
            running = (None, None)
        elif self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return self._fused(x, NormActConfig(training=by_batch, momentum=self.momentum), slope, *running)


class InstanceNorm2dAct(_FusedNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d``, then (Leaky)ReLU and dropout."""

    def forward(self, x: Tensor, slope: float | None = None) -> Tensor:
        self._check_input_dim(x)
        if x.dim() == self._get_no_batch_dim():
            return self(x.unsqueeze(0), slope).squeeze(0)
        if self.running_mean is not None and not (self.training or not self.track_running_stats):
            return self._fused(x, NormActConfig(training=False), slope, self.running_mean, self.running_var)
        if self.training and self.running_mean is not None and self.track_running_stats:
            self._update_running(x.detach())
        return self._fused(x, NormActConfig(groups=x.shape[0]), slope, None, None)

    @torch.no_grad()
    def _update_running(self, x: Tensor) -> None:
        """As torch does: by the mean over the images of their means and unbiased variances."""
        var, mean = torch.var_mean(x.to(self.running_mean.dtype), (2, 3))
        self.running_mean.lerp_(mean.mean(0), self.momentum)
        self.running_var.lerp_(var.mean(0), self.momentum)


FUSED: dict[type[nn.Module], type[_FusedNorm]] = {
    nn.BatchNorm2d: BatchNorm2dAct,
    nn.InstanceNorm2d: InstanceNorm2dAct,
}

# --------------------------------------------------------------------------------------------- convolutions


class _BiasAct(nn.modules.conv._ConvNd):
    """A convolution whose bias and activation are one op on a GPU, where they would be two passes.

    On a CPU the convolution adds its bias itself, and the activation works in place.
    """

    slope: float

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_cuda or use_triton(x)):
            return cpu_norm.activate(self._convolve(x, self.bias), self.slope)
        y = self._convolve(x, None)
        return apply_norm_act(y, None, self.bias, config=NormActConfig(norm=False, slope=self.slope))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope}"


class Conv2dAct(_BiasAct, nn.Conv2d):
    """``nn.Conv2d`` with bias, then (Leaky)ReLU."""

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, self.weight, bias)


class ConvTranspose2dAct(_BiasAct, nn.ConvTranspose2d):  # type: ignore[misc]  # no output_size
    """``nn.ConvTranspose2d`` with bias, then (Leaky)ReLU."""

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        shape = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return F.conv_transpose2d(x, self.weight, bias, *shape)


WITH_ACTIVATION: dict[type[nn.Module], type[_BiasAct]] = {
    nn.Conv2d: Conv2dAct,
    nn.ConvTranspose2d: ConvTranspose2dAct,
}

# ------------------------------------------------------------------------------------------ what can be fused


def _slope(layer: nn.Module) -> float | None:
    """The activation's slope below zero, or None for what norm_act doesn't compute."""
    if type(layer) is nn.ReLU:
        return 0.0
    if type(layer) is nn.LeakyReLU and 0 <= layer.negative_slope <= 1:
        return layer.negative_slope
    return None


def _is_dropout(layer: nn.Module) -> bool:
    return type(layer) is nn.Dropout and layer.p < 1


def _followers(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """What a norm can take over of the ``layers`` after it: an activation, a dropout, or both in any order.

    Both orders are the same op: a dropped value is zero before and after the activation, and scaling by a
    positive number commutes with it.
    """
    taken: list[nn.Module] = []
    for layer in layers[:2]:
        same_kind = any(_is_dropout(other) == _is_dropout(layer) for other in taken)
        if same_kind or rewriting.hooked(layer) or (_slope(layer) is None and not _is_dropout(layer)):
            break
        taken.append(layer)
    return taken


def _obstacle(norm: nn.Module, places: int) -> str | None:
    """Why this norm is not one that norm_act computes, or None."""
    if type(norm) is nn.GroupNorm:
        return "GroupNorm takes statistics over several channels; the kernels take them by channel"
    if type(norm) not in FUSED:
        return f"{type(norm).__name__} is not BatchNorm2d or InstanceNorm2d"
    if (norm.weight is None) != (norm.bias is None):
        return "it has a weight without a bias, or the reverse"
    if norm.momentum is None and norm.running_mean is not None:
        return "its running statistics are cumulative averages (momentum=None)"
    if places > 1:
        return "it is used in more than one place"
    return "hooks watch it" if rewriting.hooked(norm) else None


def _become(module: nn.Module, kind: type[nn.Module], slope: float, **attributes: object) -> nn.Module:
    """A module of class ``kind`` with the parameters, buffers, settings and mode of ``module``."""
    fused = kind.__new__(kind)
    fused.__dict__.update(module.__dict__)
    fused.__dict__.update(attributes, slope=slope)
    return fused


def _norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(full name, norm)."""
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase | nn.GroupNorm | nn.LayerNorm) and not isinstance(layer, _FusedNorm):
            yield name, layer


# ---------------------------------------------------------------------------------------------- accelerate


def accelerate(module: nn.Module, *, layout: Layout = "auto") -> Acceleration:
    """Fuse the norms of ``module``, in place, with what follows them; say what was done.

    Fused: every ``nn.BatchNorm2d`` and ``nn.InstanceNorm2d``, with the ``nn.ReLU`` or ``nn.LeakyReLU``, the
    ``nn.Dropout``, or both in any order, that follow it in the same ``nn.Sequential``; or with the residual
    sum and the activation, module or function, that follow it in a ``forward`` which ``torch.fx`` can trace.
    A convolution with bias and such an activation after it in an ``nn.Sequential`` adds both at once on a
    GPU. What is left is listed with its reason.

    layout: "channels_last" brings weights to that memory format, so that the first convolution brings images
    to it; "keep" changes nothing, and every op returns the layout that comes in, for which the kernels of a
    GPU convert contiguous images there and back; "auto" is channels_last for a network on a GPU, where the
    kernels work in it, and keep on the CPU, where ops compute in either. UserError for another.

    Results, gradients and running statistics stay the same to rounding; on a GPU dropout masks follow the
    same distribution and torch's seed, but are other masks than ``nn.Dropout`` draws. Parameters, buffers
    and state_dict keys are the same, so optimizers and checkpoints from before go on working.

    What a program can't do any more: look at a result between a norm and its activation, and, on a GPU or in
    compiled code, differentiate twice through a fused norm (a gradient penalty), which raises RuntimeError.
    """
    if layout not in ("auto", "channels_last", "keep"):
        raise UserError(f"layout is {layout!r}; choose auto, channels_last or keep")
    places = Counter(id(child) for parent in module.modules() for child in parent._modules.values())
    report = Acceleration([], [], [], _bring_to_layout(module, layout))
    followed: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for name, norm in list(_norms(module)):
        obstacle = _obstacle(norm, places[id(norm)])
        if obstacle is None and not name:
            obstacle = "it has no module around it that could hold another"
        if obstacle is not None:
            reasons[name] = obstacle
            continue
        followed[name] = [type(norm).__name__, *_fuse(module, name, norm)]
    _fuse_biases(module, places, report.biases)
    alone = [name for name, parts in followed.items() if len(parts) == 1]
    rewritten = rewriting.rewrite(module, alone)
    for name, parts in followed.items():
        line = f"{name}: {' + '.join([*parts, *rewritten.taken.get(name, ())])}"
        report.changed.append(
            f"{line} alone: {rewritten.why_not[name]}" if name in rewritten.why_not else line
        )
    report.left.extend(f"{name or '(root)'}: {reason}" for name, reason in reasons.items())
    return report


def _bring_to_layout(module: nn.Module, layout: Layout) -> str:
    """Convert the weights where that was asked for; what was done, in words."""
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    if layout == "channels_last" or (layout == "auto" and on_gpu):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among torch's overloads
        return "weights brought to channels-last"
    return "layout kept" if layout == "keep" else "layout kept, as the network is on the CPU"


def _fuse(module: nn.Module, name: str, norm: nn.Module) -> list[str]:
    """Put a fused norm in the place of ``norm``; what it took over in the same nn.Sequential, by class."""
    holder_name, _, key = name.rpartition(".")
    holder = module.get_submodule(holder_name)
    taken: list[nn.Module] = []
    slope, dropout = 1.0, None
    if rewriting.is_plain_sequential(holder):
        keys = list(holder._modules)
        after = keys[keys.index(key) + 1 :]
        taken = _followers([holder._modules[other] for other in after])
        for other, layer in zip(after, taken, strict=False):
            if _is_dropout(layer):
                dropout = holder._modules[other] = FusedDropout(layer.p).train(layer.training)
            else:
                slope = _slope(layer)
                holder._modules[other] = nn.Identity().train(layer.training)
    dropouts = () if dropout is None else (dropout,)
    holder._modules[key] = _become(norm, FUSED[type(norm)], slope, dropout=dropouts)
    return [type(layer).__name__ for layer in taken]


def _fuse_biases(module: nn.Module, places: Counter[int], made: list[str]) -> None:
    """Let convolutions with a bias take over the activation after them in an nn.Sequential."""
    for name, holder in list(module.named_modules()):
        if not rewriting.is_plain_sequential(holder):
            continue
        layers = list(holder._modules.items())
        for (key, conv), (other, activation) in zip(layers, layers[1:], strict=False):
            kind, slope = WITH_ACTIVATION.get(type(conv)), _slope(activation)
            watched = rewriting.hooked(conv) or rewriting.hooked(activation) or places[id(conv)] > 1
            if kind is None or slope is None or conv.bias is None or watched:
                continue
            holder._modules[key] = _become(conv, kind, slope)
            holder._modules[other] = nn.Identity().train(activation.training)
            full = f"{name}.{key}" if name else key
            made.append(f"{full}: {type(conv).__name__}'s bias + {type(activation).__name__}")

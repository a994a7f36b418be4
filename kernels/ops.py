"""The ops as PyTorch knows them: ``torch.ops.fastpix2pix.*``, for torch.compile, torch.export and autograd.

Registered with schemas, fake implementations and autograd, and opaque to a compiler: of a Triton kernel that
``torch.library.wrap_triton`` shows it, a graph holds arguments that are tensors and numbers, while ours take
tuples of both and constants in tuples (``Parameters``, ``Constants``), and their gateway (launch.py) chooses
block sizes from the sizes of the tensors that arrive. A compiler does not fuse into foreign kernels anyway.

Called eagerly, an op costs the host some 50 us more than its Python function (measured on an AMD EPYC), so
the functions here go through the registered op only where a graph is traced. The networks of this package
call ``kernels.norm_act`` and its neighbours, which also write into memory that is given.

Gradients can be taken once. Everything is registered on import.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpix2pix.kernels import cpu_norm, gan_loss, norm_act, tanh_l1
from fastpix2pix.kernels.reference import NormActConfig, check_gan_mode, check_halves, compute_dtype

NAMESPACE = "fastpix2pix"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # what it registers lives as long as it does
DEVICES = ("CPU", "CUDA")


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an op, and return it. run: on real tensors. fake: new tensors like the results of ``run``."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    for device in DEVICES:
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class _Gradients(torch.autograd.Function):
    """A backward pass that something wants to differentiate in its turn, which is refused when it does."""

    @staticmethod
    def forward(ctx, name, run, *arguments):
        ctx.name = name
        return _below_autograd(run, *arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{NAMESPACE}::{ctx.name} can be differentiated once; for a second derivative, as in a gradient "
            "penalty, keep PyTorch's own op: leave that network without accelerate"
        )


def _gradients(name: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """``run(*arguments)`` in the backward pass of the op called ``name``."""
    if torch.is_grad_enabled():  # with create_graph=True
        return _Gradients.apply(name, run, *arguments)
    return run(*arguments)


def _tracing() -> bool:
    """Whether a compiler or an exporter looks on, which should see the op and not what is in it."""
    return torch.compiler.is_compiling()


def _below_autograd(function: Callable[..., Any], *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return function(*arguments)


# ---------------------------------------------------------------------------------------------- norm_act


def _layout(x: Tensor) -> torch.memory_format:
    """Of the op's results: that of ``x``, channels-last where it is neither."""
    channels_last = torch.channels_last
    contiguous = x.is_contiguous() and not x.is_contiguous(memory_format=channels_last)
    return torch.contiguous_format if contiguous else channels_last


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _norm_act_run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rng: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    config = _config(*constants)
    if cpu_norm.covers(x, weight, config):
        made = cpu_norm.norm_act_forward(x, weight, bias, running_mean, running_var, config)
    else:
        made = norm_act.norm_act_forward(x, weight, bias, running_mean, running_var, rng, config)
    empty = x.new_empty((0, x.shape[1]), dtype=compute_dtype(x.dtype))
    saved = (empty.clone() if t is None else t for t in (made.mean, made.rstd))
    if not config.training:  # results of an op alias nothing; these may be views of running statistics
        saved = (t.clone(memory_format=torch.contiguous_format) for t in saved)
    return made.y.contiguous(memory_format=_layout(x)), *saved


def _norm_act_fake(x, weight, bias, running_mean, running_var, rng, norm, training, groups, *rest):
    saved = [x.new_empty((groups if norm else 0, x.shape[1]), dtype=compute_dtype(x.dtype)) for _ in range(2)]
    return _empty_like(x), *saved


def _norm_act_backward_run(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    needs_affine: bool,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    config = _config(*constants)
    if cpu_norm.covers(x, weight, config) and config.training:
        made = cpu_norm.norm_act_backward(dy, x, weight, bias, mean, rstd, config, needs_affine)
    else:
        saved = (mean, rstd) if config.norm else (None, None)
        made = norm_act.norm_act_backward(dy, None, x, weight, bias, *saved, rng, config, needs_affine)
    affine = (x.new_empty(0) if gradient is None else gradient for gradient in (made.dweight, made.dbias))
    return made.dx.contiguous(memory_format=_layout(x)), *affine


def _norm_act_backward_fake(dy, x, weight, bias, mean, rstd, rng, needs_affine, norm, *rest):
    has_weight = needs_affine and norm and weight is not None
    has_bias = has_weight or (needs_affine and not norm and bias is not None)
    affine = (
        torch.empty_like(t) if has else x.new_empty(0) for t, has in ((weight, has_weight), (bias, has_bias))
    )
    return _empty_like(x), *affine


_CONSTANTS = (
    "bool norm, bool training, SymInt groups, float eps, float momentum, bool unbiased, float slope, "
    "float dropout, int layer"
)


def _config(norm, training, groups, eps, momentum, unbiased, slope, dropout, layer) -> NormActConfig:
    return NormActConfig(norm, training, groups, eps, momentum, unbiased, slope, None, dropout, layer)


def _constants(config: NormActConfig) -> tuple[Any, ...]:
    """In the order of the schemas."""
    norm, training, groups, eps, momentum, unbiased, slope, _, dropout, layer = config
    return norm, training, groups, eps, momentum, unbiased, slope, dropout, layer


NORM_ACT = _register(
    "norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    f"Tensor? rng, {_CONSTANTS}) -> (Tensor y, Tensor mean, Tensor rstd)",
    _norm_act_run,
    _norm_act_fake,
)
NORM_ACT_BACKWARD = _register(
    "norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    f"Tensor? rng, bool needs_affine, {_CONSTANTS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _norm_act_backward_run,
    _norm_act_backward_fake,
)


class _NormAct(torch.autograd.Function):
    """run, run_backward: the registered ops, or their implementations."""

    @staticmethod
    def forward(run, run_backward, *arguments):
        return _below_autograd(run, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.run_backward, x, weight, bias, running_mean, running_var, rng, *ctx.constants = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, weight, bias, mean, rstd, rng)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, *_):
        nothing = (None,) * (6 + len(ctx.constants) - 3)
        if dy is None:
            return None, None, None, None, None, *nothing
        needs = ctx.needs_input_grad[3:5]
        dx, *affine = _gradients(
            "norm_act", ctx.run_backward, dy, *ctx.saved_tensors, any(needs), *ctx.constants
        )
        has_norm = ctx.constants[0]
        dweight = affine[0] if needs[0] and has_norm else None  # without a norm only the bias counts
        affine = dweight, affine[1] if needs[1] else None
        return None, None, dx, *affine, *nothing


def _norm_act_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    running = [t for t in arguments[3:5] if t is not None]
    if running and arguments[7]:  # training: what a dispatcher's own kernels do for tensors written in place
        torch.autograd.graph.increment_version(running)
    return _NormAct.apply(NORM_ACT, NORM_ACT_BACKWARD, *arguments)


LIBRARY.impl("norm_act", _norm_act_autograd, "Autograd")


def apply_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    config: NormActConfig,
    rng: Tensor | None = None,
) -> Tensor:
    """``dropout(activation(norm(x) * weight + bias))`` in the memory layout of ``x``; see ``reference``.

    x: (N, C, H, W), contiguous or channels-last; weight, bias, running_mean, running_var: (C,) or None.
    Running statistics are updated in place when training. rng: int64 (seed, step), for dropout. It is the
    registered op where a graph is traced.
    """
    tensors = (x, weight, bias, running_mean, running_var, rng)
    if _tracing():
        return NORM_ACT(*tensors, *_constants(config))[0]
    return _NormAct.apply(_norm_act_run, _norm_act_backward_run, *tensors, *_constants(config))[0]


# ---------------------------------------------------------------------------------------------- tanh_l1


def _tanh_l1_fake(x, bias, target):
    return torch.empty_like(x, memory_format=torch.channels_last), x.new_empty(
        (), dtype=compute_dtype(x.dtype)
    )


def _tanh_l1_backward_run(
    dfake: Tensor | None, dl1: Tensor | None, fake: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    dx, dbias = tanh_l1.tanh_l1_backward(dfake, dl1, fake, target, bias)
    return dx, fake.new_empty(0) if dbias is None else dbias


def _tanh_l1_backward_fake(dfake, dl1, fake, target, bias):
    dbias = fake.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(fake, memory_format=torch.channels_last), dbias


TANH_L1 = _register(
    "tanh_l1(Tensor x, Tensor? bias, Tensor target) -> (Tensor fake, Tensor l1)",
    lambda x, bias, target: tanh_l1.tanh_l1_forward(x, bias, target),
    _tanh_l1_fake,
)
TANH_L1_BACKWARD = _register(
    "tanh_l1_backward(Tensor? dfake, Tensor? dl1, Tensor fake, Tensor target, Tensor? bias) "
    "-> (Tensor dx, Tensor dbias)",
    _tanh_l1_backward_run,
    _tanh_l1_backward_fake,
)


class _TanhL1(torch.autograd.Function):
    @staticmethod
    def forward(x, bias, target):
        return _below_autograd(TANH_L1, x, bias, target)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[0], inputs[2], inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dfake, dl1):
        if dfake is None and dl1 is None:
            return None, None, None
        dx, dbias = _gradients("tanh_l1", TANH_L1_BACKWARD, dfake, dl1, *ctx.saved_tensors)
        return dx, dbias if ctx.needs_input_grad[1] else None, None


LIBRARY.impl("tanh_l1", _TanhL1.apply, "Autograd")

# --------------------------------------------------------------------------------------------- GAN losses


def _gan_loss_run(
    logits: Tensor, mode: str, real_first: bool, disc_factor: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    made = gan_loss.gan_loss(logits, mode=mode, real_first=real_first, disc_factor=disc_factor, scale=scale)
    return made.losses, made.disc_grad.contiguous(), made.gen_grad.contiguous()


def _gan_loss_fake(logits, mode, real_first, disc_factor, scale):
    check_gan_mode(mode)
    check_halves(logits)
    losses = logits.new_empty(4, dtype=compute_dtype(logits.dtype))
    return losses, logits.new_empty(logits.shape), logits.new_empty((logits.shape[0] // 2, *logits.shape[1:]))


def _gan_target_loss_run(
    logits: Tensor, real: bool, mode: str, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    loss, gradient = gan_loss.gan_target_loss(logits, real, mode=mode, scale=scale)
    return loss, gradient.contiguous()


def _gan_target_loss_fake(logits, real, mode, scale):
    check_gan_mode(mode)
    return logits.new_empty((), dtype=compute_dtype(logits.dtype)), logits.new_empty(logits.shape)


def _patchgan_loss_run(logits: Tensor, real: bool, mode: str) -> Tensor:
    return gan_loss.gan_target_loss(logits, real, mode=mode)[0]


GAN_LOSS = _register(
    "gan_loss(Tensor logits, str mode, bool real_first, float disc_factor, Tensor? scale) "
    "-> (Tensor losses, Tensor disc_grad, Tensor gen_grad)",
    _gan_loss_run,
    _gan_loss_fake,
)
GAN_TARGET_LOSS = _register(
    "gan_target_loss(Tensor logits, bool real, str mode, Tensor? scale) -> (Tensor loss, Tensor gradient)",
    _gan_target_loss_run,
    _gan_target_loss_fake,
)
PATCHGAN_LOSS = _register(
    "patchgan_loss(Tensor logits, bool real, str mode) -> Tensor",
    _patchgan_loss_run,
    lambda logits, real, mode: _gan_target_loss_fake(logits, real, mode, None)[0],
)


class _PatchGANLoss(torch.autograd.Function):
    """The gradient is taken again in the backward pass rather than kept: a 16-bit one must be scaled before
    it is rounded, and a loss scale arrives there.
    """

    @staticmethod
    def forward(run, run_backward, logits, real, mode):
        return _below_autograd(run, logits, real, mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.run_backward, logits, ctx.real, ctx.mode = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx, dloss):
        (logits,) = ctx.saved_tensors
        _, gradient = _gradients("patchgan_loss", ctx.run_backward, logits, ctx.real, ctx.mode, dloss)
        return None, None, gradient, None, None


LIBRARY.impl(
    "patchgan_loss",
    lambda logits, real, mode: _PatchGANLoss.apply(PATCHGAN_LOSS, GAN_TARGET_LOSS, logits, real, mode),
    "Autograd",
)


def apply_patchgan_loss(logits: Tensor, real: bool, mode: str) -> Tensor:
    """Mean loss of ``logits`` against real or fake, as a differentiable scalar; see ``PatchGANLoss``."""
    if _tracing():
        return PATCHGAN_LOSS(logits, real, mode)
    return _PatchGANLoss.apply(_patchgan_loss_run, _gan_target_loss_run, logits, real, mode)

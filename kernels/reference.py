"""Every op of the package in plain PyTorch: the specification, the CPU path and the baseline.

Images are (N, C, H, W) in channels-last memory format. Arithmetic happens in float32 (float64 for float64
input) whatever the storage type, and results are rounded once, when they are stored. Nothing here
synchronises with the host or branches on a tensor's value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------- precision


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which values that are stored as ``dtype`` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------- deep convolutions


def deep_conv_small(big: Tensor, weight: Tensor) -> Tensor:
    """A convolution with stride 2 and padding 1: (N, Cb, 2 h, 2 w) and (Cs, Cb, 4, 4) to (N, Cs, h, w)."""
    dtype = compute_dtype(big.dtype)
    return F.conv2d(big.to(dtype), weight.to(dtype), stride=2, padding=1).to(big.dtype)


def deep_conv_big(small: Tensor, weight: Tensor) -> Tensor:
    """The transposed one: (N, Cs, h, w) and (Cs, Cb, 4, 4) to (N, Cb, 2 h, 2 w)."""
    dtype = compute_dtype(small.dtype)
    return F.conv_transpose2d(small.to(dtype), weight.to(dtype), stride=2, padding=1).to(small.dtype)


def deep_conv_weight(small: Tensor, big: Tensor) -> Tensor:
    """The weight gradient of either, (Cs, Cb, 4, 4), from its two images, one of which is a gradient."""
    dtype = compute_dtype(small.dtype)
    patches = F.unfold(big.to(dtype), kernel_size=4, stride=2, padding=1)  # (N, Cb * 16, h * w)
    gradient = torch.einsum("nsp,nkp->sk", small.to(dtype).flatten(2), patches)
    gradient = gradient.view(small.shape[1], big.shape[1], 4, 4)
    return gradient.to(small.dtype, memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------- dropout

_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """First word of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    ``counter`` and ``key`` are int64 tensors holding 32-bit words that broadcast together; so is the result.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap modulo 2**64, as unsigned words would. c1, c3 and the keys keep what is above their 32
        # bits until the next round cuts it off.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 ^ c1 ^ k0) & _LOW, p1, (p0 >> 32 ^ c3 ^ k1) & _LOW, p0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0


def dropout_threshold(probability: float) -> int:
    """A value is dropped when its 32 random bits, read as an unsigned number, are below this."""
    return round(probability * 2**32)


def dropout_mask(x: Tensor, probability: float, rng: Tensor, layer: int) -> Tensor:
    """Inverted-dropout factors for ``x`` (N, C, H, W): 0 or 1 / (1 - probability), in the compute type.

    ``rng`` is an int64 tensor (seed, step) on the device of ``x``; ``layer`` separates the streams of the
    layers of one step. The element at channels-last position i draws the first word of
    Philox(key = seed, counter = (i, layer, low word of step, high word of step)).
    """
    n, c, h, w = x.shape
    index = torch.arange(x.numel(), device=x.device).view(n, h, w, c).permute(0, 3, 1, 2)
    seed, step = rng[0], rng[1]
    layer_word = torch.full((), layer, dtype=torch.int64, device=x.device)
    bits = philox(
        (index, layer_word, step & _LOW, step >> 32 & _LOW),
        (seed & _LOW, seed >> 32 & _LOW),
    )
    keep = bits >= dropout_threshold(probability)
    return keep.to(compute_dtype(x.dtype)) * (1.0 / (1.0 - probability))


# -------------------------------------------------------------------------------------------- norm_act


class NormActConfig(NamedTuple):
    """The constants of one normalisation + dropout + activation layer.

    norm: False means activation of ``x + bias`` only.
    training: statistics of the batch (running statistics are updated), or the running statistics.
    groups: statistics over each of so many equal slices of the batch: 1 is batch norm, N instance norm, 2
        the discriminator on [real; fake].
    unbiased: the running variance takes n / (n - 1) times the variance (torch) or the variance (Keras 3).
    slope: of the activation below zero: 0 is ReLU, 1 the identity, between them LeakyReLU.
    skip_slope: the same for the second copy; None when there is none.
    dropout: probability of zeroing a value before the activation.
    layer: the layer's number, so that each layer draws another dropout mask.
    """

    norm: bool = True
    training: bool = True
    groups: int = 1
    eps: float = 1e-5
    momentum: float = 0.1
    unbiased: bool = True
    slope: float = 0.0
    skip_slope: float | None = None
    dropout: float = 0.0
    layer: int = 0


class NormActForward(NamedTuple):
    """y and skip are (N, C, H, W); mean and rstd are (groups, C) in the compute type (None without norm)."""

    y: Tensor
    skip: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


class NormActBackward(NamedTuple):
    """dx like x; dweight and dbias (C,) in the type of the parameters, or None where there is none."""

    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None


def check_partials(partials: Tensor, x: Tensor) -> None:
    """Raise ValueError unless ``partials`` can be the partial sums of an image like ``x``."""
    n, c, h, w = x.shape
    fits = partials.ndim == 3 and partials.shape[0] and partials.shape[1:] == (n * h * w, c)
    if fits:
        of_sum, of_pixel, of_channel = partials.stride()
        fits = of_channel == 1 and of_pixel >= c and of_sum == n * h * w * of_pixel
    if not fits or partials.dtype != torch.float32:
        raise ValueError(
            f"partials are {partials.dtype} {tuple(partials.shape)} with strides {partials.stride()}; they "
            f"must be torch.float32 (S, {n * h * w}, {c}), contiguous or a slice of the channels of such"
        )


def add_partials(partials: Tensor, out: Tensor) -> Tensor:
    """``out`` (N, C, H, W), filled with the sum of ``partials``, (S, N * H * W, C) in float32, over S.

    Added in the order of S, and rounded once.
    """
    n, c, h, w = out.shape
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return out.copy_(total.view(n, h, w, c).permute(0, 3, 1, 2))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) as (groups, N // groups, C, H, W), a view."""
    return x.unflatten(0, (groups, x.shape[0] // groups))


_PER_CHANNEL = (1, 3, 4)  # the dimensions over which a grouped image's per-channel statistics are taken


def _spread(per_channel: Tensor) -> Tensor:
    """(groups, C) or (C,), reshaped to broadcast against a grouped image."""
    return per_channel.reshape(-1, 1, per_channel.shape[-1], 1, 1)


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    """The grouped image minus its mean."""
    return _grouped(x, mean.shape[0]).to(mean.dtype) - _spread(mean)


def _scale(rstd: Tensor, weight: Tensor | None) -> Tensor:
    """The factor of centred values, ready to broadcast."""
    return _spread(rstd if weight is None else rstd * weight)


def _before_activation(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: Tensor | None, rstd: Tensor | None
) -> Tensor:
    """Normalised, times weight, plus bias: (N, C, H, W) in the compute type; possibly ``x`` itself."""
    if centred is None:
        z = x.to(compute_dtype(x.dtype))
        return z if bias is None else z + bias.view(1, -1, 1, 1)
    if weight is None:
        return (centred * _spread(rstd)).flatten(0, 1)
    return torch.addcmul(_spread(bias), centred, _scale(rstd, weight)).flatten(0, 1)


def norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rng: Tensor | None,
    config: NormActConfig,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
    *,
    partials: Tensor | None = None,
) -> NormActForward:
    """``dropout(activation(norm(x) * weight + bias))``, and a second copy with another slope.

    x: (N, C, H, W) channels-last, a convolution's output. weight, bias: (C,) or None (not affine); without
    norm only ``bias`` counts. running_mean, running_var: (C,), updated in place group after group when
    training, or None. rng: see ``dropout_mask``. out, skip_out: where to write the two results, channel
    slices of channels-last buffers in the type of ``x``; None allocates.

    partials: (S, N * H * W, C) float32, contiguous or a slice of the channels of such, the partial sums of a
    convolution, pixels in the order N, H, W. ``x`` is then memory that their sum over S, rounded to its type,
    is written to first.

    A group of one value per channel (1x1 at batch 1) gives ``bias`` and a running variance that stays
    finite: there is no n - 1 to divide by. ValueError for partials that x does not fit.
    """
    if partials is not None:
        check_partials(partials, x)
        add_partials(partials, x)
    centred = mean = rstd = None
    if config.norm and config.training:
        mean = _grouped(x, config.groups).mean(_PER_CHANNEL, dtype=compute_dtype(x.dtype))
        centred = _centred(x, mean)
        var = centred.square().mean(_PER_CHANNEL)
        rstd = torch.rsqrt(var + config.eps)
        if running_mean is not None:
            n = x.numel() // (config.groups * x.shape[1])
            correction = n / (n - 1) if config.unbiased and n > 1 else 1.0
            for group in range(config.groups):
                running_mean.lerp_(mean[group].to(running_mean.dtype), config.momentum)
                running_var.lerp_((var[group] * correction).to(running_var.dtype), config.momentum)
    elif config.norm:
        mean = running_mean.to(compute_dtype(x.dtype)).expand(config.groups, -1)
        rstd = torch.rsqrt(running_var.to(mean.dtype) + config.eps).expand(config.groups, -1)
        centred = _centred(x, mean)

    z = _before_activation(x, weight, bias, centred, rstd)
    if config.dropout:
        z = z * dropout_mask(x, config.dropout, rng, config.layer)
    y = _store(F.leaky_relu(z, config.slope), x, out)
    skip = None if config.skip_slope is None else _store(F.leaky_relu(z, config.skip_slope), x, skip_out)
    return NormActForward(y, skip, mean, rstd)


def _store(value: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return value.to(like.dtype, memory_format=torch.channels_last)
    return out.copy_(value)


def norm_act_backward(
    dy: Tensor | None,
    dskip: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rng: Tensor | None,
    config: NormActConfig,
    needs_affine: bool = True,
    *,
    dy_partials: Tensor | None = None,
    dskip_partials: Tensor | None = None,
) -> NormActBackward:
    """Gradients of ``norm_act_forward`` from those of its two results, either of which may be None.

    dy and dskip may be channel slices of a larger gradient. The activation's sign and the dropout mask are
    computed again from ``x``, mean, rstd and the counter, which must be as they were in the forward pass.
    ``needs_affine=False`` leaves out dweight and dbias. dy_partials, dskip_partials: in place of dy and of
    dskip, as ``partials`` of ``norm_act_forward``; their sum is rounded to the type of ``x``.
    """
    if dy_partials is not None:
        check_partials(dy_partials, x)
        dy = add_partials(dy_partials, torch.empty_like(x, memory_format=torch.channels_last))
    if dskip_partials is not None:
        check_partials(dskip_partials, x)
        dskip = add_partials(dskip_partials, torch.empty_like(x, memory_format=torch.channels_last))
    centred = None if mean is None else _centred(x, mean)
    z = _before_activation(x, weight, bias, centred, rstd)
    dz = None
    for gradient, slope in ((dy, config.slope), (dskip, config.skip_slope)):
        if gradient is not None:  # that of leaky_relu: the gradient, times the slope where z is not positive
            part = torch.ops.aten.leaky_relu_backward(gradient.to(z.dtype), z, slope, False)
            dz = part if dz is None else dz.add_(part)
    if dz is None:
        dz = torch.zeros_like(z)
    if config.dropout:
        dz *= dropout_mask(x, config.dropout, rng, config.layer)

    if mean is None:
        dbias = dz.sum((0, 2, 3)).to(bias.dtype) if needs_affine and bias is not None else None
        return NormActBackward(dz.to(x.dtype, memory_format=torch.channels_last), None, dbias)

    dz = _grouped(dz, mean.shape[0])
    dweight = dbias = None
    if config.training or needs_affine:
        dz_sum = dz.sum(_PER_CHANNEL)
        dz_normalised_sum = (dz * centred).sum(_PER_CHANNEL) * rstd
    if needs_affine and weight is not None:
        dweight = dz_normalised_sum.sum(0).to(weight.dtype)
        dbias = dz_sum.sum(0).to(bias.dtype)
    if config.training:  # dz - mean(dz) - normalised * mean(dz * normalised)
        n = x.numel() // (mean.shape[0] * x.shape[1])
        dz -= _spread(dz_sum / n)
        dz.addcmul_(centred, _spread(dz_normalised_sum * rstd / n), value=-1)
    dx = dz.mul_(_scale(rstd, weight)).flatten(0, 1)
    return NormActBackward(dx.to(x.dtype, memory_format=torch.channels_last), dweight, dbias)


# -------------------------------------------------------------------------------------------- GAN loss


class GanLoss(NamedTuple):
    """losses: (4,) disc_loss, gen_gan_loss, disc_real_loss, disc_fake_loss, the last two without the factor;
    float32 (float64 for float64).

    disc_grad: gradient of disc_loss with respect to all logits. gen_grad: gradient of gen_gan_loss with
    respect to the logits of the fake half. Both times ``scale``, in the type of the logits. bias_grad: (1,)
    gradient of disc_loss with respect to the bias, times ``scale``, in the type of the losses; None without.
    """

    losses: Tensor
    disc_grad: Tensor
    gen_grad: Tensor
    bias_grad: Tensor | None = None


def check_gan_mode(mode: str) -> None:
    """Raise ValueError for a loss that is not implemented."""
    if mode not in ("vanilla", "lsgan"):
        raise ValueError(f"gan_mode is {mode!r}; it can be 'vanilla' or 'lsgan'")


def check_halves(logits: Tensor) -> None:
    """Raise ValueError for logits that cannot be those of as many real as fake images."""
    if logits.shape[0] % 2:
        raise ValueError(f"a batch of {logits.shape[0]} logit maps is not [real; fake] in equal parts")


def _criterion(logits: Tensor, bias: Tensor | None, real: bool, mode: str) -> tuple[Tensor, Tensor]:
    """Mean loss of ``logits + bias`` against real or fake, and its gradient, in the compute type.

    vanilla is binary cross-entropy with logits, max(x, 0) - x z + log(1 + exp(-|x|)); lsgan is the mean
    squared distance from 1 or 0 (Mao et al., 2017). ValueError for another mode.
    """
    check_gan_mode(mode)
    x = logits.to(compute_dtype(logits.dtype))
    if bias is not None:
        x = x + bias
    target = 1.0 if real else 0.0
    if mode == "vanilla":
        loss = x.clamp(min=0) - x * target + torch.log1p(torch.exp(-x.abs()))
        # sigmoid(x) - 1 would lose all digits where the logit is large, and 16-bit gradients are scaled up.
        gradient = -torch.sigmoid(-x) if real else torch.sigmoid(x)
        return loss.mean(), gradient / x.numel()
    return (x - target).square().mean(), 2 * (x - target) / x.numel()


def gan_loss(
    logits: Tensor,
    *,
    mode: str = "vanilla",
    real_first: bool = True,
    disc_factor: float = 1.0,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> GanLoss:
    """PatchGAN losses of both players, with their gradients (Isola et al., 2017, section 3.1).

    logits: (2 B, 1, h, w), the halves being [real; fake], or [fake; real] where ``real_first`` is False.
    disc_loss is ``disc_factor`` times (real + fake): 1 in the TensorFlow tutorial, 1/2 in
    pytorch-CycleGAN-and-pix2pix. bias: (1,) in the type of the losses, that of a last convolution which has
    left it out. scale: float32 scalar tensor that multiplies the gradients (fp16). ValueError for another
    mode or an odd batch.
    """
    check_halves(logits)
    first, second = logits.chunk(2)
    real, fake = (first, second) if real_first else (second, first)
    real_loss, real_grad = _criterion(real, bias, True, mode)
    fake_loss, fake_grad = _criterion(fake, bias, False, mode)
    gen_loss, gen_grad = _criterion(fake, bias, True, mode)
    halves = (real_grad, fake_grad) if real_first else (fake_grad, real_grad)
    disc_grad = torch.cat(halves) * disc_factor
    if scale is not None:
        disc_grad, gen_grad = disc_grad * scale, gen_grad * scale
    losses = torch.stack((disc_factor * (real_loss + fake_loss), gen_loss, real_loss, fake_loss))
    bias_grad = None if bias is None else disc_grad.sum().to(bias.dtype).reshape(1)
    return GanLoss(losses, disc_grad.to(logits.dtype), gen_grad.to(logits.dtype), bias_grad)


def gan_target_loss(
    logits: Tensor,
    real: bool,
    *,
    mode: str = "vanilla",
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of ``logits + bias`` against one target (a float32 scalar, float64 for float64), and its gradient
    times ``scale``, in the type of the logits.
    """
    loss, gradient = _criterion(logits, bias, real, mode)
    if scale is not None:
        gradient = gradient * scale
    return loss, gradient.to(logits.dtype)


# ------------------------------------------------------------------------------------- tanh and L1 loss


def tanh_l1_forward(
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``fake = tanh(x + bias)`` and the mean absolute difference from ``target``.

    x: (N, C, H, W) channels-last, the last transposed convolution without its bias. out: where the fake
    image goes, a channel slice of the discriminator's input, in the type of ``x``; None allocates.
    Returns the image and a float32 scalar (float64 for float64). The loss is that of the image as stored.
    """
    z = x.to(compute_dtype(x.dtype))
    fake = _store(torch.tanh(z if bias is None else z + bias.view(1, -1, 1, 1)), x, out)
    return fake, (fake.to(z.dtype) - target.to(z.dtype)).abs().mean()


def tanh_l1_backward(
    dfake: Tensor | None, dl1: Tensor | None, fake: Tensor, target: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``x`` and ``bias`` from those of the image and of the loss, either of which may be None.

    dfake: (N, C, H, W), possibly a channel slice. dl1: scalar in the type of the loss.
    """
    fake_value = fake.to(compute_dtype(fake.dtype))
    gradient = torch.zeros_like(fake_value) if dfake is None else dfake.to(fake_value.dtype)
    if dl1 is not None:
        gradient = gradient + (fake_value - target).sign() * (dl1 / fake.numel())
    dx = gradient * (1 - fake_value) * (1 + fake_value)  # 1 - square would cancel where tanh saturates
    dbias = None if bias is None else dx.sum((0, 2, 3)).to(bias.dtype)
    return dx.to(fake.dtype, memory_format=torch.channels_last), dbias


# --------------------------------------------------------------------------------------- losses of a step


def write_loss_row(rows: Tensor, written: Tensor, terms: Sequence[Tensor], lambda_l1: Tensor) -> None:
    """Write a step's losses into the ring buffer ``rows``, (capacity, 1 + terms) float32, at row ``written``
    modulo capacity, and count ``written``, (1,) int64, up.

    terms: scalars, the generator's GAN loss, its L1 loss, and whatever else. A row is the generator's total
    ``terms[0] + lambda_l1 * terms[1]``, then the terms.
    """
    total = terms[0] + lambda_l1 * terms[1]
    row = torch.stack([loss.to(rows.dtype) for loss in (total, *terms)]).unsqueeze(0)
    rows.index_copy_(0, written % len(rows), row)
    written.add_(1)


# ------------------------------------------------------------------------------------------------ Adam


def split_master(master: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """A float32 master as its rounding to ``dtype`` (bfloat16 or float16) and an int16 remainder, from which
    it can be joined.

    bfloat16: exactly. The two add up as integers: the weight's bits, shifted up by 16, plus the remainder are
    the master's bits. So a tie rounds away from zero, where a conversion rounds to even. Every NaN becomes
    the same one.

    float16: exactly from 2**-16 on, as its 11 digits leave 13 of float32's 24 to the remainder. Nearer to
    zero, where float16's steps become no finer, the master is rounded to a multiple of 2**-39: an error no
    larger than that of float32 itself at 2**-16. What overflows is infinite.
    """
    if dtype == torch.float16:
        near_zero = (master * 2.0**39 + 0.5).floor() * 2.0**-39
        master = torch.where(master.abs() < 2.0**-16, near_zero, master)
        working = master.to(dtype)
        rounded = working.to(torch.float32)
        rest = (master - rounded) / _remainder_unit(rounded)
        return working, torch.where(rounded.isfinite(), rest, 0).to(torch.int16)
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(working: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master that ``split_master`` split."""
    if working.dtype == torch.float16:
        rounded = working.to(torch.float32)
        return torch.where(remainder == 0, rounded, rounded + remainder * _remainder_unit(rounded))
    return ((working.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def _remainder_unit(rounded: Tensor) -> Tensor:
    """What 1 in the remainder of a float16 weight stands for: 2**-15 of the weight's last digit."""
    binade = rounded.abs().clamp(min=2.0**-14).view(torch.int32) & 0x7F800000
    return binade.view(torch.float32) * 2.0**-25


def adam_step(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    working: Tensor | None,
    *,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    keras_eps: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One Adam update (Kingma & Ba, 2015) of one tensor, in place; ``step`` counts from 1 at the first.

    master, exp_avg, exp_avg_sq: fp32 (or fp64), the same layout. grad: any float type. working: the copy
    that the network computes with, or None where that is the master itself. lr: scalar tensor; step: int64
    scalar tensor. grad_scale divides the gradient; a non-zero ``found_inf`` leaves everything as it was.

    With c_i = 1 - beta_i ** step, torch's form is  w -= lr / c_1 * m / (sqrt(v) / sqrt(c_2) + eps),  Keras's
    w -= lr * sqrt(c_2) / c_1 * m / (sqrt(v) + eps)  ("epsilon hat" in the paper, end of section 2).
    """
    g = grad.to(master.dtype)
    if grad_scale is not None:
        g = g / grad_scale
    m = torch.lerp(exp_avg, g, 1 - beta1)
    v = exp_avg_sq * beta2 + g * g * (1 - beta2)
    t = step.to(torch.float64)
    c1 = 1 - torch.pow(beta1, t)
    root_c2 = torch.sqrt(1 - torch.pow(beta2, t))
    if keras_eps:
        alpha, denominator = lr * root_c2 / c1, v.sqrt() + eps
    else:
        alpha, denominator = lr / c1, v.sqrt() / root_c2.to(v.dtype) + eps
    updated = (master - alpha.to(master.dtype) * m / denominator, m, v)
    for tensor, value in zip((master, exp_avg, exp_avg_sq), updated, strict=True):
        tensor.copy_(value if found_inf is None else torch.where(found_inf != 0, tensor, value))
    if working is not None:
        working.copy_(master)

"""Each op of ``fastpix2pix.kernels``, there and back, beside its reference and what PyTorch has for it.

On a GPU the calls are replayed from a CUDA graph, so that the host's time does not count, on inputs that go
round so that the L2 cache has forgotten them; a benchmark's time is that of all of them, and extra_info says
microseconds per call, GB/s (for all by the bytes that our launches declare) and their share of the copy
bandwidth measured in the same session. On the CPU they are simply called.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import ceil

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.conftest import DEVICE
from benchmarks.roofline import copy_bandwidth
from benchmarks.timing import captured, clock
from fastpix2pix.kernels import adam, deep_conv, deep_update, launch, reference
from fastpix2pix.kernels.adam import AdamClock, AdamForm, AdamTensors
from fastpix2pix.kernels.cpu_conv import conv2d, conv_transpose2d
from fastpix2pix.kernels.gan_loss import gan_loss
from fastpix2pix.kernels.norm_act import norm_act
from fastpix2pix.kernels.reference import NormActConfig
from fastpix2pix.kernels.tanh_l1 import tanh_l1
from fastpix2pix.training.deep_choice import solve_by_library
from fastpix2pix.training.precision import WORKING_TYPES, choose_precision

ON_GPU = DEVICE.type == "cuda"
DTYPE = WORKING_TYPES[choose_precision(None, DEVICE)]
MAX_INPUTS = 64

pytestmark = pytest.mark.benchmark(timer=clock, max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=3)

Calls = dict[str, Callable[[], object]]
"""The same work, on the same inputs, by ..."""

OURS, REFERENCE, TORCH, COMPILED = "fastpix2pix", "reference", "torch", "torch.compile"
DEFAULT_ADAM, FUSED_ADAM = "torch, default", "torch, fused"
STORED = "the library's gradient, stored, then our Adam"


def image(n: int, channels: int, side: int, *, grad: bool = False) -> Tensor:
    values = torch.randn(n, channels, side, side, device=DEVICE, dtype=DTYPE)
    return values.to(memory_format=torch.channels_last).requires_grad_(grad)


def there_and_back(function: Callable, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> object:
    """Gradients of what ``function`` makes of ``inputs``, by these; upstream: those of its results."""
    return torch.autograd.grad(function(*inputs), inputs, upstream)


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# ------------------------------------------------------------------------------------------------- calls


def torch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, slot: Tensor, config: NormActConfig
) -> tuple[Tensor, ...]:
    y = F.batch_norm(x, mean, var, weight, bias, True, config.momentum, config.eps)
    y = F.leaky_relu(F.dropout(y, config.dropout) if config.dropout else y, config.slope)
    slot.copy_(y.detach())  # torch.cat's share
    return (y,) if config.skip_slope is None else (y, y)


def norm_act_calls(channels: int, side: int, config: NormActConfig) -> Calls:
    """Batch norm, dropout and activation, of which one copy lands in the skip connection's buffer."""
    x = image(1, channels, side, grad=True)
    weight, bias = (torch.randn(channels, device=DEVICE, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    rng = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    slot = image(1, 2 * channels, side)[:, channels:]
    dy, dskip = image(1, channels, side), image(1, channels, side)
    slots, upstream = ((slot, None), (dy,)) if config.skip_slope is None else ((None, slot), (dy, dskip))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        out, skip_out = slots
        return norm_act(x, weight, bias, mean, var, config=config, rng=rng, out=out, skip_out=skip_out)

    @torch.no_grad()
    def by_reference() -> object:
        made = reference.norm_act_forward(x, weight, bias, mean, var, rng, config, *slots)
        gradients = (dy, None) if config.skip_slope is None else (dy, dskip)
        return reference.norm_act_backward(*gradients, x, weight, bias, made.mean, made.rstd, rng, config)

    def by(function: Callable) -> Callable[[], object]:
        def call(x: Tensor, weight: Tensor, bias: Tensor) -> object:
            return function(x, weight, bias, mean, var, slot, config)

        return partial(there_and_back, call, inputs, upstream)

    inputs = [x, weight, bias]
    return {
        OURS: partial(there_and_back, ours, inputs, upstream),
        REFERENCE: by_reference,
        TORCH: by(torch_norm_act),
        COMPILED: by(lambda *inputs: compiled(torch_norm_act)(*inputs)),
    }


def torch_gan_losses(logits: Tensor, ones: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    real, fake = logits.chunk(2)
    bce = F.binary_cross_entropy_with_logits
    return bce(real, ones) + bce(fake, zeros), bce(fake, ones)


def gan_loss_calls() -> Calls:
    """All losses of [real; fake] logits, and both players' gradients."""
    logits = torch.randn(2, 1, 30, 30, device=DEVICE, requires_grad=True)
    ones, zeros = torch.ones(1, 1, 30, 30, device=DEVICE), torch.zeros(1, 1, 30, 30, device=DEVICE)

    def by_torch() -> object:
        disc, gen = torch_gan_losses(logits, ones, zeros)
        return torch.autograd.grad(disc, logits, retain_graph=True), torch.autograd.grad(gen, logits)

    values = logits.detach()
    return {OURS: partial(gan_loss, values), REFERENCE: partial(reference.gan_loss, values), TORCH: by_torch}


def torch_pixel_loss(x: Tensor, bias: Tensor, target: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    fake = torch.tanh(x + bias.to(x.dtype).view(1, -1, 1, 1))
    slot.copy_(fake.detach())  # torch.cat's share
    return fake, F.l1_loss(fake.float(), target.float())


def tanh_l1_calls() -> Calls:
    """tanh into the discriminator's input, L1 loss, and the backward pass of both."""
    x, target, dfake = image(1, 3, 256, grad=True), image(1, 3, 256), image(1, 3, 256)
    bias = torch.zeros(3, device=DEVICE, requires_grad=True)
    slot = image(2, 6, 256)[1:, 3:]
    upstream = (dfake, torch.tensor(100.0, device=DEVICE))

    @torch.no_grad()
    def by_reference() -> object:
        fake, _ = reference.tanh_l1_forward(x, bias, target, slot)
        return reference.tanh_l1_backward(*upstream, fake, target, bias)

    def by(function: Callable) -> Callable[[], object]:
        return partial(there_and_back, lambda x, bias: function(x, bias, target, slot), [x, bias], upstream)

    return {
        OURS: by(tanh_l1),
        REFERENCE: by_reference,
        TORCH: by(torch_pixel_loss),
        COMPILED: by(lambda *inputs: compiled(torch_pixel_loss)(*inputs)),
    }


def adam_tensors(count: int) -> tuple[AdamTensors, AdamForm, AdamClock]:
    """As the optimizer lays them out here."""
    master, exp_avg, exp_avg_sq = (torch.zeros(count, device=DEVICE) for _ in range(3))
    working = None if torch.float32 == DTYPE else torch.zeros(count, device=DEVICE, dtype=DTYPE)
    split = working is not None and launch.use_triton(working)
    remainder = torch.zeros_like(working, dtype=torch.int16) if split else None
    clock = AdamClock.create(DEVICE)
    clock.lr.fill_(2e-4)
    whole = None if split else master
    tensors = AdamTensors(exp_avg, exp_avg_sq, whole, working, remainder)
    return tensors, AdamForm(0.5, 0.999, 1e-7, False), clock


def updated(parameter: AdamTensors) -> Tensor:
    return parameter.working if parameter.master is None else parameter.master


def adam_calls(count: int) -> Calls:
    """One update of ``count`` weights and of their 16-bit copies, where the networks compute with such."""
    parameter, form, ticking = adam_tensors(count)
    exp_avg, exp_avg_sq, _, working, _ = parameter
    master, gradient = torch.zeros(count, device=DEVICE), torch.randn(count, device=DEVICE, dtype=DTYPE)
    weight = torch.zeros(count, device=DEVICE, requires_grad=True)
    weight.grad = gradient.float()

    def ours() -> Tensor:
        adam.advance(adam.Tick(ticking, form))
        adam.update([parameter], [gradient], ticking, form)
        return updated(parameter)

    def by_reference() -> Tensor:
        ticking.step.add_(1)
        now = {"lr": ticking.lr, "step": ticking.step}
        reference.adam_step(master, gradient, exp_avg, exp_avg_sq, working, **now, **form._asdict())
        return master

    def by(**choice: bool) -> Callable[[], Tensor]:
        optimizer = torch.optim.Adam([weight], 2e-4, (0.5, 0.999), 1e-7, capturable=ON_GPU, **choice)

        def call() -> Tensor:
            optimizer.step()
            if working is not None:
                working.copy_(weight.detach())  # autocast's share
            return weight

        return call

    return {OURS: ours, REFERENCE: by_reference, DEFAULT_ADAM: by(foreach=ON_GPU), FUSED_ADAM: by(fused=True)}


def deep_update_calls(channels_small: int, channels_big: int, side: int) -> Calls:
    """A deep layer's weight gradient and its Adam: in one pass, and with the gradient stored in between."""
    small, big = image(1, channels_small, side), image(1, channels_big, 2 * side)
    problem = deep_conv.problem_of("weight", small.shape, channels_big, DTYPE)
    parameter, form, ticking = adam_tensors(channels_small * channels_big * 16)
    rule = (ticking, form)

    def ours() -> Tensor:
        adam.advance(adam.Tick(*rule))
        deep_update.update(small, big, parameter, *rule)
        return updated(parameter)

    def stored() -> Tensor:
        adam.advance(adam.Tick(*rule))
        gradient = solve_by_library(problem, small, big).permute(0, 2, 3, 1).reshape(-1)
        adam.update([parameter], [gradient], *rule)
        return updated(parameter)

    return {OURS: ours, STORED: stored}


def conv_calls(transposed: bool, channels_in: int, channels_out: int, side: int) -> Calls:
    """A convolution and both its gradients."""
    x = image(1, channels_in, side, grad=True)
    shape = (channels_in, channels_out) if transposed else (channels_out, channels_in)
    weight = torch.randn(*shape, 4, 4, device=DEVICE, dtype=DTYPE).to(memory_format=torch.channels_last)
    dy = image(1, channels_out, 2 * side if transposed else side // 2)
    ours = conv_transpose2d if transposed else partial(conv2d, stride=2)
    theirs = partial(F.conv_transpose2d if transposed else F.conv2d, stride=2, padding=1)
    inputs = [x, weight.requires_grad_()]
    return {
        side: partial(there_and_back, run, inputs, (dy,)) for side, run in ((OURS, ours), (TORCH, theirs))
    }


# ------------------------------------------------------------------------------------------------- suite

DOWN = NormActConfig(eps=1e-3, momentum=0.01, unbiased=False, slope=0.3, skip_slope=0.3)
UP = NormActConfig(eps=1e-3, momentum=0.01, unbiased=False, slope=0.0, dropout=0.5)
EVERY_SIDE = (OURS, REFERENCE, TORCH, COMPILED)

CASES = {
    "norm_act down 64x64x128": (partial(norm_act_calls, 128, 64, DOWN), EVERY_SIDE),
    "norm_act down 16x16x512": (partial(norm_act_calls, 512, 16, DOWN), EVERY_SIDE),
    "norm_act up 8x8x512": (partial(norm_act_calls, 512, 8, UP), EVERY_SIDE),
    # Not compiled: compiled code frees what it saved after one backward pass, and here are two.
    "gan_loss 30x30": (gan_loss_calls, (OURS, REFERENCE, TORCH)),
    "tanh_l1 256x256": (tanh_l1_calls, EVERY_SIDE),
    "adam 512x512x4x4": (partial(adam_calls, 512 * 512 * 16), (OURS, REFERENCE, DEFAULT_ADAM, FUSED_ADAM)),
    "weight gradient and adam 4x4x512": (partial(deep_update_calls, 512, 512, 4), (OURS, STORED)),
    "weight gradient and adam 8x8x512": (partial(deep_update_calls, 512, 512, 8), (OURS, STORED)),
}
CONVOLUTIONS = {
    "conv 128x128, 64 to 128": partial(conv_calls, False, 64, 128, 128),
    "conv 8x8, 512 to 512": partial(conv_calls, False, 512, 512, 8),
    "transposed conv 4x4, 1024 to 512": partial(conv_calls, True, 1024, 512, 4),
    "transposed conv 64x64, 256 to 64": partial(conv_calls, True, 256, 64, 64),
}


def parameters() -> list:
    return [
        pytest.param(name, side, marks=[pytest.mark.gpu] if side == COMPILED else [], id=f"{name}-{side}")
        for name, (_, its_sides) in CASES.items()
        for side in its_sides
    ]


@pytest.mark.parametrize(("name", "side"), parameters())
def test_kernel(benchmark, name, side):
    benchmark.group = f"kernel, {str(DTYPE).removeprefix('torch.')}: {name}"
    make, _ = CASES[name]
    if not ON_GPU:
        benchmark(make()[side])
        return
    moved = declared_bytes(make()[OURS])
    l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    count = min(1 + ceil(2 * l2 / moved), MAX_INPUTS)
    benchmark(captured([make()[side] for _ in range(count)]))
    seconds = benchmark.stats.stats.median / count
    benchmark.extra_info |= {
        "us_per_call": 1e6 * seconds,
        "gb_per_s": moved / seconds / 1e9,
        "share_of_copy_bandwidth": moved / seconds / copy_bandwidth(DEVICE),
    }


@pytest.mark.parametrize("side", [OURS, TORCH])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.skipif(ON_GPU, reason="on a GPU our convolution is PyTorch's own")
def test_convolution(benchmark, name, side):
    benchmark.group = name
    benchmark(CONVOLUTIONS[name]()[side])


def declared_bytes(call: Callable[[], object]) -> int:
    """Of all launches of a call, each operand of a launch counted once."""
    launches: list[launch.Launch] = []
    with launch.observed(launches.append, run=False):
        call()
    return sum(made.bytes_moved for made in launches)

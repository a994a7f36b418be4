"""norm_act: the reference against PyTorch's own layers, the kernels against the reference in float64.

Without a GPU the kernels run in Triton's interpreter, whose time goes by programs: channels are fewer than in
the networks where those would make many.
"""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from address_recorder import recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import assert_stored
from torch import Tensor
from torch.nn import functional as F

from fastpix2pix.kernels import images, launch, reference
from fastpix2pix.kernels import norm_act as kernels
from fastpix2pix.kernels.norm_act import norm_act
from fastpix2pix.kernels.reference import NormActConfig, dropout_mask

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RNG = torch.tensor([-(2**40) - 5, 2**33 + 9])


class Case(NamedTuple):
    """Inputs of one layer, in the types of a network that computes in the type of ``x``."""

    x: Tensor
    dy: Tensor
    dskip: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    config: NormActConfig

    def to(self, device: str, dtype: torch.dtype | None = None) -> "Case":
        """A copy elsewhere; everything in ``dtype`` if that is given."""
        fields = (t.to(device, dtype or t.dtype, copy=True) if isinstance(t, Tensor) else t for t in self)
        return Case(*fields)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    config: NormActConfig,
    *,
    affine: bool = True,
    bias_only: bool = False,
    running: bool = True,
    before: int = 0,
    after: int = 0,
    mean: float = 0.0,
    seed: int = 0,
) -> Case:
    """Gradients are slices of buffers with channels ``before`` and ``after`` them."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape

    def image(before=0, after=0, mean=0.0):
        values = torch.randn((n, h, w, before + c + after), generator=generator, dtype=torch.float64) + mean
        return values.to(dtype).permute(0, 3, 1, 2)[:, before : before + c]

    def row(low=-1.0):
        kind = reference.compute_dtype(dtype)
        return torch.empty(c, dtype=kind).uniform_(low, 1.5, generator=generator)

    x, dy = image(mean=mean), image(before, after)
    dskip = None if config.skip_slope is None else image(after, before)
    weight, bias, running_mean, running_var = row(), row(), row(), row(0.5)
    return Case(
        x,
        dy,
        dskip,
        weight if affine else None,
        bias if affine or bias_only else None,
        running_mean if running else None,
        running_var if running else None,
        config,
    )


def run(ops, case: Case, rng: Tensor | None, out=None, skip_out=None, needs_affine=True) -> dict:
    """Everything that forward and backward of ``ops`` compute, by name. Changes the running statistics."""
    x, dy, dskip, weight, bias, running_mean, running_var, config = case
    forward = ops.norm_act_forward(x, weight, bias, running_mean, running_var, rng, config, out, skip_out)
    backward = ops.norm_act_backward(
        dy, dskip, x, weight, bias, forward.mean, forward.rstd, rng, config, needs_affine
    )
    running = {"running_mean": running_mean, "running_var": running_var}
    return {**forward._asdict(), **backward._asdict(), **running}


def check(case: Case, device: str, out=None, skip_out=None, needs_affine=True) -> dict:
    """Kernels on ``device`` against the reference in float64; returns what the kernels computed."""
    actual = run(kernels, case.to(device), RNG.to(device), out, skip_out, needs_affine)
    expected = run(reference, case.to("cpu", torch.float64), RNG, needs_affine=needs_affine)
    for name, exact in expected.items():
        assert (actual[name] is None) == (exact is None), name
        if exact is None:
            continue
        wide = actual[name].dtype == torch.float64
        # Sums lose digits near zero: inputs have a spread of 1, and dx is a difference times rstd.
        terms = expected["rstd"] if name == "dx" and expected["rstd"] is not None else exact
        size = max(terms.abs().max().item(), exact.abs().max().item(), 1.0)
        try:
            assert_stored(actual[name], exact, slack=(1e-13 if wide else 1e-6) * size)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        assert actual[name].dtype == (
            case.x.dtype if exact.ndim == 4 else reference.compute_dtype(case.x.dtype)
        )
    return actual


# ------------------------------------------------------------------------------- reference against PyTorch


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_reference_is_batch_norm_and_leaky_relu(training, groups, affine, slope):
    config = NormActConfig(
        training=training, groups=groups, eps=1e-3, momentum=0.07, slope=slope, skip_slope=0.2, dropout=0.4
    )
    case = make((4, 5, 6, 3), torch.float64, config, affine=affine)
    actual = run(reference, case, RNG)

    again = make((4, 5, 6, 3), torch.float64, config, affine=affine)
    leaves = [t.requires_grad_() for t in (again.x, again.weight, again.bias) if t is not None]
    z = torch.cat(
        [
            F.batch_norm(
                part, again.running_mean, again.running_var, again.weight, again.bias, training, 0.07, 1e-3
            )
            for part in again.x.chunk(groups)
        ]
    )
    z = z * dropout_mask(again.x, 0.4, RNG, 0)
    y, skip = F.leaky_relu(z, slope), F.leaky_relu(z, 0.2)
    gradients = torch.autograd.grad((y, skip), leaves, (again.dy, again.dskip))
    expected = {"y": y, "skip": skip, "running_mean": again.running_mean, "running_var": again.running_var}
    expected.update(zip(("dx", "dweight", "dbias"), gradients, strict=False))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value.detach(), rtol=1e-12, atol=1e-12)
    assert affine or actual["dweight"] is actual["dbias"] is None


def test_reference_is_instance_norm():
    config = NormActConfig(groups=3, slope=0.2)
    case = make((3, 4, 5, 7), torch.float64, config, running=False)
    actual = run(reference, case, None)
    x = case.x.clone().requires_grad_()
    y = F.leaky_relu(F.instance_norm(x, weight=case.weight, bias=case.bias), 0.2)
    torch.testing.assert_close(actual["y"], y.detach(), rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(y, x, case.dy)
    torch.testing.assert_close(actual["dx"], dx, rtol=1e-12, atol=1e-12)


def test_reference_without_norm_is_bias_and_activation():
    case = make(
        (2, 4, 5, 7), torch.float64, NormActConfig(norm=False, slope=0.2), affine=False, bias_only=True
    )
    actual = run(reference, case, None)
    x, bias = case.x.clone().requires_grad_(), case.bias.clone().requires_grad_()
    y = F.leaky_relu(x + bias.view(1, -1, 1, 1), 0.2)
    dx, dbias = torch.autograd.grad(y, (x, bias), case.dy)
    for name, value in {"y": y.detach(), "dx": dx, "dbias": dbias}.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-13, atol=1e-13)
    assert actual["mean"] is actual["rstd"] is actual["dweight"] is None


def test_biased_running_variance_is_the_variance(triton_device):
    """Keras 3 keeps the biased variance, torch n / (n - 1) times that."""
    for ops, device in ((reference, "cpu"), (kernels, triton_device)):
        for unbiased in (False, True):
            config = NormActConfig(momentum=1.0, unbiased=unbiased)
            case = make((1, 3, 2, 3), torch.float32, config).to(device)
            run(ops, case, None)
            expected = case.x.var((0, 2, 3), unbiased=unbiased)
            torch.testing.assert_close(case.running_var, expected, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------ kernels: the networks

ENCODER = NormActConfig(eps=1e-3, momentum=0.01, unbiased=False, slope=0.3, skip_slope=0.3)
DECODER = ENCODER._replace(slope=0.0, skip_slope=None)
DISCRIMINATOR = NormActConfig(slope=0.2, groups=2)
NETWORKS = {
    "down1": ((1, 4, 128, 128), ENCODER._replace(norm=False)),
    "down2": ((1, 8, 64, 64), ENCODER),
    "down3": ((1, 32, 32, 32), ENCODER._replace(slope=0.2, skip_slope=0.0)),
    "down4": ((1, 48, 16, 16), ENCODER),
    "down5": ((1, 64, 8, 8), ENCODER),
    "down6": ((1, 64, 4, 4), ENCODER),
    "down7": ((1, 512, 2, 2), ENCODER),
    "down8": ((1, 512, 1, 1), ENCODER._replace(skip_slope=None)),
    "down8 without norm": ((1, 512, 1, 1), NormActConfig(norm=False, slope=0.0)),
    "up1": ((1, 128, 2, 2), DECODER._replace(dropout=0.5, layer=0)),
    "up2": ((1, 32, 4, 4), DECODER._replace(dropout=0.5, layer=1)),
    "up3": ((1, 32, 8, 8), DECODER._replace(dropout=0.5, layer=2)),
    "up4": ((1, 32, 16, 16), DECODER._replace(dropout=0.5, layer=3)),
    "up7": ((1, 4, 128, 128), DECODER),
    "discriminator1": ((2, 4, 128, 128), DISCRIMINATOR._replace(norm=False)),
    "discriminator3": ((2, 16, 32, 32), DISCRIMINATOR),
    "discriminator4": ((2, 16, 31, 31), DISCRIMINATOR),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", NETWORKS)
def test_layers_of_the_networks(triton_device, layer, dtype):
    shape, config = NETWORKS[layer]
    case = make(
        shape, dtype, config, affine=config.norm, bias_only=layer == "discriminator1", before=shape[1]
    )
    check(case, triton_device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, channels", [(128, 64), (64, 128), (32, 256), (16, 512), (8, 512), (4, 512)])
def test_layers_of_the_networks_with_all_their_channels(triton_device, size, channels, dtype):
    check(make((1, channels, size, size), dtype, ENCODER._replace(dropout=0.5)), triton_device)
    check(make((2, channels, size, size), dtype, DISCRIMINATOR), triton_device)


# ------------------------------------------------------------------------------------ kernels: odd cases

ODD = [
    (1, 3, 1, 1),
    (1, 17, 1, 1),
    (2, 130, 1, 1),
    (3, 17, 5, 3),
    (2, 3, 1, 7),
    (1, 130, 3, 3),
    (2, 17, 17, 9),
    (3, 3, 37, 31),
    (1, 1, 50, 41),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(triton_device, shape, dtype):
    config = NormActConfig(slope=0.2, skip_slope=0.0, dropout=0.3, layer=7)
    check(make(shape, dtype, config), triton_device)


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes_as_instances_and_without_norm(triton_device, shape):
    config = NormActConfig(slope=1.0, skip_slope=0.0, groups=shape[0])
    check(make(shape, torch.float32, config), triton_device)
    check(
        make(shape, torch.float64, config._replace(norm=False), affine=False, bias_only=True), triton_device
    )


@pytest.mark.parametrize("few_pixels", [0, 1024], ids=["two launches", "one launch"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_both_regimes(triton_device, monkeypatch, groups, running, affine, few_pixels):
    monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
    config = NormActConfig(slope=0.2, skip_slope=0.0, groups=groups, momentum=0.3)
    launches = []
    with launch.observed(launches.append):
        check(make((4, 5, 7, 9), torch.float32, config, affine=affine, running=running), triton_device)
    assert len(launches) == (2 if few_pixels else 4)


@pytest.mark.parametrize("slope, skip_slope", [(0.0, None), (0.2, 0.0), (0.3, 0.3), (1.0, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_activations(triton_device, dtype, slope, skip_slope):
    config = NormActConfig(slope=slope, skip_slope=skip_slope)
    check(make((2, 5, 4, 3), dtype, config), triton_device)
    check(make((2, 5, 4, 3), dtype, config._replace(norm=False), affine=False), triton_device)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_evaluation_uses_the_running_statistics(triton_device, groups, affine):
    config = NormActConfig(training=False, groups=groups, slope=0.2, skip_slope=0.0)
    case = make((2, 17, 9, 5), torch.float32, config, affine=affine)
    actual = check(case, triton_device)
    assert torch.equal(actual["running_mean"].cpu(), case.running_mean)
    assert torch.equal(actual["mean"].cpu(), case.running_mean.expand(groups, -1))


def test_running_statistics_take_the_groups_in_order(triton_device):
    """Real, then fake: with a large momentum the last group dominates."""
    config = NormActConfig(groups=2, momentum=0.9)
    case = make((2, 3, 20, 30), torch.float32, config)
    case.x[0] += 5.0
    case.x[1] -= 5.0
    actual = check(case, triton_device)
    assert (actual["running_mean"] < -3.0).all()


def test_needs_no_parameter_gradients(triton_device, monkeypatch):
    for few_pixels in (0, 1024):
        monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
        for training in (True, False):
            case = make((1, 6, 5, 4), torch.float32, NormActConfig(training=training, slope=0.2))
            check(case, triton_device, needs_affine=False)


@pytest.mark.parametrize("half", [0, 1])
def test_backward_through_one_half(triton_device, half):
    """The fake half of the discriminator's batch, with its row of the statistics: ``shared_forward``."""
    case = make((2, 17, 9, 11), torch.float64, DISCRIMINATOR).to(triton_device)
    forward = kernels.norm_act_forward(
        case.x, case.weight, case.bias, case.running_mean, case.running_var, None, DISCRIMINATOR
    )
    rows = slice(half, half + 1)
    part = kernels.norm_act_backward(
        case.dy[rows],
        None,
        case.x[rows],
        case.weight,
        case.bias,
        forward.mean[rows],
        forward.rstd[rows],
        None,
        DISCRIMINATOR._replace(groups=1),
        needs_affine=False,
    )
    alone = make((2, 17, 9, 11), torch.float64, DISCRIMINATOR)
    x = alone.x[rows].clone().requires_grad_()
    y = F.leaky_relu(F.batch_norm(x, None, None, alone.weight, alone.bias, True), DISCRIMINATOR.slope)
    (dx,) = torch.autograd.grad(y, x, alone.dy[rows])
    assert_stored(part.dx, dx, slack=1e-13)
    assert part.dweight is part.dbias is None


# -------------------------------------------------------------------------------------- kernels: latency


def planned(shape: tuple[int, ...], config: NormActConfig, dtype=torch.bfloat16) -> list[tuple]:
    """(grid, trips) of the launches, forward and backward, of a layer that is not computed."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    row = torch.empty(shape[1], device="meta") if config.norm else None
    launches = []
    with launch.observed(launches.append, run=False):
        forward = kernels.norm_act_forward(x, row, row, row, row, None, config)
        kernels.norm_act_backward(x, None, x, row, row, forward.mean, forward.rstd, None, config)
    return [(this.grid, this.trips) for this in launches]


@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
def test_few_programs_wait_for_memory_once():
    """Grids and trips to memory of the networks' layers at batch 1, in tiles of 128 pixels of 32 channels."""
    assert planned((1, 512, 1, 1), DECODER) == [((1, 2), 1)] * 2
    assert planned((1, 512, 8, 8), DECODER) == [((1, 32), 1)] * 2
    assert planned((1, 512, 16, 16), DECODER) == [((1, 32), 1)] * 2
    assert planned((1, 256, 32, 32), DECODER) == [((1, 32), 1)] * 2, "half a sector each"
    assert planned((1, 256, 32, 32), DECODER, torch.float32) == [((1, 64), 1)] * 2
    # One program more, of each block of channels, has the parameters' results.
    assert planned((1, 128, 64, 64), DECODER) == [((16, 4, 1), 1), ((33, 4, 1), 1)] * 2
    assert planned((1, 64, 128, 128), DECODER) == [((64, 2, 1), 1), ((129, 2, 1), 1)] * 2
    assert planned((2, 64, 128, 128), DECODER._replace(norm=False)) == [((128, 2, 1), 1)] * 2


@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
def test_trips_of_larger_batches():
    """1024 tiles of two blocks of channels: in chunks of 8 there are 128; two are on their way at a time."""
    partial, apply = planned((8, 64, 128, 128), DECODER)[:2]
    assert partial == ((128, 2, 1), 4)
    assert apply == ((513, 2, 1), 2), "the first tile comes with the partial sums, the second after it"
    for batch in (64, 65):
        (chunks, *_), trips = planned((batch, 64, 128, 128), DECODER)[0]
        assert chunks <= 128 and trips == -(-batch // 2)
    assert planned((8, 512, 8, 8), ENCODER._replace(groups=8))[0] == ((1, 32), 8), "group after group"


# ---------------------------------------------------------------------- kernels: images as partial sums


def partial_sums(count: int, like: Tensor, seed: int = 3, before: int = 0) -> Tensor:
    """(count, N * H * W, C), and some values of which float32 keeps a different sum in another order.

    before: channels of another image beside it in memory, in front.
    """
    n, c, h, w = like.shape
    generator = torch.Generator().manual_seed(seed)
    partials = torch.full((count, n * h * w, before + c), torch.nan)[:, :, before:]
    partials.copy_(torch.randn((count, n * h * w, c), generator=generator) / count**0.5)
    if count > 2:
        partials[0, 0, 0], partials[1, 0, 0], partials[-1, 0, 0] = 2.0**26, 1.0, -(2.0**26)
    return partials


# The sizes of an image, its partial sums, whether it has a norm.
SPLIT = [
    ((1, 40, 1, 1), 32, True),
    ((1, 40, 1, 1), 4, False),
    ((1, 17, 2, 2), 5, True),
    ((2, 5, 4, 3), 3, True),
    ((2, 5, 4, 3), 2, False),
    ((1, 32, 16, 16), 8, True),
    ((3, 3, 1, 1), 1, True),
]


@pytest.mark.parametrize("few_pixels", [0, 1024], ids=["two launches", "one launch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, count, norm", SPLIT, ids=str)
def test_an_image_may_come_as_partial_sums(triton_device, monkeypatch, shape, count, norm, dtype, few_pixels):
    """The same as with the sum, to the last bit: forward in place of x, which receives it, backward of dy and
    of dskip, each of them a slice of the channels of something wider."""
    monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
    groups = shape[0] if norm else 1
    config = NormActConfig(norm=norm, slope=0.2, skip_slope=0.0, dropout=0.3, groups=groups, layer=2)
    case = make(shape, dtype, config, before=2).to(triton_device)
    rng = RNG.to(triton_device)
    sums = partial_sums(count, case.x, 3, before=3).to(triton_device)
    dy_sums, dskip_sums = (partial_sums(n, case.x, 3 + n, before=n).to(triton_device) for n in (count, 2))
    if dtype == torch.bfloat16 or not few_pixels:
        # The interpreter cuts bf16 off where a GPU rounds, and the launcher adds in another order.
        for some in (dy_sums, dskip_sums):
            some.copy_(some.clamp(-3, 3).mul(4).round())

    def forward(x, **partials):
        case_ = case.to(triton_device)
        parameters = case_.weight, case_.bias, case_.running_mean, case_.running_var
        results = kernels.norm_act_forward(x, *parameters, rng, config, **partials)
        return [*results, case_.running_mean, case_.running_var]

    def backward(x, dy, dskip, mean, rstd, **partials):
        saved = case.weight, case.bias, mean, rstd
        return kernels.norm_act_backward(dy, dskip, x, *saved, rng, config, **partials)

    x = torch.full_like(case.x, torch.nan, memory_format=torch.channels_last)
    with recorded() as recording:
        results = forward(x, partials=sums)
        gradients = backward(x, None, None, *results[2:4], dy_partials=dy_sums, dskip_partials=dskip_sums)
    assert not recording.findings, list(map(str, recording.findings))

    for actual, expected in zip(results, forward(x.clone()), strict=True):
        assert actual is expected is None or torch.equal(actual, expected)
    exact = torch.empty_like(x, dtype=torch.float32)  # the order matters: not in float64
    reference.add_partials(sums, exact)
    if few_pixels:
        assert torch.equal(x.float(), exact.to(dtype).float()) or dtype == torch.bfloat16
        assert_stored(x, exact.double())
    else:
        exact[0, 0, 0, 0] = x[0, 0, 0, 0]
        assert_stored(x, exact.double(), slack=1e-6)
    stored = [reference.add_partials(some, torch.empty_like(x)) for some in (dy_sums, dskip_sums)]
    for actual, expected in zip(gradients, backward(x, *stored, *results[2:4]), strict=True):
        assert actual is expected is None or torch.equal(actual, expected)


def test_the_reference_takes_partial_sums_too():
    case = make((2, 5, 4, 3), torch.bfloat16, NormActConfig(slope=0.2, skip_slope=0.0))
    sums, dy_sums = partial_sums(3, case.x, before=1), partial_sums(2, case.x)
    x, dy = (torch.empty_like(case.x, memory_format=torch.channels_last) for _ in range(2))
    in_order = (sums[0] + sums[1]) + sums[2]
    parameters = case.weight, case.bias
    actual = reference.norm_act_forward(x, *parameters, None, None, None, case.config, partials=sums)
    assert torch.equal(x.permute(0, 2, 3, 1).reshape(24, 5), in_order.to(torch.bfloat16))
    dy.copy_((dy_sums[0] + dy_sums[1]).view(2, 4, 3, 5).permute(0, 3, 1, 2))
    expected = reference.norm_act_forward(x.clone(), *parameters, None, None, None, case.config)
    saved = x, *parameters, expected.mean, expected.rstd, None, case.config
    actual += reference.norm_act_backward(None, case.dskip, *saved, dy_partials=dy_sums)
    actual += reference.norm_act_backward(case.dskip, None, *saved, dskip_partials=dy_sums)
    expected += reference.norm_act_backward(dy, case.dskip, *saved)
    expected += reference.norm_act_backward(case.dskip, dy, *saved)
    for mine, other in zip(actual, expected, strict=True):
        assert torch.equal(mine, other)


def test_a_gradient_beside_the_partial_sums_of_the_other_is_not_all_on_a_cpu():
    case = make((2, 5, 4, 3), torch.float32, NormActConfig(slope=0.2, skip_slope=0.0))
    sums, parameters = partial_sums(2, case.x), (case.weight, case.bias)
    made = reference.norm_act_forward(case.x, *parameters, None, None, None, case.config)
    saved = case.x, *parameters, made.mean, made.rstd, None, case.config
    for pair, which in (((case.dskip, None), "dskip_partials"), ((None, case.dskip), "dy_partials")):
        expected = reference.norm_act_backward(*pair, *saved, **{which: sums})
        made = kernels.norm_act_backward(*pair, *saved, **{which: sums})
        for mine, other in zip(made, expected, strict=True):
            assert torch.equal(mine, other)


def test_refuses_partial_sums_that_do_not_fit(triton_device):
    case = make((2, 5, 4, 3), torch.float32, NormActConfig()).to(triton_device)
    good = partial_sums(3, case.x).to(triton_device)
    apart = partial_sums(6, case.x).to(triton_device)[::2]
    for bad in (good[:0], good[:, :-1], good.double(), good.mT.contiguous().mT, good[0], apart):
        for ops in (kernels, reference):
            with pytest.raises(ValueError, match=r"must be torch.float32 \(S, 24, 5\)"):
                ops.norm_act_forward(case.x, *(None,) * 5, case.config, partials=bad)
            for which in ("dy_partials", "dskip_partials"):
                with pytest.raises(ValueError, match=r"must be torch.float32 \(S, 24, 5\)"):
                    ops.norm_act_backward(None, None, case.x, *(None,) * 5, case.config, **{which: bad})


# -------------------------------------------------------------------------------- kernels: memory and slices


@pytest.mark.parametrize("few_pixels", [0, 1024], ids=["two launches", "one launch"])
@pytest.mark.parametrize("before, after", [(0, 5), (5, 0), (1, 2), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_into_slices_and_nothing_beside(triton_device, monkeypatch, dtype, before, after, few_pixels):
    monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
    case = make((2, 5, 6, 3), dtype, NormActConfig(slope=0.2, skip_slope=0.0), before=before, after=after)
    buffers = []
    for _ in range(2):
        buffer = torch.full((2, before + 5 + after, 6, 3), 7.0, dtype=dtype, device=triton_device)
        buffers.append(buffer.to(memory_format=torch.channels_last))
    out, skip_out = (buffer[:, before : before + 5] for buffer in buffers)
    actual = check(case, triton_device, out, skip_out)
    assert actual["y"].data_ptr() == out.data_ptr() and actual["skip"].data_ptr() == skip_out.data_ptr()
    for buffer in buffers:
        assert not (buffer[:, before : before + 5] == 7.0).all()
        buffer[:, before : before + 5] = 7.0
        assert (buffer == 7.0).all()


def test_takes_any_strides_in_and_refuses_them_out(triton_device):
    config = NormActConfig(slope=0.2)
    case = make((2, 5, 6, 4), torch.float32, config)
    rows_first = case._replace(x=case.x.contiguous(), dy=case.dy[:, :1].expand(-1, 5, -1, -1))
    check(rows_first, triton_device)
    with pytest.raises(ValueError, match="out is torch.float32 .* it must be torch.float32"):
        check(case, triton_device, torch.empty((2, 5, 6, 4), device=triton_device))
    with pytest.raises(ValueError, match="out is torch.float16"):
        check(case, triton_device, torch.empty_like(case.x, dtype=torch.float16, device=triton_device))


@pytest.mark.parametrize(
    "image, stride",
    [
        (torch.empty(2, 3, 4, 5), None),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), 3),
        (torch.empty(2, 9, 4, 5).to(memory_format=torch.channels_last)[:, 2:5], 9),
        (torch.empty(4, 9, 4, 5).to(memory_format=torch.channels_last)[1:3, 2:5], 9),
        (torch.empty(4, 9, 4, 5).to(memory_format=torch.channels_last)[::2], None),
        (torch.empty(2, 9, 4, 6).to(memory_format=torch.channels_last)[..., :5], None),
        (torch.empty(2, 9, 4, 6).to(memory_format=torch.channels_last)[:, ::2], None),
        (torch.empty(1, 8, 1, 1), 8),
        (torch.empty(3, 8, 1, 1), 8),
        (torch.empty(3, 1, 4, 5), 1),
        (torch.zeros(1, 1, 1, 1).expand(2, 3, 4, 5), None),
        (torch.zeros(1, 3, 1, 1).expand(2, 3, 4, 5), None),
    ],
)
def test_pixel_stride(image, stride):
    assert images.pixel_stride(image) == stride


# ---------------------------------------------------------------------------------------- kernels: numbers


@pytest.mark.parametrize("few_pixels", [0, 10**6], ids=["two launches", "one launch"])
def test_survives_a_large_mean(triton_device, monkeypatch, few_pixels):
    """Mean 1000, standard deviation 1: squares alone would leave no digit of the variance in fp32."""
    monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
    case = make((2, 4, 96, 64), torch.float32, NormActConfig(slope=0.2), mean=1000.0)
    case.x[0, :, 0, 0] += 500.0  # the first pixel is all that the sums are relative to
    actual = run(kernels, case.to(triton_device), None)
    exact = run(reference, case.to("cpu", torch.float64), None)
    half_unit_of_the_mean = 2.0**-15
    assert_stored(actual["mean"], exact["mean"])
    assert_stored(actual["rstd"], exact["rstd"])
    assert_stored(actual["y"], exact["y"], slack=half_unit_of_the_mean)
    assert_stored(actual["dx"], exact["dx"], slack=half_unit_of_the_mean)
    assert_stored(actual["running_var"], exact["running_var"])


@pytest.mark.parametrize("batch", [1, 3])
def test_one_value_per_group_gives_the_bias(triton_device, batch):
    config = NormActConfig(groups=batch, slope=1.0, momentum=0.1)
    case = make((batch, 20, 1, 1), torch.float32, config).to(triton_device)
    was = case.running_var.clone()
    actual = run(kernels, case, None)
    assert torch.equal(actual["y"], case.bias.view(1, -1, 1, 1).expand_as(actual["y"]))
    assert (actual["dx"] == 0).all() and (actual["dweight"] == 0).all()
    torch.testing.assert_close(actual["dbias"], case.dy.sum((0, 2, 3)))
    torch.testing.assert_close(actual["running_var"], was * 0.9**batch)


@pytest.mark.parametrize("few_pixels", [0, 1024], ids=["two launches", "one launch"])
@pytest.mark.parametrize("slope, skip_slope", [(0.0, None), (0.2, 0.0)])
def test_at_zero_the_gradient_is_that_of_the_negative_side(
    triton_device, monkeypatch, slope, skip_slope, few_pixels
):
    """As PyTorch's leaky_relu has it, and as the bottleneck meets it, whose values are all zero."""
    monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
    x = torch.tensor([-1.0, 0.0, -0.0, 2.0]).repeat(2, 1).view(1, 2, 2, 2).to(triton_device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    results = norm_act(x, config=NormActConfig(norm=False, slope=slope, skip_slope=skip_slope))
    results = (results,) if skip_slope is None else results
    upstream = [torch.full_like(result, 3.0 + i) for i, result in enumerate(results)]
    mine = torch.autograd.grad(results, x, upstream)[0].cpu()
    plain = x.detach().cpu().double().requires_grad_()
    slopes = (slope, skip_slope)[: len(results)]
    expected = [F.leaky_relu(plain, each) for each in slopes]
    theirs = torch.autograd.grad(expected, plain, [u.cpu().double() for u in upstream])[0]
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("few_pixels", [0, 10**6], ids=["two launches", "one launch"])
def test_repeats_to_the_last_bit(triton_device, monkeypatch, few_pixels):
    monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
    case = make((2, 4, 70, 60), torch.float32, NormActConfig(slope=0.2, groups=2)).to(triton_device)
    first, second = (run(kernels, case.to(triton_device), None) for _ in range(2))
    for name, value in first.items():
        assert value is None or torch.equal(value, second[name]), name


# Those of attorch's tests/test_batch_norm_layer.py, as images. It skips batch 1.
ATTORCH_SHAPES = [
    (1, 8000, 1, 1),
    (4, 2000, 1, 1),
    (8, 1024, 1, 1),
    (32, 1024, 1, 1),
    (128, 1024, 1, 1),
    (2048, 768, 1, 1),
    (6144, 256, 1, 1),
    (8096, 32, 1, 1),
    (12288, 1, 1, 1),
    (1, 1024, 3072, 1),
    (8, 960, 196, 1),
    (64, 768, 128, 1),
    (128, 960, 196, 1),
    (2048, 64, 16, 1),
    (1, 3, 224, 224),
    (8, 3, 224, 224),
    (64, 64, 56, 56),
    (256, 128, 28, 28),
    (256, 2048, 7, 7),
]


@pytest.mark.parametrize("shape", ATTORCH_SHAPES, ids=str)
def test_shapes_of_attorch(triton_device, shape):
    """Against torch.batch_norm in float64. The interpreter gets 2**14 values of each at most."""
    n, c, h, w = shape
    if triton_device == "cpu":
        c = min(c, 8 if n * h * w > 1 else 2048)
        n = min(n, max(2**14 // (c * h * w), 2))
        h = min(h, max(2**14 // (n * c * w), 1))
    case = make((n, c, h, w), torch.float32, NormActConfig(slope=0.0))
    actual = check(case, triton_device)
    x, weight, bias = (t.double().requires_grad_() for t in (case.x, case.weight, case.bias))
    y = F.relu(torch.batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5, False))
    gradients = torch.autograd.grad(y, (x, weight, bias), case.dy.double())
    for name, exact in zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients), strict=True):
        assert_stored(actual[name], exact, slack=1e-6 * max(exact.abs().max().item(), 1.0))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    mode=st.sampled_from(["batch", "instance", "running", "none"]),
    slopes=st.tuples(st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([None, 0.0, 0.3])),
    dropout=st.sampled_from([0.0, 0.0, 0.5, 0.1]),
    slices=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    few_pixels=st.sampled_from([0, 1024]),
)
def test_combinations(triton_device, shape, dtype, mode, slopes, dropout, slices, flags, few_pixels):
    affine, unbiased, running = flags
    config = NormActConfig(
        norm=mode != "none",
        training=mode != "running",
        groups=shape[0] if mode == "instance" else 1,
        unbiased=unbiased,
        slope=slopes[0],
        skip_slope=slopes[1],
        dropout=dropout,
        layer=3,
    )
    case = make(
        shape,
        dtype,
        config,
        affine=affine and config.norm,
        bias_only=affine,
        running=running or mode == "running",
        before=slices[0],
        after=slices[1],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FEW_PIXELS", few_pixels)
        check(case, triton_device)


# ---------------------------------------------------------------------------------------------- autograd


@pytest.fixture(params=["triton", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the inputs: of the kernels, then of the reference on the CPU."""
    return request.getfixturevalue("triton_device") if request.param == "triton" else "cpu"


@pytest.mark.parametrize("few_pixels", [0, 1024], ids=["two launches", "one launch"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(device, monkeypatch, training, few_pixels):
    monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
    config = NormActConfig(training=training, slope=0.2, skip_slope=0.5, groups=2, dropout=0.25)
    case = make((2, 2, 2, 3), torch.float64, config).to(device)
    rng = RNG.to(device)

    def op(x, weight, bias):
        running = case.running_mean.clone(), case.running_var.clone()
        return norm_act(x, weight, bias, *running, config=config, rng=rng)

    leaves = tuple(t.requires_grad_() for t in (case.x, case.weight, case.bias))
    assert torch.autograd.gradcheck(op, leaves, eps=1e-6, atol=1e-8, rtol=1e-6, fast_mode=True)


def test_gradcheck_without_norm(device):
    config = NormActConfig(norm=False, slope=0.2, skip_slope=0.5)
    case = make((1, 3, 3, 2), torch.float64, config).to(device)

    def op(x, bias):
        return norm_act(x, None, bias, config=config)

    leaves = case.x.requires_grad_(), case.bias.requires_grad_()
    assert torch.autograd.gradcheck(op, leaves, eps=1e-6, atol=1e-8, rtol=1e-6, fast_mode=True)


def test_only_one_result_is_used(device):
    config = NormActConfig(slope=0.2, skip_slope=0.0)
    case = make((1, 4, 5, 3), torch.float64, config).to(device)
    x = case.x.requires_grad_()
    y, skip = norm_act(x, case.weight, case.bias, config=config)
    separately = [
        torch.autograd.grad(r, x, g, retain_graph=True)[0] for r, g in ((y, case.dy), (skip, case.dskip))
    ]
    (together,) = torch.autograd.grad((y, skip), x, (case.dy, case.dskip))
    torch.testing.assert_close(sum(separately), together, rtol=1e-12, atol=1e-12)
    assert case.weight.grad is None


def test_results_share_the_memory_given(device):
    case = make((1, 4, 5, 3), torch.float32, NormActConfig(slope=0.2)).to(device)
    buffer = torch.zeros((1, 9, 5, 3), device=device).to(memory_format=torch.channels_last)
    y = norm_act(case.x.requires_grad_(), case.weight, case.bias, config=case.config, out=buffer[:, 2:6])
    alone = norm_act(case.x, case.weight, case.bias, config=case.config)
    assert torch.equal(buffer[:, 2:6], alone) and y.data_ptr() == buffer[:, 2:6].data_ptr()
    dx, dx_alone = (torch.autograd.grad(r, case.x, case.dy)[0] for r in (y, alone))
    assert torch.equal(dx, dx_alone)


def test_a_cpu_takes_the_reference():
    launches = []
    with launch.observed(launches.append):
        check(make((1, 4, 5, 3), torch.float32, NormActConfig()), "cpu")
    assert not launches


def test_without_triton_there_is_the_reference():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from fastpix2pix.kernels.norm_act import norm_act\n"
        "from fastpix2pix.kernels.reference import NormActConfig\n"
        "x = torch.randn(1, 3, 4, 4)\n"
        "y = norm_act(x, config=NormActConfig(slope=1.0))\n"
        "print((y - torch.nn.functional.batch_norm(x, None, None, training=True)).abs().max().item() < 1e-5)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr

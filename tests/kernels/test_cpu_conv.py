"""kernels/cpu_conv.py against PyTorch's convolutions: equal in float64, about as accurate in float32, and in
bfloat16 rounded once."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastpix2pix.kernels import cpu_conv
from fastpix2pix.kernels.cpu_conv import Tiling, conv2d, conv2d_backward, conv2d_forward, conv_transpose2d

TILINGS = [Tiling(stride, outputs) for stride in (1, 2) for outputs in cpu_conv.OUTPUTS[stride]]

# Small images of one pixel, of less than a tile, of no whole number of tiles, of several, and oblong ones.
SIZES = [(1, 1), (2, 2), (5, 7), (8, 12)]


def random(*shape, dtype=torch.float64, requires_grad=False):
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(requires_grad)


def gradients(y, dy, *inputs):
    return torch.autograd.grad(y, inputs, dy)


def results_of(convolve, x, weight, dy):
    """Output and gradients of x and the weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight)
    return y.detach(), *gradients(y, dy, x, weight)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.fixture
def forced(monkeypatch):
    """Makes every convolution use the given tiling, on any processor."""
    return lambda tiling: monkeypatch.setattr(cpu_conv, "find_tiling", lambda *_: tiling)


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_conv2d(tiling, height, width, forced):
    forced(tiling)
    torch.manual_seed(0)
    h, w = (tiling.stride * (side - 1) + 2 for side in (height, width))
    for odd in {0, tiling.stride - 1}:  # with a stride of 2 the last row may go unread
        x = random(2, 3, h + odd, w + odd, requires_grad=True)
        weight, bias = random(5, 3, 4, 4, requires_grad=True), torch.randn(5).double().requires_grad_()
        expected = F.conv2d(x, weight, bias, tiling.stride, 1)
        y = conv2d(x, weight, bias, stride=tiling.stride)
        assert y.shape == (2, 5, height, width)
        assert_equal(y, expected)
        dy = random(*y.shape)
        for actual, right in zip(
            gradients(y, dy, x, weight, bias), gradients(expected, dy, x, weight, bias), strict=True
        ):
            assert_equal(actual, right)


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("tiling", TILINGS[3:], ids=str)
def test_conv_transpose2d(tiling, height, width, forced):
    forced(tiling)
    torch.manual_seed(0)
    x, weight = random(2, 5, height, width, requires_grad=True), random(5, 3, 4, 4, requires_grad=True)
    bias = torch.randn(3).double().requires_grad_()
    expected = F.conv_transpose2d(x, weight, bias, 2, 1)
    y = conv_transpose2d(x, weight, bias)
    assert_equal(y, expected)
    dy = random(*y.shape)
    for actual, right in zip(
        gradients(y, dy, x, weight, bias), gradients(expected, dy, x, weight, bias), strict=True
    ):
        assert_equal(actual, right)


@pytest.mark.parametrize("tiling", [Tiling(1, 3), Tiling(2, 1), Tiling(2, 4)], ids=str)
def test_gradcheck(tiling, forced):
    forced(tiling)
    torch.manual_seed(0)
    x, weight = random(1, 2, 6, 4, requires_grad=True), random(2, 2, 4, 4, requires_grad=True)
    torch.autograd.gradcheck(lambda *inputs: conv2d(*inputs, stride=tiling.stride), (x, weight))
    if tiling.stride == 2:
        torch.autograd.gradcheck(conv_transpose2d, (x, weight))


@pytest.mark.parametrize("tiling", [Tiling(1, 3), Tiling(2, 1), Tiling(2, 4)], ids=str)
def test_backward_of_some_rows(tiling, forced):
    forced(tiling)
    torch.manual_seed(0)
    x, weight = random(4, 3, 10, 10, requires_grad=True), random(5, 3, 4, 4)
    y, kept = conv2d_forward(x.detach(), weight, None, tiling.stride)
    dy, rows = random(*y[1:3].shape), slice(1, 3)
    dx, dweight, dbias = conv2d_backward(dy, kept, needs_weight=False, rows=rows)
    (expected,) = gradients(F.conv2d(x, weight, None, tiling.stride, 1)[rows], dy, x)
    assert_equal(dx, expected[rows])
    assert dweight is None and dbias is None


@pytest.mark.parametrize("stride", [1, 2])
def test_any_memory_format(stride):
    """Channel slices of a larger image, plainly contiguous weights: slower, not wrong."""
    torch.manual_seed(0)
    joined, weight = random(1, 9, 8, 8), torch.randn(4, 5, 4, 4).double()
    x = joined[:, 2:7]
    assert_equal(conv2d(x, weight, stride=stride), F.conv2d(x, weight, None, stride, 1))
    if stride == 2:
        weight = torch.randn(5, 4, 4, 4).double()
        assert_equal(conv_transpose2d(x, weight), F.conv_transpose2d(x, weight, None, 2, 1))


# Of the full networks at 256x256: (stride, batch, small channels, big channels, side of the small image).
LAYERS = {
    "down2": (2, 1, 128, 64, 64),
    "down4": (2, 1, 512, 256, 16),
    "down6": (2, 1, 512, 512, 4),
    "up6": (2, 1, 512, 128, 32),
    "first of the discriminator": (2, 2, 64, 6, 128),
    "stride 1 of the discriminator": (1, 2, 512, 256, 31),
}


# Of PyTorch's own convolution: output, gradient of x, of weight, against float64 and relative to the result.
# Measured with AVX2 (oneDNN, PyTorch 2.13); it is another on other processors, and what is right is not.
LIBRARY_ERROR = {
    "down2": (5.68e-07, 2.88e-07, 1.14e-06),
    "down4": (1.11e-06, 4.07e-07, 2.78e-07),
    "down6": (1.06e-06, 4.09e-07, 6.62e-08),
    "up6": (8.01e-07, 4.07e-07, 5.64e-07),
    "first of the discriminator": (1.77e-07, 2.06e-07, 3.2e-06),
    "stride 1 of the discriminator": (1.13e-06, 8.00e-07, 7.71e-07),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_float32_is_about_as_accurate_as_the_library(layer):
    """Distance from float64, relative to the result, of all three products."""
    stride, n, small_channels, big_channels, side = LAYERS[layer]
    torch.manual_seed(0)
    big_side = stride * (side - 1) + 2
    x = random(n, big_channels, big_side, big_side, dtype=torch.float32, requires_grad=True)
    weight = random(small_channels, big_channels, 4, 4, dtype=torch.float32, requires_grad=True)
    dy = random(n, small_channels, side, side, dtype=torch.float32)

    truth = results_of(
        lambda x, weight: F.conv2d(x, weight, None, stride, 1), x.double(), weight.double(), dy.double()
    )
    ours = results_of(lambda x, weight: conv2d(x, weight, stride=stride), x, weight, dy)
    for exact, our, allowed in zip(truth, ours, LIBRARY_ERROR[layer], strict=True):
        assert distance(our, exact) < max(2 * allowed, 1e-6)


@pytest.mark.parametrize(
    "rates, dtype, expected",
    [
        (cpu_conv.FLOAT32_AVX2, torch.float32, [4, 2, 1, 4, 1, 3]),
        (cpu_conv.FLOAT32_AVX512, torch.float32, [4, 1, 1, 4, 1, 3]),
        (cpu_conv.BFLOAT16_AMX, torch.bfloat16, [None, 1, 1, None, None, None]),
    ],
    ids=["AVX2", "AVX-512", "bfloat16"],
)
def test_tilings_of_the_full_networks(rates, dtype, expected):
    """The estimate finds what was measured to be fastest (one core of that kind)."""
    found = []
    for stride, n, small_channels, big_channels, side in LAYERS.values():
        x, weight = (
            torch.empty(n, 1, 1, 1, dtype=dtype),
            torch.empty(small_channels, big_channels, 4, 4).to(dtype),
        )
        found.append(cpu_conv.find_tiling(x, weight, stride, side, side, rates))
    assert [None if tiling is None else tiling.outputs for tiling in found] == expected


# Small images of few pixels and of many, odd ones too, and of several; channels that fill no vector.
SIXTEEN_BIT_LAYERS = [
    (1, 8, 6, 1, 1),
    (2, 40, 24, 2, 2),
    (2, 5, 3, 5, 7),
    (1, 64, 32, 8, 12),
    (1, 512, 64, 4, 4),
]


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("library", [True, False], ids=["oneDNN", "no oneDNN"])
@pytest.mark.parametrize("n, small_channels, big_channels, height, width", SIXTEEN_BIT_LAYERS)
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_is_rounded_once(
    stride, n, small_channels, big_channels, height, width, library, forced, monkeypatch
):
    """All three products of either convolution are float64's, rounded; and PyTorch's convolution in bfloat16
    is no nearer to float64."""
    forced(Tiling(stride, 1))
    monkeypatch.setattr(cpu_conv, "_cpu_has", lambda dtype: True)
    torch.manual_seed(0)
    for odd in {0, stride - 1}:
        h, w = (stride * (side - 1) + 2 + odd for side in (height, width))
        big = random(n, big_channels, h, w, dtype=torch.bfloat16)
        weight = random(small_channels, big_channels, 4, 4, dtype=torch.bfloat16)
        small = random(n, small_channels, height, width, dtype=torch.bfloat16)
        down = partial(F.conv2d, stride=stride, padding=1), partial(conv2d, stride=stride), big, small
        up = partial(F.conv_transpose2d, stride=2, padding=1), conv_transpose2d, small, big
        for theirs, ours, x, dy in [down, up] if stride == 2 and not odd else [down]:
            with torch.backends.mkldnn.flags(enabled=library):
                found = results_of(ours, x, weight, dy)
            truth = results_of(theirs, x.double(), weight.double(), dy.double())
            rival = results_of(theirs, x, weight, dy)
            for mine, other, exact in zip(found, rival, truth, strict=True):
                assert mine.dtype == torch.bfloat16 and mine.shape == exact.shape
                half_a_digit = torch.finfo(torch.bfloat16).eps / 2
                torch.testing.assert_close(mine.double(), exact, rtol=1.01 * half_a_digit, atol=1e-4)
                assert distance(mine, exact) <= 1.02 * distance(other, exact)


def distance(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("outputs", [1, 4])
def test_gradient_has_the_layout_of_the_weight(outputs, forced):
    """So that it becomes ``weight.grad`` without a copy."""
    forced(Tiling(2, outputs))
    weight = random(4, 3, 4, 4, requires_grad=True)
    y = conv2d(random(1, 3, 8, 8), weight, stride=2)
    (gradient,) = gradients(y, torch.ones_like(y), weight)
    assert gradient.stride() == weight.stride()


class Convolutions(TorchDispatchMode):
    """The types that PyTorch's convolutions are asked to compute in."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.__name__:
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("small_channels", [1, 5], ids=["library", "tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once_where_the_cpu_has_none(dtype, small_channels, monkeypatch):
    monkeypatch.setattr(cpu_conv, "_cpu_has", lambda dtype: dtype.itemsize > 2)
    torch.manual_seed(0)
    x = random(2, 3, 9, 9, dtype=dtype, requires_grad=True)
    weight = random(small_channels, 3, 4, 4, dtype=dtype, requires_grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    truth = F.conv2d(*exact, None, 2, 1)
    dy = random(*truth.shape, dtype=dtype)
    truths = truth, *gradients(truth, dy.double(), *exact)

    with Convolutions() as seen:
        y = conv2d(x, weight, stride=2)
        plain, kept = conv2d_forward(x.detach(), weight.detach(), None, 2)
        results = [(y, *gradients(y, dy, x, weight)), (plain, *conv2d_backward(dy, kept)[:2])]
    assert dtype not in seen.types
    for actual in results:
        for value, right in zip(actual, truths, strict=True):
            assert value.dtype == dtype
            half_a_digit = torch.finfo(dtype).eps / 2
            torch.testing.assert_close(value.double(), right, rtol=1.01 * half_a_digit, atol=1e-5)

    up = conv_transpose2d(y, weight)
    right = F.conv_transpose2d(y.double(), weight.double(), None, 2, 1)
    torch.testing.assert_close(up.double(), right, rtol=1.01 * torch.finfo(dtype).eps / 2, atol=1e-5)


@pytest.mark.parametrize(
    "x, weight",
    [
        (random(2, 3, 8, 8, dtype=torch.bfloat16), random(4, 3, 4, 4, dtype=torch.bfloat16)),
        (random(2, 3, 8, 8), random(4, 3, 3, 3)),
        (random(2, 3, 8, 8), random(1, 3, 4, 4)),
    ],
    ids=["bfloat16", "3x3", "one channel"],
)
def test_the_rest_is_the_library(x, weight, monkeypatch):
    monkeypatch.setattr(cpu_conv, "_cpu_has", lambda dtype: True)
    monkeypatch.setattr(
        cpu_conv, "rates_of_this_cpu", lambda dtype: None if dtype.itemsize == 2 else cpu_conv.FLOAT32_AVX2
    )
    assert cpu_conv.find_tiling(x, weight, 2, 4, 4) is None
    x, weight = x.requires_grad_(), weight.requires_grad_()
    expected = F.conv2d(x, weight, None, 2, 1)
    y, kept = conv2d_forward(x.detach(), weight.detach(), None, 2)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    dy = torch.randn_like(y)
    actual = conv2d_backward(dy, kept)[:2]
    right = gradients(expected, dy, x, weight)
    torch.testing.assert_close(actual, right, rtol=0, atol=0)
    dx, _, _ = conv2d_backward(dy[1:], kept, needs_weight=False, rows=slice(1, None))
    torch.testing.assert_close(dx, right[0][1:])


def test_an_exported_graph_says_convolution():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 4, 4, 4))

        def forward(self, x):
            return conv_transpose2d(conv2d(x, self.weight, stride=2), self.weight)

    graph = torch.export.export(Network(), (torch.randn(1, 4, 8, 8),)).graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert calls == ["aten.conv2d.default", "aten.conv_transpose2d.input"]

"""kernels/norm_act_cpu.py against the reference: equal in float64, to rounding in float32."""

import itertools

import pytest
import torch

from fastpix2pix.kernels import norm_act_cpu, reference
from fastpix2pix.kernels.reference import NormActConfig

CHANNELS = 6
CONFIGS = {
    "encoder": NormActConfig(slope=0.3, skip_slope=0.3, eps=1e-3, momentum=0.01, unbiased=False),
    "encoder with a ReLU skip": NormActConfig(slope=0.2, skip_slope=0.0),
    "decoder": NormActConfig(slope=0.0, dropout=0.5, layer=2),
    "discriminator": NormActConfig(slope=0.3, groups=2),
    "instance norm": NormActConfig(slope=0.2, groups=4),
    "no norm": NormActConfig(norm=False, slope=0.2, skip_slope=0.0),
    "running statistics": NormActConfig(slope=0.2, training=False),
}
# Batch and side of the image; one pixel at batch 4 is one value a group for instance norm.
IMAGES = [(4, 5), (4, 1)]


class Arguments:
    def __init__(self, config, n, side, *, dtype=torch.float64, parameters="weight bias"):
        torch.manual_seed(0)
        self.config = config
        self.x, self.dy = (self.image(n, CHANNELS, side, dtype) for _ in "xy")
        # A slice of a wider gradient, as a skip connection hands it back.
        self.dskip = (
            None if config.skip_slope is None else self.image(n, 2 * CHANNELS, side, dtype)[:, CHANNELS:]
        )
        self.weight = torch.randn(CHANNELS, dtype=dtype) if "weight" in parameters and config.norm else None
        self.bias = torch.randn(CHANNELS, dtype=dtype) if "bias" in parameters else None
        self.running = torch.randn(CHANNELS, dtype=dtype), torch.rand(CHANNELS, dtype=dtype)
        self.rng = torch.tensor([3, 4])

    @staticmethod
    def image(n, channels, side, dtype):
        image = torch.randn(n, channels, side, side, dtype=dtype) * 2 + 0.5
        return image.contiguous(memory_format=torch.channels_last)

    def forward(self, module, **memory):
        """All results, the running statistics afterwards included."""
        running = [statistic.clone() for statistic in self.running]
        result = module.norm_act_forward(
            self.x, self.weight, self.bias, *running, self.rng, self.config, **memory
        )
        return *result, *running

    def backward(self, module, mean, rstd, dy, dskip, **options):
        return module.norm_act_backward(
            dy, dskip, self.x, self.weight, self.bias, mean, rstd, self.rng, self.config, **options
        )


def assert_equal(actual, expected, **tolerances):
    for value, right in zip(actual, expected, strict=True):
        assert (value is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(value, right, **tolerances or {"rtol": 1e-10, "atol": 1e-11})


@pytest.mark.parametrize("parameters", ["weight bias", "bias", ""])
@pytest.mark.parametrize("n, side", IMAGES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(name, n, side, parameters):
    these = Arguments(CONFIGS[name], n, side, parameters=parameters)
    expected = these.forward(reference)
    assert_equal(these.forward(norm_act_cpu), expected)
    _, _, mean, rstd, *_ = expected
    for dy, dskip in itertools.product((these.dy, None), {these.dskip, None}):
        for needs_affine in (True, False):
            gradients = (mean, rstd, dy, dskip)
            right = these.backward(reference, *gradients, needs_affine=needs_affine)
            assert_equal(these.backward(norm_act_cpu, *gradients, needs_affine=needs_affine), right)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32(name):
    """Statistics of a few hundred values; gradients where no value is so near 0 that rounding decides."""
    these = Arguments(CONFIGS[name], 4, 9, dtype=torch.float32)
    expected = these.forward(reference)
    assert_equal(these.forward(norm_act_cpu), expected, rtol=1e-5, atol=1e-5)
    gradients = (*expected[2:4], these.dy, these.dskip)
    right = these.backward(reference, *gradients)
    assert_equal(these.backward(norm_act_cpu, *gradients), right, rtol=1e-4, atol=1e-4)


def test_writes_into_the_given_memory():
    these = Arguments(CONFIGS["encoder"], 2, 4)
    joined = these.image(2, 2 * CHANNELS, 4, torch.float64)
    memory = {"out": joined[:, :CHANNELS], "skip_out": joined[:, CHANNELS:]}
    y, skip, *_ = these.forward(norm_act_cpu, **memory)
    assert y.data_ptr() == joined.data_ptr() and skip.data_ptr() == joined[:, CHANNELS:].data_ptr()
    assert_equal((joined,), (torch.cat(these.forward(reference)[:2], 1),))


def test_one_value_is_normalised_to_the_bias():
    """The tutorial's bottleneck at batch 1, whatever is in front of it."""
    these = Arguments(NormActConfig(slope=0.3, eps=1e-3), 1, 1, dtype=torch.float32)
    these.x = these.x * 1e4
    y, _, mean, rstd, _, running_var = these.forward(norm_act_cpu)
    expected = torch.nn.functional.leaky_relu(these.bias, 0.3)
    torch.testing.assert_close(y.flatten(), expected, rtol=0, atol=0)
    assert running_var.isfinite().all()
    dx, dweight, _ = these.backward(norm_act_cpu, mean, rstd, these.dy, None)
    assert not dx.any() and not dweight.any()


@pytest.mark.parametrize("name", ["encoder", "no norm"])
@pytest.mark.parametrize("parameters", ["weight bias", ""])
def test_sixteen_bits_are_the_references(name, parameters):
    these = Arguments(CONFIGS[name], 4, 5, dtype=torch.float32, parameters=parameters)
    these.x, these.dy = these.x.bfloat16(), these.dy.bfloat16()
    expected = these.forward(reference)
    assert_equal(these.forward(norm_act_cpu), expected, rtol=0, atol=0)
    gradients = (*expected[2:4], these.dy, these.dskip)
    right = these.backward(reference, *gradients)
    assert_equal(these.backward(norm_act_cpu, *gradients), right, rtol=0, atol=0)

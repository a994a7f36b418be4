"""The CPU's epilogue of our own networks against the reference: the same numbers, in fewer passes."""

from itertools import product

import pytest
import torch

from fastpix2pix.kernels import cpu_norm, reference
from fastpix2pix.kernels.reference import NormActConfig, compute_dtype

SHAPE = 6, 3, 5

# (norm, affine, slope, skip_slope, dropout, unbiased): the layers of both presets, and instance norm.
LAYERS = {
    "no norm": (False, False, 0.3, None, 0.0, True),
    "no norm, skip": (False, False, 0.2, 0.2, 0.0, True),
    "encoder of the tutorial": (True, True, 0.3, 0.3, 0.0, False),
    "encoder of junyanz": (True, True, 0.2, 0.0, 0.0, True),
    "decoder": (True, True, 0.0, None, 0.0, True),
    "dropout": (True, True, 0.0, None, 0.5, False),
    "dropout before two activations": (True, True, 0.3, 0.0, 0.25, True),
    "instance norm": (True, False, 0.2, 0.2, 0.0, True),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}


def random(*shape, dtype):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("n, groups", [(1, 1), (2, 2), (3, 1), (4, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_against_the_reference(layer, dtype, n, groups):
    norm, affine, slope, skip_slope, dropout, unbiased = LAYERS[layer]
    torch.manual_seed(0)
    c, h, w = SHAPE
    config = NormActConfig(
        norm=norm,
        groups=groups,
        slope=slope,
        skip_slope=skip_slope,
        dropout=dropout,
        layer=1,
        unbiased=unbiased,
    )
    x, wide = random(n, c, h, w, dtype=dtype), compute_dtype(dtype)
    weight, bias = torch.randn(2, c, dtype=wide)
    if not affine:  # with instance norm, the bias of the convolution, which the mean takes away
        weight, bias = None, bias if norm else None
    rng = torch.tensor([3, 5])
    assert cpu_norm.serves(x, weight, bias, config)
    running = torch.rand(2, c, dtype=wide)
    runnings = [running.clone().unbind() if affine else (None, None) for _ in range(2)]

    def same(ours, theirs):
        for mine, right in zip(ours, theirs, strict=True):
            if right is None:
                assert mine is None
                continue
            assert mine.dtype == right.dtype
            assert mine.dim() < 4 or mine.is_contiguous(memory_format=torch.channels_last)
            bound = TOLERANCE[mine.dtype]
            torch.testing.assert_close(mine, right, rtol=bound, atol=bound)

    expected = reference.norm_act_forward(x, weight, bias, *runnings[0], rng, config)
    same(cpu_norm.epilogue_forward(x, weight, bias, *runnings[1], rng, config), expected)
    same(runnings[1], runnings[0])

    # Into and out of channel slices, as in the U-Net.
    joined = random(n, 2 * c, h, w, dtype=dtype)
    out, skip_out = joined[:, :c], joined[:, c:] if skip_slope is not None else None
    made = cpu_norm.epilogue_forward(x, weight, bias, None, None, rng, config, out, skip_out)
    torch.testing.assert_close(out, expected.y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert made.y.data_ptr() == joined.data_ptr()

    dy, dskip = joined[:, :c], joined[:, c:]
    wanted = [(dy, None), (dy, dskip), (None, dskip)] if skip_slope is not None else [(dy, None)]
    saved = x, weight, bias, expected.mean, expected.rstd, rng, config
    for given, needs_affine in product(wanted, (True, False)):
        ours = cpu_norm.epilogue_backward(*given, *saved, needs_affine)
        same(ours, reference.norm_act_backward(*given, *saved, needs_affine))


def test_the_rest_is_the_reference():
    """A statistic of a single value, running statistics, a convolution's bias."""
    x, weight, bias = random(1, 4, 1, 1, dtype=torch.float32), torch.ones(4), torch.zeros(4)
    assert not cpu_norm.serves(x, weight, bias, NormActConfig())
    x = random(1, 4, 2, 2, dtype=torch.float32)
    assert cpu_norm.serves(x, weight, bias, NormActConfig())
    assert not cpu_norm.serves(x, weight, bias, NormActConfig(training=False))
    assert not cpu_norm.serves(x, None, bias, NormActConfig(norm=False))

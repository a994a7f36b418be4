"""The deep layers' convolutions: their products against float64, and who may take a weight gradient."""

import pytest
import torch
from torch.nn import functional as F

from fastpix2pix.kernels import deep_conv, reference
from fastpix2pix.kernels.norm_act import norm_act
from fastpix2pix.kernels.reference import NormActConfig


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def images(
    n: int, h: int, w: int, cs: int, cb: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A small image, a big one, and a weight."""
    return (
        random(n, cs, h, w, dtype=dtype, seed=1),
        random(n, cb, 2 * h, 2 * w, dtype=dtype, seed=2),
        random(cs, cb, 4, 4, dtype=dtype, seed=3),
    )


# ---------------------------------------------------------------------------------------- the reference


def test_the_reference_products_are_each_others_derivatives():
    small, big, weight = images(2, 3, 2, 5, 4, torch.float64)
    big.requires_grad_(), weight.requires_grad_()
    y = reference.deep_conv_small(big, weight)
    dbig, dweight = torch.autograd.grad(y, (big, weight), small)
    torch.testing.assert_close(reference.deep_conv_big(small, weight), dbig)
    torch.testing.assert_close(reference.deep_conv_weight(small, big), dweight)


# ------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_in_double_precision(transposed):
    small, big, weight = images(2, 2, 3, 3, 4, torch.float64)
    conv = deep_conv.conv_transpose2d if transposed else deep_conv.conv2d
    x = (small if transposed else big).requires_grad_()
    expected = F.conv_transpose2d(x, weight, None, 2, 1) if transposed else F.conv2d(x, weight, None, 2, 1)
    torch.testing.assert_close(conv(x, weight), expected)
    assert torch.autograd.gradcheck(conv, (x, weight.requires_grad_()))


@pytest.mark.parametrize("transposed", [False, True])
def test_with_its_epilogue_it_is_the_two_ops_in_turn(transposed):
    small, big, weight = images(1, 4, 4, 6, 8)
    x = small if transposed else big
    conv = deep_conv.conv_transpose2d if transposed else deep_conv.conv2d
    channels = 8 if transposed else 6
    config = NormActConfig(skip_slope=0.5, slope=0.2, dropout=0.5, layer=3)
    rng = torch.tensor([7, 1])
    results = []
    for fused in (True, False):
        inputs = [
            t.clone().requires_grad_() for t in (x, weight, torch.ones(channels), torch.zeros(channels))
        ]
        running = torch.zeros(channels), torch.ones(channels)
        a, b, *affine = inputs
        if fused:
            y = deep_conv.conv_norm_act(
                a, b, *affine, *running, transposed=transposed, config=config, rng=rng
            )
        else:
            y = norm_act(conv(a, b), *affine, *running, config=config, rng=rng)
        torch.autograd.backward(y, [random(*t.shape, seed=5 + i) for i, t in enumerate(y)])
        results.append([*y, *running, *(t.grad for t in inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


# -------------------------------------------------------------------------------- who takes the gradient


class Taker:
    """Notes what it is asked, and whether the input gradient was there by then."""

    def __init__(self, answer: bool):
        self.answer, self.asked = answer, []

    def __call__(self, small: torch.Tensor, big: torch.Tensor) -> bool:
        self.asked.append((small.clone(), big.clone()))
        return self.answer


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_gradient_is_offered_and_computed_if_it_is_not_taken(transposed, answer):
    small, big, weight = images(1, 2, 2, 3, 4)
    x, dy = (small, big) if transposed else (big, small)
    taker = Taker(answer)
    conv = deep_conv.conv_transpose2d if transposed else deep_conv.conv2d
    x.requires_grad_(), weight.requires_grad_()
    conv(x, weight, taker).backward(dy)
    ((seen_small, seen_big),) = taker.asked
    assert torch.equal(seen_small, small) and torch.equal(seen_big, big)
    expected = reference.deep_conv_big(small, weight) if not transposed else None
    expected = reference.deep_conv_small(big, weight) if transposed else expected
    torch.testing.assert_close(x.grad, expected)
    if answer:
        assert weight.grad is None
    else:
        torch.testing.assert_close(weight.grad, reference.deep_conv_weight(small, big))


def test_the_input_gradient_comes_from_the_weight_as_it_was():
    """Whoever takes the gradient may overwrite the weight at once."""
    small, big, weight = images(1, 2, 2, 3, 4)
    parameter, big = weight.clone().requires_grad_(), big.requires_grad_()

    def take(small, big):
        parameter.data.fill_(float("nan"))
        return True

    deep_conv.conv2d(big, parameter, take).backward(small)
    torch.testing.assert_close(big.grad, reference.deep_conv_big(small, weight))


def test_nobody_is_asked_for_the_gradient_of_a_frozen_weight():
    small, big, weight = images(1, 2, 2, 3, 4)
    taker = Taker(True)
    deep_conv.conv2d(big.requires_grad_(), weight, taker).backward(small)
    assert not taker.asked


# -------------------------------------------------------------------------------------- which are deep


@pytest.mark.parametrize(
    "n, h, w, weights, transposed, deep",
    [
        (1, 32, 32, 2**20, False, True),
        (2, 32, 32, 2**20, False, False),
        (1, 34, 32, 2**20, False, False),
        (1, 16, 16, 2**20, True, True),
        (3, 16, 16, 2**20, True, False),
        (1, 32, 32, 2**20 - 16, False, False),
        (1, 3, 2, 2**20, False, False),  # an odd side
        (1, 3, 2, 2**20, True, True),
    ],
)
def test_a_layer_is_deep_by_its_pixels_and_weights(n, h, w, weights, transposed, deep):
    x = torch.empty(n, 16, h, w, device="meta")
    weight = torch.empty(weights // 256, 16, 4, 4, device="meta")
    assert deep_conv.is_deep(x, weight, transposed=transposed) is deep

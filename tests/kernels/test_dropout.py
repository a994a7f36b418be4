"""Dropout: Philox against its published vectors, the masks' statistics, and kernels against the reference."""

import itertools

import pytest
import torch
from torch import Tensor

from fastpix2pix.kernels import norm_act as kernels
from fastpix2pix.kernels import reference
from fastpix2pix.kernels.reference import NormActConfig, dropout_mask, philox

ONLY_DROPOUT = NormActConfig(norm=False, slope=1.0, dropout=0.5)


@pytest.fixture(params=["triton", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the inputs: of the kernels, then of the reference on the CPU."""
    return request.getfixturevalue("triton_device") if request.param == "triton" else "cpu"


def image(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def mask(x: Tensor, config: NormActConfig, seed: int = 3, step: int = 0) -> Tensor:
    """What the op does to an image of ones."""
    rng = torch.tensor([seed, step], device=x.device)
    return kernels.norm_act_forward(x, None, None, None, None, rng, config).y


# Philox4x32-10 of the Random123 library's known-answer tests: counter, key, first word.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
]


@pytest.mark.parametrize("counter, key, word", KNOWN)
def test_philox_gives_the_published_words(counter, key, word):
    assert philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key))).item() == word


@pytest.mark.parametrize("probability", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("seed, step", [(0, 0), (-1, 2**32 - 1), (2**62 + 12345678901, 2**40 + 17)])
@pytest.mark.parametrize("layer", [0, 1, 16])
def test_kernels_draw_the_reference_bits(triton_device, seed, step, layer, probability):
    config = ONLY_DROPOUT._replace(dropout=probability, layer=layer)
    x = image(2, 5, 7, 3, device=triton_device)
    expected = dropout_mask(x.cpu(), probability, torch.tensor([seed, step]), layer)
    assert torch.equal(mask(x, config, seed, step).cpu(), expected)


def test_all_four_words_of_the_counter_and_both_of_the_key_count(device):
    x = image(1, 8, 8, 8, device=device)
    masks = [
        mask(x, ONLY_DROPOUT._replace(layer=layer), seed, step)
        for seed, step, layer in [
            (3, 0, 0),
            (3, 1, 0),
            (3, 2**32, 0),
            (4, 0, 0),
            (3 + 2**32, 0, 0),
            (3, 0, 1),
        ]
    ]
    for one, other in itertools.combinations(masks, 2):
        assert 0.3 < (one == other).float().mean() < 0.7
    assert torch.equal(masks[0], mask(x, ONLY_DROPOUT)), "the same counter repeats"


@pytest.mark.parametrize("probability", [0.5, 0.2, 0.05])
def test_keep_rate(probability):
    n = 2**18
    kept = dropout_mask(image(1, 64, 64, 64), probability, torch.tensor([11, 5]), 1) > 0
    sigma = (probability * (1 - probability) / n) ** 0.5
    assert abs(kept.double().mean().item() - (1 - probability)) < 4 * sigma


def test_inverted_scaling(device):
    for probability in (0.5, 0.3):
        values = mask(image(1, 16, 8, 8, device=device), ONLY_DROPOUT._replace(dropout=probability)).unique()
        torch.testing.assert_close(values.cpu(), torch.tensor([0.0, 1 / (1 - probability)]))


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten()))).abs()[0, 1].item()


def test_no_correlation_between_neighbours_channels_steps_and_layers():
    x = image(1, 32, 64, 64)  # 2**17 values

    def draw(step, layer):
        return dropout_mask(x, 0.5, torch.tensor([7, step]), layer).double()

    here = draw(0, 0)
    in_memory = here.permute(0, 2, 3, 1).flatten()
    four_sigma = 4 / 2**8.5
    for lag in range(1, 65):
        assert correlation(in_memory[:-lag], in_memory[lag:]) < four_sigma, lag
    for layer, step in ((0, 1), (1, 0), (1, 1)):
        assert correlation(here, draw(step, layer)) < four_sigma
    channels = torch.corrcoef(here.squeeze(0).flatten(1)) - torch.eye(32)
    assert channels.abs().max() < 5 / 2**6  # 496 pairs of 4096 values


@pytest.mark.parametrize("few_pixels", [0, 1024], ids=["two launches", "one launch"])
def test_forward_and_backward_use_the_same_mask(device, monkeypatch, few_pixels):
    monkeypatch.setattr(kernels, "FEW_PIXELS", few_pixels)
    config = NormActConfig(slope=1.0, dropout=0.5, layer=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 5, 6, 3), generator=generator).to(device, memory_format=torch.channels_last)
    weight, bias = torch.ones(5, device=device), torch.full((5,), 100.0, device=device)
    rng = torch.tensor([3, 9], device=device)
    y, _, mean, rstd = kernels.norm_act_forward(x, weight, bias, None, None, rng, config)
    # dbias is the sum of dy over what was kept: one value at a time shows each place of the mask.
    for place in range(0, x.numel(), 7):
        dy = torch.zeros_like(x)
        n, h, w, c = (int(i) for i in torch.unravel_index(torch.tensor(place), (2, 6, 3, 5)))
        dy[n, c, h, w] = 1.0
        dbias = kernels.norm_act_backward(dy, None, x, weight, bias, mean, rstd, rng, config).dbias
        assert dbias[c].item() == (2.0 if y[n, c, h, w] != 0 else 0.0)


def test_the_seed_is_read_on_the_device_at_each_run(device):
    """As in a captured graph: the same call draws anew when the counter in the same tensor has moved."""
    x, rng = image(1, 16, 8, 8, device=device), torch.tensor([3, 0], device=device)
    first = kernels.norm_act_forward(x, None, None, None, None, rng, ONLY_DROPOUT).y.clone()
    rng[1:].add_(1)
    second = kernels.norm_act_forward(x, None, None, None, None, rng, ONLY_DROPOUT).y.clone()
    rng[1:].sub_(1)
    again = kernels.norm_act_forward(x, None, None, None, None, rng, ONLY_DROPOUT).y
    assert not torch.equal(first, second) and torch.equal(first, again)


def test_certain_dropout_rates_are_exact():
    assert reference.dropout_threshold(0.0) == 0
    assert reference.dropout_threshold(0.5) == 2**31
    assert dropout_mask(image(1, 4, 4, 4), 0.0, torch.tensor([1, 1]), 0).unique().tolist() == [1.0]

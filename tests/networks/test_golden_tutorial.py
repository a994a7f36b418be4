"""The networks and the step against what TensorFlow computes for the tutorial's networks and update.

Batch 1, without dropout. ``golden/README.md`` says how the numbers are made, and where the tolerances used
here come from.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from golden import recipe
from golden.recipe import GENERATOR_ARRAYS

from fastpix2pix import presets
from fastpix2pix.interop import keras
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.step import TrainStep


class Golden(NamedTuple):
    names: list
    arrays: list
    pairs: list
    float32: dict
    float64: dict


@pytest.fixture(scope="module")
def tutorial(golden) -> Golden:
    names, arrays = zip(*recipe.weights(), strict=True)
    pairs = recipe.pairs()
    numbers = golden("tutorial_float32"), golden("tutorial_float64")
    drawn = recipe.digest([*arrays, *(image for pair in pairs for image in pair)])
    assert all(each["inputs_sha256"] == drawn for each in numbers), "this NumPy draws other numbers"
    return Golden(names, arrays, pairs, *numbers)


def networks(tutorial: Golden, dtype: torch.dtype):
    generator, discriminator = UNetGenerator(dropout=0.0).to(dtype), PatchDiscriminator().to(dtype)
    keras.load_weights(generator, tutorial.arrays[:GENERATOR_ARRAYS])
    keras.load_weights(discriminator, tutorial.arrays[GENERATOR_ARRAYS:])
    return generator, discriminator


def pair(tutorial: Golden, index: int, dtype: torch.dtype):
    return [torch.from_numpy(image).permute(0, 3, 1, 2).to(dtype) for image in tutorial.pairs[index]]


def by_keras_name(tutorial: Golden, network, arrays_of):
    """{golden name: what ``arrays_of(parameter)`` gives} for every parameter of a network."""
    offset = 0 if isinstance(network, UNetGenerator) else GENERATOR_ARRAYS
    parameters = dict(network.named_parameters())
    return {
        tutorial.names[offset + i]: arrays_of(parameters[name])
        for i, (name, _) in enumerate(keras._in_keras_order(network))
        if name in parameters
    }


def assert_sample(image: torch.Tensor, expected: dict, tolerance: float):
    """``image`` (N, C, H, W) at the golden sample's NHWC positions, within ``tolerance`` of its deviation."""
    values = image.detach().permute(0, 2, 3, 1).reshape(-1)[expected["sample_idx"]]
    difference = (values - torch.tensor(expected["sample"], dtype=values.dtype)).abs().max()
    assert difference <= tolerance * expected["std"]


def check_outputs(tutorial: Golden, dtype: torch.dtype, expected: dict, tolerance: float):
    generator, discriminator = networks(tutorial, dtype)
    source, target = pair(tutorial, 0, dtype)
    with torch.no_grad():
        fake = generator(source)
        pairs = torch.cat((torch.cat((source, source)), torch.cat((target, fake))), 1)
        pairs = pairs.contiguous(memory_format=torch.channels_last)
        logits, fake_logits = map(
            discriminator.with_bias, discriminator.shared_forward(pairs, fake, slice(1, 2))
        )
    forward = expected["step0_forward"]
    assert_sample(fake, forward["G(input)"], tolerance)
    assert_sample(logits[:1], forward["D(input,target)"], tolerance)
    assert_sample(logits[1:], forward["D(input,gen)"], tolerance)
    assert_sample(fake_logits, forward["D(input,gen)"], tolerance)


def check_gradients(tutorial: Golden, step: TrainStep, expected: dict, tolerance: float):
    """After one step from zero moments, (1 - beta1) times the gradient is Adam's first moment."""
    for network, optimizer in (
        (step.generator, step.gen_optimizer),
        (step.discriminator, step.disc_optimizer),
    ):
        gradients = by_keras_name(tutorial, network, lambda p, o=optimizer: o.state[p]["exp_avg"] / 0.5)
        for name, gradient in gradients.items():
            norm = expected["step0_grad_l2"][name]
            if name in ("G.down8.kernel", "G.down8.gamma"):
                assert norm == 0 and torch.count_nonzero(gradient) == 0, name
            else:
                assert gradient.norm().item() == pytest.approx(norm, rel=tolerance), name
            if name in expected["step0_grad_sample"] and norm:
                sample = expected["step0_grad_sample"][name]
                keras_order = gradient.permute(2, 3, 1, 0) if gradient.ndim == 4 else gradient
                values = keras_order.reshape(-1)[sample["sample_idx"]].double().numpy()
                # one flipped activation sign moves single entries: see golden/README.md
                slack = 5 * tolerance * np.abs(sample["sample"]).max()
                np.testing.assert_allclose(values, sample["sample"], rtol=5 * tolerance, atol=slack)


def check_losses(step: TrainStep, tutorial: Golden, dtype, expected: dict, tolerances, start: int = 0):
    for i, tolerance in enumerate(tolerances, start):
        losses = step(*pair(tutorial, i, dtype))
        for name in ("gen_total_loss", "gen_gan_loss", "gen_l1_loss", "disc_loss"):
            value = getattr(losses, name).item()
            assert value == pytest.approx(expected["trajectory"][i][name], rel=tolerance), (i, name)


def test_parameter_counts():
    def counts(network):
        return (
            sum(tensor.numel() for tensor in network.state_dict().values()),
            sum(parameter.numel() for parameter in network.parameters()),
        )

    assert counts(UNetGenerator()) == (54_425_859, 54_414_979)
    assert counts(PatchDiscriminator()) == (2_770_433, 2_768_641)


def test_float64(tutorial):
    """What remains in outputs and gradients is the slope: Keras rounds 0.3 to float32."""
    check_outputs(tutorial, torch.float64, tutorial.float64, 1e-6)
    step = TrainStep(*networks(tutorial, torch.float64), StepOptions())
    check_losses(step, tutorial, torch.float64, tutorial.float64, [1e-6])
    check_gradients(tutorial, step, tutorial.float64, 1e-6)
    check_losses(step, tutorial, torch.float64, tutorial.float64, [1e-4] * 4, start=1)


def test_float32(tutorial):
    check_outputs(tutorial, torch.float32, tutorial.float32, 1e-4)
    before = networks(tutorial, torch.float32)
    step = TrainStep(*networks(tutorial, torch.float32), StepOptions())
    check_losses(step, tutorial, torch.float32, tutorial.float32, [1e-5])
    check_gradients(tutorial, step, tutorial.float32, 1e-3)
    check_losses(step, tutorial, torch.float32, tutorial.float32, [1e-4, 3e-4, 3e-4, 3e-4], start=1)
    for old, new in zip(before, (step.generator, step.discriminator), strict=True):
        first = by_keras_name(tutorial, old, lambda p: p.detach())
        for name, after in by_keras_name(tutorial, new, lambda p: p.detach()).items():
            if name.endswith("kernel"):
                change = (after - first[name]).abs().mean().item()
                expected = tutorial.float32["after5_kernel_change"][name]
                assert change == pytest.approx(expected, rel=3e-2, abs=1e-12), name


def mutate(monkeypatch, **parts):
    """Give the tutorial's preset other values in its ``parts``."""
    preset = presets.PRESETS["tutorial"]
    changed = {name: dataclasses.replace(getattr(preset, name), **values) for name, values in parts.items()}
    monkeypatch.setitem(presets.PRESETS, "tutorial", dataclasses.replace(preset, **changed))


ARCHITECTURE_MUTATIONS = {
    "slope 0.2": {"encoder_slope": 0.2, "skip_slope": 0.2, "bottleneck_slope": 0.2},
    "norm eps 1e-5": {"eps": 1e-5},
    "ReLU at the bottleneck": {"bottleneck_slope": 0.0},
    "pre-activation skips": {"skip_slope": 1.0},
    "skip before up": {"skip_first": True},
}


@pytest.mark.parametrize("mutation", ARCHITECTURE_MUTATIONS)
def test_outputs_tell_another_network(tutorial, monkeypatch, mutation):
    mutate(monkeypatch, architecture=ARCHITECTURE_MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        check_outputs(tutorial, torch.float32, tutorial.float32, 1e-2)


def test_outputs_tell_merged_discriminator_statistics(tutorial, monkeypatch):
    shared = PatchDiscriminator.shared_forward
    monkeypatch.setattr(
        PatchDiscriminator,
        "shared_forward",
        lambda *args, **options: shared(*args, **{**options, "parts": 1}),
    )
    with pytest.raises(AssertionError):
        check_outputs(tutorial, torch.float32, tutorial.float32, 1e-2)


UPDATE_MUTATIONS = {
    "0.5 * disc loss": ({"disc_factor": 0.5}, {}),
    "D updated before G": ({"simultaneous": False}, {}),
    "beta1 0.9": ({}, {"beta1": 0.9}),
    "epsilon 1e-8": ({"adam_eps": 1e-8}, {}),
    "torch's place of epsilon": ({"keras_eps": False}, {}),
}


@pytest.mark.parametrize("mutation", UPDATE_MUTATIONS)
def test_losses_tell_another_rule(tutorial, monkeypatch, mutation):
    rule, options = UPDATE_MUTATIONS[mutation]
    mutate(monkeypatch, update=rule)
    step = TrainStep(*networks(tutorial, torch.float32), StepOptions(**options))
    with pytest.raises(AssertionError):
        check_losses(step, tutorial, torch.float32, tutorial.float32, [1e-5, 1e-4, 3e-4])


def test_keras_weights_survive_the_round_trip(tutorial):
    for network, arrays in zip(
        networks(tutorial, torch.float32),
        (tutorial.arrays[:GENERATOR_ARRAYS], tutorial.arrays[GENERATOR_ARRAYS:]),
        strict=True,
    ):
        for exported, array in zip(keras.export_weights(network), arrays, strict=True):
            np.testing.assert_array_equal(exported, array)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (lambda arrays: arrays[:-1], "17 Keras arrays for a PatchDiscriminator that has 18"),
        (lambda arrays: [*arrays[:-1], np.zeros(2, np.float32)], "last.bias has shape (2,)"),
    ],
)
def test_keras_weights_of_another_network_are_refused_whole(arrays, message):
    discriminator = PatchDiscriminator(ndf=8)
    own = keras.export_weights(discriminator)
    with pytest.raises(keras.UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        keras.load_weights(discriminator, arrays([array + 1 for array in own]))
    for before, after in zip(own, keras.export_weights(discriminator), strict=True):
        np.testing.assert_array_equal(before, after)

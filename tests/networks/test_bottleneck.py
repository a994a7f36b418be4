"""At batch 1 the tutorial's bottleneck is a constant: what is not computed for it changes nothing."""

import pytest
import torch
from tiny import random_images, tiny_config

from fastpix2pix.models import build_networks
from fastpix2pix.models.blocks import Epilogue
from fastpix2pix.training.step import TrainStep


def trained(steps: int, **options) -> TrainStep:
    config = tiny_config(**options)
    generator, discriminator = build_networks(config.network_options())
    beta = generator.downs[-1].epilogue.bias
    if beta is not None:  # fresh it is 0, and what follows the bottleneck would never see it
        torch.nn.init.normal_(beta)
    step = TrainStep(generator, discriminator, config.step_options())
    for images in random_images(steps, config):
        step(*images)
    return step


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 1, "norm": "instance"}, {"batch_size": 3, "norm": "instance"}],
    ids=["batch norm", "instance norm", "instance norm of three"],
)
def test_every_number_is_that_of_the_whole_computation(options, monkeypatch):
    shortened = trained(3, **options)
    assert shortened.generator.downs[-1].epilogue.ignores(options["batch_size"], 1, 1)
    monkeypatch.setattr(Epilogue, "ignores", lambda *_: False)
    whole = trained(3, **options)
    assert len(shortened.state()) == len(whole.state())
    for actual, expected in zip(shortened.state(), whole.state(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("batch_size, arrived", [(1, 0), (2, 1)])
def test_no_gradient_is_computed_for_a_constant(batch_size, arrived):
    generator, _ = build_networks(tiny_config().network_options())
    arrivals = []
    generator.downs[-1].conv.weight.register_post_accumulate_grad_hook(arrivals.append)
    generator(torch.randn(batch_size, 3, 32, 32)).sum().backward()
    assert len(arrivals) == arrived


def test_the_convolution_runs_for_the_running_statistics():
    before, after = (trained(steps).generator.downs[-1].epilogue.running_mean for steps in (0, 1))
    assert (after != before).all()


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"preset": "junyanz"}], ids=["batch 2", "no norm"])
def test_elsewhere_the_bottleneck_learns(options):
    before, after = (trained(steps, **options).generator.downs[-1].conv.weight for steps in (0, 1))
    assert (after != before).any()

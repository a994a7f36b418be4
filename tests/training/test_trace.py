"""A step that is traced on the meta device launches what a step on tensors launches."""

import pytest
import torch

from fastpix2pix.kernels.language import HAS_TRITON
from fastpix2pix.kernels.launch import Launch, observed
from fastpix2pix.models import NetworkOptions, build_networks
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.precision import WORKING_TYPES
from fastpix2pix.training.step import TrainStep
from fastpix2pix.training.trace import kernel_launches, step_launches

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def facts(launches: list[Launch]) -> list[tuple]:
    """What the launches say, with a type, a shape, an offset and the strides that count for each tensor."""

    def of(t: torch.Tensor | None) -> tuple | None:
        if t is None:
            return None
        strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
        return t.dtype, t.shape, t.storage_offset(), strides

    return [
        (made.name, made.grid, made.variant, [of(t) for t in made.reads], [of(t) for t in made.writes])
        for made in launches
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_launches_are_those_of_a_step_on_tensors(preset, precision):
    networks = NetworkOptions(preset=preset, netG="unet_32", ngf=8, ndf=8)
    options = StepOptions(preset=preset, precision=precision)
    batch_size = 3 if precision == "fp32" else 1
    launches = []
    with observed(launches.append, run=False):
        step = TrainStep(*build_networks(networks), options)
        image = torch.zeros(batch_size, 3, 32, 32, dtype=WORKING_TYPES[precision])
        image = image.contiguous(memory_format=torch.channels_last)
        step.body(image, image.clone())
    assert len(launches) > 40
    traced = step_launches(lambda: build_networks(networks, "meta"), options, size=32, batch_size=batch_size)
    assert facts(traced) == facts(launches)


def full_step(precision: str) -> list[Launch]:
    networks, options = NetworkOptions(), StepOptions(precision=precision)
    return step_launches(lambda: build_networks(networks, "meta"), options, size=256)


def test_the_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    full_step("fp32")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_last_biases_share_launches_with_short_tensors_only(precision):
    """Their sizes are no multiples of 16, which would cost the other tensors of a launch their vectors."""
    launches = [launch for _, launch in kernel_launches(precision) if launch.name == "adam_update"]
    sizes = [[gradient.numel() for gradient in launch.args[0]] for launch in launches]
    odd = [some for some in sizes if any(size % 16 for size in some)]
    assert {size for some in odd for size in some if size % 16} == {1, 3}
    assert all(max(some) <= 512 for some in odd)
    assert max(map(len, sizes)) > 25, "and the small ones share theirs"


def test_labelled_launches_cover_both_presets_without_repeats():
    assert "deep_update" in {launch.name for _, launch in kernel_launches("bf16")}
    labelled = kernel_launches("fp16")
    names = {launch.name for _, launch in labelled}
    assert len(names) == 20, "every kernel of the package"
    assert {label.split()[0] for label, _ in labelled} == {"tutorial", "junyanz"}
    assert len(labelled) < len(full_step("fp16")) * 4 * 0.5, "two presets, with and without kept gradients"
    assert "junyanz 16x16x512 dropout sums" in {label for label, _ in labelled}

"""No program of a launch touches what another one writes, and launches say truly what they read and write."""

from functools import cache, partial

import numpy as np
import pytest
import torch
from address_recorder import Recording, in_order, recorded
from small_steps import small_step

from fastpix2pix.kernels import adam, deep_conv, language, launch
from fastpix2pix.kernels.language import tl, triton
from fastpix2pix.kernels.norm_act import norm_act
from fastpix2pix.kernels.reference import NormActConfig

pytestmark = pytest.mark.skipif(not language.INTERPRETING, reason="needs Triton's interpreter")


def assert_clean(recording: Recording) -> None:
    print(recording)
    findings = sorted({str(finding) for finding in recording.findings})
    assert not findings, "\n".join([str(recording), *findings])


# ---------------------------------------------------------------------------------------- planted faults


@triton.jit
def double_rows(x, y, extra, columns, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """Each program doubles one row, and does what ``FAULT`` says besides."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < columns
    at = row * columns + column
    value = 2 * tl.load(x + at, mask=inside)
    if FAULT == "unmasked tail":
        tl.store(y + at, value)
    else:
        tl.store(y + at, value, mask=inside)
    if FAULT == "neighbour's row":
        tl.store(y + (row + 1) % tl.num_programs(0) * columns + column, value, mask=inside)
    if FAULT == "undeclared output":
        tl.store(extra + at, value, mask=inside)
    if FAULT == "same value by all":
        tl.store(extra, 1.0)
    if FAULT == "atomic by all":
        tl.atomic_max(extra, 1.0)


def double(fault: str = "", *, reads=(), writes=()) -> tuple[Recording, torch.Tensor]:
    room = torch.arange(64, dtype=torch.float32)  # an unmasked tail lands in memory that is ours
    x, y, extra = room[:20].view(4, 5), torch.zeros(64)[:20].view(4, 5), torch.zeros(4, 5)
    by_name = {"x": x, "y": y, "extra": extra, "flag": extra[0, 0]}
    arguments = (x, y, by_name["flag"] if "all" in fault else extra, 5)
    with recorded() as recording:
        launch.launch(
            double_rows,
            (4,),
            *arguments,
            FAULT=fault,
            BLOCK=8,
            reads=[by_name[name] for name in ("x", *reads)],
            writes=[by_name[name] for name in ("y", *writes)],
        )
    assert recording.programs == 4 and recording.launches == {"double_rows": 1}
    return recording, y


def kinds(recording: Recording) -> set[tuple[str, str]]:
    return {(finding.kind, finding.argument) for finding in recording.findings}


def test_a_faultless_kernel_is_clean(triton_device):
    recording, y = double()
    assert_clean(recording)
    assert recording.accesses == 2 * 20
    assert y.equal(2 * torch.arange(20.0).view(4, 5))


@pytest.mark.parametrize(
    "fault, options, expected",
    [
        ("neighbour's row", {}, {("race", "y")}),
        ("undeclared output", {}, {("undeclared write", "extra")}),
        ("unmasked tail", {}, {("race", "y"), ("stray", "?")}),
        ("same value by all", {"writes": ["flag"]}, {("race", "extra")}),
        ("atomic by all", {"writes": ["flag"]}, set()),
        ("atomic by all", {}, {("undeclared write", "extra")}),
        ("", {"reads": ["extra"]}, {("never read", "extra")}),
        ("", {"writes": ["extra"]}, {("never written", "extra")}),
        ("", {"writes": ["flag"]}, set()),
    ],
)
def test_planted_faults_are_caught(triton_device, fault, options, expected):
    recording, _ = double(fault, **options)
    assert kinds(recording) == expected


def test_an_order_that_matters_changes_the_result(triton_device):
    _, forward = double("neighbour's row")
    with in_order(lambda n: range(n - 1, -1, -1)):
        _, backward = double("neighbour's row")
    assert not forward.equal(backward)


# ------------------------------------------------------------------------------------------ whole steps

STEPS = {
    "tutorial bf16": partial(small_step, "tutorial", "bf16"),
    "junyanz fp16, batch 2": partial(small_step, "junyanz", "fp16", batch=2),
    "tutorial fp32, batch 2": partial(small_step, "tutorial", "fp32", batch=2),
    "junyanz fp32, instance norm": partial(small_step, "junyanz", "fp32", norm="instance"),
    "tutorial fp16, 64 pixels": partial(small_step, "tutorial", "fp16", size=64, num_downs=6, width=8),
}
SLOW = pytest.mark.slow


def take(name: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One step; every tensor that it changed, and its losses."""
    step, source, target = STEPS[name]()
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(2.0**8)  # at the initial 2**16 the update would be skipped
    losses = torch.stack(step(source, target))
    assert losses.isfinite().all()
    return step.state(), losses


@cache
def recorded_step(name: str) -> tuple[Recording, list[torch.Tensor], torch.Tensor]:
    """``take`` under the recorder."""
    with recorded() as recording:
        state, losses = take(name)
    return recording, state, losses


@pytest.mark.parametrize(
    "name", [name if index < 2 else pytest.param(name, marks=SLOW) for index, name in enumerate(STEPS)]
)
def test_programs_of_a_train_step_keep_to_themselves(triton_device, name):
    recording, _, _ = recorded_step(name)
    assert recording.launches.total() > 30
    assert_clean(recording)


@pytest.mark.parametrize(
    "name", ["tutorial bf16", *(pytest.param(name, marks=SLOW) for name in list(STEPS)[1:])]
)
def test_the_order_of_programs_does_not_matter(triton_device, name):
    _, state, losses = recorded_step(name)
    orders = {
        "reversed": lambda n: range(n - 1, -1, -1),
        "shuffled": lambda n: np.random.default_rng(n).permutation(n),
    }
    for order, permutation in orders.items():
        with in_order(permutation):
            other_state, other_losses = take(name)
        assert losses.equal(other_losses), order
        for mine, other in zip(state, other_state, strict=True):
            assert mine.equal(other), order


# --------------------------------------------------------------- what steps of small networks don't launch


@pytest.mark.parametrize("training, groups", [(True, 2), (False, 1)])
def test_programs_that_share_the_pixels_of_a_layer_keep_to_themselves(triton_device, training, groups):
    """Several chunks of pixels, whose partial sums the next launch combines."""
    config = NormActConfig(training=training, groups=groups, dropout=0.5, slope=0.2, skip_slope=0.0)
    x = torch.randn(2, 12, 48, 32).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(12, requires_grad=True), torch.randn(12, requires_grad=True)
    running = torch.zeros(12), torch.ones(12)
    with recorded() as recording:
        y, skip = norm_act(x, weight, bias, *running, config=config, rng=torch.tensor([1, 2]))
        (y.sum() + skip.sum()).backward()
    assert recording.programs > 2 * len(recording.launches), "several chunks"
    assert_clean(recording)


def test_programs_that_find_infinities_keep_to_themselves(triton_device):
    gradients = [torch.zeros(5000), torch.zeros(700)]
    gradients[0][::300] = torch.inf
    gradients[1][3] = torch.nan
    found = torch.zeros(())
    with recorded() as recording:
        adam.mark_non_finite(gradients, found)
    assert found.item() == 1.0
    assert recording.programs > 5
    assert_clean(recording)


# ---------------------------------------------------------------------------------- deep convolutions


def deep_products(n: int, h: int, w: int) -> list[torch.Tensor]:
    """All three products; the big image is a slice of a wider one."""
    random = torch.Generator().manual_seed(0)

    def image(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last)

    small, wide, weight = image(n, 35, h, w), image(n, 48, 2 * h, 2 * w), image(35, 32, 4, 4)
    return [
        deep_conv.deep_conv_small(wide[:, 16:], weight),
        deep_conv.deep_conv_big(small, weight),
        deep_conv.deep_conv_weight(small, wide[:, 16:]),
    ]


@pytest.mark.parametrize("n, h, w, splits", [(1, 1, 1, 1), (2, 3, 2, 3)])
def test_programs_of_deep_convolutions_touch_nothing_of_each_others(
    triton_device, monkeypatch, n, h, w, splits
):
    monkeypatch.setattr(deep_conv, "choose_splits", lambda *_, **__: splits)
    with recorded() as recording:
        results = deep_products(n, h, w)
    assert_clean(recording)
    assert set(recording.launches) >= {"deep_conv_to_small", "deep_conv_to_big", "deep_conv_to_weight"}
    assert ("deep_conv_add" in recording.launches) == (splits > 1)
    with in_order(lambda count: range(count - 1, -1, -1)):
        backwards = deep_products(n, h, w)
    for mine, theirs in zip(results, backwards, strict=True):
        assert torch.equal(mine, theirs)

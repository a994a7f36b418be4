"""The host's side of training on fake GPUs: no tensor on another device than it should be, and nobody waits.

Everything is on cuda:1: what works there works on cuda:0, and what forgets its device is seen. It runs in one
child process, by ``everything`` (see fake_cuda.py).
"""

import numpy as np
import pytest
import torch
from fake_cuda import Machine, Report, Section, missing

from fastpix2pix.kernels import deep_conv, language, launch

pytestmark = pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")

DEVICE = "cuda:1"


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    if reason := missing():
        pytest.skip(reason)
    return Machine.build(tmp_path_factory.mktemp("fake_cuda"))


def assert_on_its_device(section: Section) -> None:
    """All tensors are on ``DEVICE``, and so is whatever was launched."""
    assert not section.mixtures
    assert set(section.devices) <= {DEVICE}
    for each in section.launches:
        assert each.devices == [DEVICE], each
        assert each.current == DEVICE, f"{each.kernel} would be launched on {each.current}"


def assert_never_waits(section: Section) -> None:
    assert not section.waits
    assert not section.transfers


# ------------------------------------------------------------------------------------ in the child process

KERNELS, DEEP, PLAIN = "kernels", "deep-kernels", "plain"
"""DEEP: every layer whose images are small enough counts as a deep one, and its convolutions are ours."""
STEPS = [
    *(
        f"{preset} {type} {KERNELS}"
        for preset in ("tutorial", "junyanz")
        for type in ("bf16", "fp16", "fp32")
    ),
    f"tutorial bf16 {DEEP}",
    f"junyanz fp16 {PLAIN}",
    f"tutorial fp32 {PLAIN}",
]


def everything(watch) -> dict:
    """All that is tested below, in one process; what failed or was made, by label."""
    made = {name: take_step(watch, name) for name in STEPS}
    capture(watch)
    made["images"] = make_images(watch)
    made["faults"] = misbehave(watch)
    return made


def take_step(watch, name: str) -> str | None:
    """A step as the loop takes it; the error if it fails."""
    from small_steps import send_losses, small_step

    preset, precision, backend = name.split()
    launch.kernels_on_gpu = backend != PLAIN
    usual = deep_conv.MIN_WEIGHTS, deep_conv.solved_here
    if backend == DEEP:
        deep_conv.MIN_WEIGHTS = 0
        deep_conv.solved_here = lambda problem, x: x.is_cuda and deep_conv.fits(problem)
    step, source, target = small_step(preset, precision, device=DEVICE)
    try:
        with watch(f"{name}: step"):
            step.set_lr(1e-3)
            step.upload_lr()
            step.body(source, target)
            step.stepped()
        with watch(f"{name}: losses"):
            send_losses(step, 1)
    except RuntimeError as error:
        return str(error)
    finally:
        launch.kernels_on_gpu = True
        deep_conv.MIN_WEIGHTS, deep_conv.solved_here = usual
    return None


def capture(watch) -> None:
    from small_steps import captured, small_step

    with torch.cuda.device(DEVICE):
        step, source, target = small_step("tutorial", "bf16", device=DEVICE)
        run = captured(step)
        for time in ("first", "again"):
            with watch(f"captured: {time}"):
                run(source, target)


def make_images(watch) -> list:
    from fastpix2pix.data.jitter import jitter
    from fastpix2pix.data.resize import resize

    images = torch.empty(5, 60, 52, 3, dtype=torch.uint8, device=DEVICE)
    made = {}
    for time in ("first", "again"):
        for interpolation in ("nearest", "bicubic"):
            with watch(f"{interpolation}: {time}"):
                made[interpolation] = resize(images, 40, interpolation)
    numbers = np.arange(5)
    with watch("jitter"):
        made["jitter"] = jitter(made["nearest"], numbers, numbers, numbers % 2, 32, torch.float16)
    return [[name, str(tensor.device), list(tensor.shape)] for name, tensor in made.items()]


def misbehave(watch) -> list[str]:
    """What the tests forbid; the labels of what raised an error."""
    from fastpix2pix.kernels.tanh_l1 import tanh_l1

    x, host = torch.ones(4, 3, device=DEVICE), torch.ones(4, 3)
    other, image = torch.ones(3, device="cuda:0"), torch.ones(1, 3, 4, 4, device=DEVICE)
    faults = {
        "item": lambda: x.sum().item(),
        "list index": lambda: x[[0, 2]],
        "mask index": lambda: x[x > 0],
        "to the device": lambda: host.to(DEVICE),
        "to the host": lambda: host.copy_(x),
        "new from numbers": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
        "a number of the host": lambda: x * torch.ones(()),
        "another device": lambda: x + other,
        "wait": lambda: torch.cuda.synchronize(DEVICE),
        "launch": lambda: tanh_l1(image, None, image),
        "harmless": lambda: x.mul(2.0).add_(torch.full((), 3.0, device=DEVICE)).index_select(0, x[0].long()),
    }
    raised = []
    for name, fault in faults.items():
        with watch(name):
            try:
                fault()
            except RuntimeError:
                raised.append(name)
    return raised


# ----------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def report(machine: Machine) -> Report:
    return machine.run(everything)


@pytest.mark.parametrize("name", STEPS)
def test_a_train_step_stays_on_its_gpu_and_never_waits(report: Report, name: str):
    section = report.sections[f"{name}: step"]
    assert_on_its_device(section)
    assert_never_waits(section)
    assert report.result[name] is None
    assert len(section.launches) > 30 if KERNELS in name else not section.launches
    assert sum(section.ops.values()) > 100
    deep = {each.kernel for each in section.launches if each.kernel.startswith("deep_conv_to")}
    assert deep >= ({"deep_conv_to_small", "deep_conv_to_big"} if DEEP in name else set())


@pytest.mark.parametrize("name", [name for name in STEPS if KERNELS in name])
def test_losses_leave_the_gpu_by_one_copy_that_nobody_waits_for(report: Report, name: str):
    section = report.sections[f"{name}: losses"]
    assert not section.waits
    (transfer,) = section.transfers
    assert (transfer.source, transfer.target, transfer.elements) == (DEVICE, "cpu", 6)
    assert transfer.non_blocking and transfer.pinned
    assert section.calls == [f"record {DEVICE} stream 0"]


def test_capture_and_replay_name_the_device_of_the_step(report: Report):
    first, again = report.sections["captured: first"], report.sections["captured: again"]
    assert all(DEVICE in call for call in first.calls + again.calls)
    assert_on_its_device(first)
    assert len({each.stream for each in first.launches} - {0}) == 1, "one side stream"
    assert not first.transfers
    assert again.calls == [f"replay {DEVICE} stream 0"]
    assert not again.launches
    assert_on_its_device(again)
    assert_never_waits(again)


def test_images_are_resized_and_jittered_on_their_gpu(report: Report):
    assert report.result["images"] == [
        ["nearest", DEVICE, [5, 40, 40, 3]],
        ["bicubic", DEVICE, [5, 40, 40, 3]],
        ["jitter", DEVICE, [5, 3, 32, 32]],
    ]
    for name in ("nearest: first", "nearest: again", "bicubic: again", "jitter"):
        assert_on_its_device(report.sections[name])
        assert_never_waits(report.sections[name])
    tables = report.sections["bicubic: first"]  # of the filter, once for each size of images
    assert not tables.mixtures and {transfer.target for transfer in tables.transfers} == {DEVICE}


def test_what_a_fake_gpu_notices(report: Report):
    names = ["item", "list index", "mask index", "to the device", "to the host", "new from numbers"]
    names += ["a number of the host", "another device", "wait", "launch", "harmless"]
    sections = {name: report.sections[name] for name in names}
    assert report.result["faults"] == ["item", "mask index", "another device"]
    waits = {name for name, section in sections.items() if section.waits}
    assert waits == {*names[:6], "wait"}
    assert all("(test_fake_cuda.py:" in sections[name].waits[0] for name in waits)
    assert {name for name in names if sections[name].transfers} == {names[1], *names[3:6]}
    assert {name for name in names if sections[name].mixtures} == {"a number of the host", "another device"}
    (transfer,) = sections["to the host"].transfers
    assert (transfer.source, transfer.target) == (DEVICE, "cpu")
    assert not transfer.non_blocking and not transfer.pinned
    assert sections["wait"].calls == [f"synchronize {DEVICE}"]
    launches = sections["launch"].launches
    assert [each.kernel for each in launches] == ["tanh_l1_forward_map", "tanh_l1_sums"]
    assert all(each.devices == [DEVICE] for each in launches)

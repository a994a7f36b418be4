"""The side stream: what is forked to it may run at any time before it is joined, and no bit changes."""

import random
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from fake_graph import CaptureRefused, FakeGraphBackend, Tape, static_tensors
from small_steps import call_small_weights_large, launch_updates_alone, small_step
from torch.multiprocessing.reductions import StorageWeakRef

from fastpix2pix.kernels import cpu_conv, deep_conv, launch
from fastpix2pix.training import streams
from fastpix2pix.training.step import TrainStep
from fastpix2pix.training.streams import SideStream

STEPS = {
    "tutorial bf16": ("tutorial", "bf16"),
    "junyanz bf16": ("junyanz", "bf16"),
    "junyanz fp32": ("junyanz", "fp32"),
    "junyanz fp16": ("junyanz", "fp16"),
}


class Recorded(NamedTuple):
    """A step, its tape, and its state before and after it."""

    step: TrainStep
    tape: Tape
    before: list[torch.Tensor]
    after: list[torch.Tensor]

    def replayed(self, delay: Callable[[int], int]) -> list[torch.Tensor]:
        """The step's state after a replay."""
        with torch.no_grad():
            for tensor, value in zip(self.step.state(), self.before, strict=True):
                tensor.copy_(value)
        self.tape.replay(delay)
        return [tensor.clone() for tensor in self.step.state()]


def never(waiting: int) -> int:
    """Not before the join."""
    return 0


def at_random(seed: int) -> Callable[[int], int]:
    chooser = random.Random(seed)
    return lambda waiting: chooser.randint(0, waiting) if chooser.random() < 0.2 else 0


@cache
def record(name: str, loss_scale: float = 2.0**8) -> Recorded:
    """loss_scale: not the initial one, at which fp16 would skip the update."""
    step, source, target = small_step(*STEPS[name])
    step.upload_lr()
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(loss_scale)
    before = [tensor.clone() for tensor in step.state()]
    backend = FakeGraphBackend(partial(static_tensors, step), on_kernels=True)
    backend.capture(partial(step.segments, source, target))
    return Recorded(step, backend.tapes[0], before, [tensor.clone() for tensor in step.state()])


def differing(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> int:
    """NaN, the rate of a clock that has not counted a step yet, equals itself."""
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    return sum(not torch.allclose(a, b, **exactly) for a, b in zip(mine, theirs, strict=True))


@pytest.fixture
def on_kernels(triton_device, monkeypatch):
    if triton_device != "cpu":
        pytest.skip("records on the CPU")
    call_small_weights_large(monkeypatch)
    launch_updates_alone(monkeypatch)
    monkeypatch.setattr(cpu_conv, "find_tiling", lambda *_: None)  # gradients of a GPU's layout


@pytest.mark.parametrize(
    "name",
    [
        "junyanz bf16",
        "junyanz fp16",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tutorial bf16", "junyanz fp32")),
    ],
)
def test_no_order_that_is_allowed_changes_a_bit(on_kernels, name):
    recorded = record(name)
    kernels = {recorded.tape.names[index] for index in recorded.tape.forked}
    assert kernels == ({"adam_mark_non_finite"} if "fp16" in name else {"deep_update", "adam_update"})
    assert differing(recorded.after, recorded.before) > 50
    for delay in (never, at_random(0), at_random(1)):
        assert differing(recorded.replayed(delay), recorded.after) == 0


def test_what_is_found_beside_the_backward_pass_stops_the_update(on_kernels):
    recorded = record("junyanz fp16", loss_scale=2.0**40)
    found = differing(recorded.before, recorded.after)
    assert 0 < found < 30, "statistics, losses and the scale; no weight"
    assert differing(recorded.replayed(never), recorded.after) == 0


def test_a_weight_written_before_its_last_reader_is_caught(on_kernels, monkeypatch):
    """The gradient taken first, and only then the data gradient computed."""
    right = deep_conv.backward

    def wrong(dy, state, take_gradient, *, needs_x, needs_weight, **others):
        *_, dweight = right(dy, state, take_gradient, needs_x=False, needs_weight=needs_weight, **others)
        *rest, _ = right(dy, state, take_gradient, needs_x=needs_x, needs_weight=False, **others)
        return *rest, dweight

    monkeypatch.setattr(deep_conv, "backward", wrong)
    recorded = record.__wrapped__("tutorial bf16")
    assert differing(recorded.after, recorded.replayed(never)) > 10


def test_a_weight_read_before_the_join_is_caught(on_kernels):
    """The second half of junyanz's rule reads the discriminator that the first half has written."""
    recorded = record("junyanz bf16")
    tape, joins = recorded.tape, recorded.tape.joins
    assert len(joins) == 2
    try:
        tape.joins = {max(joins)}
        assert differing(recorded.after, recorded.replayed(never)) > 10
        tape.joins = set()
        with pytest.raises(CaptureRefused, match="not joined"):
            tape.replay(never)
    finally:
        tape.joins = joins


class RecordingCuda:
    """Stands in for ``torch.cuda`` in streams.py; every stream has to name the device."""

    def __init__(self):
        cuda, self.calls = self, []

        class Stream:
            def __init__(self, device, name="side"):
                assert device == GPU
                self.name = name

            def wait_stream(self, other):
                cuda.calls.append(f"{self.name} waits for {other.name}")

        self.Stream = Stream
        self.default = self.current = Stream(GPU, "default")

    def current_stream(self, device):
        assert device == GPU
        return self.current

    @contextmanager
    def stream(self, entered):
        self.current, previous = entered, self.current
        yield
        self.current = previous


GPU = torch.device("cuda:1")


@pytest.fixture
def cuda(monkeypatch) -> RecordingCuda:
    made = RecordingCuda()
    monkeypatch.setattr(streams, "torch", SimpleNamespace(cuda=made))
    return made


def test_order_of_calls_to_cuda(cuda):
    side = SideStream(GPU)
    side.join()
    assert not cuda.calls, "a stream that is no part of a capture can't be waited for"
    for number in (1, 2):
        side.fork(lambda number=number: cuda.calls.append(f"{number} on {cuda.current.name}"), uses=[])
    side.join()
    side.join()
    assert cuda.calls == [
        *("side waits for default", "1 on side"),
        *("side waits for default", "2 on side"),
        "default waits for side",
    ]


@pytest.mark.parametrize("name", ["tutorial bf16", "junyanz bf16"])
def test_what_the_side_stream_uses_lives_until_the_join(on_kernels, monkeypatch, cuda, name):
    """Freed earlier, its memory would be the next operation's of the current stream, which does not wait."""
    used, joined = [], []

    def on_launch(this: launch.Launch) -> None:
        if cuda.current is not cuda.default:
            tensors = [tensor for tensor in (*this.reads, *this.writes) if tensor is not None]
            used.append((this.name, [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]))

    class Checked(SideStream):
        def join(self):
            waiting = used[joined[-1] if joined else 0 :]
            joined.append(len(used))
            assert not [name for name, storages in waiting if any(storage.expired() for storage in storages)]
            super().join()

    step, source, target = small_step(*STEPS[name])
    step.side = Checked(GPU)
    with launch.observed(on_launch):
        step(source, target)
    assert {name for name, _ in used} == {"deep_update", "adam_update"}
    assert joined[-1] == len(used) > 10
    gone = [any(storage.expired() for storage in storages) for _, storages in used]
    assert sum(gone) > 10, "and no longer"


def test_what_a_failed_step_forked_is_forgotten(cuda):
    side, image = SideStream(GPU), torch.ones(1)
    storage = StorageWeakRef(image.untyped_storage())
    side.fork(lambda: None, uses=[image])
    del image
    assert not storage.expired()
    side.abandon()
    assert storage.expired()
    side.join()
    assert cuda.calls == ["side waits for default"]

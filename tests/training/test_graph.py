"""The captured step, on a fake graph: what replays must equal eager steps, and faults must show."""

import contextlib
import gc
import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_graph import CaptureRefused, FakeGraphBackend, static_tensors

from fastpix2pix.kernels import cpu_conv
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training import graph, step
from fastpix2pix.training.graph import CapturedStep
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.step import TrainStep

FOREIGN = torch.ones(1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def convolve_as_a_gpu_does(monkeypatch):
    monkeypatch.setattr(cpu_conv, "find_tiling", lambda *_: None)


def small_step(preset="tutorial", precision="fp32", *, ngf=8, num_downs=6, seed=1, **options) -> TrainStep:
    torch.manual_seed(seed)
    networks = (
        UNetGenerator(preset, ngf=ngf, num_downs=num_downs, seed=3),
        PatchDiscriminator(preset, ndf=ngf),
    )
    train_step = TrainStep(*networks, StepOptions(preset=preset, precision=precision, **options))
    if train_step.loss_scale is not None:
        train_step.loss_scale.scale.fill_(2.0**8)  # at the initial 2**16 the first steps would be skipped
    return train_step


def pairs(count, precision="fp32", size=64, batch=1):
    random = torch.Generator().manual_seed(7)
    for _ in range(count):
        images = torch.rand(2, batch, 3, size, size, generator=random) * 2 - 1
        yield [image.to(DTYPES[precision], memory_format=torch.channels_last) for image in images]


def with_fake_graph(train_step, on_kernels=False) -> CapturedStep:
    return CapturedStep(train_step, FakeGraphBackend(partial(static_tensors, train_step), on_kernels))


def losses_of(run, train_step, inputs) -> list[torch.Tensor]:
    """The six losses of each step, at a learning rate that changes in every one."""
    seen = []
    for i, (source, target) in enumerate(inputs):
        train_step.set_lr(1e-4 / (1 + i))  # from the first step on not what the optimizers were made with
        seen.append(torch.stack(run(source, target)).clone())
    return seen


def assert_replays_equal_eager(make, inputs, on_kernels=False):
    eager, captured = make(), make()
    expected = losses_of(eager, eager, inputs)
    capturing = with_fake_graph(captured, on_kernels)
    for i, (mine, theirs) in enumerate(zip(losses_of(capturing, captured, inputs), expected, strict=True)):
        assert torch.equal(mine, theirs), f"step {i}: {mine.tolist()} is not {theirs.tolist()}"
    for mine, theirs in zip(captured.state(), eager.state(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(captured.fake, eager.fake)
    return capturing


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_twenty_replays_equal_twenty_eager_steps(preset, precision):
    """Changing inputs and learning rates, advancing dropout; step 1 shows that warm-up left no trace."""
    make = partial(small_step, preset, precision)
    assert_replays_equal_eager(make, list(pairs(20, precision)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_twenty_replays_of_the_full_network(preset, precision):
    make = partial(small_step, preset, precision, ngf=64, num_downs=8)
    assert_replays_equal_eager(make, list(pairs(20, precision, size=256)))


@pytest.mark.parametrize(
    ("preset", "precision"),
    [
        ("tutorial", "fp32"),
        pytest.param("tutorial", "fp16", marks=pytest.mark.slow),
        pytest.param("junyanz", "bf16", marks=pytest.mark.slow),
    ],
)
def test_replays_on_triton_kernels(triton_device, monkeypatch, preset, precision):
    monkeypatch.setattr(graph, "WARM_UP_STEPS", 1)
    make = partial(small_step, preset, precision, ngf=4, num_downs=5)
    capturing = assert_replays_equal_eager(make, list(pairs(2, precision, size=32)), on_kernels=True)
    names = set(capturing._backend.tapes[0].names)
    fused = "cat leaky_relu relu tanh dropout native_dropout bernoulli_ native_batch_norm var_mean sigmoid"
    assert not names & {f"aten::{name}" for name in fused.split()}
    assert {"adam_update", "aten::convolution"} <= names


def test_a_forced_overflow_skips_the_update_and_halves_the_scale():
    train_step = small_step(precision="fp16")
    captured = with_fake_graph(train_step)
    inputs = list(pairs(2, "fp16"))
    captured(*inputs[0])
    before = [master.clone() for master in train_step.gen_optimizer.masters()]
    taken = int(train_step.gen_optimizer._clocks[0].step)
    train_step.loss_scale.scale.fill_(2.0**40)
    captured(*inputs[1])
    assert float(train_step.loss_scale.scale) == 2.0**39
    assert int(train_step.gen_optimizer._clocks[0].step) == taken
    for master, value in zip(train_step.gen_optimizer.masters(), before, strict=True):
        assert torch.equal(master, value)
    train_step.loss_scale.scale.fill_(2.0**10)
    captured(*inputs[1])
    assert int(train_step.gen_optimizer._clocks[0].step) == taken + 1


def test_each_shape_has_its_own_capture():
    """A smaller last batch, then the first shape again: no replay of the wrong graph."""
    train_step = small_step()
    inputs = [*pairs(1, batch=2), *pairs(1, batch=1), *pairs(1, batch=2), *pairs(1, size=128)]
    eager = small_step()
    captured = with_fake_graph(train_step)
    for source, target in inputs:
        expected, losses = torch.stack(eager(source, target)), torch.stack(captured(source, target))
        assert torch.equal(losses, expected)
        assert torch.equal(train_step.fake, eager.fake)
    assert len(captured._backend.tapes) == 3


# ------------------------------------------------------------------------------------------ planted faults


def lr_as_a_number(monkeypatch):
    begin = step.begin_steps

    def baked(optimizers):
        for optimizer in optimizers:
            for group, clock in zip(optimizer.param_groups, optimizer._clocks, strict=True):
                clock.lr.fill_(group["lr"])
        begin(optimizers)

    monkeypatch.setattr(step, "begin_steps", baked)


def dropout_seed_from_the_host(monkeypatch):
    before_tanh = UNetGenerator.before_tanh

    def seeded(self, source):
        self.host_step = getattr(self, "host_step", 0) + 1
        self.rng[1:].fill_(self.host_step)
        return before_tanh(self, source)

    monkeypatch.setattr(UNetGenerator, "before_tanh", seeded)


def state_created_inside(monkeypatch):
    """As an optimizer that makes its moments at its first step, captured without a warm-up."""
    begin, made = step.begin_steps, set()

    def lazy(optimizers):
        for optimizer in set(optimizers) - made:
            made.add(optimizer)
            for state in optimizer.state.values():
                state["exp_avg"] = torch.zeros_like(state["exp_avg"])
        begin(optimizers)

    monkeypatch.setattr(step, "begin_steps", lazy)
    monkeypatch.setattr(graph, "WARM_UP_STEPS", 0)


def input_rebound(monkeypatch):
    call = CapturedStep.__call__

    def rebinding(self, source, target):
        for key, captured in self._captured.items():
            self._captured[key] = captured._replace(source=source.clone(), target=target.clone())
        return call(self, source, target)

    monkeypatch.setattr(CapturedStep, "__call__", rebinding)


@pytest.mark.parametrize(
    "fault", [lr_as_a_number, dropout_seed_from_the_host, state_created_inside, input_rebound]
)
def test_a_planted_fault_shows(monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises((AssertionError, CaptureRefused)):
        assert_replays_equal_eager(small_step, list(pairs(4)))


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (lambda x: x.sum().item(), "read on the host"),
        (lambda x: x.nonzero(), "size of its result"),
        (lambda x: x + torch.tensor(2.0), "copied to the device|neither static"),
        (lambda x: x + FOREIGN, "neither static"),
    ],
)
def test_what_a_capture_refuses_falls_back_to_the_eager_step_with_one_warning(monkeypatch, talk, reason):
    update = TrainStep._simultaneous

    def talking(self, source, target):
        talk(source)
        return update(self, source, target)

    monkeypatch.setattr(TrainStep, "_simultaneous", talking)
    eager, train_step = small_step(), small_step()
    captured = with_fake_graph(train_step)
    inputs = list(pairs(3))
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        losses = losses_of(captured, train_step, inputs)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mine, theirs in zip(losses, losses_of(eager, eager, inputs), strict=True):
            assert torch.equal(mine, theirs)


# --------------------------------------------------------------------------------------- the step's body


@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_the_body_keeps_to_the_device(preset):
    """No host sync, no foreign tensor, nothing persistent made; the state stays at its addresses."""
    train_step = small_step(preset)
    body_inputs = next(pairs(1))
    for _ in range(2):
        addresses = [tensor.data_ptr() for tensor in static_tensors(train_step)]
        backend = FakeGraphBackend(partial(static_tensors, train_step))
        backend.capture(partial(train_step.segments, *body_inputs))  # raises on what a capture refuses
        assert [tensor.data_ptr() for tensor in static_tensors(train_step)] == addresses
        assert all(parameter.grad is None for parameter in train_step.generator.parameters())


@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_large_weights_updated_early_end_where_they_would_all_at_once(monkeypatch, preset):
    inputs = list(pairs(3))
    late = small_step(preset)
    losses_of(late, late, inputs)
    monkeypatch.setattr(step, "LARGE", 1)
    early = small_step(preset)
    updated = []
    step_parameter = step.MasterAdam.step_parameter
    monkeypatch.setattr(
        step.MasterAdam,
        "step_parameter",
        lambda self, *args: updated.append(args[0]) or step_parameter(self, *args),
    )
    losses_of(early, early, inputs)
    assert len(updated) > 100
    for mine, theirs in zip(early.state(), late.state(), strict=True):
        assert torch.equal(mine, theirs)


# ----------------------------------------------------------------------------- the lines only a GPU runs


class RecordingCuda:
    """Stands in for ``torch.cuda`` in graph.py and notes what is asked of it, in order.

    Every stream and wait has to name the device: without one, they are those of the current GPU.
    """

    def __init__(self, ending_fails: bool = False):
        self.calls = []
        self.ending_fails = ending_fails
        cuda = self

        class Stream:
            def __init__(self, device, priority=0, name="side"):
                self.device, self.priority, self.name = device, priority, name

            def wait_stream(self, other):
                cuda.calls.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def replay(self):
                cuda.calls.append("replay")

        self.Stream, self.CUDAGraph = Stream, CUDAGraph
        self.current = Stream(GPU, name="default")

    def current_stream(self, device):
        assert device == GPU
        return self.current

    def set_stream(self, stream):
        self.current = stream

    def synchronize(self, device):
        assert device == GPU
        self.calls.append("synchronize")

    def graph_pool_handle(self):
        return "pool"

    @contextlib.contextmanager
    def stream(self, stream):
        self.current, previous = stream, self.current
        yield
        self.current = previous

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        """As torch's own: where ending the capture raises, the stream that was current is not restored."""
        assert stream.device == GPU and pool == "pool"
        assert stream.priority < 0, "before the stream of the updates"
        self.calls.append(f"begin capture on {stream.name}, {capture_error_mode}")
        self.current, previous = stream, self.current
        yield
        if self.ending_fails:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")
        self.current = previous
        self.calls.append("end capture")


GPU = torch.device("cuda:1")


def on_recording_cuda(monkeypatch, cuda: RecordingCuda) -> tuple[TrainStep, CapturedStep]:
    stand_in = SimpleNamespace(
        cuda=cuda, preserve_format=torch.preserve_format, _foreach_copy_=torch._foreach_copy_
    )
    monkeypatch.setattr(graph, "torch", stand_in)
    monkeypatch.setattr(graph.CudaBackend, "failure", None)
    train_step = small_step(num_downs=5, ngf=4)
    return train_step, CapturedStep(train_step, graph.CudaBackend(GPU))


def test_order_of_calls_to_cuda(monkeypatch):
    cuda = RecordingCuda()
    train_step, captured = on_recording_cuda(monkeypatch, cuda)
    segments = train_step.segments

    def recorded(*images):
        cuda.calls.append(f"body on {cuda.current.name}")
        yield from segments(*images)

    monkeypatch.setattr(train_step, "segments", recorded)
    restore = graph.restore
    monkeypatch.setattr(graph, "restore", lambda *a: cuda.calls.append("restore") or restore(*a))
    inputs = next(pairs(1, size=32))
    captured(*inputs)
    captured(*inputs)
    assert cuda.calls == [
        "side waits for default",
        *["body on side"] * graph.WARM_UP_STEPS,
        "default waits for side",
        "synchronize",
        "begin capture on side, thread_local",
        "body on side",
        "end capture",
        "restore",
        "replay",
        "replay",
    ]
    assert captured.failure is None


def test_a_failed_capture_restores_the_stream_and_is_the_last_of_the_process(monkeypatch):
    cuda = RecordingCuda(ending_fails=True)
    train_step, captured = on_recording_cuda(monkeypatch, cuda)
    (inputs,) = pairs(1, size=32)
    with pytest.warns(RuntimeWarning, match="operation failed due to a previous error during capture"):
        captured(*inputs)
    assert cuda.current.name == "default"
    assert captured.failure.startswith("operation failed")
    begun = cuda.calls.count("begin capture on side, thread_local")
    other = CapturedStep(train_step, graph.CudaBackend(GPU))
    with pytest.warns(RuntimeWarning, match="an earlier capture failed: operation failed"):
        other(*inputs)
    assert cuda.calls.count("begin capture on side, thread_local") == begun


def test_a_warm_up_that_fails_is_no_failed_capture(monkeypatch):
    """The eager step would fail in the same way: it is for the self-check to give up the kernels."""
    train_step = small_step(num_downs=5, ngf=4)
    before = [tensor.clone() for tensor in train_step.state()]
    captured = with_fake_graph(train_step)
    update = TrainStep._update

    def failing(self, *paths):
        update(self, *paths)
        raise OSError("no C compiler")

    monkeypatch.setattr(TrainStep, "_update", failing)
    with pytest.raises(OSError, match="no C compiler"):
        captured(*next(pairs(1, size=32)))
    assert captured.failure is None
    for tensor, value in zip(train_step.state(), before, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_dropped_step_is_freed(precision):
    """Hooks of its weights refer to it weakly; autograd's own references to them are no Python cycle."""
    train_step = small_step(num_downs=5, ngf=32, precision=precision)
    assert any(p.numel() >= step.LARGE for p in train_step.generator.parameters())
    train_step(*next(pairs(1, precision, size=32)))
    gone = [weakref.ref(x) for x in (train_step, train_step.generator, train_step.gen_optimizer)]
    del train_step
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3

"""The only file that knows CUDA graphs: warm up, restore, capture, replay, fall back.

Asynchronous copies to the host live here too, the other thing that only a GPU does.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastpix2pix.training.losses import Losses
from fastpix2pix.training.step import Between, TrainStep

# Warm-up steps: cuDNN chooses its algorithms and Triton compiles in the first, the allocator's pools settle
# in the second; PyTorch's own recipe (docs, "CUDA semantics", "Whole-network capture") has three.
WARM_UP_STEPS = 3


class Backend(Protocol):
    """What captures: CUDA, or what stands in for it in the tests.

    failure: why a capture failed in this process, after which no other is tried; None as long as none did.
    """

    failure: str | None

    def warm_up(self, body: Callable[[], None], times: int) -> None:
        """Run ``body`` as it will be captured."""

    def capture(self, segments: Callable[[], Iterator[Between]]) -> Callable[[], None]:
        """Run what is between the values of the generator once, and return what does the same work again on
        the same tensors, calling these values between."""


def capture_segments(
    running: Iterator[Between], capture: Callable[[Callable[[], None]], Callable[[], None]]
) -> Callable[[], None]:
    """Have each segment of a step captured by ``capture``, and return the replay of all.

    capture: runs a segment and returns its replay. What is between segments is not run: no value in memory
    means anything while a step is captured.
    """
    parts: list[Callable[[], None]] = []
    following: Between | None = None

    def segment() -> None:
        nonlocal following
        following = next(running, None)

    while True:
        parts.append(capture(segment))
        if following is None:
            break
        parts.append(following)

    def replay() -> None:
        for part in parts:
            part()

    return replay if len(parts) > 1 else parts[0]


class CudaBackend:
    """``torch.cuda`` graphs. One side stream serves warm-up and capture, as autograd remembers streams."""

    failure: str | None = None  # of the class: after a failed capture the allocator is not to be trusted

    def __init__(self, device: torch.device):
        self.device = device
        # The few programs of the backward pass go before the thousands of Adam's on the step's side stream: a
        # capture copies the priority to each kernel, and torch heeds it since 2.10 (pytorch #167346).
        self.stream = torch.cuda.Stream(device, priority=-1)

    def warm_up(self, body: Callable[[], None], times: int) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(times):
                body()
        current.wait_stream(self.stream)
        torch.cuda.synchronize(self.device)

    def capture(self, segments: Callable[[], Iterator[Between]]) -> Callable[[], None]:
        pool = torch.cuda.graph_pool_handle()  # of all segments, which are replayed in the order of capture
        return capture_segments(segments(), partial(self._capture, pool))

    def _capture(self, pool: Any, segment: Callable[[], None]) -> Callable[[], None]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # thread_local: DALI, NCCL and pinned-memory threads may call CUDA while this thread captures.
            with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                segment()
        except Exception as error:
            CudaBackend.failure = first_line(error)
            raise
        finally:
            torch.cuda.set_stream(current)  # where ending the capture raises, the side stream stays current
        return graph.replay


class _Captured(NamedTuple):
    """A step's graphs, and the tensors that they read and leave its image in."""

    replay: Callable[[], None]
    source: Tensor
    target: Tensor
    fake: Tensor


class CapturedStep:
    """A ``TrainStep`` whose body is captured once for each shape of its inputs, then only replayed: in one
    graph, or, where several ranks exchange tensors between its segments, in a graph for each.

    Called as the step itself is. A capture that fails, for whatever reason, is tried only once a process:
    from then on the step runs eagerly, in all ranks. ``failure`` says why, and is None as long as all is
    captured.
    """

    def __init__(self, step: TrainStep, backend: Backend | None = None):
        self.step = step
        self._backend = CudaBackend(step.ring.rows.device) if backend is None else backend
        self._captured: dict[tuple, _Captured] = {}
        self.failure: str | None = None

    def __call__(self, source: Tensor, target: Tensor) -> Losses:
        self.capture(source, target)
        if self.failure is not None:
            return self.step(source, target)
        captured = self._captured[_key(source, target)]
        slots = [captured.source, captured.target]
        torch._foreach_copy_(slots, [source, target], non_blocking=True)  # one launch
        self.step.upload_lr()
        captured.replay()
        self.step.fake = captured.fake
        return self.step.stepped()

    def capture(self, source: Tensor, target: Tensor) -> None:
        """Capture the step for inputs like these, unless that is done; the step's state stays as it was.

        Warns once where the capture fails. What fails in the warm-up, before any capture, is raised: the
        eager step would fail in the same way.
        """
        key = _key(source, target)
        if key in self._captured or self.failure is not None:
            return
        earlier = self._backend.failure
        if reason := self._of_any_rank(None if earlier is None else f"an earlier capture failed: {earlier}"):
            self._give_up(reason)
            return
        self.step.upload_lr()  # first, so that what is restored below is the rate that counts as uploaded
        before = [tensor.clone() for tensor in self.step.state()]
        slots = [image.clone(memory_format=torch.preserve_format) for image in (source, target)]
        body = partial(self.step.body, *slots)
        failed = None
        try:
            self._backend.warm_up(body, WARM_UP_STEPS)
            try:
                replay = self._backend.capture(partial(self.step.segments, *slots))
            except Exception as error:  # of CUDA, Triton, the allocator, or a library's own: all mean eager
                failed = first_line(error)
            if reason := self._of_any_rank(failed):
                self._give_up(reason)
            else:
                self._captured[key] = _Captured(replay, slots[0], slots[1], self.step.fake)
        finally:
            self.step.forget_gradients()
            # Warm-up steps were real ones; training starts from where they began.
            restore(self.step.state(), before)

    def release(self) -> None:
        """Let go of all graphs: before the ranks leave their group."""
        self._captured.clear()

    def _of_any_rank(self, reason: str | None) -> str | None:
        """Why this rank, or another one, can't capture the step; None if all can.

        Ranks that capture warm up before, by exchanges for which all are needed.
        """
        if self.step.exchange is None:
            return reason
        failed = self.step.ring.rows.new_full((1,), reason is not None)
        self.step.exchange.max_(failed)
        return reason or ("it failed in another process" if failed.item() else None)

    def _give_up(self, reason: str) -> None:
        self.failure = reason
        self._captured.clear()
        warnings.warn(
            f"the step could not be captured in a CUDA graph and runs without, slower: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )


def _key(source: Tensor, target: Tensor) -> tuple:
    return source.shape, source.dtype, target.shape, target.dtype


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def restore(state: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy ``values`` back into the tensors of ``state``, which stay where they are."""
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)


class AsyncHostCopy:
    """A copy of a device tensor on its way to the host; ``ready`` never waits, ``wait`` does."""

    def __init__(self, tensor: Tensor):
        self._event = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host

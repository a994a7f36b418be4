"""The only file that knows CUDA graphs: warm up, restore, capture, replay, fall back.

It is also where the other lines live that only a GPU runs: precision switches and asynchronous reading.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastpix2pix.step import Losses, TrainStep

# Warm-up steps: cuDNN chooses its algorithms and Triton compiles in the first, the allocator's pools settle
# in the second; PyTorch's own recipe (docs, "CUDA semantics", "Whole-network capture") has three.
WARM_UP_STEPS = 3


class Backend(Protocol):
    """What captures: CUDA, or what stands in for it in the tests."""

    def warm_up(self, body: Callable[[], None], times: int) -> None:
        """Run ``body`` as it will be captured."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Run ``body`` once, and return what does the same work again on the same tensors."""


class CudaBackend:
    """``torch.cuda`` graphs. One side stream serves warm-up and capture, as autograd remembers streams."""

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def warm_up(self, body: Callable[[], None], times: int) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(times):
                body()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: DALI and pinned-memory threads may call CUDA while this thread captures.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            body()
        return graph.replay


class _Captured(NamedTuple):
    """A graph and the tensors that it reads and leaves its image in."""

    replay: Callable[[], None]
    source: Tensor
    target: Tensor
    fake: Tensor


class CapturedStep:
    """A ``TrainStep`` whose body is captured once for each shape of its inputs, then only replayed.

    Called as the step itself is. When a capture fails, warns once and runs the step eagerly from then on.
    """

    def __init__(self, step: TrainStep, backend: Backend | None = None):
        self.step = step
        self._backend = CudaBackend() if backend is None else backend
        self._captured: dict[tuple, _Captured] = {}
        self._eager = False

    def __call__(self, source: Tensor, target: Tensor) -> Losses:
        key = (source.shape, source.dtype, target.shape, target.dtype)
        if key not in self._captured and not self._eager:
            self._try_to_capture(key, source, target)
        if self._eager:
            return self.step(source, target)
        captured = self._captured[key]
        captured.source.copy_(source, non_blocking=True)
        captured.target.copy_(target, non_blocking=True)
        self.step.upload_lr()
        captured.replay()
        self.step.fake = captured.fake
        return self.step.stepped()

    def _try_to_capture(self, key: tuple, source: Tensor, target: Tensor) -> None:
        self.step.upload_lr()  # first, so that what is restored below is the rate that counts as uploaded
        before = [tensor.clone() for tensor in self.step.state()]
        slots = [image.clone(memory_format=torch.preserve_format) for image in (source, target)]
        body = partial(self.step.body, *slots)
        try:
            self._backend.warm_up(body, WARM_UP_STEPS)
            replay = self._backend.capture(body)
            self._captured[key] = _Captured(replay, *slots, self.step.fake)
        except RuntimeError as error:
            self._eager = True
            self._captured.clear()
            self.step.forget_gradients()
            warnings.warn(
                f"the step could not be captured in a CUDA graph and runs without, slower: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
        finally:
            # Warm-up steps were real ones; training starts from where they began.
            restore(self.step.state(), before)


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
        self._event.record()

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


def set_float32_math(precision: str) -> None:
    """Let float32 convolutions use tf32 tensor cores for precision "tf32" alone; search for the best ones."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True

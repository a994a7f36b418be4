"""A stand-in for a CUDA graph on the CPU: what a capture would get wrong, this gets wrong too.

Recording runs the body once under a dispatch mode that notes every aten operator, below autograd, with its
real arguments and results, and every kernel launch. Replaying runs those again on the same tensors, results
copied to where they were recorded, views and uninitialised allocations left as they are. So Python numbers
are baked in, addresses are fixed, nothing of the host program runs again, and state that the body created is
created again in every replay.

What the body forks to a ``SideStream`` may run at any time before it is joined, in order among itself: a
replay takes a ``delay``, and any of them must give the same bits.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastpix2pix.kernels import launch
from fastpix2pix.training.graph import capture_segments
from fastpix2pix.training.streams import SideStream

aten = torch.ops.aten
UNINITIALISED = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::new_empty_strided",
}
SYNCHRONISING = {
    "aten::_local_scalar_dense": "a value is read on the host",
    "aten::nonzero": "the size of its result depends on values",
    "aten::masked_select": "the size of its result depends on values",
    "aten::unique": "the size of its result depends on values",
    "aten::_unique2": "the size of its result depends on values",
    "aten::lift_fresh": "a host value is copied to the device",
}


class CaptureRefused(RuntimeError):
    """What a CUDA graph would refuse too, or silently freeze."""


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Records while active; ``static`` are the tensors that exist before and keep their addresses."""

    def __init__(self, static: Iterable[Tensor]):
        super().__init__()
        self.entries: list[Callable[[], None]] = []
        self.names: list[str] = []
        self.addresses: set[int] = set()
        self.forked: set[int] = set()  # entries of the side stream
        self.joins: set[int] = set()  # entries before which it is joined
        self._known = {self._storage(tensor) for tensor in static}
        self._kept: list[Any] = []  # nothing recorded may be freed: addresses must not be used again

    @staticmethod
    def _storage(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _check(self, name: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if self._storage(tensor) not in self._known and tensor.numel():
                raise CaptureRefused(
                    f"{name} reads a tensor of shape {tuple(tensor.shape)} neither static nor made here"
                )

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name
        if name.startswith("c10d::"):
            raise CaptureRefused(f"{name}: a collective is captured")
        if name in SYNCHRONISING:
            raise CaptureRefused(f"{name}: {SYNCHRONISING[name]}")
        self._check(name, tensors_in((args, kwargs)))
        result = operator(*args, **kwargs)
        made = tensors_in(result)
        self._known.update(map(self._storage, made))
        self._kept.append((args, kwargs, result))
        if operator.is_view or name in UNINITIALISED:
            return result
        self.names.append(name)
        self.addresses.update(tensor.data_ptr() for tensor in made)
        if operator._schema.is_mutable:
            self.entries.append(lambda: operator(*args, **kwargs))
        else:

            def again() -> None:
                for recorded, new in zip(made, tensors_in(operator(*args, **kwargs)), strict=True):
                    recorded.copy_(new)

            self.entries.append(again)
        return result

    def on_launch(self, kernel: launch.Launch) -> None:
        self._check(kernel.name, tensors_in((kernel.args, kernel.options)))
        self._kept.append(kernel)
        self.names.append(kernel.name)
        self.addresses.update(tensor.data_ptr() for tensor in kernel.writes if tensor is not None)
        with _disable_current_modes():
            kernel.run()
        self.entries.append(kernel.run)

    @contextmanager
    def follows_side_streams(self) -> Iterator[None]:
        """Note what is forked and where it is joined."""
        fork, join = SideStream.fork, SideStream.join

        def noted_fork(side: SideStream, *args: Any, **kwargs: Any) -> None:
            first = len(self.entries)
            fork(side, *args, **kwargs)
            self.forked.update(range(first, len(self.entries)))

        def noted_join(side: SideStream) -> None:
            join(side)
            self.joins.add(len(self.entries))

        with patch.object(SideStream, "fork", noted_fork), patch.object(SideStream, "join", noted_join):
            yield

    @torch.no_grad()
    def replay(self, delay: Callable[[int], int] = lambda waiting: waiting) -> None:
        """delay: how many of the waiting operations of the side stream run now, given their number; all by
        default, so that everything runs in the order of the recording.
        """
        waiting: deque[Callable[[], None]] = deque()

        def run(count: int) -> None:
            for _ in range(count):
                waiting.popleft()()

        for index, entry in enumerate(self.entries):
            if index in self.joins:
                run(len(waiting))
            if index in self.forked:
                waiting.append(entry)
            else:
                entry()
            run(delay(len(waiting)))
        if waiting and len(self.entries) not in self.joins:
            raise CaptureRefused("the side stream was not joined")
        run(len(waiting))


class FakeGraphBackend:
    """A ``graph.Backend``. ``static`` gives the tensors that a capture may rely on."""

    def __init__(self, static: Callable[[], Iterable[Tensor]], on_kernels: bool = False):
        self._static, self._on_kernels = static, on_kernels
        self.tapes: list[Tape] = []
        self.failure: str | None = None

    def warm_up(self, body: Callable[[], None], times: int) -> None:
        for _ in range(times):
            body()

    def capture(self, segments: Callable[[], Iterator[Callable[[], None]]]) -> Callable[[], None]:
        """As many tapes as there are segments; a later one may rely on what an earlier one has made."""
        known = [*self._static(), *segments.args]
        first = len(self.tapes)

        def capture(segment: Callable[[], None]) -> Callable[[], None]:
            tape = Tape(known)
            for earlier in self.tapes[first:]:
                tape._known |= earlier._known
            self.tapes.append(tape)
            with tape.follows_side_streams(), tape:
                if self._on_kernels:
                    with launch.observed(tape.on_launch, run=False):
                        segment()
                else:
                    segment()
            return tape.replay

        return capture_segments(segments(), capture)


def static_tensors(train_step) -> list[Tensor]:
    """What a capture of ``train_step`` may rely on: its state, and the constants that live as long."""
    clocks = [*train_step.gen_optimizer._clocks, *train_step.disc_optimizer._clocks]
    return [*train_step.state(), train_step.lambda_l1, *tensors_in(clocks)]

"""How Triton kernels are chosen, launched and observed, and how large their blocks are."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: kernels are defined as plain functions that nobody calls
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""The kernels were defined for Triton's interpreter: they take CPU tensors and are never compiled.

Triton reads the variable when a kernel is defined, so it must be set before the first import.
"""

kernels_on_cpu = INTERPRETING
"""Whether CPU tensors go to the interpreter; the tests turn it on where they mean it (tests/conftest.py)."""


class Launch(NamedTuple):
    """One kernel launch: what ``launch`` was called with.

    reads, writes: the tensors (slices of larger buffers included) of which every element is read or written
    once; the same tensor more than once where the kernel passes over it more than once.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def bytes_moved(self) -> int:
        """Bytes that must cross the memory bus, were nothing cached."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.reads, *self.writes))

    def run(self) -> None:
        """Enqueue the kernel (again), on the same tensors."""
        # Fusing a * b + c differs between GPUs, the interpreter and Triton's versions; kernels that gain
        # from it say tl.fma, so that what is tested is what runs.
        self.kernel[self.grid](*self.args, **self.options, enable_fp_fusion=False)


_observer: Callable[[Launch], None] | None = None
_running = True


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    **options: Any,
) -> None:
    """Enqueue ``kernel`` on ``grid``: the only way in which this package starts a kernel.

    args: the kernel's pointers and numbers, by position. options: its compile-time constants, and num_warps.
    reads, writes: see ``Launch``.
    """
    this = Launch(kernel, grid, args, options, reads, writes)
    if _observer is not None:
        _observer(this)
    if _running:
        this.run()


@contextmanager
def observed(observer: Callable[[Launch], None], *, run: bool = True) -> Iterator[None]:
    """Show every launch made inside to ``observer``, in order, each before it is enqueued.

    run=False enqueues nothing: the ops choose their kernels, for tensors of any device, and their results
    are left as they were allocated. Not to be nested.
    """
    global _observer, _running
    _observer, _running = observer, run
    try:
        yield
    finally:
        _observer, _running = None, True


def use_triton(x: Tensor) -> bool:
    """Whether an op on ``x`` runs its Triton kernels (else its reference)."""
    if not HAS_TRITON:
        return False
    return x.is_cuda or not _running or (kernels_on_cpu and x.device.type == "cpu")

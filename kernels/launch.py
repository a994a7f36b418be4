"""The gateway of every Triton launch: whether kernels run, on which device, and who looks on."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpix2pix.kernels.language import HAS_TRITON, INTERPRETING, tl
from fastpix2pix.kernels.variants import Variant, compile_options

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
"""Types that kernels compute in, as a kernel's constants."""

kernels_on_cpu = INTERPRETING
"""Whether CPU tensors take the Triton path, in the interpreter; tests turn it on where they mean it."""

kernels_on_gpu = True
"""Whether CUDA tensors take the Triton path; turned off where it disagrees with the reference."""

TENSOR_CORES_SINCE = (8, 0)
"""The compute capability from which on Triton 3.9 multiplies on tensor cores; before it takes FMA."""

_assumed_capability = TENSOR_CORES_SINCE


class Launch(NamedTuple):
    """One kernel launch: what ``launch`` was called with.

    reads, writes: the tensors (slices of larger buffers included) of which elements are read or written,
    usually all of them; None for one that this launch does without. trips: how often one after the other the
    busiest program waits for memory; flops: operations of its matrix products. Nothing but the model of a
    step's time reads these two.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    reads: Sequence[Tensor | None]
    writes: Sequence[Tensor | None]
    trips: int = 1
    flops: int = 0

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def bytes_moved(self) -> int:
        """Bytes of all operands, each counted once."""
        return sum(t.numel() * t.element_size() for t in (*self.reads, *self.writes) if t is not None)

    @property
    def device(self) -> torch.device:
        """Where the operands are."""
        return next(t.device for t in (*self.reads, *self.writes) if t is not None)

    def run(self) -> None:
        """Enqueue the kernel (again), on the same tensors and the current stream of their device."""
        device = self.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            # Triton launches on the current device, whatever device the pointers belong to.
            with torch.cuda.device(device):
                self._enqueue()
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        self.kernel[self.grid](*self.args, **self.options | compile_options(**self.options))

    def compile(self) -> Any:
        """The compiled kernel (``triton.compiler.CompiledKernel``), without launching it."""
        options = self.options | compile_options(**self.options)
        return self.kernel.warmup(*self.args, grid=self.grid, **options)

    @property
    def variant(self) -> Variant:
        """What has to be compiled for this launch."""
        return Variant.of(self.kernel, self.args, self.options)


_observer: Callable[[Launch], None] | None = None
_running = True


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    reads: Sequence[Tensor | None],
    writes: Sequence[Tensor | None],
    trips: int = 1,
    flops: int = 0,
    **options: Any,
) -> None:
    """Enqueue ``kernel`` on ``grid``: the only way in which this package starts a kernel.

    args: the kernel's pointers and numbers, by position. options: its compile-time constants, and num_warps.
    reads, writes, trips, flops: see ``Launch``.
    """
    this = Launch(kernel, grid, args, options, reads, writes, trips, flops)
    if _observer is not None:
        _observer(this)
    if _running:
        this.run()


@contextmanager
def observed(observer: Callable[[Launch], None], *, run: bool = True) -> Iterator[None]:
    """Show every launch made inside to ``observer``, in order, each before it is enqueued.

    run=False enqueues nothing: the ops choose their kernels, for tensors of any device (meta included), and
    their results are left as they were allocated. Not to be nested.
    """
    global _observer, _running
    _observer, _running = observer, run
    try:
        yield
    finally:
        _observer, _running = None, True


@contextmanager
def assuming(capability: tuple[int, int]) -> Iterator[None]:
    """Inside, tensors that are on no GPU take the launches of one of this compute capability."""
    global _assumed_capability
    before, _assumed_capability = _assumed_capability, capability
    try:
        yield
    finally:
        _assumed_capability = before


def on_tensor_cores(x: Tensor) -> bool:
    """Whether a kernel's matrix products of ``x`` run on tensor cores."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else _assumed_capability
    return capability >= TENSOR_CORES_SINCE


def use_triton(x: Tensor) -> bool:
    """Whether an op on ``x`` runs its Triton kernels (else its reference)."""
    if not HAS_TRITON:
        return False
    return (x.is_cuda and kernels_on_gpu) or not _running or (kernels_on_cpu and x.device.type == "cpu")

"""What Triton compiles: a kernel for one choice of argument types and constants, with or without a GPU.

Nothing here imports torch, so that a process that only compiles is quick to start.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

REGISTERS = 2**16
"""32-bit registers of a multiprocessor, on every generation since Volta."""

MAX_REGISTERS = 255
"""Registers that one thread can address."""

WARP = 32
"""Threads of a warp."""

POINTER_ALIGNMENT = 16
"""Bytes to which Triton wants an address aligned before it promises the compiler full vectors."""


def compile_options(num_warps: int = 4, maxnreg: int | None = None, **_: Any) -> dict[str, Any]:
    """Options with which every kernel is compiled, whatever its own constants.

    Whether a * b + c is fused by itself differs between GPUs, the interpreter and versions of Triton. Kernels
    that want it say tl.fma, so that what is tested is what runs. maxnreg, the most registers of a thread, is
    the launch's own or the hardware's limit: without one, ptxas spills a few registers of some layers to
    reach the next step of occupancy.
    """
    most = min(REGISTERS // (WARP * num_warps), MAX_REGISTERS) if maxnreg is None else maxnreg
    return {"enable_fp_fusion": False, "maxnreg": most}


@dataclass(frozen=True)
class Pointer:
    """Stands in for a tensor when a kernel is only compiled.

    dtype: its type by PyTorch's name, such as "bfloat16". address: modulo ``POINTER_ALIGNMENT``.
    """

    dtype: str
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: two launches with equal variants run the same machine code.

    module, kernel: where the kernel is defined, by name, so that a variant can be sent to another process.
    args: the kernel's arguments with ``Pointer``s for tensors and a representative for each number.
    options: names and values of its compile-time constants, and num_warps.
    """

    module: str
    kernel: str
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, args: Iterable[Any], options: dict[str, Any]) -> "Variant":
        """The variant that Triton chooses for a launch; args may hold tensors of any device, meta included.

        The alignment of a tensor is that of its offset in its storage, because every allocator of PyTorch
        aligns storages to 64 bytes or more.
        """
        general = getattr(kernel, "do_not_specialize", ())
        named = zip(kernel.arg_names, args, strict=False)  # the constants follow, by name
        typical = tuple(_typical(arg, specialized=name not in general) for name, arg in named)
        return cls(kernel.fn.__module__, kernel.__name__, typical, tuple(options.items()))

    def compile(self) -> Any:
        """The compiled kernel (``triton.compiler.CompiledKernel``) for the active driver's target."""
        kernel, options = getattr(import_module(self.module), self.kernel), dict(self.options)
        return kernel.warmup(*self.args, grid=(1,), **options | compile_options(**options))


def _typical(arg: Any, specialized: bool = True) -> Any:
    """What stands for ``arg`` among all that Triton compiles alike (``triton.runtime.jit``).

    Integers differ by their width and, unless the kernel asks not to, by being 1 or a multiple of 16.
    """
    if isinstance(arg, tuple):
        fields = [_typical(field) for field in arg]
        return type(arg)(*fields) if hasattr(arg, "_fields") else tuple(fields)
    if hasattr(arg, "data_ptr"):
        offset = arg.storage_offset() * arg.element_size()
        return Pointer(str(arg.dtype).removeprefix("torch."), offset % POINTER_ALIGNMENT)
    if isinstance(arg, int) and not isinstance(arg, bool):
        if specialized and arg == 1:
            return 1
        wide = 0 if -(2**31) <= arg < 2**31 else 2**32
        return wide + (16 if specialized and arg % 16 == 0 else 2)
    return arg


class AbsentGPU:
    """A Triton driver for a GPU of this compute capability that need not be there: it can compile only.

    arch: the capability's digits, such as 90. Use: ``triton.runtime.driver.set_active(AbsentGPU(90))``.
    """

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device: each architecture is one

    def get_current_stream(self, device: int) -> int:
        return 0

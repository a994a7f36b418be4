"""Triton's own compiler and CUDA launcher without a GPU: launches end in a driver of ours, which notes them.

``python tests/kernels/stub_driver.py JOB...`` (a process of its own: elsewhere in the tests, kernels are
interpreted) runs jobs on kernels compiled for sm_90 and compares every launch that arrived at the driver
with what the launch gateway was asked for: the grid; the threads of a program; the shared memory; the
stream; each parameter's bytes, where the cubin says that the GPU looks for them; the values that were
compiled in; the alignments that the compiler was promised; the limit to the registers. It prints one line of
JSON: how much was compared, and every difference. The environment must make the stub, built by ``build``,
the machine's libcuda.so.1: see ``environment``.
"""

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ARCH = 90
STREAM = 0x5EED  # what the driver is told is the current stream

# ----------------------------------------------------------------------------------- the parent's side


def missing(compiler: str | None) -> str | None:
    """Why launchers can't be built on this machine, or None."""
    if compiler is None:
        return "no C compiler (gcc or clang)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"no {header}"


def build(folder: Path, compiler: str) -> Path:
    """Compile the stub as ``folder``/libcuda.so.1."""
    import triton.backends.nvidia

    library = folder / "libcuda.so.1"
    include = Path(triton.backends.nvidia.__file__).parent / "include"
    source = HERE / "stub_driver.c"
    options = ["-std=gnu11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, f"-I{include}", source, "-o", library], check=True)
    return library


def environment(library: Path, cache: Path) -> dict[str, str]:
    """Variables under which a child process takes ``library`` for the driver and compiles into ``cache``."""
    folder = str(library.parent)
    tests = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": tests.rstrip(os.pathsep),
    }


# ---------------------------------------------------------------------------- what a cubin says of itself


class Binary(NamedTuple):
    """sizes, offsets: of the kernel's parameters, in bytes. registers: of a thread."""

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    registers: int


KPARAM_INFO, REGCOUNT = 0x17, 0x2F  # attributes in the sections .nv.info and .nv.info.<kernel>
NO_PAYLOAD_BESIDES = 3  # formats up to this hold their value in the entry's own four bytes


def read_cubin(cubin: bytes) -> Binary:
    """What the driver reads of a cubin (an ELF file) before it launches its one kernel."""
    (section_table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, entries = struct.unpack_from("<HH", cubin, 0x3A)
    parameters, registers = {}, 0
    for index in range(entries):
        header = section_table + index * entry_size
        (kind,) = struct.unpack_from("<I", cubin, header + 4)
        start, size = struct.unpack_from("<QQ", cubin, header + 24)
        if kind != 0x70000000:  # .nv.info
            continue
        at = start
        while at < start + size:
            form, attribute, length = struct.unpack_from("<BBH", cubin, at)
            if attribute == KPARAM_INFO:
                _, ordinal, offset, packed = struct.unpack_from("<IHHI", cubin, at + 4)
                parameters[ordinal] = (packed >> 18, offset)
            elif attribute == REGCOUNT:
                _, registers = struct.unpack_from("<II", cubin, at + 4)
            at += 4 if form <= NO_PAYLOAD_BESIDES else 4 + length
    sizes, offsets = zip(*(parameters[ordinal] for ordinal in sorted(parameters)), strict=True)
    return Binary(sizes, offsets, registers)


# ---------------------------------------------------------------------------------------- the driver


class Arrived(ctypes.Structure):
    """One launch as the driver received it: the head of ``Launch`` in stub_driver.c."""

    _fields_ = (
        ("kernel", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
    )


def make_driver():
    """Triton's ``CudaDriver`` on the stub, which reads each kernel's cubin before Triton loads it."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class StubDriver(CudaDriver):
        def __init__(self):
            self.library = ctypes.CDLL("libcuda.so.1")
            self.library.stub_launch.restype = ctypes.POINTER(Arrived)
            self.binaries: dict[int, Binary] = {}
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self._load, self.utils.load_binary = self.utils.load_binary, self.load_binary

        def load_binary(self, name: str, cubin: bytes, shared: int, device: int):
            binary = read_cubin(cubin)
            ints = ctypes.c_int * len(binary.sizes)
            self.library.stub_announce(
                len(binary.sizes), ints(*binary.sizes), ints(*binary.offsets), binary.registers
            )
            loaded = self._load(name, cubin, shared, device)
            self.binaries[loaded[1]] = binary
            return loaded

        def get_current_target(self):
            return GPUTarget("cuda", ARCH, 32)

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return divmod(ARCH, 10)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return STREAM

        def arrived(self, first: int) -> Iterator[tuple[Arrived, list[bytes]]]:
            """The launches from the ``first``-th on, each with its parameters."""
            for index in range(first, self.library.stub_count()):
                launch = self.library.stub_launch(index)
                binary = self.binaries[launch.contents.kernel]
                start = ctypes.addressof(launch.contents) + ctypes.sizeof(Arrived)
                places = zip(binary.offsets, binary.sizes, strict=True)
                yield launch.contents, [ctypes.string_at(start + at, size) for at, size in places]

    return StubDriver()


# ------------------------------------------------------------------------------------------ comparison


class Asked(NamedTuple):
    """One launch as the gateway was asked for it. arguments: (path, value) of every argument, tuples opened,
    in the order of the kernel's signature; of a tensor its address as it was then.
    """

    launch: Any
    arguments: list[tuple[tuple[int, ...], Any]]


class Address(int):
    pass


def opened(value: Any, path: tuple[int, ...], constant: bool) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, tuple) and not constant:
        for index, member in enumerate(value):
            yield from opened(member, (*path, index), constant)
    else:
        yield path, Address(value.data_ptr()) if hasattr(value, "data_ptr") else value


def asked(launch: Any) -> Asked:
    kernel = launch.kernel
    given = [*launch.args, *(launch.options[name] for name in kernel.arg_names[len(launch.args) :])]
    arguments = [
        pair
        for index, (value, parameter) in enumerate(zip(given, kernel.params, strict=True))
        for pair in opened(value, (index,), parameter.is_constexpr)
    ]
    return Asked(launch, arguments)


def encoded(value: Any) -> bytes:
    """``value`` as a kernel's parameter."""
    if isinstance(value, Address):
        return struct.pack("<Q", value)
    if isinstance(value, float):
        return struct.pack("<f", value)
    return struct.pack("<i" if -(2**31) <= value < 2**31 else "<q", value)


class Comparison:
    """Compares asked with arrived; ``counts`` says how much, ``differences`` what was not the same."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.differences: list[str] = []

    def equal(self, what: str, name: str, got: Any, wanted: Any) -> None:
        self.counts[what] += 1
        if got != wanted:
            self.differences.append(f"{name}: {what} is {got}, asked for {wanted}")

    def launch(self, asked: Asked, arrived: Arrived, parameters: Sequence[bytes], binary: Binary) -> None:
        this, name = asked.launch, asked.launch.name
        self.kernels[name] += 1
        threads = 32 * this.options.get("num_warps", 4)
        compiled = next(
            kernel for kernel in this.kernel.device_caches[0][0].values() if kernel.function == arrived.kernel
        )
        self.equal("kernel", name, compiled.name, name)
        self.equal("grid", name, tuple(arrived.grid), (*this.grid, 1, 1)[:3])
        self.equal("block", name, tuple(arrived.block), (threads, 1, 1))
        self.equal("shared memory", name, arrived.shared, compiled.metadata.shared)
        self.equal("stream", name, arrived.stream, STREAM)
        self.equal("launch attributes", name, arrived.attributes, 0)
        limit = this.options.get("maxnreg") or min(65536 // threads, 255)
        self._registers(name, compiled.asm["ptx"], binary, threads, limit)
        self._parameters(name, asked, parameters, compiled)

    def _registers(self, name: str, ptx: str, binary: Binary, threads: int, limit: int) -> None:
        self.equal("register limit", name, re.findall(r"^\.maxnreg (\d+)$", ptx, re.M), [str(limit)])
        self.equal("thread count", name, re.findall(r"^\.reqntid (\d+)$", ptx, re.M), [str(threads)])
        self.counts["registers"] += 1
        if not 0 < binary.registers <= limit:
            self.differences.append(f"{name}: takes {binary.registers} registers, allowed are {limit}")

    def _parameters(self, name: str, asked: Asked, parameters: Sequence[bytes], compiled: Any) -> None:
        constants = compiled.src.constants
        passed = []
        for path, value in asked.arguments:
            if path in constants:
                self.equal("constant", f"{name}, argument {path}", constants[path], value)
            else:
                passed.append((path, value))
        *mine, global_scratch, profile_scratch = parameters
        self.counts["parameters"] += len(parameters)
        self.equal("number of parameters", name, len(mine), len(passed))
        for index, ((path, value), got) in enumerate(zip(passed, mine, strict=False)):
            if got != encoded(value):
                self.differences.append(
                    f"{name}: parameter {index} (argument {path}) is {got.hex()}, asked for "
                    f"{encoded(value).hex()}"
                )
        for got in (global_scratch, profile_scratch):
            if got != bytes(8):
                self.differences.append(f"{name}: a scratch pointer is {got.hex()}")
        self._promises(name, passed, mine, compiled)

    def _promises(self, name: str, passed: list, parameters: Sequence[bytes], compiled: Any) -> None:
        """The alignments on which the compiler relied, parameter by parameter, from the IR of the kernel."""
        head = re.search(r"tt\.func public @\w+\((.*)\) attributes", compiled.asm["ttir"])[1]
        declared = re.findall(r'%[\w.]+: \S+(?: \{([^}]*)\})? loc\("(\w+)', head)
        roots = [compiled.src.fn.arg_names[path[0]] for path, _ in passed]
        self.equal("order of parameters", name, [root for _, root in declared], roots)
        for (attributes, root), got in zip(declared, parameters, strict=False):
            for divisor in re.findall(r"tt\.divisibility = (\d+)", attributes):
                self.counts["alignment promises"] += 1
                if int.from_bytes(got, "little") % int(divisor):
                    self.differences.append(f"{name}: {root} = {got.hex()} is not divisible by {divisor}")


# --------------------------------------------------------------------------------------------------- jobs


def _launches(precision: str) -> list:
    """The different launches of a step of both presets at 256x256, on memory of the CPU."""
    import torch
    from torch.utils._pytree import tree_map_only

    from fastpix2pix.training.trace import kernel_launches

    storages = {}

    def in_memory(t: torch.Tensor) -> torch.Tensor:
        traced = t.untyped_storage()
        if traced._cdata not in storages:
            storages[traced._cdata] = torch.empty(traced.nbytes(), dtype=torch.uint8).untyped_storage()
        empty = torch.empty(0, dtype=t.dtype)
        return empty.set_(storages[traced._cdata], t.storage_offset(), t.shape, t.stride())

    return [
        this._replace(
            args=tree_map_only(torch.Tensor, in_memory, this.args),
            reads=tree_map_only(torch.Tensor, in_memory, tuple(this.reads)),
            writes=tree_map_only(torch.Tensor, in_memory, tuple(this.writes)),
        )
        for _, this in kernel_launches(precision)
    ]


def _again(launches: Iterable) -> Callable[[], object]:
    from fastpix2pix.kernels.launch import launch

    def launch_them() -> None:
        for this in launches:
            launch(this.kernel, this.grid, *this.args, reads=this.reads, writes=this.writes, **this.options)

    return launch_them


def each_kernel_once(precision: str) -> Callable[[], object]:
    """The first launch of every kernel."""
    return _again({this.name: this for this in reversed(_launches(precision))}.values())


def one_kernel(name: str, precision: str) -> Callable[[], object]:
    """Every different launch of one kernel."""
    return _again([this for this in _launches(precision) if this.name == name])


def every_layer(precision: str) -> Callable[[], object]:
    """Every kernel as every layer of both presets launches it at 256x256."""
    return _again(_launches(precision))


def train_step(preset: str, precision: str, *numbers: str) -> Callable[[], object]:
    """One whole step; numbers: of ``small_step``, as in width=64."""
    from small_steps import small_step

    options = dict(number.split("=") for number in numbers)
    small = small_step(preset, precision, **{name: int(value) for name, value in options.items()})
    return partial(small.step, small.source, small.target)


JOBS = {job.__name__: job for job in (each_kernel_once, one_kernel, every_layer, train_step)}


def another_grid(this: Any) -> Any:
    return this._replace(grid=(this.grid[0] + 1,))


def another_block(this: Any) -> Any:
    return this._replace(options={**this.options, "num_warps": 2 * this.options["num_warps"]})


def exchanged_pointers(this: Any) -> Any:
    first, second, *others = this.args
    return this._replace(args=(second, first, *others))


FAULTS = {change.__name__: change for change in (another_grid, another_block, exchanged_pointers)}
FAULTY = "tanh_l1_sums"
"""The kernel that is launched otherwise than asked for, in a job whose last word is a fault's name."""


def compare(stub: Any, job: str) -> dict[str, Any]:
    """Run ``job``, "NAME ARGUMENT... [FAULT]"; what was compared, and what was not the same."""
    from fastpix2pix.kernels import launch

    name, *arguments = job.split()
    change = FAULTS.get(arguments[-1])
    go = JOBS[name](*(arguments if change is None else arguments[:-1]))
    comparison, first, launches = Comparison(), stub.library.stub_count(), []
    honest = launch.Launch.run
    if change is not None:
        launch.Launch.run = lambda this: honest(change(this) if this.name == FAULTY else this)
    with launch.observed(lambda this: launches.append(asked(this))):
        go()
    launch.Launch.run = honest
    arrived = list(stub.arrived(first))
    comparison.equal("number of launches", job, len(arrived), len(launches))
    for one, (head, parameters) in zip(launches, arrived, strict=False):
        comparison.launch(one, head, parameters, stub.binaries[head.kernel])
    return {
        "launches": comparison.kernels.total(),
        "kernels": comparison.kernels,
        "counts": comparison.counts,
        "differences": comparison.differences,
    }


def main(jobs: Sequence[str]) -> None:
    from triton.runtime import driver

    from fastpix2pix.kernels import launch

    stub = make_driver()
    driver.set_active(stub)
    launch.kernels_on_cpu = True
    print(json.dumps({job: compare(stub, job) for job in jobs}))


if __name__ == "__main__":
    main(sys.argv[1:])

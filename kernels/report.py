"""python -m fastpix2pix.kernels.report: what every kernel compiles to, on every generation of GPU.

A module of kernels takes part by offering ``specimens(dtype)``: pairs of a label (layer and shape) and a
function without arguments that calls a public op, forward or backward, on ``torch.empty`` tensors of the CPU,
shaped, typed and sliced as in the networks. The report calls it under ``launch.observed(..., run=False)``:
nothing is computed, but the op's own launcher chooses kernels, blocks and warps and declares the bytes moved,
so that what is reported is what would be launched.

No GPU is needed: Triton carries the assembler and the disassembler. The latter no longer reads sm_70; there
the widest access is that of the PTX code.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fastpix2pix.kernels import adam, gan_loss, launch, norm_act, tanh_l1
from fastpix2pix.kernels.launch import REGISTERS, Launch, cdiv, observed

MODULES = (norm_act, gan_loss, tanh_l1, adam)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor holds at a time ("Technical Specifications per Compute Capability", CUDA C++
    Programming Guide); every generation since Volta has 65536 registers.
    """

    warps: int
    programs: int
    shared_bytes: int


MULTIPROCESSORS = {
    70: Multiprocessor(64, 32, 96 * 1024),
    75: Multiprocessor(32, 16, 64 * 1024),
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}
REGISTER_UNIT = 256
"""Registers are handed to warps in such portions."""
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the system takes from each program, since sm_80."""


@dataclass(frozen=True)
class Row:
    """One kernel, as one layer launches it, for one architecture.

    stack: bytes per thread in local memory, which is where registers are spilled to. load_bits, store_bits:
    the widest access of global memory by one thread. occupancy: resident warps over the most there can be, as
    limited by ``limit``. bytes_moved: of one launch, each operand counted once.
    """

    kernel: str
    label: str
    dtype: str
    arch: int
    num_warps: int
    programs: int
    registers: int
    stack: int
    shared: int
    load_bits: int
    store_bits: int
    occupancy: float
    limit: str
    bytes_moved: int


# --------------------------------------------------------------------------------------------- compilation


class _Absent:
    """Stands in for the driver of a GPU of this architecture, as far as compilation asks."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def collect(
    dtype: torch.dtype, specimens: Callable[[torch.dtype], Iterator[tuple[str, Callable[[], object]]]]
) -> list[tuple[str, Launch]]:
    """All launches of a module's specimens, each with its label."""
    launches = []
    for label, call in specimens(dtype):
        with observed(lambda this, label=label: launches.append((label, this)), run=False):
            call()
    return launches


def measure(label: str, dtype: str, this: Launch, arch: int) -> Row:
    """Compile one launch's kernel for ``sm_<arch>`` and read what became of it."""
    from triton.runtime import driver

    driver.set_active(_Absent(arch))
    compiled = this.compile()
    num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    code = sass or compiled.asm["ptx"]
    occupancy, limit = _occupancy(arch, num_warps, registers, shared)
    return Row(
        kernel=this.name,
        label=label,
        dtype=dtype,
        arch=arch,
        num_warps=num_warps,
        programs=torch.Size(this.grid).numel(),
        registers=registers,
        stack=stack,
        shared=shared,
        load_bits=_widest(code, r"LDG\.E|ld\.global"),
        store_bits=_widest(code, r"STG\.E|st\.global"),
        occupancy=occupancy,
        limit=limit,
        bytes_moved=this.bytes_moved,
    )


@cache  # layers share kernels
def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a kernel; no machine code where the tools no longer read it."""
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", "--dump-sass", file.name]
        output = subprocess.run(command, capture_output=True, text=True).stdout
    usage, _, sass = output.partition("Function : ")
    return usage, sass


def _widest(code: str, access: str) -> int:
    """Bits of the widest access: LDG.E.128, LDG.E.U16, LDG.E (32) in SASS; ld.global.v4.b32 in PTX."""

    def bits(suffix: str) -> int:
        if vector := re.search(r"\.v(\d)\.\w(\d+)", suffix):
            return int(vector[1]) * int(vector[2])
        sizes = re.findall(r"\.[a-zA-Z]?(8|16|32|64|128|256)\b", suffix)
        return int(sizes[-1]) if sizes else 32

    return max((bits(suffix) for suffix in re.findall(rf"(?:{access})((?:\.\w+)*)", code)), default=0)


def _occupancy(arch: int, num_warps: int, registers: int, shared: int) -> tuple[float, str]:
    """Resident warps over the most there can be, and what limits them."""
    limits = MULTIPROCESSORS[arch]
    portion = cdiv(registers * 32, REGISTER_UNIT) * REGISTER_UNIT
    reserved = RESERVED_SHARED_BYTES if arch >= 80 else 0
    programs = {
        "warps": limits.warps // num_warps,
        "programs": limits.programs,
        "registers": REGISTERS // (portion * num_warps),
        "shared memory": limits.shared_bytes // max(shared + reserved, 1),
    }
    limit = min(programs, key=programs.get)
    return programs[limit] * num_warps / limits.warps, limit


def rows(arch: int, dtypes: Sequence[str], layers: Sequence[str]) -> list[Row]:
    """The report for one architecture: the layers whose label contains one of ``layers``; all for none."""
    return [
        measure(label, dtype, this, arch)
        for dtype in dtypes
        for module in MODULES
        for label, this in collect(DTYPES[dtype], module.specimens)
        if not layers or any(layer in label for layer in layers)
    ]


# ------------------------------------------------------------------------------------------------- command


def table(by_arch: Sequence[Sequence[Row]]) -> str:
    """Text with a line for each launch: registers by architecture, of everything else the worst of them."""
    architectures = [some[0].arch for some in by_arch]
    width = max(4 * len(architectures), len("registers")) + 1
    lines = [
        "registers: " + "/".join(f"sm_{arch}" for arch in architectures),
        f"{'kernel':<26}{'layer':<38}{'type':<6}{'programs':>8}{'warps':>6}  {'registers':<{width}}"
        f"{'stack':>5}{'shared':>7}{'load':>5}{'store':>6}  {'occupancy, limit':<28}{'kB moved':>9}",
    ]
    for same in zip(*by_arch, strict=True):
        one, least = same[0], min(same, key=lambda row: row.occupancy)
        registers = "/".join(str(row.registers) for row in same)
        limit = f"{least.occupancy:.0%} {least.limit} sm_{least.arch}"
        lines.append(
            f"{one.kernel:<26}{one.label:<38}{one.dtype:<6}{one.programs:>8}{one.num_warps:>6}  "
            f"{registers:<{width}}{max(row.stack for row in same):>5}{max(row.shared for row in same):>7}"
            f"{min(row.load_bits for row in same):>5}{min(row.store_bits for row in same):>6}  "
            f"{limit:<28}{one.bytes_moved / 1e3:>9.1f}"
        )
    return "\n".join(lines)


def main(
    arch: Annotated[tuple[int, ...], tyro.conf.arg(help="compute capabilities, such as 80 90")] = tuple(
        MULTIPROCESSORS
    ),
    dtype: Annotated[tuple[str, ...], tyro.conf.arg(help="of bf16, fp16, fp32")] = tuple(DTYPES),
    layer: Annotated[tuple[str, ...], tyro.conf.arg(help="parts of labels; all layers without")] = (),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", help="write the rows here as well")] = None,
) -> None:
    """Compile every kernel for every layer of both presets at 256x256, and print what became of it."""
    if not launch.HAS_TRITON:
        sys.exit("error: Triton is not installed; pip install triton")
    if launch.INTERPRETING:
        sys.exit("error: TRITON_INTERPRET is set, so nothing is compiled; unset it")
    workers = min(len(arch), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        by_arch = list(pool.map(rows, arch, repeat(dtype), repeat(layer)))
    if not by_arch[0]:
        sys.exit(f"error: no layer is called {' or '.join(layer)}; leave out --layer to see them all")
    print(table(by_arch))
    if json_file is not None:
        data = [asdict(row) for some in by_arch for row in some]
        json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)

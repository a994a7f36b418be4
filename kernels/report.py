"""python -m fastpix2pix.kernels.report: what every kernel compiles to, on every generation of GPU.

The launches to compile are collected from a real training step that runs on tensors without memory, so that
what is reported is what would be launched: see ``--launches``.

No GPU is needed: Triton carries the assembler and the disassembler. The latter no longer reads sm_70; there
the widest access is that of the PTX code.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from itertools import repeat
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import tyro

from fastpix2pix.kernels.language import HAS_TRITON, INTERPRETING
from fastpix2pix.kernels.launch import TENSOR_CORES_SINCE, Launch, assuming
from fastpix2pix.kernels.tiles import cdiv
from fastpix2pix.kernels.variants import REGISTERS, WARP, AbsentGPU, Variant

DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor holds at a time ("Technical Specifications per Compute Capability", CUDA C++
    Programming Guide).
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
"""Granularity in which registers are allocated to a warp."""
RESERVED_SHARED_BYTES = 1024
"""Shared memory that CUDA reserves in each program, since sm_80."""
KINDS = ((7, 0), TENSOR_CORES_SINCE)
"""The first compute capabilities of GPUs on which a step launches the same."""
TENSOR_CORES = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}
"""Generations of tensor core instructions, newest first, as they are called in PTX."""


@dataclass(frozen=True)
class Row:
    """One launch's kernel, compiled for one architecture.

    stack: bytes per thread in local memory, which is where registers are spilled to. conversions: changes of
    a tile's layout between threads, most of which go through shared memory. load_bits, store_bits: the widest
    access of global memory by one thread. occupancy: resident warps over the most there can be, as limited by
    ``limit``. tensor_cores: the instructions used (``TENSOR_CORES``), or "". bytes_moved: of one launch, each
    operand counted once.
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
    conversions: int
    load_bits: int
    store_bits: int
    occupancy: float
    limit: str
    tensor_cores: str
    bytes_moved: int


# --------------------------------------------------------------------------------------------- compilation


@dataclass(frozen=True)
class Item:
    """A launch to report on, without its tensors. programs: of its grid. since, until: architectures on which
    it is made, the latter excluded.
    """

    label: str
    dtype: str
    variant: Variant
    programs: int
    bytes_moved: int
    since: int = 0
    until: int = sys.maxsize


def collect(
    launches: Callable[[str], Sequence[tuple[str, Launch]]], dtypes: Sequence[str], layers: Sequence[str]
) -> list[Item]:
    """What to report on: the launches in each type whose "kernel label" contains one of ``layers``."""
    items: dict[Item, Item] = {}
    for dtype in dtypes:
        for capability, following in zip(KINDS, [*KINDS[1:], None], strict=True):
            since, until = _arch(capability), sys.maxsize if following is None else _arch(following)
            with assuming(capability):
                made = launches(dtype)
            for label, this in made:
                if layers and not any(layer in f"{this.name} {label}" for layer in layers):
                    continue
                item = Item(label, dtype, this.variant, prod(this.grid), this.bytes_moved)
                earlier = items.get(item)
                items[item] = replace(item, since=earlier.since if earlier else since, until=until)
    return list(items.values())


def _arch(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]


def measure(item: Item, arch: int) -> Row:
    """Compile one launch's kernel for ``sm_<arch>`` and read what became of it."""
    from triton.runtime import driver

    driver.set_active(AbsentGPU(arch))
    compiled = item.variant.compile()
    num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    code = sass or compiled.asm["ptx"]
    occupancy, limit = _occupancy(arch, num_warps, registers, shared)
    return Row(
        kernel=item.variant.kernel,
        label=item.label,
        dtype=item.dtype,
        arch=arch,
        num_warps=num_warps,
        programs=item.programs,
        registers=registers,
        stack=stack,
        shared=shared,
        conversions=compiled.asm["ttgir"].count("ttg.convert_layout"),
        load_bits=_widest(code, r"LDG\.E|LDGSTS\.E|ld\.global"),
        store_bits=_widest(code, r"STG\.E|st\.global"),
        occupancy=occupancy,
        limit=limit,
        tensor_cores=next((n for n, mark in TENSOR_CORES.items() if mark in compiled.asm["ptx"]), ""),
        bytes_moved=item.bytes_moved,
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
    # A variation that is not in the table is like the generation that it belongs to.
    limits = MULTIPROCESSORS[max(known for known in MULTIPROCESSORS if known <= arch)]
    allocated = cdiv(registers * WARP, REGISTER_UNIT) * REGISTER_UNIT
    reserved = RESERVED_SHARED_BYTES if arch >= 80 else 0
    programs = {
        "warps": limits.warps // num_warps,
        "programs": limits.programs,
        "registers": REGISTERS // (allocated * num_warps),
        "shared memory": limits.shared_bytes // max(shared + reserved, 1),
    }
    limit = min(programs, key=programs.get)
    return programs[limit] * num_warps / limits.warps, limit


def rows(items: Sequence[Item], arch: int) -> list[Row | None]:
    """The report for one architecture; None for kernels that are not used there."""
    return [measure(item, arch) if item.since <= arch < item.until else None for item in items]


# ------------------------------------------------------------------------------------------------- command


def table(by_arch: Sequence[Sequence[Row | None]], architectures: Sequence[int]) -> str:
    """Text with a line for each launch: registers by architecture, everything else for the worst of them."""
    width = max(4 * len(architectures), len("registers")) + 1
    lines = [
        "registers: " + "/".join(f"sm_{arch}" for arch in architectures),
        f"{'kernel':<26}{'layer':<34}{'type':<6}{'programs':>8}{'warps':>6}  {'registers':<{width}}"
        f"{'stack':>5}{'shared':>7}{'conv':>5}{'load':>5}{'store':>6}  {'tensor cores':<19}"
        f"{'occupancy, limit':<28}{'kB moved':>9}",
    ]
    for of_all in zip(*by_arch, strict=True):
        registers = "/".join("-" if row is None else str(row.registers) for row in of_all)
        same = [row for row in of_all if row is not None]
        if not same:
            continue
        one, least = same[0], min(same, key=lambda row: row.occupancy)
        tensor_cores = "/".join(dict.fromkeys(row.tensor_cores for row in same if row.tensor_cores))
        limit = f"{least.occupancy:.0%} {least.limit} sm_{least.arch}"
        lines.append(
            f"{one.kernel:<26}{one.label:<34}{one.dtype:<6}{one.programs:>8}{one.num_warps:>6}  "
            f"{registers:<{width}}{max(row.stack for row in same):>5}{max(row.shared for row in same):>7}"
            f"{max(row.conversions for row in same):>5}"
            f"{min(row.load_bits for row in same):>5}{min(row.store_bits for row in same):>6}  "
            f"{tensor_cores:<19}"
            f"{limit:<28}{one.bytes_moved / 1e3:>9.1f}"
        )
    return "\n".join(lines)


def _function(name: str) -> Callable[[str], Sequence[tuple[str, Launch]]]:
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        sys.exit(f"error: --launches {name}: {error}; give it as MODULE:FUNCTION")


def main(
    arch: Annotated[tuple[int, ...], tyro.conf.arg(help="compute capabilities, such as 80 90")] = tuple(
        MULTIPROCESSORS
    ),
    dtype: Annotated[tuple[str, ...], tyro.conf.arg(help="of bf16, fp16, fp32")] = DTYPES,
    layer: Annotated[
        tuple[str, ...], tyro.conf.arg(help='parts of "kernel label", such as gan_loss or 64x64x128')
    ] = (),
    launches: Annotated[
        str,
        tyro.conf.arg(
            metavar="MODULE:FUNCTION",
            help="what to compile: a function that takes bf16, fp16 or fp32 and returns pairs of a label and "
            "a Launch, such as fastpix2pix.kernels.launch.observed(..., run=False) collects",
        ),
    ] = "fastpix2pix.training.trace:kernel_launches",
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", help="write the rows here as well")] = None,
) -> None:
    """Compile every kernel of a training step (by default of both presets at 256x256); print the results."""
    if not HAS_TRITON:
        sys.exit("error: Triton is not installed; pip install triton")
    if INTERPRETING:
        sys.exit("error: TRITON_INTERPRET is set, so nothing is compiled; unset it")
    items = collect(_function(launches), dtype, layer)
    if not items:
        sys.exit(f"error: no launch is called {' or '.join(layer)}; leave out --layer to see them all")
    workers = min(len(arch), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        by_arch = list(pool.map(rows, repeat(items), arch))
    print(table(by_arch, arch))
    if json_file is not None:
        data = [asdict(row) for some in by_arch for row in some if row is not None]
        json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)

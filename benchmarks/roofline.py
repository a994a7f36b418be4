"""How fast a step could be: its bytes and its arithmetic against what a GPU is said to do. A model.

    python -m benchmarks.roofline

Every operator of a step (``benchmarks.traffic``) takes the longer of the time for its bytes and the time for
its arithmetic; the operators follow one another. The host hands a GPU one operator after the other, so a
step that is not captured takes at least as long as the host does. Nothing here was measured, unless there is
a GPU: then its own copy bandwidth and matrix product rate are measured first, and every variant's step is
set against its floor by these.

Beside this floor stands a second model, with latency. Each launch then takes ``NODE_US``, and after that, if
it is longer than for bytes and arithmetic, as long as its programs wait: ``TRIP_US`` for each trip to memory
of each wave of programs, and the bytes at the rate of the multiprocessors that have a program at all. A
library's launches are taken for ones that need a single trip and fill the device, which flatters the peers.
Launches on a step's second stream follow the first one's, or run beside them: from the first of them until
the streams are joined, the step then takes as long as the longer stream does, or as the bytes and the
arithmetic of both do, one launch after the other. How much of that is true, only a GPU can tell.

What the models leave out makes true steps slower (no kernel reaches the published figures, libraries' kernels
for images of a few pixels least of all) or faster (what an operator wrote may still be in the L2 cache when
the next one reads it).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import results, traffic
from benchmarks.peers import PLAIN, Tuning
from benchmarks.processes import time_in_turns
from benchmarks.timing import clock
from benchmarks.traffic import Entry, Measures
from benchmarks.variants import all_variants
from benchmarks.workload import Workload
from fastpix2pix import cli
from fastpix2pix.kernels.launch import TENSOR_CORES_SINCE
from fastpix2pix.kernels.tiles import cdiv
from fastpix2pix.training.precision import WORKING_TYPES

EAGER_OPERATOR_US = 8.0
"""Assumed: what Python, autograd and the launch take per operator. 5 to 10 is what eager PyTorch is known
for; forward and backward alike, as autograd's own thread works while Python waits."""

CAPTURED_LAUNCH_US = 1.5
"""Assumed: from the end of one node of a captured graph to the start of the next."""


NODE_US = 2.0
"""Assumed, in the model with latency: from a launch's last store to the next one's first load."""

TRIP_US = 0.7
"""Assumed: a load from memory, the arithmetic and the barriers until its result is used, the store. The load
alone takes about 400 clocks (``GPUS`` names the source), 0.2 to 0.3 us."""

RESIDENT_WARPS = 16
"""Assumed: warps that a multiprocessor runs at a time, a quarter of those it has room for."""


@dataclass(frozen=True)
class Gpu:
    """bandwidth, l2: GB/s of the memory and of the L2 cache. multiprocessors: how many. flops: dense TFLOP/s
    of a matrix product in each type; sixteen: the 16-bit type that training takes on it. capability: for
    compute."""

    bandwidth: float
    l2: float
    multiprocessors: int
    flops: dict[str, float]
    sixteen: str = "bf16"
    capability: tuple[int, int] = (9, 0)


# NVIDIA's data sheets of the SXM modules: "NVIDIA V100 Tensor Core GPU" (2020), "NVIDIA A100 Tensor Core GPU"
# (2021; 80 GB), "NVIDIA H100 Tensor Core GPU" (2023), "NVIDIA H200 Tensor Core GPU" (2024). Those of the
# H100 and H200 give tensor rates with sparsity; half of that is dense. L2 bandwidth: table 3 of
# PMC10448217 (2023), which has the H200's chip as that of the H100.
GPUS = {
    "V100": Gpu(900, 3133, 80, {"fp32": 15.7, "tf32": 15.7, "fp16": 125}, "fp16", (7, 0)),
    "A100": Gpu(2039, 7219, 108, {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312}, capability=(8, 0)),
    "H100": Gpu(3350, 8986, 132, {"fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5}),
    "H200": Gpu(4800, 8986, 132, {"fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5}),
}


def device_seconds(entries: list[Entry], bandwidth: float, flops: float) -> float:
    """Of a step's operators one after the other; bandwidth in bytes, flops in operations, per second."""
    return sum(max(entry.moved / bandwidth, entry.flops / flops) for entry in entries)


def host_seconds(entries: list[Entry]) -> float:
    """What the host takes to launch a step operator by operator."""
    return 1e-6 * EAGER_OPERATOR_US * len(entries)


def eager_seconds(entries: list[Entry], bandwidth: float, flops: float) -> float:
    """Model of a step that the host launches operator by operator: whichever of the two is slower."""
    return max(device_seconds(entries, bandwidth, flops), host_seconds(entries))


def captured_seconds(entries: list[Entry], bandwidth: float, flops: float) -> float:
    """Model of a step that is replayed from a CUDA graph."""
    return device_seconds(entries, bandwidth, flops) + 1e-6 * CAPTURED_LAUNCH_US * len(entries)


def floor_seconds(entries: list[Entry], bandwidth: float, flops: float, *, captured: bool) -> float:
    return (captured_seconds if captured else eager_seconds)(entries, bandwidth, flops)


def launch_seconds(entry: Entry, gpu: Gpu, flops: float) -> float:
    """With latency; ``flops`` in operations per second, but for our own products where Triton multiplies
    without tensor cores."""
    waiting = 1e-6 * TRIP_US
    if entry.grid is not None:
        if gpu.capability < TENSOR_CORES_SINCE:
            flops = 1e12 * gpu.flops["fp32"]
        programs, warps, trips = entry.grid
        at_once = gpu.multiprocessors * max(RESIDENT_WARPS // warps, 1)
        used = min(programs, gpu.multiprocessors) / gpu.multiprocessors
        waiting = 1e-6 * TRIP_US * trips * cdiv(programs, at_once) + entry.moved / (1e9 * gpu.l2 * used)
    busy = max(entry.moved / (1e9 * gpu.bandwidth), entry.flops / flops)
    return 1e-6 * NODE_US * entry.launches + max(busy, waiting)


def latency_seconds(entries: list[Entry], gpu: Gpu, flops: float, *, overlap: bool = False) -> float:
    """A step's launches in turn; with ``overlap``, those of its second stream beside the others, between the
    first of them and the join."""
    if overlap:
        parts = groupby(entries, lambda entry: entry.joined)
        return sum(_overlapped_seconds(list(part), gpu, flops) for _, part in parts)
    return sum(launch_seconds(entry, gpu, flops) for entry in entries)


def _overlapped_seconds(entries: list[Entry], gpu: Gpu, flops: float) -> float:
    """Of a part of a step at whose end the streams are joined."""
    seconds = [launch_seconds(entry, gpu, flops) for entry in entries]
    forked = next((i for i, entry in enumerate(entries) if entry.aside), len(entries))
    streams = [0.0, 0.0]
    for entry, taken in zip(entries[forked:], seconds[forked:], strict=True):
        streams[entry.aside] += taken
    return sum(seconds[:forked]) + max(*streams, device_seconds(entries[forked:], 1e9 * gpu.bandwidth, flops))


@cache
def trace(
    preset: str,
    batch_size: int,
    precision: str,
    tuning: Tuning | None,
    measures: Measures | None = None,
    capability: tuple[int, int] = TENSOR_CORES_SINCE,
) -> list[Entry]:
    """The operators of a step as a GPU of ``capability`` runs them: a peer's of this ``tuning``, or ours in
    ``precision``."""
    workload = Workload(preset=preset, batch_size=batch_size)
    if tuning is None:
        return traffic.trace_ours(workload, precision, measures, capability=capability)
    return traffic.trace_peer(workload, replace(tuning, compiled=False))


def on_gpu(tuning: Tuning) -> Tuning:
    """As a GPU runs it: without further wishes, Adam there updates several tensors per operator."""
    return tuning if tuning.adam else replace(tuning, adam=traffic.PLAIN_ON_GPU.adam)


def modelled(preset: str, batch_size: int, gpu: Gpu) -> dict[str, dict[str, float]]:
    """Milliseconds per step of the plain and the tuned peer and of ours: on the device, and as it is run;
    with latency, and with the second stream beside the first.

    The tuned peer once more as CUDA graphs would run it, the same operators without their host. What a
    compiler would fuse is not counted.
    """
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}[gpu.sixteen]
    best = replace(traffic.TUNED, autocast=autocast)
    # PyTorch lets float32 convolutions use tf32 unless told otherwise (torch.backends.cudnn.allow_tf32).
    variants = {
        "plain PyTorch": ("tf32", on_gpu(PLAIN), False),
        "tuned PyTorch": (gpu.sixteen, best, False),
        "tuned PyTorch, in CUDA graphs": (gpu.sixteen, best, True),
        "fastpix2pix": (gpu.sixteen, None, True),
    }
    rows = {}
    for name, (kind, tuning, captured) in variants.items():
        capability = min(gpu.capability, TENSOR_CORES_SINCE)
        entries = trace(preset, batch_size, gpu.sixteen, tuning, capability=capability)
        bandwidth, flops = gpu.bandwidth * 1e9, gpu.flops[kind] * 1e12
        host = 0.0 if captured else host_seconds(entries)
        rows[name] = {
            "operators": len(entries),
            "launches": sum(entry.launches for entry in entries),
            "operands_gb": sum(entry.operands for entry in entries) / 1e9,
            "moved_gb": sum(entry.moved for entry in entries) / 1e9,
            "device_ms": 1e3 * device_seconds(entries, bandwidth, flops),
            "ms": 1e3 * floor_seconds(entries, bandwidth, flops, captured=captured),
            "latency_ms": 1e3 * max(host, latency_seconds(entries, gpu, flops)),
            "overlapped_ms": 1e3 * max(host, latency_seconds(entries, gpu, flops, overlap=True)),
        }
    return rows


@dataclass(frozen=True)
class Rung:
    """One measure more than the rung before. tuning: of a peer, None for ours."""

    words: str
    precision: str
    captured: bool = True
    tuning: Tuning | None = None
    measures: Measures = Measures(False, False, False)
    overlap: bool = False


RUNGS = (
    Rung("plain PyTorch", "tf32", captured=False, tuning=PLAIN),
    Rung("tuned PyTorch", "bf16", captured=False, tuning=traffic.TUNED),
    Rung("fused epilogues, losses and Adam, one pass of D; tf32", "tf32", captured=False),
    Rung("+ the whole step in one graph", "tf32"),
    Rung("+ 16-bit weights", "bf16"),
    Rung("+ deep convolutions in Triton", "bf16", measures=Measures(True, False, False)),
    Rung("+ their weight gradients straight into Adam", "bf16", measures=Measures(True, True, False)),
    Rung("+ split masters", "bf16", measures=Measures()),
    Rung("+ a second stream", "bf16", measures=Measures(), overlap=True),
)


def ladder(preset: str, batch_size: int, gpu: Gpu) -> list[dict[str, Any]]:
    """What each of our measures brings, by the model with latency, on a GPU that takes bf16."""
    rows = []
    for rung in RUNGS:
        tuning = None if rung.tuning is None else on_gpu(rung.tuning)
        entries = trace(preset, batch_size, rung.precision, tuning, None if tuning else rung.measures)
        seconds = latency_seconds(entries, gpu, gpu.flops[rung.precision] * 1e12, overlap=rung.overlap)
        if not rung.captured:
            seconds = max(seconds, host_seconds(entries))
        rows.append(
            {
                "rung": rung.words,
                "operators": len(entries),
                "moved_gb": sum(entry.moved for entry in entries) / 1e9,
                "ms": 1e3 * seconds,
            }
        )
    return rows


# ------------------------------------------------------------------------------------------ measurements


def _best(call: Callable[[], object], rounds: int = 10) -> float:
    """Seconds of the fastest of several calls: what the hardware can do."""
    call()
    taken = []
    for _ in range(rounds):
        began = clock()
        call()
        taken.append(clock() - began)
    return min(taken)


@cache
def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Measured bytes per second, read and written, of a copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source))


@cache
def matmul_rate(device: torch.device, precision: str, size: int = 8192) -> float:
    """Measured operations per second of a square matrix product."""
    a = torch.randn(size, size, device=device, dtype=WORKING_TYPES[precision])
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        return 2 * size**3 / _best(lambda: a @ a)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measured(config: "RooflineConfig", device: torch.device) -> list[dict[str, Any]]:
    """Of every variant on this GPU: its step, and the model's floor with this GPU's measured rates."""
    workload = Workload(preset=config.preset, batch_size=config.batch_size)
    variants = all_variants(device)
    seconds = time_in_turns(variants, workload, device, config.rounds)
    rows = []
    for variant in variants:
        tuning = None if variant.tuning is None else on_gpu(variant.tuning)
        capability = min(torch.cuda.get_device_capability(device), TENSOR_CORES_SINCE)
        entries = trace(config.preset, config.batch_size, variant.precision, tuning, capability=capability)
        rate = matmul_rate(device, variant.arithmetic)
        floor = floor_seconds(entries, copy_bandwidth(device), rate, captured=variant.captured)
        ms = 1e3 * statistics.median(taken.wall for taken in seconds[variant.name])
        row = {"name": variant.name, "ms": ms, "floor_ms": 1e3 * floor, "over_floor": ms / (1e3 * floor)}
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class RooflineConfig:
    """Model a training step on four GPUs; on a GPU, also measure how far each step is from its floor."""

    preset: Literal["tutorial", "junyanz"] = "tutorial"
    """Whose networks and update rule."""
    batch_size: int = 1
    """Pairs per step."""
    rounds: int = 11
    """How often each variant has its turn, on a GPU."""
    output: Path | None = None
    """JSON file for the result."""


def roofline(config: RooflineConfig) -> dict[str, Any]:
    """Prints and returns the result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "what": "roofline",
        "environment": results.environment(device),
        "conditions": {"preset": config.preset, "batch_size": config.batch_size, "pixels": 256},
        "assumed": {
            "eager_operator_us": EAGER_OPERATOR_US,
            "captured_launch_us": CAPTURED_LAUNCH_US,
            "node_us": NODE_US,
            "trip_us": TRIP_US,
            "resident_warps": RESIDENT_WARPS,
        },
        "model": {
            name: {"sixteen": gpu.sixteen, "steps": modelled(config.preset, config.batch_size, gpu)}
            for name, gpu in GPUS.items()
        },
        "ladder": {
            name: ladder(config.preset, config.batch_size, gpu)
            for name, gpu in GPUS.items()
            if gpu.sixteen == "bf16"
        },
    }
    print(
        f"{config.preset}, batch {config.batch_size}; model, ms per step: by bandwidth (of it on the GPU), "
        "with latency, with the second stream beside the first"
    )
    for name, gpu in result["model"].items():
        steps = (
            f"{who} {row['ms']:.2f} ({row['device_ms']:.2f}), {row['latency_ms']:.2f}, "
            f"{row['overlapped_ms']:.2f}"
            for who, row in gpu["steps"].items()
        )
        print(f"  {name}, {gpu['sixteen']}: {'   '.join(steps)}")
    if device.type == "cuda":
        precisions = dict.fromkeys(variant.arithmetic for variant in all_variants(device))
        result["rates"] = {"copy_gb_per_s": copy_bandwidth(device) / 1e9} | {
            f"{precision}_tflops": matmul_rate(device, precision) / 1e12 for precision in precisions
        }
        print("measured rates:", ", ".join(f"{name} {value:.0f}" for name, value in result["rates"].items()))
        result["measured"] = measured(config, device)
        for row in result["measured"]:
            print(f"  {row['name']:28} {row['ms']:8.3f} ms, {row['over_floor']:.2f} times the model's floor")
    if config.output is not None:
        results.save(result, config.output)
    return result


def main(argv: list[str] | None = None) -> None:
    cli.run(RooflineConfig, roofline, argv)


if __name__ == "__main__":
    main()

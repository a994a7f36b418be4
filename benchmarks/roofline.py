"""How fast a step could be: its bytes and its arithmetic against what a GPU is said to do. A model.

    python -m benchmarks.roofline

Every operator of a step (``benchmarks.traffic``) takes the longer of the time for its bytes and the time for
its arithmetic; the operators follow one another. The host hands a GPU one operator after the other, so a
step that is not captured takes at least as long as the host does. Nothing here was measured, unless there is
a GPU: then its own copy bandwidth and matrix product rate are measured first, and every variant's step is
set against its floor by these.

What the model leaves out makes true steps slower (no kernel reaches the published figures) or faster (what
an operator wrote may still be in the L2 cache when the next one reads it).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import results, traffic
from benchmarks.peers import PLAIN, Tuning
from benchmarks.processes import time_in_turns
from benchmarks.timing import clock
from benchmarks.traffic import Entry
from benchmarks.variants import all_variants
from benchmarks.workload import Workload
from fastpix2pix import cli
from fastpix2pix.training.precision import WORKING_TYPES

EAGER_OPERATOR_US = 8.0
"""Assumed: what Python, autograd and the launch take per operator. 5 to 10 is what eager PyTorch is known
for; forward and backward alike, as autograd's own thread works while Python waits."""

CAPTURED_LAUNCH_US = 1.5
"""Assumed: from the end of one node of a captured graph to the start of the next."""


@dataclass(frozen=True)
class Gpu:
    """bandwidth: GB/s. flops: dense TFLOP/s of a matrix product in each type; sixteen: the 16-bit type that
    training takes on it."""

    bandwidth: float
    flops: dict[str, float]
    sixteen: str = "bf16"


# NVIDIA's data sheets of the SXM modules: "NVIDIA V100 Tensor Core GPU" (2020), "NVIDIA A100 Tensor Core GPU"
# (2021; 80 GB), "NVIDIA H100 Tensor Core GPU" (2023), "NVIDIA H200 Tensor Core GPU" (2024). Those of the
# H100 and H200 give tensor rates with sparsity; half of that is dense.
GPUS = {
    "V100": Gpu(900, {"fp32": 15.7, "tf32": 15.7, "fp16": 125}, "fp16"),
    "A100": Gpu(2039, {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312}),
    "H100": Gpu(3350, {"fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5}),
    "H200": Gpu(4800, {"fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5}),
}


def device_seconds(entries: list[Entry], bandwidth: float, flops: float) -> float:
    """Of a step's operators one after the other; bandwidth in bytes, flops in operations, per second."""
    return sum(max(entry.moved / bandwidth, entry.flops / flops) for entry in entries)


def eager_seconds(entries: list[Entry], bandwidth: float, flops: float) -> float:
    """Model of a step that the host launches operator by operator: whichever of the two is slower."""
    return max(device_seconds(entries, bandwidth, flops), 1e-6 * EAGER_OPERATOR_US * len(entries))


def captured_seconds(entries: list[Entry], bandwidth: float, flops: float) -> float:
    """Model of a step that is replayed from a CUDA graph."""
    return device_seconds(entries, bandwidth, flops) + 1e-6 * CAPTURED_LAUNCH_US * len(entries)


def floor_seconds(entries: list[Entry], bandwidth: float, flops: float, *, captured: bool) -> float:
    return (captured_seconds if captured else eager_seconds)(entries, bandwidth, flops)


@cache
def trace(preset: str, batch_size: int, precision: str, tuning: Tuning | None) -> list[Entry]:
    """The operators of a step as a GPU runs them: a peer's of this ``tuning``, or ours in ``precision``."""
    workload = Workload(preset=preset, batch_size=batch_size)
    return traffic.trace_ours(workload, precision) if tuning is None else traffic.trace_peer(workload, tuning)


def on_gpu(tuning: Tuning) -> Tuning:
    """As a GPU runs it: without further wishes, Adam there updates several tensors per operator."""
    return tuning if tuning.adam else replace(tuning, adam=traffic.PLAIN_ON_GPU.adam)


def modelled(preset: str, batch_size: int, gpu: Gpu) -> dict[str, dict[str, float]]:
    """Milliseconds per step of the plain and the tuned peer and of ours: on the device, and as it is run."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}[gpu.sixteen]
    # PyTorch lets float32 convolutions use tf32 unless told otherwise (torch.backends.cudnn.allow_tf32).
    variants = {
        "plain PyTorch": ("tf32", on_gpu(PLAIN)),
        "tuned PyTorch": (gpu.sixteen, replace(traffic.TUNED, autocast=autocast)),
        "fastpix2pix": (gpu.sixteen, None),
    }
    rows = {}
    for name, (kind, tuning) in variants.items():
        entries = trace(preset, batch_size, gpu.sixteen, tuning)
        rates = gpu.bandwidth * 1e9, gpu.flops[kind] * 1e12
        rows[name] = {
            "operators": len(entries),
            "operands_gb": sum(entry.operands for entry in entries) / 1e9,
            "device_ms": 1e3 * device_seconds(entries, *rates),
            "ms": 1e3 * floor_seconds(entries, *rates, captured=tuning is None),
        }
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
        entries = trace(config.preset, config.batch_size, variant.precision, tuning)
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
        "assumed": {"eager_operator_us": EAGER_OPERATOR_US, "captured_launch_us": CAPTURED_LAUNCH_US},
        "model": {
            name: {"sixteen": gpu.sixteen, "steps": modelled(config.preset, config.batch_size, gpu)}
            for name, gpu in GPUS.items()
        },
    }
    print(f"{config.preset}, batch {config.batch_size}; model, ms per step (of it on the GPU)")
    for name, gpu in result["model"].items():
        steps = (f"{who} {row['ms']:.2f} ({row['device_ms']:.2f})" for who, row in gpu["steps"].items())
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

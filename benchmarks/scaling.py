"""What a second GPU would bring: the bytes that ranks exchange against links of published speed. A model.

    python -m benchmarks.scaling

A step of N ranks is the traced step of one of them (``benchmarks.roofline``), Adam on its share, and between
its segments the exchange, counted on the step itself; nothing of it is taken to overlap with anything. Links
are taken to reach EFFICIENCY of what their maker says, and every collective to wait LATENCY besides. Nothing
here was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import results, traffic
from benchmarks.roofline import GPUS, Gpu, captured_seconds, trace
from benchmarks.traffic import Entry
from benchmarks.workload import Workload
from fastpix2pix import cli
from fastpix2pix.training.distributed import Unconnected, Wait

EFFICIENCY = 0.7
"""Assumed: the share of a link's published bandwidth that a ring of several GPUs gets through it."""

LATENCY_US = 20.0
"""Assumed: of a collective, from the last kernel before it to the first after it, beside its bytes."""

SEGMENT_US = 10.0
"""Assumed: the start of one more CUDA graph."""


@dataclass(frozen=True)
class Link:
    """bandwidth: GB/s in one direction. gpu: on which it is."""

    gpu: str
    bandwidth: float


# NVIDIA's data sheets of the A100 (80 GB) and the H100 SXM name the sum of both directions: 600 and 900 GB/s
# of NVLink, 64 and 128 GB/s of PCIe 4.0 and 5.0 with 16 lanes.
LINKS = {
    "A100, NVLink": Link("A100", 300),
    "A100, PCIe 4.0": Link("A100", 32),
    "H100, NVLink": Link("H100", 450),
    "H100, PCIe 5.0": Link("H100", 64),
}
RANKS = (2, 4, 8)
BATCH_SIZES = (1, 4, 16)


class Counting(Unconnected):
    """Counts what one rank would send, and in how many collectives."""

    def __init__(self, size: int):
        super().__init__(size)
        self.sent, self.collectives = 0.0, 0

    def scatter_sum(self, whole: Tensor, share: Tensor) -> Wait:
        return self._count(whole, 1)

    def gather(self, whole: Tensor, share: Tensor) -> Wait:
        return self._count(whole, 1)

    def sum_(self, tensor: Tensor) -> None:
        self._count(tensor, 2)  # as a reduce-scatter and an all-gather

    def max_(self, tensor: Tensor) -> None:
        self._count(tensor, 2)

    def _count(self, whole: Tensor, ways: int) -> Callable[[], None]:
        self.sent += ways * whole.numel() * whole.element_size() * (self.size - 1) / self.size
        self.collectives += 1
        return lambda: None


@dataclass(frozen=True)
class Rank:
    """One rank's step: its operators, what it sends (bytes), in how many collectives and segments."""

    entries: list[Entry]
    sent: float
    collectives: int


@cache
def traced(preset: str, batch_size: int, ranks: int) -> Rank:
    """A step in bf16 of one of ``ranks``."""
    workload, exchange = Workload(preset=preset, batch_size=batch_size), Counting(ranks)
    step = traffic.our_step(workload, "bf16", exchange)
    exchange.sent, exchange.collectives = 0.0, 0  # the initial weights do not count
    entries = traffic.trace_ours(workload, "bf16", step=step)
    return Rank(entries, exchange.sent, exchange.collectives)


def exchange_seconds(rank: Rank, link: Link) -> float:
    """Of one step."""
    waiting = 1e-6 * (LATENCY_US + SEGMENT_US) * rank.collectives
    return rank.sent / (1e9 * EFFICIENCY * link.bandwidth) + waiting


def scaled(preset: str, batch_size: int, ranks: int, link: Link) -> dict[str, float]:
    """Milliseconds of a step alone and of a rank, of them of the exchange, and how many times the images a
    second of one GPU all ranks train."""
    gpu: Gpu = GPUS[link.gpu]
    rates = gpu.bandwidth * 1e9, gpu.flops["bf16"] * 1e12
    alone = captured_seconds(trace(preset, batch_size, "bf16", None), *rates)
    rank = traced(preset, batch_size, ranks)
    exchanging = exchange_seconds(rank, link)
    together = captured_seconds(rank.entries, *rates) + exchanging
    return {
        "alone_ms": 1e3 * alone,
        "ms": 1e3 * together,
        "exchange_ms": 1e3 * exchanging,
        "sent_mb": rank.sent / 1e6,
        "speedup": ranks * alone / together,
    }


# --------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class ScalingConfig:
    """Model a training step on several GPUs."""

    preset: Literal["tutorial", "junyanz"] = "tutorial"
    """Whose networks and update rule."""
    output: Path | None = None
    """JSON file for the result."""


def scaling(config: ScalingConfig) -> dict[str, Any]:
    """Prints the table of docs/many-gpus.md, and returns the result."""
    result = {
        "what": "scaling",
        "environment": results.environment(torch.device("cpu")),
        "conditions": {"preset": config.preset, "pixels": 256, "precision": "bf16"},
        "assumed": {"efficiency": EFFICIENCY, "latency_us": LATENCY_US, "segment_us": SEGMENT_US},
        "model": [
            {"link": name, "batch_size": batch_size, "ranks": ranks}
            | scaled(config.preset, batch_size, ranks, link)
            for name, link in LINKS.items()
            for batch_size in BATCH_SIZES
            for ranks in RANKS
        ],
    }
    print("\n".join(table(result)))
    if config.output is not None:
        results.save(result, config.output)
    return result


def table(result: dict[str, Any]) -> list[str]:
    """Markdown: how many times the images a second of one GPU, by link, batch a GPU and number of GPUs."""
    numbers = {(row["link"], row["batch_size"], row["ranks"]): row for row in result["model"]}
    columns = " | ".join(f"{ranks} GPUs (model)" for ranks in RANKS)
    lines = [
        f"| link | batch a GPU | step alone, ms (model) | exchange among 8, ms (model) | {columns} |",
        "| --- | ---: | ---: | ---: | " + " | ".join("---:" for _ in RANKS) + " |",
    ]
    for link in LINKS:
        for batch_size in BATCH_SIZES:
            rows = [numbers[link, batch_size, ranks] for ranks in RANKS]
            speedups = " | ".join(f"x {row['speedup']:.2f}" for row in rows)
            last = rows[-1]
            lines.append(
                f"| {link} | {batch_size} | {last['alone_ms']:.2f} | {last['exchange_ms']:.2f} | {speedups} |"
            )
    return lines


def main(argv: list[str] | None = None) -> None:
    cli.run(ScalingConfig, scaling, argv)


if __name__ == "__main__":
    main()

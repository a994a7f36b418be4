"""Our training step against the others', in turns, from the same weights on the same images.

    python -m benchmarks.compare

Each variant has a process of its own and waits there for its turn, so that none gains or suffers by how
another one sets up memory, arithmetic or kernels.

A round takes every variant once, in an order of its own. Reported are medians over the rounds, and ratios:
the median of the ratios within a round, which a machine that is slow for a while does not change.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import outsiders, results
from benchmarks.processes import time_in_turns
from benchmarks.timing import Seconds, speedup
from benchmarks.variants import all_variants, outsider_variants
from benchmarks.workload import Workload
from fastpix2pix import cli


@dataclass(frozen=True)
class CompareConfig:
    """Time one training step of the full networks at 256x256: plain, tuned and ours."""

    preset: Literal["tutorial", "junyanz"] = "tutorial"
    """Whose networks and update rule."""
    batch_size: int = 1
    """Pairs per step."""
    rounds: int = 11
    """How often each variant has its turn."""
    eager: bool = False
    """On a GPU, leave the tuned step as it is. Otherwise torch.compile tunes it first, for minutes."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    junyanz: Path | None = None
    """With --preset junyanz: a checkout of pytorch-CycleGAN-and-pix2pix, whose own code takes part."""
    output: Path | None = None
    """JSON file for the result."""


def compare(config: CompareConfig) -> dict[str, Any]:
    """Prints and returns the result."""
    if config.junyanz is not None:
        outsiders.check_checkout(config.junyanz, config.preset)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = Workload(preset=config.preset, batch_size=config.batch_size)
    variants = [
        *outsider_variants(config.preset, config.junyanz),
        *all_variants(device, compiled=device.type == "cuda" and not config.eager),
    ]
    environment = results.environment(device)
    seconds = time_in_turns(variants, workload, device, config.rounds)
    result = {
        "what": "comparison",
        "environment": environment,
        "conditions": {
            "preset": config.preset,
            "batch_size": config.batch_size,
            "pixels": workload.size,
            "rounds": config.rounds,
        },
        "figures": [
            {
                "name": variant.name,
                "rung": variant.rung,
                **figures(seconds, variant.name),
            }
            for variant in variants
        ],
    }
    show(result)
    if config.output is not None:
        results.save(result, config.output)
    return result


def figures(seconds: dict[str, list[Seconds]], name: str) -> dict[str, Any]:
    """Of one variant: milliseconds per step, and how many times as fast as the plain and the tuned peer."""
    wall, cpu = ([1e3 * taken for taken in column] for column in zip(*seconds[name], strict=True))
    low, _, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else 3 * wall
    return {
        "ms": statistics.median(wall),
        "ms_quartiles": [low, high],
        "cpu_ms": statistics.median(cpu),
        **{
            f"over_{peer}": {
                clock: speedup(
                    (getattr(taken, clock) for taken in seconds[f"{peer} PyTorch"]),
                    (getattr(taken, clock) for taken in seconds[name]),
                )
                for clock in Seconds._fields
            }
            for peer in ("plain", "tuned")
        },
    }


def show(result: dict[str, Any]) -> None:
    conditions, environment = result["conditions"], result["environment"]
    where = (environment["gpu"] or environment["cpu"])["name"]
    print(f"{conditions['preset']}, batch {conditions['batch_size']}, {where}: a step in ms, in turns")
    print(
        f"{'':28}{'median':>9}{'quartiles':>16}{'CPU time':>10}   times as fast as plain / tuned (CPU time)"
    )
    for row in result["figures"]:
        quartiles = " - ".join(f"{value:.1f}" for value in row["ms_quartiles"])
        plain, tuned = row["over_plain"], row["over_tuned"]
        print(
            f"{row['name']:28}{row['ms']:9.1f}{quartiles:>20}{row['cpu_ms']:10.1f}   "
            f"{plain['wall']:.2f} / {tuned['wall']:.2f} ({plain['cpu']:.2f} / {tuned['cpu']:.2f})"
        )


def main(argv: list[str] | None = None) -> None:
    cli.run(CompareConfig, compare, argv)


if __name__ == "__main__":
    main()

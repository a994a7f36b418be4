"""A forward and backward pass of eight published networks, as they are and accelerated, in turns.

    python -m benchmarks.accelerate --json benchmarks/results/accelerate-cpu-avx512.json

Both layouts: a network that stays contiguous, and one that was brought to channels-last before. Ratios of the
process's CPU time, which others on the machine disturb least, and of the clock's.
"""

import argparse
import copy
import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.timing import interleaved, speedup, timed
from fastpix2pix import accelerate
from tests.interop.published_networks import PUBLISHED

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
WIDTH, SIDE = 16, 128
TURN = 0.1  # seconds that a turn is to last at least: short passes several times in a row
SIDES = {"PyTorch-GAN generator": 256}  # it halves its images eight times


def leaves(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [leaf for part in made for leaf in leaves(part)]


def one_pass(network: nn.Module, images: list[Tensor]) -> None:
    sum(leaf.square().mean() for leaf in leaves(network(*images))).backward()
    network.zero_grad(set_to_none=True)


def compare(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each layout: how many times as fast the accelerated network is."""
    published, rows = PUBLISHED[name], []
    for layout, memory_format in LAYOUTS.items():
        torch.manual_seed(0)
        side = SIDES.get(name, SIDE)
        network = published.build(WIDTH).to(memory_format=memory_format)
        images = [
            torch.randn(1, channels, side, side).contiguous(memory_format=memory_format)
            for channels in published.inputs
        ]
        fused = copy.deepcopy(network)
        report = accelerate(fused)
        runs: dict[str, Callable[[], object]] = {
            side: partial(one_pass, net, images) for side, net in (("plain", network), ("ours", fused))
        }
        for run in runs.values():
            run()
            run()
        times = max(1, math.ceil(TURN / timed(runs["plain"]).cpu))
        turns = {side: partial(timed, run, times) for side, run in runs.items()}
        gc.collect()
        seconds = interleaved(turns, rounds)
        cpu, wall = (
            speedup(*([getattr(s, clock) for s in seconds[side]] for side in ("plain", "ours")))
            for clock in ("cpu", "wall")
        )
        rows.append(
            {
                "network": name,
                "layout": layout,
                "fused": len(report.changed),
                "left": len(report.left),
                "cpu": round(cpu, 3),
                "wall": round(wall, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = []
    for name in PUBLISHED:
        figures += compare(name, arguments.rounds)
        for row in figures[-2:]:
            print("{network:<40}{layout:<15}{fused:>4}{left:>4}{cpu:>8}{wall:>8}".format(**row), flush=True)
    if arguments.json is not None:
        result = {
            "what": "accelerate",
            "environment": results.environment(torch.device("cpu")),
            "conditions": {"width": WIDTH, "pixels": SIDE, "batch_size": 1, "rounds": arguments.rounds},
            "figures": figures,
        }
        results.save(result, arguments.json)


if __name__ == "__main__":
    main()

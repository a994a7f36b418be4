"""``norm_act`` on the CPU beside PyTorch's own layers, and beside torch.compile of them, in turns.

    python -m benchmarks.ops --json benchmarks/results/ops-cpu.json

A forward and a backward pass each. On a GPU ``benchmarks/bench_kernels.py`` compares all ops, from captured
graphs; ``python -m fastpix2pix.doctor --full`` runs it.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.timing import interleaved, speedup, timed
from fastpix2pix import accelerate

OURS, TORCH, COMPILED = "fastpix2pix", "torch", "torch.compile"
LAYERS: dict[str, Callable[[int], list[nn.Module]]] = {
    "batch norm + LeakyReLU": lambda width: [nn.BatchNorm2d(width), nn.LeakyReLU(0.2)],
    "instance norm + ReLU": lambda width: [nn.InstanceNorm2d(width), nn.ReLU()],
    "instance norm": lambda width: [nn.InstanceNorm2d(width), nn.Identity()],
}
SHAPES = ((1, 64, 128), (1, 256, 32), (4, 64, 32))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def there_and_back(layers: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> object:
    return torch.autograd.grad(layers(x), x, dy)


def compare(name: str, shape: tuple[int, int, int], layout: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each, and how many times as fast as the others ours is within a round."""
    n, width, side = shape
    torch.manual_seed(0)
    x, dy = (torch.randn(n, width, side, side).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    x.requires_grad_()
    networks = {side: nn.Sequential(*LAYERS[name](width)) for side in (OURS, TORCH, COMPILED)}
    accelerate(networks[OURS])
    calls: dict[str, Callable[[Tensor], Tensor]] = networks | {
        COMPILED: torch.compile(networks[COMPILED], dynamic=False)
    }
    runs = {side: partial(there_and_back, call, x, dy) for side, call in calls.items()}
    for run in runs.values():
        run()
        run()
    times = max(1, 2**21 // x.numel())  # short ones several times in a row
    seconds = interleaved({side: partial(timed, run, times) for side, run in runs.items()}, rounds)
    clocks = {side: [s.cpu for s in some] for side, some in seconds.items()}
    return {
        "op": name,
        "shape": f"{n}x{width}x{side}x{side}",
        "layout": layout,
        "ms": {side: 1e3 * sorted(some)[len(some) // 2] for side, some in clocks.items()},
        "times_as_fast_as": {side: speedup(clocks[side], clocks[OURS]) for side in (TORCH, COMPILED)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = []
    for name in LAYERS:
        for shape in SHAPES:
            for layout in LAYOUTS:
                torch._dynamo.reset()
                figures.append(compare(name, shape, layout, arguments.rounds))
                print(results.rounded(figures[-1]), flush=True)
    if arguments.json is not None:
        environment = results.environment(torch.device("cpu"))
        result = {"what": "ops", "environment": environment, "figures": figures}
        results.save(result | {"conditions": {"rounds": arguments.rounds}}, arguments.json)


if __name__ == "__main__":
    main()

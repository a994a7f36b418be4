"""The full step, 256x256: presets, precisions, batch sizes; ours beside what people run today.

One after the other here; ``python -m benchmarks.compare`` takes turns and is what ratios are quoted from.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.timing import clock
from benchmarks.variants import RunningVariant, StepVariant, all_variants
from benchmarks.workload import Workload

ROOT = Path(__file__).parents[1]
ON_GPU = DEVICE.type == "cuda"
# On the CPU the rungs between are left to benchmarks.compare.
VARIANTS = [
    variant
    for variant in all_variants(DEVICE, compiled=ON_GPU)
    if ON_GPU or variant.name != "channels-last PyTorch"
]

pytestmark = pytest.mark.benchmark(timer=clock)


def cases() -> list:
    """Everything on a GPU; on the CPU, where a step is half a second, what fits into the suite's minutes."""
    some = []
    for preset in ("tutorial", "junyanz"):
        for batch_size in (1, 4, 16):
            too_long = batch_size == 16 or (batch_size == 4 and preset == "junyanz")
            skip = pytest.mark.skip(reason=f"batch size {batch_size} of {preset} takes too long on a CPU")
            for variant in VARIANTS:
                marks = [skip] if too_long and not ON_GPU else []
                label = f"{preset}-{batch_size}-{variant.name}"
                some.append(pytest.param(preset, batch_size, variant, marks=marks, id=label))
    return some


@pytest.mark.parametrize(("preset", "batch_size", "variant"), cases())
def test_step(benchmark, device, preset, batch_size, variant):
    benchmark.group = f"step: {preset}, batch {batch_size}"
    running = RunningVariant(variant, Workload(preset=preset, batch_size=batch_size), device)
    if ON_GPU:
        benchmark.pedantic(running.step, rounds=20, iterations=20, warmup_rounds=1)
    else:
        rounds = 5 if batch_size == 1 else 2
        benchmark.pedantic(running.step, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["images_per_s"] = batch_size / benchmark.stats.stats.median


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_first_step(benchmark, variant: StepVariant, tmp_path):
    """From an empty process (and on a GPU without compiled kernels) to the losses of the first step."""
    benchmark.group = "time to first step, tutorial, batch 1"
    command = [sys.executable, "-m", "benchmarks.cold_start", variant.name]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = []

    def start():
        done.append(subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True))

    benchmark.pedantic(start, rounds=1)
    benchmark.extra_info |= json.loads(done[0].stdout)

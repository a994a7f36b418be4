"""The loader alone, and an epoch end to end: does training wait for its images?"""

import time
from contextlib import closing

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.contenders import ours
from benchmarks.timing import clock
from fastpix2pix.config import TrainConfig
from fastpix2pix.data import LoaderOptions, open_loader
from fastpix2pix.graph import CapturedStep, set_float32_math
from fastpix2pix.host_memory import keep_freed_memory
from fastpix2pix.models import build_networks
from fastpix2pix.precision import WORKING_TYPES
from fastpix2pix.step import TrainStep

ON_GPU = DEVICE.type == "cuda"
IMAGES = 64
# On the CPU as many as it takes to come to the loader's second chunk.
STEPS = 400 if ON_GPU else 20
EPOCH = f"{STEPS} steps, an epoch of the facades" if ON_GPU else f"{STEPS} steps of an epoch"
CACHES = {"decoded in every epoch": 0, "kept decoded": 2**30}

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.mark.parametrize("memory", CACHES)
@pytest.mark.parametrize("kind", ["dali", "portable"])
def test_loader(benchmark, device, dataset, kind, memory):
    """Pairs per second at batch 1, when nothing else runs; a cache is filled before."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    benchmark.group = "loader alone"
    loader = open_loader(dataset, LoaderOptions(loader=kind, cache_bytes=CACHES[memory]), device=device)
    with closing(loader):
        stream = loader.stream()

        def read():
            for _ in range(IMAGES):
                next(stream)

        benchmark.pedantic(read, rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {"images": dataset.name, "pairs_per_s": IMAGES / benchmark.stats.stats.median}


@pytest.mark.parametrize(
    "memory", ["decoded in every epoch", pytest.param("kept decoded", marks=pytest.mark.gpu)]
)
def test_epoch(benchmark, device, dataset, memory):
    """The training loop without its monitor, in the precision that training chooses, after its first step."""
    contender = ours(device)[-1]
    benchmark.group = f"{EPOCH}, tutorial, batch 1"
    config = TrainConfig(precision=contender.precision)
    set_float32_math(config.precision)
    if not ON_GPU:
        keep_freed_memory()
    step = TrainStep(*build_networks(config, device), config)
    update = CapturedStep(step) if contender.captured else step
    options = LoaderOptions(cache_bytes=CACHES[memory])
    loader = open_loader(dataset, options, device=device, dtype=WORKING_TYPES[config.precision])
    waited = []

    def steps(count):
        waited.append(0.0)
        for _ in range(count):
            began = time.perf_counter()
            batch = next(stream)
            waited[-1] += time.perf_counter() - began
            update(batch.source, batch.target)

    with closing(loader):
        stream = loader.stream()
        steps(1)
        benchmark.pedantic(steps, args=(STEPS,), rounds=5 if ON_GPU else 1)
    seconds = benchmark.stats.stats.total
    benchmark.extra_info |= {
        "images": dataset.name,
        "loader": loader.kind,
        "precision": config.precision,
        "ms_per_step": 1e3 * benchmark.stats.stats.median / STEPS,
        "waiting_for_data_share": sum(waited[1:]) / seconds,
    }

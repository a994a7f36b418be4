"""The loader alone, and an epoch end to end: does training wait for its images?"""

import time
from contextlib import closing

import pytest

from benchmarks.conftest import DEVICE
from benchmarks.timing import clock
from benchmarks.variants import our_variants
from benchmarks.workload import Workload
from fastpix2pix.data import LoaderOptions, open_loader
from fastpix2pix.models import build_networks
from fastpix2pix.training.prepare import prepare_step

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
    options = LoaderOptions(loader=kind, cache_bytes=CACHES[memory])
    loader = open_loader(dataset, options, device=device)
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
    variant = our_variants(device)[-1]
    benchmark.group = f"{EPOCH}, tutorial, batch 1"
    workload = Workload()
    prepared = prepare_step(
        *build_networks(workload.network_options()),
        workload.step_options(variant.precision),
        device,
        image_size=workload.size,
        graph=variant.captured,
        check=False,
    )
    update = prepared.run
    options = LoaderOptions(cache_bytes=CACHES[memory])
    loader = open_loader(dataset, options, device=device, dtype=prepared.dtype)
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
        "precision": prepared.precision,
        "ms_per_step": 1e3 * benchmark.stats.stats.median / STEPS,
        "waiting_for_data_share": sum(waited[1:]) / seconds,
    }

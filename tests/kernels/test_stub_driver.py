"""Every launch through Triton's own CUDA launcher, as it arrives at a driver of ours (see stub_driver.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stub_driver

from fastpix2pix.kernels import language

pytestmark = pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")

COMPILER = shutil.which("gcc") or shutil.which("clang")
KERNELS = {
    "adam_advance",
    "adam_mark_non_finite",
    "adam_update",
    "deep_conv_add",
    "deep_conv_to_big",
    "deep_conv_to_small",
    "deep_conv_to_weight",
    "gan_loss_both",
    "gan_loss_target",
    "norm_act_backward_apply",
    "norm_act_backward_sums",
    "norm_act_backward_whole",
    "norm_act_forward_apply",
    "norm_act_forward_whole",
    "norm_act_statistics",
    "tanh_l1_backward_map",
    "tanh_l1_forward_map",
    "tanh_l1_sums",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if reason := stub_driver.missing(COMPILER):
        pytest.skip(f"Triton can't build its launcher: {reason}")
    return stub_driver.build(tmp_path_factory.mktemp("driver"), COMPILER)


@pytest.fixture(scope="module")
def kernel_cache(pytestconfig: pytest.Config, tmp_path_factory) -> Path:
    """Where compiled kernels are kept, for the next run of the tests too if pytest may write its cache."""
    if pytestconfig.pluginmanager.has_plugin("cacheprovider"):
        return pytestconfig.cache.mkdir("triton")
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def run(library: Path, kernel_cache: Path):
    """Runs jobs of stub_driver.py in one process of their own."""
    environment = stub_driver.environment(library, kernel_cache)

    def run(*jobs: str) -> dict[str, dict]:
        command = [sys.executable, stub_driver.__file__, *jobs]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


EACH_KERNEL, STEP = "each_kernel_once fp16", "train_step tutorial bf16"
FUSED = "one_kernel deep_update fp16"
FAULTS = {
    "another_grid": "grid is",
    "another_block": "block is",
    "exchanged_pointers": "parameter 0 (argument (0,)) is",
}


@pytest.fixture(scope="module")
def results(run) -> dict[str, dict]:
    return run(EACH_KERNEL, STEP, FUSED, *(f"{EACH_KERNEL} {fault}" for fault in FAULTS))


def check(job: str, result: dict, *, launches: int) -> None:
    counts = result["counts"]
    print(f"{job}: {result['launches']} launches, {counts['parameters']} parameters")
    assert not result["differences"], "\n".join(result["differences"])
    assert result["launches"] >= launches
    assert counts["parameters"] > 5 * result["launches"]
    assert counts["alignment promises"] > counts["parameters"] / 3


def test_every_kernel_arrives_at_the_driver_as_it_was_asked_for(results):
    check(EACH_KERNEL, results[EACH_KERNEL], launches=len(KERNELS))
    assert results[EACH_KERNEL]["kernels"].keys() >= KERNELS


def test_a_train_step_arrives_at_the_driver_as_it_was_asked_for(results):
    check(STEP, results[STEP], launches=35)


def test_fused_updates_arrive_at_the_driver_as_they_were_asked_for(results):
    check(FUSED, results[FUSED], launches=5)
    assert results[FUSED]["kernels"].keys() == {"deep_update"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_launch_that_is_not_what_was_asked_for_is_noticed(results, fault):
    differences = results[f"{EACH_KERNEL} {fault}"]["differences"]
    assert any(difference.startswith(f"tanh_l1_sums: {FAULTS[fault]}") for difference in differences)
    assert all("tanh_l1_sums" in difference for difference in differences)


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, launches",
    [
        ("every_layer bf16", 80),
        ("every_layer fp16", 80),
        ("every_layer fp32", 80),
        ("train_step junyanz fp16", 35),
        ("train_step junyanz bf16 batch=2", 35),
        ("train_step tutorial fp32", 35),
        ("train_step tutorial bf16 width=64 size=256 num_downs=8", 60),
        ("train_step junyanz fp16 width=64 size=256 num_downs=8", 60),
    ],
)
def test_layers_and_other_train_steps_arrive_as_they_were_asked_for(run, job, launches):
    (result,) = run(job).values()
    check(job, result, launches=launches)

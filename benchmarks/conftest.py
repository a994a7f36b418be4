"""What the suites share: the device, the images, and results that describe themselves."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks import results
from fastpix2pix.data.synthetic import default_folder, synthetic_dataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENVIRONMENT = results.environment(DEVICE)  # before the suite itself loads the machine
SHARED_FACADES = Path(__file__).resolve().parents[2] / "shared" / "facades"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cuda":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def pytest_benchmark_update_json(output_json: dict) -> None:
    """Replace pytest-benchmark's description of machine and repository, which names the host, by ours."""
    for key in ("machine_info", "commit_info", "datetime"):
        output_json.pop(key, None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
    output_json |= results.rounded({"what": "suite", "environment": ENVIRONMENT, **output_json})


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def dataset() -> Path:
    """Real facades where there are some, else painted ones: an epoch of them on a GPU, fewer on the CPU."""
    real = Path(os.environ.get("FASTPIX2PIX_FACADES", SHARED_FACADES))
    if (real / "train").is_dir():
        return real
    return synthetic_dataset(default_folder(), train=400 if DEVICE.type == "cuda" else 64)

"""Fixtures shared by all tests: the real facades and the golden numbers, where they exist."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _folder(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"{path} is absent; set {variable} to use a copy elsewhere")
    return path


@pytest.fixture(scope="session")
def facades() -> Path:
    """Folder with ``train/`` and ``test/`` of the real facades (photo left, label map right)."""
    return _folder("FASTPIX2PIX_FACADES", SHARED / "facades")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the numbers that the TensorFlow tutorial's own code produced."""
    return _folder("FASTPIX2PIX_GOLDEN", SHARED / "golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))

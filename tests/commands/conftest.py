"""Fixtures of the commands' tests: a tiny training in this process."""

from pathlib import Path

import pytest
from tiny_run import SMALL, write_pairs

from fastpix2pix import train


@pytest.fixture
def dataroot(tmp_path) -> Path:
    """Three pairs."""
    return write_pairs(tmp_path / "pairs")


@pytest.fixture
def run(tmp_path, dataroot, capfd):
    """``run(*flags)`` -> (exit code, stdout, stderr) of a training in ``tmp_path / "run"``."""

    def start(*flags: object) -> tuple[int, str, str]:
        code = 0
        where = ["--dataroot", str(dataroot), "--checkpoints_dir", str(tmp_path), "--name", "run"]
        try:
            train.main([*SMALL, *where, *map(str, flags)])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return start

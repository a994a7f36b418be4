"""The smallest training as a user types it, and how to read what came of it."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastpix2pix import checkpoint

SMALL = [
    *("--netG", "unet_32", "--crop_size", "32", "--load_size", "32", "--ngf", "4", "--ndf", "4"),
    *("--loader", "portable", "--num_threads", "1", "--precision", "fp32", "--device", "cpu"),
]


def write_pairs(root: Path, count: int = 3) -> Path:
    """``count`` side-by-side PNGs of random blocks in ``root / "train"``; returns ``root``."""
    random = np.random.default_rng(0)
    (root / "train").mkdir(parents=True)
    for i in range(count):
        blocks = random.integers(0, 256, (4, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(root / "train" / f"{i}.png")
    return root


def steps_saved(run: Path) -> list[int]:
    """The steps of all checkpoints of a run, each read and verified."""
    return [checkpoint.load(path)["step"] for path in sorted((run / "checkpoints").iterdir())]


def error_line(err: str) -> str:
    """The one line with which a command ends."""
    lines = err.strip().splitlines()
    assert "Traceback" not in err and sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1]

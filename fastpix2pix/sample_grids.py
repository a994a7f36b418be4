"""Reading the sample grids that a training drew: the steps, and the single pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastpix2pix.errors import UserError


@dataclass(frozen=True)
class Row:
    """One pair of a grid, laid out by monitor.sample_grid: squares side by side, uint8 (side, side, 3)."""

    source: np.ndarray
    target: np.ndarray
    generated: np.ndarray


def find_grids(run: Path) -> dict[int, Path]:
    """The grids of a run by their step, oldest first; those that are being written or spoilt left out."""
    found = {}
    for path in sorted((run / "samples").glob("step_*.png")):
        try:
            with Image.open(path) as image:
                image.verify()
            found[int(path.stem.removeprefix("step_"))] = path
        except (OSError, SyntaxError, ValueError):
            continue
    return found


def read_grid(path: Path) -> list[Row]:
    """The pairs of a grid, top to bottom. Raises UserError when it can't be read or is no grid."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it") from error
    height, width = pixels.shape[:2]
    side = width // 3
    if not side or width % 3 or height % side:
        raise UserError(f"{path}: {width}x{height} is no grid of samples; remove it")
    return [Row(*_columns(pixels[top : top + side], side)) for top in range(0, height, side)]


def _columns(row: np.ndarray, side: int) -> Iterator[np.ndarray]:
    return (row[:, left : left + side] for left in range(0, row.shape[1], side))

"""The losses of every step of a run as ``losses.csv``, for a spreadsheet or pandas."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastpix2pix.training.losses import Losses

NAME = "losses.csv"
COLUMNS = ("step", *Losses._fields, "learning_rate")


class LossTable:
    """Appends a row a step. A run that goes on after ``first_step`` loses the rows of later steps first.

    Raises OSError where the file can't be read or written.
    """

    def __init__(self, run_folder: Path, first_step: int):
        path = run_folder / NAME
        kept = _rows_until(path, first_step) if first_step else []
        partial = run_folder / f".{NAME}.partial"
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *kept])
        os.replace(partial, path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)

    def add(self, first: int, losses: Iterable[Sequence[float]], lr: float) -> None:
        """The ``losses`` of the steps from ``first`` on."""
        self._rows.writerows([first + i, *row, lr] for i, row in enumerate(losses))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _rows_until(path: Path, last_step: int) -> list[list[str]]:
    """The whole rows of a table, up to ``last_step``."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdecimal()]
    return [row for row in rows if int(row[0]) <= last_step]

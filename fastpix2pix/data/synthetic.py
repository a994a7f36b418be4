"""A data set that is always there: painted facade pairs, written once into a cache folder."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from fastpix2pix.data.painter import paint_pair
from fastpix2pix.errors import UserError

VERSION = 1  # counts up whenever the pictures change, so that a cache never serves old ones


def default_folder() -> Path:
    """Where data sets are kept: ``FASTPIX2PIX_CACHE``, else the user's cache folder of the platform."""
    if own := os.environ.get("FASTPIX2PIX_CACHE"):
        return Path(own)
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastpix2pix"


def synthetic_dataset(
    folder: str | Path, *, train: int = 400, val: int = 20, test: int = 20, seed: int = 0
) -> Path:
    """Paints the data set into a subfolder of ``folder``, unless it is there, and returns that subfolder.

    It holds ``train/``, ``val/`` and ``test/`` with 512x256 JPEGs: A, the photo, on the left and B, its
    label map, on the right. Every picture depends on ``seed``, its split and its number alone. The
    subfolder appears under its name when the last picture is written: an interrupted run leaves nothing
    that looks whole. Raises ``UserError`` when the folder cannot be written.
    """
    root = Path(folder) / f"synthetic-v{VERSION}-{train}-{val}-{test}-seed{seed}"
    if root.is_dir():
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root.parent)
        _paint(root, {"train": train, "val": val, "test": test}, seed)
    except OSError as error:
        if root.is_dir():  # another process was quicker; its pictures are the same
            return root
        raise UserError(
            f"{root.parent}: cannot hold the painted data set ({error}); set FASTPIX2PIX_CACHE to a folder "
            "that can be written"
        ) from error
    return root


def _paint(root: Path, counts: dict[str, int], seed: int) -> None:
    unfinished = root.parent / f".painting-{secrets.token_hex(4)}"
    with _claimed(unfinished):
        unfinished.mkdir()
        jobs = [(s, split, i) for s, (split, n) in enumerate(counts.items()) for i in range(n)]
        for split in counts:
            (unfinished / split).mkdir()
        for s, split, i in tqdm(jobs, desc="painting facades", unit="pair", leave=False, delay=1):
            picture = paint_pair(np.random.default_rng((seed, s, i)))
            picture.save(unfinished / split / f"{i + 1}.jpg", quality=92, subsampling=0)
        unfinished.rename(root)


@contextmanager
def _claimed(unfinished: Path) -> Iterator[None]:
    """Hold the folder ``unfinished``, of whatever process it is, and remove what is left of it afterwards.

    Raises filelock.Timeout when another process holds it.
    """
    lock = FileLock(f"{unfinished}.lock", timeout=0)
    with lock:
        try:
            yield
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            with suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes had painted in ``folder``."""
    for path in folder.glob(".painting-*"):
        with suppress(Timeout), _claimed(path.with_suffix("")):
            pass

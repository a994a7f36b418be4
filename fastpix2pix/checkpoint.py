"""Checkpoints that a kill at any moment cannot spoil, and that hold all that an exact resume needs."""

import contextlib
import errno
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastpix2pix.errors import UserError, is_out_of_memory

_NAME = re.compile(r"step_(\d+)\.pt")


def _by_step(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in (run_folder / "checkpoints").glob("step_*.pt")
             if (match := _NAME.fullmatch(path.name))]  # fmt: skip
    return [path for _, path in sorted(found)]


def latest(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(_by_step(run_folder)), None)


def save(run_folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``state`` as the run's checkpoint of ``step`` and remove all but the newest ``keep``.

    The file appears under its name only when all of it is on the disk, so whatever interrupts this leaves
    the earlier checkpoints whole. Raises UserError when it can't be written (disk full, no permission).
    """
    folder = run_folder / "checkpoints"
    path = folder / f"step_{step:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.glob("*.partial"):
            abandoned.unlink()
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(folder)
        for old in _by_step(run_folder)[:-keep]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: checkpoint not written ({error}); free space or choose another "
                        "--checkpoints_dir; earlier checkpoints are whole") from error  # fmt: skip
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; systems that can't open a folder don't need it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """The state that ``save`` was given, tensors on the CPU. Nothing in the file is executed.

    Raises UserError, each with its own cause and remedy: no such file, one that can't be opened, too little
    memory, a damaged file (every checksum in it is verified), one that would execute code, and one that is no
    checkpoint of this package.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path}: no such checkpoint; give the path of a step_*.pt file")
    try:
        _verify_checksums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: {_why_not_loaded(path, error)}") from error
    if not isinstance(state, dict) or any(not isinstance(state.get(k), t) for k, t in _ENTRIES.items()):
        raise UserError(
            f"{path}: not a fastpix2pix training checkpoint; give a step_*.pt file of a run folder"
        )
    return state


_ENTRIES = {"config": dict, "step": int, "generator": dict, "discriminator": dict}


def _verify_checksums(path: Path) -> None:
    """Raise BadZipFile, or whatever else zipfile makes of a damaged archive, unless all of it is whole.

    ``torch.load`` looks at no checksum of a tensor, though ``torch.save`` writes one for each.
    """
    with zipfile.ZipFile(path) as archive:
        if (first := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {first} is wrong")


# What the unpickler of torch.load says of a name that is not on its list of harmless ones.
_CODE = re.compile("GLOBAL|unrecognized function|Can only (create new object|build Tensor)")


def _why_not_loaded(path: Path, error: Exception) -> str:
    """What ``error`` means for the file at ``path``, and the remedy; only damage is a reason to delete."""
    text = str(error)
    if is_out_of_memory(error):
        return (
            f"not enough memory to load its {path.stat().st_size / 2**20:.0f} MiB; close other programs, or "
            "go on where there is more; the file is whole"
        )
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is zipfile's, of a wrong offset
        return f"can't be read ({error.strerror or error}); mend that, for the file may be whole"
    if isinstance(error, pickle.UnpicklingError) and _CODE.search(text):
        return "refused: it would execute code; take checkpoints from people you trust"
    return (
        "not a readable checkpoint: it is damaged, perhaps cut short; delete it to use the one before it, if "
        "there is one"
    )

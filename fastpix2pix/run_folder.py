"""A run's folder: who owns it, what was asked for, and what killed processes left in it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fastpix2pix import checkpoint, environment
from fastpix2pix.config import TrainConfig
from fastpix2pix.errors import UserError

LOCK, OWNER, REQUEST = ".lock", ".owner", "config.json"
PARTIAL = ".config.json.partial"
ORPHANS_GO_WITHIN = 10.0  # seconds; worker processes hold the lock of a parent that was killed for so long


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold it against every other training while the body runs.

    What killed trainings left half-written in it is removed, and the folder itself when nothing came of the
    body. Raises UserError that says who holds it, or why it can't be made.
    """
    new = not folder.exists()
    lock = FileLock(folder / LOCK)
    try:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(lock, folder)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            (folder / OWNER).write_text(f"{os.getpid()} {socket.gethostname()} {now}\n", encoding="utf-8")
    except NotImplementedError:
        print(f"{folder}: this file system has no locks; see to it that only one training uses the run")
    except UserError:
        lock.release()
        raise
    try:
        _remove_leftovers(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / OWNER).unlink(missing_ok=True)
            if new and {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    owner = _owner(folder)
    try:
        lock.acquire(timeout=ORPHANS_GO_WITHIN if owner is not None and _is_gone(*owner[:2]) else 0)
    except Timeout as error:
        who = "another training" if owner is None else "process {} on {}, since {}".format(*owner)
        raise UserError(f"{folder}: in use by {who}; wait for its end, or choose another --name") from error


def _owner(folder: Path) -> tuple[int, str, str] | None:
    """(process, host, since when) of the training that holds or held ``folder`` last."""
    try:
        if not (folder / OWNER).is_file():  # opening a pipe would wait for ever
            return None
        process, host, since = (folder / OWNER).read_text(encoding="utf-8").strip().split(maxsplit=2)
        return int(process), host, since
    except (OSError, ValueError):
        return None


def _is_gone(process: int, host: str) -> bool:
    if host != socket.gethostname() or os.name == "nt":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed training had not yet given its name: checkpoint, configuration, page."""
    with suppress(OSError):
        for path in [*(folder / "checkpoints").glob("*.partial"), *folder.glob(".*.partial")]:
            path.unlink()


# --------------------------------------------------------------------------------------- what was asked for


def write_request(config: TrainConfig) -> None:
    """Write ``config.json``; a reader sees the old one or the new one. Raises UserError if it can't."""
    with _writing(config.run_folder):
        with (config.run_folder / PARTIAL).open("w", encoding="utf-8") as file:
            file.write(config.to_json())
            file.flush()
            os.fsync(file.fileno())
        (config.run_folder / PARTIAL).replace(config.run_folder / REQUEST)


def write_environment(block: dict, folder: Path) -> None:
    """Write what this machine made of the request. Raises UserError where that can't be."""
    with _writing(folder):
        environment.save(block, folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: can't write here ({error.strerror or error}); choose another --checkpoints_dir"
        ) from error


def read_request(folder: Path) -> TrainConfig:
    """What was asked for when the run in ``folder`` was started.

    A ``config.json`` that is lost or torn is replaced by the copy in the newest checkpoint, which is said.
    Raises UserError where there is no such run, or a value is none that can be.
    """
    path = folder / REQUEST
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("holds no object")
    except (OSError, ValueError, RecursionError) as error:
        newest = checkpoint.latest(folder)
        if newest is None and (theirs := folder / "latest_net_G.pth").is_file():
            raise UserError(
                f"{folder}: holds weights and no run; begin one by --init_from {theirs} and another "
                "--name, without --continue_train"
            ) from error
        if newest is None:
            raise UserError(
                f"{path}: not readable, so there is no run to continue; drop --continue_train, or give the "
                "--name and --checkpoints_dir of a run"
            ) from error
        print(f"{path}: not readable; what was asked for is taken from {newest.name}")
        path, values = newest, checkpoint.load(newest)["config"]
    try:
        return TrainConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error

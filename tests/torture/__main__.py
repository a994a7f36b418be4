"""``python -m tests.torture --tries 200 --seed 0``: trainings killed, stopped, starved and lied to at random.

Every try is a tiny training, over loaders x presets x cache x batch sizes, to which one thing happens at a
random moment, and which then goes on with ``--continue_train``. It is *lost* unless it ends with every
tensor of its last checkpoint equal, bit for bit, to that of a training that nothing happened to. It *hangs*
when it, or a process that it started, does not end in time; a *traceback* is one in what it prints.

What is killed is the training itself and its workers: everything from the parsing of flags to the end. It is
forked from this process, which has imported the libraries beforehand, for that takes longer than all the
rest; its imports are not tortured here (``tests/commands/test_signals.py`` interrupts those).
"""

import argparse
import ctypes
import gc
import importlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fastpix2pix import checkpoint, signals, train
from fastpix2pix.errors import UserError
from tests.tiny_run import write_pairs

SECONDS = 60  # until a process that should end counts as one that hangs
PAIRS = 5  # the last batch of an epoch is smaller at batch size 2
LENGTH = ["--steps", "8", "--save_latest_freq", "2", "--keep_checkpoints", "2"]
WATCHED = ["--print_freq", "2", "--display_freq", "6"]
SIZES = [
    *("--netG", "unet_32", "--crop_size", "32", "--load_size", "36", "--ngf", "4", "--ndf", "4"),
    *("--num_threads", "2", "--precision", "fp32", "--device", "cpu"),
]


@dataclass(frozen=True)
class Setup:
    """What a training is asked for."""

    loader: str
    preset: str
    cache: int
    batch_size: int

    def flags(self, data: Path, runs: Path, name: str) -> list[str]:
        options = {
            "--loader": self.loader,
            "--preset": self.preset,
            "--cache": self.cache,
            "--batch_size": self.batch_size,
            "--dataroot": data,
            "--checkpoints_dir": runs,
            "--name": name,
        }
        return [*SIZES, *LENGTH, *WATCHED, *(str(word) for pair in options.items() for word in pair)]


SETUPS = [
    Setup(*choice)
    for choice in itertools.product(("dali", "portable"), ("tutorial", "junyanz"), (0, 1), (1, 2))
]


class Trouble(Exception):
    """What a try ended in: "lost", "hang" or "traceback", and what it was."""

    def __init__(self, kind: str, what: str):
        super().__init__(f"{kind}: {what}")
        self.kind = kind


@dataclass
class Training:
    """A training in a process group of its own, forked from this process."""

    setup: Setup
    data: Path
    runs: Path
    name: str
    process: BaseProcess = field(init=False)

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def printed(self) -> Path:
        return self.runs / f"{self.name}.txt"

    def start(self) -> None:
        """Start, or go on if there is something to go on with."""
        flags = self.setup.flags(self.data, self.runs, self.name)
        if checkpoint.latest(self.folder) is not None:
            flags.append("--continue_train")
        self.printed.touch()  # for one that is killed before it opens it
        self.process = multiprocessing.get_context("fork").Process(target=_train, args=(flags, self.printed))
        self.process.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def send(self, number: int, *, group: bool) -> None:
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self) -> int:
        """Wait for the end of it and of its workers, and look at what it printed; returns the exit code."""
        ended = self.wait(SECONDS)
        deadline = time.monotonic() + SECONDS / 2
        while ended and _group_exists(self.process.pid):
            ended = time.monotonic() < deadline
            time.sleep(0.02)
        if not ended:
            self.send(signal.SIGKILL, group=True)
            self.process.join()
            raise Trouble("hang", f"after {SECONDS} s: {self.tail()}")
        text = self.printed.read_text(errors="replace")
        if "Traceback" in text or "Exception ignored" in text:
            raise Trouble("traceback", text[-3000:])
        return self.process.exitcode

    def tail(self) -> str:
        return self.printed.read_text(errors="replace")[-600:] if self.printed.exists() else ""

    def kill(self, *, group: bool) -> None:
        self.send(signal.SIGKILL, group=group)
        self.process.join()
        self.end()

    def step(self) -> int:
        """The step of the newest checkpoint, 0 before the first."""
        newest = checkpoint.latest(self.folder)
        try:
            return 0 if newest is None else checkpoint.load(newest)["step"]
        except UserError as error:
            raise Trouble("lost", str(error)) from error

    def finish(self, wanted: dict) -> None:
        """Go on undisturbed, and compare the last checkpoint with the ``wanted`` one."""
        self.start()
        code = self.end()
        if code != 0:
            raise Trouble("lost", f"exit code {code}: {self.tail()}")
        found = checkpoint.load(checkpoint.latest(self.folder))
        if difference := _difference(wanted, found):
            raise Trouble("lost", f"{difference} differs from that of the undisturbed training")


def _train(flags: list[str], printed: Path) -> None:
    os.setsid()
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signals.end_with_a_line()  # as the package does for its commands
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    train.main(flags)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _difference(wanted: object, found: object, where: str = "") -> str | None:
    """The place of the first tensor or value that differs; requests and machines are not compared."""
    if isinstance(wanted, torch.Tensor):
        return None if torch.equal(wanted, found) else where
    if isinstance(wanted, dict | list | tuple):
        if len(wanted) != len(found):
            return where
        keys = wanted if isinstance(wanted, dict) else range(len(wanted))
        parts = (
            _difference(wanted[k], found[k], f"{where}.{k}")
            for k in keys
            if k not in ("config", "environment")
        )
        return next((part for part in parts if part is not None), None)
    return None if wanted == found else where


# ----------------------------------------------------------------------------------------- what happens to it


def kills(training: Training, moment: Callable[[], float], chance: random.Random) -> Iterator[None]:
    """Several SIGKILLs, one after the other, of the process or of its whole group."""
    for _ in range(4):
        before = training.step()
        training.start()
        if training.wait(moment()):
            training.end()
            return
        training.kill(group=chance.random() < 0.5)
        if training.step() < before:
            raise Trouble(
                "lost", f"step {before} was saved, and the newest checkpoint is of {training.step()}"
            )
        yield


def stops(training: Training, moment: Callable[[], float], chance: random.Random) -> Iterator[None]:
    """SIGTERM, SIGHUP or SIGINT, to the process or to its whole group, sometimes twice."""
    training.start()
    if training.wait(moment()):
        training.end()
        return
    number = chance.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    for pause in (0.0, 0.1)[: chance.choice([1, 2])]:
        time.sleep(pause)
        training.send(number, group=chance.random() < 0.5)
    code = training.end()
    text = training.printed.read_text(errors="replace")
    if code not in (0, 128 + number, -number) or "error: " in text:
        raise Trouble("lost", f"{number.name} gave exit code {code}: {training.tail()}")
    if "stopped at step " in text:
        said = int(text.rpartition("stopped at step ")[2].partition(";")[0])
        if training.step() != said:
            raise Trouble("lost", f"stopped at step {said} with step {training.step()} saved")
    yield


def workers(training: Training, moment: Callable[[], float], chance: random.Random) -> Iterator[None]:
    """SIGKILL for one process that decodes."""
    training.start()
    if training.wait(moment()):
        training.end()
        return
    children = _children(training.process.pid)
    if children:
        with suppress(ProcessLookupError):
            os.kill(chance.choice(children), signal.SIGKILL)
    code = training.end()
    if code not in (0, 2) or training.printed.read_text(errors="replace").count("error: ") != (code == 2):
        raise Trouble("lost", f"exit code {code}: {training.tail()}")
    if children:
        yield


def flips(training: Training, moment: Callable[[], float], chance: random.Random) -> Iterator[None]:
    """One bit of the newest checkpoint of a killed training."""
    training.start()
    training.wait(moment())
    training.kill(group=True)
    newest = checkpoint.latest(training.folder)
    if newest is None:
        return
    content = bytearray(newest.read_bytes())
    at = chance.randrange(8 * len(content))
    content[at // 8] ^= 1 << at % 8
    newest.write_bytes(content)
    training.start()
    code = training.end()
    if code == 2 and "it is damaged" in training.tail():
        newest.unlink()
    elif code != 0:
        raise Trouble("lost", f"a flipped bit gave exit code {code}: {training.tail()}")
    yield


def stalls(training: Training, moment: Callable[[], float], chance: random.Random) -> Iterator[None]:
    """Pictures become pipes that nobody writes to; after a while somebody asks it to stop."""
    files = list((training.data / "train").iterdir())
    training.start()
    if training.wait(moment()):
        training.end()
        return
    for file in files:
        file.rename(f"{file}.away")
        os.mkfifo(file)
    training.wait(0.5)
    training.send(signal.SIGTERM, group=chance.random() < 0.5)
    code = training.end()
    for file in files:
        Path(f"{file}.away").replace(file)
    if code not in (0, 2, 128 + signal.SIGTERM):  # 2: the folder was just being read
        raise Trouble("lost", f"exit code {code}: {training.tail()}")
    yield


def full_disks(training: Training, moment: Callable[[], float], chance: random.Random) -> Iterator[None]:
    """The disk of the runs fills up to the last few hundred kilobytes."""
    ballast = training.runs / "ballast"
    training.start()
    training.wait(moment())
    free = shutil.disk_usage(training.runs).free
    with suppress(OSError), open(ballast, "wb") as file:
        file.write(bytes(max(0, free - chance.randrange(600_000))))
    code = training.end()
    ballast.unlink()
    if code not in (0, 2) or training.printed.read_text(errors="replace").count("error: ") != (code == 2):
        raise Trouble("lost", f"exit code {code}: {training.tail()}")
    yield


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------ the torture


def small_disk(at: Path) -> bool:
    """Mount a file system of 24 MiB at ``at``, which only this process and its children see."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(0x20000) != 0:  # CLONE_NEWNS
        return False
    at.mkdir()
    commands = [
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "tmpfs", "-o", "size=24m", "torture", str(at)],
    ]
    return all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)


def torture(kinds: dict[Callable, int], seed: int, place: Path) -> list[tuple]:
    """Rows of the table: what, tries, hits, lost, hangs, tracebacks."""
    chance = random.Random(seed)
    disk = place / "disk"
    if full_disks in kinds and not small_disk(disk):
        print("no small disk can be mounted here: full disks are left out", flush=True)
        del kinds[full_disks]
    data = write_pairs(place / "pairs", PAIRS)
    wanted, took = {}, {}
    for i, setup in enumerate(SETUPS):
        training = Training(setup, data, place, f"undisturbed{i}")
        began = time.monotonic()
        training.start()
        if training.end() != 0:
            raise SystemExit(f"{setup} does not even train: {training.tail()}")
        took[setup] = time.monotonic() - began
        wanted[setup] = checkpoint.load(checkpoint.latest(training.folder))
    print(
        f"{len(SETUPS)} undisturbed trainings of {min(took.values()):.1f} to {max(took.values()):.1f} s",
        flush=True,
    )
    rows = []
    for kind, least in kinds.items():
        fit = [
            s
            for s in SETUPS
            if (kind != workers or s.loader == "portable") and (kind != stalls or not s.cache)
        ]
        tries, found, hits = 0, Counter(), Counter()
        while sum(hits.values()) < least and tries < 4 * least + 8:
            setup = fit[tries % len(fit)]
            runs = disk if kind is full_disks else place
            own = (
                Path(shutil.copytree(data, place / f"pairs_{kind.__name__}_{tries}"))
                if kind is stalls
                else data
            )
            training = Training(setup, own, runs, f"{kind.__name__}_{tries}")
            tries += 1
            try:
                for _ in kind(training, lambda s=setup: chance.uniform(0.0, 1.1 * took[s]), chance):
                    hits[setup] += 1
                training.finish(wanted[setup])
            except Trouble as trouble:
                found[trouble.kind] += 1
                print(f"{kind.__name__} {tries - 1}, {setup}: {trouble}", flush=True)
            else:
                shutil.rmtree(training.folder)
            print(f"{kind.__name__}: {sum(hits.values())} of {least}", end="\r", file=sys.stderr, flush=True)
        by_setup = f"{min(hits[s] for s in fit)} to {max(hits[s] for s in fit)} in each of {len(fit)} setups"
        rows.append(
            (
                kind.__name__,
                tries,
                sum(hits.values()),
                found["lost"],
                found["hang"],
                found["traceback"],
                by_setup,
            )
        )
    return rows


def import_libraries() -> None:
    """What each training would import on its way."""
    importlib.import_module("torch._dynamo")  # by every optimizer of torch
    with suppress(ImportError):
        importlib.import_module("fastpix2pix.data.dali_chunks")
    gc.collect()
    gc.freeze()  # a training collects its garbage, which all this is not


def main(argv: list[str] | None = None) -> int:
    """Torture, print the table, and return 1 if anything was lost, hung or printed a traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tries", type=int, default=200, help="kills; of everything else a tenth")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    import_libraries()
    others = max(1, arguments.tries // 10)
    kinds = {kills: arguments.tries, **dict.fromkeys((stops, workers, flips, stalls, full_disks), others)}
    place = Path(tempfile.mkdtemp(prefix="torture-"))
    rows = torture(kinds, arguments.seed, place)
    print(
        f"\n{'what':12}{'trainings':>10}{'hits':>7}{'lost':>7}{'hangs':>7}{'tracebacks':>12}  hits by setup"
    )
    for what, tries, hits, lost, hangs, tracebacks, by_setup in rows:
        print(f"{what:12}{tries:10}{hits:7}{lost:7}{hangs:7}{tracebacks:12}  {by_setup}")
    gc.unfreeze()
    subprocess.run(["umount", "--lazy", str(place / "disk")], capture_output=True)
    bad = any(lost or hangs or tracebacks for _, _, _, lost, hangs, tracebacks, _ in rows)
    if bad:
        print(f"what they left is in {place}")
    else:
        shutil.rmtree(place, ignore_errors=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())

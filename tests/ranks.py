"""Several ranks in the tests: forked processes, so that nothing is imported again, that find each other as
torchrun's do."""

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastpix2pix.training.distributed import joined

LIMIT = 150.0  # seconds for ranks that should have ended, on a machine that does other things too


class Ranks:
    """Children that run ``function(rank, *args)``, rank r's stderr in ``folder / "err.r"``.

    store: what torchrun's agent holds, also beyond a restart.
    """

    def __init__(
        self,
        size: int,
        function: Callable[..., Any],
        *args: Any,
        folder: Path,
        store: dist.TCPStore | None = None,
    ):
        self.store = store or dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.folder, self.processes = folder, []
        self._codes: dict[int, int] = {}
        sys.stdout.flush()
        sys.stderr.flush()
        # None begins before all are forked: the store's thread, which answers those that have begun, holds
        # locks of the C library that a fork at this moment would leave locked for ever.
        start, waiting = os.pipe()
        for rank in range(size):
            child = os.fork()
            if child == 0:
                os.close(waiting)
                os.read(start, 1)  # until the parent closes the other end
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(self.store.port),
                    "TORCHELASTIC_RUN_ID": "test",
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                }
                self._run(rank, function, args)
            self.processes.append(child)
        for end in (start, waiting):
            os.close(end)
        _running.append(self)

    def _run(self, rank: int, function: Callable[..., Any], args: tuple) -> None:
        """What a child does; it never returns."""
        code = 1
        try:
            os.setsid()
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(
                    os.open(self.folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number
                )
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            faulthandler.enable(sys.stderr)
            faulthandler.register(signal.SIGUSR1, sys.stderr)
            torch.set_num_threads(1)
            try:
                answer = function(rank, *args)
                code = 0
            except SystemExit as stop:
                answer, code = None, stop.code
            self._answer_of(rank).write_bytes(pickle.dumps(answer))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _answer_of(self, rank: int) -> Path:
        return self.folder / f"answer.{rank}"

    def wait_for(self, rank: int) -> int:
        """A rank's exit code, as ``subprocess`` has it. AssertionError, with where all ranks are, when it has
        not ended in LIMIT seconds."""
        child, deadline = self.processes[rank], time.monotonic() + LIMIT
        while child not in self._codes:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self._codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self._tell_where_they_are()
                self.kill()
                raise AssertionError((f"rank {rank} has not ended", *self.said("out"), *self.said()))
            else:
                time.sleep(0.01)
        return self._codes[child]

    def wait(self) -> list[int]:
        """All ranks' exit codes, as ``wait_for`` has them."""
        return [self.wait_for(rank) for rank in range(len(self.processes))]

    def _tell_where_they_are(self) -> None:
        """Have the stack of every thread of every rank written to its stderr."""
        for child in self.processes:
            if child not in self._codes:
                os.kill(child, signal.SIGUSR1)
        time.sleep(1.0)

    def kill(self) -> None:
        """Kill all ranks that have not ended, and what they have forked."""
        for child in self.processes:
            if child not in self._codes:
                for kill in (os.kill, os.killpg):  # the group does not exist before the child has made it
                    with contextlib.suppress(ProcessLookupError):
                        kill(child, signal.SIGKILL)
                self._codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def said(self, name: str = "err") -> list[str]:
        """What each rank has printed."""
        files = (self.folder / f"{name}.{rank}" for rank in range(len(self.processes)))
        return [file.read_text() if file.exists() else "" for file in files]

    def answers(self) -> list[Any]:
        """What the function returned in each rank. AssertionError with what they said if any failed."""
        codes = self.wait()
        assert not any(codes), (codes, *self.said())
        return [pickle.loads(self._answer_of(rank).read_bytes()) for rank in range(len(self.processes))]


_running: list[Ranks] = []


def kill_those_left() -> None:
    """Kill the ranks of a test that has ended without waiting for them."""
    while _running:
        _running.pop().kill()


def in_ranks(size: int, function: Callable[..., Any], *args: Any, folder: Path, **options: Any) -> list[Any]:
    """What ``function(ranks, *args)`` returns in each of ``size`` ranks that have joined."""

    def work(rank: int) -> Any:
        with joined() as ranks:
            ranks.open_exchange(torch.device("cpu"))
            answer = function(ranks, *args)
            ranks.part()
        return answer

    return Ranks(size, work, folder=folder, **options).answers()

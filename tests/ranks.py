"""Several ranks in the tests: forked processes, so that nothing is imported again, that find each other as
torchrun's do."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastpix2pix.training.distributed import joined


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
        restarts: int = 0,
        store: dist.TCPStore | None = None,
    ):
        self.store = store or dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.folder, self.processes, self._answers = folder, [], []
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(size):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(self.store.port),
                    "TORCHELASTIC_RUN_ID": "test",
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": str(restarts),
                }
                self._run(rank, writing, function, args)
            os.close(writing)
            self.processes.append(child)
            self._answers.append(reading)

    def _run(self, rank: int, writing: int, function: Callable[..., Any], args: tuple) -> None:
        """What a child does; it never returns."""
        code = 1
        try:
            os.setsid()
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(
                    os.open(self.folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number
                )
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            torch.set_num_threads(1)
            try:
                answer = function(rank, *args)
                code = 0
            except SystemExit as stop:
                answer, code = None, stop.code
            with open(writing, "wb") as pipe:
                pickle.dump(answer, pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> list[int]:
        """Exit codes, as ``subprocess`` has them."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.processes]
        return codes

    def said(self, name: str = "err") -> list[str]:
        """What each rank has printed."""
        return [(self.folder / f"{name}.{rank}").read_text() for rank in range(len(self.processes))]

    def answers(self) -> list[Any]:
        """What the function returned in each rank. AssertionError with what they said if any failed."""
        found = []
        for reading in self._answers:
            with open(reading, "rb") as pipe:
                found.append(pipe.read())
        codes = self.wait()
        assert not any(codes), (codes, *self.said())
        return [pickle.loads(one) for one in found]


def in_ranks(size: int, function: Callable[..., Any], *args: Any, folder: Path, **options: Any) -> list[Any]:
    """What ``function(ranks, *args)`` returns in each of ``size`` ranks that have joined."""

    def work(rank: int) -> Any:
        with joined() as ranks:
            ranks.open_exchange(torch.device("cpu"))
            answer = function(ranks, *args)
            ranks.part()
        return answer

    return Ranks(size, work, folder=folder, **options).answers()

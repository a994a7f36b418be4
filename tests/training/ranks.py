"""Several ranks in the tests: processes that are forked, so that nothing is imported again, and joined as
torchrun's are."""

import io
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

SECONDS = 120  # far more than anything here takes


def in_ranks(size: int, function: Callable[..., Any], *args: Any, restarts: int = 0) -> list[Any]:
    """What ``function(ranks, *args)`` returns in each of ``size`` ranks. Raises AssertionError with their
    tracebacks if any fails."""
    # The store that torchrun's agent would hold.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    sys.stdout.flush(), sys.stderr.flush()
    children = []
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
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(restarts),
            }
            _child(writing, function, args)
        os.close(writing)
        children.append((child, reading))
    answers = []
    for child, reading in children:
        with open(reading, "rb") as pipe:
            message = pipe.read()
        os.waitpid(child, 0)
        answers.append(pickle.load(io.BytesIO(message)) if message else (False, "it ended without an answer"))
    failures = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
    assert not failures, "\n".join(failures)
    return [answer for _, answer in answers]


def _child(writing: int, function: Callable, args: tuple) -> None:
    from fastpix2pix.training.distributed import joined

    try:
        with joined() as ranks:
            try:
                answer = True, function(ranks, *args)
                ranks.part()
            except BaseException:
                answer = False, traceback.format_exc()
            with open(writing, "wb") as pipe:
                pickle.dump(answer, pipe)
            if not answer[0]:
                os._exit(1)
    finally:
        os._exit(0)

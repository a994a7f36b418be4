"""Several processes that train one model: torchrun's ranks, what they exchange, and the end of one of them.

The only file that knows torch.distributed. A training in one process has ``ALONE``, which does nothing.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastpix2pix.errors import UserError
from fastpix2pix.signals import end_at_once, say

Value = TypeVar("Value")
Wait = Callable[[], None]

JOINING = 300.0  # seconds in which all ranks have to meet
FOREVER = timedelta(days=1)  # what ends a wait for a rank that is gone is the watch, not a timeout
BEAT = 1.0  # seconds between two signs of life
CALLS = 0.05  # seconds between two calls of the rank that waits for the others
SILENCE = 15.0  # seconds without one after which a rank counts as gone

# PyTorch 2.13 renames both, and warns of the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class RankGone(Exception):
    """Another rank of this training has ended, or can't be reached."""


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RankGone(reason) from error


class Exchange:
    """What the ranks exchange in every step, on their devices: gloo between CPUs, NCCL between GPUs.

    All ranks call the same methods in the same order. None may run inside a CUDA graph's capture: NCCL's
    kernels are slower there, and a graph that holds them makes ``destroy_process_group`` hang.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def _outside_graphs(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a collective would be captured in a CUDA graph")

    def scatter_sum(self, whole: Tensor, share: Tensor) -> Wait:
        """Start to write into ``share`` the sum over the ranks of their ``whole[rank * n : (rank + 1) * n]``.

        whole: flat, of ``size`` times as many elements as ``share`` has, n. What is returned waits: on a GPU
        the current stream does, and the host goes on.
        """
        self._outside_graphs()
        with _collective():
            work = _reduce_scatter(share, whole, group=self._group, async_op=True)
        return lambda: self._wait(work)

    def gather(self, whole: Tensor, share: Tensor) -> Wait:
        """Start to put all ranks' shares into ``whole``, of which ``share`` may be the rank's own slice.

        Shapes, and what is returned, as in ``scatter_sum``.
        """
        self._outside_graphs()
        with _collective():
            work = _all_gather(whole, share, group=self._group, async_op=True)
        return lambda: self._wait(work)

    @staticmethod
    def _wait(work: dist.Work) -> None:
        with _collective():
            work.wait()

    def sum_(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by its sum over the ranks."""
        self._outside_graphs()
        with _collective():
            dist.all_reduce(tensor, group=self._group)

    def max_(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by the largest of the ranks' values."""
        self._outside_graphs()
        with _collective():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)

    def take_first(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by rank 0's."""
        self._outside_graphs()
        with _collective():
            dist.broadcast(tensor, 0, group=self._group)


class Unconnected(Exchange):
    """The exchange of the first of ``size`` ranks of which there is no other: it moves nothing. With it the
    work of a rank can be traced."""

    def __init__(self, size: int):
        self.rank, self.size = 0, size

    def scatter_sum(self, whole: Tensor, share: Tensor) -> Wait:
        return lambda: None

    def gather(self, whole: Tensor, share: Tensor) -> Wait:
        return lambda: None

    def sum_(self, tensor: Tensor) -> None:
        pass

    def max_(self, tensor: Tensor) -> None:
        pass

    def take_first(self, tensor: Tensor) -> None:
        pass


class Ranks:
    """Who takes part in a training: this process alone. :class:`_TorchrunRanks` are several.

    rank, size: this process's number, from 0, and how many there are; local_rank, local_size: the same on
    this machine. exchange: of tensors, where there are several and ``open_exchange`` was called. restarted:
    whether torchrun has started this training again (``--max_restarts``).
    """

    rank = local_rank = 0
    size = local_size = 1
    exchange: Exchange | None = None

    def __init__(self) -> None:
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks, and writes the run's folder."""
        return self.rank == 0

    def open_exchange(self, device: torch.device) -> None:
        """Make ``exchange`` for tensors on ``device``."""

    def first_decides(self, make: Callable[[], Value]) -> Value:
        """What ``make`` returns at rank 0, in all ranks. What it raises there ends them all."""
        return make()

    def agree(self, code: int) -> int:
        """The largest of the ranks' numbers, in all ranks: what each of them does next."""
        return code

    def check_same(self, what: str, value: object) -> None:
        """Raise UserError, in all ranks, unless their values are equal."""

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The ranks run the body one after the other."""
        yield

    @contextmanager
    def machine_by_machine(self) -> Iterator[None]:
        """The first rank of each machine runs the body, and then the others."""
        yield

    def part(self) -> None:
        """Wait for all ranks to come to the end, after which none needs another."""

    def complain(self, line: str) -> None:
        """Print an error's line, if no other rank has said what ended the training."""
        print(line, file=sys.stderr)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun has started, or this process alone.

    All ranks leave together: by ``part`` where all is well; otherwise the process ends here, since the other
    ranks may be waiting for it, or it for them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    ranks = _TorchrunRanks()
    try:
        ranks.join()
        with ranks.one_voice():
            yield ranks
    except RankGone as error:
        ranks.complain(_ended_by(f"a process of this training is gone ({error})"))
        end_at_once(1)
    except SystemExit as stop:
        if not ranks.parted:
            end_at_once(stop.code if isinstance(stop.code, int) else 1)
        ranks.close()
        raise
    except BaseException:
        ranks.complain(f"error: in rank {ranks.rank}:\n{traceback.format_exc()}")
        end_at_once(1)
    ranks.close()


class _RanksOfGroup(Ranks):
    """Those of a group that another program has made, with one device each."""

    def __init__(self, device: torch.device):
        super().__init__()
        exchange = Exchange()
        self.rank, self.size, self.exchange = exchange.rank, exchange.size, exchange
        self._code = torch.zeros(1, dtype=torch.int32, device=device)

    def agree(self, code: int) -> int:
        self.exchange.max_(self._code.fill_(code))
        return int(self._code)


def ranks_of_group(device: torch.device) -> Ranks:
    """The ranks of the default group of this process, which somebody else has made and will end.

    device: this rank's, on which the group can exchange.
    """
    return _RanksOfGroup(device) if dist.is_available() and dist.is_initialized() else ALONE


def _ended_by(reason: str) -> str:
    return (
        f"error: {reason}, so that this one ends too; the last checkpoint is whole: start again with "
        "--continue_train, as torchrun does by itself with --max_restarts"
    )


class _TorchrunRanks(Ranks):
    """One of several processes of torchrun.

    The host's own messages go through gloo, whatever the device. A thread sends signs of life to the store
    and looks at those of the others: where one is silent, the process ends, even if it hangs in a collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parted = False
        self._code = torch.zeros(1, dtype=torch.int32)
        self._closing = threading.Event()
        self._store: dist.Store | None = None

    def join(self) -> None:
        """Meet the others."""
        late = threading.Timer(JOINING, self._end, ["the processes of this training do not find each other"])
        late.daemon = True
        late.start()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        # torchrun's store is there before any process: where it does not answer, torchrun has ended.
        its_own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        reaching = timedelta(seconds=SILENCE if its_own else JOINING)
        with _collective():
            store, self.rank, self.size = next(iter(dist.rendezvous("env://", timeout=reaching)))
            store.set_timeout(FOREVER)
            # A connection of its own: the group's waits for keys while it makes new groups.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            number = self._meet(dist.TCPStore(address, port, is_master=False, timeout=reaching))
            self.restarted = self.restarted or number > 1
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"fastpix2pix, start {number}", store),
                rank=self.rank,
                world_size=self.size,
                timeout=FOREVER,
            )
        self._barrier()
        late.cancel()

    def _meet(self, store: dist.Store) -> int:
        """Wait until all have come to the same start of this training, and return its number, from 1.

        torchrun's store outlives a restart, with what processes that are gone have written, and each machine
        counts its restarts apart. So rank 0 counts, and calls out the number for as long as others are
        missing; all ranks of earlier starts are gone by then, and nobody else calls.
        """
        called = "fastpix2pix, called out"
        if self.first:
            number = store.add("fastpix2pix, starts", 1)
        else:

            def last_call() -> bytes:
                return store.get(called) if store.check([called]) else b""

            before = last_call()
            while (call := last_call()) == before:
                time.sleep(CALLS)
            number = int(call.split()[0])
        self._store = dist.PrefixStore(f"fastpix2pix, life of start {number}", store)
        self._watcher = threading.Thread(target=self._watch, name="signs of life", daemon=True)
        self._watcher.start()
        self._store.add("arrived", 1)
        calls = 0
        while self.first and self._store.add("arrived", 0) < self.size:
            calls += 1
            store.set(called, f"{number} {calls}")
            time.sleep(CALLS)
        return number

    def open_exchange(self, device: torch.device) -> None:
        if device.type == "cpu":
            self.exchange = Exchange()
            return
        if not dist.is_nccl_available():
            raise UserError(
                f"PyTorch {torch.__version__} is built without NCCL, through which GPUs exchange; install a "
                "build for CUDA on Linux, or use one process"
            )
        self.exchange = Exchange(dist.new_group(backend="nccl", timeout=FOREVER))

    def first_decides(self, make: Callable[[], Value]) -> Value:
        message: list[Any] = [None, None]
        if self.first:
            try:
                message[1] = make()
            except SystemExit as stop:
                message[0] = stop.code or 0
                self._broadcast(message)
                raise
            except UserError:
                message[0] = 2
                self._broadcast(message)
                raise
        self._broadcast(message)
        if message[0] is not None:
            raise SystemExit(message[0])
        return message[1]

    @staticmethod
    def _broadcast(message: list[Any]) -> None:
        with _collective():
            dist.broadcast_object_list(message, 0)

    @staticmethod
    def _barrier() -> None:
        with _collective():
            dist.barrier()

    def agree(self, code: int) -> int:
        self._code.fill_(code)
        with _collective():
            dist.all_reduce(self._code, dist.ReduceOp.MAX)
        return int(self._code)

    def check_same(self, what: str, value: object) -> None:
        values: list[Any] = [None] * self.size
        with _collective():
            dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(
                    f"{what}: {values[0]} in rank 0, {other} in rank {rank}; all processes must have the same"
                )

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        for turn in range(self.size):
            if turn == self.rank:
                yield
            self._barrier()

    @contextmanager
    def machine_by_machine(self) -> Iterator[None]:
        for turn in (True, False):
            if turn == (self.local_rank == 0):
                yield
            self._barrier()

    def part(self) -> None:
        # By the store: a barrier fails where a rank that has left it already closes its connections.
        with _collective():
            self._store.add("parting", 1)
            while self._store.add("parting", 0) < self.size:
                time.sleep(0.02)
        self._closing.set()  # from here on others are gone, and that is well
        self.parted = True

    def close(self) -> None:
        """After every graph is gone: leave the group."""
        self._closing.set()
        self._watcher.join()
        dist.destroy_process_group()

    # ---------------------------------------------------------------------------- speaking with one voice

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """In the body only rank 0 prints to stdout and logs warnings."""
        if self.first:
            yield
            return
        logging.getLogger("fastpix2pix").setLevel(logging.ERROR)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield

    def complain(self, line: str) -> None:
        with contextlib.suppress(RuntimeError):  # where the store is gone too, all may speak
            if self._store is not None and self._store.add("complaints", 1) > 1:
                return
        say(line)

    # -------------------------------------------------------------------------------------- signs of life

    @staticmethod
    def _beat_of(rank: int) -> str:
        return f"beat of rank {rank}"

    def _watch(self) -> None:
        """Ends the process when another rank has been silent for too long, or the store can't be reached."""
        missing = {rank for rank in range(self.size) if rank != self.rank}
        seen: dict[int, tuple[bytes, float]] = {}
        while True:
            try:
                self._store.add(self._beat_of(self.rank), 1)
                missing -= {rank for rank in missing if self._store.check([self._beat_of(rank)])}
                known = [rank for rank in range(self.size) if rank != self.rank and rank not in missing]
                beats = self._store.multi_get([self._beat_of(rank) for rank in known]) if known else []
            except RuntimeError as error:
                self._end(f"torchrun's store can't be reached ({str(error).splitlines()[0]})")
                return
            now = time.monotonic()
            for rank, beat in zip(known, beats, strict=True):
                if rank not in seen or seen[rank][0] != beat:
                    seen[rank] = beat, now
                elif now - seen[rank][1] > SILENCE:
                    self._end(f"rank {rank} has given no sign of life for {SILENCE:.0f} s")
                    return
            if self._closing.wait(BEAT):
                return

    def _end(self, reason: str) -> None:
        if self._closing.is_set():
            return
        self.complain(_ended_by(reason))
        end_at_once(1)

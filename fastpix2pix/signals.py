"""Requests to stop: the first one ends a training with all that it learnt saved, the second one at once."""

import contextlib
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_HANGUP = getattr(signal, "SIGHUP", None)
SAME_REQUEST = 0.5  # seconds, as are these:
CLOSING = 10.0
UNANSWERED = 20.0  # also by the other processes of a training
FINISHING = 300.0


class StopRequests:
    """Which have been received; false until then. Made by :func:`stop_requests`.

    stop_waiting: called in the place of the wait, when a request comes within :meth:`waiting`; it ends the
    process. In another thread, where the main one does not come back from what it called. None: the process
    is one of several that train together, and waits on until all come to :meth:`settle`.
    """

    def __init__(self, stop_waiting: Callable[[], None] | None):
        self.received: list[int] = []
        self._settled = threading.Event()
        self._stop_waiting = stop_waiting
        self._waiting = False
        self._turn = threading.Lock()  # to end the wait, one way or another
        self._over = threading.Event()
        self._went_on, self._longest = time.monotonic(), 0.0  # seconds between two waits

    def __bool__(self) -> bool:
        return bool(self.received)

    def agree_on(self, number: int) -> None:
        """All processes of the training stop, for the signal of this number."""
        self.received[:0] = [number]

    def settle(self) -> None:
        """No other process has to agree any more."""
        self._settled.set()

    def finish(self) -> None:
        """All is saved: a further request changes nothing."""
        self._over.set()

    @property
    def exit_code(self) -> int:
        """128 + the first signal's number, as shells report it."""
        return 128 + self.received[0]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The body waits for something that may never come."""
        self._longest = max(self._longest, time.monotonic() - self._went_on)
        self._waiting = True
        try:
            yield
        finally:
            with self._turn:  # or never, if a request is being answered in the place of the wait
                self._waiting = False
            self._went_on = time.monotonic()

    def _handle(self, number: int, _frame) -> None:
        self.received.append(number)
        if number == _HANGUP:
            _leave_the_terminal()
        if self._stop_waiting is not None and self._waiting and self._turn.acquire(blocking=False):
            self._waiting = False
            self._stop_waiting()
            self._turn.release()

    def _see_to_the_end(self, number: int) -> None:
        """In a thread of its own, from the first request on: whatever the main one does, the process ends."""
        if self._over.wait(UNANSWERED):
            return
        if self._stop_waiting is None:
            if not self._settled.is_set():
                say("stopped: the other processes do not answer; nothing was saved since the last checkpoint")
                end_at_once(128 + number)
        elif not self.received:  # the main thread has not come back to Python since
            with self._turn:
                if self._waiting:
                    self.received.append(number)
                    self._stop_waiting()
        limit = max(FINISHING, 3 * self._longest)
        if self._over.wait(limit - UNANSWERED):
            return
        say(f"not finished {limit:.0f} s after the request; stopped at once, with what was saved before")
        end_at_once(128 + number)


@contextmanager
def limited(line: str, code: int) -> Iterator[None]:
    """The body may take CLOSING seconds; then ``line`` is said and the process ends with ``code``."""

    def end() -> None:
        say(line)
        end_at_once(code)

    timer = threading.Timer(CLOSING, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def stop_requests(stop_waiting: Callable[[], None] | None, *, quiet: bool = False) -> Iterator[StopRequests]:
    """Collect SIGINT, SIGTERM and SIGHUP (unless ignored, as under nohup) while the body runs.

    stop_waiting: as of :class:`StopRequests`; where it is None, requests are ignored after the body, since
    torchrun sends them to the processes that have not ended when one has. quiet: another process speaks.

    Python runs a handler only when its main thread comes back from whatever it calls, so a thread of its own
    answers the first request at once and obeys the second, which ends the process and its workers.
    """
    requests = StopRequests(stop_waiting)
    _listening.append(requests)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    numbers = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    watcher = threading.Thread(
        target=_watch, args=(ours, numbers, requests, quiet), name="stop requests", daemon=True
    )
    watcher.start()
    previous = {number: signal.signal(number, requests._handle) for number in numbers}
    previous_descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield requests
    finally:
        requests._over.set()
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if stop_waiting is None else handler)
        signal.set_wakeup_fd(previous_descriptor)
        _listening.remove(requests)
        theirs.shutdown(socket.SHUT_RDWR)  # close alone ends nothing where a forked process has it too
        watcher.join()
        theirs.close()
        ours.close()


def _watch(descriptor: socket.socket, numbers: list[int], requests: StopRequests, quiet: bool) -> None:
    """Answer the numbers of signals as they arrive, until the other end is shut down."""
    first, since = None, 0.0
    while arrived := descriptor.recv(1):
        # "timeout" and schedulers signal the process and then its group: that is one request.
        if arrived[0] not in numbers or time.monotonic() - since < SAME_REQUEST or requests._over.is_set():
            continue
        if first is not None:
            say("stopped at once; nothing was saved since the last checkpoint")
            end_at_once(128 + first)
        first, since = arrived[0], time.monotonic()
        if first != _HANGUP and not quiet:  # then nobody is there to read it
            say("stopping: finishing the step and saving (once more: stop at once)")
        threading.Thread(target=requests._see_to_the_end, args=(first,), daemon=True).start()


def end_with_a_line() -> None:
    """From now on, outside of :func:`stop_requests`: SIGTERM and SIGHUP end the process and its workers at
    once with one line, unless they are ignored, and Ctrl-C after CLOSING seconds at the latest.

    A thread does it, for the main one may be inside a call that does not return. What is written then, of
    every command, gets its name when it is whole.
    """
    numbers = [n for n in STOPS if n != signal.SIGINT and signal.getsignal(n) == signal.SIG_DFL]
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    threading.Thread(target=_end, args=(ours, numbers), name="signals", daemon=True).start()
    for number in numbers:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    _ending.append(theirs)


def _end(descriptor: socket.socket, numbers: list[int]) -> None:
    while arrived := descriptor.recv(1):
        number = arrived[0]
        if number == signal.SIGINT:
            closing = threading.Timer(CLOSING, _end_by, (number,))
            closing.daemon = True
            closing.start()
        elif number in numbers:
            _end_by(number)


def _end_by(number: int) -> None:
    say(f"stopped by {signal.Signals(number).name}; what was written before is whole")
    end_at_once(128 + number)


def say(line: str) -> None:
    """Print to stderr, below a progress bar; a terminal that is gone does not matter."""
    with contextlib.suppress(OSError, ValueError):
        print(f"\n{line}", file=sys.stderr, flush=True)


def end_at_once(code: int) -> None:
    """End this process and its workers without waiting for any thread of it."""
    for child in active_children():
        child.kill()
        child.join(1.0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _leave_the_terminal() -> None:
    """Send what goes to a terminal nowhere from now on: writing to one that is gone raises OSError."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


_listening: list[StopRequests] = []
_ending: list[socket.socket] = []


def _leave_signals_to_the_parent() -> None:
    """In a forked process: what it receives is not the parent's, whose handlers it has inherited."""
    if _listening or _ending:
        signal.set_wakeup_fd(-1)
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_signals_to_the_parent)

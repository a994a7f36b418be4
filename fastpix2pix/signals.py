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
SAME_REQUEST = 0.5  # seconds
CLOSING = 10.0
AGREEING = 20.0


class StopRequests:
    """Which have been received; false until then. Made by :func:`stop_requests`.

    stop_waiting: called in the place of the wait, when a request comes within :meth:`waiting`.
    """

    def __init__(self, stop_waiting: Callable[[], None]):
        self.received: list[int] = []
        self.settled, self.done = threading.Event(), threading.Event()
        self._stop_waiting = stop_waiting
        self._waiting = False

    def __bool__(self) -> bool:
        return bool(self.received)

    def finish(self) -> None:
        """All is saved: a further request changes nothing."""
        self.done.set()

    def agree_on(self, number: int) -> None:
        """All processes of the training stop, for the signal of this number."""
        self.received[:0] = [number]

    def settle(self) -> None:
        """No other process has to agree any more."""
        self.settled.set()

    @property
    def exit_code(self) -> int:
        """128 + the first signal's number, as shells report it."""
        return 128 + self.received[0]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The body waits for something that may never come."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    @contextmanager
    def limited(self, line: str) -> Iterator[None]:
        """After a request, the body may take CLOSING seconds; then ``line`` is said and the process ends."""
        if not self:
            yield
            return

        def end() -> None:
            say(line)
            end_at_once(self.exit_code)

        timer = threading.Timer(CLOSING, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _handle(self, number: int, _frame) -> None:
        self.received.append(number)
        _expect_dead_children()
        if number == _HANGUP:
            _leave_the_terminal()
        if self._waiting:
            self._waiting = False
            self._stop_waiting()


@contextmanager
def stop_requests(
    stop_waiting: Callable[[], None], *, among_others: bool = False, quiet: bool = False
) -> Iterator[StopRequests]:
    """Collect SIGINT, SIGTERM and SIGHUP (unless ignored, as under nohup) while the body runs.

    among_others: the process is one of several, which stop together by ``agree_on``; if they have not come
    to ``settle`` AGREEING seconds after a request, since one of them hangs, this one ends. After the body
    requests are ignored: torchrun sends them to those that have not ended when one has. quiet: another one
    speaks.

    Python runs a handler only when its main thread comes back from whatever it calls, so a thread of its own
    answers the first request at once and obeys the second, which ends the process and its workers.
    """
    requests = StopRequests(stop_waiting)
    _listening.append(requests)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    numbers = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]

    def answer() -> None:
        if not quiet:
            say("stopping: finishing the step and saving (once more: stop at once)")
        if among_others:
            timer = threading.Timer(AGREEING, end_in_disagreement)
            timer.daemon = True
            timer.start()

    def end_in_disagreement() -> None:
        if not requests.settled.is_set():
            say("stopped: the other processes did not answer; nothing was saved since the last checkpoint")
            end_at_once(requests.exit_code if requests else 128 + signal.SIGTERM)

    watcher = threading.Thread(
        target=_watch, args=(ours, numbers, answer, requests.done), name="stop requests", daemon=True
    )
    watcher.start()
    previous_descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    previous = {number: signal.signal(number, requests._handle) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if among_others else handler)
        signal.set_wakeup_fd(previous_descriptor)
        _listening.remove(requests)
        theirs.close()
        watcher.join()
        ours.close()


def _watch(
    descriptor: socket.socket, numbers: list[int], answer: Callable[[], None], done: threading.Event
) -> None:
    """Answer the first signal of these numbers and obey the second, until the other end is closed."""
    first, since = None, 0.0
    while arrived := descriptor.recv(1):
        # "timeout" and schedulers signal the process and then its group: that is one request.
        if arrived[0] not in numbers or time.monotonic() - since < SAME_REQUEST or done.is_set():
            continue
        if first is not None:
            say("stopped at once; nothing was saved since the last checkpoint")
            end_at_once(128 + first)
        first, since = arrived[0], time.monotonic()
        if first != _HANGUP:  # then nobody is there to read it
            answer()


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


def _leave_signals_to_the_parent() -> None:
    """In a forked process: what it receives is not the parent's, whose handlers it has inherited."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_signals_to_the_parent)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """The body is not left because a child died: a DataLoader's handler raises wherever the process is.

    Its reader is told all the same, when it next waits for the child.
    """
    if not hasattr(signal, "SIGCHLD"):
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)
        if any(_listening):
            _expect_dead_children()


def _expect_dead_children() -> None:
    """From a stop request on: a signal to the whole group ends the workers too, which is no error then."""
    if hasattr(signal, "SIGCHLD"):
        # A function, as Python complains of a handler that is gone when its signal has arrived already.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

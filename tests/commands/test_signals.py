"""Requests to stop, sent to a training in a process of its own, as terminals and schedulers send them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import SMALL, steps_saved

from fastpix2pix import run_folder

SECONDS = 120  # far more than anything here takes


@pytest.fixture
def training(tmp_path, dataroot):
    """A training without end in a process group of its own, which has saved a checkpoint and decodes on."""
    where = ["--dataroot", str(dataroot), "--checkpoints_dir", str(tmp_path), "--name", "run"]
    length = ["--steps", "1000000", "--cache", "0", "--save_latest_freq", "3", "--keep_checkpoints", "1"]
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastpix2pix.train", *SMALL, *where, *length],
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    wait_until(lambda: any((tmp_path / "run" / "checkpoints").glob("step_*.pt")), process)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def stopped_at(folder: Path) -> int:
    """The step at which the training says that it stopped, which is that of its newest checkpoint."""
    text = (folder / "out").read_text() + (folder / "err").read_text()
    assert "Traceback" not in text and "error: " not in text
    (step,) = re.findall(r"stopped at step (\d+); the run goes on with --continue_train --name run", text)
    assert steps_saved(folder / "run")[-1] == int(step)
    return int(step)


def group_is_gone(group: int) -> bool:
    """Whether no process of it is left, once the system has taken notice."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGHUP, id="SIGHUP", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_group_ends_with_a_checkpoint(training, tmp_path, number):
    """Twice, a moment apart, as \"timeout\" sends it."""
    os.killpg(training.pid, number)
    os.kill(training.pid, number)
    assert training.wait(SECONDS) == 128 + number
    assert stopped_at(tmp_path) >= 3
    assert group_is_gone(training.pid)
    if number != signal.SIGHUP:
        assert "stopping: finishing the step and saving" in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_a_request_while_data_stall_saves_and_ends(training, tmp_path, dataroot):
    for file in (dataroot / "train").iterdir():
        os.mkfifo(file.with_suffix(".pipe"))
        file.with_suffix(".pipe").replace(file)  # whoever opens it waits for ever
    newest, since = None, time.monotonic()
    while time.monotonic() - since < 3:  # until no step is done any more
        now = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
        newest, since = (now, time.monotonic()) if now != newest else (newest, since)
        time.sleep(0.05)
    os.killpg(training.pid, signal.SIGINT)
    assert training.wait(SECONDS) == 128 + signal.SIGINT
    stopped_at(tmp_path)
    assert group_is_gone(training.pid)


STALLED = """
import sys, time
from fastpix2pix.signals import stop_requests
with stop_requests(lambda: time.sleep(1000)) as stops, stops.waiting():
    print("waiting", flush=True)
    time.sleep(1000)
"""


def test_a_second_request_ends_at_once_whatever_the_main_thread_does():
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGINT)
    heard = [process.stderr.readline(), process.stderr.readline()]
    assert b"stopping: finishing the step and saving" in heard[1]
    time.sleep(0.7)  # a repetition within half a second is the same request
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert b"stopped at once" in err and b"Traceback" not in err


REPEATS = """
import os, signal, sys, time
from fastpix2pix import signals
signals.SAME_REQUEST = float(sys.argv[1])
with signals.stop_requests(print):
    for pause in (0.1, 0.1, float(sys.argv[2])):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
print("alive")
"""


@pytest.mark.parametrize(("same", "pause", "code", "out"), [(1000, 0.5, 0, b"alive\n"), (0, 1000, 143, b"")])
def test_a_signal_that_is_repeated_at_once_is_the_same_request(same, pause, code, out):
    command = [sys.executable, "-c", REPEATS, str(same), str(pause)]
    ended = subprocess.run(command, capture_output=True, timeout=SECONDS)
    assert (ended.returncode, ended.stdout) == (code, out)


FORKED_WITHIN = """
import os, time
from fastpix2pix import signals
with signals.stop_requests(print):
    child = os.fork()
    if child == 0:
        time.sleep(1000)
os.kill(child, 9)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_that_lives_on_does_not_hold_the_end_up():
    """It has all descriptors of its parent."""
    assert subprocess.run([sys.executable, "-c", FORKED_WITHIN], timeout=SECONDS).returncode == 0


CLOSES_FOR_EVER = """
import os, signal, time
from fastpix2pix import signals
signals.CLOSING = 0.2
with signals.limited("in time", 1):
    pass
time.sleep(0.5)
with signals.limited("stopped at step 7", 143):
    time.sleep(1000)
"""


def test_a_loader_that_does_not_close_does_not_hold_the_end_up():
    ended = subprocess.run([sys.executable, "-c", CLOSES_FOR_EVER], capture_output=True, timeout=SECONDS)
    assert ended.returncode == 128 + signal.SIGTERM
    assert b"stopped at step 7" in ended.stderr and b"in time" not in ended.stderr


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As under nohup."""
    script = (
        "import os, signal\n"
        "from fastpix2pix.signals import stop_requests\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with stop_requests(print) as stops:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    assert not stops\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


NEVER_RETURNS = """
import ctypes, os, signal, sys, time
from fastpix2pix import signals
signals.UNANSWERED, signals.FINISHING = 0.3, 0.6
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with signals.stop_requests(lambda: (signals.say("saved"), signals.end_at_once(stops.exit_code))) as stops:
    print("ready", flush=True)
    if sys.argv[1] == "waits":
        with stops.waiting():
            lock(mutex)
    elif sys.argv[1] == "saves":
        while not stops:
            time.sleep(0.01)
    lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a call that no signal interrupts, in glibc")
@pytest.mark.parametrize(
    ("does", "line"),
    [("waits", "saved"), ("computes", "not finished 1 s after"), ("saves", "not finished 1 s after")],
)
def test_a_main_thread_that_does_not_come_back_from_a_call_holds_no_end_up(does, line):
    """Within the wait for data, where another thread may save; within a step; within the saving."""
    process = subprocess.Popen(
        [sys.executable, "-c", NEVER_RETURNS, does], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it is in the call
    process.terminate()
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    asked, answer = [text for text in err.splitlines() if text]
    assert "stopping: finishing the step and saving" in asked and answer.startswith(line)


def test_a_request_that_was_met_ends_nothing_later():
    script = (
        "import os, signal, time\n"
        "from fastpix2pix import signals\n"
        "signals.UNANSWERED, signals.FINISHING = 0.1, 0.2\n"
        "with signals.stop_requests(print) as stops:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.6)\n"
        "print(stops.exit_code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=SECONDS)
    assert ended.returncode == 0 and ended.stdout == b"143\n"


@pytest.mark.parametrize("module", ["tyro", "torch"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_imports_ends_with_one_line(tmp_path, module, number):
    """The module stands for the real one, which may be loading a library that takes its time."""
    (tmp_path / f"{module}.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "fastpix2pix.train", "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=SECONDS,
        text=True,
    )
    assert ended.returncode == 128 + number and ended.stdout == ""
    assert ended.stderr.split("\n", 1)[1] == f"stopped by {number.name}; what was written before is whole\n"


PREPARES = """
import ctypes, os, runpy, signal, sys
sys.argv[0] = "-m"
import fastpix2pix
sys.argv[0] = "train"
from multiprocessing import Process
from fastpix2pix import signals, train
signals.CLOSING = 0.3
mutex = ctypes.create_string_buffer(64)
def prepare(*_, **__):
    child = Process(target=lambda: signal.pause(), daemon=True)
    child.start()
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    print("ready", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
train.{name} = prepare
train.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a call that no signal interrupts, in glibc")
@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGTERM, "open_loader"),
        pytest.param(signal.SIGHUP, "prepare_step", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "data_folder", marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_the_first_step_ends_a_call_that_does_not_return(tmp_path, dataroot, number, name):
    """And the processes that it may have started; the next training finds the run free."""
    where = ["--dataroot", str(dataroot), "--checkpoints_dir", str(tmp_path), "--name", "run"]
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARES.format(name=name), *SMALL, *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.stdout.readline() not in ("ready\n", ""):
        pass
    time.sleep(0.5)  # until it is in the call
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert err.split() == f"stopped by {number.name}; what was written before is whole".split()
    assert group_is_gone(process.pid)
    with run_folder.owned(tmp_path / "run"):
        pass


@pytest.mark.parametrize("module", ["tyro", "torch"])
def test_an_interrupt_during_the_imports_leaves_no_traceback(tmp_path, module):
    """The module stands for the real one, and is interrupted while it is imported."""
    script = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / f"{module}.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, "-m", "fastpix2pix.train", "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=SECONDS,
    )
    assert ended.returncode == -signal.SIGINT and ended.stderr == b"" and ended.stdout == b""

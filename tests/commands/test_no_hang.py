"""What could make a command wait for ever, and does not: pipes among files, workers that end, little shared
memory."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_nothing_lost import at_step
from tiny import tiny_config
from tiny_run import SMALL, error_line, steps_saved, write_pairs

from fastpix2pix import checkpoint, export, report, translate
from fastpix2pix.data import LoaderOptions, open_loader, portable
from fastpix2pix.models import build_networks

SECONDS = 120  # far more than anything here takes


@pytest.fixture(autouse=True)
def nothing_hangs():
    """A test that waits for ever is ended by an exception."""

    def fail(*_):
        raise AssertionError("this hangs")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run of an untrained network."""
    config = tiny_config(ngf=4, ndf=4, n_layers_D=1)
    generator, discriminator = build_networks(config.network_options())
    weights = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
    checkpoint.save(tmp_path / "old", 1, {"config": config.to_dict(), "step": 1, **weights}, keep=1)
    return tmp_path / "old"


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)
    os.chdir(here)


PLANTS = {"pipe": os.mkfifo, "socket": bind}


@pytest.mark.parametrize("loader", ["portable", "dali"])
@pytest.mark.parametrize("kind", PLANTS)
def test_train_names_what_is_no_file_among_its_pairs(run, dataroot, kind, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    PLANTS[kind](dataroot / "train" / "9.png")
    code, _, err = run("--steps", 1, "--loader", loader)
    assert code == 2 and "train/9.png: is not a file; remove it" in error_line(err)


@pytest.mark.parametrize("loader", ["portable", "dali"])
def test_a_file_that_becomes_a_pipe_is_named(run, tmp_path, dataroot, monkeypatch, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")

    def plant():
        for file in (dataroot / "train").iterdir():
            os.mkfifo(file.with_suffix(".pipe"))
            file.with_suffix(".pipe").replace(file)

    at_step(monkeypatch, 4, plant)
    code, _, err = run("--steps", 60, "--cache", 0, "--loader", loader)
    assert code == 2 and ".png: is not a file; remove it" in error_line(err)
    (saved,) = steps_saved(tmp_path / "run")
    assert 4 <= saved < 60


@pytest.mark.parametrize("kind", PLANTS)
@pytest.mark.parametrize("name", ["run", "run/checkpoints/step_00000001.pt", "x.pt", "x_net_G.pth", "x.npz"])
@pytest.mark.parametrize("command", [translate, export], ids=["translate", "export"])
def test_weights_that_are_no_file_are_one_line(tmp_path, dataroot, capsys, command, name, kind):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    PLANTS[kind](path)
    flags = ["--run", path, "--output", tmp_path / "out"]
    flags += ["--input", dataroot / "train"] if command is translate else []
    with pytest.raises(SystemExit) as stop:
        command.main([*map(str, flags)])
    assert stop.value.code == 2 and str(path.name) in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["config.json", "samples/step_00000001.png", "events/events.out.tfevents.1"])
def test_a_pipe_in_the_folder_of_a_run_does_not_hold_its_report_up(trained, name):
    (trained / "config.json").write_text(tiny_config().to_json())
    (trained / name).parent.mkdir(exist_ok=True)
    (trained / name).unlink(missing_ok=True)
    os.mkfifo(trained / name)
    with contextlib.suppress(SystemExit):
        report.main(["--run", str(trained)])


# ------------------------------------------------------------------------------------- processes that decode


def stream_of(root: Path, **options):
    sizes = {"load_size": 32, "crop_size": 32, "loader": "portable", "num_threads": 2}
    loader = open_loader(root, LoaderOptions(**sizes, **options))
    return loader, loader.stream()


@pytest.fixture
def big_pairs(tmp_path) -> Path:
    """More than one chunk of them."""
    return write_pairs(tmp_path / "big", 40)


def test_where_no_process_can_be_started_this_one_decodes(big_pairs, monkeypatch, caplog):
    usual, batches = stream_of(big_pairs)
    wanted = [next(batches) for _ in range(60)]
    usual.close()

    def fail(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fail)
    with caplog.at_level(logging.WARNING):
        alone, batches = stream_of(big_pairs)
        found = [next(batches) for _ in range(60)]
        assert not multiprocessing.active_children()
        alone.close()
    assert "no process to decode images can be started ([Errno 11] Resource" in caplog.text
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.source, theirs.source) and mine[2:] == theirs[2:]


@pytest.mark.parametrize("when", ["idle", "sending"])
def test_a_killed_worker_is_one_line_whatever_it_was_doing(run, tmp_path, monkeypatch, when):
    """Half an answer in its pipe is no reason to wait for the rest."""
    if when == "sending":
        send = portable.Connection.send_bytes

        def half(self, content, *_):
            os.write(self.fileno(), (len(content)).to_bytes(4, "big") + bytes(content[:100]))
            os.kill(os.getpid(), signal.SIGKILL)

        calls = []
        monkeypatch.setattr(
            portable.Connection,
            "send_bytes",
            lambda *a: (half if calls.append(0) or len(calls) > 2 else send)(*a),  # A and B of a chunk
        )
    else:
        at_step(monkeypatch, 4, lambda: [child.kill() for child in multiprocessing.active_children()[:1]])
    code, _, err = run("--steps", 500, "--cache", 0, "--batch_size", 3)
    assert code == 2 and "a process that decodes images ended by signal 9; " in error_line(err)
    (saved,) = steps_saved(tmp_path / "run")
    assert 1 <= saved < 500 and not multiprocessing.active_children()


ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from fastpix2pix.data import LoaderOptions, open_loader, portable
decode, calls = portable.ResizedPairs.decode, []
def stuck(*args):
    calls.append(0)
    return decode(*args) if len(calls) == 1 or sys.argv[2] == "idle" else time.sleep(1000)
portable.ResizedPairs.decode = stuck
portable.usable_cores = lambda: 2
options = LoaderOptions(loader="portable", load_size=32, crop_size=32, num_threads=2, cache_bytes=0)
stream = open_loader(Path(sys.argv[1]), options).stream()
for _ in range(17):  # both have been asked for a second chunk
    next(stream)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("they_are", ["idle", "stuck"])
def test_workers_end_with_their_parent(big_pairs, they_are):
    """However it ended; the output of all of them is a pipe, which is closed when the last one is gone."""
    command = [sys.executable, "-c", ORPHAN, str(big_pairs), they_are]
    ended = subprocess.run(command, capture_output=True, timeout=SECONDS)
    assert ended.returncode == -signal.SIGKILL


SMALL_SHM = """
mount --make-rprivate / && mount -t tmpfs -o size={size} none /dev/shm && {fill} df /dev/shm >&2 &&
exec {python} -m fastpix2pix.train {flags}
"""


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["portable", "dali"])
@pytest.mark.parametrize("shm", ["tiny", "full", "read-only"])
def test_a_training_needs_no_shared_memory(tmp_path, shm, loader):
    """Docker gives 64 MiB; here one page, or none."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    private = ["unshare", "--mount", "--map-root-user"] if os.geteuid() else ["unshare", "--mount"]
    trial = [*private, "sh", "-c", "mount --make-rprivate / && mount -t tmpfs none /dev/shm"]
    try:
        if subprocess.run(trial, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    fills = {
        "tiny": "",
        "full": "{ cat /dev/zero > /dev/shm/full || true; } &&",
        "read-only": "mount -o remount,ro /dev/shm &&",
    }
    data = write_pairs(tmp_path / "pairs", 40)
    flags = [*SMALL, "--loader", loader, "--dataroot", str(data), "--checkpoints_dir", str(tmp_path)]
    flags += ["--name", "run", "--steps", "50", "--cache", "0", "--num_threads", "2"]
    script = SMALL_SHM.format(size="4k", fill=fills[shm], python=sys.executable, flags=" ".join(flags))
    ended = subprocess.run([*private, "sh", "-c", script], capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr and steps_saved(tmp_path / "run") == [50]

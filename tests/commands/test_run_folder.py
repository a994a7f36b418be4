"""A run's folder: one owner, and files that were torn, damaged or edited."""

import dataclasses
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config
from tiny_run import error_line, steps_saved
from torch.utils.tensorboard import SummaryWriter

from fastpix2pix import checkpoint, run_folder, train
from fastpix2pix.config import TrainConfig
from fastpix2pix.errors import UserError
from fastpix2pix.history import read_history
from fastpix2pix.report import write_report

# ---------------------------------------------------------------------------------------- one run, one owner


def test_a_run_in_use_is_refused_before_its_data_are_looked_for_and_its_owner_named(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "data_folder", lambda _: pytest.fail("looks for data"))
    with run_folder.owned(tmp_path / "run"):
        code, _, err = run("--steps", 1)
    assert code == 2
    line = error_line(err)
    assert f"run: in use by process {os.getpid()} on {socket.gethostname()}, since 20" in line
    assert line.endswith("wait for its end, or choose another --name")


def test_a_run_whose_owner_was_killed_is_free_once_its_workers_are_gone(tmp_path):
    """The lock is inherited by a forked worker, which lives a little longer than its parent."""
    script = (
        "import os, pathlib, signal, sys, time\n"
        "from fastpix2pix.run_folder import owned\n"
        "with owned(pathlib.Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(1)\n"
        "        os._exit(0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")])
    assert killed.returncode == -signal.SIGKILL
    with run_folder.owned(tmp_path / "run"):
        pass


def test_a_start_that_fails_leaves_no_folder(run, tmp_path):
    code, _, err = run("--dataroot", tmp_path / "nowhere", "--steps", 1)
    assert code == 2 and "nowhere" in error_line(err)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- torn files


@pytest.mark.parametrize("torn", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, None])
def test_what_was_asked_for_is_read_from_the_checkpoint_if_its_file_is_no_use(tmp_path, capsys, torn):
    config = tiny_config(lr=3e-4)
    state = {"config": config.to_dict(), "step": 1, "generator": {}, "discriminator": {}}
    checkpoint.save(tmp_path, 1, state, keep=1)
    if torn is not None:
        (tmp_path / "config.json").write_bytes(torn)
    assert run_folder.read_request(tmp_path) == config
    assert "not readable; what was asked for is taken from step_00000001.pt" in capsys.readouterr().out


def test_a_torn_configuration_is_replaced_when_the_run_goes_on(run, tmp_path):
    run("--steps", 1, "--lr", 3e-4)
    config = tmp_path / "run" / "config.json"
    before = config.read_text()
    config.write_text(before[:99])
    code, out, _ = run("--steps", 2, "--continue_train")
    assert code == 0 and steps_saved(tmp_path / "run") == [1, 2]
    assert "not readable; what was asked for is taken from step_00000001.pt" in out
    assert config.read_text() == before.replace('"steps": 1', '"steps": 2')


def test_the_configuration_is_whole_at_every_moment(tmp_path, monkeypatch):
    """A write that fails half-way leaves the old one."""
    config = tiny_config(checkpoints_dir=tmp_path, name="run")
    (tmp_path / "run").mkdir()
    run_folder.write_request(config)
    before = (tmp_path / "run" / "config.json").read_text()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(UserError, match="run: can't write here .No space left."):
        run_folder.write_request(dataclasses.replace(config, lr=1.0))
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"steps": "ten"}, "steps is 'ten', which is no int"),
        ({"lr": None}, "lr is None, which is no float"),
        ({"lr": True}, "lr is True, which is no float"),
        ({"ngf": 4.5}, "ngf is 4.5, which is no int"),
        ({"no_flip": "yes"}, "no_flip is 'yes', which is no bool"),
        ({"preset": 5}, "preset is 5, which is none of 'tutorial', 'junyanz'"),
        ({"dataroot": 5}, "dataroot is 5, which is no str"),
        ({"name": []}, "name is [], which is no str"),
        ({"ngf": 0}, "--ngf 0: "),
    ],
)
def test_a_wrong_value_in_the_configuration_is_one_line(tmp_path, values, line):
    (tmp_path / "config.json").write_text(json.dumps({**TrainConfig().to_dict(), **values}))
    with pytest.raises(UserError) as refusal:
        run_folder.read_request(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / 'config.json'}: {line}")
    assert "What was asked for" in write_report(tmp_path).read_text()  # which only shows it


def test_every_configuration_reads_back(tmp_path):
    for config in (TrainConfig(), TrainConfig(dataroot=tmp_path, n_epochs=3, lr=1, precision="fp32")):
        assert TrainConfig.from_dict(json.loads(config.to_json())) == config


def events_with_scalars(folder: Path, count: int) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for step in range(1, count + 1):
            writer.add_scalar("loss", step / 2, step)
    (path,) = folder.iterdir()
    return path


def test_a_bad_record_of_an_event_file_is_skipped_and_said(tmp_path, caplog):
    path = events_with_scalars(tmp_path / "events", 6)
    content = bytearray(path.read_bytes())
    third = content.index(struct.pack("<f", 1.5))
    content[third - 8 : third + 4] = b"\xff" * 12
    path.write_bytes(content)
    history = read_history(tmp_path / "events")
    assert history.steps["loss"] == [1, 2, 4, 5, 6]
    assert f"{path}: 1 damaged record is left out" in caplog.text


def test_a_damaged_length_in_an_event_file_ends_its_reading_and_is_said(tmp_path, caplog):
    path = events_with_scalars(tmp_path / "events", 6)
    content, start = bytearray(path.read_bytes()), 0
    for _ in range(3):  # the file's version, then two scalars
        start += struct.unpack_from("<Q", content, start)[0] + 16
    content[start + 6] ^= 1  # a length of 256 TiB
    path.write_bytes(content)
    assert read_history(tmp_path / "events").steps["loss"] == [1, 2]
    assert f"{path}: damaged at byte {start}; the rest of it is left out" in caplog.text


def test_an_event_file_that_is_still_being_written_is_no_damage(tmp_path, caplog):
    path = events_with_scalars(tmp_path / "events", 6)
    whole = path.read_bytes()
    for cut in (1, 5, 20, 30):
        path.write_bytes(whole[:-cut])
        assert read_history(tmp_path / "events").steps["loss"] == [1, 2, 3, 4, 5]
    assert caplog.text == ""

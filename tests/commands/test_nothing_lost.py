"""What a training keeps, and says, when something around it fails."""

import errno
import multiprocessing
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer import record_writer
from tiny import tiny_config
from tiny_run import error_line, steps_saved

from fastpix2pix import checkpoint, export, run_folder, translate
from fastpix2pix.data.synthetic import synthetic_dataset
from fastpix2pix.errors import UserError
from fastpix2pix.models import build_networks
from fastpix2pix.monitor import Monitor
from fastpix2pix.training.graph import AsyncHostCopy
from fastpix2pix.translator import load

# --------------------------------------------------------------------------------- states that are not finite


def test_infinite_weights_are_not_saved(run, tmp_path):
    """The losses of step 1 are finite; the weights that it leaves are not."""
    code, _, err = run("--steps", 3, "--lr", 1e39, "--save_latest_freq", 1)
    assert code == 2
    line = error_line(err)
    assert "generator." in line and "is not finite at step 1, which is not saved" in line
    assert checkpoint.latest(tmp_path / "run") is None


def test_a_state_whose_losses_are_no_numbers_is_not_saved_on_the_way_out(run, tmp_path, monkeypatch):
    """Though its weights are finite, as those are that a loss scale has kept from an update."""
    monkeypatch.setattr(AsyncHostCopy, "wait", lambda _: torch.full((1, 6), torch.nan))
    code, _, err = run("--steps", 3, "--print_freq", 1)
    assert code == 2 and error_line(err).startswith("error: losses are not finite since step 1;")
    assert checkpoint.latest(tmp_path / "run") is None


@pytest.fixture
def infinite_run(tmp_path) -> Path:
    """A run whose newest checkpoint holds an infinite weight, as earlier versions saved them."""
    config = tiny_config(ngf=4, ndf=4, n_layers_D=1)
    generator, discriminator = build_networks(config.network_options())
    with torch.no_grad():
        generator.last.weight[0, 0, 0, 0] = torch.inf
    weights = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
    checkpoint.save(tmp_path / "old", 1, {"config": config.to_dict(), "step": 1, **weights}, keep=1)
    return tmp_path / "old"


def test_export_refuses_weights_that_are_not_finite(infinite_run, tmp_path, capsys):
    pytest.importorskip("onnx")
    with pytest.raises(SystemExit) as stop:
        export.main(["--run", str(infinite_run), "--output", str(tmp_path / "net.onnx")])
    assert stop.value.code == 2
    assert "old: its weights are not finite (last.weight)" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "net.onnx").exists()


def test_translate_refuses_weights_that_are_not_finite(infinite_run, dataroot, tmp_path, capsys):
    flags = ["--run", infinite_run, "--input", dataroot / "train", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        translate.main([*map(str, flags)])
    assert stop.value.code == 2
    assert "old: its weights are not finite (last.weight)" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_exported_graph_that_gives_no_numbers_is_not_called_right(tmp_path):
    pytest.importorskip("onnx")
    config = tiny_config(ngf=4, ndf=4, n_layers_D=1)
    generator, discriminator = build_networks(config.network_options())
    weights = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
    checkpoint.save(tmp_path / "r", 1, {"config": config.to_dict(), "step": 1, **weights}, keep=1)
    translator = load(tmp_path / "r", device="cpu")
    with torch.no_grad():
        translator.generator.last.bias[0] = torch.nan  # after the look at the weights
    with pytest.raises(UserError, match="not written, for its results are nan off PyTorch's"):
        export.export_onnx(translator, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


# ------------------------------------------------------------------------- errors around a state that is good


def at_step(monkeypatch, step: int, action: Callable[[], object]) -> None:
    """``action()`` when a training has done ``step`` steps."""
    stepped = Monitor.stepped

    def acting(self):
        stepped(self)
        if self.bar.n == step:
            action()

    monkeypatch.setattr(Monitor, "stepped", acting)


def test_a_file_that_becomes_corrupt_ends_the_run_with_its_steps_saved(run, tmp_path, dataroot, monkeypatch):
    files = list((dataroot / "train").iterdir())
    at_step(monkeypatch, 4, lambda: [file.write_bytes(b"no picture") for file in files])
    code, _, err = run("--steps", 30, "--cache", 0)
    assert code == 2
    assert "cannot be decoded" in error_line(err)
    (saved,) = steps_saved(tmp_path / "run")
    assert 4 <= saved < 30 and f"step {saved} is saved; --continue_train goes on from it" in err


def test_a_killed_worker_ends_the_run_with_its_steps_saved(run, tmp_path, monkeypatch):
    at_step(monkeypatch, 4, lambda: [child.kill() for child in multiprocessing.active_children()])
    code, _, err = run("--steps", 500, "--cache", 0)
    assert code == 2
    assert "a process that decodes images ended" in error_line(err)
    (saved,) = steps_saved(tmp_path / "run")
    assert 4 <= saved < 500


def test_events_samples_and_report_that_cannot_be_written_are_only_warned_of(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    (tmp_path / "run" / "report.html" / "x").mkdir(parents=True)
    (tmp_path / "run" / "losses.csv" / "x").mkdir(parents=True)
    (tmp_path / "run" / "samples").write_text("a file where the folder should be")
    code, _, err = run("--steps", 3, "--display_freq", 1, "--save_latest_freq", 1, "--print_freq", 1)
    assert code == 0 and steps_saved(tmp_path / "run") == [1, 2, 3]
    for what in ("events", "samples", "report.html", "losses.csv"):
        assert err.count(f"warning: {what} can't be written (") == 1
    assert "Traceback" not in err


def test_a_run_folder_deleted_while_training_is_made_anew_and_can_be_continued(run, tmp_path, monkeypatch):
    at_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    code, _, err = run("--steps", 3)
    assert code == 0 and steps_saved(tmp_path / "run") == [3] and "Traceback" not in err
    code, out, _ = run("--steps", 4, "--continue_train")
    assert code == 0 and steps_saved(tmp_path / "run") == [3, 4]


# -------------------------------------------------------------------------------------- what is not ours


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run of an untrained network."""
    config = tiny_config(ngf=4, ndf=4, n_layers_D=1)
    generator, discriminator = build_networks(config.network_options())
    weights = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
    checkpoint.save(tmp_path / "old", 1, {"config": config.to_dict(), "step": 1, **weights}, keep=1)
    return tmp_path / "old"


NOT_OURS = {
    "pipe": os.mkfifo,
    "link to a file": lambda path: path.symlink_to("precious"),
    "link to a folder": lambda path: path.symlink_to("pairs"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.mark.parametrize("kind", [*NOT_OURS, "device"])
def test_export_does_not_replace_what_is_no_plain_file(trained, tmp_path, monkeypatch, capsys, kind):
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    Path("precious").write_text("mine")
    output = Path("out")
    if kind == "device":  # as /dev/null is to root
        if os.geteuid():
            pytest.skip("only root can make a device")
        os.mknod(output, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    else:
        NOT_OURS[kind](output)
    before = output.lstat()
    with pytest.raises(SystemExit):
        export.main(["--run", str(trained), "--output", str(output)])
    assert "out: is a link, folder or device, which is not overwritten" in error_line(capsys.readouterr().err)
    after = output.lstat()
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert Path("precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["out", "out/generated", "out/index.html"])
@pytest.mark.parametrize("kind", NOT_OURS)
def test_translate_does_not_replace_what_is_not_its_own(
    trained, tmp_path, dataroot, monkeypatch, capsys, kind, name
):
    monkeypatch.chdir(tmp_path)
    Path("precious").write_text("mine")
    if name != "out":
        Path("out").mkdir()
        Path("out/index.html").write_text('content="fastpix2pix"')
        Path(name).unlink(missing_ok=True)
    NOT_OURS[kind](Path(name))
    before = Path(name).lstat()
    with pytest.raises(SystemExit):
        translate.main(["--run", str(trained), "--input", str(dataroot / "train"), "--output", "out"])
    assert f"{name}: is a link, a device or no folder" in error_line(capsys.readouterr().err)
    assert Path(name).lstat().st_ino == before.st_ino
    assert Path("precious").read_text() == "mine" and len(list((dataroot / "train").iterdir())) == 3


@pytest.mark.parametrize("name", ["", ".", "..", "a/../../b", "/proc/x", "./..", "a\\..\\b", "a\0b"])
@pytest.mark.parametrize("flags", [[], ["--continue_train"]])
def test_a_name_that_leads_out_of_the_folder_of_runs_is_refused(run, tmp_path, name, flags):
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("--name", name, "--steps", 1, *flags)
    assert code == 2 and "does not name a folder inside --checkpoints_dir" in error_line(err)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_killed_processes_left_is_removed_at_the_next_start(run, tmp_path, trained):
    """Half a checkpoint, configuration and page in a run; half a painted data set; half an ONNX file."""
    pytest.importorskip("onnx")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    left = [tmp_path / "run" / ".config.json.partial", tmp_path / "run" / ".x1.partial"]
    left += [tmp_path / "run" / "checkpoints" / "step_00000001.partial", tmp_path / ".net.onnx.partial"]
    for file in left:
        file.write_bytes(b"half")
    (tmp_path / "cache" / ".painting-x1" / "train").mkdir(parents=True)
    with run_folder.owned(tmp_path / "run"):
        pass
    synthetic_dataset(tmp_path / "cache", train=1, val=1, test=1)
    export.main(["--run", str(trained), "--output", str(tmp_path / "net.onnx")])
    assert (tmp_path / "net.onnx").is_file()
    assert not [file for file in left if file.exists()]
    assert not list((tmp_path / "cache").glob(".painting-*"))

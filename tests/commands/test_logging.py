"""The losses of a run as a CSV, and at Weights & Biases."""

import csv
import struct
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import error_line

from fastpix2pix import monitor
from fastpix2pix.loss_table import COLUMNS, LossTable


def rows_of(folder) -> list[dict[str, str]]:
    with (folder / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_holds_every_step_as_tensorboard_has_it(run, tmp_path):
    run("--steps", 7, "--print_freq", 3, "--n_layers_D", 2)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [*map(str, range(1, 8))]
    events = EventAccumulator(str(tmp_path / "run" / "events")).Reload()
    for tag in monitor.TUTORIAL_TAGS:
        assert [float(row[tag]) for row in rows] == pytest.approx([e.value for e in events.Scalars(tag)])
    for row in rows:
        assert float(row["learning_rate"]) == 2e-4
        disc = float(row["disc_real_loss"]) + float(row["disc_fake_loss"])
        assert float(row["disc_loss"]) == pytest.approx(disc, rel=1e-5)
        total = float(row["gen_gan_loss"]) + 100 * float(row["gen_l1_loss"])
        assert float(row["gen_total_loss"]) == pytest.approx(total, rel=1e-5)


def test_run_that_goes_on_has_every_step_once(run, tmp_path):
    run("--steps", 4, "--print_freq", 1, "--save_latest_freq", 2, "--n_layers_D", 2)
    before = rows_of(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000004.pt").unlink()  # as if killed before it was saved
    with (tmp_path / "run" / "losses.csv").open("a") as file:
        file.write("1,0.1,0.")  # and while it wrote the row of step 10 or later
    run("--steps", 6, "--continue_train")
    rows = rows_of(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[:4] == before, "the same steps again give the same losses"


def test_table_of_a_new_run_begins_anew(tmp_path):
    for first, expected in ((0, [1, 2]), (0, [1]), (1, [1, 2, 3])):
        table = LossTable(tmp_path, first)
        count = len(expected) - first
        table.add(first + 1, [[0.5] * (len(COLUMNS) - 2)] * count, 0.1)
        table.close()
        assert [int(row["step"]) for row in rows_of(tmp_path)] == expected


# -------------------------------------------------------------------------------------- Weights & Biases


def records(folder) -> list:
    """What the client wrote of all its offline runs in ``folder``: after a header of 7 bytes, LevelDB's log
    format, of blocks of 32 KiB with pieces of (checksum, length, place in the record), all little-endian.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime):
        content, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:  # too little for a piece
                at += 32768 - at % 32768
                continue
            _, length, place = struct.unpack_from("<IHB", content, at)
            parts += content[at + 7 : at + 7 + length]
            at += 7 + length
            if place in (1, 4):  # the whole record, or its last piece
                found.append(Record.FromString(parts))
                parts = b""
    return found


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.slow
def test_offline_run_has_losses_samples_and_the_request(run, tmp_path, offline):
    code, _, err = run("--steps", 4, "--print_freq", 2, "--n_layers_D", 2, "--use_wandb")
    assert code == 0, err
    code, _, err = run("--steps", 6, "--continue_train", "--use_wandb")
    assert code == 0, err
    written, rows = records(tmp_path / "run"), rows_of(tmp_path / "run")
    runs = [record.run for record in written if record.HasField("run")]
    assert {one.run_id for one in runs} == {(tmp_path / "run" / ".wandb_id").read_text()}, "one run, not two"
    assert runs[0].project == "fastpix2pix" and runs[0].display_name == "run"
    request = {item.key: item.value_json for item in runs[0].config.update}
    assert request["netG"] == '"unet_32"' and request["lr"] == "0.0002"
    seen = {}
    for record in written:
        if record.HasField("history"):
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            seen.setdefault(int(values["_step"]), {}).update(values)
    assert {2, 4, 6} <= seen.keys()
    for step in (2, 4, 6):
        of_both = [float(row["gen_l1_loss"]) for row in rows[step - 2 : step]]
        assert float(seen[step]["gen_l1_loss"]) == pytest.approx(sum(of_both) / 2, rel=1e-4)
        assert {"learning_rate", "images_per_second", "data_wait_share"} <= seen[step].keys()
    assert "samples" in seen[6] and [*(tmp_path / "run" / "wandb").rglob("samples_6_*.png")]


def test_what_fails_there_costs_a_line_and_no_training(run, tmp_path, offline, monkeypatch):
    from fastpix2pix.wandb_run import WandbRun

    def fail(*_):
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(WandbRun, "log", fail)
    code, _, err = run("--steps", 4, "--print_freq", 1, "--n_layers_D", 2, "--use_wandb")
    assert code == 0 and err.count("warning: wandb can't be written (the line is dead)") == 1
    assert len(rows_of(tmp_path / "run")) == 4


def test_without_the_client_or_an_account_it_is_one_line(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        code, _, err = run("--steps", 1, "--n_layers_D", 2, "--use_wandb")
    assert code == 2 and 'run pip install "fastpix2pix[wandb]"' in error_line(err)
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    code, _, err = run("--steps", 1, "--n_layers_D", 2, "--use_wandb")
    assert code == 2 and "No API key configured.; log in by wandb login" in error_line(err)

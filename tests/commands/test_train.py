"""The command as a user types it: a run, its folder, exact resume, stop requests, and mistakes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastpix2pix import checkpoint, monitor
from fastpix2pix.config import TrainConfig
from fastpix2pix.data.catalog import DATASETS
from fastpix2pix.report import write_report
from fastpix2pix.train import main

PAIRS = 7
SMALL = ["--netG", "unet_32", "--crop_size", "32", "--load_size", "36", "--ngf", "4", "--ndf", "4"]


@pytest.fixture
def dataroot(tmp_path):
    """PAIRS side-by-side PNGs of random blocks in train/, two in test/."""
    random = np.random.default_rng(0)
    for split, count in (("train", PAIRS), ("test", 2)):
        folder = tmp_path / "pairs" / split
        folder.mkdir(parents=True)
        for i in range(count):
            blocks = random.integers(0, 256, (4, 8, 3), dtype=np.uint8)
            Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / f"{i}.png")
    return tmp_path / "pairs"


def run(tmp_path, dataroot, name, *flags):
    data = [] if "--dataset" in flags else ["--dataroot", str(dataroot)]
    main([*SMALL, *data, "--checkpoints_dir", str(tmp_path), "--name", name, *flags])
    return tmp_path / name


def tensors(value, prefix=""):
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(item, f"{prefix}.{key}")


def assert_same_state(first, second):
    a, b = (dict(tensors(checkpoint.load(checkpoint.latest(folder)))) for folder in (first, second))
    assert a.keys() == b.keys() and len(a) > 100
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("loader", ["dali", "portable"])
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_resume_continues_bit_for_bit(tmp_path, dataroot, preset, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    flags = ["--preset", preset, "--batch_size", "2", "--loader", loader]
    whole = run(tmp_path, dataroot, "whole", *flags, "--steps", "20")
    run(tmp_path, dataroot, "parts", *flags, "--steps", "10")
    parts = run(tmp_path, dataroot, "parts", "--continue_train", "--steps", "20")
    assert_same_state(whole, parts)


def test_a_stop_request_finishes_the_step_saves_and_can_be_continued(tmp_path, dataroot, monkeypatch, capsys):
    flags = [
        "--preset",
        "junyanz",
        "--n_epochs",
        "1",
        "--n_epochs_decay",
        "1",
    ]  # 14 steps, two learning rates
    whole = run(tmp_path, dataroot, "whole", *flags)

    stepped = monitor.Monitor.stepped

    def stop_at_fifth(self):
        stepped(self)
        if self.bar.n == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(monitor.Monitor, "stepped", stop_at_fifth)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, dataroot, "stopped", *flags)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped at step 5" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    stopped = run(tmp_path, dataroot, "stopped", "--continue_train")
    assert checkpoint.load(checkpoint.latest(stopped))["step"] == 14
    assert_same_state(whole, stopped)
    page = (stopped / "report.html").read_text()  # of what training remembers; now of what the files say
    assert write_report(stopped).read_text() == page


def test_run_folder(tmp_path, dataroot):
    flags = "--steps 9 --print_freq 4 --display_freq 4 --save_latest_freq 3 --keep_checkpoints 2 --lr 1e-3"
    folder = run(tmp_path, dataroot, "run", *flags.split())
    assert TrainConfig.from_dict(json.loads((folder / "config.json").read_text())).lr == 1e-3
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step_00000006.pt", "step_00000009.pt"]
    samples = sorted((folder / "samples").iterdir())
    assert [path.name for path in samples] == [f"step_{n:08d}.png" for n in (4, 8, 9)]
    # two fixed test pairs, each input | target | generated; BtoA shows the right half as the input
    grid = np.asarray(Image.open(samples[0]))
    pair = np.asarray(Image.open(dataroot / "test" / "0.png"))
    assert grid.shape == (64, 96, 3)
    np.testing.assert_array_equal(grid[:32, :32], pair[:, 32:])
    np.testing.assert_array_equal(grid[:32, 32:64], pair[:, :32])
    assert "gen_l1_loss" in (folder / "report.html").read_text()
    events = EventAccumulator(str(folder / "events")).Reload()
    total, gan, l1, disc = (events.Scalars(tag) for tag in monitor.TUTORIAL_TAGS)
    assert [point.step for point in disc] == list(range(1, 10))
    for a, b, c in zip(total, gan, l1, strict=True):
        assert a.value == pytest.approx(b.value + 100 * c.value, rel=1e-5)


def test_drawing_samples_leaves_no_trace(tmp_path, dataroot):
    often = run(tmp_path, dataroot, "often", "--steps", "4", "--display_freq", "1", "--print_freq", "1")
    never = run(tmp_path, dataroot, "never", "--steps", "4")
    assert_same_state(often, never)


def test_gan_health_names_the_winner():
    for real, fake, gen, verdict in (
        (0.01, 0.02, 5.0, "the discriminator is winning"),
        (0.69, 0.69, 0.69, "balanced"),
        (0.4, 0.5, 1.0, "balanced"),
        (0.23, 0.23, 2.05, "the discriminator is ahead"),
        (1.5, 1.2, 0.3, "the generator is ahead"),
        (3.0, 4.0, 0.02, "the generator is winning"),
    ):
        assert verdict in monitor.gan_health(real, fake, gen, "vanilla")
    assert "undecided: 0.25" in monitor.gan_health(0.2, 0.2, 0.2, "lsgan")


def test_losses_that_are_not_finite_stop_the_run(tmp_path, dataroot, capsys):
    flags = ["--steps", "8", "--lr", "1e30", "--print_freq", "2", "--save_latest_freq", "1"]
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, dataroot, "diverged", *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: losses are not finite since step 2;")


def mistakes():
    """(flags, part of the message)."""
    yield "--crop_size 48 --load_size 50", "--crop_size 48 does not fit --netG unet_32: give a multiple of 32"
    yield "--load_size 30", "--load_size 30 is smaller than --crop_size 32"
    yield "--steps 0", "--steps 0: give a number of at least 1"
    yield "--lr nan", "--lr nan: give a finite number"
    yield "--steps 5 --n_epochs 5", "give one of them"
    yield "--n_layers_D 5", "too small for --n_layers_D 5"
    yield "--device cuda:9", "--device cuda:9: this machine has no such device"
    yield "--device warp", "--device warp: this machine has no such device"
    yield "--continue_train", "config.json: not readable, so there is no run to continue"
    yield "--checkpoints_dir {data}/train/0.png", "0.png"
    yield "--dataroot {data}/nowhere", "nowhere"
    yield "--dataset no_such_set", "no_such_set"


@pytest.mark.parametrize(("flags", "message"), list(mistakes()))
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, dataroot, capfd, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, dataroot, "run", "--steps", "1", *flags.format(data=dataroot).split())
    assert stop.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "direction"),
    [
        ({"dataset": "facades", "preset": "junyanz"}, "BtoA"),
        ({"dataset": "maps"}, DATASETS["maps"].direction),
        ({"dataset": "edges2shoes"}, "AtoB"),
        ({"preset": "junyanz"}, "BtoA"),
        ({"dataroot": Path("d")}, "BtoA"),
        ({"dataroot": Path("d"), "preset": "junyanz", "dataset": "facades"}, "AtoB"),
        ({"dataset": "edges2shoes", "direction": "BtoA"}, "BtoA"),
    ],
)
def test_direction_is_the_one_asked_for_or_the_customary_one(options, direction):
    assert TrainConfig(**options).resolved_direction() == direction


def test_a_run_is_not_overwritten(tmp_path, dataroot, capsys):
    folder = run(tmp_path, dataroot, "run", "--steps", "1")
    before = checkpoint.latest(folder).read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path, dataroot, "run", "--steps", "1")
    assert "holds a run already; add --continue_train" in capsys.readouterr().err
    assert checkpoint.latest(folder).read_bytes() == before


def test_another_architecture_is_refused(tmp_path, dataroot, capsys):
    run(tmp_path, dataroot, "run", "--steps", "1")
    with pytest.raises(SystemExit):
        run(tmp_path, dataroot, "run", "--continue_train", "--ngf", "8", "--steps", "2")
    assert "--ngf 8:" in (error := capsys.readouterr().err) and "was trained with 4" in error

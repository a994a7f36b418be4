"""What a training keeps, and says, when something around it fails."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from fastpix2pix import checkpoint, export, train, translate
from fastpix2pix.errors import UserError
from fastpix2pix.models import build_networks
from fastpix2pix.translator import load

SMALL = [
    *("--netG", "unet_32", "--crop_size", "32", "--load_size", "32", "--ngf", "4", "--ndf", "4"),
    *("--loader", "portable", "--num_threads", "1", "--precision", "fp32", "--device", "cpu"),
]


@pytest.fixture
def dataroot(tmp_path) -> Path:
    """Three pairs of random blocks."""
    random = np.random.default_rng(0)
    folder = tmp_path / "pairs" / "train"
    folder.mkdir(parents=True)
    for i in range(3):
        blocks = random.integers(0, 256, (4, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / f"{i}.png")
    return tmp_path / "pairs"


@pytest.fixture
def run(tmp_path, dataroot, capfd):
    """``run(*flags)`` -> (exit code, stdout, stderr) of a training in ``tmp_path / "run"``."""

    def start(*flags: object) -> tuple[int, str, str]:
        code = 0
        where = ["--dataroot", str(dataroot), "--checkpoints_dir", str(tmp_path), "--name", "run"]
        try:
            train.main([*SMALL, *where, *map(str, flags)])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return start


def steps_saved(folder: Path) -> list[int]:
    return [checkpoint.load(path)["step"] for path in checkpoint._by_step(folder)]


def error_line(err: str) -> str:
    """The one line with which a command ends."""
    lines = err.strip().splitlines()
    assert "Traceback" not in err and sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1]


# --------------------------------------------------------------------------------- states that are not finite


def test_infinite_weights_are_not_saved(run, tmp_path):
    """The losses of step 1 are finite; the weights that it leaves are not."""
    code, _, err = run("--steps", 3, "--lr", 1e39, "--save_latest_freq", 1)
    assert code == 2
    line = error_line(err)
    assert "generator." in line and "is not finite at step 1, which is not saved" in line
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

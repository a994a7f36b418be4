"""Trained on other data than 8-bit RGB: all commands keep its depths and channels."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny_run import SMALL, error_line

import fastpix2pix
from fastpix2pix import checkpoint, demo, evaluate, export, timelapse, train, translate
from fastpix2pix.data.pictures import read, write
from fastpix2pix.errors import UserError
from fastpix2pix.exported import ExportedModel
from fastpix2pix.sample_grids import read_grid

COUNT, SIDE = 3, 32


class Task(NamedTuple):
    """channels, types, endings, values (low, high) of input and output, and the flags that say so."""

    channels: tuple[int, int]
    dtypes: tuple[str, str]
    suffixes: tuple[str, str]
    ranges: tuple[tuple[float, float], tuple[float, float]]
    flags: str


DEEP = (0, 65535)
TASKS = {
    "16-bit TIFF to 16-bit TIFF": Task(
        (1, 1), ("uint16", "uint16"), (".tif", ".tif"), (DEEP, DEEP), "--input_nc 1 --output_nc 1"
    ),
    "1 to 3": Task(
        (1, 3), ("uint16", "uint16"), (".png", ".png"), ((0, 4095), DEEP), "--input_nc 1 --input_range 0 4095"
    ),
    "5 to 2": Task(
        (5, 2),
        ("float32", "float32"),
        (".tif", ".npy"),
        ((-1, 1.5), (250, 320)),
        "--input_nc 5 --output_nc 2 --input_range -1 1.5 --output_range 250 320",
    ),
    "8-bit grey": Task(
        (1, 1), ("uint8", "uint8"), (".png", ".png"), ((0, 255),) * 2, "--input_nc 1 --output_nc 1"
    ),
}


def quantised(image: np.ndarray, dtype: str, values: tuple[float, float]) -> np.ndarray:
    """(C, H, W) in [-1, 1] as (H, W, C) of files, in float64."""
    low, high = values
    scaled = (image.astype(np.float64).transpose(1, 2, 0) + 1) / 2 * (high - low) + low
    return scaled.astype(np.float32) if dtype == "float32" else np.rint(scaled).astype(dtype)


def as_network_takes_it(samples: np.ndarray, values: tuple[float, float]) -> torch.Tensor:
    low, high = values
    return (
        torch.from_numpy((samples.astype(np.float64) - low) / (high - low) * 2 - 1).permute(2, 0, 1).float()
    )


def write_data(root: Path, task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pairs of test/, which are train/'s as well: smooth shapes, within the range."""
    random, pairs = np.random.default_rng(0), []
    for i in range(COUNT):
        halves = []
        for half, channels, dtype, suffix, (low, high) in zip(
            "AB", task.channels, task.dtypes, task.suffixes, task.ranges, strict=True
        ):
            values = low + (high - low) * random.random((8, 8, channels)).repeat(4, 0).repeat(4, 1)
            halves.append(values.astype(np.float32) if dtype == "float32" else np.rint(values).astype(dtype))
            for split in ("train", "test"):
                (root / split / half).mkdir(parents=True, exist_ok=True)
                write(root / split / half / f"{i}{suffix}", halves[-1])
        pairs.append(tuple(halves))
    return pairs


class Trained(NamedTuple):
    task: Task
    root: Path
    run: Path
    pairs: list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module", params=TASKS)
def trained(request, tmp_path_factory) -> Trained:
    folder, task = tmp_path_factory.mktemp("other"), TASKS[request.param]
    pairs = write_data(folder / "data", task)
    where = ["--dataroot", str(folder / "data"), "--checkpoints_dir", str(folder), "--name", "run"]
    train.main([*SMALL, *where, "--direction", "AtoB", "--steps", "4", *task.flags.split()])
    return Trained(task, folder / "data", folder / "run", pairs)


def test_a_run_says_what_its_files_hold(trained):
    found = json.loads((trained.run / "environment.json").read_text())
    for name, dtype, suffix in zip(
        ("input", "output"), trained.task.dtypes, trained.task.suffixes, strict=True
    ):
        assert found[f"{name}_files"] == f"{dtype} {suffix}"
    deep = trained.task.dtypes[0] != "uint8"
    assert ("shown in 8 bits" in (trained.run / "report.html").read_text()) == deep
    (row, *others) = read_grid(trained.run / "samples" / "step_00000004.png")
    assert len(others) == COUNT - 1
    source, _ = trained.pairs[0]
    shown = np.rint((as_network_takes_it(source, trained.task.ranges[0]).numpy() + 1) * 127.5)
    shown = shown[:3] if len(shown) >= 3 else shown.repeat(3, 0)
    assert np.abs(row.source - shown.transpose(1, 2, 0)).max() <= 1


def test_translated_files_are_the_networks_values_in_the_type_of_the_targets(trained, tmp_path, capsys):
    task = trained.task
    flags = ["--input", trained.root / "test" / "A", "--output", tmp_path / "out", "--kind", "image"]
    translate.main([*map(str, ["--run", trained.run, *flags, "--device", "cpu"])])
    page = (tmp_path / "out" / "index.html").read_text()
    model = fastpix2pix.load(trained.run, device="cpu")
    for i, (source, _) in enumerate(trained.pairs):
        path = tmp_path / "out" / "generated" / f"{i}{task.suffixes[1]}"
        independent = {".tif": tifffile.imread, ".npy": np.load}.get(path.suffix, read)(path)
        floats = model(as_network_takes_it(source, task.ranges[0])).numpy()
        expected = quantised(floats, task.dtypes[1], task.ranges[1])
        assert independent.dtype == task.dtypes[1]
        off = np.abs(independent.reshape(expected.shape).astype(np.float64) - expected)
        # The two ways round differently where a value lies in the middle of two, or float32 ends.
        assert off.max() <= (1e-4 if task.dtypes[1] == "float32" else 1) and (off > 0.5).mean() < 0.01
        assert np.array_equal(model(source), independent.reshape(expected.shape))
        assert independent.std() > 0
        assert np.array_equal(read(tmp_path / "out" / "input" / f"{i}{task.suffixes[0]}"), source)
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert len(shown) == 2 * COUNT
    for name in shown:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.format == "PNG" and picture.size == (SIDE, SIDE)
    previews = (tmp_path / "out" / "preview").exists()
    assert previews == (task.suffixes != (".png", ".png") or task.ranges[0] == (0, 4095))
    assert ("previews of 8 bits" in page) == previews


def test_metrics_are_of_the_files_values(trained, tmp_path):
    where = ["--input", trained.root / "test", "--output", tmp_path / "out", "--device", "cpu"]
    evaluate.main([*map(str, ["--run", trained.run, *where])])
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    model, (low, high) = fastpix2pix.load(trained.run, device="cpu"), trained.task.ranges[1]
    errors = [model(a).astype(np.float64) - b for a, b in trained.pairs]
    l1 = np.mean([np.abs(error).mean() for error in errors]) / ((high - low) / 2)
    psnr = np.mean([20 * np.log10(high - low) - 10 * np.log10((error**2).mean()) for error in errors])
    assert found["mean"]["L1"] == pytest.approx(l1) and found["mean"]["PSNR"] == pytest.approx(psnr)


def test_exported_file_knows_the_types_and_gives_the_same_values(trained, tmp_path):
    path, task = tmp_path / "model.onnx", trained.task
    export.main(["--run", str(trained.run), "--output", str(path)])
    exported, model = ExportedModel(path), fastpix2pix.load(trained.run, device="cpu", no_dropout=True)
    assert (exported.input, exported.output) == (model.input, model.output)
    low, high = task.ranges[1]
    for source, _ in trained.pairs:
        ours, theirs = model(source), exported(source)
        assert theirs.dtype == task.dtypes[1] and theirs.shape == (SIDE, SIDE, task.channels[1])
        most = (0 if task.dtypes[1] == "float32" else 1) + 1e-5 * (high - low)
        assert np.abs(ours.astype(np.float64) - theirs).max() <= most
    tensor = as_network_takes_it(trained.pairs[0][0], task.ranges[0])
    assert (exported(tensor) - model(tensor)).abs().max() < 1e-4


def test_resized_and_in_pairs(tmp_path, capsys):
    """Side by side in one file, twice as large as the training's images."""
    task = TASKS["16-bit TIFF to 16-bit TIFF"]
    (tmp_path / "data" / "train").mkdir(parents=True)
    random = np.random.default_rng(1)
    truth = random.integers(0, 65536, (SIDE // 4, SIDE // 2, 1)).astype(np.uint16).repeat(8, 0).repeat(8, 1)
    for i in range(2):
        tifffile.imwrite(tmp_path / "data" / "train" / f"{i}.tif", truth[..., 0])
    where = ["--dataroot", str(tmp_path / "data"), "--checkpoints_dir", str(tmp_path), "--name", "run"]
    train.main([*SMALL, *where, "--steps", "1", "--preset", "junyanz", *task.flags.split()])
    flags = ["--run", tmp_path / "run", "--input", tmp_path / "data" / "train", "--output", tmp_path / "out"]
    translate.main([*map(str, [*flags, "--resize"])])
    plane = Image.fromarray(truth[..., 0].astype(np.float32)[:, : 2 * SIDE])
    expected = np.asarray(plane.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 65535)
    source = tifffile.imread(tmp_path / "out" / "input" / "0.tif")
    assert source.dtype == np.uint16 and np.abs(source - expected).max() < 0.6
    generated = tifffile.imread(tmp_path / "out" / "generated" / "0.tif")
    target = tifffile.imread(tmp_path / "out" / "target" / "0.tif")
    l1 = np.abs(generated.astype(np.float64) - target).mean() / 32767.5
    assert float(re.findall(r"mean L1 ([\d.]+)", capsys.readouterr().out)[0]) == pytest.approx(l1, rel=1e-3)


def test_a_run_goes_on_with_its_channels_and_ranges(trained, capsys):
    where = [
        "--checkpoints_dir",
        str(trained.run.parent),
        "--name",
        "run",
        "--continue_train",
        "--steps",
        "5",
    ]
    train.main(where)
    assert checkpoint.load(checkpoint.latest(trained.run))["step"] == 5
    for flags, line in (
        ("--output_nc 4", "--output_nc 4: "),
        ("--input_range 0 9", "--input_range 0.0 9.0: the run run was started with "),
    ):
        with pytest.raises(SystemExit):
            train.main([*where, *flags.split()])
        assert line in error_line(capsys.readouterr().err)


def test_commands_for_8_bit_pictures_say_so_or_leave_step_0_out(trained, tmp_path, capsys):
    film = ["--run", str(trained.run), "--output", str(tmp_path / "film.gif")]
    timelapse.main(film)
    assert "steps 4 to 5" in (out := capsys.readouterr().out) or "steps 4 to 4" in out
    if trained.task.dtypes[0] == "uint8":
        return
    with pytest.raises(UserError, match="a page shows 1 or 3 channels of 8 bits"):
        demo.load_model(demo.DemoConfig(run=trained.run, device="cpu"))


def test_files_of_another_kind_are_refused_in_one_line(trained, tmp_path, capsys):
    Image.new("RGBA", (SIDE, SIDE)).save(tmp_path / "x.png")
    for flags in (["--run", trained.run, "--input", tmp_path / "x.png", "--output", tmp_path / "out"],):
        with pytest.raises(SystemExit) as stop:
            translate.main([*map(str, flags)])
        line = error_line(capsys.readouterr().err)
        assert stop.value.code == 2 and "x.png: holds 4 channels of 8 bits" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", ["float32", "complex64 .tif", "float32 .png", "uint16 .exe", 5, None])
def test_a_checkpoint_that_says_nonsense_of_its_files_is_one_line(trained, tmp_path, said):
    state = checkpoint.load(checkpoint.latest(trained.run))
    state["environment"]["output_files"] = said
    checkpoint.save(tmp_path / "nonsense", 1, state, keep=1)
    with pytest.raises(UserError, match="does not say of which type its images are"):
        fastpix2pix.load(tmp_path / "nonsense", device="cpu")


def test_pictures_of_pil_where_they_can_hold_it(trained):
    model, source = fastpix2pix.load(trained.run, device="cpu"), trained.pairs[0][0]
    if trained.task.channels[0] > 1:
        with pytest.raises(UserError, match="give an array"):
            model(Image.new("RGB", (SIDE, SIDE)))
        return
    picture = Image.fromarray(source[..., 0])
    if trained.task.channels[1] > 1:
        with pytest.raises(UserError, match="which no PIL image holds; give an array"):
            model(picture)
        return
    assert np.array_equal(np.asarray(model(picture)), model(source)[..., 0])


@pytest.mark.parametrize("wrong", ["channels", "type", "not finite", "no range"])
def test_wrong_arrays_are_refused(trained, wrong):
    model, source = fastpix2pix.load(trained.run, device="cpu"), trained.pairs[0][0]
    array = {
        "channels": np.concatenate([source, source], -1)[..., : trained.task.channels[0] + 1],
        "type": source.astype(np.float64),
        "not finite": np.full(source.shape, np.nan, np.float32),
        "no range": source.astype(np.float32),
    }[wrong]
    if wrong == "no range" and trained.task.ranges[0] not in (DEEP, (0, 255)):
        assert (
            model(array).shape[-1] == trained.task.channels[1]
        )  # numbers are numbers where a range is known
        return
    with pytest.raises(UserError, match="give"):
        model(array)

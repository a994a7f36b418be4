"""Using a trained model: the function that ``load`` gives, and the command over files, good and hostile."""

import csv
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config
from torch.func import functional_call

import fastpix2pix
from fastpix2pix import checkpoint, translate, translator
from fastpix2pix.errors import UserError
from fastpix2pix.interop import junyanz, keras
from fastpix2pix.models import UNetGenerator, build_networks

SIZE = 32
NARROW = {"ngf": 4, "ndf": 4, "n_layers_D": 1}


def save_checkpoint(folder: Path, step: int, **options) -> UNetGenerator:
    """Write the checkpoint of an untrained tiny network, biased so that its images are not all grey."""
    config = tiny_config(**NARROW, name=folder.name, seed=step, **options)
    generator, discriminator = build_networks(config.network_options())
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)
    state = {
        "config": config.to_dict(),
        "step": step,
        "generator": generator.state_dict(),
        "discriminator": discriminator.state_dict(),
    }
    checkpoint.save(folder, step, state, keep=9)
    return generator


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with the checkpoints of steps 1 and 20; its weights are those of seed 1 and 20."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for step in (1, 20):
        save_checkpoint(folder, step)
    return folder


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def expected(generator: UNetGenerator, image: np.ndarray, seed: int = 0) -> np.ndarray:
    """What the network makes of a uint8 image, by numpy around one plain forward pass."""
    height, width = image.shape[:2]
    multiple = 2**generator.num_downs
    top, left = -height % multiple // 2, -width % multiple // 2
    padding = ((top, -height % multiple - top), (left, -width % multiple - left), (0, 0))
    padded = np.pad(image, padding, mode="symmetric").astype(np.float32) / 127.5 - 1
    buffers = {k: b.clone() for k, b in generator.named_buffers()} | {"rng": torch.tensor([seed, 0])}
    with torch.no_grad():
        out = functional_call(generator, buffers, (torch.from_numpy(padded.transpose(2, 0, 1)[None]),))
    out = out[0].numpy().transpose(1, 2, 0)[top : top + height, left : left + width]
    return np.clip(np.round((out + 1) * 127.5), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------- as a function


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (40, 50), (33, 31), (7, 90), (1, 1), (257, 3)])
def test_image_of_any_size(run, size):
    model = fastpix2pix.load(run)
    generator = save_checkpoint(run.parent / "same", 20)
    image = noise(*size)
    assert np.abs(model(image).astype(int) - expected(generator, image)).max() <= 1
    assert model(image).std() > 1 or size == (1, 1)


def test_every_type_of_image_gives_the_same(run):
    model = fastpix2pix.load(run)
    image = noise(40, 50)
    from_array = model(image)
    from_pil = model(Image.fromarray(image))
    assert from_pil.mode == "RGB" and np.array_equal(np.asarray(from_pil), from_array)
    tensor = torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
    from_tensor = model(tensor)
    assert from_tensor.dtype == torch.float32
    assert np.abs((from_tensor.permute(1, 2, 0).numpy() + 1) * 127.5 - from_array).max() < 0.51
    assert model(tensor.double()).dtype == torch.float64


def test_images_of_a_batch_do_not_mix(run):
    model = fastpix2pix.load(run)
    images = torch.rand(3, 3, 32, 40) * 2 - 1
    alone = torch.stack([model(image) for image in images])
    assert torch.equal(model(images), alone) and not torch.equal(alone[0], alone[1])


def test_grey_image_is_repeated(run):
    model = fastpix2pix.load(run)
    grey = noise(32, 32)[..., 0]
    repeated = model(np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(model(grey), repeated)
    assert np.array_equal(np.asarray(model(Image.fromarray(grey))), repeated)


def test_16_bits_are_scaled_by_what_they_can_hold(run):
    model, image = fastpix2pix.load(run), noise(32, 32)
    generated = model(image.astype(np.uint16) * 257)
    assert generated.dtype == np.uint8 and np.abs(generated.astype(int) - model(image)).max() <= 1


def test_networks_with_one_channel(tmp_path):
    network = UNetGenerator("junyanz", 1, 1, ngf=4, num_downs=5)
    torch.save(junyanz.export_weights(network), tmp_path / "latest_net_G.pth")
    model = fastpix2pix.load(tmp_path / "latest_net_G.pth")
    assert model(Image.fromarray(noise(40, 40))).mode == "L"
    assert model(noise(40, 40)[..., 0]).shape == (40, 40, 1)


def test_calls_leave_no_trace_and_the_seed_draws_the_dropout(run):
    model = fastpix2pix.load(run)
    image = noise(32, 32)
    before = {name: value.clone() for name, value in model.generator.state_dict().items()}
    first = model(image)
    model(noise(64, 64, seed=1))
    assert np.array_equal(model(image), first)
    for name, value in model.generator.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not np.array_equal(fastpix2pix.load(run, seed=1)(image), first)
    generator = save_checkpoint(run.parent / "same", 20)
    assert np.abs(fastpix2pix.load(run, seed=7)(image).astype(int) - expected(generator, image, 7)).max() <= 1


def test_evaluation_takes_the_running_statistics_and_no_dropout(run):
    model = fastpix2pix.load(run, evaluation=True)
    image = noise(32, 32)
    generator = save_checkpoint(run.parent / "same", 20).eval()
    assert np.abs(model(image).astype(int) - expected(generator, image)).max() <= 1
    assert not np.array_equal(model(image), fastpix2pix.load(run)(image))
    assert np.array_equal(model(image), fastpix2pix.load(run, evaluation=True, seed=5)(image))


def test_newest_checkpoint_or_the_one_asked_for(run):
    image = noise(32, 32)
    for path, seed in ((run, 20), (run / "checkpoints/step_00000001.pt", 1), (str(run), 20)):
        generator = save_checkpoint(run.parent / "same", seed)
        model = fastpix2pix.load(path)
        assert np.abs(model(image).astype(int) - expected(generator, image)).max() <= 1
        assert model.source == f"tiny, step {seed}" and (model.direction, model.size) == ("BtoA", SIZE)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("num_downs", [5, 7])
def test_weights_of_junyanz(tmp_path, norm, num_downs):
    network = UNetGenerator("junyanz", ngf=4, num_downs=num_downs, norm=norm)
    path = tmp_path / "latest_net_G.pth"
    torch.save({f"module.{key}": value for key, value in junyanz.export_weights(network).items()}, path)
    model = fastpix2pix.load(path)
    image = noise(128, 128)
    assert np.abs(model(image).astype(int) - expected(network, image)).max() <= 1
    assert (model.direction, model.size, model.interpolation) == ("AtoB", 2**num_downs, "bicubic")


def test_weights_of_keras(tmp_path):
    network = UNetGenerator("tutorial", ngf=4, num_downs=6)
    np.savez(tmp_path / "generator.npz", *keras.export_weights(network))
    model = fastpix2pix.load(tmp_path / "generator.npz", direction="AtoB")
    image = noise(64, 64)
    assert np.abs(model(image).astype(int) - expected(network, image)).max() <= 1
    assert (model.direction, model.size, model.interpolation) == ("AtoB", 64, "nearest")


WRONG_IMAGES = {
    "float array": noise(8, 8) / 255,
    "16-bit grey array": noise(8, 8)[..., 0].astype(np.uint16),
    "32-bit array": noise(8, 8).astype(np.int32),
    "4 dimensions": noise(8, 8)[None],
    "RGBA array": np.zeros((8, 8, 4), np.uint8),
    "no pixel": np.zeros((0, 8, 3), np.uint8),
    "uint8 tensor": torch.zeros(3, 8, 8, dtype=torch.uint8),
    "channels last tensor": torch.zeros(8, 8, 3),
    "vector": torch.zeros(3),
    "empty batch": torch.zeros(0, 3, 8, 8),
    "16-bit PIL image": Image.fromarray(noise(8, 8)[..., 0].astype(np.uint16)),
    "float PIL image": Image.fromarray(noise(8, 8)[..., 0].astype(np.float32)),
    "path": "image.png",
    "nothing": None,
}


@pytest.mark.parametrize("image", WRONG_IMAGES.values(), ids=WRONG_IMAGES.keys())
def test_wrong_image_is_refused(run, image):
    with pytest.raises(UserError, match="give|convert"):
        fastpix2pix.load(run)(image)


def test_image_beyond_the_memory_is_refused_before_it_is_tried(run, monkeypatch):
    monkeypatch.setattr(translator, "BYTES_PER_PIXEL_AND_WIDTH", 2**40)
    with pytest.raises(
        UserError, match="image of 40x32 needs about 5[0-9]{6} GiB in this network, .* leaves"
    ):
        fastpix2pix.load(run)(noise(32, 40))


# --------------------------------------------------------------------------------------- as a command


def run_command(capsys, *argv: object) -> tuple[int, str, list[str]]:
    """(exit code, what it printed, the error lines) of the command."""
    code = 0
    try:
        translate.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("error:")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save_pairs(folder: Path, names, size=(SIZE, SIZE)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(noise(size[0], 2 * size[1], seed=i)).save(folder / f"{name}.png")
    return folder


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("direction", [None, "AtoB", "BtoA"])
def test_pairs_are_translated_and_measured(run, tmp_path, capsys, direction):
    names = ["1", "2", "a b", "line\nbreak", "ünï 🏠", '"q"', os.fsdecode(b"caf\xe9")]
    pairs = save_pairs(tmp_path / "pairs", names)
    flags = ["--direction", direction] if direction else []
    code, out, errors = run_command(
        capsys, "--run", run, "--input", pairs, "--output", tmp_path / "o u t", *flags
    )
    assert (code, errors) == (0, [])
    model, found = fastpix2pix.load(run), tmp_path / "o u t"
    with open(found / "metrics.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = {row.pop("name"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}
    assert set(table) == set(names)
    for name in names:
        a, b = np.split(read(pairs / f"{name}.png"), 2, axis=1)
        source, target = (a, b) if direction == "AtoB" else (b, a)
        generated = read(found / "generated" / f"{name}.png")
        assert np.array_equal(generated, model(source))
        assert np.array_equal(read(found / "input" / f"{name}.png"), source)
        assert np.array_equal(read(found / "target" / f"{name}.png"), target)
        error = generated.astype(float) - target
        assert table[name]["L1"] == pytest.approx(np.abs(error).mean() / 127.5)
        assert table[name]["PSNR"] == pytest.approx(20 * np.log10(255) - 10 * np.log10((error**2).mean()))
        assert -1 <= table[name]["SSIM"] <= 1
    means = dict(re.findall(r"(L1|PSNR|SSIM) ([-\d.e]+)", out.partition("mean ")[2]))
    for metric in ("L1", "PSNR", "SSIM"):
        mean = np.mean([row[metric] for row in table.values()])
        assert float(means[metric]) == pytest.approx(mean, rel=1e-3)
    half = "left" if direction == "AtoB" else "right"
    assert f"7 pairs, translating the {half} half" in out
    assert out.count("as both references test") == 1
    assert len(contents(found)) == 3 * len(names) + 2 and (found / "index.html").is_file()


def test_gallery_is_in_natural_order(run, tmp_path, capsys):
    pairs = save_pairs(tmp_path / "pairs", ["10", "2", "1", "b", "a3"])
    run_command(capsys, "--run", run, "--input", pairs, "--output", tmp_path / "out")
    names = re.findall(r'data-name="(.*?)"', (tmp_path / "out/index.html").read_text())
    assert names == ["1", "2", "10", "a3", "b"]
    table = (tmp_path / "out/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table[1:]] == names


def test_images_without_a_target(run, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(noise(40, 50)).save(folder / "x.jpg", quality=95)
    Image.fromarray(noise(64, 128)).save(folder / "x.png")
    (folder / "notes.txt").write_text("")
    (folder / ".hidden.png").write_text("")
    out = tmp_path / os.fsdecode(b"caf\xe9")
    code, text, _ = run_command(capsys, "--run", run, "--input", folder, "--output", out, "--seed", 3)
    assert code == 0 and "2 images" in text and "mean" not in text
    assert set(contents(out)) == {
        *(f"{role}/{name}.png" for role in ("input", "generated") for name in ("x.jpg", "x.png")),
        "index.html",
    }
    model = fastpix2pix.load(run, seed=3)
    assert np.array_equal(read(out / "generated/x.png.png"), model(noise(64, 128)))
    assert read(out / "generated/x.jpg.png").shape == (40, 50, 3)


def test_kind_says_what_twice_as_wide_means(run, tmp_path, capsys):
    pairs = save_pairs(tmp_path / "pairs", ["1"])
    arguments = ("--run", run, "--input", pairs / "1.png", "--output", tmp_path / "out")
    _, text, _ = run_command(capsys, *arguments, "--kind", "image")
    assert "1 images" in text and read(tmp_path / "out/generated/1.png").shape == (32, 64, 3)
    save_pairs(tmp_path / "pairs", ["1"], size=(32, 40))
    _, text, _ = run_command(capsys, *arguments, "--kind", "pair")
    assert "1 pairs" in text and read(tmp_path / "out/generated/1.png").shape == (32, 40, 3)


def test_resize_is_that_of_the_training(run, tmp_path, capsys):
    pairs = save_pairs(tmp_path / "pairs", ["1"], size=(96, 96))
    arguments = ("--run", run, "--input", pairs, "--output", tmp_path / "out")
    _, text, _ = run_command(capsys, *arguments)
    assert read(tmp_path / "out/generated/1.png").shape == (96, 96, 3)
    assert "the training's was 32x32, to which --resize brings them" in text
    _, text, _ = run_command(capsys, *arguments, "--resize")
    assert "keep their size" not in text
    a, b = (half[1::3, 1::3] for half in np.split(read(pairs / "1.png"), 2, axis=1))  # centres, 96 to 32
    assert np.array_equal(read(tmp_path / "out/input/1.png"), b)
    assert np.array_equal(read(tmp_path / "out/target/1.png"), a)
    assert np.array_equal(read(tmp_path / "out/generated/1.png"), fastpix2pix.load(run)(b))


def test_evaluation_by_the_command(run, tmp_path, capsys):
    pairs = save_pairs(tmp_path / "pairs", ["1"])
    _, text, _ = run_command(capsys, "--run", run, "--input", pairs, "--output", tmp_path / "out", "--eval")
    b = read(pairs / "1.png")[:, SIZE:]
    assert np.array_equal(read(tmp_path / "out/generated/1.png"), fastpix2pix.load(run, evaluation=True)(b))
    assert "running statistics" in text and "as both references" not in text


def test_earlier_results_are_replaced_whole(run, tmp_path, capsys):
    out = tmp_path / "out"
    run_command(capsys, "--run", run, "--input", save_pairs(tmp_path / "a", "12"), "--output", out)
    (out / ".partial").mkdir()
    (out / ".partial" / "left by a killed call").write_text("")
    image = tmp_path / "single.png"
    Image.fromarray(noise(32, 32)).save(image)
    code, _, _ = run_command(capsys, "--run", run, "--input", image, "--output", out)
    assert code == 0
    assert set(contents(out)) == {"input/single.png", "generated/single.png", "index.html"}
    assert sorted(p.name for p in out.iterdir()) == ["generated", "index.html", "input"]


def test_bad_file_among_good_ones_leaves_the_earlier_results(run, tmp_path, capsys):
    out, pairs = tmp_path / "out", save_pairs(tmp_path / "pairs", "123")
    run_command(capsys, "--run", run, "--input", pairs, "--output", out)
    before = contents(out)
    content = (pairs / "3.png").read_bytes()
    (pairs / "3.png").write_bytes(content[: len(content) // 2])
    code, _, errors = run_command(capsys, "--run", run, "--input", pairs, "--output", out, "--seed", 9)
    assert code == 2 and len(errors) == 1 and "3.png: cannot be decoded" in errors[0]
    assert contents(out) == before


def test_killed_call_leaves_no_result_that_looks_whole(run, tmp_path):
    """Kill the process while it works on the second image."""
    pairs, out = save_pairs(tmp_path / "pairs", "123"), tmp_path / "out"
    program = f"""
import time
from fastpix2pix import translate
measure, calls = translate.image_metrics, []
def slow(*images):
    calls.append(1)
    if len(calls) == 2:
        print("working", flush=True)
        time.sleep(60)
    return measure(*images)
translate.image_metrics = slow
translate.main(["--run", {str(run)!r}, "--input", {str(pairs)!r}, "--output", {str(out)!r}])
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line == "working\n":
            process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in out.iterdir()] == [".partial"]
    translate.main(["--run", str(run), "--input", str(pairs), "--output", str(out)])
    assert len(contents(out)) == 3 * 3 + 2


# ------------------------------------------------------------------------------------ hostile, in one line


class Exploit:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_model(kind: str, folder: Path, run: Path) -> Path:
    """A path that is no model, each in its own way."""
    good = (run / "checkpoints/step_00000020.pt").read_bytes()
    suffix = kind.split()[-1] if kind.split()[-1].startswith(".") else ".pt"
    path = folder / f"model{suffix}"
    if kind.startswith("absent"):
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "empty run":
        (folder / "model" / "checkpoints").mkdir(parents=True)
        return folder / "model"
    elif kind.startswith("cut"):
        path.write_bytes(good[: int(kind.split()[1]) * len(good) // 100])
    elif kind.startswith("empty"):
        path.write_bytes(b"")
    elif kind.startswith("text"):
        path.write_text("not a model")
    elif kind.startswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", "nonsense")
    elif kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(Exploit(folder / "exploited")))
    elif kind.startswith("torch pickle"):
        torch.save({"config": Exploit(folder / "exploited")}, path)
    elif kind == "npz of objects .npz":
        np.savez(path, np.array([Exploit(folder / "exploited")], dtype=object))
    elif kind == "npz of other arrays .npz":
        np.savez(path, *[np.zeros(3)] * 73)
    elif kind == "npz of nothing .npz":
        np.savez(path)
    elif kind == "other version":
        state = torch.load(io.BytesIO(good))
        torch.save(state | {"config": state["config"] | {"flux": 1}}, path)
    elif kind == "other network":
        state = torch.load(io.BytesIO(good))
        torch.save(state | {"config": state["config"] | {"ngf": 8}}, path)
    elif kind == "list .pth":
        torch.save([1, 2], path)
    elif kind == "discriminator .pth":
        torch.save({"model.0.weight": torch.zeros(4, 6, 4, 4)}, path)
    elif kind == "odd shapes .pth":
        weights = junyanz.export_weights(UNetGenerator("junyanz", ngf=4, num_downs=5))
        torch.save({key: value[:2] for key, value in weights.items() if value.ndim}, path)
    return path


MODELS = [
    *("absent", "absent .pth", "absent .npz", "folder", "empty run", "other version", "other network"),
    *(
        f"{kind} {suffix}"
        for kind in ("empty", "text", "zip", "pickle")
        for suffix in (".pt", ".pth", ".npz")
    ),
    *(f"cut {percent} .pt" for percent in (1, 20, 50, 80, 99)),
    *("cut 50 .pth", "cut 50 .npz", "torch pickle .pt", "torch pickle .pth", "npz of objects .npz"),
    *(
        "npz of other arrays .npz",
        "npz of nothing .npz",
        "list .pth",
        "discriminator .pth",
        "odd shapes .pth",
    ),
]


@pytest.mark.parametrize("kind", MODELS)
def test_hostile_model(run, tmp_path, capsys, kind):
    models = tmp_path / "models"
    models.mkdir()
    path = hostile_model(kind, models, run)
    pairs, out = save_pairs(tmp_path / "pairs", "1"), tmp_path / "out"
    code, _, errors = run_command(capsys, "--run", path, "--input", pairs, "--output", out)
    assert code == 2 and len(errors) == 1 and "model" in errors[0]
    assert not out.exists() and not (models / "exploited").exists()


def hostile_input(kind: str, folder: Path) -> Path:
    """A path that holds no image, each in its own way."""
    folder.mkdir(exist_ok=True)
    good = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(good, format="PNG")
    content = good.getvalue()
    name = "n" * 300 + ".png" if kind == "name too long" else "bad.png"
    path = folder / name
    if kind == "empty folder":
        return folder
    if kind == "no picture in the folder":
        (folder / "1.txt").write_text("")
        return folder
    if kind == "NUL in the name":
        return Path(f"{folder}/\0.png")
    if kind == "folder called png":
        path.mkdir()
        return folder
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link in a circle":
        path.symlink_to(path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<svg/>")
    elif kind == "executable":
        path.write_bytes(Path(sys.executable).read_bytes()[:5000])
    elif kind.startswith("cut at"):
        path.write_bytes(content[: len(content) * int(kind.split()[2]) // 100])
    elif kind.startswith("dimensions"):
        width, height = (int(n) for n in kind.split()[1].split("x"))
        path.write_bytes(content[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + content[24:])
    elif kind.startswith("flipped byte"):
        at = int(kind.split()[2])
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
    elif kind.startswith("saved as"):
        Image.fromarray(noise(8, 8)).save(path, format=kind.split()[2])
    return path


NOT_A_FILE = ("absent", "empty folder", "no picture in the folder", "NUL in the name", "name too long")
BAD_FILES = (
    *("folder called png", "pipe", "dangling link", "link in a circle", "empty", "text", "executable"),
    *(f"cut at {percent} %" for percent in (1, 5, 20, 40, 60, 80, 95)),
    *(
        f"dimensions {size}"
        for size in ("0x0", "0x64", "60000x60000", "4294967295x1", "2147483647x2147483647")
    ),
    *(f"flipped byte {at}" for at in (0, 1, 12, 15, 24, 30, 2000)),
    *(f"saved as {form}" for form in ("BMP", "GIF", "TIFF", "WEBP", "PPM")),
)


@pytest.mark.parametrize(
    ("kind", "among_others"),
    [*((kind, False) for kind in NOT_A_FILE + BAD_FILES), *((kind, True) for kind in BAD_FILES)],
)
def test_hostile_input(run, tmp_path, capsys, kind, among_others):
    source = hostile_input(kind, tmp_path / "in")
    if among_others:
        source = save_pairs(tmp_path / "in", ["good 1", "good 2"])
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "results" / "out"
    code, _, errors = run_command(capsys, "--run", run, "--input", source, "--output", out)
    assert code == 2 and len(errors) == 1 and errors[0].isprintable()
    assert not out.exists() and {*tmp_path.rglob("*")} - {*before} <= {tmp_path / "results"}


@pytest.mark.parametrize(
    "kind",
    [
        "other files",
        "page of somebody else",
        "file",
        "below a file",
        "input inside",
        "is the input",
        "not writable",
    ],
)
def test_hostile_output(run, tmp_path, capsys, kind):
    pairs, out = save_pairs(tmp_path / "pairs", "1"), tmp_path / "out"
    if kind == "other files":
        save_pairs(out / "input", "7")
    elif kind == "page of somebody else":
        out.mkdir()
        (out / "index.html").write_text("<html>my home page</html>")
    elif kind == "file":
        out.write_text("precious")
    elif kind == "below a file":
        out.write_text("precious")
        out = out / "results"
    elif kind == "input inside":
        run_command(capsys, "--run", run, "--input", pairs, "--output", out)
        pairs = out / "generated"
    elif kind == "is the input":
        out = pairs
    elif kind == "not writable":
        out = Path("/proc/fastpix2pix")
    before = contents(tmp_path)
    code, _, errors = run_command(capsys, "--run", run, "--input", pairs, "--output", out)
    assert code == 2 and len(errors) == 1 and "choose another --output" in errors[0]
    assert contents(tmp_path) == before

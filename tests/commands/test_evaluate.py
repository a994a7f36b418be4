"""Numbers of a trained run: each image's against numpy, FID and KID against their formulas, LPIPS against its
own definition, and two runs against each other."""

import csv
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config
from tiny_run import error_line

import fastpix2pix
from fastpix2pix import checkpoint, evaluate, perceptual
from fastpix2pix.evaluate import Measured
from fastpix2pix.models import build_networks
from fastpix2pix.perceptual import FeatureDistances, PerceptualDistance


def save_run(folder: Path, seed: int) -> Path:
    """A run with an untrained network, biased so that its images are not all grey."""
    config = tiny_config(name=folder.name, ngf=4, ndf=4, n_layers_D=1, seed=seed)
    generator, discriminator = build_networks(config.network_options())
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)
    state = {"config": config.to_dict(), "step": seed, "generator": generator.state_dict()}
    checkpoint.save(folder, seed, state | {"discriminator": discriminator.state_dict()}, keep=9)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [save_run(folder / "a", 1), save_run(folder / "b", 2)]


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def pairs(tmp_path) -> Path:
    folder = tmp_path / "data" / "test"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(noise(40, 80, i)).save(folder / f"{i}.png")
    return folder


def run_command(capsys, *words: object) -> tuple[int, str, str]:
    code = 0
    try:
        evaluate.main([*map(str, words)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read_rows(output: Path) -> list[dict[str, str]]:
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_two_runs_are_measured_and_compared(runs, pairs, tmp_path, capsys):
    output = tmp_path / "numbers"
    code, out, _ = run_command(capsys, "--run", *runs, "--input", pairs, "--output", output)
    assert code == 0
    rows, report = read_rows(output), json.loads((output / "metrics.json").read_text())
    assert [(row["run"], row["name"]) for row in rows] == [(str(r), str(i)) for r in runs for i in range(5)]
    errors: dict[Path, list[np.ndarray]] = {run: [] for run in runs}
    for row in rows:
        target, source = np.split(np.asarray(Image.open(pairs / f"{row['name']}.png")), 2, axis=1)
        generated = fastpix2pix.load(row["run"])(source)  # the default direction of the preset is BtoA
        error = generated.astype(float) - target
        assert float(row["L1"]) == pytest.approx(np.abs(error).mean() / 127.5)
        assert float(row["PSNR"]) == pytest.approx(10 * np.log10(255**2 / (error**2).mean()))
        errors[Path(row["run"])].append(np.abs(error).mean() / 127.5)
    for run, one in zip(runs, report["runs"], strict=True):
        assert one["mean"]["L1"] == pytest.approx(np.mean(errors[run]))
        assert one["source"].endswith(f"step {1 + runs.index(run)}") and one["direction"] == "BtoA"
        assert f"{run}: {one['source']}, 5 images: L1 {np.mean(errors[run]):.4g}, PSNR" in out
    difference = np.array(errors[runs[1]]) - np.array(errors[runs[0]])
    width = 1.96 * difference.std(ddof=1) / math.sqrt(5)
    assert report["runs"][0]["beside_the_first"] == {}
    found = report["runs"][1]["beside_the_first"]["L1"]
    assert found["mean"] == pytest.approx(difference.mean())
    assert found["half_width_95"] == pytest.approx(width)
    assert f"{runs[1]} beside {runs[0]}: L1 {difference.mean():+.4g} ± {width:.2g}" in out
    assert report["images"] == 5 and "with dropout (seed 0), as both references test" in report["statistics"]
    assert "as both references test" in out and report["versions"]["torch"] == torch.__version__


def test_flags_say_which_images_and_how(runs, pairs, tmp_path, capsys):
    def numbers(*flags):
        code, out, err = run_command(
            capsys, "--run", runs[0], "--input", pairs, "--output", tmp_path / "n", *flags
        )
        assert code == 0, err
        return read_rows(tmp_path / "n"), json.loads((tmp_path / "n" / "metrics.json").read_text())

    rows, _ = numbers("--num_test", 2, "--direction", "AtoB")
    source, target = np.split(np.asarray(Image.open(pairs / "1.png")), 2, axis=1)
    error = fastpix2pix.load(runs[0])(source).astype(float) - target
    assert [row["name"] for row in rows] == ["0", "1"]
    assert float(rows[1]["L1"]) == pytest.approx(np.abs(error).mean() / 127.5)
    rows, report = numbers("--eval")
    target, source = np.split(np.asarray(Image.open(pairs / "0.png")), 2, axis=1)
    error = fastpix2pix.load(runs[0], evaluation=True)(source).astype(float) - target
    assert float(rows[0]["L1"]) == pytest.approx(np.abs(error).mean() / 127.5)
    assert report["statistics"] == "the running statistics of the training, without dropout"
    rows, report = numbers("--resize")
    model = fastpix2pix.load(runs[0])
    error = model(model.resize(source)).astype(float) - model.resize(target)
    assert error.shape == (32, 32, 3) and report["resized"] is True
    assert float(rows[0]["L1"]) == pytest.approx(np.abs(error).mean() / 127.5)


def test_folders_of_halves_are_pairs_too(runs, pairs, tmp_path, capsys):
    for half, part in (("A", slice(0, 40)), ("B", slice(40, 80))):
        (tmp_path / "halves" / half).mkdir(parents=True)
        for file in pairs.iterdir():
            Image.fromarray(np.asarray(Image.open(file))[:, part]).save(
                tmp_path / "halves" / half / file.name
            )
    found = []
    for folder in (pairs, tmp_path / "halves"):
        assert run_command(capsys, "--run", runs[0], "--input", folder, "--output", tmp_path / "n")[0] == 0
        found.append(read_rows(tmp_path / "n"))
    assert found[0] == found[1]


def test_a_difference_counts_beyond_its_interval():
    def measured(*values):
        return Measured(Path("x"), None, {str(i): {"PSNR": v, "L1": v} for i, v in enumerate(values)}, {})

    first = measured(1.0, 2.0, 3.0)
    words = evaluate._difference_in_words(evaluate.compare(first, measured(2.0, 3.1, 4.0)))
    assert words.count("(better)") == words.count("(worse)") == 1 and words.startswith("PSNR +1.033")
    words = evaluate._difference_in_words(evaluate.compare(first, measured(2.0, 1.0, 3.1)))
    assert words.count("(no clear difference)") == 2
    mean, width = evaluate.compare(measured(1.0), measured(2.0))["L1"]
    assert mean == 1 and math.isnan(width)


def test_equal_images_are_infinitely_close_and_json_says_null(runs, pairs, tmp_path, capsys, monkeypatch):
    def wanted(generated, target, span):
        return metrics(target, target, span)

    metrics = evaluate.image_metrics
    monkeypatch.setattr(evaluate, "image_metrics", wanted)
    assert run_command(capsys, "--run", runs[0], "--input", pairs, "--output", tmp_path / "n")[0] == 0
    (one,) = json.loads((tmp_path / "n" / "metrics.json").read_text())["runs"]
    assert one["mean"] == {"L1": 0.0, "PSNR": None, "SSIM": pytest.approx(1)}
    assert read_rows(tmp_path / "n")[0]["PSNR"] == "inf"


def test_mistakes_are_one_line(runs, pairs, tmp_path, capsys):
    (tmp_path / "file").touch()
    torch.save({"a": 1}, tmp_path / "no weights.pth")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    for flags, line in (
        (["--run", tmp_path / "absent", "--input", pairs], "no such"),
        (["--run", runs[0], "--input", tmp_path / "absent"], "no such folder; give one of pairs"),
        (["--run", runs[0], "--input", pairs, "--num_test", 0], "--num_test 0: give a number"),
        (["--run", runs[0], "--input", pairs, "--output", tmp_path / "file"], "choose another --output"),
    ):
        code, _, err = run_command(capsys, *flags)
        assert code == 2 and line in error_line(err), flags
    for name, line in (
        ("absent.pth", "give the file of its weights"),
        ("no weights.pth", "holds more than weights"),
        ("garbage.pth", "is no file of weights"),
    ):
        with pytest.raises(fastpix2pix.errors.UserError, match=line):
            perceptual._check_state_dict("--lpips", tmp_path / name)


# ------------------------------------------------------------------------- with the extra [metrics]


def needs(*modules):
    """Skip where a library of the extra is absent, or does not fit the PyTorch that is installed."""
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{module}: {error}")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A file of torch-fidelity's InceptionV3, with random weights."""
    needs("torchmetrics", "torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def images(count: int, seed: int, low: int = 0) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.integers(low, 256, (24, 24, 3)).astype(np.uint8)) for _ in range(count)]


@pytest.mark.slow
def test_fid_and_kid_are_those_of_the_papers(inception_weights):
    from torchmetrics.image.fid import NoTrainInceptionV3

    distances = FeatureDistances(inception_weights, "cpu")
    generated, targets = images(6, 1, low=90), images(6, 2)
    distances.add(targets[0], generated[1])
    assert math.isnan(distances.take()["FID"]), "of one image; and nothing is left of it"
    for one, other in zip(generated, targets, strict=True):
        distances.add(one, other)
    found = distances.take()
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception_weights))
    x, y = (
        torch.cat([network(one.permute(2, 0, 1)[None]) for one in some]).double().numpy()
        for some in (generated, targets)
    )
    # |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): the trace of the root is the sum of the singular values of
    # X1^T X2 for centred data, which is small where the covariances are 2048x2048.
    u, v = (z - z.mean(0) for z in (x, y))
    root = np.linalg.svd(u @ v.T, compute_uv=False).sum() / 5
    fid = ((x.mean(0) - y.mean(0)) ** 2).sum() + ((u**2).sum() + (v**2).sum()) / 5 - 2 * root
    assert found["FID"] == pytest.approx(fid, rel=1e-3)

    def kernel(a, b):
        return (a @ b.T / 2048 + 1) ** 3

    within = sum((k.sum() - np.trace(k)) / (6 * 5) for k in (kernel(x, x), kernel(y, y)))
    assert found["KID"] == pytest.approx(within - 2 * kernel(x, y).mean(), rel=1e-3)


def test_other_weights_are_refused(inception_weights, tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(fastpix2pix.errors.UserError, match="not the weights of torch-fidelity's InceptionV3"):
        FeatureDistances(tmp_path / "other.pth", "cpu")


def test_lpips_is_its_definition(tmp_path):
    """Differences of unit-normalised features of five layers, weighted by the published linear layers."""
    needs("torchmetrics", "torchvision")
    import torchmetrics.functional.image.lpips as published
    from torchvision.models import alexnet

    torch.manual_seed(0)
    network = alexnet()
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    distance = PerceptualDistance(tmp_path / "mine.pth", "cpu")
    (a,), (b,) = ([torch.from_numpy(noise(64, 64, seed))] for seed in (1, 2))
    linear = torch.load(
        Path(published.__file__).parent / "lpips_models" / "alex.pth", "cpu", weights_only=True
    )
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x = (torch.stack([a, b]).permute(0, 3, 1, 2) / 127.5 - 1 - shift) / scale
    expected, layer = 0.0, 0
    with torch.no_grad():
        for at, module in enumerate(network.features):
            x = module(x)
            if at in (1, 4, 7, 9, 11):
                unit = x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10)
                difference = (unit[0] - unit[1]).square()
                expected += (linear[f"lin{layer}.model.1.weight"][0] * difference).sum(0).mean().item()
                layer += 1
    assert layer == 5 and distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert distance(a, a) == pytest.approx(0, abs=1e-7)
    with pytest.raises(fastpix2pix.errors.UserError, match="not the weights of torchvision's AlexNet"):
        torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
        PerceptualDistance(tmp_path / "other.pth", "cpu")


@pytest.mark.slow
def test_the_command_gives_all_six(runs, pairs, tmp_path, capsys, inception_weights):
    needs("torchvision")
    from torchvision.models import alexnet

    torch.save(alexnet().state_dict(), tmp_path / "alexnet.pth")
    code, out, err = run_command(
        capsys, "--run", runs[0], "--input", pairs, "--output", tmp_path / "n", "--inception",
        inception_weights, "--lpips", tmp_path / "alexnet.pth", "--num_test", 2,
    )  # fmt: skip
    assert code == 0, err
    (one,) = json.loads((tmp_path / "n" / "metrics.json").read_text())["runs"]
    assert [*one["mean"]] == ["L1", "PSNR", "SSIM", "LPIPS", "FID", "KID"]
    assert [*read_rows(tmp_path / "n")[0]] == ["run", "name", "L1", "PSNR", "SSIM", "LPIPS"]
    assert "FID of few images is too high" in out

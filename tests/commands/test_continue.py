"""Continuing a run: what was asked for is kept apart from what a machine made of it, and flags add up."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix import checkpoint, environment, train
from fastpix2pix.config import TrainConfig

SMALL = (
    "--netG unet_32 --crop_size 32 --load_size 36 --ngf 4 --ndf 4 --loader portable --num_threads 1 --steps 2"
)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder with pairs/, three side-by-side PNGs of noise and one to test on, and a run of two steps."""
    folder = tmp_path_factory.mktemp("started")
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        (folder / "pairs" / split).mkdir(parents=True)
        for i in range(count):
            picture = Image.fromarray(random.integers(0, 256, (32, 64, 3), np.uint8))
            picture.save(folder / "pairs" / split / f"{i}.png")
    train.main([*SMALL.split(), "--dataroot", str(folder / "pairs"), *of_run_a(folder)])
    return folder


def of_run_a(folder):
    return ["--checkpoints_dir", str(folder), "--name", "a"]


@pytest.fixture
def run(tmp_path, started):
    """Function that gives the run "a", made anew with other flags if any are given; its ``go_on`` continues
    it with the flags that are given."""

    def start(*flags):
        if not flags:
            return shutil.copytree(started / "a", tmp_path / "a")
        train.main([*SMALL.split(), "--dataroot", str(started / "pairs"), *of_run_a(tmp_path), *flags])
        return tmp_path / "a"

    def go_on(*flags):
        train.main(["--continue_train", *of_run_a(tmp_path), *flags])
        return tmp_path / "a"

    start.go_on = go_on
    return start


def request(folder):
    return json.loads((folder / "config.json").read_text())


def newest(folder):
    return checkpoint.load(checkpoint.latest(folder))


def test_the_machines_choices_are_no_part_of_the_request(run):
    folder = run()
    for asked in (request(folder), newest(folder)["config"]):
        assert asked["precision"] is None and asked["direction"] is None
        assert asked["no_graph"] is False and asked["loader"] == "portable"
        assert "continue_train" not in asked and "force" not in asked
    for resolved in (environment.read(folder), newest(folder)["environment"]):
        assert resolved["precision"] in ("fp32", "bf16") and resolved["device"] == "cpu"
        assert resolved["kernels"] == "PyTorch" and resolved["cuda_graph"] == "no"
        assert resolved["loader"] == "portable" and resolved["direction"] == "BtoA"
        assert resolved["versions"]["torch"] == torch.__version__
    assert "What it ran on" in (folder / "report.html").read_text()


def test_a_fallback_on_one_machine_does_not_slow_the_next(run, monkeypatch):
    """A run whose self-check gave up graph and kernels asks for both again, and has them checked again."""
    with monkeypatch.context() as patch:
        given_up = {
            "device": "cuda:0",
            "precision": "bf16",
            "cuda_graph": "no: refused",
            "kernels": "PyTorch",
        }
        patch.setattr(train.PreparedStep, "resolved", lambda self: dict(given_up))
        folder = run("--lr", "0.001")
    assert newest(folder)["environment"]["cuda_graph"] == "no: refused"
    assert request(folder)["no_graph"] is False and request(folder)["precision"] is None
    asked = {}

    def spy(*networks, **options):
        asked.update(options)
        return prepare(*networks, **options)

    prepare = train.prepare_step
    monkeypatch.setattr(train, "prepare_step", spy)
    run.go_on("--steps", "3")
    assert asked["graph"] and asked["check"]
    assert environment.read(folder)["cuda_graph"] == "no"


def test_the_self_check_is_skipped_only_where_it_has_passed():
    device = torch.device("cpu")
    passed = environment.describe(device, {"precision": "bf16", "cuda_graph": "yes", "kernels": "Triton"})
    assert environment.verified_before(passed, device, "bf16", graph=True)
    assert environment.verified_before(passed, device, "bf16", graph=False)
    others = [
        None,
        passed | {"device_name": "another GPU"},
        passed | {"versions": passed["versions"] | {"torch": "2.99"}},
        passed | {"kernels": "PyTorch"},
        passed | {"cuda_graph": "no: refused"},
        passed | {"cuda_graph": "no"},
    ]
    for other in others:
        assert not environment.verified_before(other, device, "bf16", graph=True)
    assert not environment.verified_before(passed, device, "fp16", graph=True)


def test_another_precision_goes_on_from_the_same_masters(run, capsys):
    folder = run("--precision", "fp32")
    before = newest(folder)
    run.go_on("--precision", "bf16", "--steps", "3", "--lr", "0")
    assert "--precision fp32 -> bf16" in capsys.readouterr().out
    after = newest(folder)
    assert after["environment"]["precision"] == "bf16" and request(folder)["precision"] == "bf16"
    for name, weight in before["generator"].items():  # a rate of 0 moves nothing, however it is rounded
        if name.endswith("weight"):
            assert after["generator"][name].dtype == torch.float32
            assert torch.equal(after["generator"][name], weight), name
    run.go_on("--steps", "4")
    assert newest(folder)["environment"]["precision"] == "bf16", "asked for once, until another is asked for"


def test_a_run_of_a_gpu_goes_on_without_one(run, capsys):
    """Its request says cuda:1; the flag --device wins, as any flag does."""
    folder = run()
    saved = request(folder) | {"device": "cuda:1"}
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit):
        run.go_on("--steps", "3")
    assert "error: --device cuda:1: this machine has no such device" in capsys.readouterr().err
    run.go_on("--steps", "3", "--device", "cpu")
    assert newest(folder)["step"] == 3
    assert "--device cuda:1 -> cpu" in capsys.readouterr().out


def test_flags_are_checked_together_with_what_was_saved(run, capsys):
    """64 fits the run's unet_32, and not the default unet_256: only its being another task is refused."""
    run()
    with pytest.raises(SystemExit):
        run.go_on("--crop_size", "64", "--load_size", "72")
    error = capsys.readouterr().err
    assert "was started with" in error and "does not fit --netG" not in error
    with pytest.raises(SystemExit):
        run.go_on("--crop_size", "33", "--load_size", "72")
    assert "--crop_size 33 does not fit --netG unet_32: give a multiple of 32" in capsys.readouterr().err


OTHER_TASKS = {
    "dataroot": "elsewhere",
    "dataset": "facades",
    "direction": "AtoB",
    "load_size": "40",
    "no_flip": None,
    "preprocess": "crop",
    "max_dataset_size": "2",
    "gan_mode": "lsgan",
}


@pytest.mark.parametrize("flag", OTHER_TASKS)
def test_another_task_is_refused_unless_forced(run, capsys, flag):
    folder = run()
    before = (folder / "config.json").read_bytes()
    words = [f"--{flag}", *([] if OTHER_TASKS[flag] is None else [OTHER_TASKS[flag]])]
    with pytest.raises(SystemExit) as stop:
        run.go_on(*words, "--steps", "3")
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: --{flag} ") and "add --force to go on all the same" in error
    assert (folder / "config.json").read_bytes() == before
    if flag not in ("dataroot", "dataset"):  # there is nothing elsewhere
        run.go_on(*words, "--steps", "3", "--force")
        assert newest(folder)["step"] == 3
        assert f"--{flag} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", ["--preset junyanz", "--netG unet_64 --crop_size 64 --load_size 72", "--ngf 8", "--ndf 8",
              "--n_layers_D 2", "--norm instance"],
)  # fmt: skip
def test_another_architecture_is_refused_even_if_forced(run, capsys, words):
    run()
    with pytest.raises(SystemExit):
        run.go_on(*words.split(), "--force", "--steps", "3")
    flag = words.split()[0]
    assert f"error: {flag} " in (error := capsys.readouterr().err) and "was trained with" in error


@pytest.mark.parametrize("words", ["--init_type xavier", "--init_gain 0.1", "--init_from elsewhere"])
def test_another_beginning_is_refused_even_if_forced(run, capsys, words):
    run()
    with pytest.raises(SystemExit):
        run.go_on(*words.split(), "--force", "--steps", "3")
    assert f"error: {words}: decides how a run begins" in capsys.readouterr().err


def test_what_may_change_is_listed_and_saved(run, capsys):
    folder = run()
    run.go_on("--steps", "3", "--lr", "0.001", "--batch_size", "2", "--print_freq", "1")
    out = capsys.readouterr().out
    for line in ("--steps 2 -> 3", "--lr 0.0002 -> 0.001", "--batch_size 1 -> 2", "--print_freq 100 -> 1"):
        assert f"changed since the run was saved: {line}" in out
    assert request(folder)["lr"] == 0.001
    run.go_on("--steps=4")
    out = capsys.readouterr().out
    assert "--steps 3 -> 4" in out and out.count("changed since") == 1


def test_a_switch_that_is_on_may_be_typed_again_and_turned_off(run):
    folder = run("--no_dropout", "--no_flip")
    run.go_on("--no_dropout", "--no-flip", "--steps", "3")
    assert request(folder)["no_dropout"] and request(folder)["no_flip"] and newest(folder)["step"] == 3
    run.go_on("--no_no_dropout", "--steps", "4")
    assert not request(folder)["no_dropout"] and request(folder)["no_flip"]


def test_a_length_in_epochs_takes_the_place_of_one_in_steps(run):
    folder = run()
    run.go_on("--n_epochs", "2")
    assert newest(folder)["step"] == 6
    assert request(folder)["steps"] is None and request(folder)["n_epochs"] == 2
    run.go_on("--steps", "7")
    assert newest(folder)["step"] == 7 and request(folder)["n_epochs"] is None


def test_every_flag_has_its_kind():
    """Whoever adds a flag decides what it means for a run that goes on."""
    from fastpix2pix.config import ARCHITECTURE, BEGINNING, NOT_OF_THE_RUN, TASK

    free = set(vars(TrainConfig())) - {*ARCHITECTURE, *BEGINNING, *NOT_OF_THE_RUN, *TASK}
    names = """name checkpoints_dir batch_size no_dropout lambda_L1 lr beta1 steps n_epochs n_epochs_decay
        device precision no_graph deep_conv seed loader threads num_threads cache print_freq display_freq
        save_latest_freq keep_checkpoints lr_policy lr_decay_iters save_epoch_freq serial_batches use_wandb
        wandb_project_name"""
    assert free == {*names.split()}

"""The flags of pytorch-CycleGAN-and-pix2pix: every one has a meaning here, and the commands that people know
work, or say what to do."""

import dataclasses
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import SMALL, steps_saved, write_pairs
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from fastpix2pix import checkpoint, cli, train, translate
from fastpix2pix.config import TrainConfig
from fastpix2pix.data import open_loader
from fastpix2pix.data.options import LoaderOptions
from fastpix2pix.errors import UserError
from fastpix2pix.interop.junyanz import export_weights
from fastpix2pix.interop.junyanz.flags import TEST, TRAIN, Flag, test_words, train_words
from fastpix2pix.models import NetworkOptions, UNetGenerator, build_networks
from fastpix2pix.models.blocks import Epilogue
from fastpix2pix.translate import TranslateConfig

test_words.__test__ = False  # a function, and no test

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-junyanz.md").read_text(encoding="utf-8")

# Every name in add_argument of options/base_options.py (commit c05b30e), train_options.py (48ced5e),
# test_options.py (b0e64d4), models/{pix2pix,cycle_gan,test,template}_model.py and data/template_dataset.py;
# then those of 2020 to 2025 (README of 008319e), and those of 2017 (test_options.py of 06b9da5).
BASE = """dataroot name gpu_ids checkpoints_dir model input_nc output_nc ngf ndf netD netG n_layers_D norm
    init_type init_gain no_dropout dataset_mode direction serial_batches num_threads batch_size load_size
    crop_size max_dataset_size preprocess no_flip display_winsize epoch load_iter verbose suffix
    lambda_regression new_dataset_option use_wandb wandb_project_name
    which_direction which_model_netG which_model_netD which_epoch nThreads batchSize loadSize fineSize
    resize_or_crop identity"""
ONLY_TRAIN = """display_freq display_ncols display_id display_server display_env display_port update_html_freq
    print_freq no_html save_latest_freq save_epoch_freq save_by_iter continue_train epoch_count phase niter
    niter_decay n_epochs n_epochs_decay beta1 lr gan_mode pool_size lr_policy lr_decay_iters lambda_L1
    lambda_A lambda_B lambda_identity no_lsgan"""
ONLY_TEST = "ntest results_dir aspect_ratio phase eval num_test how_many model_suffix display_id display_port"


def test_every_option_name_of_theirs_has_a_meaning_here():
    assert TRAIN.keys() == {*BASE.split(), *ONLY_TRAIN.split()}
    # These belong to CycleGAN's training, but people give them to test.py as well.
    assert TEST.keys() - {"lambda_A", "lambda_B", "lambda_identity"} == {*BASE.split(), *ONLY_TEST.split()}


@pytest.mark.parametrize(("table", "configuration"), [(TRAIN, TrainConfig), (TEST, TranslateConfig)])
def test_what_a_flag_becomes_is_a_flag_of_ours(table, configuration):
    fields = {field.name for field in dataclasses.fields(configuration)}
    assert {meaning.name for meaning in table.values() if isinstance(meaning, Flag)} <= fields


def rows(heading: str) -> list[tuple[str, str]]:
    section = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [(left.strip("`"), right) for left, right in cells]


@pytest.mark.parametrize(("heading", "table"), [("Flags of train.py", TRAIN), ("Flags of test.py", TEST)])
def test_page_has_every_flag_and_where_it_leads(heading, table):
    written = dict(rows(heading))
    assert written.keys() == {f"--{name}" for name in table}
    for name, meaning in table.items():
        if isinstance(meaning, Flag):
            assert written[f"--{name}"].startswith(f"`--{meaning.name}`"), name


COMMANDS = rows("Sixty-four commands")


def parsed(monkeypatch, program: str, words: list[str]):
    """The configuration that a command comes to, or its line."""
    module, found = {"train": train, "translate": translate}[program], []
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_program", lambda command: f"python -m fastpix2pix.{program}")
        patch.setattr(train, "defaults", lambda ranks, argv: None)
        run = cli.run
        patch.setattr(
            cli, "run", lambda config, command, argv, **more: run(config, found.append, argv, **more)
        )
        try:
            module.main(words)
        except SystemExit as stop:
            assert stop.code == 2
    return found[0] if found else None


@pytest.mark.parametrize(("theirs", "here"), COMMANDS)
def test_command_becomes_what_the_page_says(monkeypatch, capsys, theirs, here):
    script, *words = shlex.split(theirs)
    config = parsed(monkeypatch, {"train.py": "train", "test.py": "translate"}[script], words)
    if here.startswith("error: "):
        assert config is None and capsys.readouterr().err.strip() == here
        return
    program, *ours = shlex.split(here.strip("`"))
    assert config is not None, capsys.readouterr().err
    assert config == parsed(monkeypatch, program, ours)
    assert not {word.lstrip("-") for word in ours} & {"model", "gpu_ids", "display_id"}, "these are theirs"


def test_there_are_sixty_commands_and_most_of_them_work():
    assert len(COMMANDS) == 64
    assert sum(not here.startswith("error") for _, here in COMMANDS) >= 40


def test_what_is_left_out_is_said_and_what_is_refused_is_no_guess(capsys):
    words, lines = train_words(
        ["--display_id", "0", "--lr=0.1", "--save_by_iter", "--steps", "3", "--niter_decay=2"]
    )
    assert words == ["--lr", "0.1", "--steps", "3", "--n_epochs_decay", "2"]
    assert [line.split(" is left out")[0] for line in lines] == ["--display_id 0", "--save_by_iter"]
    for flags, line in (
        ("--lambda_A 10", "--lambda_A 10: is CycleGAN's"),
        ("--gpu_ids", "--gpu_ids: give a value"),
        ("--gpu_ids x", "--gpu_ids x: give a number"),
        ("--suffix {nonsense}", "--suffix {nonsense}: 'nonsense' is no flag"),
        ("--size 3", "Unrecognized options: --size, 3; see"),
        ("--lr_d 3", "Unrecognized options: --lr_d, 3; see"),
        ("--epochs 3", "Unrecognized options: --epochs, 3; did you mean --n_epochs?"),
    ):
        with pytest.raises(SystemExit):
            train.main(flags.split())
        assert f"error: {line}" in capsys.readouterr().err


def test_preset_of_the_model_gives_way_to_one_that_is_asked_for():
    assert train_words(["--model", "pix2pix"])[0] == ["--preset", "junyanz"]
    assert train_words(["--model", "pix2pix", "--preset", "tutorial"])[0] == ["--preset", "tutorial"]
    assert train_words(["--preset", "junyanz", "--model", "pix2pix"])[0] == ["--preset", "junyanz"]
    assert train_words(["--continue_train", "--model", "pix2pix"])[0] == ["--continue_train"]


# --------------------------------------------------------------------------------------------- test.py


def test_weights_of_theirs_are_found_where_their_programs_put_them(tmp_path):
    base = ["--checkpoints_dir", str(tmp_path), "--name", "a", "--model", "test", "--dataroot", "x"]
    folder = tmp_path / "a"

    def run(*more):
        words = test_words([*base, *more])[0]
        return Path(words[words.index("--run") + 1])

    assert run() == folder
    folder.mkdir()
    for name in ("latest_net_G.pth", "latest_net_G_A.pth", "50_net_G.pth", "iter_700_net_G.pth"):
        (folder / name).touch()
    assert run() == folder / "latest_net_G.pth"
    assert run("--model_suffix", "_A") == folder / "latest_net_G_A.pth"
    assert run("--epoch", "50") == run("--which_epoch", "50") == folder / "50_net_G.pth"
    assert run("--load_iter", "700") == folder / "iter_700_net_G.pth"
    (folder / "checkpoints").mkdir()
    assert run() == folder, "a run of ours"
    with pytest.raises(UserError, match="has no 51_net_G.pth"):
        run("--epoch", "51")


def test_their_published_weights_are_translated_by_their_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = UNetGenerator("junyanz", ngf=4, num_downs=7)
    Path("checkpoints/sat2map").mkdir(parents=True)
    torch.save(export_weights(network), "checkpoints/sat2map/latest_net_G.pth")
    write_pairs(Path("data"), 2)
    command = "--dataroot data --name sat2map --model pix2pix --netG unet_128 --phase train --gpu_ids -1"
    translate.main([*command.split(), "--no_dropout", "--num_test", "1"])
    out = capsys.readouterr().out
    assert "1 pairs, translating the left half" in out and "its own statistics, without dropout" in out
    results = tmp_path / "results" / "sat2map" / "train_latest"
    assert [path.name for path in (results / "generated").iterdir()] == ["0.png"]
    made = np.asarray(Image.open(results / "generated" / "0.png"))
    assert made.shape == (128, 128, 3), "resized to the training's size, as their test.py does"
    source = torch.from_numpy(np.asarray(Image.open(results / "input" / "0.png")).copy())
    for up in network.ups:
        up.epilogue.config = up.epilogue.config._replace(dropout=0.0)
    with torch.no_grad():
        expected = network((source.permute(2, 0, 1)[None] / 127.5 - 1).float())[0].permute(1, 2, 0)
    assert np.abs((expected.numpy() + 1) * 127.5 - made).max() <= 1


def test_going_on_with_weights_of_theirs_says_how_to_begin_with_them(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latest_net_G.pth").touch()
    with pytest.raises(SystemExit):
        train.main(
            ["--checkpoints_dir", str(tmp_path), "--name", "a", "--model", "pix2pix", "--continue_train"]
        )
    assert f"by --init_from {tmp_path / 'a' / 'latest_net_G.pth'} and another" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what their flags do here


@pytest.mark.parametrize("policy", ["step", "cosine"])
def test_learning_rates_are_those_of_torch_schedulers(policy):
    """Theirs steps a scheduler of torch once an epoch."""
    config = TrainConfig(
        preset="junyanz", lr_policy=policy, lr_decay_iters=3, n_epochs=6, n_epochs_decay=4, lr=0.1
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = StepLR(optimizer, 3, 0.1) if policy == "step" else CosineAnnealingLR(optimizer, 6, 0)
    for epoch in range(10):
        expected = optimizer.param_groups[0]["lr"]
        assert config.lr_at(epoch) == pytest.approx(expected, abs=1e-12), epoch
        optimizer.step()
        scheduler.step()


def test_cosine_wants_epochs():
    with pytest.raises(UserError, match="--lr_policy cosine needs a length in epochs"):
        TrainConfig(lr_policy="cosine")
    assert TrainConfig(lr_policy="step", lr_decay_iters=1).lr_at(2) == pytest.approx(2e-6)


@pytest.mark.parametrize("init_type", ["normal", "xavier", "kaiming", "orthogonal"])
def test_weights_are_drawn_as_asked(init_type):
    options = NetworkOptions("junyanz", "unet_32", 8, 8, init_type=init_type, init_gain=0.3)
    for network in build_networks(options):
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.weight.numel() > 3000:
                out, other = layer.weight.shape[0] * 16, layer.weight.shape[1] * 16
                weight = layer.weight.detach().flatten(1)
                expected = {
                    "normal": 0.3,
                    "xavier": 0.3 * math.sqrt(2 / (out + other)),
                    "kaiming": math.sqrt(2 / other),
                    "orthogonal": 0.3 / math.sqrt(weight.shape[1]),
                }[init_type]
                assert weight.std().item() == pytest.approx(expected, rel=0.08)
                if init_type == "orthogonal":
                    assert torch.allclose(weight @ weight.T, 0.09 * torch.eye(len(weight)), atol=1e-5)
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.bias is not None:
                assert not layer.bias.any()
    gammas = [x.weight for x in build_networks(options)[0].modules() if isinstance(x, Epilogue) and
              x.weight is not None]  # fmt: skip
    assert torch.cat(gammas).std().item() == pytest.approx(0.3, rel=0.2)
    tutorial = build_networks(NetworkOptions("tutorial", "unet_32", 8, 8, init_type=init_type, init_gain=0.3))
    assert all((x.weight == 1).all() for x in tutorial[0].modules() if isinstance(x, Epilogue) and
               x.weight is not None)  # fmt: skip


def test_serial_batches_come_in_order_and_no_more_than_asked_for(tmp_path):
    root = write_pairs(tmp_path / "pairs", 12)
    options = LoaderOptions(
        load_size=32, crop_size=32, loader="portable", num_threads=1, shuffle=False, max_dataset_size=11
    )
    loader = open_loader(root, options)
    stream = loader.stream()
    names = [next(stream).names[0] for _ in range(22)]
    loader.close()
    assert names == [*map(str, range(11))] * 2 and len(loader) == 11


def test_without_a_resize_pixels_are_those_of_the_file(tmp_path):
    from fastpix2pix.train import sized_by_data

    root = write_pairs(tmp_path / "pairs", 2)
    cropped = sized_by_data(TrainConfig(preprocess="crop", netG="unet_32", crop_size=32, n_layers_D=2), root)
    assert (cropped.load_size, cropped.crop_size) == (32, 32)
    whole = sized_by_data(TrainConfig(preprocess="none", netG="unet_32", n_layers_D=2), root)
    assert (whole.load_size, whole.crop_size) == (32, 32)
    options = dataclasses.replace(whole.loader_options(), loader="portable", shuffle=False, flip=False)
    loader = open_loader(root, options)
    batch = next(loader.stream())
    loader.close()
    file = np.asarray(Image.open(root / "train" / "0.png"))[:, 32:]
    assert np.array_equal(((batch.source[0].permute(1, 2, 0) + 1) * 127.5).round().numpy(), file)
    with pytest.raises(
        UserError, match="holds 32x32 pixels; without a resize they must be of --crop_size 64"
    ):
        sized_by_data(TrainConfig(preprocess="crop", netG="unet_64", crop_size=64), root)
    Image.new("RGB", (80, 32)).save(root / "train" / "1.png")
    with pytest.raises(UserError, match="1.png holds 40x32 pixels; without a resize they must be squares"):
        sized_by_data(TrainConfig(preprocess="none", netG="unet_32"), root)


TRAINED = {
    "--model pix2pix --direction BtoA --niter 1 --niter_decay 1 --save_epoch_freq 1 --display_id -1": [3, 6],
    "--model pix2pix --n_epochs 2 --n_epochs_decay 0 --lr_policy cosine --no_html --gpu_ids -1": [6],
    "--steps 2 --lr_policy step --lr_decay_iters 1 --serial_batches --max_dataset_size 2 --verbose": [2],
    "--steps 1 --preprocess none --init_type xavier --init_gain 0.1 --suffix {preprocess}": [1],
    "--steps 1 --preprocess crop --norm instance --netD basic --pool_size 0 --input_nc 3": [1],
}


@pytest.mark.parametrize("flags", TRAINED)
def test_commands_of_theirs_train(tmp_path, flags):
    root = write_pairs(tmp_path / "pairs")
    where = ["--dataroot", str(root), "--checkpoints_dir", str(tmp_path), "--name", "run"]
    train.main([*SMALL, *where, *flags.split()])
    folder = tmp_path / ("run_none" if "suffix" in flags else "run")
    assert steps_saved(folder) == TRAINED[flags]
    config = checkpoint.load(checkpoint.latest(folder))["config"]
    assert config["preset"] == ("junyanz" if "--model" in flags else "tutorial")
    if "--niter" in flags:
        train.main(
            [*where, *["--model", "pix2pix", "--continue_train", "--epoch_count", "3", "--n_epochs", "3"]]
        )
        assert steps_saved(folder) == [6, 9, 12]

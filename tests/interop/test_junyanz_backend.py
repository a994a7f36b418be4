"""Programs of pytorch-CycleGAN-and-pix2pix on our backend and on their own: the miniature runs both ways."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_graph import FakeGraphBackend, static_tensors
from ranks import Ranks
from torch import nn

from fastpix2pix.errors import UserError
from fastpix2pix.interop.junyanz import __main__ as command
from fastpix2pix.interop.junyanz import backend
from fastpix2pix.kernels import cpu_conv
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.training.graph import CapturedStep

# The form of 2020 steps its schedulers at the start of an epoch.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")

REPOSITORY = Path(__file__).parent / "junyanz_miniature"
SMALL = ["--netG", "unet_128", "--crop_size", "128", "--ngf", "4", "--ndf", "4"]
ACCELERATED = "fastpix2pix: netG and netD run accelerated on cpu"
NAMES = ("G_GAN", "G_L1", "D_real", "D_fake")


@pytest.fixture
def program(monkeypatch, tmp_path, capsys):
    """Function that runs a script of the miniature in this process; gives its model and what it printed."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in ("models", "options")]:
            del sys.modules[name]

    def run(*flags, script="train.py", ours=True, form="2020", change=None, precision=None):
        forget()
        monkeypatch.setenv("MINIATURE_FORM", form)
        monkeypatch.syspath_prepend(REPOSITORY)
        argv = [str(REPOSITORY / script), "--checkpoints_dir", str(tmp_path), *SMALL, *flags]
        monkeypatch.setattr(sys, "argv", argv)
        if change is not None:
            change()
        if ours:
            backend.install(precision)
        capsys.readouterr()
        model = runpy.run_path(argv[0], run_name="__main__")["model"]
        return model, capsys.readouterr().out

    yield run
    forget()


def losses(output):
    rows = [
        re.findall(r"(\w+) (-?\d+\.\d+)", line) for line in output.splitlines() if line.startswith("losses")
    ]
    assert rows and all(tuple(name for name, _ in row) == NAMES for row in rows)
    return torch.tensor([[float(value) for _, value in row] for row in rows], dtype=torch.float64)


def saved(folder):
    return {name: torch.load(folder / f"latest_net_{name}.pth", weights_only=True) for name in "GD"}


@pytest.fixture
def float64():
    """Everything in float64: what differs between two backends is then a mistake, not rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


RUNS = {
    "2020": ["--no_dropout"],
    "2025": ["--no_dropout"],
    "lsgan": ["--no_dropout", "--gan_mode", "lsgan", "--beta1", "0.7", "--lambda_L1", "10"],
    "instance": ["--no_dropout", "--norm", "instance", "--init_type", "xavier"],
    "n_layers": ["--no_dropout", "--netD", "n_layers", "--n_layers_D", "2", "--direction", "BtoA"],
}


@pytest.mark.parametrize("run", RUNS)
def test_training_equals_their_own(program, tmp_path, float64, run):
    """Six steps at three learning rates from one seed: losses, printed lines, and the files at the end."""
    form = run if run in ("2020", "2025") else "2020"
    flags = [*RUNS[run], "--n_epochs_decay", "2", "--lr", "0.002"]
    theirs, expected_output = program(*flags, "--name", "theirs", ours=False, form=form)
    random_state = torch.get_rng_state()
    ours, output = program(*flags, "--name", "ours", form=form)
    assert torch.equal(torch.get_rng_state(), random_state)

    printed = [line for line in output.splitlines() if not line.startswith(("losses", "fastpix2pix"))]
    assert printed == [line for line in expected_output.splitlines() if not line.startswith("losses")]
    assert [line for line in output.splitlines() if line.startswith("fastpix2pix")] == [ACCELERATED]
    torch.testing.assert_close(losses(output), losses(expected_output), rtol=1e-6, atol=0)

    assert isinstance(ours.netG, UNetGenerator) and isinstance(ours.netD, PatchDiscriminator)
    files, expected_files = saved(tmp_path / "ours"), saved(tmp_path / "theirs")
    for name in "GD":
        assert list(files[name]) == list(expected_files[name])
        for key, value in expected_files[name].items():
            assert files[name][key].dtype == value.dtype
            torch.testing.assert_close(files[name][key], value, rtol=1e-5, atol=1e-7, msg=f"{name} {key}")
    for name, image in theirs.get_current_visuals().items():
        torch.testing.assert_close(ours.get_current_visuals()[name], image.detach(), rtol=1e-5, atol=1e-6)


def test_two_processes_equal_their_own(program, tmp_path, float64):
    """Under torchrun, in the form of 2025: their DistributedDataParallel, and our exchange."""
    flags = ["--no_dropout", "--lr", "0.002"]
    rows = {}
    for name, ours in (("theirs", False), ("ours", True)):
        (tmp_path / name).mkdir()

        def work(rank, name=name, ours=ours):
            program(*flags, "--name", name, ours=ours, form="2025")

        run = Ranks(2, work, folder=tmp_path / name)
        assert run.wait() == [0, 0], run.said()
        outputs = run.said("out")
        rows[name] = [losses(output) for output in outputs]
    assert all(ACCELERATED in output for output in outputs)
    torch.testing.assert_close(rows["ours"][0], rows["ours"][1], rtol=0, atol=0)
    torch.testing.assert_close(rows["ours"][0], torch.stack(rows["theirs"]).mean(0), rtol=1e-6, atol=1e-7)
    files, expected_files = saved(tmp_path / "ours"), saved(tmp_path / "theirs")
    for name in "GD":
        for key, value in expected_files[name].items():
            torch.testing.assert_close(files[name][key], value, rtol=1e-5, atol=1e-7, msg=f"{name} {key}")


def test_what_keeps_one_process_from_it_keeps_both(program, tmp_path, monkeypatch):
    """Else each would wait for another exchange."""

    def work(rank):
        if rank == 1:
            monkeypatch.setattr(backend, "_differ", lambda *networks: True)
        program("--no_dropout", form="2025")

    run = Ranks(2, work, folder=tmp_path)
    assert run.wait() == [0, 0], run.said()
    first, second = run.said("out")
    assert "fastpix2pix: what another process runs is not accelerated" in first
    assert "netG, whose results are not those of the published one, is not accelerated" in second


def test_16_bits_in_two_processes_are_left_to_them(program, tmp_path):
    def work(rank):
        program("--no_dropout", precision="bf16", form="2025")

    run = Ranks(2, work, folder=tmp_path)
    assert run.wait() == [0, 0], run.said()
    assert "fastpix2pix: --precision bf16 in several processes is not accelerated" in run.said("out")[0]


def test_float32_training_equals_their_own_to_rounding(program):
    expected = losses(program("--no_dropout", "--lr", "1e-5", ours=False)[1])
    torch.testing.assert_close(
        losses(program("--no_dropout", "--lr", "1e-5")[1]), expected, rtol=1e-4, atol=0
    )


def test_dropout_follows_torch_seed(program):
    (first, first_output), (_, second_output) = program(), program()
    assert torch.equal(losses(first_output), losses(second_output))
    assert first.netG.rng.tolist() == [1234, 4]  # torch's seed, and a new mask in each of the four steps
    without = losses(program("--no_dropout")[1])
    assert not torch.allclose(losses(first_output)[0, 1], without[0, 1], rtol=1e-6)


def test_16_bits_keep_float32_files_and_images(program, tmp_path):
    flags = ("--no_dropout", "--lr", "1e-5")
    expected = losses(program(*flags)[1])
    model, output = program(*flags, precision="bf16")
    assert model.netG.downs[1].conv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(losses(output), expected, rtol=0.05, atol=0)
    assert not torch.allclose(losses(output), expected, rtol=1e-5, atol=0)

    key = "model.model.1.model.1.weight"
    files = saved(tmp_path / "experiment_name")
    assert files["G"][key].dtype == torch.float32
    assert not torch.equal(files["G"][key], files["G"][key].bfloat16())  # the masters have more digits
    model.train_step.set_lr(1e-3)  # its schedule has ended at 0
    model.optimize_parameters()
    assert model.fake_B.dtype == torch.float32
    model.load_networks("latest")
    model.save_networks("latest")
    for name, tensors in saved(tmp_path / "experiment_name").items():
        for part, value in tensors.items():
            assert part.endswith("num_batches_tracked") or torch.equal(value, files[name][part]), part

    model.test()
    images = model.get_current_visuals()
    assert {image.dtype for image in images.values()} == {torch.float32}
    assert images["fake_B"].abs().max() > 0


def test_a_captured_step_behind_their_interface(program, tmp_path, monkeypatch, float64):
    """As on a GPU, with a fake graph in the place of its own: nothing that they read is overwritten."""
    start_training = backend.AcceleratedPix2Pix._start_training

    def captured(self, *args):
        start_training(self, *args)
        self.run_step = CapturedStep(
            self.train_step, FakeGraphBackend(lambda: static_tensors(self.train_step))
        )

    monkeypatch.setattr(cpu_conv, "find_tiling", lambda *_: None)
    expected = losses(program("--name", "eager")[1])
    monkeypatch.setattr(backend.AcceleratedPix2Pix, "_start_training", captured)
    model, output = program("--name", "captured")
    torch.testing.assert_close(losses(output), expected, rtol=1e-6, atol=0)
    assert len(model.run_step._backend.tapes) == 1

    image = model.fake_B
    before = image.clone()
    model.train_step.set_lr(1e-3)
    model.optimize_parameters()
    assert torch.equal(image, before) and not torch.equal(model.fake_B, before)
    files, expected_files = saved(tmp_path / "captured"), saved(tmp_path / "eager")
    for name in "GD":
        for key, value in expected_files[name].items():
            torch.testing.assert_close(files[name][key], value, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("form", ("2020", "2025"))
@pytest.mark.parametrize("flags", ((), ("--eval",)))
def test_test_program(program, tmp_path, form, flags):
    """``test.py`` loads what either backend saved and gives one image on both."""
    program("--no_dropout", form=form)
    images = []
    for ours in (True, False):
        model, output = program("--no_dropout", *flags, script="test.py", ours=ours, form=form)
        assert ("fastpix2pix: netG run accelerated on cpu" in output) == ours
        assert isinstance(model.netG, UNetGenerator) == ours
        images.append(torch.load(tmp_path / "experiment_name" / "visuals.pt", weights_only=True))
    for name, image in images[1].items():
        torch.testing.assert_close(images[0][name], image, rtol=1e-4, atol=1e-5)


def test_continued_training(program, tmp_path, float64):
    """``--continue_train`` on our backend goes on from files of theirs, as theirs does."""
    program("--no_dropout", ours=False)
    for name in "GD":
        file = tmp_path / "experiment_name" / f"latest_net_{name}.pth"
        file.with_name(f"1_net_{name}.pth").write_bytes(file.read_bytes())
    flags = ("--no_dropout", "--continue_train", "--epoch", "1")
    expected = program(*flags, ours=False)[1]
    output = program(*flags)[1]
    torch.testing.assert_close(losses(output), losses(expected), rtol=1e-6, atol=0)
    assert "loading the model from" in output


def test_networks_can_be_loaded_during_training(program, tmp_path):
    model, _ = program("--no_dropout")
    model.train_step.set_lr(1e-3)  # its schedule has ended at 0
    model.optimize_parameters()
    expected = saved(tmp_path / "experiment_name")
    model.load_networks("latest")
    model.save_networks("latest")
    files = saved(tmp_path / "experiment_name")
    for name, tensors in expected.items():
        for key, value in tensors.items():
            if key.endswith("num_batches_tracked"):  # the counts of the file, and the step that it never saw
                value = value + {"G": 1, "D": 3}[name]
            assert torch.equal(files[name][key], value), key


def changed_layers(network, kind, attribute, value):
    """A fork that gives all layers of one kind in one of the networks another setting."""

    def change():
        networks = sys.modules["models.networks"]
        published = networks.init_net

        def init_net(net, *args):
            for layer in net.modules():
                if type(net).__name__ == network and isinstance(layer, kind):
                    setattr(layer, attribute, value)
            return published(net, *args)

        networks.init_net = init_net

    return change


def other_optimizer():
    published = torch.optim.Adam
    module = sys.modules["models.pix2pix_model"]
    init = module.Pix2PixModel.__init__

    def changed(self, opt):
        init(self, opt)
        self.optimizers[1] = self.optimizer_D = published(self.netD.parameters(), lr=4 * opt.lr)

    module.Pix2PixModel.__init__ = changed


def more_l1():
    module = sys.modules["models.pix2pix_model"]

    def backward_G(self):  # noqa: N802
        pred_fake = self.netD(torch.cat((self.real_A, self.fake_B), 1))
        self.loss_G_GAN = self.criterionGAN(pred_fake, True)
        self.loss_G_L1 = self.criterionL1(self.fake_B, self.real_B) * self.opt.lambda_L1 * 1.5
        self.loss_G = self.loss_G_GAN + self.loss_G_L1
        self.loss_G.backward()

    module.Pix2PixModel.backward_G = backward_G


OTHER_NET_G = "netG, whose results are not those of the published one,"
OTHER_NET_D = OTHER_NET_G.replace("netG", "netD")
NOT_ACCELERATED = {
    "model": (["--model", "template"], None, "--model template"),
    "resnet": (["--netG", "resnet_9blocks"], None, "--netG resnet_9blocks"),
    "wgangp": (["--gan_mode", "wgangp"], None, "--gan_mode wgangp"),
    "other_loss": (["--model", "own_loss"], None, "the backward_G of this OwnLossModel"),
    "other_number": ([], more_l1, "the backward_G of this Pix2PixModel"),
    "optimizer": ([], other_optimizer, "an optimizer other than the published Adam"),
    "slope": ([], changed_layers("Unet", nn.LeakyReLU, "negative_slope", 0.1), OTHER_NET_G),
    "dropout": ([], changed_layers("Unet", nn.Dropout, "p", 0.3), OTHER_NET_G),
    "momentum": ([], changed_layers("Unet", nn.BatchNorm2d, "momentum", 0.01), OTHER_NET_G),
    "discriminator": ([], changed_layers("PatchGAN", nn.LeakyReLU, "negative_slope", 0.1), OTHER_NET_D),
}


@pytest.mark.parametrize("case", NOT_ACCELERATED)
def test_what_is_not_accelerated_says_so_and_runs_as_theirs(program, case):
    flags, change, reason = NOT_ACCELERATED[case]

    def import_and_change():
        importlib.import_module("models.pix2pix_model")
        if change is not None:
            change()

    expected = losses(program(*flags, ours=False, change=import_and_change)[1])
    model, output = program(*flags, change=import_and_change)
    (line,) = [line for line in output.splitlines() if line.startswith("fastpix2pix")]
    assert line.startswith(f"fastpix2pix: {reason}")
    assert line.endswith("is not accelerated; running this repository's own code")
    assert not isinstance(model.netG, UNetGenerator)
    assert torch.equal(losses(output), expected)


def test_networks_of_a_fork_are_left_alone(program):
    def wider_last_layer():
        networks = importlib.import_module("models.networks")
        networks.PatchGAN = lambda input_nc, *rest: nn.Sequential(nn.Conv2d(input_nc, 1, 4, 2, 1))

    assert "fastpix2pix: netD, which is not the published one," in program(change=wider_last_layer)[1]


def test_command_runs_their_script(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastpix2pix.interop.junyanz",
        "train.py",
        *SMALL,
        "--n_epochs_decay",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--checkpoints_dir", str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.count(ACCELERATED) == 1
    assert len(losses(result.stdout)) == 2
    assert set(saved(tmp_path / "experiment_name")) == {"G", "D"}


def test_a_missing_program_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="trian.py is not a file; give train.py or test.py"):
        command.main(["trian.py"])
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="models/pix2pix_model.py is not on sys.path"):
        backend.install()


def test_a_device_that_computes_wrong_runs_their_own_code(program, tmp_path, monkeypatch):
    """Where even our plain step disagrees with its reference, the step is theirs, and a line says why."""

    def disagrees(*networks, **options):
        raise UserError("this GPU does not compute what the CPU does")

    expected = losses(program("--no_dropout", ours=False)[1])
    monkeypatch.setattr(backend, "prepare_step", disagrees)
    model, output = program("--no_dropout")
    assert (
        "training on this device (this GPU does not compute what the CPU does) is not accelerated" in output
    )
    assert not model.taken_over and not isinstance(model.netG, UNetGenerator)
    assert torch.equal(losses(output), expected)

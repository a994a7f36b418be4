"""The doctor and the self-check on a machine without a GPU."""

import dataclasses

import pytest
import torch

from fastpix2pix import doctor, selfcheck
from fastpix2pix.config import TrainConfig
from fastpix2pix.kernels import launch, reference

CPU = torch.device("cpu")
SMALL = TrainConfig(netG="unet_32", crop_size=32, load_size=32, ngf=8, ndf=8, precision="fp32")


def test_doctor_prints_a_line_a_check_and_names_the_failures(monkeypatch, capsys):
    checks = {
        "good": lambda device: f"ran on {device}",
        "absent": lambda device: (_ for _ in ()).throw(doctor.Skipped("no NVIDIA GPU")),
        "broken": lambda device: torch.empty(2, 3) @ torch.empty(2, 3),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    with pytest.raises(doctor.UserError, match="failed: broken;"):
        doctor.examine(doctor.DoctorConfig(device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["PASS", "good", "ran", "on", "cpu"]
    assert lines[1].split() == ["SKIP", "absent", "no", "NVIDIA", "GPU"]
    assert lines[2].startswith("FAIL  broken") and "RuntimeError" in lines[2]


def test_dropout_check_sees_a_mask_that_does_not_change(monkeypatch):
    assert "two masks" in doctor.dropout_advances(CPU)
    frozen = reference.dropout_mask
    monkeypatch.setattr(
        reference,
        "dropout_mask",
        lambda x, p, rng, layer: frozen(x, p, torch.zeros_like(rng), layer),
    )
    with pytest.raises(AssertionError, match="dropped the same values"):
        doctor.dropout_advances(CPU)


def test_loaders_check():
    pytest.importorskip("nvidia.dali")
    assert "the same samples" in doctor.loaders_agree(CPU)


def test_self_check_sees_a_wrong_step(monkeypatch):
    """Here both sides run on the CPU: they agree exactly, until one of them computes something else."""
    assert selfcheck.disagreement(SMALL, CPU) == 0
    bf16 = selfcheck.disagreement(dataclasses.replace(SMALL, precision="bf16"), CPU)
    assert 0 < bf16 < selfcheck.TOLERANCE["bf16"]
    wrong = selfcheck.TrainStep._losses
    calls = []

    def every_fourth(self, gen, l1, disc, real, fake):
        calls.append(1)
        return wrong(self, gen, l1 * (1.01 if len(calls) % 4 == 0 else 1.0), disc, real, fake)

    monkeypatch.setattr(selfcheck.TrainStep, "_losses", every_fourth)
    assert selfcheck.disagreement(SMALL, CPU) == pytest.approx(0.01, rel=0.1)


def test_a_step_that_disagrees_is_not_trusted(monkeypatch):
    monkeypatch.setattr(launch, "kernels_on_gpu", True)
    asked = []

    def differs_with_a_graph(config, device):
        asked.append(config.no_graph)
        return 0.0 if config.no_graph else 1.0

    monkeypatch.setattr(selfcheck, "disagreement", differs_with_a_graph)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        assert selfcheck.verify_or_fall_back(SMALL, CPU).no_graph
    assert launch.kernels_on_gpu and asked == [False, True]

    monkeypatch.setattr(selfcheck, "disagreement", lambda config, device: float("inf"))
    with pytest.warns(RuntimeWarning, match="without CUDA graph and Triton kernels"):
        selfcheck.verify_or_fall_back(SMALL, CPU)
    assert not launch.kernels_on_gpu

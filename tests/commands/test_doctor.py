"""The doctor on a machine without a GPU."""

import pytest
import torch

from fastpix2pix import doctor
from fastpix2pix.kernels import cpu_norm, reference

CPU = torch.device("cpu")


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
    draw = reference.dropout_mask

    def frozen(x, p, rng, layer):
        return draw(x, p, torch.zeros_like(rng), layer)

    for module in (reference, cpu_norm):
        monkeypatch.setattr(module, "dropout_mask", frozen)
    with pytest.raises(AssertionError, match="dropped the same values"):
        doctor.dropout_advances(CPU)


def test_loaders_check():
    pytest.importorskip("nvidia.dali")
    assert "the same samples" in doctor.loaders_agree(CPU)

"""The type that is chosen where none is asked for."""

import pytest
import torch

from fastpix2pix.errors import UserError
from fastpix2pix.training.precision import choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("instructions", "convolutions", "precision"),
    [(True, True, "bf16"), (True, False, "fp32"), (False, True, "fp32"), (False, False, "fp32")],
)
def test_a_cpu_s_precision_follows_from_what_it_has_and_is_the_same_every_time(
    monkeypatch, instructions, convolutions, precision
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: convolutions)
    assert {choose_precision(None, CPU) for _ in range(5)} == {precision}


def test_choosing_measures_nothing(monkeypatch):
    """Whatever runs beside it: no convolution is timed, on a CPU that could do it in bf16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *_, **__: pytest.fail("measures"))
    choose_precision(None, CPU)


def test_what_is_asked_for_is_taken_or_refused():
    for precision in ("fp32", "bf16", "fp16"):
        assert choose_precision(precision, CPU) == precision
    with pytest.raises(UserError, match="--precision tf32 needs an NVIDIA GPU; on cpu use fp32"):
        choose_precision("tf32", CPU)

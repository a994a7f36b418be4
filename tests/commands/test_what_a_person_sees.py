"""The lines of a training and of a mistyped command."""

import re

import pytest
import torch
from tiny_run import error_line

from fastpix2pix import monitor, translate
from fastpix2pix.monitor import Monitor


class Arrived:
    """Losses that have come over from the device."""

    def __init__(self, *losses: float):
        self.losses = torch.tensor([losses])

    def wait(self) -> torch.Tensor:
        return self.losses


@pytest.mark.parametrize(
    "losses", [(98.76, 2.05, 0.123, 0.456, 0.2, 0.2), (1234.5, 12.345, 1.98765, 10.25, 5.0, 5.0)]
)
def test_the_progress_line_fits_80_columns(tmp_path, losses):
    shown = Monitor(
        tmp_path, first_step=0, total_steps=1_000_000, batch_size=1, gan_mode="vanilla", samples=[]
    )
    shown.bar.update(123_456)
    shown._show_losses(123_456, 2e-4, 1234.5, 1.0, Arrived(*losses))
    values = {**shown.bar.format_dict, "ncols": None, "elapsed": 43_200.0}
    line = shown.bar.format_meter(**values)
    shown.close()
    assert len(line) <= 80
    found = r"123456/1000000 85:12:02 left, G \S+ L1 \S+ D \S+, 1234 img/s, 100% waiting"
    assert re.fullmatch(found, line)


def test_the_first_losses_come_after_ten_steps(run, monkeypatch):
    seen = []
    show = Monitor._show_losses

    def note(self, step, *rest):
        seen.append((step, self.bar.n))
        show(self, step, *rest)

    monkeypatch.setattr(Monitor, "_show_losses", note)
    run("--steps", 11)
    assert seen == [(10, 10), (11, 11)]


def test_a_first_sample_is_drawn_in_time_on_a_slow_machine(run, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "FIRST_SAMPLE", -1.0)  # it is late already
    run("--steps", 4, "--display_freq", 3)
    assert [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())] == [
        f"step_{step:08d}.png" for step in (1, 3, 4)
    ]


def test_the_start_line_says_what_was_resolved(run):
    _, out, _ = run("--steps", 1)
    (line,) = [line for line in out.splitlines() if " pairs from " in line]
    threads = torch.get_num_threads()
    for part in (
        "portable loader, 1 threads",
        "BtoA: the right half is the input",
        "on cpu",
        "fp32",
        f"{threads} threads",
    ):
        assert part in line


MISTYPED = {
    "--stpes 5": "Unrecognized options: --stpes, 5; did you mean --steps?",
    "--lambda_l1 5": "Unrecognized options: --lambda_l1, 5; did you mean --lambda_L1?",
    "--steps ten": "--steps: no type matching {None}|INT could be instantiated from ['ten']",
    "--preset other": "invalid choice 'other' for argument '--preset'. Expected one of ('tutorial'",
    "--ngf": "Missing value for argument '--ngf'",
    "5": "Unrecognized options: 5",
}


@pytest.mark.parametrize("flags", MISTYPED)
def test_a_mistyped_command_is_one_line_with_the_command_that_helps(run, flags):
    code, _, err = run(*flags.split())
    assert code == 2
    line = error_line(err)
    assert len(err.strip().splitlines()) == 1
    assert MISTYPED[flags] in line and line.endswith("; see python -m fastpix2pix.train --help")


def test_a_flag_that_is_missing_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        translate.main(["--run", "r", "--output", "o"])
    assert stop.value.code == 2
    line = error_line(capsys.readouterr().err)
    assert "--input" in line and line.endswith("; see python -m fastpix2pix.translate --help")


def test_help_is_printed_and_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        translate.main(["--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and "--input" in out and err == ""
    assert "python -m fastpix2pix.translate" in out

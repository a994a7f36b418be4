"""The run's report: its numbers against TensorBoard's own reader, its drawing against its own axis labels."""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from fastpix2pix import environment, report
from fastpix2pix.config import TrainConfig
from fastpix2pix.errors import UserError
from fastpix2pix.history import read_history

TAGS = ("gen_total_loss", "gen_gan_loss", "gen_l1_loss", "disc_loss")


def write_events(folder, steps, value=lambda tag, step: step + len(tag) / 100, **options):
    with SummaryWriter(str(folder), **options) as writer:
        for step in steps:
            for tag in TAGS:
                writer.add_scalar(tag, value(tag, step), step)
    (file,) = [path for path in folder.iterdir() if path.stat().st_mtime_ns == newest(folder)]
    return file


def newest(folder):
    return max(path.stat().st_mtime_ns for path in folder.iterdir())


@pytest.fixture
def run(tmp_path):
    """A run folder without steps, named to be a nuisance."""
    folder = tmp_path / "run <b>ü"
    (folder / "events").mkdir(parents=True)
    (folder / "config.json").write_text(TrainConfig(name="run <b>ü", ngf=8, steps=500).to_json())
    return folder


def test_history_is_what_tensorboard_reads(run):
    events = run / "events"
    write_events(events, range(1, 301), lambda tag, step: math.sin(step) / len(tag))
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
    accumulator.Reload()
    history = read_history(events)
    for tag in TAGS:
        assert history.steps[tag] == [point.step for point in accumulator.Scalars(tag)]
        assert history.values[tag] == [point.value for point in accumulator.Scalars(tag)]
    assert len(history.steps["disc_loss"]) == 300


def test_continued_run_replaces_what_it_did_again(run):
    events = run / "events"
    write_events(events, range(1, 31), lambda tag, step: 1.0).rename(events / "events.out.tfevents.1.a")
    write_events(events, range(21, 26), lambda tag, step: 2.0, purge_step=21).rename(
        events / "events.out.tfevents.2.a"
    )
    history = read_history(events)
    assert history.steps["disc_loss"] == [*range(1, 26)]
    assert history.values["disc_loss"] == [1.0] * 20 + [2.0] * 5


@pytest.mark.parametrize("missing", [1, 3, 4, 5, 17, 40, 60])
def test_record_that_is_being_written_is_left_out(run, missing):
    file = write_events(run / "events", range(1, 11))
    file.write_bytes(file.read_bytes()[:-missing])
    steps = read_history(run / "events").steps["disc_loss"]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) in (8, 9)


def test_page_says_health_progress_and_what_differs_from_the_defaults(run):
    with SummaryWriter(str(run / "events")) as writer:
        for step in (1, 2):
            writer.add_scalar("gen_total_loss", 3.0, step)
            writer.add_scalar("train/images_per_second", 123.456 * step, step)
            writer.add_scalar("train/data_wait_share", 0.07, step)
            writer.add_text("gan_health", f"reading {step} < 3", step)
    page = report.write_report(run).read_text(encoding="utf-8")
    assert page.count("run &lt;b&gt;ü") == 3 and "<b>" not in page  # title, heading, option
    assert "reading 2 &lt; 3" in page and "reading 1" not in page
    for tile in ("2 of 500", "247", "7%"):
        assert f"<dd>{tile}</dd>" in page
    changed = re.findall(r"<div class=changed><dt>(\w+)</dt>", page)
    assert changed == ["name", "ngf", "steps"]


def figures(page: str) -> dict[str, str]:
    return {
        re.search(r"<code>(\w+)</code>", svg)[1]: svg
        for svg in re.findall(r"<figure>.*?</figure>", page, re.S)
    }


def axis(svg: str) -> tuple[dict[str, float], dict[str, float]]:
    """Positions of the labels of the y axis and of the x axis, as drawn."""
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(end|middle)">(.*?)</text>', svg)
    vertical = {label: float(y) - 4 for x, y, anchor, label in labels if anchor == "end"}
    return vertical, {label: float(x) for x, y, anchor, label in labels if anchor == "middle"}


def test_curve_lies_where_the_axes_say(run):
    write_events(
        run / "events", range(1, 481), lambda tag, step: (0.4 if step <= 200 else 0.8) + 0.2 * (-1) ** step
    )
    svg = figures(report.write_report(run).read_text())["gen_gan_loss"]
    vertical, horizontal = axis(svg)
    curve = [tuple(map(float, p.split(","))) for p in re.search(r'curve" points="(.*?)"', svg)[1].split()]
    assert len(curve) == report.BINS
    for x, y in curve:
        assert y == pytest.approx(vertical["0.4" if x < horizontal["200"] else "0.8"], abs=0.11)
    hundred = horizontal["400"] - horizontal["300"]
    assert curve[-1][0] == pytest.approx(horizontal["400"] + 0.795 * hundred, abs=0.11)
    line = float(re.search(r'<path class="reference" d="M[\d.]+ ([\d.]+)H', svg)[1])
    low, high = vertical["0.4"], vertical["0.8"]
    assert line == pytest.approx(low + (high - low) * (math.log(2) - 0.4) / 0.4, abs=0.11)


@pytest.mark.parametrize(
    ("options", "generator", "discriminator"),
    [
        ({"preset": "tutorial"}, ["log 2 = 0.69"], ["log 2 = 0.69", "undecided = 1.39"]),
        ({"preset": "junyanz"}, ["log 2 = 0.69"], ["log 2 = 0.69"]),
        ({"preset": "junyanz", "gan_mode": "lsgan"}, ["1/4 = 0.25"], ["1/4 = 0.25"]),
    ],
)
def test_reference_lines_follow_the_loss(run, options, generator, discriminator):
    (run / "config.json").write_text(TrainConfig(**options).to_json())
    write_events(run / "events", (1,))
    drawn = figures(report.write_report(run).read_text())
    labels = {tag: re.findall(r'text class="reference".*?>(.*?)</text>', svg) for tag, svg in drawn.items()}
    assert labels["gen_gan_loss"] == generator and labels["disc_loss"] == discriminator
    assert labels["gen_l1_loss"] == labels["gen_total_loss"] == []


def test_bins_of_a_curve():
    steps = np.arange(1, 1001)
    values = np.random.default_rng(0).normal(size=1000)
    centres, low, mean, high = report.bin_curve(steps, values, 100)
    for i in (0, 42, 99):
        part = sorted(values[10 * i : 10 * i + 10])
        assert centres[i] == 10 * i + 5.5 and mean[i] == pytest.approx(sum(part) / 10)
        assert low[i] == pytest.approx(0.1 * part[0] + 0.9 * part[1])
        assert high[i] == pytest.approx(0.9 * part[8] + 0.1 * part[9])
    assert [*report.bin_curve(steps[:3], values[:3], 100)[2]] == [*values[:3]]


@pytest.mark.parametrize("top", [0.003, 0.7277, 1, 1.05, 2, 9.99, 10, 35, 40000, 123456.0])
def test_ticks_are_few_and_round(top):
    marks = report.ticks(top)
    assert (
        4 <= len(marks) <= 11
        and top / (2 * marks[1]) < 4
        and marks[0] == 0
        and marks[-1] <= top < marks[-1] + marks[1]
    )
    assert f"{marks[1]:e}"[0] in "125" and f"{marks[1]:e}"[2:8] == "000000"


def test_samples_in_order_of_their_step(run):
    (run / "samples").mkdir()
    for step in (1000, 20000, 300):
        Image.new("RGB", (6, 9)).save(run / "samples" / f"step_{step:08d}.png")
    (run / "samples" / "step_00030000.png").write_bytes(b"half a pictu")
    page = report.write_report(run).read_text()
    alts = re.findall(r'<img src="data:image/jpeg;base64,.*?" alt="(.*?)" width="6" height="9"', page)
    assert alts == [f"samples at step {step}" for step in (300, 1000, 20000)]
    assert re.findall(r"<figcaption>step (.*?)</figcaption>", page) == ["300", "1,000", "20,000"]


def test_page_is_one_file_that_can_be_sent(run):
    """Pictures are in it, few and small, whatever the folder holds; nothing is fetched from anywhere."""
    (run / "samples").mkdir()
    random = np.random.default_rng(0)
    for step in range(1, 61):
        times = 60 if step == 60 else 24
        blocks = random.integers(0, 256, (24, 18, 3), dtype=np.uint8).repeat(times, 0).repeat(times, 1)
        Image.fromarray(blocks).save(run / "samples" / f"step_{step:08d}.png", compress_level=1)
    page = report.write_report(run).read_text()
    assert not [u for u in re.findall(r'(?:src|href)="(.*?)"', page) if not u.startswith("data:")]
    assert "url(" not in page and "@import" not in page
    steps = [int(step) for step in re.findall(r"<figcaption>step (\d+)</figcaption>", page)]
    assert len(steps) == 24 and steps[0] == 1 and steps[-1] == 60 and set(np.diff(steps)) == {2, 3}
    assert "24 of 60, all are in samples/" in page and len(page) < 8e6
    pictures = [base64.b64decode(code) for code in re.findall(r"image/jpeg;base64,(.*?)\"", page)]
    sizes = [Image.open(io.BytesIO(picture)).size for picture in pictures]
    assert sizes == [(384, 512)] * 23 + [(768, 1024)]
    newest = np.asarray(Image.open(io.BytesIO(pictures[-1]))).astype(float)
    drawn = np.asarray(Image.fromarray(blocks).resize((768, 1024), Image.Resampling.LANCZOS))
    assert np.abs(newest - drawn).mean() < 4


def test_what_was_left_open_is_filled_in(run):
    config = TrainConfig(name="x", ngf=8)
    (run / "config.json").write_text(config.to_json())
    environment.save({"precision": "bf16", "steps": 40000, "direction": "BtoA"}, run)
    write_events(run / "events", (1, 2))
    page = report.write_report(run).read_text()
    assert "<dd>2 of 40,000</dd>" in page
    for name, value in (("steps", 40000), ("precision", "bf16"), ("direction", "BtoA")):
        assert f"<div><dt>{name}</dt><dd>{value} (chosen)</dd></div>" in page, "and not in bold"
    assert re.findall(r"<div class=changed><dt>(\w+)</dt>", page) == ["name", "ngf"]


def test_run_without_a_step_and_constant_zero_loss(run):
    assert "no step yet" in report.write_report(run).read_text()
    write_events(run / "events", (1, 2), lambda tag, step: 0.0)
    assert "nan" not in report.write_report(run).read_text().lower()


@pytest.mark.parametrize("config", [None, "{broken", b"\xff\xfe"])
def test_folder_that_is_no_run(tmp_path, capsys, config):
    if config is not None:
        (tmp_path / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(UserError, match="no readable config.json"):
        report.write_report(tmp_path)
    with pytest.raises(SystemExit) as stop:
        report.main(["--run", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no readable config.json")
    assert not (tmp_path / "report.html").exists()


def test_config_of_another_version_is_shown_as_it_is(run):
    config = json.loads((run / "config.json").read_text()) | {"flux": "9", "preset": "other"}
    (run / "config.json").write_text(json.dumps(config))
    assert "<div><dt>flux</dt><dd>9</dd>" in report.write_report(run).read_text()

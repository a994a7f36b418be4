"""``report.html`` of a run, while it trains and after: loss curves, samples over time, configuration."""

import json
import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fastpix2pix import cli, environment
from fastpix2pix.config import TrainConfig
from fastpix2pix.errors import UserError
from fastpix2pix.history import History, read_history
from fastpix2pix.page import text, write_page
from fastpix2pix.presets import PRESETS


def write_report(run_folder: Path, history: History | None = None) -> Path:
    """Write ``run_folder / "report.html"`` from the run's ``events/``, ``samples/`` and ``config.json``.

    history: what ``events/`` says, of a caller that has it. Reads whatever is there so far, so it can be
    called at any moment of a run, by any process. Raises UserError when ``run_folder`` is no run, or the page
    cannot be written.
    """
    try:
        if not (run_folder / "config.json").is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError
        config = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{run_folder} has no readable config.json; give the folder of a run") from error
    if history is None:
        history = read_history(run_folder / "events")
    name = config.get("name", run_folder.name)
    resolved = environment.read(run_folder) or {}
    body = f"""
<header>
  <h1>{text(name)}</h1>
  <p>{text(history.health)}</p>
  {_tiles(history, config, resolved)}
</header>
<main>
  <section class="charts">{_charts(history, config)}</section>
  <h2>Samples</h2>
  {_samples(run_folder, resolved)}
  <h2>What was asked for</h2>
  {_configuration(config, resolved)}
  <h2>What it ran on</h2>
  {_environment(resolved)}
</main>
"""
    path = run_folder / "report.html"
    write_page(
        path, title=f"{config.get('name', run_folder.name)}: report", style=STYLE, body=body, script=SCRIPT
    )
    return path


# ------------------------------------------------------------------------------------------ page parts


def _tiles(history: History, config: dict, resolved: dict) -> str:
    """The newest readings in large print."""
    steps = history.steps.get("gen_total_loss")
    tiles = {"step": f"{steps[-1]:,}" if steps else "0"}
    total = resolved.get("steps", config.get("steps"))
    if isinstance(total, int):
        tiles["step"] += f" of {total:,}"
    rate, wait = history.last("train/images_per_second"), history.last("train/data_wait_share")
    if rate is not None:
        tiles["images a second"] = f"{rate:.3g}"
    if wait is not None:
        tiles["waiting for data"] = f"{wait:.0%}"
    lr = history.last("train/learning_rate")
    if lr is not None:
        tiles["learning rate"] = f"{lr:.3g}"
    return f'<dl class="tiles">{_terms(tiles)}</dl>'


def _terms(values: dict) -> str:
    return "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in values.items()
    )


def _charts(history: History, config: dict) -> str:
    """The four losses; the players' against the loss of a discriminator that can't tell real from fake."""
    undecided, name = (0.25, "1/4") if config.get("gan_mode") == "lsgan" else (math.log(2), "log 2")
    references = [(undecided, f"{name} = {undecided:.2f}")]
    # The tutorial's discriminator loss is the sum of both halves, which log 2 is not the undecided value of.
    preset = PRESETS.get(str(config.get("preset")))
    doubled = preset is not None and preset.update.disc_factor == 1
    both = [(2 * undecided, f"undecided = {2 * undecided:.2f}")] if doubled else []
    return (
        _chart(history, "gen_gan_loss", "Generator, GAN term", references)
        + _chart(history, "disc_loss", "Discriminator, real and fake", references + both)
        + _chart(history, "gen_l1_loss", "Generator, L1 term before its weight", [])
        + _chart(history, "gen_total_loss", "Generator, total", [])
    )


WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 26  # margins of the plot, where the labels are
BINS = 240


def _chart(history: History, tag: str, title: str, references: Sequence[tuple[float, str]]) -> str:
    """One curve as SVG: the mean over bins of steps, and the band between the 10th and 90th percentile."""
    steps, values = np.array(history.steps.get(tag, [])), np.array(history.values.get(tag, []))
    caption = f"<figcaption>{text(title)} <code>{text(tag)}</code></figcaption>"
    if not len(steps):
        return f"<figure>{caption}<p>no step yet</p></figure>"
    centres, low, mean, high = bin_curve(steps, values, BINS)
    top = 1.05 * max([high.max(), *(value for value, _ in references)], default=1.0) or 1.0
    last, right = max(steps[-1], 1), WIDTH - RIGHT

    def x(step):
        return LEFT + (right - LEFT) * step / last

    def y(value):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    def path(xs, ys):
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(xs), y(ys), strict=True))

    grid = "".join(
        f'<path class="grid" d="M{LEFT} {y(value):.1f}H{right}"/>'
        f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in ticks(top)
    )
    grid += "".join(
        f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_short(step)}</text>'
        for step in ticks(last)
    )
    marks = "".join(
        f'<path class="reference" d="M{LEFT} {y(value):.1f}H{right}"/>'
        f'<text class="reference" x="{right}" y="{y(value) - 5:.1f}" text-anchor="end">{text(label)}</text>'
        for value, label in references
    )
    band = f"{path(centres, low)} {path(centres[::-1], high[::-1])}"
    return f"""<figure>{caption}
<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}, now {mean[-1]:.3g}">
{grid}<polygon class="band" points="{band}"/><polyline class="curve" points="{path(centres, mean)}"/>{marks}
</svg></figure>
"""


def bin_curve(
    steps: np.ndarray, values: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(mean step, 10th percentile, mean, 90th percentile) of at most ``bins`` runs of consecutive points."""
    parts = np.array_split(np.arange(len(steps)), min(bins, len(steps)))
    low, high = np.array([np.percentile(values[part], (10, 90)) for part in parts]).T
    return (
        np.array([steps[part].mean() for part in parts]),
        low,
        np.array([values[part].mean() for part in parts]),
        high,
    )


def ticks(top: float) -> list[float]:
    """Round numbers from 0 to at most ``top``, 1, 2 or 5 times a power of ten apart, four to ten of them."""
    step = 10.0 ** math.floor(math.log10(top))
    step *= next(factor for factor in (2, 1, 0.5, 0.2) if top / (step * factor) >= 4)
    return [round(i * step, 12) for i in range(int(top / step + 1e-9) + 1)]


def _short(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


SHOWN = 24  # grids in the page, which so stays small enough to be sent
SMALL, LARGE = 512, 1024  # pixels of height of a grid: of each in the strip, and of the newest
JPEG = {"format": "JPEG", "quality": 88, "subsampling": 0}  # colours at full resolution: maps have edges


def _samples(run_folder: Path, resolved: dict) -> str:
    """The grids that the monitor drew, in the page itself, which can be sent; the newest in view."""
    paths = sorted((run_folder / "samples").glob("step_*.png"))
    figures = [
        figure
        for path in _spread(paths, SHOWN)
        if (figure := _figure(path, LARGE if path == paths[-1] else SMALL)) is not None
    ]
    if not figures:
        return "<p>No samples yet.</p>"
    kinds = {str(resolved.get(name, "uint8")).split(" ")[0] for name in ("input_files", "output_files")}
    preview = "" if kinds == {"uint8"} else f"; {' and '.join(sorted(kinds))}, shown in 8 bits"
    of_all = f"; {len(figures)} of {len(paths)}, all are in samples/" if len(paths) > SHOWN else ""
    return (
        f"<p>input | target | generated{preview}{of_all}</p>"
        f'<div class="strip" tabindex="0">{"".join(figures)}</div>'
    )


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most ``count`` of ``paths``: the first, the last, and others evenly between them."""
    which = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    return [paths[i] for i in which]


def _figure(path: Path, height: int) -> str | None:
    """A grid, no higher than ``height`` pixels; None while it is being written, or if it is spoilt."""
    encoded = BytesIO()
    if not path.is_file():  # opening a pipe would wait for ever
        return None
    try:
        with Image.open(path) as image:
            shown = image.convert("RGB")
    except OSError:  # no reason to stop a run
        return None
    if shown.height > height:
        shown = shown.resize((round(shown.width * height / shown.height), height), Image.Resampling.LANCZOS)
    shown.save(encoded, **JPEG)
    step = int(path.stem.removeprefix("step_"))
    return (
        f'<figure><img src="data:image/jpeg;base64,{b64encode(encoded.getvalue()).decode()}" '
        f'alt="samples at step {step}" width="{shown.width}" height="{shown.height}" '
        f'style="--ratio: {shown.height / shown.width:.4f}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
    )


def _configuration(config: dict, resolved: dict) -> str:
    """Every option; what was asked for stands out, and what was left open is filled in by what it became."""
    defaults = TrainConfig().to_dict()
    rows = []
    for name, value in config.items():
        asked = name in defaults and value != defaults[name]
        shown = value
        if value is None and resolved.get(name) is not None:
            shown = f"{resolved[name]} (chosen)"
        rows.append(
            f"<div{' class=changed' if asked else ''}><dt>{text(name)}</dt>"
            f"<dd>{text('' if shown is None else shown)}</dd></div>"
        )
    return f'<p>Bold: asked for, and not the default.</p><dl class="options">{"".join(rows)}</dl>'


def _environment(found: dict) -> str:
    """What the last start of the run made of the request, if it says so."""
    if not found:
        return "<p>Not recorded.</p>"
    found = dict(found)
    versions = {f"{name} version": value for name, value in (found.pop("versions", None) or {}).items()}
    return f'<dl class="options">{_terms({**found, **versions})}</dl>'


STYLE = """
main > h2 { margin: 1.8rem 0 .3rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: .9rem 0 0; }
.tiles dt { color: var(--faint); font-size: .85em; }
.tiles dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: .9rem; }
figure { margin: 0; }
.charts figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.charts figure { padding: .7rem .8rem; }
.charts figcaption { font-weight: 600; }
code { color: var(--faint); font-weight: 400; font-size: .85em; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
@media (max-width: 40rem) { svg { font-size: 19px; } }  /* the picture shrinks, its text should not */
svg text { fill: var(--faint); }
.grid { stroke: var(--line); }
.curve { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--accent); opacity: .2; }
path.reference { stroke: var(--ink); stroke-dasharray: 5 4; opacity: .65; }
svg text.reference { fill: var(--ink); stroke: var(--card); stroke-width: 4px; paint-order: stroke; }
.strip { display: flex; gap: .9rem; overflow-x: auto; padding: .5rem 0; }
.strip img {
  height: min(32rem, 70vh, (100vw - 2.5rem) * var(--ratio)); width: auto; border-radius: 4px;
}
.strip figcaption { text-align: center; color: var(--faint); padding-top: .3rem; }
.options { columns: auto 22rem; column-gap: 3rem; margin: .5rem 0 0; }
.options div { display: flex; gap: 1rem; break-inside: avoid; padding: .1rem 0; }
.options dt { flex: 0 0 10rem; color: var(--faint); }
.options dd { margin: 0; overflow-wrap: anywhere; }
.options .changed * { font-weight: 650; color: var(--ink); }
"""


SCRIPT = """
const strip = document.querySelector(".strip");  // oldest first; the newest is what one looks for
if (strip) strip.scrollLeft = strip.scrollWidth;
"""


@dataclass
class ReportConfig:
    """Write RUN/report.html, as training does at every checkpoint."""

    run: Path
    """Folder of the run: CHECKPOINTS_DIR/NAME."""


def main(argv: list[str] | None = None) -> None:
    """Write one report and say where it is."""
    cli.run(ReportConfig, lambda config: print(write_report(config.run)), argv)


if __name__ == "__main__":
    main()

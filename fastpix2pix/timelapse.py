"""``python -m fastpix2pix.timelapse``: how a run learnt, as a film or in one picture, from its samples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastpix2pix import cli, environment
from fastpix2pix.config import TrainConfig
from fastpix2pix.errors import UserError
from fastpix2pix.models import build_generator
from fastpix2pix.models.generator import generate_without_trace
from fastpix2pix.pixels import normalize, preview
from fastpix2pix.sample_grids import Row, find_grids, read_grid

FRAMES = 100  # at most: a film of more is larger and looks the same
FILMS = {".gif": "GIF", ".apng": "PNG", ".png": "PNG"}
CAPTION = 22  # pixels
PAPER, INK = (251, 251, 250), (28, 30, 33)


@dataclass
class TimelapseConfig:
    """Make a film of a run's samples (or, with --strip, one picture): what the network makes of the same
    inputs, from step 0, which is drawn anew from the run's seed, to the newest."""

    run: Path
    """Folder of a run."""
    output: Path
    """A .gif, or a .png or .apng, which is an animated PNG; with --strip any picture (.jpg, .png)."""
    seconds: float = 20.0
    """Length of the film."""
    size: int = 128
    """Pixels a side of each picture in it."""
    rows: int = 4
    """How many of the sample pairs it shows."""
    strip: tuple[int, ...] | None = None
    """Instead of a film, these steps side by side in one picture, between input and target."""


def timelapse(config: TimelapseConfig) -> str:
    """Write the film or picture, and say what is in it. Raises UserError for what the user can mend."""
    if config.size < 8 or config.rows < 1 or not config.seconds > 0:
        raise UserError("--size, --rows or --seconds: too small; leave them out for the defaults")
    suffixes = Image.registered_extensions() if config.strip else FILMS
    if config.output.suffix.lower() not in suffixes:
        what, names = ("picture", ".png or .jpg") if config.strip else ("film", ".gif, .png or .apng")
        raise UserError(f"{config.output}: is the name of no {what}; let it end in {names}")
    grids = find_grids(config.run)
    if not grids:
        raise UserError(
            f"{config.run}: has no samples/step_*.png; give the folder of a run that has drawn some"
        )
    pairs = {step: read_grid(path)[: config.rows] for step, path in _chosen(grids, config).items()}
    if config.strip is None or 0 in config.strip:
        beginning = untrained(config.run, next(iter(pairs.values())))
        if beginning is None and config.strip:
            raise UserError(
                "--strip 0: the run began with trained weights (--init_from), or its samples are previews of "
                "other data than 8-bit RGB; leave out step 0"
            )
        pairs = {0: beginning, **pairs} if beginning else pairs
    if config.strip:
        picture = strip({step: pairs[step] for step in config.strip}, config.size)
        save = {"quality": 92} if config.output.suffix.lower() in (".jpg", ".jpeg") else {}
        _write(config.output, [picture], save)
        return f"{config.output}: steps {', '.join(map(str, config.strip))}"
    frames = [frame(step, rows, config.size) for step, rows in pairs.items()]
    if config.output.suffix.lower() == ".gif":
        frames = with_one_palette(frames)
    each = max(20, round(100 * config.seconds / len(frames)) * 10)  # ms; GIF counts in hundredths of a second
    _write(config.output, frames, {"format": FILMS[config.output.suffix.lower()], "duration": each})
    length = len(frames) * each / 1000
    return f"{config.output}: {len(frames)} frames, steps {min(pairs)} to {max(pairs)}, {length:.3g} s"


def _chosen(grids: dict[int, Path], config: TimelapseConfig) -> dict[int, Path]:
    """The grids that are asked for, in order: of a film, more from the beginning, where more changes."""
    if config.strip is not None:
        wanted = [step for step in config.strip if step] or [min(grids)]
        absent = [step for step in wanted if step not in grids]
        if absent:
            raise UserError(
                f"--strip {absent[0]}: the run drew no samples then; nearest is "
                f"{min(grids, key=lambda step: abs(step - absent[0]))}"
            )
        return {step: grids[step] for step in sorted(set(wanted))}
    steps = np.array(sorted(step for step in grids if step))
    if len(steps) >= FRAMES:
        moments = steps[0] + (steps[-1] - steps[0]) * np.linspace(0, 1, FRAMES - 1) ** 2
        steps = np.unique(steps[np.abs(steps - moments[:, None]).argmin(1)])
    return {int(step): grids[int(step)] for step in steps}


def untrained(run: Path, rows: Sequence[Row]) -> list[Row] | None:
    """``rows`` as the run's network made them before its first step; None if it began with other weights, or
    the rows are no more than previews of what it takes."""
    try:
        request = json.loads((run / "config.json").read_text(encoding="utf-8"))
        if request.get("init_from"):
            return None
        config = TrainConfig.from_dict(request)
        files = (environment.read(run) or {}).get("input_files", "uint8")
        if (config.input_nc, config.input_range) != (3, None) or not str(files).startswith("uint8"):
            return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{run} has no readable config.json; give the folder of a run") from error
    generator = build_generator(config.network_options())
    found = []
    for row in rows:
        source = normalize(torch.from_numpy(row.source.copy())[None], torch.float32)
        found.append(Row(row.source, row.target, preview(generate_without_trace(generator, source)[0])))
    return found


# -------------------------------------------------------------------------------------------- pictures


def frame(step: int, rows: Sequence[Row], size: int) -> Image.Image:
    """One moment of the film: a column for each pair with input, generated image and target."""
    kinds: tuple[Literal["source", "generated", "target"], ...] = ("source", "generated", "target")
    picture = Image.new("RGB", (len(rows) * size, CAPTION + len(kinds) * size), PAPER)
    _write_caption(picture, f"step {step:,}", 0, picture.width)
    for column, row in enumerate(rows):
        for line, kind in enumerate(kinds):
            picture.paste(_scaled(getattr(row, kind), size), (column * size, CAPTION + line * size))
    return picture


def strip(moments: dict[int, Sequence[Row]], size: int) -> Image.Image:
    """A line for each pair: its input, what was made of it at each step, its target."""
    rows = next(iter(moments.values()))
    columns = [("input", [row.source for row in rows])]
    columns += [(f"step {step:,}", [row.generated for row in of]) for step, of in moments.items()]
    columns.append(("target", [row.target for row in rows]))
    picture = Image.new("RGB", (len(columns) * size, CAPTION + len(rows) * size), PAPER)
    for column, (title, images) in enumerate(columns):
        _write_caption(picture, title, column * size, size)
        for line, image in enumerate(images):
            picture.paste(_scaled(image, size), (column * size, CAPTION + line * size))
    return picture


def with_one_palette(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames of 256 colours that they share, so that what stands still costs a GIF nothing."""
    chosen = frames[:: max(1, len(frames) // 8)]
    seen = Image.new("RGB", (frames[0].width, len(chosen) * frames[0].height))
    for i, one in enumerate(chosen):
        seen.paste(one, (0, i * one.height))
    palette = seen.quantize(256)
    return [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in frames]


def _scaled(pixels: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)


def _write_caption(picture: Image.Image, text: str, left: int, width: int) -> None:
    try:
        font = ImageFont.load_default(14)
    except TypeError:  # before Pillow 10.1 there is one size
        font = ImageFont.load_default()
    draw = ImageDraw.Draw(picture)
    draw.text((left + (width - draw.textlength(text, font)) / 2, 3), text, INK, font)


def _write(path: Path, frames: Sequence[Image.Image], options: dict) -> None:
    """Save a picture, or several as a film that begins anew at its end."""
    film: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "loop": 0}
    if len(frames) == 1:
        film = {}
    try:
        frames[0].save(path, **film, **options)
    except OSError as error:
        raise UserError(
            f"{path}: can't be written ({error.strerror or error}); choose another --output"
        ) from error


def main(argv: list[str] | None = None) -> None:
    cli.run(TimelapseConfig, lambda config: print(timelapse(config)), argv)


if __name__ == "__main__":
    main()

"""``python -m fastpix2pix.translate``: a trained run and images -> translated images and a gallery page."""

import csv
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from fastpix2pix import cli
from fastpix2pix.cores import use_threads
from fastpix2pix.data.options import Direction, oriented
from fastpix2pix.data.pairs import Pair, natural_order
from fastpix2pix.data.pictures import EXTENSIONS, Header, kept_suffix, read, read_header, write
from fastpix2pix.data.sides import Side
from fastpix2pix.errors import UserError, out_of_memory_is_one_line
from fastpix2pix.gallery import Entry, write_gallery
from fastpix2pix.interop.junyanz.flags import test_words
from fastpix2pix.metrics import image_metrics
from fastpix2pix.pixels import normalize, preview
from fastpix2pix.translator import Translator, load


@dataclass
class TranslateConfig:
    """Translate images with a trained run. What the network needs is taken from the run.

    OUTPUT/generated/ holds the results as files like the training's targets, OUTPUT/index.html shows them
    beside their input. For side-by-side pairs also target/ and the metrics of each image, in metrics.csv too.
    """

    run: Path
    """Folder of a run (its newest checkpoint is used), a step_*.pt, a *_net_G.pth of
    pytorch-CycleGAN-and-pix2pix, or the tutorial's generator as np.savez(FILE, *generator.get_weights())."""
    input: Path
    """An image, or a folder of images (JPEG, PNG, TIFF, .npy)."""
    output: Path
    """Folder for the results: a new or empty one, or one with earlier results, which are replaced."""
    kind: Literal["auto", "image", "pair"] = "auto"
    """What INPUT holds: plain images, or pairs side by side. auto: pairs, if every file is exactly twice as
    wide as high."""
    direction: Direction | None = None
    """Which half of a pair is translated: AtoB the left one. Default: as the network was trained."""
    resize: bool = False
    """Resize images to the size of the training first, as both references test. Otherwise they keep their
    size, mirrored outwards to one that the network takes."""
    tile: int | None = None
    """Translate images larger than so many pixels in tiles of that side, which overlap by a quarter and are
    blended; each is normalised by its own statistics. For images that do not fit into the memory."""
    eval: bool = False
    """Normalise by the running statistics, without dropout, instead of by each image's own statistics, with
    dropout, as both references test."""
    no_dropout: bool = False
    """Leave out the dropout: for a network that was trained without, and whose file does not say so."""
    seed: int = 0
    """Of the dropout."""
    num_test: int | None = None
    """Translate the first so many images alone."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""


def translate(config: TranslateConfig) -> None:
    """Translate what ``config`` names and say where it is. Raises UserError for what the user can mend."""
    use_threads(None)
    with out_of_memory_is_one_line("close other programs, or translate it in tiles, or with --resize"):
        _translate(config)


def _translate(config: TranslateConfig) -> None:
    translator = load(
        config.run,
        device=config.device,
        evaluation=config.eval,
        seed=config.seed,
        direction=config.direction,
        no_dropout=config.no_dropout,
        tile=config.tile,
    )
    if config.num_test is not None and config.num_test < 1:
        raise UserError(f"--num_test {config.num_test}: give a number of at least 1")
    sources = find_sources(config.input)[: config.num_test]
    check_output(config.output, config.input)
    kind = guess_kind(sources) if config.kind == "auto" else config.kind
    half = "left" if translator.direction == "AtoB" else "right"
    print(f"{len(sources)} {f'pairs, translating the {half} half' if kind == 'pair' else 'images'}")
    print(f"each is normalised by {statistics_of(translator)}{'' if config.eval else '; or choose --eval'}")
    side = translator.size
    if not config.resize and any(_image_size(source, kind) != (side, side) for source in sources):
        print(f"images keep their size; the training's was {side}x{side}, to which --resize brings them")
    if not config.resize and any(translator.tiled(*_image_size(source, kind)) for source in sources):
        own = "" if config.eval else ", each normalised by its own statistics"
        print(f"larger images are translated in tiles of {config.tile}x{config.tile}{own}")
    means = translate_files(translator, sources, config.output, kind, resized=config.resize)
    if means:
        print("mean " + ", ".join(f"{name} {value:.4g}" for name, value in means.items()))
    print(f"open {config.output / 'index.html'}")


def statistics_of(translator: Translator) -> str:
    """How images are normalised, in words."""
    if translator.evaluation:
        return "the running statistics of the training, without dropout"
    if not translator.generator.dropout:
        return "its own statistics, without dropout"
    return f"its own statistics, with dropout (seed {translator.seed}), as both references test"


# ----------------------------------------------------------------------------------------------- input


@dataclass(frozen=True)
class Source:
    """One input file. name: what its results are called; header: what the file holds."""

    name: str
    path: Path
    header: Header

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the file in pixels."""
        return self.header.size


def find_sources(path: Path) -> list[Source]:
    """The picture at ``path``, or those directly in the folder ``path`` in natural order, by their headers.

    Raises UserError when there is none, or one can't be read.
    """
    try:
        files = [path]
        if path.is_dir():
            files = [file for file in path.iterdir() if not file.name.startswith(".")]
            files = sorted((f for f in files if f.suffix.lower() in EXTENSIONS), key=natural_order)
        if not files:
            raise UserError(f"{path}: holds no {', '.join(EXTENSIONS)} file; give images or their folder")
        unambiguous = len({file.stem for file in files}) == len(files)
        return [Source(file.stem if unambiguous else file.name, file, _header(file)) for file in files]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give images or their folder") from error


def _header(path: Path) -> Header:
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path}: is no file; give an image (JPEG, PNG, TIFF, .npy), or a folder of them")
    return read_header(path)


def guess_kind(sources: Sequence[Source]) -> Literal["image", "pair"]:
    """Pairs, when every file is exactly twice as wide as high, as in all the pix2pix data sets."""
    return "pair" if all(width == 2 * height for height, width in (s.size for s in sources)) else "image"


def _image_size(source: Source, kind: str) -> tuple[int, int]:
    """(height, width) of what is translated: the file, or one half of it."""
    height, width = source.size
    return height, width // 2 if kind == "pair" else width


# ---------------------------------------------------------------------------------------------- output

PREVIEW, PARTIAL = "preview", ".partial"
RESULTS = ("input", "generated", "target", PREVIEW, "metrics.csv", "index.html")


def check_output(output: Path, source: Path) -> None:
    """Raise UserError unless results may go to ``output``: it is absent, empty, or holds earlier results.

    Neither it nor a result in it may be a link or a device.
    """
    for path in (output, *(output / name for name in RESULTS)):
        plain = path.is_dir() or (path != output and path.is_file())
        if path.is_symlink() or (path.exists() and not plain):
            raise UserError(f"{path}: is a link, a device or no folder; choose another --output")
    try:
        names = {path.name for path in output.iterdir()} - {PARTIAL} if output.exists() else set()
        earlier = 'content="fastpix2pix"' in (output / "index.html").read_text("utf-8") if names else True
    except FileNotFoundError:
        earlier = False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{output}: {reason}; choose another --output") from error
    if not earlier:
        raise UserError(f"{output}: holds something else than earlier results; choose another --output")
    if source.resolve().is_relative_to(output.resolve()):
        raise UserError(
            f"{output}: holds the input {source}, which it would replace; choose another --output"
        )


def translate_files(
    translator: Translator,
    sources: Sequence[Source],
    output: Path,
    kind: Literal["image", "pair"],
    *,
    resized: bool = False,
) -> dict[str, float]:
    """Translate ``sources`` into the folder ``output`` and return the mean of each metric ({} for images).

    Everything appears in ``output`` when all of it is there, index.html last. Raises UserError for a file
    that cannot be translated, or an ``output`` that cannot be written; nothing is left behind then.
    """
    for source in sources:
        _check_size(translator, source, kind, resized)
    try:
        with _staging(output) as staging:
            with tqdm(sources, desc="translate", unit=" images") as bar:
                entries = [_translate_file(translator, source, kind, resized, staging) for source in bar]
            if kind == "pair":
                _write_metrics(staging / "metrics.csv", entries)
            title = f"{translator.source}: {len(entries)} images"
            note = f"Each is normalised by {statistics_of(translator)}."
            if (staging / PREVIEW).exists():
                note += " Shown are previews of 8 bits; the values are in the files of generated/."
            write_gallery(staging, entries, title=title, note=note)
            _publish(staging, output)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror or error}; choose another --output") from error
    names = entries[0].metrics
    return {name: float(np.mean([entry.metrics[name] for entry in entries])) for name in names}


def _check_size(translator: Translator, source: Source, kind: str, resized: bool) -> None:
    if kind == "pair" and source.size[1] % 2:
        raise UserError(
            f"{source.path}: is {source.size[1]} pixels wide, which does not split into two halves; "
            "--kind image if it is not a pair"
        )
    translator.input.check(source.path, source.header)
    if kind == "pair":
        translator.output.check(source.path, source.header)
    try:
        translator.check_memory(*(translator.size,) * 2 if resized else _image_size(source, kind))
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from error


def _translate_file(translator: Translator, source: Source, kind: str, resized: bool, folder: Path) -> Entry:
    sides = {"input": translator.input, "generated": translator.output, "target": translator.output}
    if kind == "image":
        images = {"input": read(source.path, translator.input.channels)}
    else:
        in_a_and_b = oriented(translator.input, translator.output, translator.direction)
        pair = Pair(source.name, source.path, None, source.size, source.header.plain, in_a_and_b)
        images = dict(zip(("input", "target"), oriented(*pair.read(), translator.direction), strict=True))
    if resized:
        images = {role: translator.resize(image, sides[role]) for role, image in images.items()}
    images["generated"] = translator(images["input"])
    shown = {}
    for role, image in images.items():
        own = role != "generated"  # such files as they were
        side = sides[role].of_file(source.header, kept_suffix(source.path)) if own else sides[role]
        shown[role] = _write_picture(folder, f"{role}/{source.name}", image, side)
    metrics = {}
    if kind == "pair":
        target = translator.output.alike(images["target"])
        generated, wanted = (torch.from_numpy(image.copy()) for image in (images["generated"], target))
        metrics = image_metrics(generated, wanted, translator.output.span)
    return Entry(source.name, shown, images["generated"].shape[:2], metrics)


def _write_picture(folder: Path, name: str, image: np.ndarray, side: Side) -> str:
    """Write ``image`` into ``folder`` as the side's files hold it, and return which file a page shows: this
    one, or a preview beside it where a browser would not show it, or show it too dark."""
    path = folder / f"{name}{side.suffix}"
    path.parent.mkdir(exist_ok=True)
    write(path, image)
    if side.suffix == ".png" and side.range is None and side.channels != 2:
        return f"{name}{side.suffix}"
    path = folder / PREVIEW / f"{name}.png"
    path.parent.mkdir(exist_ok=True, parents=True)
    write(path, preview(normalize(side.kept(image), torch.float32)[0]))
    return f"{PREVIEW}/{name}.png"


def _write_metrics(path: Path, entries: Sequence[Entry]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["name", *entries[0].metrics])
        rows.writerows([entry.name, *entry.metrics.values()] for entry in entries)


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder inside ``output`` that is gone afterwards, and ``output`` with it if nothing came of it."""
    created = not output.exists()
    staging = output / PARTIAL
    output.mkdir(parents=True, exist_ok=True)
    try:
        if staging.exists():
            shutil.rmtree(staging)  # left by a process that was killed
        staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if created and not any(output.iterdir()):
            output.rmdir()


def _publish(staging: Path, output: Path) -> None:
    """Replace the results in ``output``; without its index.html a folder does not look whole."""
    (output / "index.html").unlink(missing_ok=True)
    for name in RESULTS:
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        elif (output / name).exists():
            (output / name).unlink()
        if (staging / name).exists():
            (staging / name).rename(output / name)


def main(argv: list[str] | None = None) -> None:
    cli.run(TranslateConfig, translate, argv, habits=test_words)


if __name__ == "__main__":
    main()

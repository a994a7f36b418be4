"""Is this folder fit to train on? Every file decoded, every pair matched, and what will be converted."""

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from fastpix2pix.data.pairs import EXTENSIONS, KINDS, find_pairs, raw_mode, read_rgb
from fastpix2pix.errors import UserError

FIRST_BAD = 10  # so many bad files are listed
OTHER_PICTURES = (".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".avif", ".jp2", ".npy")


@dataclass(frozen=True)
class SplitReport:
    """What one split holds. sizes: pairs per (height, width) of a half; kinds: files per Pillow mode."""

    name: str
    pairs: int
    sizes: Counter
    kinds: Counter
    files: int
    bad: list[str]  # one line each: the file, what is wrong, the remedy
    unread: str = ""  # pictures of kinds that training passes over, e.g. "3 .webp"


def check_folder(root: str | Path) -> list[SplitReport]:
    """Decode and pair every file of every split of the data set at ``root``.

    Raises UserError for a folder that training would not take (``refuse_other_layouts``); bad files are in
    the reports.
    """
    root = Path(root)
    refuse_other_layouts(root)
    try:
        return [_check_split(root, name) for name in _folders(root) if _split_pictures(root, name)]
    except OSError as error:
        raise UserError(
            f"{error.filename or root}: can't be read ({error.strerror}); mend that, or remove it"
        ) from error


def refuse_other_layouts(root: Path) -> None:
    """Raise UserError, with what to do, unless ``root`` holds a folder of pictures for training.

    Looks at names alone, not at files: whether they are pairs is for ``find_pairs``.
    """
    try:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the folder that holds train/")
        names = _folders(root)
        if "train" in names and _split_pictures(root, "train"):
            return
        if {"trainA", "trainB"} & {*names}:
            raise UserError(
                f"{root}: holds trainA/ and trainB/; if files of one name belong together, rename them to "
                "A/train/ and B/train/, and other splits likewise"
            )
        here = Path(os.path.abspath(root))
        if _split_pictures(here.parent, here.name):
            remedy = f"give {here.parent}" if here.name == "train" else f"move what it holds to {root}/train/"
            raise UserError(f"{root}: is a split itself, not the folder that holds train/; {remedy}")
        if "train" not in names:
            others = [name for name in names if _split_pictures(root, name)]
            has = f"it has {', '.join(others)}/; rename one" if others else "put pairs into such a folder"
            raise UserError(f"{root}: holds no folder train/; {has}")
        unread = _unread(root, "train")
        if unread:
            raise UserError(f"{root}/train: holds {unread}, which are not read; convert them to PNG")
        kinds = ", ".join(EXTENSIONS)
        raise UserError(f"{root}/train: holds no {kinds} file; put the pairs there")
    except (OSError, ValueError) as error:
        where, why = getattr(error, "filename", None) or root, getattr(error, "strerror", None) or error
        raise UserError(f"{where}: can't be read ({why}); give the folder that holds train/") from error


def check(root: str | Path) -> None:
    """Print what ``check_folder`` found. Raises UserError if anything is bad."""
    reports = check_folder(root)
    for report in reports:
        print("\n".join(_describe(report)))
    bad = [line for report in reports for line in report.bad]
    if bad:
        for line in bad[:FIRST_BAD]:
            print(f"  bad: {line}")
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UserError(f"{root} cannot be trained on: {bad[0]}{more}")
    print("every file decodes and has its partner")


def _check_split(root: Path, split: str) -> SplitReport:
    files = _split_pictures(root, split)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [*tqdm(pool.map(_examine, files), desc=split, unit=" files", total=len(files), leave=False)]
    bad = [error for error, _ in found if error]
    pairs = []
    if not bad:  # else find_pairs would only say the same of the first of them
        try:
            pairs = find_pairs(root, split)
        except UserError as error:
            bad = [str(error)]
    kinds = Counter(kind for _, kind in found if kind)
    return SplitReport(
        split, len(pairs), Counter(pair.size for pair in pairs), kinds, len(files), bad, _unread(root, split)
    )


def _examine(path: Path) -> tuple[str, str]:
    """(what is wrong with the file, its kind), one of them empty."""
    try:
        read_rgb(path)
        with Image.open(path) as image:
            deep = "16" in image.mode + raw_mode(image)
            return "", "16-bit" if deep else image.mode
    except UserError as error:
        return str(error), ""


def _describe(report: SplitReport) -> Iterable[str]:
    sizes = ", ".join(f"{width}x{height} ({count})" for (height, width), count in report.sizes.most_common(5))
    more = f" and {len(report.sizes) - 5} more sizes" if len(report.sizes) > 5 else ""
    if report.bad:
        yield f"{report.name}: {report.files} files"
    else:
        yield f"{report.name}: {report.pairs} pairs; width x height of a half (pairs): {sizes}{more}"
    converted = {kind: count for kind, count in report.kinds.items() if kind != "RGB"}
    if converted:
        kinds = ", ".join(f"{count} {KINDS.get(kind, kind)}" for kind, count in converted.items())
        yield f"  converted to 8-bit RGB: {kinds}"
    if report.unread:
        yield f"  not read: {report.unread}"


def _split_pictures(root: Path, split: str) -> list[Path]:
    """Pictures of ``split`` in any of the layouts that ``find_pairs`` knows."""
    return [path for path in _split_files(root, split) if path.suffix.lower() in EXTENSIONS]


def _unread(root: Path, split: str) -> str:
    """Pictures of kinds that are not read, e.g. "3 .webp, 1 .tif"; empty where there are none."""
    kinds = Counter(path.suffix.lower() for path in _split_files(root, split))
    return ", ".join(f"{kinds[kind]} {kind}" for kind in OTHER_PICTURES if kinds[kind])


def _split_files(root: Path, split: str) -> list[Path]:
    folders = (root / split, root / split / "A", root / split / "B", root / "A" / split, root / "B" / split)
    return [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())
            if not path.name.startswith(".")]  # fmt: skip


def _folders(root: Path) -> list[str]:
    parents = [parent for parent in (root, root / "A", root / "B") if parent.is_dir()]
    names = {path.name for parent in parents for path in parent.iterdir() if path.is_dir()}
    return sorted(name for name in names - {"A", "B"} if not name.startswith("."))

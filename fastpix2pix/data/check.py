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


@dataclass(frozen=True)
class SplitReport:
    """What one split holds. sizes: pairs per (height, width) of a half; kinds: files per Pillow mode."""

    name: str
    pairs: int
    sizes: Counter
    kinds: Counter
    files: int
    bad: list[str]  # one line each: the file, what is wrong, the remedy


def check_folder(root: str | Path) -> list[SplitReport]:
    """Decode and pair every file of every split of the data set at ``root``, or of the one split ``root``.

    Raises UserError when ``root`` is no folder or holds no picture at all; bad files are in the reports.
    """
    root = Path(root)
    try:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the folder that holds train/")
        splits = [name for name in _folders(root) if _split_pictures(root, name)]
        if not splits and _split_pictures(root.resolve().parent, root.resolve().name):
            root, splits = root.resolve().parent, [root.resolve().name]
        if not splits:
            kinds = ", ".join(EXTENSIONS)
            raise UserError(f"{root}: holds no folder with {kinds} files; put pairs into its folder train")
        return [_check_split(root, split) for split in splits]
    except OSError as error:
        raise UserError(
            f"{root}: can't be read ({error.strerror}); give the folder that holds train/"
        ) from error


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
    return SplitReport(split, len(pairs), Counter(pair.size for pair in pairs), kinds, len(files), bad)


def _examine(path: Path) -> tuple[str, str]:
    """(what is wrong with the file, its kind), one of them empty."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise UserError(f"{path}: is not a file; remove it")
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


def _split_pictures(root: Path, split: str) -> list[Path]:
    """Pictures of ``split`` in any of the layouts that ``find_pairs`` knows."""
    folders = (root / split, root / split / "A", root / split / "B", root / "A" / split, root / "B" / split)
    return [path for folder in folders for path in _pictures(folder)]


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in EXTENSIONS)


def _folders(root: Path) -> list[str]:
    parents = [parent for parent in (root, root / "A", root / "B") if parent.is_dir()]
    names = {path.name for parent in parents for path in parent.iterdir() if path.is_dir()}
    return sorted(name for name in names - {"A", "B"} if not name.startswith("."))

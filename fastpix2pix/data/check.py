"""Is this folder fit to train on? Every file decoded, every pair matched, and what will be converted."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fastpix2pix.data.pairs import Pair, find_pairs
from fastpix2pix.data.pictures import DTYPES, EXTENSIONS, Header, channels_in_words, read, read_header
from fastpix2pix.errors import UserError

FIRST_BAD = 10  # so many bad files are listed
OTHER_PICTURES = (".webp", ".bmp", ".gif", ".heic", ".avif", ".jp2")


@dataclass(frozen=True)
class SplitReport:
    """What one split holds. sizes: pairs per (height, width) of a half; kinds: of JPEG and PNG files that can
    be had as 8-bit RGB, how many of each; others: what halves of the pairs hold that is not, in words."""

    name: str
    pairs: int
    sizes: Counter
    kinds: Counter
    files: int
    bad: list[str]  # one line each: the file, what is wrong, the remedy
    others: list[str]  # one line each
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
        examined = pool.map(_examine, files)
        found = [*tqdm(examined, desc=split, unit=" files", total=len(files), leave=False)]
    bad = [one for one in found if isinstance(one, str)]
    good = {path: one for path, one in zip(files, found, strict=True) if isinstance(one, _File)}
    pairs: list[Pair] = []
    others: list[str] = []
    if not bad:  # else find_pairs would only say the same of the first of them
        try:
            pairs = find_pairs(root, split, None)
            others = [*_others(pairs, good)]
        except UserError as error:
            bad = [str(error)]
    kinds = Counter(one.header.kind for one in good.values() if _as_rgb(one.header) and one.header.kind)
    sizes = Counter(pair.size for pair in pairs)
    return SplitReport(split, len(pairs), sizes, kinds, len(files), bad, others, _unread(root, split))


class _File(NamedTuple):
    header: Header
    low: float  # the least of its values
    high: float


def _examine(path: Path) -> _File | str:
    """What a file holds, or what is wrong with it."""
    try:
        samples = read(path)
        return _File(read_header(path), float(samples.min()), float(samples.max()))
    except UserError as error:
        return str(error)


def _as_rgb(header: Header) -> bool:
    """Whether training takes a file as 8-bit RGB, unless it is told otherwise."""
    return header.offers(3) and header.dtype == "uint8"


def _others(pairs: list[Pair], files: dict[Path, _File]) -> Iterator[str]:
    """A line for each half of the pairs that training does not take as 8-bit RGB.

    Raises UserError unless all files of such a half have the same channels.
    """
    halves = {"A and B": [pair.a for pair in pairs]}
    if pairs[0].b is not None:
        halves = {"A": halves["A and B"], "B": [pair.b for pair in pairs if pair.b is not None]}
    for half, paths in halves.items():
        found = [files[path] for path in paths]
        if all(_as_rgb(one.header) for one in found):
            continue
        first = found[0].header
        channels = 3 if all(one.header.offers(3) for one in found) else first.channels
        for path, (header, _, _) in zip(paths, found, strict=True):
            if not header.offers(channels):
                raise UserError(f"{path}: holds {header}, and {paths[0]} {first}; give files of one kind")
        dtype = max((one.header.dtype for one in found), key=DTYPES.index)
        low, high = min(one.low for one in found), max(one.high for one in found)
        yield f"{half}: {channels_in_words(channels)} of {dtype}, values {low:.6g} to {high:.6g}"


def _describe(report: SplitReport) -> Iterable[str]:
    sizes = ", ".join(f"{width}x{height} ({count})" for (height, width), count in report.sizes.most_common(5))
    more = f" and {len(report.sizes) - 5} more sizes" if len(report.sizes) > 5 else ""
    if report.bad:
        yield f"{report.name}: {report.files} files"
    else:
        yield f"{report.name}: {report.pairs} pairs; width x height of a half (pairs): {sizes}{more}"
    yield from (f"  {line}" for line in report.others)
    converted = {kind: count for kind, count in report.kinds.items() if kind != "RGB"}
    if converted:
        kinds = ", ".join(f"{count} {kind}" for kind, count in converted.items())
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

"""Which pairs a data set holds, and whether they can be used."""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastpix2pix.data.pictures import EXTENSIONS, Header, kept_suffix, read, read_header
from fastpix2pix.data.sides import Side
from fastpix2pix.errors import UserError

log = logging.getLogger(__name__)

Sides = tuple[Side, Side]
RGB: Sides = (Side("input"), Side("output"))


@dataclass(frozen=True)
class Pair:
    """A training pair: A is the left half, or the file in folder A; B the right half, or the file in B."""

    name: str  # the file's name without its ending
    a: Path  # the file that holds A, and B too when ``b`` is None
    b: Path | None
    size: tuple[int, int]  # (height, width) of each half, in pixels
    plain: bool  # 8-bit RGB or grey JPEG/PNG: every decoder gives the same picture
    sides: Sides = RGB  # of A and B, as these files hold them

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.a,) if self.b is None else (self.a, self.b)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, B), each uint8, uint16 or float32 (height, width, channels), with the channels of its side.

        Raises ``UserError`` naming a file that can't be decoded.
        """
        in_a, in_b = (side.channels for side in self.sides)
        if self.b is not None:
            return read(self.a, in_a), read(self.b, in_b)
        left = read(self.a, in_a)
        right = left if in_a == in_b else read(self.a, in_b)
        half = left.shape[1] // 2
        return left[:, :half], right[:, half:]


def find_pairs(root: str | Path, split: str, sides: Sides | None = RGB) -> list[Pair]:
    """The pairs of ``split`` in natural order of their names, validated by their headers alone.

    Layouts: side-by-side files in ``root/split``; or A and B files of the same stem in ``root/A/split`` and
    ``root/B/split``, or in ``root/split/A`` and ``root/split/B``. sides: what A and B have to be; None: they
    may be anything. Raises ``UserError`` for whatever a user could mend; says once per folder which files
    are converted.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds {split}/")
    for a, b in ((root / "A" / split, root / "B" / split), (root / split / "A", root / split / "B")):
        if a.is_dir() or b.is_dir():
            files: list[tuple[Path, Path | None]] = [*_match(a, b)]
            break
    else:
        if not (root / split).is_dir():
            raise UserError(f"{root}: no split {split!r}; {_name_splits(root)}")
        files = [(path, None) for path in _images(root / split)]
    headers = {path: read_header(path) for pair in files for path in pair if path}
    pairs = [_pair(a, b, headers, sides) for a, b in files]
    _report_conversions(pairs, headers)
    return pairs


def halves(a: Path, b: Path | None) -> tuple[Path, Path]:
    """The files that hold A and B."""
    return a, a if b is None else b


def _pair(a: Path, b: Path | None, headers: dict[Path, Header], wanted: Sides | None) -> Pair:
    height, width = headers[a].size
    found = [_side(path, headers[path], wanted and wanted[half]) for half, path in enumerate(halves(a, b))]
    sides = found[0], found[1]
    if b is None:
        if width % 2:
            raise UserError(
                f"{a}: is {width} pixels wide, which does not split into two halves; A and B stand side by "
                "side in one file, or in folders A/ and B/"
            )
        return Pair(a.stem, a, None, (height, width // 2), headers[a].plain, sides)
    if headers[b].size != headers[a].size:
        other_height, other_width = headers[b].size
        raise UserError(
            f"{b}: is {other_width}x{other_height} but its partner {a} is {width}x{height}; "
            "give both the same size"
        )
    return Pair(a.stem, a, b, (height, width), headers[a].plain and headers[b].plain, sides)


def _side(path: Path, header: Header, wanted: Side | None) -> Side:
    """What the file is to its pair. Raises ``UserError`` if it is not what is wanted."""
    if wanted is None:
        wanted = Side("input", header.channels)
    else:
        wanted.check(path, header)
    return wanted.of_file(header, kept_suffix(path))


def _images(folder: Path) -> list[Path]:
    """The picture files directly in ``folder``, 2.jpg before 10.jpg; at least one."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
    if not files:
        raise UserError(f"{folder}: holds no {', '.join(EXTENSIONS)} file; put the pairs there")
    return sorted(files, key=natural_order)


def natural_order(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort key of file names under which digits compare as numbers, and before letters."""
    parts = [part for part in re.split(r"([0-9]+)", path.name) if part]
    return [
        (False, int(part), "") if part[0] in "0123456789" else (True, 0, part) for part in parts
    ], path.name


def _match(a: Path, b: Path) -> list[tuple[Path, Path]]:
    """Partners of the same stem; both folders must exist and hold the same stems."""
    for folder in (a, b):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, though {b if folder == a else a} exists; add it")
    by_stem: list[dict[str, Path]] = []
    for folder in (a, b):
        files = _images(folder)
        stem, times = Counter(p.stem for p in files).most_common(1)[0]
        if times > 1:
            raise UserError(f"{folder}: holds {times} files called {stem}; partners are matched by this name")
        by_stem.append({p.stem: p for p in files})
    for here, there, folder in ((by_stem[0], by_stem[1], b), (by_stem[1], by_stem[0], a)):
        for stem, path in here.items():
            if stem not in there:
                raise UserError(f"{path}: has no partner {stem} in {folder}; add it or remove this file")
    return [(path, by_stem[1][stem]) for stem, path in by_stem[0].items()]


def _name_splits(root: Path) -> str:
    folders = [f for parent in (root, root / "A") if parent.is_dir() for f in parent.iterdir() if f.is_dir()]
    splits = sorted({f.name for f in folders} - {"A", "B"})
    if splits:
        return f"it has {', '.join(splits)}"
    return "put side-by-side pairs into such a folder, or A and B files into A/ and B/ folders of it"


_reported: set[str] = set()


def _report_conversions(pairs: list[Pair], headers: dict[Path, Header]) -> None:
    converted = {
        path: side
        for pair in pairs
        for path, side in zip(halves(pair.a, pair.b), pair.sides, strict=True)
        if headers[path].converted(side.channels)
    }
    if not converted:
        return
    first, others = next(iter(converted)), len(converted) - 1
    channels = {1: "grey", 3: "RGB"}.get(converted[first].channels, "")
    message = f"{first} ({headers[first].kind}) is converted to {channels}"
    if others:
        message += f", as are {others} more files"
    if message not in _reported:
        _reported.add(message)
        log.warning(message)

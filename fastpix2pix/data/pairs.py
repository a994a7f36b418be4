"""Which pairs a data set holds, whether they can be used, and their pixels as 8-bit RGB."""

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from fastpix2pix.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "PNG")
# What Pillow raises on a file that it cannot read.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
KINDS = {"1": "black and white", "L": "grey", "LA": "grey with transparency", "P": "palette"}
# What a whole file ends with; a file that ends otherwise is decoded once, to see whether it is cut short.
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass(frozen=True)
class Pair:
    """A training pair: A is the left half, or the file in folder A; B the right half, or the file in B."""

    name: str  # the file's name without its ending
    a: Path  # the file that holds A, and B too when ``b`` is None
    b: Path | None
    size: tuple[int, int]  # (height, width) of each half, in pixels
    plain: bool  # 8-bit RGB or grey JPEG/PNG: every decoder gives the same picture

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.a,) if self.b is None else (self.a, self.b)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, B), each uint8 (height, width, 3). Raises ``UserError`` naming a file that can't be decoded."""
        if self.b is not None:
            return read_rgb(self.a), read_rgb(self.b)
        both = read_rgb(self.a)
        return both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]


def find_pairs(root: str | Path, split: str) -> list[Pair]:
    """The pairs of ``split`` in natural order of their names, validated by their headers alone.

    Layouts: side-by-side files in ``root/split``; or A and B files of the same stem in ``root/A/split`` and
    ``root/B/split``, or in ``root/split/A`` and ``root/split/B``. Raises ``UserError`` for whatever a user
    could mend; says once per folder which files are converted to 8-bit RGB.
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
    headers = {path: _Header.of(path) for pair in files for path in pair if path}
    pairs = [_pair(a, b, headers) for a, b in files]
    _report_conversions(headers)
    return pairs


def read_rgb(path: Path) -> np.ndarray:
    """The picture, uint8 (height, width, 3): 16 bit scaled by 1/257, transparency dropped, grey repeated."""
    _refuse_other_than_files(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _to_rgb(image)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be decoded ({error}); replace or remove it") from error


def _refuse_other_than_files(path: Path) -> None:
    """Raises ``UserError`` for a pipe, device, folder or dangling link: opening a pipe would wait for ever."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is not a file; remove it")


def raw_mode(image: ImageFile.ImageFile) -> str:
    """How the samples lie in the file, e.g. "RGB;16B". Raises OSError where the file ends before them."""
    if not image.tile:
        raise OSError("no pixels follow the header")  # Pillow would make a black picture of it
    return str(image.tile[0][3])


def _to_rgb(image: ImageFile.ImageFile) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey
        return np.repeat(_scale_16_bit(np.asarray(image).astype(np.uint32))[..., None], 3, axis=2)
    rawmode = raw_mode(image)
    if rawmode in ("RGB;16B", "RGBA;16B"):
        # Pillow keeps the high byte of each sample; read as the other byte order, the low one.
        high = np.asarray(image)[..., :3].astype(np.uint32)
        with Image.open(image.filename) as again:
            again.tile = [(*again.tile[0][:3], rawmode.replace("16B", "16L"))]
            low = np.asarray(again)[..., :3]
        return _scale_16_bit(high * 256 + low)
    return np.asarray(image.convert("RGB"))


def _scale_16_bit(samples: np.ndarray) -> np.ndarray:
    return ((samples + 128) // 257).astype(np.uint8)


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]  # (height, width)
    kind: str  # e.g. "RGB", "grey", "16-bit"
    plain: bool

    @classmethod
    def of(cls, path: Path) -> "_Header":
        """Reads the header and the last bytes of a file; raises ``UserError`` if it is no whole picture."""
        _refuse_other_than_files(path)
        try:
            with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
                size, mode, format = image.size[::-1], image.mode, image.format
                if "16" in mode + raw_mode(image):
                    mode = "16-bit"
                whole = _ends_as_it_should(file, format)
        except UNREADABLE as error:
            reason = "is empty (0 bytes)" if _is_empty(path) else f"is not a readable JPEG or PNG ({error})"
            raise UserError(f"{path}: {reason}; replace or remove it") from error
        if not whole:
            read_rgb(path)
        return cls(size, KINDS.get(mode, mode), mode in ("RGB", "L") and format in ENDINGS)


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _ends_as_it_should(file: BinaryIO, format: str) -> bool:
    ending = ENDINGS.get(format, b"")
    file.seek(-len(ending), os.SEEK_END)
    return file.read() == ending


def _pair(a: Path, b: Path | None, headers: dict[Path, _Header]) -> Pair:
    height, width = headers[a].size
    if b is None:
        if width % 2:
            raise UserError(
                f"{a}: is {width} pixels wide, which does not split into two halves; A and B stand side by "
                "side in one file, or in folders A/ and B/"
            )
        return Pair(a.stem, a, None, (height, width // 2), headers[a].plain)
    if headers[b].size != headers[a].size:
        other_height, other_width = headers[b].size
        raise UserError(
            f"{b}: is {other_width}x{other_height} but its partner {a} is {width}x{height}; "
            "give both the same size"
        )
    return Pair(a.stem, a, b, (height, width), headers[a].plain and headers[b].plain)


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


def _report_conversions(headers: dict[Path, _Header]) -> None:
    converted = [path for path, header in headers.items() if header.kind != "RGB"]
    if not converted:
        return
    first = converted[0]
    message = f"{first} is not 8-bit RGB ({headers[first].kind}): converted"
    if len(converted) > 1:
        message += f", as are {len(converted) - 1} more files"
    if message not in _reported:
        _reported.add(message)
        log.warning(message)

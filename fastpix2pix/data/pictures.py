"""Files of pictures as arrays and back: JPEG, PNG, TIFF and .npy; 8 and 16 bits, float; any channels."""

import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile

from fastpix2pix.errors import UserError

FORMATS = ("JPEG", "PNG")
TIFF, ARRAY = (".tif", ".tiff"), ".npy"
EXTENSIONS = (".jpg", ".jpeg", ".png", *TIFF, ARRAY)
DTYPES = ("uint8", "uint16", "float32")
# What Pillow raises on a file that it cannot read.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
KINDS = {"1": "black and white", "L": "grey", "LA": "grey with transparency", "P": "palette"}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by channels, of 8 bits each
CHANNELS = {"1": 1, "I": 1, "I;16": 1, **{mode: channels for channels, mode in MODES.items()}}
# What a whole file ends with; a file that ends otherwise is decoded once, to see whether it is cut short.
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
PNG_SIGNATURE, PNG_COLOUR = b"\x89PNG\r\n\x1a\n", {1: 0, 3: 2, 4: 6}


@dataclass(frozen=True)
class Header:
    """What a file holds.

    size: (height, width). channels: how many it can be read with, without a conversion. dtype: of a sample,
    one of DTYPES. kind: in words, of JPEG and PNG, e.g. "palette". plain: 8-bit RGB or grey JPEG or PNG, of
    which every decoder makes the same.
    """

    size: tuple[int, int]
    channels: int
    dtype: str
    kind: str = ""
    plain: bool = False

    def offers(self, channels: int) -> bool:
        """Whether ``read`` gives so many channels. Of a JPEG or PNG, transparency may be dropped, and grey
        of 8 bits be repeated as RGB."""
        if channels == self.channels:
            return True
        without_transparency = self.channels in (2, 4) and channels == self.channels - 1
        grey_as_rgb = self.dtype == "uint8" and self.channels <= 2 and channels == 3
        return bool(self.kind) and (without_transparency or grey_as_rgb)

    def converted(self, channels: int) -> bool:
        """Whether reading so many channels changes more than the way in which samples are stored."""
        return bool(self.kind) and (channels != self.channels or self.kind in ("palette", "CMYK"))

    def __str__(self) -> str:
        each = "floating point" if self.dtype == "float32" else f"{8 * np.dtype(self.dtype).itemsize} bits"
        height, width = self.size
        return f"{channels_in_words(self.channels)} of {each}, {width}x{height} pixels"


def channels_in_words(count: int) -> str:
    """ "1 channel", "2 channels"."""
    return f"{count} channel{'' if count == 1 else 's'}"


def read_header(path: Path) -> Header:
    """What the file at ``path`` holds, by its header and its length; nothing of it is decoded.

    Raises ``UserError`` if it is no whole picture, or of a kind that is not read.
    """
    if path.suffix.lower() in TIFF:
        with _tiff(path) as (header, _decode):
            return header
    if path.suffix.lower() == ARRAY:
        with _array(path) as (header, _):
            return header
    _refuse_other_than_files(path)
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            header, whole = _header(path, image), _ends_as_it_should(file, image.format)
    except UNREADABLE as error:
        reason = "is empty (0 bytes)" if _is_empty(path) else f"is not a readable JPEG or PNG ({error})"
        raise UserError(f"{path}: {reason}; replace or remove it") from error
    if not whole:
        read(path)
    return header


def read(path: Path, channels: int | None = None) -> np.ndarray:
    """The samples of the file at ``path`` as they are: uint8, uint16 or float32 (height, width, channels).

    channels: how many are wanted, which ``Header.offers``; None: those of the file. Raises ``UserError`` for
    what can't be decoded, is of a kind that is not read, or holds values that are not finite.
    """
    if path.suffix.lower() in TIFF:
        with _tiff(path) as (header, decode):
            samples = decode()
    elif path.suffix.lower() == ARRAY:
        with _array(path) as (header, mapped):
            samples = np.array(mapped, mapped.dtype.newbyteorder("=")).reshape(*header.size, -1)
    else:
        return _read_by_pillow(path, channels)
    if channels not in (None, header.channels):
        raise UserError(f"{path}: holds {header}, not {channels} channels; replace or remove it")
    if header.dtype == "float32" and not np.isfinite(samples).all():
        raise UserError(f"{path}: holds values that are not finite (NaN, infinity); replace them")
    return samples


def read_rgb(path: Path) -> np.ndarray:
    """A JPEG or PNG to look at, uint8 (height, width, 3): 16 bit scaled by 1/257, transparency dropped, grey
    repeated."""
    samples = _read_by_pillow(path, None)
    if samples.dtype == np.uint16:
        samples = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
    colours = 3 if samples.shape[-1] >= 3 else 1
    return np.broadcast_to(samples[..., :colours], (*samples.shape[:2], 3))


# ------------------------------------------------------------------------------------------ JPEG and PNG


def _read_by_pillow(path: Path, channels: int | None) -> np.ndarray:
    _refuse_other_than_files(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            header = _header(path, image)
            channels = channels or header.channels
            if not header.offers(channels):
                raise UserError(f"{path}: holds {header}, not {channels} channels; replace or remove it")
            if header.dtype == "uint16":
                return _read_16_bits(image)[..., :channels]
            samples = np.asarray(image.convert(MODES[channels]))
            return samples[..., None] if channels == 1 else samples
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be decoded ({error}); replace or remove it") from error


def _refuse_other_than_files(path: Path) -> None:
    """Raises ``UserError`` for a pipe (opening it would wait for ever), device, folder or dangling link."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is not a file; remove it")


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the samples lie in the file, e.g. "RGB;16B". Raises OSError where the file ends before them."""
    if not image.tile:
        raise OSError("no pixels follow the header")  # Pillow would make a black picture of it
    return str(image.tile[0][3])


def _header(path: Path, image: ImageFile.ImageFile) -> Header:
    size, mode, rawmode = image.size[::-1], image.mode, _raw_mode(image)
    deep = "16" in mode + rawmode
    if rawmode == "LA;16B":  # of which Pillow reads the high bytes alone
        raise UserError(f"{path}: is grey with transparency of 16 bits; save it without transparency")
    if deep:
        return Header(size, CHANNELS.get(mode, 3), "uint16", "16-bit")
    plain = mode in ("RGB", "L") and image.format in ENDINGS
    return Header(size, CHANNELS.get(mode, 3), "uint8", KINDS.get(mode, mode), plain)


def _read_16_bits(image: ImageFile.ImageFile) -> np.ndarray:
    if image.mode.startswith("I"):  # grey
        return np.asarray(image).astype(np.uint16)[..., None]
    # Pillow keeps the high byte of each sample; read as the other byte order, the low one.
    rawmode, high = _raw_mode(image), np.asarray(image).astype(np.uint16)
    with Image.open(image.filename) as again:
        again.tile = [(*again.tile[0][:3], rawmode.replace("16B", "16L"))]
        return high * 256 + np.asarray(again)


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _ends_as_it_should(file: BinaryIO, format: str | None) -> bool:
    ending = ENDINGS.get(format or "", b"")
    file.seek(-len(ending), os.SEEK_END)
    return file.read() == ending


# ------------------------------------------------------------------------------------------ TIFF and .npy


def _import_tifffile(path: Path) -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(f'{path}: TIFF needs tifffile; run pip install "fastpix2pix[tiff]"') from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is raised as well
    return tifffile


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """A line in the place of whatever a library makes of a damaged file."""
    _refuse_other_than_files(path)
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if "imagecodecs" in str(error):
            raise UserError(f"{path}: {error}; run pip install imagecodecs") from error
        reason = "is empty (0 bytes)" if _is_empty(path) else f"cannot be decoded ({error})"
        raise UserError(f"{path}: {reason}; replace or remove it") from error


@contextmanager
def _tiff(path: Path) -> Iterator[tuple[Header, Any]]:
    """What a TIFF holds, and a function that decodes it as (height, width, channels)."""
    tifffile = _import_tifffile(path)
    with _one_line(path), tifffile.TiffFile(path, is_ome=False) as file:  # OME may name other files
        pictures = [series for series in file.series if not series.keyframe.is_reduced]
        if len(pictures) != 1:
            raise UserError(f"{path}: holds {len(pictures)} pictures; save each in a file of its own")
        series, page = pictures[0], pictures[0].keyframe
        lengths = {axis: n for axis, n in zip(series.axes, series.shape, strict=True) if n > 1}
        others = [axis for axis in lengths if axis not in "YX"]
        if not {"Y", "X"} <= {*series.axes} or len(others) > 1:
            shape = "x".join(map(str, series.shape))
            raise UserError(f"{path}: is {shape} ({series.axes}); give (channels, height, width) at most")
        size = (lengths.get("Y", 1), lengths.get("X", 1))
        header = Header(size, lengths[others[0]] if others else 1, series.dtype.name)
        _check(path, header)
        if page.bitspersample != 8 * series.dtype.itemsize or page.photometric == 3:
            kind = "a palette" if page.photometric == 3 else f"samples of {page.bitspersample} bits"
            raise UserError(f"{path}: has {kind}; save it with samples of 8 or 16 bits")
        _check_length(path, series)
        inner = [axis for axis in series.axes if axis in lengths]

        def decode() -> np.ndarray:
            samples = series.asarray().reshape([lengths[axis] for axis in inner])
            if others:
                samples = np.moveaxis(samples, inner.index(others[0]), -1)
            return np.ascontiguousarray(samples).reshape(*size, header.channels)

        yield header, decode


def _check_length(path: Path, series: Any) -> None:
    """Raise ``UserError`` when the file ends before the samples that it promises."""
    if series.dataoffset is not None:  # all in one piece
        end = series.dataoffset + series.nbytes
    else:
        pages = [page for page in series.pages if page is not None]
        ends = (map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)) for page in pages)
        end = max(map(max, ends))
    if end > path.stat().st_size:
        raise UserError(f"{path}: cannot be decoded (it is cut short); replace or remove it")


@contextmanager
def _array(path: Path) -> Iterator[tuple[Header, np.ndarray]]:
    """What an .npy file holds, and its array without having read it. Nothing in it is executed."""
    with _one_line(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or not array.size:
            raise UserError(f"{path}: is no array (height, width) or (height, width, channels); save such")
        header = Header(array.shape[:2], array.shape[2] if array.ndim == 3 else 1, array.dtype.name)
        _check(path, header)
        yield header, array


def _check(path: Path, header: Header) -> None:
    if header.dtype not in DTYPES:
        raise UserError(f"{path}: holds {header.dtype}; save it as one of {', '.join(DTYPES)}")
    most = Image.MAX_IMAGE_PIXELS
    samples = header.size[0] * header.size[1] * header.channels
    if most is not None and samples * np.dtype(header.dtype).itemsize > 4 * 2 * most:  # Pillow's, in RGBA
        raise UserError(f"{path}: is too large ({header}); cut it into smaller pictures")


# ------------------------------------------------------------------------------------------ writing


def kept_suffix(path: Path) -> str:
    """What a picture like the one at ``path`` is written as: JPEG, which loses, as PNG."""
    suffix = path.suffix.lower()
    return ".tif" if suffix in TIFF else ARRAY if suffix == ARRAY else ".png"


def can_hold(suffix: str, channels: int, dtype: str) -> bool:
    """Whether a file of this kind can be written with such samples."""
    depths: dict[str, dict[int, Any]] = {"uint8": MODES, "uint16": PNG_COLOUR}
    return suffix != ".png" or channels in depths.get(dtype, {})


def write(path: Path, samples: np.ndarray) -> None:
    """Write uint8, uint16 or float32 (height, width, channels), which the file ``can_hold``, as they are.

    Raises OSError where that can't be, and UserError without tifffile.
    """
    channels = samples.shape[-1]
    picture = np.ascontiguousarray(samples[..., 0] if channels == 1 else samples)
    if path.suffix == ARRAY:
        np.save(path, picture, allow_pickle=False)
    elif path.suffix in TIFF:
        photometric = "rgb" if channels == 3 and samples.dtype != np.float32 else "minisblack"
        layout = {"planarconfig": "contig"} if channels > 1 else {}
        _import_tifffile(path).imwrite(path, picture, photometric=photometric, metadata=None, **layout)
    elif samples.dtype == np.uint16:
        path.write_bytes(_png_of_16_bits(samples))
    else:
        Image.fromarray(picture).save(path)


def _png_of_16_bits(samples: np.ndarray) -> bytes:
    """Of (height, width, 1, 3 or 4), which Pillow does not write in colour; rows without a filter."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (1, 0)))  # a filter type of 0 before each
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR[channels], 0, 0, 0),
        b"IDAT": zlib.compress(rows.tobytes()),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts.items()
    )
    return PNG_SIGNATURE + b"".join(chunks)

"""A published data set brought here whole: downloaded, checked, unpacked, all of it or nothing."""

import difflib
import errno
import gzip
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

import pooch
import requests
from filelock import FileLock
from tqdm import tqdm

from fastpix2pix.data.catalog import DATASETS, Dataset
from fastpix2pix.errors import UserError

STALL_SECONDS = 30.0  # a server that is silent for so long counts as unreachable


class _Unusable(Exception):
    """An archive that must not be used; the message completes the sentence that begins with its name."""


def fetch_dataset(name: str, folder: str | Path | None = None) -> Path:
    """Folder ``FOLDER/NAME`` of the data set ``name``, with one folder per split; downloaded if it is absent.

    ``folder`` defaults to ``datasets``. An archive that lies at ``FOLDER/NAME.tar.gz`` is used instead of a
    download, and is kept. Everything happens in ``FOLDER/.NAME.partial`` and the finished data set is renamed
    into place, so a folder of that name is always whole; after an interruption the next call starts clean.
    The archive's SHA-256 goes into ``FOLDER/NAME.tar.gz.sha256`` at the first success, and every later
    archive must have it. Processes that ask at the same time wait for the first one.

    Raises UserError: unknown name, no connection, an archive that is broken, unsafe, too large or different
    from the recorded one, a folder that cannot be written, or a folder of that name without pairs.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(DATASETS)}"
        raise UserError(f"{name!r} is no known data set; {hint}")
    dataset = DATASETS[name]
    folder = Path("datasets" if folder is None else folder)
    target = folder / name
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{name}.lock"):
                if not target.exists():
                    _install(dataset, folder)
        except OSError as error:
            raise UserError(
                f"{folder}: {error.strerror or error}; choose a folder with room to write"
            ) from error
    if not (target / "train").is_dir():
        raise UserError(f"{target} has no train folder; remove {target} to have it downloaded again")
    return target


def _install(dataset: Dataset, folder: Path) -> None:
    """Bring ``folder / dataset.name`` into being, all of it or nothing. The caller holds the lock."""
    partial = folder / f".{dataset.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)  # left by a process that was killed
    partial.mkdir()
    record = folder / f"{dataset.name}.tar.gz.sha256"
    archive = folder / f"{dataset.name}.tar.gz"
    try:
        source, remedy = str(archive), "remove it to have it downloaded"
        if not archive.is_file():
            source, remedy = dataset.url, "try again later"
            archive = _download(dataset, partial, folder)
        digest = _checked_digest(archive, source, record)
        try:
            _extract(dataset, archive, partial)
        except _Unusable as error:
            raise UserError(f"{source} {error}; {remedy}") from error
        record.write_text(f"{digest}  {dataset.name}.tar.gz\n", encoding="ascii")
        (partial / dataset.name).rename(folder / dataset.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# -------------------------------------------------------------------------------------------- download


def _download(dataset: Dataset, into: Path, folder: Path) -> Path:
    def stream(url: str, output: str, _pooch: object) -> None:
        """pooch's own downloader, but for the bound and for lengths that are announced wrong."""
        with requests.get(url, stream=True, timeout=STALL_SECONDS) as response, open(output, "wb") as file:
            response.raise_for_status()
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            with tqdm(desc=dataset.name, total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
                for part in response.iter_content(2**16):
                    file.write(part)
                    bar.update(len(part))
                    if file.tell() > dataset.limit:
                        raise _Unusable(f"is larger than {dataset.limit // 2**20} MiB")

    pooch.get_logger().setLevel("WARNING")
    try:
        name = pooch.retrieve(
            dataset.url, known_hash=None, fname=f"{dataset.name}.tar.gz", path=into, downloader=stream
        )
    except (requests.RequestException, ValueError, _Unusable) as error:  # ValueError: of a bad address
        raise UserError(
            f"{dataset.url} {_reason(error)}; try again later, or put {dataset.name}.tar.gz "
            f"({dataset.mebibytes} MiB), or {dataset.name}/ unpacked from it, into {folder} by hand"
        ) from error
    return Path(name)


def _reason(error: Exception) -> str:
    """What went wrong, as the end of a sentence that begins with the address."""
    if isinstance(error, requests.HTTPError):
        return f"answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return f"was silent for {STALL_SECONDS:g} s"
    if isinstance(error, requests.ConnectionError):
        return "cannot be reached"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "broke off before the end"
    return str(error) if isinstance(error, _Unusable) else "answers nonsense"


def _checked_digest(archive: Path, source: str | Path, record: Path) -> str:
    """SHA-256 of ``archive`` in hexadecimal, equal to the recorded one if there is a record."""
    digest = pooch.file_hash(str(archive), alg="sha256")
    if record.exists():
        recorded = record.read_text(encoding="ascii", errors="replace").split(maxsplit=1)[:1]
        if recorded != [digest]:
            raise UserError(
                f"{source} has SHA-256 {digest}, not the one in {record}; "
                f"remove {record} only if you trust the new archive"
            )
    return digest


# ------------------------------------------------------------------------------------------ extraction


_TOO_MUCH = "unpacks to far more than the published data set"


class _BoundedReader:
    """Read ``stream`` and stop at ``limit`` bytes, which is what a decompression bomb runs into."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, limit: int):
        self.stream = stream
        self.left = limit

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise _Unusable(_TOO_MUCH)
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a broken one for the end, and half an archive for all."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictTarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in typeshed
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _extract(dataset: Dataset, archive: Path, into: Path) -> None:
    """Unpack the pairs of ``archive`` into ``into / dataset.name``; _Unusable if it is broken or unsafe."""
    try:
        with gzip.open(archive) as decompressed:
            stream = _BoundedReader(decompressed, dataset.limit)
            total = sum(dataset.pairs.values())
            with (
                tarfile.open(  # type: ignore[call-overload]  # a stream is only read
                    fileobj=stream, mode="r|", tarinfo=_StrictTarInfo
                ) as members,
                tqdm(members, desc="unpack", unit=" files", total=total) as bar,
            ):
                _extract_pairs(members, bar, stream, into)
            while stream.read(2**20):  # up to the checksum at the end, which tells a truncated archive
                pass
    except _BROKEN_ARCHIVE as error:
        raise _Unusable(f"is no whole tar.gz archive ({error})") from error
    except OSError as error:
        if error.errno not in _BAD_NAME:
            raise
        raise _Unusable(f"holds {Path(error.filename).name!r}: {error.strerror}") from error
    if not (into / dataset.name / "train").is_dir():
        raise _Unusable(f"holds no pair {dataset.name}/train/...")


_BAD_NAME = (errno.EEXIST, errno.ENAMETOOLONG, errno.EILSEQ)  # the archive's fault, not the disk's

# What the standard library raises for broken bytes: tarfile recurses through chained headers, and decodes
# numbers and names with int() and decode().
_BROKEN_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError)


def _extract_pairs(
    archive: tarfile.TarFile, members: Iterable[tarfile.TarInfo], stream: _BoundedReader, into: Path
) -> None:
    """Write the files NAME/SPLIT/FILE below ``into``; refuse an archive that holds anything unsafe.

    Only names and contents are taken from the archive: no link, owner, permission or time.
    """
    for member in members:
        if member.size > stream.left:  # tarfile would go on reading for as long as a header claims
            raise _Unusable(_TOO_MUCH)
        path = PureWindowsPath(member.name)  # knows both separators and drive letters
        if path.anchor or ".." in path.parts:
            raise _Unusable(f"holds {member.name!r}, which leaves the folder")
        plain = member.isfile() and not member.issparse()  # a sparse file may be 8 EiB of holes
        if not (plain or member.isdir()):
            raise _Unusable(f"holds {member.name!r}, which is neither a plain file nor a folder")
        if plain and len(path.parts) == 3 and not path.name.startswith("."):
            target = into.joinpath(*path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None, "a plain file has contents"
            with content, open(target, "xb") as file:
                shutil.copyfileobj(content, file)

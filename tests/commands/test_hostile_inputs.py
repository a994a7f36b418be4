"""What the world may hand to ``check``, ``translate`` and ``download``: each of more than 200 inputs ends in
one line and exit code 2, writes nothing outside its target and leaves nothing that looks whole.

The inputs are made here by rule, and each of them is wrong by the specification of its format: a PNG with a
flipped bit under a checksum, a JPEG without its end, a tar archive with a member outside. Valid files that
are merely odd are the subject of other tests.
"""

import dataclasses
import gzip
import io
import os
import re
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from fastpix2pix import checkpoint, translate
from fastpix2pix.data import __main__ as data
from fastpix2pix.data import catalog
from fastpix2pix.models import build_networks
from fastpix2pix.translator import load

# ------------------------------------------------------------------------------------------ pictures


def picture(format: str, **options) -> bytes:
    """A pair of two 32x32 halves of noise, which does not compress: whatever is cut off is missed."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


PNG, JPEG, PROGRESSIVE = picture("PNG"), picture("JPEG"), picture("JPEG", progressive=True)
SIGNATURE = PNG[:8]


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with the checksum that it should have."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width=64, height=32, depth=8, color=2, filter=0, more=b"", pixels=b"\0" * 100, end=True) -> bytes:
    """A PNG whose checksums are right, whatever else is not."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, filter, 0)
    body = chunk(b"IDAT", zlib.compress(pixels)) if pixels else b""
    return SIGNATURE + chunk(b"IHDR", header) + more + body + (chunk(b"IEND", b"") if end else b"")


def flip(content: bytes, bit: int) -> bytes:
    at = bit // 8
    return content[:at] + bytes([content[at] ^ (1 << bit % 8)]) + content[at + 1 :]


def jpeg_sized(width: int, height: int) -> bytes:
    """The JPEG with other dimensions in its frame header."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def jpeg_without(marker: int) -> bytes:
    """The JPEG without the segments of this marker."""
    content, at = JPEG, 2
    while content[at + 1] != 0xDA:
        length = 2 + struct.unpack(">H", content[at + 2 : at + 4])[0]
        if content[at + 1] == marker:
            content = content[:at] + content[at + length :]
        else:
            at += length
    return content


DAMAGED = {
    **{f"PNG cut at {p} %": PNG[: len(PNG) * p // 100] for p in (1, 4, 9, 18, 33, 50, 64, 80, 92, 97)},
    **{f"JPEG cut at {p} %": JPEG[: len(JPEG) * p // 100] for p in (1, 3, 8, 20, 33, 50, 64, 80, 92, 97)},
    **{f"progressive JPEG cut at {p} %": PROGRESSIVE[: len(PROGRESSIVE) * p // 100] for p in (9, 30, 60, 90)},
    # The signature, and the header under its checksum, which ends at byte 33.
    **{f"PNG with bit {bit} flipped": flip(PNG, bit) for bit in range(3, 33 * 8, 17)},
    **{f"JPEG with bit {bit} flipped": flip(JPEG, bit) for bit in (2, 7, 11)},
    **{
        f"PNG of {width}x{height}": png(width, height)
        for width, height in (
            (0, 0),
            (0, 32),
            (64, 0),
            (64, 32),
            (2**31 - 1, 1),
            (60000, 60000),
            (8000, 9000),
        )
    },
    "PNG of 4294967295x4294967295": png(2**32 - 1, 2**32 - 1),
    "PNG of bit depth 3": png(depth=3),
    "PNG of colour type 5": png(color=5),
    "PNG of filter method 1": png(filter=1),
    "PNG without pixels": png(pixels=b""),
    "PNG with a text of 8 MiB": png(more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8 * 2**20)))),
    "PNG of the header only": PNG[:33],
    "PNG of the signature only": SIGNATURE,
    "PNG after a text transfer": PNG.replace(b"\r\n", b"\n"),
    "PNG in 7 bits": bytes(byte & 0x7F for byte in PNG),
    "PNG compressed": gzip.compress(PNG),
    "PNG reversed": PNG[::-1],
    "PNG behind a byte order mark": b"\xef\xbb\xbf" + PNG,
    **{f"JPEG of {width}x{height}": jpeg_sized(width, height) for width, height in ((0, 32), (65535, 65535))},
    "JPEG without tables": jpeg_without(0xDB),
    "JPEG without a frame": jpeg_without(0xC0),
    "JPEG of the start only": JPEG[:2],
    "JPEG of markers": b"\xff\xd8" * 500,
    "nothing": b"",
    "a newline": b"\n",
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "text": b"not a picture\n",
    "UTF-16": "kein Bild".encode("utf-16"),
    "web page": b"<!doctype html><html><body>404 Not Found</body></html>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="32"/>',
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 32\n(x) run\n",
    "script": b"#!/bin/sh\ntouch escaped\n",
    **{f"{format} by another name": picture(format) for format in ("BMP", "GIF", "TIFF", "WEBP", "PPM")},
}

NAMES = (
    *("a b.png", "  .png", "line\nbreak.png", "tab\tand\rreturn.jpg", "ünï 図面 🏠.png", "\u202egnp.jpg"),
    *("'\"`$(touch escaped)`.png", "; touch escaped ;.jpg", "%s%n{0}\\n.png", "--run.png", "-.jpg"),
    *("\x1b[2J\x1b]0;title\x07.png", "<script>alert(1)<!--.png", "*?[a].png", "CON.png", "é\u0301.jpg"),
    *("n" * 250 + ".jpg", "a..png", "\x7f\u0085\u2028.png"),
    *(os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"\xff\xfe\x80.jpeg")),
)


def plant_special(kind: str, path: Path) -> None:
    """Something at ``path`` that is no regular file, or none that can be read."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            here = os.getcwd()
            os.chdir(path.parent)  # the path of a socket must be short
            end.bind(path.name)
            os.chdir(here)
    else:
        path.symlink_to({"circle": path.name, "dangling": "nowhere"}.get(kind, kind))


SPECIAL = ("folder", "pipe", "socket", "circle", "dangling", "/dev/zero", "/dev/null", "/proc/self/mem", "/")

# What stands at the place of one picture among good ones: by its name, a function that puts it there.
PLANTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{
        f"file: {what}": (
            "bad.jpg" if "JPEG" in what else "bad.png",
            lambda path, content=content: path.write_bytes(content),
        )
        for what, content in DAMAGED.items()
    },
    **{
        f"special: {what}": ("bad.png", lambda path, what=what: plant_special(what, path)) for what in SPECIAL
    },
    **{f"name: {ascii(name)}": (name, lambda path: path.write_bytes(PNG[: len(PNG) // 2])) for name in NAMES},
}


# ------------------------------------------------------------------------------------------ archives


def member(name: str, content: bytes = b"x", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


PAIRS = [member(f"facades/train/{i}.jpg", JPEG[: 700 + 100 * i]) for i in range(4)]


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


TAR = tar(*PAIRS)
GOOD = gzip.compress(TAR, mtime=0)
HEADER_2 = TAR.index(b"facades/train/2.jpg")


def entry(name: str, type: bytes, link: str = "", **fields) -> tuple[tarfile.TarInfo, bytes]:
    """A member without content: a link, a device, a pipe."""
    return member(name, b"", type=type, linkname=link, **fields)


def patched(at: int, content: bytes) -> bytes:
    """The tar archive with other bytes in it, and a right checksum around them."""
    return gzip.compress(TAR[:at] + content + TAR[at + len(content) :])


def members_outside(outside: str) -> dict[str, tuple]:
    """Members that aim at ``outside``, a path that is absolute, or at what lies above."""
    link, train = "facades/train/l.jpg", "facades/train"
    return {
        "absolute": member(outside),
        **{
            f"outside by {name}": member(name)
            for name in (
                *("../escaped", "../../escaped", "facades/../../escaped", "facades/train/../../../escaped"),
                *("./../escaped", "..", "facades/train/..", "..\\escaped", "facades\\..\\..\\escaped"),
                *(
                    "C:\\escaped",
                    "C:escaped",
                    "\\escaped",
                    "\\\\host\\share\\escaped",
                    "//host/share/escaped",
                ),
                *("facades/train/..\\..\\..\\escaped", "../\n/escaped", "../\x1b[2J"),
            )
        },
        **{
            f"symbolic link to {to}": entry(link, tarfile.SYMTYPE, to)
            for to in ("0.jpg", "..", "/etc/passwd", "../../../escaped", "")
        },
        **{f"hard link to {to}": entry(link, tarfile.LNKTYPE, to) for to in ("0.jpg", "/etc/passwd", "..")},
        "link in place of a folder": entry(train, tarfile.SYMTYPE, ".."),
        "character device": entry(link, tarfile.CHRTYPE, devmajor=1, devminor=5),
        "block device": entry(link, tarfile.BLKTYPE),
        "pipe": entry(link, tarfile.FIFOTYPE),
        "unknown type": entry(link, b"Q"),
    }


NO_ARCHIVES = {
    **{f"cut at {p} %": GOOD[: len(GOOD) * p // 100] for p in range(2, 100, 7)},
    **{f"without its last {n} bytes": GOOD[:-n] for n in (1, 4, 7, 8, 12)},
    **{f"bit {bit} flipped": flip(GOOD, bit) for bit in (1, 9, 18, len(GOOD) * 4, len(GOOD) * 8 - 40)},
    **{f"tar cut at byte {n}": gzip.compress(TAR[:n]) for n in (100, 700, HEADER_2 - 1, HEADER_2 + 100)},
    "tar cut between two pairs": gzip.compress(TAR[:HEADER_2]),
    "tar with a broken second header": patched(HEADER_2, b"\xff" * 512),
    "tar with a wrong header checksum": patched(HEADER_2, b"F"),
    "tar with a size that is no number": patched(HEADER_2 + 124, b"zzzzzzzzzzz\0"),
    "tar with a negative size": patched(HEADER_2 + 124, b"\xff" * 12),
    "pax header of nonsense": gzip.compress(tar(member("pax", b"99999 x=1\n", type=tarfile.XHDTYPE), *PAIRS)),
    "pax header without a length": gzip.compress(tar(member("pax", b"path=../x", type=tarfile.XHDTYPE))),
    "long name of 8 MiB": gzip.compress(tar(member("././@LongLink", bytes(8 * 2**20), type=b"L"), *PAIRS)),
    "padding of 8 MiB": gzip.compress(TAR + bytes(8 * 2**20)),
    "a pair of 8 MiB": gzip.compress(tar(*PAIRS, member("facades/train/9.jpg", bytes(8 * 2**20)))),
    "the same pair twice": gzip.compress(tar(*PAIRS, PAIRS[0])),
    "a name that is too long": gzip.compress(tar(*PAIRS, member(f"facades/train/{'n' * 300}.jpg"))),
    "another data set": gzip.compress(tar(member("maps/train/1.jpg"))),
    "no pair": gzip.compress(tar(member("facades/README"))),
    "no member": gzip.compress(tar()),
    "nothing": b"",
    "nothing, compressed": gzip.compress(b""),
    "a tar without gzip": TAR,
    "gzip twice": gzip.compress(GOOD),
    "gzip with rubbish behind": GOOD + b"rubbish",
    "a picture": PNG,
    "a web page": b"<!doctype html><title>Please log in</title>",
    "a compressed web page": gzip.compress(b"<!doctype html><title>Please log in</title>" * 50),
    "a bzip2 archive": b"BZh91AY&SY" + bytes(100),
    "a zip archive": b"PK\x03\x04" + bytes(100),
}

NO_BODY = "Content-Length: 0\r\n\r\n"
ANSWERS = {
    **{
        f"status {code}": f"HTTP/1.1 {code} No\r\n{NO_BODY}"
        for code in (401, 403, 404, 410, 429, 500, 502, 503)
    },
    **{
        f"a redirection to {where}": f"HTTP/1.1 302 Found\r\nLocation: {where}\r\n{NO_BODY}"
        for where in ("/facades.tar.gz", "file:///etc/passwd", "http://127.0.0.1:1/", "http://[::")
    },
    "no answer": "",
    "no HTTP": "220 ftp server ready\r\n",
    "half a header": "HTTP/1.1 200 OK\r\nContent-Le",
    "a length that is no number": "HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nx",
    "a negative length": "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx",
    "a length that is too large": "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx",
    "two lengths": "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 9\r\n\r\nx",
    "half a body": "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nx",
    "broken chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n",
    "half a chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\nx\r\n",
    "a false encoding": "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
    "a web page": "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<html>log in...",
}


class Answering(socketserver.ThreadingTCPServer):
    """Reads a request and sends ``answer``, whatever was asked."""

    daemon_threads, allow_reuse_address = True, True
    answer = b""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            self.wfile.write(self.server.answer)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)


@pytest.fixture(scope="module")
def server():
    with Answering() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


# --------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a tiny untrained network, for pairs of two 32x32 halves."""
    config = tiny_config(ngf=4, ndf=4, n_layers_D=1, name="tiny")
    networks = dict(
        zip(("generator", "discriminator"), build_networks(config.network_options()), strict=True)
    )
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    weights = {name: network.state_dict() for name, network in networks.items()}
    checkpoint.save(folder, 1, {"config": config.to_dict(), "step": 1, **weights}, keep=1)
    return folder


@pytest.fixture(scope="module")
def translator(run):
    return load(run)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current directory, two levels below what is watched."""
    here = tmp_path / "watched" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    return here


def snapshot(folder: Path) -> dict[str, object]:
    """Everything below ``folder``: its type, and what it holds or points to."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        held = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else None
        found[str(path.relative_to(folder))] = (stat.S_IFMT(mode), held)
    return found


def refusal(main: Callable, capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The one line with which the command refuses; everything that it prints can be shown."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    out, err = capsys.readouterr()
    line = err.rpartition("error: ")[2].removesuffix("\n")
    assert stop.value.code == 2
    assert err.count("error: ") == 1 and "\n" not in line and "Traceback" not in err
    assert line.isprintable() and 20 < len(line) < 1200 and ("; " in line), line
    assert all(row.isprintable() for row in out.split("\n"))
    return line


def shown(name: str) -> str:
    """A part of ``name`` that survives the escaping of what a terminal would obey."""
    return max(re.split(r"[^\w.<>$(){}\[\]*-]+|[\ud800-\udfff]", name), key=len)


@pytest.mark.parametrize("what", PLANTS)
def test_check(place, tmp_path, capsys, what):
    name, plant = PLANTS[what]
    (place / "set" / "train").mkdir(parents=True)
    (place / "set" / "train" / "good.png").write_bytes(PNG)
    plant(place / "set" / "train" / name)
    before = snapshot(tmp_path)
    line = refusal(data.main, capsys, "check", "set")
    assert line.startswith("set cannot be trained on: set/train/") and shown(name) in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", PLANTS)
def test_translate(run, translator, place, tmp_path, capsys, monkeypatch, what):
    monkeypatch.setattr(translate, "load", lambda *_, **__: translator)
    name, plant = PLANTS[what]
    (place / "in").mkdir()
    (place / "in" / "a good one.png").write_bytes(PNG)
    plant(place / "in" / name)
    before = snapshot(tmp_path)
    line = refusal(translate.main, capsys, "--run", run, "--input", "in", "--output", "out")
    assert line.startswith("in/") and shown(name) in line
    assert snapshot(tmp_path) == before


@pytest.fixture
def small(monkeypatch):
    """The facades, published as an archive of 1 MiB by a server that cannot be reached."""
    monkeypatch.setitem(
        catalog.DATASETS, "facades", dataclasses.replace(catalog.DATASETS["facades"], mebibytes=1)
    )
    monkeypatch.setattr(catalog, "BASE_URL", "http://127.0.0.1:1")


def download(capsys, tmp_path: Path) -> str:
    """The refusal of a download into the folder data, in which nothing but the lock is new."""
    before = snapshot(tmp_path)
    line = refusal(data.main, capsys, "download", "facades", "--folder", "data")
    lock = str(Path("watched", "here", "data", ".facades.lock"))
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if k != lock} == before
    return line


@pytest.mark.parametrize("what", NO_ARCHIVES)
def test_download_of_no_archive(small, place, tmp_path, capsys, what):
    (place / "data").mkdir()
    (place / "data" / "facades.tar.gz").write_bytes(NO_ARCHIVES[what])
    assert download(capsys, tmp_path).startswith("data/facades.tar.gz ")


@pytest.mark.parametrize("form", ["first, GNU", "last, pax"])
@pytest.mark.parametrize("what", members_outside("/x"))
def test_download_of_an_archive_that_aims_outside(small, place, tmp_path, capsys, what, form):
    aimed = members_outside(str(tmp_path / "escaped"))[what]
    members = [aimed, *PAIRS] if "first" in form else [*PAIRS, aimed]
    format = tarfile.GNU_FORMAT if "GNU" in form else tarfile.PAX_FORMAT
    (place / "data").mkdir()
    (place / "data" / "facades.tar.gz").write_bytes(gzip.compress(tar(*members, format=format)))
    line = download(capsys, tmp_path)
    assert line.startswith("data/facades.tar.gz holds ")
    assert "which leaves the folder" in line or "neither a plain file nor a folder" in line


@pytest.mark.parametrize("what", ANSWERS)
def test_download_from_a_server_that_fails(small, server, place, tmp_path, capsys, monkeypatch, what):
    monkeypatch.setattr(catalog, "BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(server, "answer", ANSWERS[what].encode())
    (place / "data").mkdir()
    assert f"{catalog.BASE_URL}/facades.tar.gz " in download(capsys, tmp_path)


@pytest.mark.parametrize("record", [b"", b"\0\xff" * 40, b"0" * 64, b"<html>", b"\n\n", b"0" * 64 + b"  x\n"])
def test_download_of_an_archive_that_is_not_the_recorded_one(small, place, tmp_path, capsys, record):
    (place / "data").mkdir()
    (place / "data" / "facades.tar.gz").write_bytes(GOOD)
    (place / "data" / "facades.tar.gz.sha256").write_bytes(record)
    assert "SHA-256" in download(capsys, tmp_path)


def test_in_processes_of_their_own(run, place, tmp_path):
    """What a terminal shows: progress, and one line. Memory is claimed by a header, a name is no text."""
    for folder in ("set/train", "in", "data"):
        (place / folder).mkdir(parents=True)
    (place / "set/train/1.png").write_bytes(png(10000, 12000))
    (place / "in" / os.fsdecode(b"caf\xe9\n.png")).write_bytes(PNG[:-100])
    (place / "data/facades.tar.gz").write_bytes(gzip.compress(tar(*PAIRS, member("facades/../../escaped"))))
    before = snapshot(tmp_path)
    commands = {
        "set cannot be trained on: set/train/1.png: ": "data check set",
        "in/caf\\udce9 .png: ": f"translate --run {run} --input in --output out",
        "data/facades.tar.gz holds 'facades/../../escaped', ": "data download facades --folder data",
    }
    processes = {
        start: subprocess.Popen(
            [sys.executable, "-m", *f"fastpix2pix.{command}".split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for start, command in commands.items()
    }
    for start, process in processes.items():
        _, err = process.communicate()
        lines = [line.strip() for line in err.splitlines() if line.strip() and "|" not in line]  # no bars
        *bars, line = [line for line in lines if not re.match(r"unpack: \d+ files", line)]
        assert process.returncode == 2 and bars == [] and line.startswith(f"error: {start}"), err
    after = snapshot(tmp_path)
    assert after.keys() - before.keys() == {"watched/here/data/.facades.lock"}

"""Data sets by name, from a server on this machine that answers well, badly, slowly or maliciously."""

import dataclasses
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastpix2pix.data import catalog, download
from fastpix2pix.data.__main__ import main
from fastpix2pix.errors import UserError

PAIRS = {
    f"facades/{split}/{i}.jpg": f"{split} {i}".encode() * 50 for split in ("train", "val") for i in range(3)
}


def tar_gz(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    """A gzipped tar of these members: (name, content) pairs and finished headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member, io.BytesIO(bytes(member.size)) if member.isreg() else None)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def bomb(kind: bytes) -> bytes:
    """A small archive of one member of 8 MiB of zeros, whatever its type says about its use."""
    info = tarfile.TarInfo("facades/train/0.jpg")
    info.type, info.size = kind, 8 * 2**20
    return gzip.compress(info.tobuf() + bytes(info.size))


def sparse() -> bytes:
    """The pairs, and a file that stores nothing and is one hole of 1 MB (pax format, GNU sparse 0.1)."""
    info = tarfile.TarInfo("facades/train/hole.jpg")
    info.pax_headers = {"GNU.sparse.map": f"{10**6},0", "GNU.sparse.size": str(10**6)}
    pairs = gzip.decompress(tar_gz(*PAIRS.items()))[: 1024 * len(PAIRS)]
    return gzip.compress(pairs + info.tobuf(tarfile.PAX_FORMAT))


def claim() -> bytes:
    """A member that claims to be 4 EiB and ends at once: skipping it would take for ever."""
    info = tarfile.TarInfo("README")
    info.size = 2**62
    return gzip.compress(info.tobuf())


GOOD = tar_gz(*PAIRS.items())


class Server(ThreadingHTTPServer):
    """Answers every request with ``status``, ``headers`` and ``chunks``, and counts the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = 0
        self.say(GOOD)

    def say(self, body: bytes, status: int = 200, length: int | None = None, pause: float = 0.0) -> None:
        """Answer with ``body``, announced as ``length`` bytes, in two halves ``pause`` seconds apart."""
        self.body, self.status, self.pause = body, status, pause
        self.length = len(body) if length is None else length
        self.piece = 0

    def say_in_pieces(self, body: bytes, piece: int) -> None:
        """Answer with ``body`` in chunks of ``piece`` bytes, without saying how many there will be."""
        self.say(body)
        self.piece = piece


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests += 1
        if server.piece:
            return self.send_chunks(server.body, server.piece)
        self.send_response(server.status)
        self.send_header("Content-Length", str(server.length))
        self.end_headers()
        half = len(server.body) // 2
        try:
            self.wfile.write(server.body[:half])
            self.wfile.flush()
            time.sleep(server.pause)
            self.wfile.write(server.body[half:])
        except OSError:
            pass  # the client has hung up

    def send_chunks(self, body: bytes, piece: int) -> None:
        self.protocol_version = "HTTP/1.1"
        self.close_connection = True
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(0, len(body), piece):
            part = body[i : i + piece]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(catalog, "BASE_URL", f"http://127.0.0.1:{running.server_port}")
        yield running
        running.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".facades.lock"
    }


def test_download_brings_every_pair_and_records_the_hash(server, tmp_path):
    folder = tmp_path / "deep" / "data sets"
    assert download.fetch_dataset("facades", folder) == folder / "facades"
    record = f"{hashlib.sha256(GOOD).hexdigest()}  facades.tar.gz\n".encode()
    assert contents(folder) == PAIRS | {"facades.tar.gz.sha256": record}


def test_present_data_set_is_left_alone(server, tmp_path):
    (tmp_path / "facades" / "train").mkdir(parents=True)
    tmp_path.chmod(0o500)
    assert download.fetch_dataset("facades", tmp_path) == tmp_path / "facades"
    assert server.requests == 0
    assert not (tmp_path / ".facades.lock").exists()


def test_archive_put_there_by_hand_is_used_and_kept(server, tmp_path):
    (tmp_path / "facades.tar.gz").write_bytes(GOOD)
    download.fetch_dataset("facades", tmp_path)
    assert server.requests == 0
    assert contents(tmp_path).items() >= (PAIRS | {"facades.tar.gz": GOOD}).items()


def test_archive_that_changed_since_its_first_use_is_refused(server, tmp_path):
    download.fetch_dataset("facades", tmp_path)
    shutil.rmtree(tmp_path / "facades")
    before = contents(tmp_path)
    server.say(tar_gz(*PAIRS.items(), ("facades/train/9.jpg", b"planted")))
    with pytest.raises(UserError, match=f"not the one in {tmp_path}/facades.tar.gz.sha256"):
        download.fetch_dataset("facades", tmp_path)
    assert contents(tmp_path) == before
    server.say(GOOD)
    download.fetch_dataset("facades", tmp_path)
    assert contents(tmp_path) == PAIRS | before


def test_only_pairs_are_unpacked_and_only_their_bytes(server, tmp_path):
    rogue = tarfile.TarInfo("facades/train/setuid.jpg")
    rogue.mode, rogue.uid, rogue.size = 0o6777, 12345, 4
    server.say(
        tar_gz(
            *PAIRS.items(),
            rogue,
            special("facades/train", tarfile.DIRTYPE),
            ("README", b"x"),
            ("other/train/1.jpg", b"x"),
            ("facades/train/._1.jpg", b"resource fork"),
            ("facades/train/deep/1.jpg", b"x"),
        )
    )
    download.fetch_dataset("facades", tmp_path)
    found = contents(tmp_path / "facades")
    assert set(found) == {name.removeprefix("facades/") for name in PAIRS} | {"train/setuid.jpg"}
    status = (tmp_path / "facades/train/setuid.jpg").stat()
    assert status.st_mode & 0o7111 == 0 and status.st_uid != 12345


HOSTILE = {
    "parent": tar_gz(*PAIRS.items(), ("facades/../../escaped", b"x")),
    "parent first": tar_gz(("../escaped", b"x"), *PAIRS.items()),
    "absolute": tar_gz(*PAIRS.items(), ("/tmp/fastpix2pix-escaped", b"x")),
    "backslash parent": tar_gz(*PAIRS.items(), ("facades\\..\\..\\escaped", b"x")),
    "drive letter": tar_gz(*PAIRS.items(), ("C:escaped", b"x")),
    "UNC": tar_gz(*PAIRS.items(), ("\\\\host\\share\\escaped", b"x")),
    "symbolic link": tar_gz(special("facades/train", tarfile.SYMTYPE, "/tmp"), ("facades/train/x", b"")),
    "symbolic link inside": tar_gz(*PAIRS.items(), special("facades/train/l.jpg", tarfile.SYMTYPE, "0.jpg")),
    "hard link": tar_gz(*PAIRS.items(), special("facades/train/l.jpg", tarfile.LNKTYPE, "/etc/passwd")),
    "device": tar_gz(special("facades/train/null.jpg", tarfile.CHRTYPE)),
    "pipe": tar_gz(special("facades/train/pipe.jpg", tarfile.FIFOTYPE)),
    "same file twice": tar_gz(*PAIRS.items(), ("facades/train/0.jpg", b"other")),
    "NUL in a name": tar_gz(("facades/train/a\0b\u00e9.jpg", b"x")),
    "name too long": tar_gz((f"facades/train/{'n' * 300}.jpg", b"x")),
    "no pairs": tar_gz(("facades/README", b"x")),
    "other data set": tar_gz(("maps/train/1.jpg", b"x")),
    "empty tar": tar_gz(),
    "empty": b"",
    "web page": b"<html><body>Please log in</body></html>",
    "plain tar": gzip.decompress(GOOD),
    "gzip of no tar": gzip.compress(b"hello" * 1000),
    "broken header": gzip.compress(b"\xff" * 1024),
    "wrong checksum": GOOD[:-8] + bytes(4) + GOOD[-4:],
    "flipped bit": GOOD[:200] + bytes([GOOD[200] ^ 1]) + GOOD[201:],
    **{f"cut at {part} %": GOOD[: len(GOOD) * part // 100] for part in range(3, 100, 8)},
    "checksum cut off": GOOD[:-3],
    "sparse file": sparse(),
    "bomb of padding": gzip.compress(gzip.decompress(GOOD) + bytes(8 * 2**20)),
    "endless claim": claim(),
    **{f"bomb of type {kind!r}": bomb(kind) for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.SYMTYPE)},
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["downloaded", "by hand"])
@pytest.mark.parametrize("archive", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archive_leaves_nothing(server, tmp_path, monkeypatch, capsys, archive, by_hand):
    small = dataclasses.replace(catalog.DATASETS["facades"], mebibytes=1)
    monkeypatch.setitem(catalog.DATASETS, "facades", small)
    folder = tmp_path / "inner" / "datasets"
    folder.mkdir(parents=True)
    server.say(archive)
    if by_hand:
        (folder / "facades.tar.gz").write_bytes(archive)
    with pytest.raises(SystemExit) as stop:
        main(["download", "facades", "--folder", str(folder)])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(errors) == 1 and "facades" in errors[0] and errors[0].isprintable()
    assert contents(tmp_path) == ({"inner/datasets/facades.tar.gz": archive} if by_hand else {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inner"] and [*folder.glob("fac*/")] == []
    assert not Path("/tmp/fastpix2pix-escaped").exists()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"body": b"gone", "status": 404}, "answers 404 Not Found"),
        ({"body": b"", "status": 503}, "answers 503 Service Unavailable"),
        ({"body": GOOD[:-40], "length": len(GOOD)}, "broke off before the end"),
        ({"body": GOOD, "pause": 1.0}, "was silent for 0.2 s"),
        ({"body": bytes(2 * 2**20 + 1)}, "is larger than 2 MiB"),
    ],
    ids=["404", "503", "short", "silent", "endless"],
)
def test_failed_download_says_why_and_leaves_nothing(server, tmp_path, monkeypatch, answer, reason):
    small = dataclasses.replace(catalog.DATASETS["facades"], mebibytes=1)
    monkeypatch.setitem(catalog.DATASETS, "facades", small)
    monkeypatch.setattr(download, "STALL_SECONDS", 0.2)
    server.say(**answer)
    with pytest.raises(UserError, match=f"facades.tar.gz {reason}; .* into {tmp_path} by hand$"):
        download.fetch_dataset("facades", tmp_path)
    assert contents(tmp_path) == {}
    server.say(GOOD)
    download.fetch_dataset("facades", tmp_path)
    assert contents(tmp_path / "facades") == {k.removeprefix("facades/"): v for k, v in PAIRS.items()}


def test_slow_but_steady_server_is_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 2.0)
    server.say(GOOD, pause=0.3)
    download.fetch_dataset("facades", tmp_path)
    assert (tmp_path / "facades/train/0.jpg").read_bytes() == PAIRS["facades/train/0.jpg"]


def test_bytes_are_counted_however_they_come(server, tmp_path, monkeypatch):
    """Two bytes at a time, from a server that announces no length: a hundred pieces are not 6 MiB."""
    small = dataclasses.replace(catalog.DATASETS["facades"], mebibytes=1)
    monkeypatch.setitem(catalog.DATASETS, "facades", small)
    server.say_in_pieces(GOOD, 2)
    download.fetch_dataset("facades", tmp_path)
    assert contents(tmp_path / "facades") == {k.removeprefix("facades/"): v for k, v in PAIRS.items()}


def test_offline_message_says_where_to_put_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "BASE_URL", "http://127.0.0.1:1")
    where = rf"cannot be reached; .*facades.tar.gz \(29 MiB\).* into {tmp_path} by hand"
    with pytest.raises(UserError, match=where):
        download.fetch_dataset("facades", tmp_path)


def test_killed_process_leaves_no_half_data_set(server, tmp_path):
    """Kill a process in the middle of unpacking; the next call starts clean and completes."""
    program = f"""
import shutil, time
from fastpix2pix.data import catalog, download
from fastpix2pix.data.__main__ import main
catalog.BASE_URL = {catalog.BASE_URL!r}
copy, count = shutil.copyfileobj, []
def slow(*files):
    copy(*files)
    count.append(1)
    if len(count) == 2:
        print("two files written", flush=True)
        time.sleep(60)
shutil.copyfileobj = slow
download.fetch_dataset("facades", {str(tmp_path)!r})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"two files written\n"
    process.kill()
    process.wait()
    assert not (tmp_path / "facades").exists()
    assert len([*tmp_path.glob(".facades.partial/facades/train/*")]) == 2
    download.fetch_dataset("facades", tmp_path)
    assert {k for k in contents(tmp_path) if "sha256" not in k} == set(PAIRS)


def test_processes_that_ask_together_share_one_download(server, tmp_path):
    server.say(GOOD, pause=0.3)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: download.fetch_dataset("facades", tmp_path), range(4))]
    assert found == [tmp_path / "facades"] * 4
    assert server.requests == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("facade", "did you mean facades"),
        ("zebra", "choose one of facades, "),
        ("../x", "choose"),
        ("", "choose"),
    ],
)
def test_unknown_name(tmp_path, name, hint):
    with pytest.raises(UserError, match=hint):
        download.fetch_dataset(name, tmp_path / "never")
    assert [*tmp_path.iterdir()] == []


def test_folder_that_cannot_be_used(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a folder with room to write"):
        download.fetch_dataset("facades", tmp_path / "file" / "datasets")
    (tmp_path / "facades").mkdir()
    with pytest.raises(UserError, match="no train folder; remove"):
        download.fetch_dataset("facades", tmp_path)


def test_full_disk_is_named(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="No space left on device; choose a folder with room"):
        download.fetch_dataset("facades", tmp_path)
    assert contents(tmp_path) == {}


def test_catalog_agrees_with_the_real_facades(facades):
    from PIL import Image

    entry = catalog.DATASETS["facades"]
    assert len([*(facades / "train").glob("*.jpg")]) == entry.pairs["train"]
    with Image.open(facades / "train" / "1.jpg") as pair:
        assert pair.size == (2 * entry.size[1], entry.size[0])

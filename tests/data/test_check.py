"""``python -m fastpix2pix.data check``: folders made for the purpose, each with a known fault or none."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastpix2pix import train
from fastpix2pix.data import __main__ as command
from fastpix2pix.data.check import check_folder


def picture(size=(8, 16), mode="RGB", seed=0) -> Image.Image:
    """Noise of (height, width), so that a file cut short really lacks something."""
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def save(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(**options).save(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """Three good pairs in train and one in test."""
    for name in ("train/1.jpg", "train/2.jpg", "train/10.png", "test/1.jpg"):
        save(tmp_path / "set" / name)
    return tmp_path / "set"


def run(capsys, *argv: str) -> tuple[int, str, list[str]]:
    """(exit code, what it printed, the error lines) of the command."""
    code = 0
    try:
        command.main([*argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("error:")]


def test_good_set(root, capsys):
    save(root / "train" / "large.png", size=(20, 60))
    save(root / "stray.png")
    (root / "notes").mkdir()
    code, out, errors = run(capsys, "check", str(root))
    assert (code, errors) == (0, [])
    assert out.splitlines() == [
        "test: 1 pairs; width x height of a half (pairs): 8x8 (1)",
        "train: 4 pairs; width x height of a half (pairs): 8x8 (3), 30x20 (1)",
        "every file decodes and has its partner",
    ]


@pytest.mark.parametrize("layout", ["{ab}/{split}", "{split}/{ab}"])
def test_pairs_in_two_folders(tmp_path, capsys, layout):
    for split, count in (("train", 3), ("val", 2)):
        for ab in "AB":
            for i in range(count):
                save(tmp_path / layout.format(ab=ab, split=split) / f"{i}.png", size=(9, 7))
    assert [(r.name, r.pairs, dict(r.sizes)) for r in check_folder(tmp_path)] == [
        ("train", 3, {(9, 7): 3}),
        ("val", 2, {(9, 7): 2}),
    ]
    (tmp_path / layout.format(ab="B", split="val") / "1.png").unlink()
    code, out, errors = run(capsys, "check", str(tmp_path))
    assert code == 2 and len(errors) == 1 and "has no partner 1" in errors[0]
    assert "train: 3 pairs" in out and "val: 3 files" in out


def files(*names: str):
    return lambda root: [save(root / name) for name in names]


def other_kinds(*names: str):
    """Files whose names alone matter."""
    return lambda root: [(path.parent.mkdir(parents=True, exist_ok=True), path.write_bytes(b"x"))
                         for path in map(root.joinpath, names)]  # fmt: skip


SPLIT = "is a split itself, not the folder that holds train/; "
ARRANGED_OTHERWISE = {  # how; what is given of it; part of the line
    "two unpaired folders": (
        files("trainA/1.png", "trainB/1.png", "testA/1.png"),
        "",
        "rename them to A/train/ and B/train/",
    ),
    "the split": (files("train/1.png", "test/1.png"), "train", f"{SPLIT}give "),
    "the split, of two folders": (files("train/A/1.png", "train/B/1.png"), "train", f"{SPLIT}give "),
    "pictures themselves": (files("1.png", "2.png"), "", f"{SPLIT}move what it holds to "),
    "no train": (files("test/1.png"), "", "holds no folder train/; it has test/; rename one"),
    "no folder": (Path.mkdir, "", "holds no folder train/; put pairs into such a folder"),
    "other kinds": (
        other_kinds("train/1.webp", "train/2.WEBP", "train/3.jp2"),
        "",
        "holds 2 .webp, 1 .jp2, which are not read; convert them to PNG",
    ),
    "a loop of links": (lambda root: root.symlink_to(root.name), "", "no such folder; give the folder"),
    "a loop inside": (
        lambda root: (root.mkdir(), (root / "train").symlink_to("train")),
        "",
        "holds no folder train/",
    ),
}


@pytest.mark.parametrize("kind", ARRANGED_OTHERWISE)
def test_a_folder_arranged_otherwise_is_refused_by_check_and_train_with_what_to_do(tmp_path, capsys, kind):
    arrange, inside, line = ARRANGED_OTHERWISE[kind]
    arrange(tmp_path / "set")
    given = tmp_path / "set" / inside
    code, _, errors = run(capsys, "check", str(given))
    assert code == 2 and len(errors) == 1 and line in errors[0]
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataroot", str(given), "--checkpoints_dir", str(tmp_path), "--steps", "1"])
    _, err = capsys.readouterr()
    assert stop.value.code == 2 and err.splitlines()[-1] == errors[0] and "Traceback" not in err


def test_a_folder_that_cannot_be_read_is_one_line(root, capsys, monkeypatch):
    listed = Path.iterdir

    def denied(self):
        if self.name == "train":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", denied)
    code, _, errors = run(capsys, "check", str(root))
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith(f"error: {root}/train: can't be read (Permission denied); ")


def test_a_folder_whose_name_is_no_utf8_is_one_line(tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(path)
    code, _, errors = run(capsys, "check", path)
    assert code == 2 and len(errors) == 1 and "caf\\udce9: holds no folder train/" in errors[0]


def test_pictures_that_are_passed_over_are_noted(root, capsys):
    other_kinds("train/a.webp", "train/notes.txt")(root)
    code, out, _ = run(capsys, "check", str(root))
    assert code == 0 and "train: 3 pairs" in out and "  not read: 1 .webp\n" in out


@pytest.mark.parametrize(
    ("mode", "suffix", "kind"),
    [
        ("L", "png", "grey"),
        ("P", "png", "palette"),
        ("1", "png", "black and white"),
    ]
    + [("CMYK", "jpg", "CMYK"), ("RGBA", "png", "RGBA"), ("LA", "png", "grey with transparency")],
)
def test_conversions_are_noted(root, capsys, mode, suffix, kind):
    for i in range(2):
        save(root / "train" / f"odd{i}.{suffix}", mode=mode)
    code, out, _ = run(capsys, "check", str(root))
    assert code == 0
    assert (
        f"train: 5 pairs; width x height of a half (pairs): 8x8 (5)\n  converted to 8-bit RGB: 2 {kind}\n"
        in out
    )


def break_file(path: Path, fault: str) -> None:
    content = save(path, size=(64, 128)).read_bytes()
    if fault == "empty":
        path.write_bytes(b"")
    elif fault == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif fault == "text":
        path.write_text("not a picture")
    elif fault == "folder":
        path.unlink()
        path.mkdir()
    elif fault == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif fault == "dangling link":
        path.unlink()
        path.symlink_to("nowhere")
    elif fault == "odd width":
        save(path, size=(8, 15))
    elif fault == "other format":
        picture().save(path, format="BMP")
    elif fault == "bomb":  # 60000 x 60000 pixels, says the header
        path.write_bytes(content[:16] + (60000).to_bytes(4, "big") * 2 + content[24:])


FAULTS = {
    "empty": "cannot be decoded",
    "truncated": "cannot be decoded",
    "text": "cannot be decoded",
    "folder": "is not a file",
    "pipe": "is not a file",
    "dangling link": "is not a file",
    "odd width": "15 pixels wide",
    "other format": "cannot be decoded",
    "bomb": "cannot be decoded",
}


@pytest.mark.parametrize("name", ["bad.png", "a b\n'c\"ünï 🏠.png", os.fsdecode(b"caf\xe9\x1b[2J.png")])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_file_is_named_in_one_line(root, capsys, fault, name):
    break_file(root / "train" / name, fault)
    before = sorted(root.rglob("*"))
    code, out, errors = run(capsys, "check", str(root))
    assert code == 2 and len(errors) == 1
    assert FAULTS[fault] in errors[0] and "train" in errors[0] and errors[0].isprintable()
    assert "test: 1 pairs" in out and "train: 4 files" in out
    assert sorted(root.rglob("*")) == before


def test_all_bad_files_are_counted_and_the_first_listed(root, capsys):
    for i in range(14):
        (root / "train" / f"x{i:02}.jpg").write_bytes(b"")
    code, out, errors = run(capsys, "check", str(root))
    assert code == 2 and "x00.jpg" in errors[0] and "(and 13 more)" in errors[0]
    listed = [line.split(":")[1].strip() for line in out.splitlines() if line.startswith("  bad:")]
    assert listed == [f"{root}/train/x{i:02}.jpg" for i in range(10)]


@pytest.mark.parametrize("kind", ["absent", "file", "empty", "no pictures", "name too long", "NUL"])
def test_folder_that_holds_nothing_to_check(tmp_path, capsys, kind):
    path = tmp_path / "set"
    if kind == "file":
        path.write_text("")
    elif kind == "empty":
        path.mkdir()
    elif kind == "no pictures":
        (path / "train").mkdir(parents=True)
        (path / "train" / "1.txt").write_text("")
    elif kind == "name too long":
        path = tmp_path / ("n" * 300)
    elif kind == "NUL":
        path = str(tmp_path) + "/\0"
    code, out, errors = run(capsys, "check", str(path))
    assert code == 2 and len(errors) == 1 and out == ""


def test_download_by_the_command(tmp_path, capsys, facades):
    shutil.copytree(facades / "test", tmp_path / "facades" / "train")
    code, out, _ = run(capsys, "download", "facades", "--folder", str(tmp_path))
    assert (code, out) == (0, f"{tmp_path}/facades\n")
    code, _, errors = run(capsys, "download", "fasades", "--folder", str(tmp_path))
    assert code == 2 and errors == ["error: 'fasades' is no known data set; did you mean facades?"]


def test_real_facades(facades):
    reports = {report.name: report for report in check_folder(facades)}
    assert (reports["train"].pairs, reports["test"].pairs) == (400, 50)
    assert reports["train"].sizes == {(256, 256): 400} and reports["train"].kinds == {"RGB": 400}

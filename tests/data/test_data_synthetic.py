"""The painted data set: the same from the same seed, in the palette, photo and labels of one house."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastpix2pix.data import find_pairs, load_pair, synthetic
from fastpix2pix.data.painter import PALETTE, paint_pair
from fastpix2pix.data.synthetic import default_folder, synthetic_dataset
from fastpix2pix.errors import UserError

COUNTS = {"train": 3, "val": 1, "test": 1}


def picture(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(photo, labels), each uint8 (256, 256, 3)."""
    both = np.asarray(paint_pair(np.random.default_rng((seed, number))))
    return both[:, :256], both[:, 256:]


def files(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.jpg"))}


def test_same_seed_same_files_whatever_the_counts(tmp_path):
    first = files(synthetic_dataset(tmp_path / "1", **COUNTS, seed=4))
    assert set(first) == {"train/1.jpg", "train/2.jpg", "train/3.jpg", "val/1.jpg", "test/1.jpg"}
    assert len(set(first.values())) == 5
    assert files(synthetic_dataset(tmp_path / "2", **COUNTS, seed=4)) == first
    fewer = files(synthetic_dataset(tmp_path / "2", train=1, val=1, test=1, seed=4))
    assert fewer == {name: first[name] for name in fewer}
    other = files(synthetic_dataset(tmp_path / "2", **COUNTS, seed=5))
    assert not set(other.values()) & set(first.values())


def test_labels_are_the_palette_and_every_class_occurs():
    colours = set()
    for number in range(25):
        labels = picture(0, number)[1]
        colours |= {colour for _, colour in Image.fromarray(labels).getcolors()}
        facade = np.all(labels == PALETTE["facade"], axis=2).mean()
        windows = np.all(labels == PALETTE["window"], axis=2).mean()
        assert 0.15 < facade < 0.8 and 0.02 < windows < 0.4
    assert colours == set(PALETTE.values())


def test_palette_is_that_of_the_real_facades(facades):
    """Where JPEG leaves the real label maps flat, they show the palette's colours, every one of them."""
    near = dict.fromkeys(PALETTE, 0)
    pixels = 0
    for path in sorted((facades / "train").glob("*.jpg"))[:40]:
        labels = Image.open(path).crop((256, 0, 512, 256))
        high, low = (np.asarray(labels.filter(f(3))) for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        flat = np.asarray(labels)[(high - low).max(axis=2) <= 2][::5].astype(np.int16)
        pixels += len(flat)
        for name, colour in PALETTE.items():
            near[name] += (abs(flat - colour).max(axis=1) <= 6).sum()
    assert sum(near.values()) / pixels > 0.95
    assert min(near.values()) > 0


def edges(grey: np.ndarray) -> np.ndarray:
    down, across = np.gradient(grey.astype(np.float64))
    return np.hypot(down, across)


def test_photo_shows_the_house_of_its_labels():
    """The photo's edges lie on the label map's: moved by a few pixels, or of another house, they do not."""
    aligned, moved, another = [], [], []
    for number in range(12):
        photo, labels = picture(1, number)
        strength = edges(photo.mean(axis=2))
        border = edges(labels.astype(float) @ (1.0, 2.0, 3.0)) > 0
        aligned.append(strength[border].mean())
        moved.append(
            max(
                strength[np.roll(border, s, axis=(0, 1))].mean() for s in ((5, 5), (-5, 5), (5, -5), (-5, -5))
            )
        )
        other = picture(2, number)[0]
        another.append(edges(other.mean(axis=2))[border].mean())
    assert np.mean(aligned) > 1.5 * np.mean(moved)
    assert np.mean(aligned) > 1.5 * np.mean(another)


def test_photo_is_left_and_labels_are_right_in_the_files(tmp_path):
    root = synthetic_dataset(tmp_path, **COUNTS)
    (pair,) = find_pairs(root, "test")
    assert pair.size == (256, 256) and pair.plain
    source, target = load_pair(pair, direction="BtoA", size=256, interpolation="nearest")
    palette = torch.tensor(list(PALETTE.values())) / 127.5 - 1
    away = [
        (image[0].permute(1, 2, 0)[:, :, None] - palette).abs().amax(3).amin(2) for image in (source, target)
    ]
    assert (away[0] * 127.5 < 20).float().mean() > 0.97  # jpeg
    assert (away[1] * 127.5 < 20).float().mean() < 0.2


def test_second_call_paints_nothing(tmp_path, monkeypatch):
    root = synthetic_dataset(tmp_path, **COUNTS)
    monkeypatch.setattr(synthetic, "paint_pair", lambda rng: pytest.fail("painted again"))
    assert synthetic_dataset(tmp_path, **COUNTS) == root


def test_interrupted_run_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    painted = []

    def interrupted(rng):
        if len(painted) == 2:
            raise KeyboardInterrupt
        painted.append(1)
        return paint_pair(rng)

    monkeypatch.setattr(synthetic, "paint_pair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthetic_dataset(tmp_path, **COUNTS)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(files(synthetic_dataset(tmp_path, **COUNTS))) == 5


def test_two_processes_may_paint_at_once(tmp_path, monkeypatch):
    calls = []

    def overtaken(rng):
        calls.append(1)
        if len(calls) == 3:  # another process begins and ends meanwhile
            synthetic_dataset(tmp_path, **COUNTS)
        return paint_pair(rng)

    monkeypatch.setattr(synthetic, "paint_pair", overtaken)
    root = synthetic_dataset(tmp_path, **COUNTS)
    assert len(files(root)) == 5 and list(tmp_path.iterdir()) == [root]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="FASTPIX2PIX_CACHE") as caught:
        synthetic_dataset(tmp_path / "file", **COUNTS)
    assert str(tmp_path / "file") in str(caught.value)


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPIX2PIX_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("FASTPIX2PIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME" if os.name != "nt" else "LOCALAPPDATA", str(tmp_path))
    assert default_folder() == tmp_path / "fastpix2pix"

"""Finding pairs: layouts, order, conversion to 8-bit RGB, and every mistake in one line."""

import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastpix2pix.data import find_pairs
from fastpix2pix.data.pictures import read_rgb
from fastpix2pix.errors import UserError

RNG = np.random.default_rng(0)


def save(path, mode: str = "RGB", size: tuple[int, int] = (16, 8), **options):
    """A random picture of ``size`` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    noise.convert(mode).save(path, **options)
    return path


def mistake(root, split: str = "train") -> str:
    """The one line that a user gets."""
    with pytest.raises(UserError) as caught:
        find_pairs(root, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- layouts -----------------------------------------------------------------------------------


def test_side_by_side_files_in_natural_order(tmp_path):
    for name in ("10.jpg", "2.JPG", "1.png", "b.jpeg", "a2.PNG", "a10.png"):
        save(tmp_path / "train" / name)
    save(tmp_path / "train" / "._1.png")  # macOS writes such files beside the real ones
    (tmp_path / "train" / "notes.txt").write_text("not a picture")
    pairs = find_pairs(tmp_path, "train")
    assert [p.name for p in pairs] == ["1", "2", "10", "a2", "a10", "b"]
    assert all(p.size == (8, 8) for p in pairs)
    a, b = pairs[0].read()
    whole = np.asarray(Image.open(tmp_path / "train" / "1.png"))
    assert np.array_equal(a, whole[:, :8]) and np.array_equal(b, whole[:, 8:])


@pytest.mark.parametrize("pattern", ["{half}/train", "train/{half}"])
def test_partners_in_two_folders(tmp_path, pattern):
    for name_a, name_b in (("1.png", "1.jpg"), ("10.png", "10.png"), ("2.PNG", "2.jpeg")):
        save(tmp_path / pattern.format(half="A") / name_a)
        save(tmp_path / pattern.format(half="B") / name_b)
    pairs = find_pairs(tmp_path, "train")
    assert [(p.a.name, p.b.name) for p in pairs] == [
        ("1.png", "1.jpg"),
        ("2.PNG", "2.jpeg"),
        ("10.png", "10.png"),
    ]
    a, b = pairs[2].read()
    assert np.array_equal(a, np.asarray(Image.open(pairs[2].a)))
    assert np.array_equal(b, np.asarray(Image.open(pairs[2].b)))


# ---- conversion to 8-bit RGB -------------------------------------------------------------------


def png(samples: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG of ``samples``, (height, width, channels); Pillow itself writes no 16-bit colour."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels, colour_type", [(1, 0), (3, 2), (4, 6)])
def test_16_bit_png_is_shown_scaled_not_clipped(tmp_path, channels, colour_type):
    samples = RNG.integers(0, 65536, (8, 16, channels))
    samples[0, :3] = [[0], [65535], [257 * 100]]
    (tmp_path / "deep.png").write_bytes(png(samples, colour_type))
    expected = np.rint(samples[..., :3] / 257).astype(np.uint8) + np.zeros((1, 1, 3), np.uint8)
    assert np.array_equal(read_rgb(tmp_path / "deep.png"), expected)


def test_other_kinds_become_rgb(tmp_path):
    rgb = RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8)
    alpha = RNG.integers(0, 256, (8, 16, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(tmp_path / "rgba.png")
    assert np.array_equal(read_rgb(tmp_path / "rgba.png"), rgb)  # transparency is dropped, not blended
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_rgb(tmp_path / "grey.png"), rgb[..., :1].repeat(3, axis=2))
    few = Image.fromarray(rgb).quantize(16)
    few.save(tmp_path / "palette.png")
    colours = np.array(few.getpalette()).reshape(-1, 3)
    assert np.array_equal(read_rgb(tmp_path / "palette.png"), colours[np.asarray(few)])
    flat = Image.new("CMYK", (16, 8), (255, 0, 51, 0))  # no red; full green; blue at 80%
    flat.save(tmp_path / "cmyk.jpg", quality=100)
    assert abs(read_rgb(tmp_path / "cmyk.jpg").astype(int) - [0, 255, 204]).max() <= 2


def test_plain_are_grey_and_rgb_of_8_bits(tmp_path):
    for mode, name in (("RGB", "0.png"), ("RGB", "1.jpg"), ("L", "2.png"), ("L", "3.jpg")):
        save(tmp_path / "plain" / name, mode)
    for mode, name in (("RGBA", "0.png"), ("P", "1.png"), ("1", "2.png"), ("LA", "3.png"), ("CMYK", "4.jpg")):
        save(tmp_path / "converted" / name, mode)
    (tmp_path / "converted" / "5.png").write_bytes(png(RNG.integers(0, 65536, (8, 16, 3)), 2))
    np.save(tmp_path / "converted" / "6.npy", np.zeros((8, 16, 3), np.uint8))
    assert [p.plain for p in find_pairs(tmp_path, "plain")] == [True] * 4
    assert [p.plain for p in find_pairs(tmp_path, "converted")] == [False] * 7


def test_conversion_is_said_once(tmp_path, caplog):
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "train" / "2.png", "L")
    save(tmp_path / "train" / "3.png", "RGBA")
    save(tmp_path / "test" / "1.png")
    with caplog.at_level(logging.WARNING):
        find_pairs(tmp_path, "train")
        find_pairs(tmp_path, "train")
        find_pairs(tmp_path, "test")
    (said,) = [r.getMessage() for r in caplog.records]
    assert "2.png" in said and "converted" in said and "1 more" in said


# ---- mistakes ----------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    assert str(tmp_path / "nowhere") in mistake(tmp_path / "nowhere")


def test_missing_split_names_those_that_exist(tmp_path):
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "val" / "1.png")
    message = mistake(tmp_path, "test")
    assert "'test'" in message and "train, val" in message
    save(tmp_path / "other" / "A" / "train" / "1.png")
    save(tmp_path / "other" / "B" / "train" / "1.png")
    assert "it has train" in mistake(tmp_path / "other", "val")


def test_empty_folder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "readme.txt").write_text("hello")
    message = mistake(tmp_path)
    assert str(tmp_path / "train") in message and ".jpg" in message


def test_zero_bytes(tmp_path):
    save(tmp_path / "train" / "1.jpg")
    (tmp_path / "train" / "2.jpg").write_bytes(b"")
    message = mistake(tmp_path)
    assert "2.jpg" in message and "0 bytes" in message


def test_text_called_jpg(tmp_path):
    save(tmp_path / "train" / "1.jpg")
    (tmp_path / "train" / "2.jpg").write_text("this is no picture")
    assert "2.jpg" in mistake(tmp_path)


@pytest.mark.parametrize("name", ["2.jpg", "2.png"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.97])
def test_cut_short(tmp_path, name, kept):
    whole = save(tmp_path / "train" / name, size=(128, 64)).read_bytes()
    (tmp_path / "train" / name).write_bytes(whole[: int(len(whole) * kept)])
    save(tmp_path / "train" / "1.jpg", size=(128, 64))
    message = mistake(tmp_path)
    assert name in message and "replace or remove" in message


def test_bytes_after_the_end_are_no_mistake(tmp_path):
    for name in ("1.jpg", "2.png"):
        with open(save(tmp_path / "train" / name), "ab") as file:
            file.write(b"a camera's trailer")
    assert len(find_pairs(tmp_path, "train")) == 2


def test_odd_width(tmp_path):
    save(tmp_path / "train" / "1.png", size=(17, 8))
    message = mistake(tmp_path)
    assert "1.png" in message and "17" in message


def test_a_without_its_b(tmp_path):
    for name in ("1.png", "2.png"):
        save(tmp_path / "A" / "train" / name)
    save(tmp_path / "B" / "train" / "1.png")
    message = mistake(tmp_path)
    assert str(tmp_path / "A" / "train" / "2.png") in message and str(tmp_path / "B" / "train") in message
    (tmp_path / "A" / "train" / "2.png").rename(tmp_path / "B" / "train" / "3.png")
    assert str(tmp_path / "B" / "train" / "3.png") in mistake(tmp_path)


def test_b_folder_missing(tmp_path):
    save(tmp_path / "A" / "train" / "1.png")
    assert str(tmp_path / "B" / "train") in mistake(tmp_path)


def test_halves_of_different_size(tmp_path):
    save(tmp_path / "A" / "train" / "1.png", size=(16, 8))
    save(tmp_path / "B" / "train" / "1.png", size=(8, 8))
    message = mistake(tmp_path)
    assert "8x8" in message and "16x8" in message


def test_two_files_of_one_stem(tmp_path):
    for name in ("1.png", "1.jpg"):
        save(tmp_path / "A" / "train" / name)
    save(tmp_path / "B" / "train" / "1.png")
    assert str(tmp_path / "A" / "train") in mistake(tmp_path)


def test_damaged_pixels_are_named_when_read(tmp_path):
    whole = bytearray(save(tmp_path / "train" / "1.png", size=(64, 32)).read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 40] = bytes(40)
    (tmp_path / "train" / "1.png").write_bytes(whole)
    (pair,) = find_pairs(tmp_path, "train")
    with pytest.raises(UserError, match="1.png"):
        pair.read()


def test_gigantic_picture_is_a_users_mistake(tmp_path, monkeypatch):
    save(tmp_path / "train" / "1.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "1.png" in mistake(tmp_path)

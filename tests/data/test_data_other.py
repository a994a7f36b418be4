"""Other files than 8-bit RGB: read and written as they are, scaled as asked for, or refused in a line."""

import builtins
import logging
import pickle
import struct
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastpix2pix.data import LoaderOptions, find_pairs, load_pair, open_loader
from fastpix2pix.data import __main__ as data
from fastpix2pix.data.pictures import can_hold, read, read_header, write
from fastpix2pix.data.plan import epoch_plan
from fastpix2pix.data.resize import nearest_indices, resize
from fastpix2pix.data.sides import Side
from fastpix2pix.errors import UserError
from fastpix2pix.pixels import preview

RNG = np.random.default_rng(0)
CPU = torch.device("cpu")


def noise(shape: tuple[int, ...], dtype: str = "uint16") -> np.ndarray:
    if dtype == "float32":
        return RNG.normal(0, 3, shape).astype(np.float32)
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def one_line(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ reading


TIFFS = {  # how tifffile is told to write, and whether the array's channels come first
    "grey": ((9, 7), {}, False),
    "5 channels in a pixel": ((9, 7, 5), {"photometric": "minisblack", "planarconfig": "contig"}, False),
    "5 planes": ((5, 9, 7), {"photometric": "minisblack", "planarconfig": "separate"}, True),
    "5 pages": ((5, 9, 7), {}, True),
    "ImageJ, 2 channels": ((2, 9, 7), {"imagej": True}, True),
    "RGB": ((9, 7, 3), {"photometric": "rgb"}, False),
    "deflated": ((9, 7), {"compression": "zlib"}, False),
    "5 deflated pages": ((5, 9, 7), {"compression": "zlib"}, True),
    "big-endian": ((9, 7), {"byteorder": ">"}, False),
    "OME, 2 channels": ((2, 9, 7), {"ome": True, "metadata": {"axes": "CYX"}}, True),
    "tiles": ((48, 40), {"tile": (16, 16)}, False),
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("kind", TIFFS)
def test_a_tiff_is_read_as_it_is(tmp_path, kind, dtype):
    shape, options, first = TIFFS[kind]
    truth = noise(shape, dtype)
    tifffile.imwrite(tmp_path / "x.tif", truth, **options)
    expected = np.moveaxis(truth, 0, -1) if first else truth
    samples = read(tmp_path / "x.tif")
    assert samples.dtype == dtype and np.array_equal(samples, expected.reshape(*expected.shape[:2], -1))
    header = read_header(tmp_path / "x.tif")
    assert (header.size, header.channels, header.dtype) == (samples.shape[:2], samples.shape[2], dtype)


def test_of_a_tiff_with_overviews_the_picture_is_read(tmp_path):
    truth = noise((64, 48))
    tifffile.imwrite(tmp_path / "x.tif", truth, metadata=None)
    tifffile.imwrite(tmp_path / "x.tif", truth[::2, ::2], metadata=None, subfiletype=1, append=True)
    assert np.array_equal(read(tmp_path / "x.tif")[..., 0], truth)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "u1", "<f4", ">f4"])
@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 5)])
def test_an_array_is_read_as_it_is(tmp_path, shape, dtype):
    truth = noise(shape, np.dtype(dtype).name).astype(dtype)
    for order in "CF":
        np.save(tmp_path / "x.npy", np.array(truth, order=order))
        samples = read(tmp_path / "x.npy", shape[2] if len(shape) > 2 else 1)
        assert samples.dtype == np.dtype(dtype).name
        assert np.array_equal(samples, truth.reshape(9, 7, -1))


@pytest.mark.parametrize("channels, colour_type", [(1, 0), (3, 2), (4, 6)])
def test_a_png_keeps_16_bits(tmp_path, channels, colour_type):
    truth = noise((9, 7, channels))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in truth)
    header = struct.pack(">IIBBBBB", 7, 9, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    samples = read(tmp_path / "x.png")
    assert samples.dtype == np.uint16 and np.array_equal(samples, truth)
    if channels == 4:  # transparency is dropped, nothing else
        assert np.array_equal(read(tmp_path / "x.png", 3), truth[..., :3])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_what_is_written_is_what_is_read(tmp_path, suffix, dtype, channels):
    if not can_hold(suffix, channels, dtype):
        assert suffix == ".png" and (
            dtype == "float32" or channels == 5 or (dtype, channels) == ("uint16", 2)
        )
        return
    truth, path = noise((9, 7, channels), dtype), tmp_path / f"x{suffix}"
    write(path, truth)
    assert read(path).dtype == dtype and np.array_equal(read(path), truth)
    # And by others.
    others = {".tif": tifffile.imread, ".npy": np.load}
    if suffix in others:
        assert np.array_equal(others[suffix](path), truth.squeeze(-1) if channels == 1 else truth)
    elif dtype == "uint8" or channels == 1:
        assert np.array_equal(np.asarray(Image.open(path)), truth.squeeze(-1) if channels == 1 else truth)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("dtype", "range", "values", "scaled"),
    [
        ("uint8", None, [0, 51, 255], [-1, -0.6, 1]),
        ("uint16", None, [0, 13107, 65535], [-1, -0.6, 1]),
        ("uint16", (0, 4095), [0, 819, 4095, 5000], [-1, -0.6, 1, 1]),
        ("uint16", (200, 1200), [100, 200, 700, 1200], [-1, -1, 0, 1]),
        ("float32", (-2.0, 6.0), [-3.0, -2.0, 0.0, 2.0, 7.5], [-1, -1, -0.5, 0, 1]),
    ],
)
def test_values_become_minus_1_to_1_and_back(dtype, range, values, scaled):
    side = Side("input", 1, range, dtype)
    image = side.kept(np.array(values, dtype).reshape(1, -1, 1))
    assert image.dtype == torch.float32 and image.flatten().tolist() == pytest.approx(scaled, abs=1e-6)
    back = side.restored(image[0].permute(2, 0, 1)).flatten()
    ends = range or (0, np.iinfo(dtype).max)
    assert back.dtype == dtype
    assert back.tolist() == pytest.approx(
        np.clip(values, *ends).tolist(), abs=1e-6 if dtype == "float32" else 0
    )


def test_every_16_bit_value_comes_back():
    truth = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    for range in (None, (0.0, 65535.0), (-5.0, 70000.0)):
        side = Side("output", 1, range, "uint16")
        assert np.array_equal(side.restored(side.kept(truth)[0].permute(2, 0, 1)), truth)


def test_previews_show_three_channels_or_grey():
    image = torch.linspace(-1, 1, 5)[:, None, None].expand(5, 2, 3)
    levels = [0, 64, 128, 191, 255]
    for channels, shown in ((1, [0, 0, 0]), (2, [0, 64, 0]), (3, levels[:3]), (5, levels[:3])):
        assert np.array_equal(preview(image[:channels]), np.broadcast_to(np.uint8(shown), (2, 3, 3)))


# ------------------------------------------------------------------------------------------ loading


def pairs_5_to_2(root: Path, count: int = 3, size: tuple[int, int] = (20, 24)) -> list[tuple]:
    """A: 5 channels of 16 bits; B: 2 channels of floating point."""
    truth = []
    for half in "AB":
        (root / half / "train").mkdir(parents=True)
    for i in range(count):
        a, b = noise((5, *size)), noise((*size, 2), "float32")
        tifffile.imwrite(root / "A" / "train" / f"{i}.tif", a)
        np.save(root / "B" / "train" / f"{i}.npy", b)
        truth.append((np.moveaxis(a, 0, -1), b))
    return truth


DEEP = {"input_nc": 5, "output_nc": 2, "output_range": (-10.0, 10.0), "direction": "AtoB"}


@pytest.mark.parametrize("cache_bytes", [0, 10**8])
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_batches_are_those_of_the_plan(tmp_path, interpolation, cache_bytes):
    truth = pairs_5_to_2(tmp_path)
    sizes = {"load_size": 18, "crop_size": 16}
    options = LoaderOptions(
        **DEEP, **sizes, interpolation=interpolation, cache_bytes=cache_bytes, num_threads=1
    )
    loader, plan = open_loader(tmp_path, options), epoch_plan(0, 0, 3, **sizes)
    assert loader.kind == "portable" and loader.resized_bytes == 3 * 18 * 18 * 7 * 4

    def sample(image: np.ndarray, k: int) -> np.ndarray:
        if interpolation == "nearest":
            rows, columns = (nearest_indices(n, 18, CPU).numpy() for n in image.shape[:2])
            image = image[rows][:, columns]
        else:
            planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[-1])]
            resized = [plane.resize((18, 18), Image.Resampling.BICUBIC) for plane in planes]
            image = np.stack([np.asarray(plane) for plane in resized], -1).clip(-1, 1)
        crop = image[plan.top[k] :][:16, plan.left[k] :][:, :16]
        return crop[:, ::-1] if plan.mirror[k] else crop

    for k, batch in zip(range(3), loader.stream(), strict=False):
        a, b = truth[plan.order[k]]
        a, b = (a / 32767.5 - 1).astype(np.float32), (b / 10).clip(-1, 1)
        for image, half in ((batch.source, a), (batch.target, b)):
            assert image.is_contiguous(memory_format=torch.channels_last)
            assert image[0].permute(1, 2, 0).numpy() == pytest.approx(sample(half, k), abs=2e-6)
    loader.close()


def test_pair_without_jitter(tmp_path):
    (a, b), *_ = pairs_5_to_2(tmp_path, 1, (16, 16))
    (pair,) = find_pairs(tmp_path, "train", LoaderOptions(**DEEP).sides)
    source, target = load_pair(pair, direction="AtoB", size=16, interpolation="nearest")
    assert source[0].permute(1, 2, 0).numpy() == pytest.approx(a / 32767.5 - 1, abs=1e-6)
    assert target[0].permute(1, 2, 0).numpy() == pytest.approx((b / 10).clip(-1, 1), abs=1e-6)


def test_halves_of_one_deep_file(tmp_path):
    (tmp_path / "train").mkdir()
    truth = noise((8, 16))
    Image.fromarray(truth).save(tmp_path / "train" / "1.png")
    sides = LoaderOptions(input_nc=1, output_nc=1).sides
    (pair,) = find_pairs(tmp_path, "train", sides)
    assert np.array_equal(np.concatenate(pair.read(), 1)[..., 0], truth) and pair.size == (8, 8)


def test_depths_may_be_mixed_and_each_is_scaled_by_its_own(tmp_path):
    (tmp_path / "train").mkdir()
    Image.fromarray(np.full((8, 16), 100, np.uint8)).save(tmp_path / "train" / "1.png")
    Image.fromarray(np.full((8, 16), 25700, np.uint16)).save(tmp_path / "train" / "2.png")
    options = LoaderOptions(input_nc=1, output_nc=1, load_size=8, crop_size=8, num_threads=1)
    loader = open_loader(tmp_path, options)
    assert [(side.dtype, side.suffix) for side in loader.sides] == [("uint16", ".png")] * 2
    for _, batch in zip(range(2), loader.stream(), strict=False):
        assert batch.source.unique().tolist() == pytest.approx([100 / 127.5 - 1])
    loader.close()


def test_dali_leaves_other_data_to_the_portable_loader(tmp_path, caplog):
    pairs_5_to_2(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert open_loader(tmp_path, LoaderOptions(**DEEP)).kind == "portable"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "5 channels of uint16 and 2 channels of float32, -10 to 10: the portable loader reads them" in said
    line = one_line(open_loader, tmp_path, LoaderOptions(**DEEP, loader="dali"))
    assert line.startswith("--loader dali: ") and line.endswith("; use --loader portable")


def test_resizing_in_float_is_that_of_8_bits_up_to_rounding():
    pixels = torch.from_numpy(noise((1, 23, 31, 3), "uint8") // 4 + 96)  # so that nothing overshoots
    for size in (12, 40):
        exact = resize(pixels.float() / 127.5 - 1, size, "bicubic")
        rounded = resize(pixels, size, "bicubic").float()
        # Each of two passes rounds to whole levels, and the second one weighs what the first one rounded.
        assert ((exact + 1) * 127.5 - rounded).abs().max() < 1.5


# ------------------------------------------------------------------------------------------ refusals


def test_other_channels_are_refused_with_the_flag(tmp_path):
    for half in "AB":
        (tmp_path / half / "train").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "A/train/1.tif", noise((8, 8)))
    Image.fromarray(noise((8, 8, 3), "uint8")).save(tmp_path / "B/train/1.png")

    def refusal(**options) -> str:
        return one_line(find_pairs, tmp_path, "train", LoaderOptions(direction="AtoB", **options).sides)

    assert refusal() == (
        f"{tmp_path}/A/train/1.tif: holds 1 channel of 16 bits, 8x8 pixels, and the network's input has 3; "
        "train with --input_nc 1, or give other files"
    )
    assert "B/train/1.png: holds 3 channels of 8 bits" in refusal(input_nc=1, output_nc=1)
    assert "train with --output_nc 3" in refusal(input_nc=1, output_nc=1)


@pytest.mark.parametrize("kind", ["grey TIFF", "grey array", "16-bit grey PNG", "RGBA array", "RGB as grey"])
def test_nothing_but_grey_of_8_bits_is_repeated_and_transparency_of_a_png_dropped(tmp_path, kind):
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "1"
    if kind == "grey TIFF":
        tifffile.imwrite(path.with_suffix(".tif"), noise((8, 16), "uint8"))
    elif kind == "16-bit grey PNG":
        Image.fromarray(noise((8, 16))).save(path.with_suffix(".png"))
    elif kind == "RGB as grey":
        Image.fromarray(noise((8, 16, 3), "uint8")).save(path.with_suffix(".png"))
    else:
        shape = (8, 16, 4) if kind == "RGBA array" else (8, 16)
        np.save(path.with_suffix(".npy"), noise(shape, "uint8"))
    channels = 1 if kind == "RGB as grey" else 3
    options = LoaderOptions(input_nc=channels, output_nc=channels)
    assert "train with --" in one_line(find_pairs, tmp_path, "train", options.sides)


def test_floating_point_needs_a_range(tmp_path):
    pairs_5_to_2(tmp_path)
    line = one_line(find_pairs, tmp_path, "train", LoaderOptions(**DEEP | {"output_range": None}).sides)
    assert "B/train/0.npy: holds floating-point values; train with --output_range LOW HIGH" in line


@pytest.mark.parametrize("range", [(1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_that_is_none_is_refused(range):
    assert one_line(LoaderOptions, input_range=range).startswith("--input_range ")


class Escape:
    def __reduce__(self):
        return Path.touch, (Path("escaped"),)


def tiff(array: np.ndarray, path: Path, **options) -> bytes:
    tifffile.imwrite(path, array, **options)
    return path.read_bytes()


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def tiff_of(width: int, height: int, samples: int = 1) -> bytes:
    """A header that promises so much, without it."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, samples), (278, 4, height), (279, 4, 8)]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4)


HOSTILE = {  # what, and its line
    **{
        f"TIFF cut to {s}": (".tif", lambda p, s=s: cut(tiff(noise((40, 40)), p), s), "")
        for s in (0.0, 0.001, 0.03, 0.5, 0.99)
    },
    **{
        f"deflated TIFF cut to {s}": (
            ".tif",
            lambda p, s=s: cut(tiff(noise((40, 40)), p, compression="zlib"), s),
            "",
        )
        for s in (0.03, 0.5, 0.99)
    },
    "TIFF of 60000x60000": (".tif", lambda p: tiff_of(60000, 60000), "is too large"),
    "TIFF of 4000000000x4000000000": (".tif", lambda p: tiff_of(4 * 10**9, 4 * 10**9), ""),
    "TIFF of 60000 channels": (".tif", lambda p: tiff_of(3000, 3000, 60000), ""),
    "TIFF that ends after its header": (".tif", lambda p: tiff_of(30, 30), "cut short"),
    "TIFF of nonsense": (".tif", lambda p: b"II*\0" + bytes(range(256)), ""),
    "text called .tif": (".tif", lambda p: b"not a picture\n", ""),
    "TIFF of 3 axes beside height and width": (".tif", lambda p: tiff(noise((2, 3, 9, 7)), p), "at most"),
    "TIFF of 2 pictures": (
        ".tif",
        lambda p: (tifffile.imwrite(p, noise((9, 7))), tiff(noise((4, 5)), p, append=True))[1],
        "holds 2 pictures",
    ),
    "TIFF of int32": (".tif", lambda p: tiff(np.zeros((9, 7), np.int32), p), "save it as one of"),
    "TIFF with a palette": (
        ".tif",
        lambda p: tiff(noise((9, 7), "uint8"), p, photometric="palette", colormap=noise((3, 256))),
        "has a palette",
    ),
    "pickle called .npy": (".npy", lambda p: pickle.dumps(Escape()), ""),
    "pickle in an array": (
        ".npy",
        lambda p: (np.save(p, np.array([[Escape()]], object), allow_pickle=True), p.read_bytes())[1],
        "",
    ),
    **{
        f"array cut to {s}": (
            ".npy",
            lambda p, s=s: (np.save(p, noise((40, 40))), cut(p.read_bytes(), s))[1],
            "",
        )
        for s in (0.0, 0.001, 0.5, 0.99)
    },
    "array of 200000x200000": (
        ".npy",
        lambda p: b"\x93NUMPY\x01\0\x46\0{'descr': '<u2', 'fortran_order': False, 'shape': (200000, 200000)}",
        "",
    ),
    "array of float64": (
        ".npy",
        lambda p: (np.save(p, np.zeros((9, 7))), p.read_bytes())[1],
        "holds float64",
    ),
    "array of 4 axes": (
        ".npy",
        lambda p: (np.save(p, noise((1, 2, 9, 7))), p.read_bytes())[1],
        "is no array",
    ),
    "array of none": (".npy", lambda p: (np.save(p, noise((0, 7))), p.read_bytes())[1], ""),
    "archive called .npy": (
        ".npy",
        lambda p: (np.savez(p.with_suffix(".npz"), noise((9, 7))), p.with_suffix(".npz").read_bytes())[1],
        "is no array",
    ),
    "text called .npy": (".npy", lambda p: b"not an array\n", ""),
    "header of brackets": (".npy", lambda p: b"\x93NUMPY\x01\0\xe8\x03" + b"(" * 1000, ""),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_one_line_and_executes_nothing(tmp_path, what, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suffix, make, words = HOSTILE[what]
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / f"bad{suffix}"
    content = make(path)
    path.write_bytes(content)
    for function in (read_header, read):
        line = one_line(function, path)
        assert str(path) in line and words in line
    with pytest.raises(SystemExit) as stop:
        data.main(["check", str(tmp_path)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in err and err.count("error: ") == 1
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, value, suffix):
    samples = noise((9, 7, 1), "float32")
    samples[3, 4] = value
    write(tmp_path / f"x{suffix}", samples)
    assert "not finite" in one_line(read, tmp_path / f"x{suffix}")


def test_without_tifffile_a_tiff_says_what_to_install(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "x.tif", noise((9, 7)))
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "tifffile":
            raise ImportError("No module named 'tifffile'")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "tifffile")
    monkeypatch.setattr(builtins, "__import__", absent)
    assert 'pip install "fastpix2pix[tiff]"' in one_line(read, tmp_path / "x.tif")


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg"])
def test_a_compression_that_needs_a_library_names_it(tmp_path, compression):
    truth = noise((16, 16), "uint8")
    Image.fromarray(truth).save(tmp_path / "x.tif", compression=compression)
    if find_spec("imagecodecs") is None:
        assert one_line(read, tmp_path / "x.tif").endswith("; run pip install imagecodecs")
    elif compression == "tiff_lzw":
        assert np.array_equal(read(tmp_path / "x.tif")[..., 0], truth)


# ------------------------------------------------------------------------------------------ check


def test_check_says_what_each_half_holds(tmp_path, capsys):
    truth = pairs_5_to_2(tmp_path)
    data.main(["check", str(tmp_path)])
    a, b = (np.stack(half) for half in zip(*truth, strict=True))
    assert capsys.readouterr().out.splitlines() == [
        "train: 3 pairs; width x height of a half (pairs): 24x20 (3)",
        f"  A: 5 channels of uint16, values {a.min()} to {a.max()}",
        f"  B: 2 channels of float32, values {b.min():.6g} to {b.max():.6g}",
        "every file decodes and has its partner",
    ]


def test_check_refuses_files_of_one_half_that_differ_in_channels(tmp_path, capsys):
    pairs_5_to_2(tmp_path)
    tifffile.imwrite(tmp_path / "A/train/1.tif", noise((20, 24)))
    with pytest.raises(SystemExit):
        data.main(["check", str(tmp_path)])
    err = capsys.readouterr().err
    assert "A/train/1.tif: holds 1 channel of 16 bits" in err and "give files of one kind" in err

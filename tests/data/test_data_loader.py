"""Every loader obeys the plan: batches against a plain numpy reading of the same files."""

import importlib
import io
import itertools
import multiprocessing
import pathlib
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from golden import recipe
from PIL import Image

from fastpix2pix.data import Loader, LoaderOptions, find_pairs, open_loader
from fastpix2pix.data import loader as loader_module
from fastpix2pix.data.pictures import read_rgb
from fastpix2pix.data.plan import Plan, epoch_plan
from fastpix2pix.errors import UserError

SIZES = {"load_size": 36, "crop_size": 32}
RNG = np.random.default_rng(0)


@pytest.fixture(params=["dali", "portable"])
def kind(request) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def opened(root, device: str = "cpu", dtype: torch.dtype = torch.float32, **options) -> Loader:
    return open_loader(root, LoaderOptions(**options), device=device, dtype=dtype)


def write_pairs(
    folder, count: int, suffix: str = ".png", size: tuple[int, int] = (40, 40)
) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [RNG.integers(0, 256, (size[0], 2 * size[1], 3), dtype=np.uint8) for _ in range(count)]
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{k + 1}{suffix}")
    return pictures


def expected_sample(half: np.ndarray, top: int, left: int, mirror: bool) -> np.ndarray:
    """The tutorial's jitter, written out: nearest resize by the index rule, crop, flip, normalise."""
    load, crop = SIZES["load_size"], SIZES["crop_size"]
    rows, columns = (np.floor((np.arange(load) + 0.5) * n / load).astype(int) for n in half.shape[:2])
    image = half[rows][:, columns][top : top + crop, left : left + crop]
    image = image[:, ::-1] if mirror else image
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def expected_stream(pictures, batch_size: int, direction: str, seed: int = 0, **plan):
    """(source, target, epoch, position, names) of every batch, endlessly; images as (n, crop, crop, 3)."""
    for epoch in itertools.count():
        decisions = epoch_plan(seed, epoch, len(pictures), **SIZES, **plan)
        for start in range(0, len(pictures), batch_size):
            rows = range(start, min(start + batch_size, len(pictures)))
            chosen = [Plan(*(d[i] for d in decisions)) for i in rows]
            width = [pictures[c.order].shape[1] // 2 for c in chosen]
            a = [
                expected_sample(pictures[c.order][:, :w], *c[1:]) for c, w in zip(chosen, width, strict=True)
            ]
            b = [
                expected_sample(pictures[c.order][:, w:], *c[1:]) for c, w in zip(chosen, width, strict=True)
            ]
            source, target = (np.stack(h) for h in ((a, b) if direction == "AtoB" else (b, a)))
            after = (epoch + 1, 0) if rows.stop == len(pictures) else (epoch, rows.stop)
            yield source, target, *after, tuple(str(c.order + 1) for c in chosen)


def assert_same(batch, expected):
    for image, truth in zip(batch[:2], expected[:2], strict=True):
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(image.permute(0, 2, 3, 1).numpy(), truth)
    assert batch[2:] == expected[2:]


def take(stream, count: int) -> list:
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize(
    "direction, batch_size, chunk, cache_bytes",
    [("BtoA", 1, 4, 0), ("AtoB", 3, 6, 0), ("BtoA", 4, 1, 0), ("AtoB", 2, 4, 10**6)],
)
def test_batches_are_those_of_the_plan(tmp_path, kind, direction, batch_size, chunk, cache_bytes):
    pictures = write_pairs(tmp_path / "train", 7)
    settings = {"direction": direction, "batch_size": batch_size, "chunk": chunk, "cache_bytes": cache_bytes}
    loader = opened(tmp_path, loader=kind, num_threads=1, **settings, **SIZES)
    assert loader.kind == kind and len(loader) == 7
    assert loader.batches_per_epoch == -(-7 // batch_size)
    wanted = take(expected_stream(pictures, batch_size, direction), 3 * loader.batches_per_epoch)
    for batch, expected in zip(loader.stream(), wanted, strict=False):
        assert_same(batch, expected)
    loader.close()


@pytest.mark.parametrize("mirrored, key", [(False, "not_flipped"), (True, "flipped")])
def test_samples_are_the_tutorials(tmp_path, golden, kind, monkeypatch, mirrored, key):
    """From a file to the batch: the float32 pixels that TensorFlow made of the same picture and decisions."""
    tutorial = golden("preprocessing")
    (tmp_path / "train").mkdir()
    Image.fromarray(recipe.picture()).save(tmp_path / "train" / "1.png")
    corner = np.array([tutorial["corner"]["y"]]), np.array([tutorial["corner"]["x"]])
    plan = Plan(np.array([0]), *corner, np.array([mirrored]))
    monkeypatch.setattr(loader_module, "epoch_plan", lambda *_, **__: plan)
    loader = opened(tmp_path, loader=kind, num_threads=1)
    batch = next(loader.stream())
    loader.close()
    for image, name in ((batch.source, "input"), (batch.target, "real")):
        pixels = image.permute(0, 2, 3, 1).numpy()
        assert recipe.digest([pixels]) == tutorial["sha256_of_float32"][key][name]


def test_pictures_of_many_sizes_and_two_folders(tmp_path, kind):
    sizes = [(40, 40), (36, 36), (50, 30), (64, 64), (20, 70)]
    pictures = [RNG.integers(0, 256, (h, 2 * w, 3), dtype=np.uint8) for h, w in sizes]
    for k, picture in enumerate(pictures):
        for half, part in zip("AB", np.split(picture, 2, axis=1), strict=True):
            folder = tmp_path / half / "train"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part).save(folder / f"{k + 1}.png")
    loader = opened(tmp_path, loader=kind, num_threads=1, batch_size=2, chunk=4, seed=5, **SIZES)
    for batch, expected in zip(
        loader.stream(), take(expected_stream(pictures, 2, "BtoA", seed=5), 6), strict=False
    ):
        assert_same(batch, expected)
    loader.close()


def test_without_shuffle_and_flip(tmp_path, kind):
    pictures = write_pairs(tmp_path / "train", 3)
    loader = opened(tmp_path, loader=kind, num_threads=1, shuffle=False, flip=False, **SIZES)
    wanted = take(expected_stream(pictures, 1, "BtoA", shuffle=False, flip=False), 6)
    batches = take(loader.stream(), 6)
    assert [b.names for b in batches] == [("1",), ("2",), ("3",)] * 2
    for batch, expected in zip(batches, wanted, strict=True):
        assert_same(batch, expected)
    loader.close()


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_resume_goes_on_exactly(tmp_path, kind, cache_bytes):
    """Also in the middle of a chunk, of an epoch, and at its end."""
    write_pairs(tmp_path / "train", 7)
    settings = {
        "loader": kind,
        "num_threads": 1,
        "batch_size": 2,
        "chunk": 6,
        "cache_bytes": cache_bytes,
        **SIZES,
    }
    loader = opened(tmp_path, **settings)
    run = take(loader.stream(), 12)
    for stop in (0, 1, 3, 5):
        resumed = opened(tmp_path, **settings)
        for ours, theirs in zip(
            resumed.stream(run[stop].epoch, run[stop].position), run[stop + 1 :], strict=False
        ):
            assert torch.equal(ours.source, theirs.source) and torch.equal(ours.target, theirs.target)
            assert ours[2:] == theirs[2:]
        resumed.close()
    loader.close()


def test_batches_outlive_their_chunk(tmp_path, kind):
    """The decoder's buffers are reused; a batch that the user keeps must not change under his hands."""
    pictures = write_pairs(tmp_path / "train", 8, size=(36, 36))  # no resize between decoder and batch
    loader = opened(tmp_path, loader=kind, num_threads=1, batch_size=2, chunk=2, **SIZES)
    batches = take(loader.stream(), 16)
    for batch, expected in zip(batches, expected_stream(pictures, 2, "BtoA"), strict=False):
        assert_same(batch, expected)
    loader.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(tmp_path, kind, dtype):
    pictures = write_pairs(tmp_path / "train", 2)
    loader = opened(tmp_path, loader=kind, num_threads=1, dtype=dtype, **SIZES)
    batch, expected = next(loader.stream()), next(expected_stream(pictures, 1, "BtoA"))
    assert batch.source.dtype == batch.target.dtype == dtype
    assert torch.equal(batch.source.permute(0, 2, 3, 1), torch.from_numpy(expected[0]).to(dtype))
    loader.close()


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_dali_gives_pillows_samples_of_real_jpegs(facades, interpolation):
    """Equal to the last bit where both decode with one libjpeg-turbo; another build may round differently."""
    pytest.importorskip("nvidia.dali")
    streams = [
        opened(facades, loader=k, num_threads=1, batch_size=4, chunk=8, interpolation=interpolation)
        for k in ("dali", "portable")
    ]
    for dali, portable in zip(*(take(loader.stream(3, 100), 6) for loader in streams), strict=True):
        assert dali[2:] == portable[2:]
        for ours, theirs in zip(dali[:2], portable[:2], strict=True):
            assert (ours - theirs).abs().max() <= 1.001 / 127.5
            assert (ours != theirs).float().mean() < 0.01
    for loader in streams:
        loader.close()


def test_every_kind_of_file_gives_the_same_picture_everywhere(tmp_path, kind):
    """Grey, CMYK, RGBA, palette, chroma at half size, progressive, rotated by EXIF."""
    noise = Image.fromarray(RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8)).resize((80, 40), Image.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    folder = tmp_path / "train"
    folder.mkdir()
    for mode in ("L", "RGBA", "P", "1", "LA"):
        noise.convert(mode).save(folder / f"{mode}.png")
    np.save(folder / "array.npy", np.asarray(noise))
    for mode in ("L", "CMYK"):
        noise.convert(mode).save(folder / f"{mode}.jpg", quality=95)
    noise.save(folder / "chroma.jpg", subsampling=2)
    noise.save(folder / "progressive.jpg", progressive=True)
    noise.save(folder / "exif.jpg", exif=exif)
    pairs = find_pairs(tmp_path, "train")
    loader = opened(tmp_path, loader=kind, num_threads=1, shuffle=False, flip=False, **SIZES)
    plan = epoch_plan(0, 0, len(pairs), **SIZES, flip=False, shuffle=False)
    for k, (pair, batch) in enumerate(zip(pairs, loader.stream(), strict=False)):
        for image, half in zip((batch.target, batch.source), pair.read(), strict=True):
            truth = expected_sample(half, plan.top[k], plan.left[k], False)
            off = abs(image[0].permute(1, 2, 0).numpy() - truth).max() * 127.5
            assert off <= (1.01 if pair.a.suffix == ".jpg" else 0), (pair.a, off)
    loader.close()


def test_dali_is_given_only_files_that_every_decoder_reads_alike(tmp_path):
    """The others reach it as 8-bit RGB PNGs of what Pillow read."""
    pytest.importorskip("nvidia.dali")
    from fastpix2pix.data.dali_chunks import _encoded

    few = tmp_path / "palette.png"
    Image.fromarray(RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8)).quantize(16).save(few)
    bytes_given = _encoded(few, plain=False).tobytes()
    with Image.open(io.BytesIO(bytes_given)) as given:
        assert given.mode == "RGB" and np.array_equal(np.asarray(given), read_rgb(few))
    assert _encoded(few, plain=True).tobytes() == few.read_bytes()


SLOW_REPAIRS = [("dali", 10**8), ("portable", 0), ("portable", 10**8)]


def damaged(picture: bytes) -> bytes:
    """Whole by its header and its last bytes; a PNG's pixels, or a JPEG's Huffman table, are nonsense."""
    spoiled = bytearray(picture)
    if picture.startswith(b"\xff\xd8"):
        table = picture.index(b"\xff\xc4") + 5
        spoiled[table : table + 16] = b"\xff" * 16
    else:
        middle = len(picture) // 2
        spoiled[middle : middle + 60] = bytes(60)
    return bytes(spoiled)


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_file_damaged_inside_is_named(tmp_path, kind, cache_bytes):
    write_pairs(tmp_path / "train", 9)
    path = tmp_path / "train" / "5.png"
    path.write_bytes(damaged(path.read_bytes()))
    settings = {"num_threads": 1, "chunk": 9, "shuffle": False, "cache_bytes": cache_bytes, **SIZES}
    loader = opened(tmp_path, loader=kind, **settings)
    with pytest.raises(UserError) as caught:
        take(loader.stream(), 9)
    assert str(caught.value).startswith(f"{path}: cannot be decoded")
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    loader.close()


def test_file_that_dali_alone_refuses_is_named(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from fastpix2pix.data import dali_chunks

    write_pairs(tmp_path / "train", 9)
    path = tmp_path / "train" / "5.png"
    path.write_bytes(damaged(path.read_bytes()))
    monkeypatch.setattr(dali_chunks, "read", lambda path: None)
    loader = opened(tmp_path, loader="dali", num_threads=1, chunk=9, **SIZES)
    with pytest.raises(UserError) as caught:
        next(loader.stream())
    assert str(caught.value).startswith(f"{path}: DALI cannot decode it (")
    assert "--loader portable" in str(caught.value) and "File " not in str(caught.value)
    loader.close()


@pytest.mark.parametrize(
    "kind, cache_bytes",
    [("dali", 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_REPAIRS)],
)
def test_each_of_30_damaged_files_in_400_is_named(tmp_path, kind, cache_bytes):
    """A user mends one file at a time and goes on from where the run stopped."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    rng = np.random.default_rng(1)
    whole = {}
    for half in "AB":
        folder = tmp_path / "train" / half
        folder.mkdir(parents=True)
        for k in range(400):
            picture = Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8))
            picture.save(folder / f"{k}{'.jpg' if k % 2 else '.png'}")
    options = {"loader": kind, "num_threads": 1, "chunk": 64, "cache_bytes": cache_bytes, **SIZES}
    loader = opened(tmp_path, **options)
    for k in rng.choice(400, 30, replace=False):
        path = tmp_path / "train" / "AAB"[k % 3] / f"{k}{'.jpg' if k % 2 else '.png'}"
        whole[path] = path.read_bytes()
        path.write_bytes(damaged(whole[path]))
    named = []
    epoch = position = 0
    while epoch == 0:
        try:
            for batch in loader.stream(epoch, position):
                epoch, position = batch.epoch, batch.position
                if epoch:
                    break
        except UserError as error:
            path = pathlib.Path(str(error).split(": ")[0])
            path.write_bytes(whole[path])
            named.append(path)
        loader.close()
    assert len(named) == 30 and set(named) == set(whole)


def test_file_that_vanishes_is_named(tmp_path, kind):
    write_pairs(tmp_path / "train", 3)
    loader = opened(tmp_path, loader=kind, num_threads=1, **SIZES)
    (tmp_path / "train" / "2.png").unlink()
    with pytest.raises(UserError, match="2.png"):
        take(loader.stream(), 3)
    loader.close()


def test_good_batches_before_a_damaged_file_arrive(tmp_path, kind):
    pictures = write_pairs(tmp_path / "train", 6)
    loader = opened(tmp_path, loader=kind, num_threads=1, chunk=1, shuffle=False, **SIZES)
    path = tmp_path / "train" / "6.png"
    path.write_bytes(path.read_bytes()[:200])
    wanted = expected_stream(pictures, 1, "BtoA", shuffle=False)
    stream = loader.stream()
    for expected in take(wanted, 5):
        assert_same(next(stream), expected)
    with pytest.raises(UserError, match="6.png"):
        next(stream)


def test_close_leaves_no_thread_and_no_process(tmp_path, kind):
    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if not t.daemon]

    write_pairs(tmp_path / "train", 3)
    before = threads()
    loader = opened(tmp_path, loader=kind, num_threads=2, **SIZES)
    streams = [loader.stream(), loader.stream()]
    for stream in streams:
        next(stream)
    assert len(threads()) > len(before)
    loader.close()
    assert threads() == before and not multiprocessing.active_children()
    assert next(streams[0], None) is None


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"load_size": 30, "crop_size": 32}, "crop_size 32"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, named):
    write_pairs(tmp_path / "train", 1)
    with pytest.raises(UserError, match=named):
        opened(tmp_path, **{**SIZES, **settings})


@pytest.fixture
def dali_not_yet_imported(monkeypatch):
    import fastpix2pix.data

    pytest.importorskip("nvidia.dali")
    for name in ("dali", "dali_chunks"):
        importlib.import_module(f"fastpix2pix.data.{name}")
        monkeypatch.delitem(sys.modules, f"fastpix2pix.data.{name}")
        monkeypatch.delattr(fastpix2pix.data, name)


def refusal_to_use_dali(tmp_path, caplog) -> str:
    """The one line that "auto" logs when it opens, or starts, the portable loader instead."""
    write_pairs(tmp_path / "train", 2)
    with caplog.at_level("WARNING"):
        loader = opened(tmp_path, num_threads=1, **SIZES)
        assert next(loader.stream()).source.shape == (1, 3, 32, 32)
        assert loader.kind == "portable"
        next(loader.stream())
        loader.close()
    (record,) = caplog.records
    assert "\n" not in record.message and "pip install" in record.message
    with pytest.raises(UserError, match="--loader portable"):
        next(opened(tmp_path, loader="dali", num_threads=1, **SIZES).stream())
    return record.message


def test_dali_absent(tmp_path, monkeypatch, caplog, dali_not_yet_imported):
    for name in ("nvidia.dali", "nvidia.dali.fn"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it now fails
    assert "nvidia.dali" in refusal_to_use_dali(tmp_path, caplog)
    with pytest.raises(UserError, match="--loader dali"):
        opened(tmp_path, loader="dali", **SIZES)
    assert opened(tmp_path, loader="portable", **SIZES).kind == "portable"


def test_dali_too_old(tmp_path, monkeypatch, caplog, dali_not_yet_imported):
    monkeypatch.setattr("nvidia.dali.__version__", "2.1.1")
    assert "2.1.1 is older than 2.2" in refusal_to_use_dali(tmp_path, caplog)


def test_dali_that_cannot_build_its_pipeline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("nvidia.dali")
    from fastpix2pix.data import dali

    def fails(**settings):
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(dali, "training_pipeline", fails)
    assert "CUDA driver" in refusal_to_use_dali(tmp_path, caplog)


def test_dali_that_decodes_nothing(tmp_path, monkeypatch, caplog):
    """As on a machine whose driver or GPU its decoder does not know: no file is to blame."""
    pytest.importorskip("nvidia.dali")
    from fastpix2pix.data import dali

    decoded = dali._decoded
    monkeypatch.setattr(dali, "_decoded", lambda file, device: decoded(file[:20], device))
    assert "nvImageCodec" in refusal_to_use_dali(tmp_path, caplog)


def test_nothing_of_dali_lives_before_the_first_batch(tmp_path, monkeypatch):
    """Nor after close: a CUDA graph can be captured in between."""
    pytest.importorskip("nvidia.dali")
    from fastpix2pix.data import dali

    pipelines = weakref.WeakSet()
    make = dali.training_pipeline

    def noted(**settings):
        pipeline = make(**settings)
        pipelines.add(pipeline)
        return pipeline

    monkeypatch.setattr(dali, "training_pipeline", noted)
    write_pairs(tmp_path / "train", 2)
    loader = opened(tmp_path, loader="dali", num_threads=1, **SIZES)
    stream = loader.stream()
    assert not pipelines
    next(stream)
    assert len(pipelines) == 1
    loader.close()
    assert not pipelines


def test_cache_too_small_is_said_and_not_used(tmp_path, kind, caplog, monkeypatch):
    write_pairs(tmp_path / "train", 3)
    needed = 3 * 2 * 36 * 36 * 3
    with caplog.at_level("WARNING"):
        loader = opened(tmp_path, loader=kind, cache_bytes=needed - 1, **SIZES)
    assert str(needed) in caplog.text
    monkeypatch.setattr(loader, "_filled_cache", lambda resized: pytest.fail("the cache was filled"))
    next(loader.stream())
    loader.close()


def test_cache_decodes_once(tmp_path, kind):
    pictures = write_pairs(tmp_path / "train", 3)
    loader = opened(tmp_path, loader=kind, num_threads=1, cache_bytes=3 * 2 * 36 * 36 * 3, **SIZES)
    stream = loader.stream()
    first = next(stream)
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    for batch, expected in zip([first, *take(stream, 8)], expected_stream(pictures, 1, "BtoA"), strict=False):
        assert_same(batch, expected)
    assert_same(next(loader.stream()), next(expected_stream(pictures, 1, "BtoA")))
    loader.close()


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
@pytest.mark.parametrize("cache_bytes", [0, 10**7])
def test_gpu_gives_the_cpus_samples(tmp_path, kind, interpolation, dtype, cache_bytes):
    for k, size in enumerate([(40, 40), (40, 40), (36, 36), (50, 30), (64, 64), (40, 40), (20, 70)]):
        write_pairs(tmp_path / "train" / str(k), 1, size=size)
        (tmp_path / "train" / str(k) / "1.png").rename(tmp_path / "train" / f"{k}.png")
        (tmp_path / "train" / str(k)).rmdir()
    options = {
        "batch_size": 2,
        "chunk": 4,
        "cache_bytes": cache_bytes,
        "interpolation": interpolation,
        **SIZES,
    }
    on_gpu = opened(tmp_path, "cuda", dtype, loader=kind, **options)
    on_cpu = opened(tmp_path, "cpu", dtype, loader="portable", **options)
    for ours, theirs in zip(*(take(loader.stream(), 12) for loader in (on_gpu, on_cpu)), strict=True):
        assert ours[2:] == theirs[2:]
        for mine, other in zip(ours[:2], theirs[:2], strict=True):
            assert mine.is_cuda and torch.equal(mine.cpu(), other)
            assert mine.is_contiguous(memory_format=torch.channels_last)
    assert on_gpu.kind == kind
    on_gpu.close()
    on_cpu.close()


@pytest.mark.gpu
def test_nvjpeg_is_close_to_pillow(facades):
    pytest.importorskip("nvidia.dali")
    on_gpu = opened(facades, loader="dali", device="cuda", batch_size=8)
    by_pillow = opened(facades, loader="portable", batch_size=8)
    for ours, theirs in zip(*(take(loader.stream(), 3) for loader in (on_gpu, by_pillow)), strict=True):
        off = (ours.source.cpu() - theirs.source).abs() * 127.5
        assert off.mean() < 0.5 and off.max() <= 8

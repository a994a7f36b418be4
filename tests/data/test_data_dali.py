"""DALI's pipeline against the plan read plainly, its nearest against the index table, and its GPU form."""

import itertools
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpix2pix.data import LoaderOptions, find_pairs, open_loader
from fastpix2pix.data.pairs import Pair
from fastpix2pix.data.plan import epoch_plan

nvidia = pytest.importorskip("nvidia.dali")
from nvidia.dali import fn, pipeline_def, types  # noqa: E402

from fastpix2pix.data import dali, dali_chunks  # noqa: E402

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def index_table(size: int, load_size: int) -> np.ndarray:
    """floor((i + 1/2) * size / load_size), in integers."""
    return (2 * np.arange(load_size) + 1) * size // (2 * load_size)


# ---- the whole pipeline against the plan, read plainly -------------------------------------------


def plain_samples(pairs, epoch: int, direction: str, load_size: int = 286, crop_size: int = 256):
    """(source, target) of each sample of an epoch, float32 (crop, crop, 3): Pillow, numpy, and the plan."""
    plan = epoch_plan(0, epoch, len(pairs), load_size=load_size, crop_size=crop_size)
    for which, top, left, mirror in zip(*plan, strict=True):
        samples = []
        for half in pairs[which].read():
            rows, columns = (index_table(n, load_size) for n in half.shape[:2])
            image = half[rows[top : top + crop_size]][:, columns[left : left + crop_size]]
            image = image[:, ::-1] if mirror else image
            samples.append(image.astype(np.float32) / np.float32(127.5) - np.float32(1))
        yield samples if direction == "AtoB" else samples[::-1]


def assert_samples_are_plain(root: Path, pairs: int, epochs: int, dtype, direction: str, **options) -> None:
    loader = open_loader(root, LoaderOptions(direction=direction, loader="dali", **options), dtype=dtype)
    assert len(loader) == pairs
    stream = loader.stream()
    different = 0
    for epoch in range(epochs):
        for wanted in plain_samples(loader.pairs, epoch, direction):
            batch = next(stream)
            for ours, truth in zip(batch[:2], wanted, strict=True):
                assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
                truth = torch.from_numpy(truth).to(dtype)
                different += (ours[0].permute(1, 2, 0) != truth).sum().item()
    loader.close()
    assert different == 0


def needs_pillows_libjpeg(path: Path) -> None:
    """Skips where DALI and Pillow bring builds of libjpeg-turbo that round differently."""
    pipeline = dali.decoding_pipeline(
        source=lambda: [np.fromfile(path, np.uint8)],
        device="cpu",
        batch_size=1,
        num_threads=1,
        device_id=None,
    )
    ours = np.asarray(pipeline.run()[0][0])
    with Image.open(path) as image:
        if not np.array_equal(ours, np.asarray(image)):
            pytest.skip("DALI and Pillow decode JPEGs differently here")


@pytest.fixture
def few_facades(facades, tmp_path) -> Path:
    (tmp_path / "train").mkdir()
    for k in range(1, 9):
        (tmp_path / "train" / f"{k}.jpg").symlink_to(facades / "train" / f"{k}.jpg")
    return tmp_path


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("dtype, direction", [*zip(TYPES, ["BtoA", "AtoB", "BtoA"], strict=True)])
def test_facades_are_the_plans_to_the_last_bit(few_facades, dtype, direction, cache_bytes):
    needs_pillows_libjpeg(few_facades / "train" / "1.jpg")
    assert_samples_are_plain(few_facades, 8, 2, dtype, direction, num_threads=2, cache_bytes=cache_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
@pytest.mark.parametrize("dtype", TYPES)
def test_all_facades_for_two_epochs_are_the_plans(facades, dtype, direction):
    needs_pillows_libjpeg(facades / "train" / "1.jpg")
    assert_samples_are_plain(facades, 400, 2, dtype, direction)


@pytest.mark.parametrize("separate", [False, True])
def test_sizes_at_which_dali_rounds_otherwise_take_the_index_path(tmp_path, separate):
    """412 rows are such a size; 256 and 300 in the same chunk go with them."""
    rng = np.random.default_rng(0)
    for k, (height, width) in enumerate([(412, 412), (256, 256), (300, 412)]):
        picture = rng.integers(0, 256, (height, 2 * width, 3), dtype=np.uint8)
        for half, part in zip("AB", np.split(picture, 2, axis=1), strict=True):
            (tmp_path / half / "train").mkdir(parents=True, exist_ok=True)
            if separate:
                Image.fromarray(part).save(tmp_path / half / "train" / f"{k}.png")
        if not separate:
            (tmp_path / "train").mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "train" / f"{k}.png")
    root = tmp_path
    if not separate:
        root = tmp_path / "side_by_side"
        root.mkdir()
        (tmp_path / "train").rename(root / "train")
    assert not dali.resizes_exactly(find_pairs(root, "train"), 286, "nearest", CPU)
    assert_samples_are_plain(root, 3, 2, torch.float32, "BtoA", num_threads=1)


def test_every_corner_of_the_crop_survives_its_way_as_a_share_of_the_room():
    """DALI takes a crop's corner as a float32 between 0 and 1."""
    for load_size, crop_size in ((286, 256), (1000, 3), (300, 300)):
        corners = np.arange(load_size - crop_size + 1)
        chunk = dali.Chunk(0, (), corners, corners[::-1], corners, corners % 2 == 1)
        sent = dali.decisions(chunk, load_size, crop_size)
        pixels = np.arange(load_size).astype(np.uint8).repeat(3).reshape(1, load_size, 3)
        images = [np.ascontiguousarray(np.broadcast_to(pixels, (load_size, load_size, 3)))] * len(corners)

        @pipeline_def(exec_dynamic=True, batch_size=len(corners), num_threads=1, device_id=None)
        def columns(images=images, sent=sent, crop_size=crop_size):
            image = fn.external_source(source=lambda: images, batch=True, layout="HWC", no_copy=True)
            left = fn.external_source(source=lambda: sent[0], batch=True)
            return fn.crop_mirror_normalize(
                image, crop=(1, crop_size), crop_pos_x=left, dtype=types.UINT8, output_layout="HWC"
            )

        cropped = np.asarray(columns().run()[0].as_tensor())
        assert np.array_equal(cropped[:, 0, 0, 0], corners.astype(np.uint8))


# ---- nearest -------------------------------------------------------------------------------------


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def nearest_alone(images, load_size: int):
    return tuple(dali._nearest([fn.external_source(source=images, batch=True, layout="HWC")], load_size))


def taken(images: list[np.ndarray], load_size: int) -> list[np.ndarray]:
    """The indices that DALI takes of each half of ``images``, whose pixels hold them: (n, load, load)."""
    pipeline = nearest_alone(
        images=lambda: images, load_size=load_size, batch_size=len(images), num_threads=1, device_id=None
    )
    return [np.asarray(half.as_tensor()).astype(int) @ [1, 256, 0] for half in pipeline.run()]


def indexed(count: int) -> np.ndarray:
    return np.stack([np.arange(count) % 256, np.arange(count) // 256, np.zeros(count)], axis=-1).astype(
        np.uint8
    )


def assert_nearest_is_as_predicted(sizes: list[int], load_size: int) -> int:
    """Compares every row and column that DALI takes on the CPU; returns at how many sizes it is exact."""
    exact = 0
    for some in (sizes[k : k + 32] for k in range(0, len(sizes), 32)):
        tall = taken([indexed(n)[:, None].repeat(2, axis=1) for n in some], load_size)[0][:, :, 0]
        wide = [half[:, 0] for half in taken([indexed(2 * n)[None] for n in some], load_size)]
        for k, n in enumerate(some):
            table = index_table(n, load_size)
            (predicted,) = dali._dali_indices("rows", n, 0, load_size, "cpu")
            assert np.array_equal(tall[k], predicted), n
            for half, first in zip(wide, (0, n), strict=True):
                answers = dali._dali_indices("columns", n, first, load_size, "cpu")
                assert any(np.array_equal(half[k], answer) for answer in answers), n
            if dali._is_exact(n, n, True, load_size, "cpu"):
                exact += 1
                assert all(
                    np.array_equal(t - f, table) for t, f in ((tall[k], 0), (wide[0][k], 0), (wide[1][k], n))
                )
    return exact


@pytest.mark.parametrize("load_size", [143, 286, 572])
def test_nearest_takes_the_predicted_pixels(load_size):
    sizes = [*range(64, 2001, 61), 256, 412, 480, 512, 600, 1024, 1049]
    assert 0 < assert_nearest_is_as_predicted(sizes, load_size) < len(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("load_size, exact", [(143, 1910), (286, 1663), (572, 1119)])
def test_nearest_takes_the_predicted_pixels_of_every_size(load_size, exact):
    """How many of the 1937 sizes from 64 to 2000 pixels need no index path on the CPU."""
    assert assert_nearest_is_as_predicted([*range(64, 2001)], load_size) == exact


@pytest.mark.parametrize("size", [256, 512, 600, 1024])  # facades, Cityscapes, maps
def test_the_known_data_sets_need_no_index_path(size):
    pair = Pair("1", Path("1.jpg"), None, (size, size), True)
    assert dali.resizes_exactly([pair], 286, "nearest", CPU)
    assert not dali.resizes_exactly([pair], 286, "bicubic", CPU)
    assert dali.resizes_exactly([pair], size, "bicubic", CPU)


@pytest.mark.parametrize("load_size", [143, 256, 286, 512])
def test_a_gpus_nearest_is_exact_from_16_to_4096_pixels(load_size):
    """By the formula of its kernel, in every order in which it may round."""
    for size in range(16, 4097):
        for first in (0, size):
            for indices in dali._dali_indices("columns", size, first, load_size, "cuda"):
                assert np.array_equal(indices - first, index_table(size, load_size)), size


def test_a_gpus_nearest_takes_the_index_path_where_it_fails():
    pair = Pair("1", Path("1.jpg"), None, (1097, 1097), True)
    assert not dali.resizes_exactly([pair], 1144, "nearest", torch.device("cuda"))
    assert dali.resizes_exactly([pair], 1144 // 2, "nearest", torch.device("cuda"))


# ---- the GPU form --------------------------------------------------------------------------------


def pipelines(device: str) -> dict:
    """Every pipeline, as it is defined for a device ("cpu" or "gpu")."""
    hardware = {"device": device, "batch_size": 4, "num_threads": 1, "device_id": None}

    def source():
        raise StopIteration

    made = {}
    for files in (1, 2):
        on_files = {"source": source, "files_per_pair": files, **hardware}
        for dtype in TYPES:
            made["training", files, dtype] = dali.training_pipeline(
                load_size=286, crop_size=256, dtype=dtype, **on_files
            )
        for load_size in (None, 286):
            made["resizing", files, load_size] = dali.resizing_pipeline(load_size=load_size, **on_files)
    for dtype in TYPES:
        made["jitter", dtype] = dali.jitter_pipeline(
            images=source, decisions=source, crop_size=256, dtype=dtype, **hardware
        )
    made["decoding"] = dali.decoding_pipeline(source=source, **hardware)
    return made


def operators(pipeline) -> list[tuple[str, dict]]:
    """(name, arguments) of each operator. DALI checks arguments, types and devices of inputs on the way."""
    assert pipeline.serialize()
    found = []
    for spec in (str(operator.spec) for operator in pipeline._ops):
        name = re.search(r"OpSpec for (\w+)", spec)[1]
        arguments = dict(re.findall(r"^    (\w+): (.*)$", spec.split("Arguments:")[1], re.MULTILINE))
        found.append((name, {k: v for k, v in arguments.items() if not k.startswith("_origin")}))
    return found


def test_gpu_pipelines_are_the_cpu_pipelines_on_another_device():
    """Pixels are touched on the GPU alone, by operators that exist there, with the CPU's arguments."""
    from nvidia.dali.ops import cpu_ops, gpu_ops, mixed_ops

    registered = {"cpu": cpu_ops(), "gpu": gpu_ops(), "mixed": mixed_ops()}
    on_pixels = {"Resize", "CropMirrorNormalize", "LookupTable", "Slice"}
    for on_gpu, on_cpu in zip(pipelines("gpu").values(), pipelines("cpu").values(), strict=True):
        seen = set()
        for (name, ours), (same_name, theirs) in zip(operators(on_gpu), operators(on_cpu), strict=True):
            device = ours.pop("device")
            assert name == same_name and theirs.pop("device") == "cpu" and ours == theirs
            assert name in registered[device] or name.replace("__", ".") in registered[device]
            if name == "decoders__Image":
                assert device == "mixed" and float(ours["hw_decoder_load"]) == 0
            seen.add((name, device))
        assert seen & {
            ("LookupTable", "gpu"),
            ("Slice", "gpu"),
            ("Resize", "gpu"),
            ("decoders__Image", "mixed"),
        }
        assert not {(name, "cpu") for name in on_pixels - {"Slice"}} & seen


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_gpus_second_pipeline_gives_the_tensor_jitters_samples(
    few_facades, monkeypatch, dtype, cache_bytes
):
    """The way of bicubic and of resident data on a GPU, walked on the CPU."""

    def by_dali(decoder, images, chunks):
        # As arrays: for tensors DALI asks torch for CUDA's current stream, which is not to be had here.
        arrays = (tuple(np.stack(half) for half in halves) for halves in images)
        return decoder._jittered_by_dali(arrays, chunks)

    options = LoaderOptions(interpolation="bicubic", chunk=3, cache_bytes=cache_bytes, num_threads=1)
    batches = []
    for _ in range(2):
        loader = open_loader(few_facades, options, dtype=dtype)
        batches.append([*itertools.islice(loader.stream(0, 2), 9)])
        loader.close()
        monkeypatch.setattr(dali_chunks.DaliDecoder, "jittered_images", by_dali)
    for ours, theirs in zip(*batches, strict=True):
        assert ours[2:] == theirs[2:]
        for mine, other in zip(ours[:2], theirs[:2], strict=True):
            assert torch.equal(mine, other) and mine.stride() == other.stride()


def test_every_call_of_dali_names_the_gpu_that_was_asked_for(few_facades, monkeypatch):
    """Its pipeline, and the current device whose current stream DALI and torch hand data over on."""
    device, inside, made = torch.device("cuda:1"), [], []

    @contextmanager
    def current_device(device):
        inside.append(device)
        try:
            yield
        finally:
            inside.pop()

    class Pipeline:
        def __init__(self, **settings):
            made.append(settings)

        def build(self):
            assert inside == [device]

        def run(self, stream):
            assert inside == [device] and stream == "current stream"
            raise StopIteration

    monkeypatch.setattr(torch.cuda, "device", current_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current stream")
    for name in ("training_pipeline", "resizing_pipeline", "jitter_pipeline"):
        monkeypatch.setattr(dali, name, Pipeline)
    decoder = dali_chunks.DaliDecoder(find_pairs(few_facades, "train"), LoaderOptions(), device, TYPES[0])
    for results in (
        decoder.jittered,
        decoder.resized,
        lambda nothing: decoder.jittered_images(nothing, nothing),
    ):
        assert [*results(iter(()))] == []
    assert [(settings["device"], settings["device_id"]) for settings in made] == [("gpu", 1)] * 3

"""Resize and jitter against the tutorial's own pixels, and against Pillow."""

import numpy as np
import pytest
import torch
from golden import recipe
from PIL import Image

from fastpix2pix.data import load_pair
from fastpix2pix.data.jitter import jitter
from fastpix2pix.data.pairs import Pair
from fastpix2pix.data.resize import integer_bicubic, nearest_indices, pillow_bicubic, resize
from fastpix2pix.pixels import normalize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tutorial(golden) -> dict:
    return golden("preprocessing")


@pytest.fixture(scope="module")
def picture(tutorial) -> np.ndarray:
    """The golden file's picture: real (the target) on the left, input on the right."""
    drawn = recipe.picture()
    assert recipe.digest([drawn]) == tutorial["inputs_sha256"]
    return drawn


def half(picture: np.ndarray, name: str) -> torch.Tensor:
    columns = slice(0, 256) if name == "real" else slice(256, 512)
    return torch.from_numpy(picture[None, :, columns].copy())


def sha256(tensor: torch.Tensor) -> str:
    return recipe.digest([tensor.numpy()])


def test_index_table_is_tensorflows(tutorial):
    assert nearest_indices(256, 286, CPU).tolist() == tutorial["index_table_286_from_256"]


@pytest.mark.parametrize("size_in", [100, 256, 286, 512, 600, 1024])  # facades 256, maps 600
def test_index_table_is_tensorflows_float32_rule_at_other_sizes(size_in):
    centres = np.arange(286, dtype=np.float32) + np.float32(0.5)
    rule = np.floor(centres * np.float32(size_in / 286)).clip(max=size_in - 1)
    assert nearest_indices(size_in, 286, CPU).tolist() == rule.astype(int).tolist()


@pytest.mark.parametrize("name", ["real", "input"])
def test_resized_and_jittered_pixels_are_the_tutorials(tutorial, picture, name):
    resized = resize(half(picture, name), 286, "nearest")
    assert sha256(resized) == tutorial["sha256_of_resized_uint8"][name]
    for mirrored, key in ((False, "not_flipped"), (True, "flipped")):
        corner = np.array([tutorial["corner"]["y"]]), np.array([tutorial["corner"]["x"]])
        result = jitter(resized, *corner, np.array([mirrored]), 256, torch.float32)
        assert sha256(result.permute(0, 2, 3, 1)) == tutorial["sha256_of_float32"][key][name]


def test_pair_without_jitter_is_the_tutorials_test_image(tutorial, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "1.png")
    pair = Pair("1", tmp_path / "1.png", None, (256, 256), True)
    source, target = load_pair(pair, direction="BtoA", size=256, interpolation="nearest")
    for image, name in ((source, "input"), (target, "real")):
        assert image.shape == (1, 3, 256, 256) and image.is_contiguous(memory_format=torch.channels_last)
        assert sha256(image.permute(0, 2, 3, 1)) == tutorial["sha256_of_float32"]["test_image"][name]


def test_normalisation_is_the_tutorials_for_every_grey_level(tutorial):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    table = normalize(levels, torch.float32)[0, 0].flatten()
    assert sha256(table) == tutorial["sha256_of_float32"]["grey_levels"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_results_are_the_rounded_float32_ones(dtype):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(normalize(levels, dtype), normalize(levels, torch.float32).to(dtype))


BICUBIC_SIZES = [
    (256, 256, 286),  # facades
    (600, 600, 286),  # maps: antialiased
    (200, 300, 286),  # one side grows, the other shrinks
    (100, 260, 64),
    (286, 256, 286),  # one pass only
    (17, 5, 32),  # wider kernel than picture
    (1, 1, 8),
]


@pytest.mark.parametrize("height, width, size", BICUBIC_SIZES)
def test_bicubic_in_integers_is_pillows_bit_for_bit(height, width, size):
    rng = np.random.default_rng(height + width)
    smooth = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    black_and_white = rng.integers(0, 2, (1, height, width, 3), dtype=np.uint8) * 255  # overshoots most
    for image in (smooth, black_and_white):
        by_pillow = Image.fromarray(image[0]).resize((size, size), Image.Resampling.BICUBIC)
        ours = integer_bicubic(torch.from_numpy(image), size)
        assert np.array_equal(ours[0].numpy(), np.asarray(by_pillow))
        assert torch.equal(resize(torch.from_numpy(image), size, "bicubic"), ours)


def test_both_bicubics_go_along_the_rows_first_in_tall_pictures():
    """There Pillow 13 may turn the passes round; the plan's samples must not depend on its version."""
    image = torch.randint(
        0, 256, (2, 333, 251, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(pillow_bicubic(image, 286), integer_bicubic(image, 286))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_jitter_takes_the_planned_crops(dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    which, top, left = [4, 0, 0, 2], np.array([0, 4, 1, 2]), np.array([4, 0, 3, 2])
    mirror = np.array([True, False, True, False])
    result = jitter(torch.from_numpy(images[which]), top, left, mirror, 8, dtype)
    assert result.shape == (4, 3, 8, 8) and result.is_contiguous(memory_format=torch.channels_last)
    for k in range(4):
        crop = images[which[k], top[k] : top[k] + 8, left[k] : left[k] + 8]
        crop = crop[:, ::-1] if mirror[k] else crop
        expected = crop.astype(np.float32) / np.float32(127.5) - np.float32(1)
        assert torch.equal(result[k].permute(1, 2, 0), torch.from_numpy(expected).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_gpu_gives_the_cpus_pixels(interpolation):
    images = torch.randint(0, 256, (3, 300, 200, 3), dtype=torch.uint8)
    on_gpu = resize(images.cuda(), 286, interpolation)
    assert torch.equal(on_gpu.cpu(), resize(images, 286, interpolation))
    plan = np.array([30, 3, 0]), np.array([0, 7, 30]), np.array([True, False, True])
    jittered = jitter(on_gpu, *plan, 256, torch.float32)
    assert torch.equal(jittered.cpu(), jitter(on_gpu.cpu(), *plan, 256, torch.float32))

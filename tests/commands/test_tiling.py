"""Translating in tiles: where they lie, how they blend, and that the network sees what it should."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config
from tiny_run import error_line
from torch.func import functional_call

import fastpix2pix
from fastpix2pix import checkpoint, translate, translator
from fastpix2pix.errors import UserError
from fastpix2pix.models import build_networks
from fastpix2pix.tiling import blend_tiles, tile_starts


@given(st.integers(1, 5000), st.integers(2, 64), st.data())
def test_tiles_cover_the_image_and_overlap(length, tile, data):
    overlap = data.draw(st.integers(1, tile // 2))
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile >= length
    if length > tile:
        assert starts[-1] == length - tile
        shared = tile - np.diff(starts)
        assert shared.min() >= overlap
        assert (len(starts) - 1) * (tile - overlap) + tile - length < tile - overlap  # no more than needed


@pytest.mark.parametrize("size", [(64, 64), (33, 100), (16, 70), (32, 32), (5, 5)])
def test_what_every_tile_keeps_is_kept(size):
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    assert torch.allclose(blend_tiles(lambda tile: tile, image, 32, 8), image, rtol=0, atol=1e-14)


def test_no_seam_where_tiles_differ():
    """Tiles of alternating brightness, the worst that their own statistics could do: a ramp, no step."""
    brightness = iter([0.0, 1.0] * 20)
    image = torch.zeros(1, 1, 32, 320)
    blended = blend_tiles(lambda tile: torch.full_like(tile, next(brightness)), image, 64, 16)[0, 0, 0]
    assert blended.min() == 0 and blended.max() == 1
    assert blended.diff().abs().max() <= 1 / 15


# --------------------------------------------------------------------------------------- the network


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of an untrained tiny network, biased so that its images are not all grey."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_config(ngf=4, ndf=4, n_layers_D=1, name=folder.name, seed=3)
    generator, discriminator = build_networks(config.network_options())
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)
    networks = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
    checkpoint.save(folder, 7, {"config": config.to_dict(), "step": 7, **networks}, keep=1)
    return folder


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_each_tile_is_what_the_network_makes_of_it_alone(run):
    """Two tiles of 64 in a row of 112 have 16 columns in common, over which one gives way to the other."""
    image, generator = picture(64, 112), fastpix2pix.load(run).generator
    buffers = dict(generator.named_buffers())
    plain = []
    for left in (0, 48):
        fresh = {name: buffer.clone() for name, buffer in buffers.items()} | {"rng": torch.tensor([0, 0])}
        with torch.no_grad():
            plain.append(functional_call(generator, fresh, (image[None, :, :, left : left + 64],))[0])
    tiled = fastpix2pix.load(run, tile=64)(image)
    assert torch.allclose(tiled[..., :48], plain[0][..., :48], rtol=0, atol=1e-6)
    assert torch.allclose(tiled[..., 64:], plain[1][..., 16:], rtol=0, atol=1e-6)
    share = (torch.arange(16) + 0.5) / 16
    between = plain[0][..., 48:] * (1 - share) + plain[1][..., :16] * share
    assert (plain[0][..., 48:] - plain[1][..., :16]).abs().max() > 0.1
    assert torch.allclose(tiled[..., 48:64], between, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (7, 33)])
def test_image_that_fits_a_tile_is_translated_whole(run, size):
    image = picture(*size)
    assert torch.equal(fastpix2pix.load(run, tile=64)(image), fastpix2pix.load(run)(image))


@pytest.mark.parametrize("size", [(100, 64), (70, 20), (129, 65)])
def test_result_has_the_size_of_the_image(run, size):
    generated = fastpix2pix.load(run, tile=64)(picture(*size))
    assert generated.shape == (3, *size) and generated.isfinite().all() and generated.std() > 0.01


@pytest.mark.parametrize("tile", [0, -32, 16, 48])
def test_tile_that_does_not_fit_the_network_is_refused(run, tile):
    with pytest.raises(UserError, match=f"--tile {tile}: this network takes multiples of 32"):
        fastpix2pix.load(run, tile=tile)


def test_tiles_are_for_what_the_memory_does_not_hold(run, monkeypatch):
    needed = translator.BYTES_PER_PIXEL_AND_WIDTH * 4 * 64 * 64
    monkeypatch.setattr(translator, "free_memory", lambda _device: (needed, "this machine"))
    image = picture(64, 96)
    with pytest.raises(UserError, match=r"translate it in tiles \(--tile\)"):
        fastpix2pix.load(run)(image)
    assert fastpix2pix.load(run, tile=64)(image).shape == image.shape


def test_command(run, tmp_path, capsys):
    pixels = ((picture(70, 100).permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    arguments = ["--run", str(run), "--input", str(tmp_path / "image.png"), "--output", str(tmp_path / "out")]
    translate.main([*arguments, "--tile", "64"])
    assert "in tiles of 64x64, each normalised by its own statistics" in capsys.readouterr().out
    generated = np.asarray(Image.open(tmp_path / "out" / "generated" / "image.png"))
    assert np.array_equal(generated, fastpix2pix.load(run, tile=64)(pixels))
    with pytest.raises(SystemExit) as stop:
        translate.main([*arguments, "--tile", "50"])
    assert stop.value.code == 2 and "--tile 50: this network" in error_line(capsys.readouterr().err)

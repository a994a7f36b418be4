"""The film of a run's samples: its frames are the samples' pixels, its first one the untrained network's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tiny import tiny_config
from tiny_run import error_line

from fastpix2pix import timelapse
from fastpix2pix.models import build_networks

SIDE, CAPTION = 32, timelapse.CAPTION
STEPS = (10, 20, 30)


def grid(step: int) -> np.ndarray:
    """Two pairs in flat colours that GIF keeps; the generated images hang on the step."""
    columns = [[(0, 0, 222), (0, 48, 255)], [(255, 0, 0), (174, 0, 0)], [(step, 90, 0), (0, step, 90)]]
    blocks = np.array(columns, np.uint8).transpose(1, 0, 2)
    return blocks.repeat(SIDE, 0).repeat(SIDE, 1)


@pytest.fixture
def run(tmp_path):
    """A run of a tiny network with three grids, and a fourth that is being written."""
    config = tiny_config(name="run", checkpoints_dir=tmp_path, seed=5)
    folder = config.run_folder
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    for step in STEPS:
        Image.fromarray(grid(step)).save(folder / "samples" / f"step_{step:08d}.png")
    (folder / "samples" / "step_00000040.png").write_bytes(b"half a picture")
    return folder


def untrained(seed: int = 5) -> np.ndarray:
    """What the network of that seed makes of both inputs before its first step, one below the other."""
    generator = build_networks(tiny_config(seed=seed).network_options())[0]
    images = []
    for top in (0, SIDE):
        source = torch.from_numpy(grid(10)[top : top + SIDE, :SIDE].copy()).float() / 127.5 - 1
        with torch.no_grad():
            generator.rng.copy_(torch.tensor([seed, 0]))
            images.append(generator(source.permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy())
    return np.concatenate(images)


def films(path, *flags: str) -> list[tuple[np.ndarray, int]]:
    """The frames of a film without their caption, and how many milliseconds each stands."""
    timelapse.main(["--run", str(path), *flags])
    with Image.open(flags[flags.index("--output") + 1]) as film:
        assert film.info["loop"] == 0
        return [
            (np.asarray(one.convert("RGB"))[CAPTION:], one.info["duration"])
            for one in ImageSequence.Iterator(film)
        ]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".apng"])
def test_frames_are_the_samples(run, tmp_path, capsys, suffix):
    output = tmp_path / f"film{suffix}"
    frames = films(run, "--output", str(output), "--seconds", "8", "--size", str(SIDE))
    assert "4 frames, steps 0 to 30, 8 s" in capsys.readouterr().out
    assert [milliseconds for _, milliseconds in frames] == [2000] * 4
    for step, (pixels, _) in zip(STEPS, frames[1:], strict=True):
        pairs = grid(step).reshape(2, SIDE, 3, SIDE, 3)  # pair, y, which picture, x, colour
        expected = pairs[:, :, [0, 2, 1]].transpose(2, 1, 0, 3, 4).reshape(3 * SIDE, 2 * SIDE, 3)
        assert np.abs(pixels.astype(int) - expected).max() <= (6 if suffix == ".gif" else 0)


def test_first_frame_is_the_untrained_network(run, tmp_path):
    (first, _), *_ = films(run, "--output", str(tmp_path / "film.png"), "--size", str(SIDE))
    generated = np.concatenate(np.split(first[SIDE : 2 * SIDE], 2, axis=1))
    expected = (untrained() + 1) * 127.5
    assert expected.std() > 1 and np.abs(expected - (untrained(6) + 1) * 127.5).max() > 3
    assert np.abs(generated - expected).max() <= 0.51


def test_strip_has_the_steps_side_by_side(run, tmp_path):
    output = tmp_path / "strip.png"
    flags = ["--strip", "0", "30", "10", "--size", str(SIDE), "--output", str(output)]
    timelapse.main(["--run", str(run), *flags])
    lines = np.asarray(Image.open(output))[CAPTION:]
    source, first, late, early, target = np.split(lines, 5, axis=1)
    assert np.array_equal(source, grid(10)[:, :SIDE])
    assert np.abs(first - (untrained() + 1) * 127.5).max() <= 0.51
    assert np.array_equal(late, grid(30)[:, 2 * SIDE :]) and np.array_equal(early, grid(10)[:, 2 * SIDE :])
    assert np.array_equal(target, grid(10)[:, SIDE : 2 * SIDE])


def test_run_that_began_with_trained_weights_has_no_step_0(run, tmp_path, capsys):
    request = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(request | {"init_from": "other_run"}))
    frames = films(run, "--output", str(tmp_path / "film.png"), "--size", str(SIDE))
    assert len(frames) == 3 and "3 frames, steps 10 to 30" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        timelapse.main(["--run", str(run), "--output", str(tmp_path / "s.png"), "--strip", "0", "10"])
    assert "--strip 0: the run began with trained weights" in error_line(capsys.readouterr().err)


def test_long_run_is_thinned_more_towards_its_end(run, monkeypatch):
    monkeypatch.setattr(timelapse, "FRAMES", 6)
    config = timelapse.TimelapseConfig(run=run, output=run / "film.gif")
    grids = dict.fromkeys(range(100, 10_100, 100), run)
    assert [*timelapse._chosen(grids, config)] == [100, 700, 2600, 5700, 10000]


WRONG = {
    "--output film.mp4": "is the name of no film; let it end in .gif",
    "--output film.gif --size 4": "--size, --rows or --seconds: too small",
    "--output strip.png --strip 10 25": "--strip 25: the run drew no samples then; nearest is 20",
    "--output absent/film.gif": "can't be written (No such file or directory)",
    "--output film.gif --run absent": "has no samples/step_*.png",
}


@pytest.mark.parametrize("flags", WRONG)
def test_mistake_is_one_line(run, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        timelapse.main(["--run", str(run), *flags.split()])
    assert stop.value.code == 2 and WRONG[flags] in error_line(capsys.readouterr().err)

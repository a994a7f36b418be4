"""Checkpoints: atomic under kill, exact under resume, one clear line for a spoiled file."""

import multiprocessing
import os
import random
import time

import pytest
import torch

from fastpix2pix import checkpoint
from fastpix2pix.errors import UserError

STATE = {"config": {}, "step": 0, "generator": {"w": torch.arange(4.0)}, "discriminator": {}}


def write_forever(run, ready):
    """Each checkpoint holds its own step 500,000 times over, so that a torn one shows."""
    newest = checkpoint.latest(run)
    step = checkpoint.load(newest)["step"] if newest else 0
    ready.set()
    while True:
        step += 1
        weights = {"w": torch.full((500_000,), float(step))}
        state = {"config": {}, "step": step, "generator": weights, "discriminator": {}}
        checkpoint.save(run, step, state, keep=2)


def test_kill_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastpix2pix.checkpoint"])
    moments = random.Random(3)
    seen = 0
    for _ in range(20):
        ready = context.Event()
        writer = context.Process(target=write_forever, args=(tmp_path, ready))
        writer.start()
        assert ready.wait(60)
        time.sleep(moments.uniform(0.0, 0.1))
        writer.kill()
        writer.join()
        newest = checkpoint.latest(tmp_path)
        if newest is None:
            continue
        state = checkpoint.load(newest)
        assert state["step"] >= seen
        assert torch.all(state["generator"]["w"] == state["step"])
        seen = state["step"]
    assert seen > 20


def test_keeps_the_newest_by_number(tmp_path):
    for step in (5, 100, 20, 3000):
        checkpoint.save(tmp_path, step, {**STATE, "step": step}, keep=2)
    assert [checkpoint.load(path)["step"] for path in checkpoint._by_step(tmp_path)] == [100, 3000]
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 3000


def test_an_abandoned_partial_file_is_no_checkpoint_and_goes_away(tmp_path):
    checkpoint.save(tmp_path, 1, STATE, keep=2)
    partial = tmp_path / "checkpoints" / "step_00000002.partial"
    partial.write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step_00000001.pt"
    checkpoint.save(tmp_path, 2, STATE, keep=2)
    assert not partial.exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path, kept):
    path = checkpoint.save(tmp_path, 7, STATE, keep=1)
    size = path.stat().st_size
    os.truncate(path, kept if isinstance(kept, int) else int(size * kept))
    with pytest.raises(UserError, match=r"step_00000007.pt: not a readable checkpoint.*delete it"):
        checkpoint.load(path)


def test_another_program_s_file_is_refused(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UserError, match="net.pt: not a fastpix2pix training checkpoint"):
        checkpoint.load(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    path = tmp_path / "step_00000001.pt"
    torch.save({**STATE, "extra": Payload()}, path)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists()


def test_a_folder_that_can_t_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"step_00000001.pt: checkpoint not written.*--checkpoints_dir"):
        checkpoint.save(tmp_path, 1, STATE, keep=1)

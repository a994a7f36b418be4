"""Checkpoints: atomic under kill, exact under resume, one clear line for a spoiled file."""

import multiprocessing
import os
import random
import time
import zipfile

import pytest
import torch
from tiny import step_of, tiny_config

from fastpix2pix import checkpoint
from fastpix2pix.errors import UserError
from fastpix2pix.training.resume import Position, restore, training_state

STATE = {"config": {}, "step": 0, "generator": {"w": torch.arange(4.0)}, "discriminator": {}}


def write_forever(run, seconds):
    """Each checkpoint holds its own step 500,000 times over, so that a torn one shows. How long the first one
    took goes to ``seconds``."""
    newest = checkpoint.latest(run)
    step = checkpoint.load(newest)["step"] if newest else 0
    while True:
        step += 1
        weights = {"w": torch.full((500_000,), float(step))}
        state = {"config": {}, "step": step, "generator": weights, "discriminator": {}}
        began = time.perf_counter()
        checkpoint.save(run, step, state, keep=2)
        if seconds is not None:
            seconds.send(time.perf_counter() - began)
            seconds = None


def test_kill_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    """At any moment of the three checkpoints after a writer's first, however fast this machine writes now."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastpix2pix.checkpoint"])
    moments = random.Random(3)
    seen = 0
    for _ in range(20):
        seconds, theirs = context.Pipe(duplex=False)
        writer = context.Process(target=write_forever, args=(tmp_path, theirs))
        writer.start()
        assert seconds.poll(60)
        time.sleep(moments.uniform(0.0, 3.0) * seconds.recv())
        writer.kill()
        writer.join()
        state = checkpoint.load(checkpoint.latest(tmp_path))
        assert state["step"] > seen
        assert torch.all(state["generator"]["w"] == state["step"])
        seen = state["step"]


def test_keeps_the_newest_by_number(tmp_path):
    for step in (5, 100, 20, 3000):
        checkpoint.save(tmp_path, step, {**STATE, "step": step}, keep=2)
    assert [checkpoint.load(path)["step"] for path in checkpoint._by_step(tmp_path)] == [100, 3000]
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 3000


def test_an_abandoned_partial_file_is_no_checkpoint_and_goes_away(tmp_path):
    checkpoint.save(tmp_path, 1, STATE, keep=2)
    partial = tmp_path / "checkpoints" / "step_00000003.partial"
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


def test_code_in_a_checkpoint_is_not_run_and_called_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    path = tmp_path / "step_00000001.pt"
    torch.save({**STATE, "extra": Payload()}, path)
    with pytest.raises(UserError, match="step_00000001.pt: refused: it would execute code; ") as refusal:
        checkpoint.load(path)
    assert "delete" not in str(refusal.value)
    assert not (tmp_path / "pwned").exists()


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path):
    """600 single flips: a third lies in tensors and pickle, the rest in headers and padding."""
    state = {**STATE, "generator": {"w": torch.arange(64.0)}}
    path = checkpoint.save(tmp_path, 1, state, keep=1)
    whole, bits = path.read_bytes(), random.Random(5)
    noticed = 0
    for _ in range(600):
        at = bits.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            assert "it is damaged" in str(error), at
            noticed += 1
        else:
            assert torch.equal(loaded["generator"]["w"], state["generator"]["w"]), at
            assert loaded["step"] == state["step"] and loaded["config"] == {}, at
    assert noticed > 200


@pytest.mark.parametrize(
    "content", [b".", b"(lp0\n.", b"\x80\x02}q\x00(X\x01\x00\x00\x00aK", b"\x80\x02K\x01s."]
)
def test_a_damaged_pickle_under_right_checksums_is_one_line(tmp_path, content):
    path = tmp_path / "step_00000001.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", data)
    with pytest.raises(UserError, match=r"step_00000001.pt: not a"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "not enough memory to load its"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "not enough memory"),
        (PermissionError(13, "Permission denied"), "can't be read \\(Permission denied\\)"),
        (OSError(5, "Input/output error"), "can't be read \\(Input/output error\\)"),
    ],
)
def test_what_is_no_damage_never_says_delete(tmp_path, monkeypatch, error, line):
    def fail(*_, **__):
        raise error

    path = checkpoint.save(tmp_path, 1, STATE, keep=1)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match=f"step_00000001.pt: {line}") as refusal:
        checkpoint.load(path)
    assert "delete" not in str(refusal.value)


def without(state, *keys):
    """A copy of the nested ``state`` that lacks the entry at ``keys``."""
    first, *rest = keys
    return {k: without(v, *rest) if k == first else v for k, v in state.items() if rest or k != first}


def test_restore_takes_only_the_entries_types_and_shapes_of_this_training(tmp_path):
    config = tiny_config(ngf=4, ndf=4)
    step = step_of(config)
    state = training_state(step, config, {}, Position(7, 1, 2))
    assert restore(step, state, tmp_path / "s.pt") == Position(7, 1, 2)
    moment = state["gen_optimizer"]["state"][0]["exp_avg"]
    name = next(iter(state["generator"]))
    spoiled = {
        "dropout_rng is missing": without(state, "dropout_rng"),
        "data.epoch is missing": without(state, "data", "epoch"),
        f"generator.{name} is missing": without(state, "generator", name),
        "gen_optimizer.state.0.exp_avg is missing": without(state, "gen_optimizer", "state", 0, "exp_avg"),
        "data.position is str, not int": {**state, "data": {"epoch": 1, "position": "2"}},
        "data.position is -2": {**state, "data": {"epoch": 1, "position": -2}},
        "step is bool, not int": {**state, "step": True},
        "disc_optimizer.param_groups is dict, not list": {
            **state, "disc_optimizer": {**state["disc_optimizer"], "param_groups": {}}
        },
        "dropout_rng has shape (1,), not (2,)": {**state, "dropout_rng": torch.zeros(1, dtype=torch.int64)},
        "dropout_rng is torch.float32, not torch.int64": {**state, "dropout_rng": torch.zeros(2)},
        f"gen_optimizer.state.0.exp_avg has shape (3,), not {tuple(moment.shape)}": {
            **state,
            "gen_optimizer": {
                **state["gen_optimizer"],
                "state": {
                    **state["gen_optimizer"]["state"],
                    0: {**state["gen_optimizer"]["state"][0], "exp_avg": torch.zeros(3)},
                },
            },
        },
    }  # fmt: skip
    for line, bad in spoiled.items():
        with pytest.raises(UserError) as refusal:
            restore(step, bad, tmp_path / "s.pt")
        assert f"s.pt: {line}: not a checkpoint of this version" in str(refusal.value)


def test_a_folder_that_can_t_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"step_00000001.pt: checkpoint not written.*--checkpoints_dir"):
        checkpoint.save(tmp_path, 1, STATE, keep=1)

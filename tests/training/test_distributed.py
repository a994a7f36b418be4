"""Several ranks that train one model: forked processes over gloo, against DistributedDataParallel."""

import ast
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import plain_networks
import pytest
import torch
from fake_graph import FakeGraphBackend, static_tensors
from ranks import Ranks, in_ranks, kill_those_left
from tiny import random_images, tiny_config
from tiny_run import SMALL, steps_saved, write_pairs
from torch.nn.parallel import DistributedDataParallel

import fastpix2pix
from fastpix2pix import checkpoint, train
from fastpix2pix.config import TrainConfig
from fastpix2pix.data import LoaderOptions, loader
from fastpix2pix.data.plan import epoch_plan, global_batches
from fastpix2pix.errors import UserError
from fastpix2pix.kernels import language, launch
from fastpix2pix.models import build_networks
from fastpix2pix.training import distributed
from fastpix2pix.training.distributed import Exchange, RankGone, Unconnected
from fastpix2pix.training.graph import CapturedStep
from fastpix2pix.training.precision import WORKING_TYPES
from fastpix2pix.training.resume import Position, restore, training_state
from fastpix2pix.training.step import TrainStep

PRESETS = ["tutorial", "junyanz"]
SOURCES = Path(fastpix2pix.__file__).parent


@pytest.fixture(autouse=True)
def one_thread():
    """As each rank has; forked processes with threads of OpenMP would wait for those that were not forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Of a test that failed before it waited for them."""
    yield
    kill_those_left()
    while _agents:
        agent = _agents.pop()
        for process in [*workers(agent), agent.pid] if agent.poll() is None else []:
            os.kill(process, signal.SIGKILL)
        agent.wait(10)


_agents: list[subprocess.Popen] = []


def networks(config: TrainConfig, dtype: torch.dtype):
    """Networks whose norms and biases are away from their initial values."""
    random = torch.Generator().manual_seed(5)
    pair = [network.to(dtype) for network in build_networks(config.network_options(), "cpu")]
    with torch.no_grad():
        for network in pair:
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn(tensor.shape, generator=random) * 0.05)
    return pair


def images_of(config: TrainConfig, rank: int, steps: int, dtype: torch.dtype):
    """A rank's slice of each global batch."""
    return [[x.to(dtype) for x in pair] for pair in random_images(steps, config, seed=300 + rank)]


def weights(train_step: TrainStep) -> list[torch.Tensor]:
    tensors = [*train_step.generator.parameters(), *train_step.discriminator.parameters()]
    return [tensor.detach().clone() for tensor in tensors]


def running(train_step: TrainStep) -> list[torch.Tensor]:
    some = [*train_step.generator.buffers(), *train_step.discriminator.buffers()]
    return [buffer.clone() for buffer in some if buffer.is_floating_point()]


def trained(ranks, config: TrainConfig, dtype: torch.dtype, steps: int):
    """(weights, losses of each step, running statistics that a checkpoint would hold) of a rank."""
    train_step = TrainStep(*networks(config, dtype), config.step_options(), ranks.exchange)
    losses = [
        torch.stack(train_step(*pair)).clone()
        for pair in images_of(config, ranks.rank, steps, train_type(config, dtype))
    ]
    train_step.average_statistics()
    return weights(train_step), losses, running(train_step)


def train_type(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    return dtype if config.precision is None else WORKING_TYPES[config.precision]


def trained_plainly(ranks, config: TrainConfig, dtype: torch.dtype, steps: int):
    """The same by plain PyTorch: the reference's networks in DistributedDataParallel."""
    plain, ours = plain_networks.PRESETS[config.preset](config.ngf, 5, dtype), networks(config, dtype)
    theirs = {id(mine): their for mine, their in plain.copy_weights(*ours)}
    for name in ("generator", "discriminator"):
        setattr(plain, name, DistributedDataParallel(getattr(plain, name), broadcast_buffers=False))
    plain_networks._gradients = averaged_gradients
    losses = [plain.step(*pair)[0] for pair in images_of(config, ranks.rank, steps, dtype)]
    parameters = [theirs[id(p)].detach() for network in ours for p in network.parameters()]
    # A buffer's tensor is made anew at every access of state_dict, but its storage is the module's.
    buffers = [theirs[id(b)] for network in ours for b in network.buffers() if b.is_floating_point()]
    return parameters, losses, buffers


def averaged_gradients(loss: torch.Tensor, network: DistributedDataParallel):
    """By ``backward``, to whose accumulation of gradients DistributedDataParallel hooks its exchange."""
    parameters = list(network.parameters())
    network.zero_grad(set_to_none=False)  # its views of what it exchanges
    loss.backward(inputs=parameters, retain_graph=True)
    return {p: p.grad for p in parameters}


def trained_twice(ranks, *how):
    return trained_plainly(ranks, *how), trained(ranks, *how)


def check_against_plain(preset, dtype, size, tolerance, tmp_path, steps=10):
    # 64 pixels leave 2x2 of the bottleneck: a norm over two values amplifies rounding, and with 32 pixels
    # plain PyTorch in float32 is itself 7e-4 away from its float64 after these steps. So it is by 2e-4 with
    # other images, where rounding takes one value to the other side of a ReLU or of the L1 loss.
    config = tiny_config(
        preset=preset, no_dropout=True, batch_size=2, ngf=4, ndf=4, precision=None, crop_size=64, load_size=68
    )
    importlib.import_module("torch._dynamo")  # as DistributedDataParallel does: once, not in every rank
    plain, answers = zip(*in_ranks(size, trained_twice, config, dtype, steps, folder=tmp_path), strict=True)
    for other in answers[1:]:
        for a, b in zip(answers[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    weights, losses, statistics = answers[0]
    expected, _, _ = plain[0]
    _, of_ranks, buffers = zip(*plain, strict=True)
    expected_losses = torch.stack([torch.stack(some) for some in of_ranks]).mean(0)
    expected_statistics = [torch.stack(some).mean(0) for some in zip(*buffers, strict=True)]
    for a, b in zip([*weights, *statistics], [*expected, *expected_statistics], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.stack(losses).double(), expected_losses.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_two_ranks_equal_distributed_data_parallel(preset, tmp_path):
    """Weights equal in all ranks, bit for bit, and those of the mean gradient of statistics per slice.
    In float64, in which no processor's rounding takes a value to the other side of a ReLU."""
    check_against_plain(preset, torch.float64, 2, 1e-9, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_ranks_equal_distributed_data_parallel(preset, size, dtype, tolerance, tmp_path):
    check_against_plain(preset, dtype, size, tolerance, tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_stay_equal_in_all_ranks(precision, tmp_path):
    """Dropout on; weights near those of a rank that trains alone on nothing but its own slice, not equal."""
    preset = {"bf16": "junyanz", "fp16": "tutorial"}[precision]
    answers = in_ranks(2, sixteen_bits, preset, precision, 4, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(answers[0][0], answers[1][0], strict=True))
    assert answers[0][1] == answers[1][1]  # losses
    assert not torch.equal(answers[0][2], answers[1][2])  # dropout's seeds


def sixteen_bits(ranks, preset, precision, steps):
    config = tiny_config(preset=preset, precision=precision, ngf=4, ndf=4)
    train_step = TrainStep(
        *build_networks(config.network_options(), "cpu"), config.step_options(), ranks.exchange
    )
    dtype = WORKING_TYPES[precision]
    losses = [torch.stack(train_step(*pair)).tolist() for pair in images_of(config, ranks.rank, steps, dtype)]
    return weights(train_step), losses, train_step.generator.rng.clone()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_kernels_keep_bf16_equal_in_all_ranks(preset, tmp_path, triton_device):
    """With masters in two pieces, as on a GPU."""
    answers = in_ranks(2, sixteen_bits, preset, "bf16", 2, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(answers[0][0], answers[1][0], strict=True))
    assert answers[0][1] == answers[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ten_steps_stay_equal_in_all_ranks(preset, precision, size, tmp_path):
    answers = in_ranks(size, sixteen_bits, preset, precision, 10, folder=tmp_path)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0][0], other[0], strict=True))
        assert answers[0][1] == other[1]


def test_an_overflow_in_one_rank_is_one_in_all(tmp_path):
    """The discriminator's gradients of rank 1 are infinite: all skip its update, and halve the scale."""
    for taken, scale, moved in in_ranks(2, overflowing, folder=tmp_path):
        assert taken == {"gen": 1, "disc": 0} and scale == 2.0**7
        assert moved == {"gen": True, "disc": False}


def overflowing(ranks):
    config = tiny_config(precision="fp16", ngf=4, ndf=4)
    train_step = TrainStep(
        *build_networks(config.network_options(), "cpu"), config.step_options(), ranks.exchange
    )
    train_step.loss_scale.scale.fill_(2.0**8)
    before = [p.detach().clone() for p in train_step.discriminator.parameters()]
    gen_before = [p.detach().clone() for p in train_step.generator.parameters()]
    if ranks.rank == 1:
        (bias,) = [p for name, p in train_step.discriminator.named_parameters() if name == "last.bias"]
        bias.register_hook(lambda grad: grad.fill_(torch.inf))
    train_step(*images_of(config, ranks.rank, 1, torch.float16)[0])
    taken = {
        "gen": int(train_step.gen_optimizer._clocks[0].step),
        "disc": int(train_step.disc_optimizer._clocks[0].step),
    }
    moved = {
        "disc": any(
            not torch.equal(a, b) for a, b in zip(before, train_step.discriminator.parameters(), strict=True)
        ),
        "gen": any(
            not torch.equal(a, b) for a, b in zip(gen_before, train_step.generator.parameters(), strict=True)
        ),
    }
    return taken, float(train_step.loss_scale.scale), moved


# ------------------------------------------------------------------------------------- what is exchanged


class Counting(Exchange):
    """Counts what this rank sends: all but its slice of what is scattered, and its slice to all others."""

    sent = 0

    def scatter_sum(self, whole, share):
        self.sent += (whole.numel() - share.numel()) * whole.element_size()
        return super().scatter_sum(whole, share)

    def gather(self, whole, share):
        self.sent += share.numel() * (self.size - 1) * share.element_size()
        return super().gather(whole, share)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_of_a_step(preset, size, tmp_path):
    """2 x weights x type x (N - 1) / N are sent; Adam's state is divided by N. Alignment adds 2 %."""
    answers = in_ranks(size, counted, preset, folder=tmp_path)
    for sent, weight_bytes, numbers, state in answers:
        assert 1 <= sent / (2 * weight_bytes * (size - 1) / size) < 1.02
        assert 1 <= state / (2 * numbers * 4 / size) < 1.02


def counted(ranks, preset):
    config = tiny_config(preset=preset, ngf=16, ndf=16, precision="fp32")
    exchange = Counting()
    train_step = TrainStep(*build_networks(config.network_options(), "cpu"), config.step_options(), exchange)
    exchange.sent = 0
    train_step(*images_of(config, ranks.rank, 1, torch.float32)[0])
    parameters = weights(train_step)
    moments = [
        state[name]
        for optimizer in (train_step.gen_optimizer, train_step.disc_optimizer)
        for state in optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return (
        exchange.sent,
        sum(p.numel() * p.element_size() for p in parameters),
        sum(p.numel() for p in parameters),
        sum(m.numel() * m.element_size() for m in moments),
    )


class Noting(Unconnected):
    """Notes what is sent, and when it is waited for."""

    def __init__(self):
        super().__init__(2)
        self.notes = []

    def _sent(self, what: str):
        self.notes.append(what)
        return lambda: self.notes.append(f"wait for {what}")

    def scatter_sum(self, whole, share):
        return self._sent(f"{whole.numel()} gradients")

    def gather(self, whole, share):
        return self._sent(f"{whole.numel()} weights")


def test_one_network_s_exchange_overlaps_the_other_s_update(monkeypatch):
    """The generator's gradients travel while the discriminator is updated, and its weights afterwards."""
    config, exchange = tiny_config(preset="tutorial", ngf=4, ndf=4, precision="fp32"), Noting()
    train_step = TrainStep(*build_networks(config.network_options(), "cpu"), config.step_options(), exchange)
    sizes = {}
    for name in ("gen", "disc"):
        optimizer = getattr(train_step, f"{name}_optimizer")
        sizes[2 * next(iter(optimizer.param_groups[0]["params"])).numel()] = name
        update = optimizer.step_share
        monkeypatch.setattr(
            optimizer, "step_share", lambda n=name, u=update: (exchange.notes.append(f"update {n}"), u())
        )
    exchange.notes.clear()  # of the initial weights
    train_step(*images_of(config, 0, 1, torch.float32)[0])
    assert [re.sub(r"\d+", lambda found: sizes[int(found[0])], note) for note in exchange.notes] == [
        "disc gradients",
        "gen gradients",
        "wait for disc gradients",
        "update disc",
        "disc weights",
        "wait for gen gradients",
        "update gen",
        "gen weights",
        "wait for gen weights",
        "wait for disc weights",
    ]


@pytest.mark.parametrize(("precision", "split"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_a_checkpoint_is_the_same_for_any_number_of_ranks(precision, split, tmp_path):
    """From one process to two and back: every tensor as it was, and no tensor twice in the file.

    split: the ranks keep masters as on a GPU, in two pieces.
    """
    if split and not language.INTERPRETING:
        pytest.skip("CPU tensors do not take the Triton path here")
    config = tiny_config(precision=precision, ngf=4, ndf=4)
    alone = TrainStep(*build_networks(config.network_options(), "cpu"), config.step_options())
    for pair in images_of(config, 0, 2, WORKING_TYPES[precision]):
        alone(*pair)
    state = training_state(alone, config, {}, Position(2, 0, 2))
    torch.save(state, tmp_path / "alone.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "kernels_on_cpu", split)
        in_ranks(2, restored, config, tmp_path, split, folder=tmp_path)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert_same_state(state, again)
    assert (tmp_path / "again.pt").stat().st_size < 1.01 * (tmp_path / "alone.pt").stat().st_size
    assert restore(alone, again, tmp_path) == Position(2, 0, 2)


def restored(ranks, config, folder, split):
    config = tiny_config(precision=config.precision, ngf=4, ndf=4, seed=77)  # other weights than those saved
    train_step = TrainStep(
        *build_networks(config.network_options(), "cpu"), config.step_options(), ranks.exchange
    )
    (share, *_) = train_step.gen_optimizer.state.values()
    assert ("remainder" in share) == split
    at = restore(train_step, torch.load(folder / "alone.pt", weights_only=True), folder)
    state = training_state(train_step, config, {}, at)
    if ranks.first:
        torch.save(state, folder / "again.pt")


def assert_same_state(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"config"}:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride(), where
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}.{i}")
    else:
        assert a == b, where


# --------------------------------------------------------------------------------- captured by segments


def static(train_step: TrainStep) -> list[torch.Tensor]:
    buffers = [*train_step.gen_optimizer.buffers(), *train_step.disc_optimizer.buffers()]
    return [*static_tensors(train_step), *buffers, train_step._exchanged]


@pytest.mark.parametrize(("preset", "precision"), [("tutorial", "fp16"), ("junyanz", "bf16")])
def test_replays_of_segments_equal_eager_steps(preset, precision, tmp_path):
    (segments, same), _ = in_ranks(2, replayed, preset, precision, folder=tmp_path)
    # Gradients, [infinities,] weights of each network, losses: an exchange each, and a segment more.
    assert segments == {"tutorial": 6, "junyanz": 6}[preset] and same


def replayed(ranks, preset, precision):
    config = tiny_config(preset=preset, precision=precision, ngf=4, ndf=4)

    def fresh():
        built = build_networks(config.network_options(), "cpu")
        return TrainStep(*built, config.step_options(), ranks.exchange)

    eager, captured = fresh(), fresh()
    for one in (eager, captured):
        if one.loss_scale is not None:
            one.loss_scale.scale.fill_(2.0**8)
    run = CapturedStep(captured, FakeGraphBackend(partial(static, captured)))
    same = True
    for i, pair in enumerate(images_of(config, ranks.rank, 3, WORKING_TYPES[precision])):
        for one in (eager, captured):
            one.set_lr(1e-4 / (1 + i))
        same &= torch.equal(torch.stack(eager(*pair)), torch.stack(run(*pair)))
        same &= all(torch.equal(a, b) for a, b in zip(eager.state(), captured.state(), strict=True))
    assert run.failure is None, run.failure
    return len(run._backend.tapes), same


def test_a_capture_that_fails_in_one_rank_is_given_up_by_all(tmp_path):
    """Else the one would not take the exchanges with which the others warm up for the next shape."""
    failures, weights_of = zip(*in_ranks(2, captures_in_rank_0_alone, folder=tmp_path), strict=True)
    assert failures == ("it failed in another process", "no capture here")
    assert all(torch.equal(a, b) for a, b in zip(*weights_of, strict=True))


def captures_in_rank_0_alone(ranks):
    config = tiny_config(ngf=4, ndf=4, precision="fp32", batch_size=2)
    train_step = TrainStep(
        *build_networks(config.network_options(), "cpu"), config.step_options(), ranks.exchange
    )
    backend = FakeGraphBackend(partial(static, train_step))
    if ranks.rank == 1:

        def capture(segments):
            raise RuntimeError("no capture here")

        backend.capture = capture
    run = CapturedStep(train_step, backend)
    with pytest.warns(RuntimeWarning, match="could not be captured"):
        for source, target in images_of(config, ranks.rank, 2, torch.float32):
            run(source, target)
            run(source[:1], target[:1])
    return run.failure, weights(train_step)


def test_a_collective_within_a_segment_shows(tmp_path):
    assert in_ranks(2, captures_a_collective, folder=tmp_path) == [True, True]


def captures_a_collective(ranks):
    config = tiny_config(ngf=4, ndf=4, precision="fp32")
    train_step = TrainStep(
        *build_networks(config.network_options(), "cpu"), config.step_options(), ranks.exchange
    )
    backend = FakeGraphBackend(partial(static, train_step))
    images = images_of(config, ranks.rank, 1, torch.float32)[0]

    def in_one_segment(source, target):
        train_step.body(source, target)
        yield from ()

    try:
        backend.capture(partial(in_one_segment, *images))
    except RankGone as refused:  # as every error of a collective
        return "a collective is captured" in str(refused)
    return False


def test_no_collective_on_a_stream_that_is_captured(monkeypatch, tmp_path):
    """On a GPU the exchange itself refuses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    exchange = Exchange.__new__(Exchange)
    one = torch.zeros(2)
    for call in (
        lambda: exchange.scatter_sum(one, one[:1]),
        lambda: exchange.gather(one, one[:1]),
        lambda: exchange.sum_(one),
        lambda: exchange.max_(one),
        lambda: exchange.take_first(one),
    ):
        with pytest.raises(RuntimeError, match="captured"):
            call()


def test_graphs_are_gone_before_the_group(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(train.PreparedStep, "release", lambda self: order.append("graphs"))
    destroy = distributed.dist.destroy_process_group
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: order.append("group") or destroy())
    write_pairs(tmp_path / "pairs", 4)

    def run(rank):
        train.main(flags(tmp_path, "--steps", "1"))
        return order

    assert Ranks(2, run, folder=tmp_path).answers() == [["graphs", "group"]] * 2


def test_only_one_file_knows_torch_distributed():
    users = set()
    for path in [*SOURCES.rglob("*.py"), *(SOURCES.parent / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            if any(name.startswith("torch.distributed") for name in names):
                users.add(path.relative_to(SOURCES.parent).as_posix())
    assert users == {"fastpix2pix/training/distributed.py"}


# ------------------------------------------------------------------------------------------------ the data


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("count", [5, 7, 12, 23])
def test_ranks_share_an_epoch(count, batch_size, ranks):
    """Every sample at most once, in the plan's order, as many for each rank; few are left."""
    for position in range(count):
        batches = list(global_batches(count, position, batch_size, ranks))
        taken = [place for batch in batches for rank in range(ranks) for place in batch.of(rank)]
        assert taken == list(range(position, position + len(taken)))
        assert 0 <= count - position - len(taken) < ranks
        assert all(1 <= batch.share <= batch_size for batch in batches)
        assert all(batch.share == batch_size for batch in batches[:-1])
        ends = [batch.end for batch in batches]
        assert ends == [batch.start for batch in batches[1:]] + ([count] if batches else [])


def opened(folder, rank, ranks, **options):
    options = LoaderOptions(
        rank=rank, ranks=ranks, loader="portable", num_threads=1, load_size=32, crop_size=32, **options
    )
    return loader.open_loader(folder, options)


def test_ranks_load_their_slices_of_the_plan(tmp_path):
    """Three loaders, and the plan itself; 11 pairs, batches of 2, so that an epoch is 6 + 3 samples."""
    write_pairs(tmp_path, 11)
    streams = [opened(tmp_path, rank, 3, batch_size=2, seed=4) for rank in range(3)]
    assert [one.batches_per_epoch for one in streams] == [2, 2, 2]
    batches = [[next(stream) for _ in range(4)] for stream in (one.stream() for one in streams)]
    for one in streams:
        one.close()
    pairs = [pair.name for pair in streams[0].pairs]
    for epoch in (0, 1):
        order = [pairs[i] for i in epoch_plan(4, epoch, 11, load_size=32, crop_size=32).order]
        seen = [name for k in (0, 1) for rank in range(3) for name in batches[rank][2 * epoch + k].names]
        assert seen == order[:9]
    assert [[b[2:4] for b in some] for some in batches] == [[(0, 6), (1, 0), (1, 6), (2, 0)]] * 3


def test_fewer_pairs_than_ranks_are_refused(tmp_path):
    write_pairs(tmp_path, 2)
    with pytest.raises(UserError, match="2 pairs do not give each of 3 processes one"):
        opened(tmp_path, 0, 3)


def flags(folder: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        "--dataroot",
        str(folder / "pairs"),
        "--checkpoints_dir",
        str(folder),
        "--name",
        "run",
        *more,
    ]


def run_and_note(rank, argv):
    """(In a rank.) Train as the command does; the names of each step's samples."""
    seen = []
    stream = loader.Loader.stream

    def noting(self, *at):
        for batch in stream(self, *at):
            seen.append(batch.names)
            yield batch

    loader.Loader.stream = noting
    train.main(argv)
    return seen


def test_two_one_four_processes_see_the_samples_of_one(tmp_path):
    """6 samples in two ranks, 4 in one, 8 in four, 3 in one: those of a training that never stopped."""
    write_pairs(tmp_path / "pairs", 24)
    seen, total = [], 0
    for size, steps in ((2, 3), (1, 4), (4, 2), (1, 3)):
        total += steps
        more = ["--continue_train"] if seen else []
        argv = flags(tmp_path, "--steps", str(total), *more)
        of_ranks = Ranks(size, run_and_note, argv, folder=tmp_path).answers()
        for k in range(steps):
            seen += [name for one in of_ranks for name in one[k]]
        assert steps_saved(tmp_path / "run")[-1] == total
    names = [pair.name for pair in loader.find_pairs(tmp_path / "pairs", "train")]
    order = [names[i] for i in epoch_plan(0, 0, 24, load_size=32, crop_size=32).order]
    assert seen == order[:21]
    state = checkpoint.load(checkpoint.latest(tmp_path / "run"))
    assert state["data"] == {"epoch": 0, "position": 21} and state["step"] == 12


# ------------------------------------------------------------------------------- one voice, and how it ends


def endless(folder: Path, *more: str) -> list[str]:
    return flags(folder, "--steps", "1000000", "--cache", "0", "--save_latest_freq", "4", *more)


def started(size: int, folder: Path, *more: str, **options) -> Ranks:
    """A training that has saved a checkpoint."""
    write_pairs(folder / "pairs", 9)
    ranks = Ranks(size, lambda rank: train.main(endless(folder, *more)), folder=folder, **options)
    deadline = time.monotonic() + 120
    while not any((folder / "run" / "checkpoints").glob("step_*.pt")):
        assert time.monotonic() < deadline, ranks.said()
        time.sleep(0.05)
    return ranks


@pytest.mark.parametrize("to", [0, 1])
def test_a_stop_request_to_one_rank_stops_all_after_one_save(to, tmp_path):
    ranks = started(2, tmp_path)
    os.kill(ranks.processes[to], signal.SIGTERM)
    assert ranks.wait() == [128 + signal.SIGTERM] * 2
    out, err = ranks.said("out"), ranks.said()
    (at,) = re.findall(r"stopped at step (\d+); the run goes on with --continue_train", out[0])
    assert steps_saved(tmp_path / "run")[-1] == int(at)
    assert out[1] == "" and err[1].strip() == "" and "error" not in err[0]


def test_only_rank_0_speaks_and_writes_and_says_what_a_step_is(tmp_path):
    write_pairs(tmp_path / "pairs", 5)
    argv = flags(tmp_path, "--steps", "2", "--batch_size", "2", "--use_wandb")

    def work(rank):
        def wandb_run(*run):
            (tmp_path / f"wandb.{rank}").touch()
            return Mock()

        train.WandbRun = wandb_run
        train.main(argv)

    ranks = Ranks(2, work, folder=tmp_path)
    assert ranks.wait() == [0, 0]
    assert [path.name for path in tmp_path.glob("wandb.*")] == ["wandb.0"]
    assert len(list((tmp_path / "run" / "events").glob("events*"))) == 1
    rows = (tmp_path / "run" / "losses.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", "1", "2"]
    out, err = ranks.said("out"), ranks.said()
    assert "2 processes, one a CPU process (gloo): --batch_size 2 in each makes 4 pairs a step" in out[0]
    assert "done: 2 steps" in out[0] and out[1] == "" and err[1] == ""


def test_a_rank_that_is_killed_ends_the_others_with_one_line(tmp_path):
    ranks = started(2, tmp_path)
    os.kill(ranks.processes[1], signal.SIGKILL)
    began = time.monotonic()
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 30
    (line,) = [line for line in ranks.said()[0].splitlines() if "error" in line]
    assert "a process of this training is gone" in line and "--continue_train" in line
    assert steps_saved_in(tmp_path)  # whole


def test_a_rank_that_hangs_ends_the_others(tmp_path, monkeypatch):
    """Stopped, as by a machine that freezes: its connections stay open, and nothing comes."""
    monkeypatch.setattr(distributed, "SILENCE", 3.0)
    ranks = started(2, tmp_path)
    os.kill(ranks.processes[1], signal.SIGSTOP)
    assert ranks.wait_for(0) == 1
    assert "rank 1 has given no sign of life for 3 s" in ranks.said()[0]
    os.kill(ranks.processes[1], signal.SIGKILL)
    assert ranks.wait_for(1) == -signal.SIGKILL


def test_torchrun_s_restart_goes_on(tmp_path):
    """Without --continue_train: from the checkpoint where there is one, and anew where there is none. The
    store is the same, with what processes that are gone have written: one of them had come before the others.
    Each machine counts apart, rank 0's no restart at all."""
    write_pairs(tmp_path / "pairs", 4)
    store = None
    for restart, steps in enumerate(("1", "none", "3")):

        def work(rank, restart=restart, steps=steps):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(rank * restart)
            if steps == "none" and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            train.main(flags(tmp_path, "--steps", steps))

        run = Ranks(2, work, folder=tmp_path, store=store)
        if steps == "none":
            assert run.wait_for(0) == -signal.SIGKILL
            time.sleep(0.5)
            run.kill()
        else:
            assert run.wait() == [0, 0], run.said()
        store = run.store
    assert steps_saved(tmp_path / "run") == [1, 3]


def meets_a_damaged_file(rank, argv):
    """(In a rank.) Train as the command does, up to the fourth batch of rank 1."""
    stream = loader.Loader.stream

    def failing(self, *at):
        for k, batch in enumerate(stream(self, *at)):
            if k == 3 and rank == 1:
                raise UserError("3.png: damaged; replace it")
            yield batch

    loader.Loader.stream = failing
    train.main(argv)


def test_an_error_of_one_rank_saves_first_and_is_said_once(tmp_path):
    """A file that turns bad: only the rank that meets it knows, all save what was learnt, all end alike."""
    write_pairs(tmp_path / "pairs", 6)
    ranks = Ranks(2, meets_a_damaged_file, endless(tmp_path, "--save_latest_freq", "1000"), folder=tmp_path)
    assert ranks.wait() == [2, 2]
    said = "".join(ranks.said())
    assert said.count("error: 3.png: damaged; replace it") == 1 and said.count("error") == 1
    assert steps_saved(tmp_path / "run") == [3]


def test_a_checkpoint_that_is_not_written_ends_all_alike(tmp_path, monkeypatch):
    """At the end of a training of one rank that meets an error, too: nobody says that it was saved."""
    write_pairs(tmp_path / "pairs", 6)

    def full(*arguments):
        raise UserError("checkpoint not written (no space)")

    monkeypatch.setattr(checkpoint, "save", full)
    ranks = Ranks(2, meets_a_damaged_file, endless(tmp_path, "--save_latest_freq", "1000"), folder=tmp_path)
    assert ranks.wait() == [2, 2]
    said = "".join(ranks.said())
    assert said.count("error") == 1 and "checkpoint not written" in said and "saved" not in said


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--steps", "none"], "error: "),
        (["--device", "cuda:1"], "each of several processes has a GPU of its own; drop the flag"),
        (["--continue_train"], "there is no run to continue"),
    ],
)
def test_a_mistake_is_said_once(more, line, tmp_path):
    write_pairs(tmp_path / "pairs", 4)
    ranks = Ranks(2, lambda rank: train.main(flags(tmp_path, *more)), folder=tmp_path)
    assert ranks.wait() == [2, 2]
    said = "".join(ranks.said())
    assert said.count("error: ") == 1 and line in said and "Traceback" not in said


def test_help_ends_all(tmp_path):
    ranks = Ranks(2, lambda rank: train.main(["--help"]), folder=tmp_path)
    assert ranks.wait() == [0, 0]
    assert "--dataroot" in ranks.said("out")[0] and ranks.said("out")[1] == ""


def test_a_store_that_has_ended_is_not_waited_for(tmp_path, monkeypatch):
    """As where torchrun's first machine is gone before this process begins."""
    monkeypatch.setattr(distributed, "SILENCE", 1.0)

    def work(rank):
        os.environ["MASTER_PORT"] = "1"
        train.main(flags(tmp_path))

    ranks = Ranks(2, work, folder=tmp_path)
    assert ranks.wait() == [1, 1]
    assert all("a process of this training is gone" in said for said in ranks.said())


def test_a_rank_that_dies_before_all_have_come_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "SILENCE", 2.0)

    def work(rank):
        if rank == 2:  # is late
            time.sleep(1000)
        if rank == 1:
            threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGKILL]).start()
        train.main(flags(tmp_path))

    ranks = Ranks(3, work, folder=tmp_path)
    assert [ranks.wait_for(0), ranks.wait_for(1)] == [1, -signal.SIGKILL]
    assert "rank 1 has given no sign of life for 2 s" in ranks.said()[0]


def test_ranks_that_differ_are_refused(tmp_path):
    def work(rank):
        with distributed.joined() as ranks:
            ranks.check_same("--precision", "fp32")
            ranks.check_same("--precision", ["fp16", "bf16"][rank])

    ranks = Ranks(2, work, folder=tmp_path)
    assert ranks.wait() == [1, 1]
    assert "--precision: fp16 in rank 0, bf16 in rank 1; all processes must have the same" in "".join(
        ranks.said()
    )


def test_one_process_under_torchrun_is_alone(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "x",
    }.items():
        monkeypatch.setenv(name, value)
    with distributed.joined() as ranks:
        assert ranks is distributed.ALONE
    assert not distributed.dist.is_initialized()


# ---------------------------------------------------------------------------- at length, and under torchrun


@pytest.mark.slow
def test_twenty_random_kills(tmp_path):
    """All end within 30 s, the checkpoints are whole, and the next start goes on from the newest.

    The other rank gets SIGTERM a moment later, as from torchrun.
    """
    random = np.random.default_rng(3)
    write_pairs(tmp_path / "pairs", 9)
    newest = 0
    for k in range(1, 21):
        argv = endless(tmp_path, *(["--continue_train"] if steps_saved_in(tmp_path) else []))
        ranks = Ranks(2, lambda rank, argv=argv: train.main(argv), folder=tmp_path)
        if k % 4:  # later than the first step, else at some moment of the start
            wait_for(lambda: steps_named(tmp_path)[-1:] > [newest], tmp_path)  # noqa: B023
        time.sleep(random.uniform(0.1, 2.0))
        victim = int(random.integers(2))
        os.kill(ranks.processes[victim], signal.SIGKILL)
        began = time.monotonic()
        time.sleep(0.1)
        os.kill(ranks.processes[1 - victim], signal.SIGTERM)
        codes = ranks.wait()
        assert time.monotonic() - began < 30, f"kill {k}"
        # Where it had not met the other yet, SIGTERM ends it.
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] in (1, -signal.SIGTERM), ranks.said()
        assert "Traceback" not in "".join(ranks.said()), ranks.said()
        saved = steps_saved_in(tmp_path)
        assert not newest or saved[-1] >= newest
        newest = saved[-1] if saved else 0
    assert newest >= 15 * 4


def steps_saved_in(folder: Path) -> list[int]:
    """Of a training that has ended, all of whose checkpoints are whole."""
    steps = steps_named(folder)
    for step in steps:
        assert checkpoint.load(folder / "run" / "checkpoints" / f"step_{step:08d}.pt")["step"] == step
    return steps


def steps_named(folder: Path) -> list[int]:
    """Of a training that goes on, which removes its older checkpoints."""
    return sorted(int(path.stem[5:]) for path in (folder / "run" / "checkpoints").glob("step_*.pt"))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(folder: Path, *options: str, name: str = "out") -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCES.parent)}
    out = open(folder / f"{name}.out", "wb")  # noqa: SIM115 (the process's)
    agent = subprocess.Popen(
        [*TORCHRUN, *options], cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment
    )
    _agents.append(agent)
    return agent


def wait_for(condition, folder: Path, process: subprocess.Popen | None = None) -> None:
    """Fails, with what was said, when the process ends or four minutes have passed."""
    deadline = time.monotonic() + 240
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended and time.monotonic() < deadline, [one.read_text() for one in folder.glob("*.out")]
        time.sleep(0.05)


def workers(process: subprocess.Popen) -> list[int]:
    """The ranks' processes, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        if parent == process.pid and ranks:
            found[ranks[0]] = int(path.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_one_process_of_torchrun_is_a_training_without_it(tmp_path):
    """Bit for bit: weights, moments, dropout, losses."""
    write_pairs(tmp_path / "pairs", 5)
    train.main([*flags(tmp_path, "--steps", "6"), "--name", "plain"])
    argv = [*flags(tmp_path, "--steps", "6"), "--name", "torchrun"]
    process = torchrun(tmp_path, "--nproc_per_node=1", "-m", "fastpix2pix.train", *argv)
    assert process.wait(240) == 0, (tmp_path / "out.out").read_text()
    plain, other = (checkpoint.load(checkpoint.latest(tmp_path / name)) for name in ("plain", "torchrun"))
    del plain["environment"], other["environment"]
    assert_same_state(plain, other)


def two_agents(folder: Path, *argv: str, restarts: int = 0) -> list[subprocess.Popen]:
    """As on two machines: --nnodes=2, one process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=7"]
    rendezvous += [f"--rdzv_endpoint=localhost:{port}", f"--max_restarts={restarts}"]
    command = ["-m", "fastpix2pix.train", *argv]
    return [torchrun(folder, *rendezvous, *command, name=f"agent{i}") for i in range(2)]


def said_by_agents(folder: Path) -> list[str]:
    return [(folder / f"agent{i}.out").read_text() for i in range(2)]


@pytest.mark.slow
def test_two_agents_train_together(tmp_path):
    write_pairs(tmp_path / "pairs", 5)
    agents = two_agents(tmp_path, *flags(tmp_path, "--steps", "4"))
    assert [agent.wait(300) for agent in agents] == [0, 0], said_by_agents(tmp_path)
    assert sum("2 processes, one a CPU process" in text for text in said_by_agents(tmp_path)) == 1
    assert steps_saved(tmp_path / "run") == [4]


@pytest.mark.slow
def test_a_killed_process_ends_both_agents(tmp_path):
    """Within 30 s, each of the two in turn, and the run goes on."""
    write_pairs(tmp_path / "pairs", 9)
    newest = 0
    for victim in (0, 1):
        agents = two_agents(tmp_path, *endless(tmp_path, *(["--continue_train"] if newest else [])))
        wait_for(lambda: steps_named(tmp_path)[-1:] > [newest], tmp_path, agents[0])  # noqa: B023
        (worker,) = workers(agents[victim])
        os.kill(worker, signal.SIGKILL)
        assert [agent.wait(30) for agent in agents] == [1, 1], said_by_agents(tmp_path)
        assert steps_saved_in(tmp_path)[-1] > newest
        newest = steps_saved_in(tmp_path)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_agents_start_a_killed_training_again(tmp_path, victim):
    """Also when only the agent of the killed process counts that as a restart."""
    write_pairs(tmp_path / "pairs", 9)
    argv = flags(tmp_path, "--steps", "100", "--save_latest_freq", "10", "--cache", "0")
    agents = two_agents(tmp_path, *argv, restarts=3)
    wait_for(lambda: len(steps_named(tmp_path)) > 1, tmp_path, agents[0])
    (worker,) = workers(agents[victim])
    os.kill(worker, signal.SIGKILL)
    assert [agent.wait(300) for agent in agents] == [0, 0], said_by_agents(tmp_path)
    assert sum(text.count("done: 100 steps") for text in said_by_agents(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_once(tmp_path, number):
    write_pairs(tmp_path / "pairs", 9)
    argv = endless(tmp_path, "--save_latest_freq", "100000")
    process = torchrun(tmp_path, "--nproc_per_node=2", "-m", "fastpix2pix.train", *argv)
    wait_for(lambda: "img/s" in (tmp_path / "out.out").read_text(), tmp_path, process)
    process.send_signal(number)
    process.wait(60)
    text = (tmp_path / "out.out").read_text()
    (at,) = re.findall(r"stopped at step (\d+); the run goes on", text)
    assert steps_saved(tmp_path / "run") == [int(at)]
    assert "stopped at once" not in text and "error: " not in text


@pytest.mark.slow
def test_torchrun_starts_a_killed_training_again(tmp_path):
    write_pairs(tmp_path / "pairs", 9)
    argv = flags(tmp_path, "--steps", "200", "--save_latest_freq", "10", "--cache", "0")
    process = torchrun(tmp_path, "--nproc_per_node=2", "--max_restarts=1", "-m", "fastpix2pix.train", *argv)
    wait_for(lambda: len(steps_named(tmp_path)) > 1, tmp_path, process)
    before = steps_named(tmp_path)[-1]
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait(300) == 0, (tmp_path / "out.out").read_text()
    text = (tmp_path / "out.out").read_text()
    assert steps_saved(tmp_path / "run")[-1] == 200 and "done: 200 steps" in text
    assert before > 10

"""What only a GPU can show: every line that does not run on the CPU is exercised here.

What could spoil the GPU for the tests after it, a failed capture above all, runs in a process of its own.
"""

import gc
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from fastpix2pix.data import LoaderOptions, open_loader
from fastpix2pix.device import choose_device
from fastpix2pix.doctor import CHECKS
from fastpix2pix.kernels import launch
from fastpix2pix.models import NetworkOptions, build_networks
from fastpix2pix.train import main
from fastpix2pix.training.distributed import Unconnected
from fastpix2pix.training.graph import AsyncHostCopy, CapturedStep
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.precision import WORKING_TYPES, choose_precision, set_float32_math
from fastpix2pix.training.prepare import prepare_step
from fastpix2pix.training.selfcheck import TOLERANCE, Networks, compare_with_reference, random_pairs
from fastpix2pix.training.step import TrainStep
from fastpix2pix.training.streams import SideStream

pytestmark = pytest.mark.gpu
PRECISIONS = ["bf16", "fp16", "tf32", "fp32"]
SIZE = 256


@pytest.fixture(params=["cuda:0", "cuda:1"])
def device(request):
    """Each of the first two GPUs, as a run would have it."""
    if int(request.param[-1]) >= torch.cuda.device_count():
        pytest.skip(f"no {request.param}")
    yield choose_device(request.param)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def exact_convolutions(monkeypatch):
    """The same algorithms, and sums in the same order, in every step."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    torch.backends.cudnn.benchmark = True


def prepared(device, preset, precision, *, graph):
    # Measured twice, the deep layers' convolutions might be chosen differently.
    options = StepOptions(preset=preset, precision=precision, deep_conv="triton")
    networks = build_networks(NetworkOptions(preset=preset))
    return prepare_step(*networks, options, device, image_size=SIZE, graph=graph, check=False)


def on(device, precision, count):
    for pair in random_pairs(count, SIZE):
        yield [
            image.to(device, WORKING_TYPES[precision], memory_format=torch.channels_last) for image in pair
        ]


@pytest.mark.parametrize("name", CHECKS)
def test_doctor(device, name):
    CHECKS[name](device)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_fused_and_captured_agrees_with_the_reference_on_the_cpu(device, preset, precision):
    set_float32_math(precision)
    networks = Networks(*build_networks(NetworkOptions(preset=preset)))
    options = StepOptions(preset=preset, precision=precision)
    result = compare_with_reference(networks, options, device, size=SIZE, graph=True)
    assert result.captured and result.difference <= TOLERANCE[precision]


@pytest.mark.parametrize("deep_conv", ["triton", "auto", "library"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_choice_of_deep_convolutions_agrees_with_the_reference(device, precision, deep_conv):
    options = StepOptions(precision=precision, deep_conv=deep_conv)
    said = []
    step = prepare_step(*build_networks(NetworkOptions()), options, device, image_size=SIZE, say=said.append)
    resolved = step.resolved()
    assert resolved["kernels"] == "Triton" and not [line for line in said if "failed" in line]
    ours = deep_conv == "triton" and torch.cuda.get_device_capability(device) >= (8, 0)
    if deep_conv != "auto":
        assert resolved["deep_conv"].startswith("Triton for") == ours


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_twenty_replays_equal_twenty_eager_steps(device, exact_convolutions, preset, precision):
    """Changing inputs and learning rate, advancing dropout, restored state."""
    eager, captured = (prepared(device, preset, precision, graph=graph) for graph in (False, True))
    torch.backends.cudnn.benchmark = False  # two searches may end with two algorithms
    for i, images in enumerate(on(device, precision, 20)):
        for each in (eager, captured):
            each.step.set_lr(2e-4 / (1 + i))
        expected, losses = torch.stack(eager.run(*images)), torch.stack(captured.run(*images))
        if precision == "fp32":
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(losses, expected, rtol=TOLERANCE[precision], atol=1e-3)
    assert captured.run.failure is None


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_the_side_stream_changes_no_bit(device, exact_convolutions, preset, precision):
    """Captured steps with and without it. Prints what it gains."""
    two, one = (prepared(device, preset, precision, graph=True) for _ in range(2))
    torch.backends.cudnn.benchmark = False
    for mine, theirs in zip(two.step.state(), one.step.state(), strict=True):
        mine.copy_(theirs)
    one.step.side = SideStream(torch.device("cpu"))  # in order, on the current stream
    for images in on(device, precision, 20):
        losses, expected = torch.stack(two.run(*images)), torch.stack(one.run(*images))
        assert torch.equal(losses, expected)
    for mine, theirs in zip(two.step.state(), one.step.state(), strict=True):
        assert torch.equal(mine, theirs)
    assert two.run.failure is None and one.run.failure is None
    milliseconds = []
    for each in (one, two):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(200):
            each.run(*images)
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end) / 200)
    print(
        f"{preset} {precision}: {milliseconds[0]:.3f} ms a step in one stream, {milliseconds[1]:.3f} in two"
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_fused_update_is_gradient_and_adam(device, precision):
    """A step of a network with deep layers, with and without storing their gradients."""
    set_float32_math(precision)
    made = []
    for keep in (False, True):
        torch.manual_seed(0)
        networks = (network.to(device) for network in build_networks(NetworkOptions()))
        step = TrainStep(*networks, StepOptions(precision=precision), keep_gradients=keep)
        if step.loss_scale is not None:
            step.loss_scale.scale.fill_(2.0**8)  # at the initial 2**16 both would skip the update
        start, seen = [master.clone() for master in step.gen_optimizer.masters()], []
        with launch.observed(lambda this, seen=seen: seen.append(this.name)):
            step(*next(on(device, precision, 1)))
        assert ("deep_update" in seen) is not keep
        moments = [state["exp_avg"] for state in step.gen_optimizer.state.values()]
        moved = [after - before for after, before in zip(step.gen_optimizer.masters(), start, strict=True)]
        made.append([*moments, *moved])
    for fused, stored in zip(*made, strict=True):
        assert (fused - stored).abs().mean() <= 1e-2 * stored.abs().mean(), tuple(stored.shape)


def test_memory_does_not_grow_over_500_replays(device):
    captured = prepared(device, "tutorial", choose_precision(None, device), graph=True)
    (images,) = on(device, captured.precision, 1)
    captured.run(*images)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    for _ in range(500):
        captured.run(*images)
    torch.cuda.synchronize(device)
    assert (torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)) == before


def test_the_self_check_gives_its_memory_back(device):
    """Within 64 MB: what cuDNN and cuBLAS keep for their own use."""
    (images,) = on(device, "fp32", 1)
    del images
    before = torch.cuda.memory_allocated(device)
    networks = Networks(*build_networks(NetworkOptions()))
    options = StepOptions(precision=choose_precision(None, device))
    compare_with_reference(networks, options, device, size=SIZE, graph=True)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated(device) - before < 64e6


def alone(code: str) -> str:
    """What a program prints in a process of its own; it has to end well."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_capture_that_fails_leaves_an_eager_step_that_works(device):
    printed = alone(f"""
        import warnings, torch
        from fastpix2pix.device import choose_device
        from fastpix2pix.models import NetworkOptions, build_networks
        from fastpix2pix.training.graph import CapturedStep
        from fastpix2pix.training.options import StepOptions
        from fastpix2pix.training.selfcheck import random_pairs
        from fastpix2pix.training.step import TrainStep

        device = choose_device("{device}")
        options, networks = StepOptions(precision="fp32"), NetworkOptions(netG="unet_64", ngf=8, ndf=8)
        step, eager, other = (TrainStep(*build_networks(networks, device), options) for _ in range(3))
        segments = step.segments

        def synchronising(source, target):
            source.sum().item()
            yield from segments(source, target)

        step.segments = synchronising
        images = [image.to(device) for image in random_pairs(1, 64)[0]]
        captured, second = CapturedStep(step), CapturedStep(other)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses, again = torch.stack(captured(*images)), torch.stack(second(*images))
        assert captured.failure and "an earlier capture failed" in second.failure
        assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
        expected = torch.stack(eager(*images))
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
        print(len(caught))
    """)
    assert printed.strip() == "2"


def test_a_machine_without_a_compiler_trains_all_the_same(device, facades, tmp_path):
    """In a process without gcc on its path and with an empty Triton cache: plain PyTorch, and a line."""
    environment = os.environ | {"PATH": "/nowhere", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("CC", None)
    done = subprocess.run(
        [sys.executable, "-m", "fastpix2pix.train", "--dataroot", str(facades), "--steps", "3", "--device",
         str(device), "--checkpoints_dir", str(tmp_path), "--loader", "portable"],
        capture_output=True,
        text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finds no C compiler for its launcher; install gcc" in done.stderr


def test_copy_to_the_host_arrives_whole(device):
    values = torch.arange(600, dtype=torch.float32, device=device).view(100, 6)
    reading = AsyncHostCopy(values)
    values.zero_()  # queued behind the copy
    assert torch.equal(reading.wait(), torch.arange(600, dtype=torch.float32).view(100, 6))
    assert reading.ready()


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
@pytest.mark.parametrize("kind", ["dali", "portable"])
def test_loaders_give_the_cpu_s_samples_on_the_gpu(device, facades, kind, interpolation):
    """nvJPEG may round a pixel's inverse transform another way than libjpeg-turbo."""
    streams = [
        open_loader(
            facades, LoaderOptions(loader=loader, interpolation=interpolation, chunk=8), device=where
        ).stream()
        for loader, where in ((kind, device), ("portable", torch.device("cpu")))
    ]
    for _ in range(20):
        ours, theirs = (next(stream) for stream in streams)
        assert ours.names == theirs.names and ours.source.device == device
        for mine, other in ((ours.source, theirs.source), (ours.target, theirs.target)):
            assert (mine.cpu() - other).abs().mean() * 127.5 < 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_and_resuming(device, facades, tmp_path, precision, capsys):
    flags = ["--dataroot", str(facades), "--checkpoints_dir", str(tmp_path), "--precision", precision]
    flags += ["--device", str(device), "--batch_size", "3"]  # 400 pairs: an epoch's last batch is smaller
    main([*flags, "--steps", "140", "--print_freq", "10"])
    assert "checking this GPU against the reference" in (out := capsys.readouterr().out)
    assert "CUDA graph, Triton kernels" in out
    main([*flags, "--continue_train", "--steps", "150"])
    assert "checking this GPU" not in capsys.readouterr().out
    assert (tmp_path / "experiment_name" / "checkpoints" / "step_00000150.pt").is_file()


@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_two_gpus_train_one_model(tmp_path, facades, preset, precision):
    """Through NCCL, between graphs; then on one GPU from their checkpoint, and back."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    flags = ["--dataroot", str(facades), "--checkpoints_dir", str(tmp_path), "--print_freq", "10"]
    flags += ["--preset", preset, "--precision", precision]
    said = []
    for processes, steps in ((2, 30), (1, 40), (2, 50)):
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        more = ["--steps", str(steps), *(["--continue_train"] if said else [])]
        done = subprocess.run(
            [*torchrun, "-m", "fastpix2pix.train", *flags, *more], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        assert "CUDA graph, Triton kernels" in done.stdout
        assert (tmp_path / "experiment_name" / "checkpoints" / f"step_{steps:08d}.pt").is_file()
    assert "2 processes, one a GPU (NCCL): --batch_size 1 in each makes 2 pairs a step" in said[0]


def test_segments_replay_as_eager_steps_do(device):
    """Of one of two ranks whose exchange moves nothing: what is captured apart shares its memory."""

    def fresh():
        options = StepOptions(precision="bf16")
        networks = build_networks(NetworkOptions(netG="unet_64", ngf=16, ndf=16, no_dropout=False), device)
        return TrainStep(*networks, options, Unconnected(2))

    eager, captured = fresh(), fresh()
    run = CapturedStep(captured)
    for pair in random_pairs(5, 64):
        images = [image.to(device, torch.bfloat16, memory_format=torch.channels_last) for image in pair]
        expected, losses = torch.stack(eager(*images)), torch.stack(run(*images))
        torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
    assert run.failure is None

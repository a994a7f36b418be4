"""What only a GPU can show: every line that does not run on the CPU is exercised here."""

import pytest
import torch

from fastpix2pix import selfcheck
from fastpix2pix.config import TrainConfig
from fastpix2pix.data import LoaderOptions, open_loader
from fastpix2pix.doctor import CHECKS
from fastpix2pix.graph import AsyncHostCopy, CapturedStep, CudaBackend, set_float32_math
from fastpix2pix.kernels import launch
from fastpix2pix.models import build_networks
from fastpix2pix.precision import WORKING_TYPES, choose_precision
from fastpix2pix.selfcheck import TOLERANCE, disagreement, random_pairs
from fastpix2pix.step import TrainStep
from fastpix2pix.train import main

pytestmark = pytest.mark.gpu
PRECISIONS = ["bf16", "fp16", "tf32", "fp32"]


@pytest.fixture
def device():
    return torch.device("cuda")


def on(device, config, count):
    dtype = WORKING_TYPES[config.precision]
    for pair in random_pairs(config, count):
        yield [image.to(device, dtype, memory_format=torch.channels_last) for image in pair]


@pytest.mark.parametrize("name", CHECKS)
def test_doctor(device, name):
    CHECKS[name](device)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_fused_and_captured_agrees_with_the_reference_on_the_cpu(device, preset, precision):
    set_float32_math(precision)
    config = TrainConfig(preset=preset, precision=precision)
    assert disagreement(config, device) <= TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_twenty_replays_equal_twenty_eager_steps(device, preset, precision):
    """Changing inputs and learning rate, advancing dropout, restored state; cuDNN may reorder sums."""
    set_float32_math(precision)
    config = TrainConfig(preset=preset, precision=precision)
    eager, step = (TrainStep(*build_networks(config, device), config) for _ in range(2))
    captured = CapturedStep(step)
    for i, images in enumerate(on(device, config, 20)):
        for each in (eager, step):
            each.set_lr(2e-4 / (1 + i))
        expected, losses = torch.stack(eager(*images)), torch.stack(captured(*images))
        torch.testing.assert_close(losses, expected, rtol=TOLERANCE[precision], atol=1e-3)
    assert not captured._eager


def test_memory_does_not_grow_over_500_replays(device):
    config = TrainConfig(precision=choose_precision(None, device))
    step = TrainStep(*build_networks(config, device), config)
    captured = CapturedStep(step)
    (images,) = on(device, config, 1)
    captured(*images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(500):
        captured(*images)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_capture_that_fails_leaves_an_eager_step_that_works(device, monkeypatch):
    config = TrainConfig(netG="unet_64", crop_size=64, load_size=64, ngf=8, ndf=8, precision="fp32")
    step, eager = (TrainStep(*build_networks(config, device), config) for _ in range(2))
    body = step.body

    def synchronising(source, target):
        source.sum().item()
        body(source, target)

    monkeypatch.setattr(step, "body", synchronising)
    captured = CapturedStep(step, CudaBackend())
    (images,) = on(device, config, 1)
    with pytest.warns(RuntimeWarning, match="could not be captured"):
        losses = torch.stack(captured(*images))
    torch.testing.assert_close(losses, torch.stack(eager(*images)), rtol=1e-4, atol=1e-4)


def test_reading_arrives_whole(device):
    values = torch.arange(600, dtype=torch.float32, device=device).view(100, 6)
    reading = AsyncHostCopy(values)
    values.zero_()  # queued behind the copy
    assert torch.equal(reading.wait(), torch.arange(600, dtype=torch.float32).view(100, 6))
    assert reading.ready()


def test_a_disagreeing_gpu_falls_back_loudly(device, monkeypatch):
    monkeypatch.setattr(launch, "kernels_on_gpu", True)
    monkeypatch.setattr(selfcheck, "disagreement", lambda config, device: 1.0)
    config = TrainConfig(precision="fp32")
    with pytest.warns(RuntimeWarning, match="without CUDA graph and Triton kernels"):
        assert selfcheck.verify_or_fall_back(config, device).no_graph
    assert not launch.kernels_on_gpu


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
        assert ours.names == theirs.names and ours.source.is_cuda
        for mine, other in ((ours.source, theirs.source), (ours.target, theirs.target)):
            assert (mine.cpu() - other).abs().mean() * 127.5 < 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_and_resuming(device, facades, tmp_path, precision):
    flags = ["--dataroot", str(facades), "--checkpoints_dir", str(tmp_path), "--precision", precision]
    main([*flags, "--steps", "30", "--print_freq", "10"])
    main([*flags, "--continue_train", "--steps", "40"])
    assert (tmp_path / "experiment_name" / "checkpoints" / "step_00000040.pt").is_file()

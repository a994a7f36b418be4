"""How a step is prepared for a device: on the CPU for real, for a GPU as far as no GPU is asked."""

import pytest
import torch

from fastpix2pix.kernels import deep_conv, language
from fastpix2pix.models import NetworkOptions, build_networks
from fastpix2pix.training import prepare
from fastpix2pix.training.graph import CapturedStep
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.prepare import compile_kernels, prepare_step
from fastpix2pix.training.selfcheck import Networks, random_pairs
from fastpix2pix.training.step import TrainStep

SMALL = NetworkOptions(netG="unet_32", ngf=8, ndf=8)
GPU = torch.device("cuda:1")


def test_on_a_cpu_the_step_is_the_step_itself():
    prepared = prepare_step(
        *build_networks(SMALL), StepOptions(precision="bf16"), torch.device("cpu"), image_size=32
    )
    assert prepared.run is prepared.step and prepared.dtype == torch.bfloat16
    assert prepared.resolved() == {
        "device": "cpu",
        "precision": "bf16",
        "cuda_graph": "no",
        "kernels": "PyTorch",
        "deep_conv": "library",
    }
    prepared.capture([(1, 32, 32)])  # nothing to capture
    expected = TrainStep(*build_networks(SMALL), StepOptions(precision="bf16"))
    images = [image.bfloat16() for image in random_pairs(1, 32)[0]]
    assert torch.equal(torch.stack(prepared.run(*images)), torch.stack(expected(*images)))


@pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_of_every_batch_size_are_compiled_beforehand(monkeypatch):
    seen, said = {}, []

    def precompile(launches, capability, progress):
        seen.update(launches=launches, capability=capability)
        progress(1, 57)
        return 57

    monkeypatch.setattr(prepare, "precompile", precompile)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    networks = Networks(*build_networks(SMALL))
    compile_kernels(networks, StepOptions(precision="bf16"), GPU, 32, (4, 1), said.append)
    assert seen["capability"] == (9, 1)
    images = {launch.args[0].pointer.shape[0] for launch in seen["launches"] if "norm_act" in launch.name}
    assert images == {1, 2, 4, 8}  # of one and of four; the discriminator has twice as many
    assert said[0] == "compiling 57 variants of the Triton kernels, once on this machine"
    assert said[1].startswith("  57 compiled in ")


@pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("capability, deep", [((7, 5), False), ((8, 6), True)])
def test_the_kernels_are_those_of_the_gpu(monkeypatch, capability, deep):
    """Deep convolutions on tensor cores alone."""
    monkeypatch.setattr(prepare, "precompile", lambda launches, capability, progress: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(deep_conv, "MIN_WEIGHTS", 1)
    networks = Networks(*build_networks(SMALL))
    launches = compile_kernels(networks, StepOptions(precision="fp16"), GPU, 32, (1,), print)
    names = {launch.name for launch in launches}
    assert "deep_update" in names and ("deep_conv_to_small" in names) is deep


@pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")
def test_kernels_that_cannot_be_compiled_beforehand_are_no_obstacle(monkeypatch):
    def precompile(launches, capability, progress):
        raise OSError("no process can be started")

    said = []
    monkeypatch.setattr(prepare, "precompile", precompile)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    compile_kernels(
        Networks(*build_networks(SMALL)), StepOptions(precision="fp32"), GPU, 32, (1,), said.append
    )
    assert said == [
        "  not compiled beforehand, so the first step takes longer: OSError: no process can be started"
    ]


def test_every_shape_is_captured_before_anything_else(monkeypatch):
    """Batches and the smaller last one; the captures leave the step as it was."""

    class Graph:
        failure = None

        def warm_up(self, body, times):
            body()

        def capture(self, body):
            body()
            return lambda: None

    step = TrainStep(*build_networks(SMALL), StepOptions(precision="fp32"))
    run = CapturedStep(step, Graph())
    before = [tensor.clone() for tensor in step.state()]
    prepared = prepare.PreparedStep(step, run, torch.device("cpu"), "fp32")
    prepared.capture([(3, 32, 32), (2, 32, 32)])
    assert [key[0] for key in run._captured] == [(3, 3, 32, 32), (2, 3, 32, 32)]
    for tensor, value in zip(step.state(), before, strict=True):
        assert torch.equal(tensor, value)
    assert prepared.resolved()["cuda_graph"] == "yes"

"""The launch gateway: launches are observed in order, and run on the device that their tensors are on."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastpix2pix.kernels import launch
from fastpix2pix.kernels import norm_act as kernels
from fastpix2pix.kernels.launch import Launch
from fastpix2pix.kernels.reference import NormActConfig


def forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    config = NormActConfig(slope=0.2)
    return kernels.norm_act_forward(x, None, None, None, None, None, config, out).y


def image(*shape: int, device: str) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(device, memory_format=torch.channels_last)


def test_launches_are_seen_in_order_and_can_run_again(triton_device):
    x = image(1, 4, 40, 40, device=triton_device)
    launches = []
    with launch.observed(launches.append):
        y = forward(x)
    assert [this.name for this in launches] == ["norm_act_statistics", "norm_act_forward_apply"]
    x.copy_(image(1, 4, 40, 40, device=triton_device).flip(2) * 3 + 1)
    for this in launches:
        this.run()
    assert torch.equal(y, forward(x)), "the same tensors, computed again"
    assert len(launches) == 2, "nothing is seen outside"


def test_bytes_are_those_of_the_operands(triton_device):
    x = image(1, 12, 8, 8, device=triton_device)
    out = torch.zeros((1, 24, 8, 8), device=triton_device).to(memory_format=torch.channels_last)[:, :12]
    launches = []
    with launch.observed(launches.append):
        forward(x, out)
    (this,) = launches
    assert this.bytes_moved == 2 * 12 * 64 * 4 + 2 * 12 * 4  # x, y; mean and rstd; not the slice's neighbours


def test_planned_launches_compute_nothing():
    x = image(1, 12, 8, 8, device="cpu")
    out = torch.full_like(x, 7.0)
    launches = []
    with launch.observed(launches.append, run=False):
        forward(x, out)
    assert len(launches) == 1 and (out == 7.0).all()
    assert not launch.use_triton(x), "the CPU has its reference again"


# ------------------------------------------------------------------------------------------------- devices


class FakeCuda:
    """Two GPUs: on which of them kernels were enqueued, and how often the current one was switched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current, self.switches, self.enqueued = 0, 0, []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    @contextmanager
    def device(self, device: torch.device):
        before, self.current = self.current, device.index
        self.switches += 1
        try:
            yield
        finally:
            self.current = before

    def kernel(self, fails: bool = False):
        def enqueue(*args, **options):
            self.enqueued.append(self.current)
            if fails:
                raise RuntimeError("out of resources")

        class Kernel:
            def __getitem__(self, grid):
                return enqueue

        return Kernel()


def on(device: str | None):
    return None if device is None else SimpleNamespace(device=torch.device(device))


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_is_enqueued_on_the_device_of_its_tensors(monkeypatch, current, index):
    cuda = FakeCuda(monkeypatch)
    cuda.current = current
    launch.launch(cuda.kernel(), (1,), reads=(None,), writes=(None, on(f"cuda:{index}")))
    assert cuda.enqueued == [index] and cuda.current == current
    assert cuda.switches == (current != index), "the usual case switches nothing"


def test_a_launch_that_runs_again_goes_to_its_device_too(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    this = Launch(cuda.kernel(), (1,), (), {}, reads=(on("cuda:1"),), writes=())
    this.run()
    assert cuda.enqueued == [1] and cuda.current == 0


def test_a_failed_launch_restores_the_current_device(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="out of resources"):
        launch.launch(cuda.kernel(fails=True), (1,), reads=(on("cuda:1"),), writes=())
    assert cuda.current == 0


def test_a_launch_on_the_cpu_asks_no_gpu(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("there is none"))
    launch.launch(cuda.kernel(), (1,), reads=(on("cpu"),), writes=())
    assert len(cuda.enqueued) == 1

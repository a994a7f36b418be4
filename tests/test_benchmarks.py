"""The benchmarks' own truth: the peers compute what we compute, and traffic is counted by its rules."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import traffic
from benchmarks.peers import PLAIN, PeerStep, tuned
from fastpix2pix.config import TrainConfig
from fastpix2pix.kernels import launch
from fastpix2pix.models import build_networks
from fastpix2pix.step import TrainStep


def miniature(preset, **options):
    small = {"netG": "unet_64", "crop_size": 64, "load_size": 64, "ngf": 4, "ndf": 4, "no_dropout": True}
    return TrainConfig(preset=preset, **{"precision": "fp32", **small, **options})


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_the_peers_losses_are_ours(preset, batch_size):
    """Nothing is shared but the weights: neither networks, losses, update rule nor Adam."""
    config = miniature(preset, batch_size=batch_size, ngf=8, ndf=8)
    networks = [network.double() for network in build_networks(config, torch.device("cpu"))]
    with torch.no_grad():
        # The tutorial's fresh bottleneck is 0, where rounding would decide what a ReLU lets through.
        for parameter in (p for network in networks for p in network.parameters() if p.ndim == 1):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    peers = []
    for tuning in (PLAIN, tuned("cpu")):
        peer = PeerStep(config, tuning)
        peer.generator.double(), peer.discriminator.double()
        peers.append(peer.load_ours(*networks))
    ours = TrainStep(*networks, config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        images = torch.rand(2, batch_size, 3, 64, 64, generator=generator, dtype=torch.float64) * 2 - 1
        expected = ours(*images)._asdict()
        for peer in peers:
            losses = peer(*images)
            for name, loss in expected.items():
                # The ring that our losses come from is float32.
                torch.testing.assert_close(losses[name].float(), loss, rtol=2e-6, atol=0)


def test_dropout_of_the_peers():
    """The blocks that drop are those of the reference: output sizes 2, 4, 8 of the tutorial, 4, 8, 16."""
    for preset, sizes in (("tutorial", [2, 4, 8]), ("junyanz", [4, 8, 16])):
        peer = PeerStep(TrainConfig(preset=preset, ngf=1, ndf=1))
        dropping = [
            2 ** (i + 1)
            for i, up in enumerate(peer.generator.ups)
            if isinstance(up.dropout, torch.nn.Dropout)
        ]
        assert dropping == sizes


# ------------------------------------------------------------------------------------------------ traffic


def traced(body):
    trace = traffic.Trace()
    with trace():
        body()
    return trace.entries


def test_operands_and_movement():
    x, y = torch.zeros(2, 250), torch.zeros(500)

    def body():
        x.add_(1)  # read and written
        z = x.view(-1) + y  # a view is free
        y.copy_(z)  # written only
        x[0].mul_(x[1])  # slices are operands of their own
        torch.empty(1000)
        y + y  # one operand, used twice

    names = ["add_", "add", "copy_", "mul_", "add"]
    entries = traced(body)
    assert [entry.name for entry in entries] == names
    assert [entry.operands for entry in entries] == [2000, 6000, 4000, 2000, 4000]
    assert [entry.moved for entry in entries] == [4000, 6000, 4000, 3000, 4000]


def test_convolutions_are_counted_and_not_computed():
    x = torch.ones(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(5, 3, 4, 4, requires_grad=True)
    results = []
    (entry,) = traced(lambda: results.append(F.conv2d(x, weight, stride=2, padding=1)))
    assert entry.kind == "convolution"
    assert entry.flops == 2 * (4 * 4) * 5 * (3 * 4 * 4)  # a multiplication and an addition a tap
    assert entry.operands == entry.moved == 4 * (3 * 64 + 5 * 48 + 5 * 16)
    assert results[0].shape == (1, 5, 4, 4) and not results[0].any()
    assert results[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options, operands, moved",
    [({"foreach": True}, 48, 72), ({"fused": True}, 16, 28)],
)
def test_optimizers(options, operands, moved):
    """Plain Adam: twelve vectors of the parameters' size go by, six of them updated in place. Fused: weight,
    gradient and both moments, three of them updated."""
    weights = [torch.zeros(1000, requires_grad=True) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    adam = torch.optim.Adam(weights, **options)
    adam.step()
    entries = traced(adam.step)
    assert {entry.kind for entry in entries} == {"optimizer"}
    assert sum(entry.operands for entry in entries) == pytest.approx(operands * 3000, rel=0.01)
    assert sum(entry.moved for entry in entries) == pytest.approx(moved * 3000, rel=0.01)


@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_launches_declare_what_they_are_given(preset, precision):
    """A launch of the step declares the images and vectors among its arguments, and no others."""
    config = miniature(preset, precision=precision)
    step = TrainStep(*build_networks(config, torch.device("cpu")), config)
    dtype = next(step.generator.parameters()).dtype
    images = torch.zeros(2, 1, 3, 64, 64, dtype=dtype)
    launches = []
    with launch.observed(launches.append, run=False):
        step.body(*images)
    assert len({made.name for made in launches}) >= 10

    def memory(tensors):
        tensors = (t for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 2)
        return {t.untyped_storage().data_ptr() for t in tensors}

    for made in launches:
        assert memory((*made.reads, *made.writes)) == memory(torch.utils._pytree.tree_leaves(made.args))


@pytest.mark.parametrize("preset, most_operators", [("tutorial", 160), ("junyanz", 170)])
def test_the_step_stays_lean(preset, most_operators):
    """Traffic that creeps in: per step at batch 1, however narrow the networks are."""
    config = TrainConfig(preset=preset, precision="bf16", ngf=8, ndf=8)
    ours = traffic.summary(traffic.trace_ours(config))
    plain = traffic.summary(traffic.trace_peer(config, traffic.PLAIN_ON_GPU))
    assert ours["total"]["operators"] < most_operators < plain["total"]["operators"] * 0.65
    assert ours["total"]["operands_gb"] < 0.4 * plain["total"]["operands_gb"]
    assert ours["copy"]["operands_gb"] < 0.005  # a pair, into the graph and into the discriminator's input


def test_float32_is_traced_as_a_gpu_runs_it():
    """Not as the CPU does, with convolutions of its own."""
    counts = []
    for precision in ("fp32", "bf16"):
        config = TrainConfig(precision=precision, ngf=8, ndf=8)
        counts.append(traffic.summary(traffic.trace_ours(config))["convolution"])
    assert counts[0]["operators"] == counts[1]["operators"]
    assert counts[0]["operands_gb"] == 2 * counts[1]["operands_gb"]

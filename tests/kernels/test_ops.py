"""The registered ops: what PyTorch asks of an op, and that compilers and exporters keep them."""

import copy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from fake_cuda import Machine, missing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import _disable_current_modes

from fastpix2pix import PatchGANLoss, accelerate
from fastpix2pix.kernels import language, ops, reference
from fastpix2pix.kernels.reference import NormActConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
from published_networks import GANUNet, HDGlobal, HDMultiscale  # noqa: E402

RUNNING = NormActConfig(slope=0.2)
CONFIGURATIONS = {
    "batch norm": RUNNING,
    "instance norm": NormActConfig(groups=2, slope=0.0),
    "no parameters": NormActConfig(groups=2, slope=0.3),
    "running statistics": RUNNING._replace(training=False),
    "bias": NormActConfig(norm=False, slope=0.1),
    "dropout": NormActConfig(slope=0.0, dropout=0.25),
}


def norm_act_arguments(name, dtype=torch.float32, memory_format=torch.channels_last):
    torch.manual_seed(0)
    config = CONFIGURATIONS[name]
    x = torch.randn(2, 3, 4, 5, dtype=dtype).add_(1).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = (torch.randn(3, requires_grad=True) for _ in range(2))
    if name == "no parameters":
        weight = bias = None
    running = (torch.zeros(3), torch.ones(3)) if config.norm and config.groups == 1 else (None, None)
    rng = torch.tensor([3, 4]) if config.dropout else None
    return (x, weight, bias, *running, rng, *ops._constants(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_norm_act_is_a_proper_op(name, dtype):
    """Its schema says what it writes, its fake results are like the real ones, and autograd is registered."""
    opcheck(ops.NORM_ACT, norm_act_arguments(name, dtype))


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_results_of_the_kernels_are_like_the_fake_ones(name, memory_format, triton_device):
    """What ``opcheck`` says of the CPU's implementation, of the Triton kernels'."""
    arguments = norm_act_arguments(name, memory_format=memory_format)
    moved = [t.detach().to(triton_device) if isinstance(t, torch.Tensor) else t for t in arguments]
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(ops.NORM_ACT, moved, **checks)
    _, mean, rstd = ops.NORM_ACT(*moved)
    x, weight, bias, _, _, rng, *constants = moved
    opcheck(ops.NORM_ACT_BACKWARD, (x, x, weight, bias, mean, rstd, rng, True, *constants), **checks)


def test_every_other_op_is_a_proper_op():
    x, target = torch.randn(2, 1, 3, 4, 5).unbind()
    bias, logits = torch.randn(3, requires_grad=True), torch.randn(2, 1, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in norm_act_arguments("batch norm")]
    _, mean, rstd = ops.NORM_ACT(*detached)
    image, weight, offset, _, _, rng, *constants = detached
    backward = (torch.ones_like(image), image, weight, offset, mean, rstd, rng, True, *constants)
    checks = [
        (ops.NORM_ACT_BACKWARD, backward),
        (ops.TANH_L1, (x.clone().requires_grad_(), bias, target)),
        (ops.TANH_L1, (x, None, target)),
        (ops.TANH_L1_BACKWARD, (x, torch.tensor(2.0), x, target, bias.detach())),
        (ops.GAN_LOSS, (logits, "vanilla", True, 0.5, torch.tensor(2.0))),
        (ops.GAN_TARGET_LOSS, (logits, False, "lsgan", None)),
        (ops.PATCHGAN_LOSS, (logits.clone().requires_grad_(), True, "vanilla")),
    ]
    for op, arguments in checks:
        opcheck(op, arguments)
    assert {op.name() for op, _ in checks} | {ops.NORM_ACT.name()} == ops.LIBRARY._op_defs


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_registered_op_computes_what_the_reference_does(name, memory_format):
    config = CONFIGURATIONS[name]
    arguments = norm_act_arguments(name, memory_format=memory_format)
    x, weight, bias, mean, var, rng = arguments[:6]
    twins = [None if t is None else t.clone() for t in (mean, var)]
    versions = [t._version for t in (mean, var) if t is not None]
    with torch.no_grad():
        expected = reference.norm_act_forward(x, weight, bias, *twins, rng, config)
    y, _, _ = ops.NORM_ACT(*arguments)
    dy = torch.randn(x.shape)
    inputs = [t for t in (x, weight, bias) if t is not None and (config.norm or t is not weight)]
    gradients = torch.autograd.grad(y, inputs, dy)
    with torch.no_grad():
        made = reference.norm_act_backward(
            dy, None, x, weight, bias, expected.mean, expected.rstd, rng, config
        )
    torch.testing.assert_close(y, expected.y, rtol=1e-5, atol=1e-5, check_stride=False)
    assert y.is_contiguous(memory_format=memory_format)
    exact = [gradient for gradient in made if gradient is not None]
    for gradient, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5, check_stride=False)
    for mine, theirs in zip((mean, var), twins, strict=True):
        assert mine is None or torch.allclose(mine, theirs)
    written = [t._version for t in (mean, var) if t is not None]  # which autograd looks at
    assert written == [version + config.training for version in versions]


def test_the_registered_tanh_l1_computes_what_plain_pytorch_does():
    torch.manual_seed(0)
    x, target, dfake = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64).unbind()
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    fake, l1 = ops.TANH_L1(x, bias, target)
    exact = torch.tanh(x + bias[:, None, None])
    exact_l1 = (exact - target).abs().mean()
    torch.testing.assert_close((fake, l1), (exact, exact_l1), check_stride=False)
    for weight in (0.0, 3.0):  # of the loss beside the image's own gradient
        gradients = (
            torch.autograd.grad((y * dfake).sum() + weight * loss, (x, bias), retain_graph=True)
            for y, loss in ((fake, l1), (exact, exact_l1))
        )
        torch.testing.assert_close(*gradients, check_stride=False)


# ------------------------------------------------------------------------------------- compile and export


def networks():
    torch.manual_seed(0)
    halves = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Dropout(0.5)]
    return {
        "pix2pixHD global generator": (HDGlobal(2, downs=1, blocks=1), 3),
        "pix2pixHD multiscale discriminator": (HDMultiscale(2, scales=2, n_layers=1), 6),
        "PyTorch-GAN generator": (GANUNet(2, depth=4, dropout=0.0), 3),
        "batch norm and dropout": (nn.Sequential(*halves), 3),
    }


def leaves(made):
    return [made] if isinstance(made, torch.Tensor) else [leaf for part in made for leaf in leaves(part)]


def gradients_of(network, x):
    made = leaves(network(x))
    total = sum(leaf.square().mean() for leaf in made)
    return [*made, *torch.autograd.grad(total, [x, *network.parameters()]), *network.buffers()]


def compiled_equals_eager(name, backend):
    network, channels = networks()[name]
    accelerate(network)
    x = torch.randn(2, channels, 16, 16, requires_grad=True)
    twin = copy.deepcopy(network)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend=backend, dynamic=False)
    for _ in range(2):
        if "dropout" in name:
            network.eval(), twin.eval()
        for result, expected in zip(gradients_of(compiled, x), gradients_of(network, x), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5, check_stride=False)


@pytest.mark.parametrize("name", list(networks()))
def test_a_compiled_network_is_one_graph_and_computes_the_same(name):
    compiled_equals_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(networks()))
def test_by_inductor_too(name):
    compiled_equals_eager(name, "inductor")


def names_in(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", ["pix2pixHD global generator", "batch norm and dropout"])
def test_an_exported_program_keeps_the_op(name):
    network, channels = networks()[name]
    accelerate(network.eval())
    x = torch.randn(2, channels, 16, 16)
    program = torch.export.export(network, (x,))
    norms = sum(isinstance(layer, nn.modules.batchnorm._NormBase) for layer in network.modules())
    assert names_in(program.graph_module).count("fastpix2pix.norm_act.default") == norms
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_compiled_loss_keeps_the_op():
    criterion, graphs = PatchGANLoss("vanilla"), []

    def backend(graph_module, _):
        graphs.append(graph_module)
        return graph_module

    logits = torch.randn(1, 1, 3, 3, requires_grad=True)
    loss = torch.compile(criterion, fullgraph=True, backend=backend)(logits, True)
    assert any("patchgan_loss" in name for name in names_in(graphs[0]))
    (gradient,) = torch.autograd.grad(loss * 3, logits)
    exact = nn.functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact * 3, logits)[0])


@pytest.mark.parametrize("op", ["norm_act", "tanh_l1", "patchgan_loss"])
def test_a_second_derivative_is_refused(op):
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    calls = {
        "norm_act": lambda: ops.NORM_ACT(x, None, None, None, None, None, *ops._constants(RUNNING))[0],
        "tanh_l1": lambda: ops.TANH_L1(x, None, torch.zeros(1, 3, 4, 4))[0],
        "patchgan_loss": lambda: ops.PATCHGAN_LOSS(x, True, "vanilla"),
    }
    (gradient,) = torch.autograd.grad(calls[op]().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"fastpix2pix::{op} can be differentiated once; .*"):
        torch.autograd.grad(gradient.square().sum(), x)


# --------------------------------------------------------------------------- on fake GPUs, in a child process


def on_a_fake_gpu(watch) -> list:
    """Devices, layouts and kernels of an accelerated network there, eagerly and by the registered op; and of
    networks from which torch.compile makes one graph, what differs from the eager ones.
    """
    import torch
    from torch import nn

    from fastpix2pix import accelerate
    from fastpix2pix.kernels import ops

    layers = [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.2)]
    network = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU()).to("cuda:1")
    said = accelerate(network).layout
    x = torch.ones(2, 3, 16, 16, device="cuda:1", requires_grad=True)
    with watch("eager"):
        y = network(x)
        y.sum().backward()
    x, config = torch.ones(2, 8, 9, 9, device="cuda:1"), NormActConfig(groups=2)
    weight = torch.ones(8, device="cuda:1", requires_grad=True)
    with watch("registered"):
        made = ops.NORM_ACT(x, weight, weight, None, None, None, *ops._constants(config))[0]
        made.sum().backward()
    weights = network[0].weight.is_contiguous(memory_format=torch.channels_last)
    differing = [name for name in list(networks())[:3] if compiled_looks_different(name)]
    return [said, weights, str(made.device), made.is_contiguous(), differing]


def compiled_looks_different(name) -> bool:
    """Whether results and gradients have other shapes, strides, types or devices than the eager network's.

    Without the machine's recorder, which no compiler takes, and the GPU's random state, which one would keep.
    """
    state = torch.get_rng_state()
    random_state = mock.patch.multiple(torch.cuda, get_rng_state=lambda: state, set_rng_state=lambda _: None)
    with _disable_current_modes(), FakeTensorMode(), random_state:
        network, channels = networks()[name]
        network = network.to("cuda:1")
        accelerate(network)
        x = torch.ones(2, channels, 16, 16, device="cuda:1", requires_grad=True)
        torch._dynamo.reset()
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
        looks = [
            [(t.shape, t.stride(), t.dtype, t.device) for t in gradients_of(each, x)]
            for each in (network, compiled)
        ]
    return looks[0] != looks[1]


@pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")
def test_on_a_gpu_the_host_side_launches_kernels_there_and_never_waits(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    report = Machine.build(tmp_path).run(on_a_fake_gpu)
    assert report.result == ["weights brought to channels-last", True, "cuda:1", True, []]
    for label, kernels in (("eager", 3), ("registered", 0)):
        section = report.sections[label]
        assert not section.mixtures and not section.waits and not section.transfers
        assert set(section.devices) == {"cuda:1"}
        assert all(each.devices == ["cuda:1"] == [each.current] for each in section.launches)
        assert len(section.launches) >= 2 * kernels

"""``accelerate`` on architectures of other people: nothing changes but who does the work."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from published_networks import PUBLISHED
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastpix2pix import rewriting
from fastpix2pix.acceleration import BatchNorm2dAct, InstanceNorm2dAct, accelerate
from fastpix2pix.errors import UserError
from fastpix2pix.kernels import launch
from fastpix2pix.kernels.reference import dropout_mask

NETWORKS = Path(__file__).parent / "junyanz_miniature" / "models" / "networks.py"


def junyanz_pair(dropout):
    """The U-Net, whose norms are mostly followed by another block, then its discriminator."""
    spec = importlib.util.spec_from_file_location("junyanz_networks", NETWORKS)
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    unet = networks.define_G(3, 3, 4, "unet_128", "batch", dropout, "normal", 0.02)
    patchgan = networks.define_D(3, 4, "basic", 3, "batch", "normal", 0.02)
    return nn.Sequential(unet, patchgan)


class TutorialUNet(nn.Module):
    """The usual blocks: convolution, norm, (dropout,) activation in one nn.Sequential each."""

    def __init__(self, dropout):
        super().__init__()
        drop = [nn.Dropout(0.5)] if dropout else []
        self.downs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 4, 2, 1, bias=False),
                nn.BatchNorm2d(o, eps=1e-3, momentum=0.01),
                nn.LeakyReLU(0.3),
            )
            for i, o in ((3, 8), (8, 16), (16, 16))
        )
        self.ups = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), *drop, nn.ReLU(inplace=True)
            )
            for i, o in ((16, 16), (32, 8), (16, 8))
        )
        self.last = nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x):
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
        x = self.ups[0](skips.pop())
        for up in self.ups[1:]:
            x = up(torch.cat([x, skips.pop()], 1))
        return torch.tanh(self.last(x))


class ResidualBlock(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        drop = [nn.Dropout(0.5)] if dropout else []
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
            nn.ReLU(True),
            *drop,
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x):
        return x + self.block(x)


def residual_generator(dropout):
    """Global generator of pix2pixHD: instance norms, of which the second in each residual block ends it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, padding=3),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(True),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.InstanceNorm2d(16),
        nn.LeakyReLU(0.1, True),
        ResidualBlock(16, dropout),
        nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1),
        nn.InstanceNorm2d(8),
        nn.ReLU(True),
        nn.Conv2d(8, 3, 7, padding=3),
        nn.Tanh(),
    )


ARCHITECTURES = {
    "junyanz": (junyanz_pair, 128),
    "tutorial": (TutorialUNet, 32),
    "residual": (residual_generator, 32),
}
FUSED = {"junyanz": 14, "tutorial": 6, "residual": 5}  # norms, which are all fused
DROPOUTS = {"junyanz": 2, "tutorial": 3, "residual": 1}


def built(name, dropout):
    """A network in float64 with norm parameters away from 1 and 0, and an input that wants a gradient."""
    torch.manual_seed(0)
    build, size = ARCHITECTURES[name]
    network = build(dropout).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network, torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)


def run(network, x):
    """Output, gradients of the input and all parameters, and the whole state afterwards."""
    torch.manual_seed(1)
    y = network(x)
    torch.manual_seed(2)
    gradients = torch.autograd.grad(
        y, [x, *network.parameters()], torch.randn(y.shape, dtype=y.dtype, device=y.device)
    )
    return [y, *gradients, *network.state_dict().values()]


def assert_equal(results, expected):
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-9, atol=1e-10, check_stride=False)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_changes(name, memory_format):
    network, x = built(name, dropout=False)
    network = network.to(memory_format=memory_format)
    fused = copy.deepcopy(network)
    report = accelerate(fused)
    assert (len(report.changed), report.left) == (FUSED[name], [])
    assert list(fused.state_dict()) == list(network.state_dict())
    for _ in range(2):  # the second step on the running statistics that the first left
        assert_equal(run(fused, x), run(network, x))
    assert fused(x).stride() == network(x).stride()
    assert_equal(run(fused.eval(), x), run(network.eval(), x))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_a_cpu_dropout_draws_what_it_drew(name):
    network, x = built(name, dropout=True)
    fused = copy.deepcopy(network)
    report = accelerate(fused)
    assert "".join(report.changed).count("Dropout") == DROPOUTS[name]
    assert_equal(run(fused, x), run(network, x))


def test_kernels_drop_where_the_dropouts_did(triton_device, monkeypatch):
    """The dropouts of the original, made to draw the masks of the fused norms, give the same results."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), nn.Conv2d(4, 5, 3)]
    layers += [nn.InstanceNorm2d(5), nn.LeakyReLU(0.2), nn.Dropout()]
    network = nn.Sequential(*layers).double().to(triton_device)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64, device=triton_device, requires_grad=True)
    fused = copy.deepcopy(network)
    accelerate(fused)
    seeds = []

    def randint(high, size, device):
        seeds.append(torch.tensor([7, len(seeds)], device=device))
        return seeds[-1]

    monkeypatch.setattr(torch, "randint", randint)
    results = run(fused, x)
    assert len(seeds) == 2
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(
                lambda layer, args, _: args[0] * dropout_mask(args[0], 0.5, seeds.pop(0), 0)
            )
    assert_equal(results, run(network, x))


def block(dropout=0.5):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout))


def test_masks_follow_torch_seed_and_have_the_dropout_s_distribution():
    network = block(0.25)
    x = torch.randn(4, 3, 34, 34)
    accelerate(network)
    network[1].bias.data.fill_(9)  # so that only dropout makes zeros
    torch.manual_seed(3)
    first, second = network(x), network(x)
    torch.manual_seed(3)
    assert torch.equal(network(x), first) and not torch.equal(second, first)
    dropped = (first == 0).double()
    assert abs(dropped.mean() - 0.25) < 4 * (0.25 * 0.75 / dropped.numel()) ** 0.5
    both = (dropped * (second == 0)).mean()
    assert abs(both - 0.25**2) < 4 * (0.25**2 / dropped.numel()) ** 0.5
    with torch.no_grad():
        plain = nn.functional.relu(
            nn.functional.batch_norm(network[0](x), None, None, None, network[1].bias, True)
        )
    torch.testing.assert_close(first[first != 0], plain[first != 0] / 0.75, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_recomputes_the_same_masks():
    network = block().double()
    accelerate(network)
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64, requires_grad=True)
    gradients = []
    for call in (network, lambda x: checkpoint(network, x, use_reentrant=False)):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(call(x).square().sum(), [x, *network.parameters()]))
    assert_equal(*gradients)


def test_modes_are_those_of_the_layers():
    """Programs freeze batch norms and keep dropout on in tests, each by its class."""
    network = block()
    accelerate(network)
    x = torch.randn(2, 3, 10, 10)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    before = network[1].running_mean.clone()
    assert (network(x) == 0).double().mean() > 0.6  # half of the positive half is left
    assert torch.equal(network[1].running_mean, before)
    network.eval()
    assert (network(x) == 0).double().mean() < 0.6
    network[3].train()
    assert (network(x) == 0).double().mean() > 0.6


def test_parameters_are_shared_and_found_by_class():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.InstanceNorm2d(4), nn.ReLU())
    parameters, buffers = list(network.parameters()), list(network.buffers())
    norm = network[1]
    accelerate(network)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(network.buffers(), buffers, strict=True))
    assert type(network[1]) is BatchNorm2dAct and isinstance(network[1], nn.BatchNorm2d)
    assert "BatchNorm2d" in type(network[1]).__name__ and network[1].weight is norm.weight
    assert type(network[3]) is InstanceNorm2dAct and type(network[3]).__name__.startswith("InstanceNorm")
    assert accelerate(network)[:3] == ([], [], [])


def test_affine_statistics_and_unbatched_variants():
    variants = (
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4, affine=True, eps=0.1),
    )
    for norm in variants:
        network = nn.Sequential(copy.deepcopy(norm), nn.LeakyReLU(0.1)).double()
        fused = copy.deepcopy(network)
        assert len(accelerate(fused).changed) == 1
        x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
        for training in (True, False):
            assert_equal(run(fused.train(training), x), run(network.train(training), x))
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), network(x))
    frozen = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).double()
    frozen[
        0
    ].track_running_stats = False  # set afterwards: batch statistics in training, the buffers in tests
    fused = copy.deepcopy(frozen)
    accelerate(fused)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        assert_equal(run(fused.train(training), x), run(frozen.train(training), x))
    with pytest.raises(ValueError, match="expected 4D input"):
        fused(x[0])


class Functional(nn.Module):
    """What a forward of one's own may do with a norm's result."""

    def __init__(self, dense=False):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.relu, self.dense = nn.ReLU(inplace=True), dense

    def forward(self, x):
        out = F.relu(self.norms[0](x))
        out = self.relu(self.norms[1](out) + x)
        out = F.leaky_relu(self.norms[2](out), negative_slope=0.3, inplace=True)
        kept = torch.add(x, self.norms[3](out).relu_())
        out = self.norms[4](kept) + out
        return torch.cat((x, out), 1) if self.dense else out


def test_functions_and_sums_after_a_norm_are_fused_where_fx_can_trace():
    torch.manual_seed(0)
    network = Functional().double()
    fused = copy.deepcopy(network)
    report = accelerate(fused)
    assert [line.partition(": ")[2] for line in report.changed] == [
        "BatchNorm2d + relu",
        "BatchNorm2d + sum + ReLU",
        "BatchNorm2d + leaky_relu",
        "BatchNorm2d + relu_",
        "BatchNorm2d + sum",
    ]
    assert type(fused).__name__ == "Functional" and isinstance(fused, Functional)
    assert fused._traced is not None
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    copies = [fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    for mode in (True, False):
        expected = run(network.train(mode), x)
        for each in copies:
            assert each._traced is not None and each._traced[0] is not None
            assert_equal(run(each.train(mode), x), expected)
    for each in (network, *copies):
        each.dense = True  # not what was traced: the original forward runs, on the same norms
        assert each(x).shape[1] == 8
        assert_equal(run(each, x), run(network, x))


def test_a_sum_of_other_shapes_or_types_is_what_pytorch_makes_of_it():
    y, wide = torch.randn(2, 4, 1, 1), torch.randn(2, 4, 3, 5)
    for residual in (wide, y.double(), y):
        for norm in (y, y.view(8, 1, 1).view(2, 4, 1, 1)):
            expected = F.leaky_relu(norm + residual, 0.2)
            joined = rewriting.join(norm.clone(), residual, 0.2)
            assert torch.equal(joined, expected) and joined.dtype == expected.dtype


class Moody(nn.Module):
    def __init__(self, mood):
        super().__init__()
        self.norm, self.mood = nn.BatchNorm2d(4), mood

    def forward(self, x):
        y = self.norm(x)
        if self.mood == "values" and y.sum() > 0:
            y = y * 2
        if self.mood == "stores":
            self.last = y
        if self.training:
            y = F.relu(y)
        return y


@pytest.mark.parametrize(
    ("mood", "reason"),
    [("values", "symbolically traced variables"), ("stores", "its forward sets last"), ("mode", None)],
)
def test_what_fx_cannot_trace_keeps_its_forward(mood, reason):
    network = Moody(mood).double()
    fused = copy.deepcopy(network)
    (line,) = accelerate(fused).changed
    assert "Moody.forward cannot be traced" in line and reason in line if reason else "relu" in line
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    for mode in (True, False):  # of these only the first was traced
        assert_equal(run(fused.train(mode), x), run(network.train(mode), x))
    assert "last" not in fused.__dict__ or mood == "stores"


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("n", (1, 3))
def test_running_statistics_of_instances(n, memory_format):
    norm = nn.InstanceNorm2d(4, momentum=0.3, affine=True, track_running_stats=True)
    network = nn.Sequential(norm, nn.ReLU()).double()
    fused = copy.deepcopy(network)
    accelerate(fused)
    x = torch.randn(n, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    for mode in (True, True, False):
        assert_equal(run(fused.train(mode), x), run(network.train(mode), x))


def test_a_bias_joins_its_activation(triton_device):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.LeakyReLU(0.2))
    ups = (nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1), nn.ReLU(True), nn.Conv2d(2, 3, 1))
    network = nn.Sequential(*layers, *ups).to(triton_device)
    fused = copy.deepcopy(network)
    report = accelerate(fused)
    assert report.biases == ["0: Conv2d's bias + LeakyReLU", "2: ConvTranspose2d's bias + ReLU"]
    assert list(fused.state_dict()) == list(network.state_dict())
    x = torch.randn(2, 3, 6, 5, device=triton_device, requires_grad=True)
    for kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "kernels_on_cpu", kernels)
            for result, expected in zip(run(fused, x), run(network, x), strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_layouts():
    def layout_of(network):
        return network[0].weight.is_contiguous(memory_format=torch.channels_last)

    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU())
    for layout, said, converted in (
        ("auto", "layout kept, as the network is on the CPU", False),
        ("keep", "layout kept", False),
        ("channels_last", "weights brought to channels-last", True),
    ):
        fused = copy.deepcopy(network)
        assert accelerate(fused, layout=layout).layout == said
        assert layout_of(fused) is converted
        y = fused(torch.randn(2, 3, 6, 7))
        assert y.is_contiguous(memory_format=torch.channels_last) is converted
    with pytest.raises(UserError, match="layout is 'nhwc'; choose auto, channels_last or keep"):
        accelerate(network, layout="nhwc")


class Layouts(TorchDispatchMode):
    """Strides of the images that every backward operator takes, while inside."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten.leaky_relu_backward.default,
            torch.ops.aten.native_batch_norm_backward.default,
        ):
            self.taken.append((func.__name__, *(t.stride() for t in args[:2])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("layer", ("batch", "instance", "bias", "sum"))
def test_a_contiguous_gradient_is_brought_to_the_layout_of_channels_last_images_once(layer, n):
    """As a loss that takes a mean gives it; PyTorch's kernels are many times slower where layouts differ."""
    after = {
        "batch": [nn.BatchNorm2d(4), nn.LeakyReLU(0.2)],
        "instance": [nn.InstanceNorm2d(4), nn.LeakyReLU(0.2)],
        "bias": [nn.LeakyReLU(0.2)],
        "sum": [nn.InstanceNorm2d(4)],
    }[layer]
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *after)
    network = Residual(network) if layer == "sum" else network
    accelerate(network, layout="channels_last")
    x = torch.randn(n, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    y = network(x)
    gradient = torch.randn(y.shape)
    assert y.is_contiguous(memory_format=torch.channels_last) and gradient.is_contiguous()
    with Layouts() as layouts:
        y.backward(gradient)
    assert len(layouts.taken) == {"batch": 2, "instance": 1 + n, "bias": 1, "sum": n + 1}[layer]
    assert all(dy == of for _, dy, of in layouts.taken)


class Residual(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return F.leaky_relu(x + self.block(x), 0.2)


@pytest.mark.parametrize("kernels", [False, True])
def test_under_autocast_a_norm_takes_16_bits_and_keeps_its_statistics_in_32(triton_device, kernels):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(triton_device)
    fused = copy.deepcopy(network)
    accelerate(fused)
    x = torch.randn(2, 3, 6, 7, device=triton_device)
    exact, dtype = copy.deepcopy(network).double(), torch.float16  # the interpreter cuts bf16 off

    def results(net, x):
        y = net(x)
        gradients = torch.autograd.grad(y.double().square().sum(), [*net.parameters()])
        return [y, *gradients, net[1].running_mean, net[1].running_var]

    expected = results(exact, x.double())
    with pytest.MonkeyPatch.context() as patch, torch.autocast(triton_device, dtype):
        patch.setattr(launch, "kernels_on_cpu", kernels)
        plain, ours = results(network, x), results(fused, x)
    for theirs, mine, truth in zip(plain, ours, expected, strict=True):
        assert mine.dtype == theirs.dtype
        error, mistake = ((t.double() - truth).abs().mean() for t in (mine, theirs))
        assert error <= 2 * mistake + 1e-6
    assert ours[0].dtype == dtype and fused[1].running_var.dtype == torch.float32


def test_functional_call_data_parallel_and_replicas():
    network = Functional().double()
    accelerate(network)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    state = {name: value.clone() for name, value in state.items()}
    assert_equal([torch.func.functional_call(network, state, (x,))], [other(x)])
    assert_equal([nn.DataParallel(network)(x)], [network(x)])
    replica = network._replicate_for_data_parallel()
    assert_equal([replica(x)], [network(x)])


def test_distributed_data_parallel_reduces_the_gradients(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = Functional().double()
        fused = copy.deepcopy(network)
        accelerate(fused)
        reduced = nn.parallel.DistributedDataParallel(fused)
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        for net in (reduced, network):
            net(x).square().mean().backward()
        assert_equal([p.grad for p in fused.parameters()], [p.grad for p in network.parameters()])
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------- published networks

NORMS = {
    "pix2pixHD global generator": 27,
    "pix2pixHD local enhancer": 36,
    "pix2pixHD multiscale discriminator": 6,
    "PyTorch-GAN generator": 13,
    "PyTorch-GAN discriminator": 3,
    "CUT generator": 23,
    "CUT generator without anti-aliasing": 23,
    "CUT discriminator": 3,
}


@pytest.mark.parametrize(("layout", "n"), [("keep", 2), ("channels_last", 2), ("channels_last", 1)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_compute_what_they_did(name, layout, n):
    """Outputs (logits and features too) and gradients of eight networks of three repositories.

    In the layout that they are found in bit for bit; in channels-last what they compute in contiguous memory.
    """
    torch.manual_seed(0)
    norms, options = NORMS[name], {}
    if name == "PyTorch-GAN generator":  # eight levels want 256 pixels a side
        assert len(accelerate(PUBLISHED[name].build(2)).changed) == norms
        norms, options = 7, {"depth": 5}
    network = PUBLISHED[name].build(4, **options).double()
    for layer in network.modules():  # another layout would draw other masks
        if isinstance(layer, nn.Dropout):
            layer.eval()
    fused = copy.deepcopy(network)
    report = accelerate(fused, layout=layout)
    assert (len(report.changed), report.left) == (norms, [])
    assert not [line for line in report.changed if "alone" in line]
    assert list(fused.state_dict()) == list(network.state_dict())
    images = [
        torch.randn(n, channels, 64, 64, dtype=torch.float64, requires_grad=True)
        for channels in PUBLISHED[name].inputs
    ]

    def results(net):
        made = [net(*images)]
        while any(isinstance(part, list) for part in made):
            made = [leaf for part in made for leaf in (part if isinstance(part, list) else [part])]
        total = sum(part.square().mean() for part in made)
        return made, torch.autograd.grad(total, [*images, *net.parameters()])

    (made, gradients), (expected, expected_gradients) = results(fused), results(network)
    if layout == "keep":
        assert all(map(torch.equal, [*made, *gradients], [*expected, *expected_gradients]))
    for result, other in zip(made, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=1e-12 * other.abs().max().item())
    largest = max(gradient.abs().max().item() for gradient in expected_gradients)
    for result, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-9, atol=1e-12 * largest)


class Tail(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_left_and_why():
    shared = nn.BatchNorm2d(4)
    watched = nn.BatchNorm2d(4)
    watched.register_forward_hook(lambda *_: None)
    lopsided = nn.BatchNorm2d(4)
    lopsided.bias = None
    activation = nn.ReLU()
    activation.register_forward_hook(lambda *_: None)
    network = nn.ModuleDict(
        {
            "alone": nn.BatchNorm2d(4),
            "tail": Tail(nn.BatchNorm2d(4), nn.ReLU()),
            "end": nn.Sequential(nn.BatchNorm2d(4)),
            "tanh": nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()),
            "channels": nn.Sequential(nn.BatchNorm2d(4), nn.Dropout2d(), nn.ReLU()),
            "steep": nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(1.5)),
            "cumulative": nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.ReLU()),
            "tracked": nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU()),
            "group": nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()),
            "sync": nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU()),
            "watched": nn.Sequential(watched, nn.ReLU()),
            "watched_activation": nn.Sequential(nn.BatchNorm2d(4), activation),
            "lopsided": nn.Sequential(lopsided, nn.ReLU()),
            "first": nn.Sequential(shared, nn.ReLU()),
            "second": nn.Sequential(shared, nn.LeakyReLU(0.2)),
            "only_dropout": nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.1), nn.Dropout(0.1)),
        }
    )
    report = accelerate(network)
    unknown = "alone: ModuleDict.forward cannot be traced (it has none)"
    assert report.changed == [
        f"alone: BatchNorm2d {unknown}",
        "tail.0: BatchNorm2d + ReLU",
        f"end.0: BatchNorm2d {unknown}",
        f"tanh.0: BatchNorm2d {unknown}",
        f"channels.0: BatchNorm2d {unknown}",
        f"steep.0: BatchNorm2d {unknown}",
        "tracked.0: InstanceNorm2d + ReLU",
        f"watched_activation.0: BatchNorm2d {unknown}",
        "only_dropout.0: BatchNorm2d + Dropout",
    ]
    assert report.left == [
        "cumulative.0: its running statistics are cumulative averages (momentum=None)",
        "group.0: GroupNorm takes statistics over several channels; the kernels take them by channel",
        "sync.0: SyncBatchNorm is not BatchNorm2d or InstanceNorm2d",
        "watched.0: hooks watch it",
        "lopsided.0: it has a weight without a bias, or the reverse",
        "first.0: it is used in more than one place",
    ]


def penalty(network, x):
    """Gradients of a gradient penalty."""
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), [x, *network.parameters()])


@pytest.mark.parametrize("norm", (nn.BatchNorm2d, nn.InstanceNorm2d))
@pytest.mark.parametrize("layout", ("keep", "channels_last"))
def test_differentiating_twice_works_on_a_cpu_and_is_refused_by_kernels(triton_device, norm, layout):
    network = nn.Sequential(nn.Conv2d(4, 4, 3), norm(4, affine=True), nn.LeakyReLU(0.2)).double()
    fused = copy.deepcopy(network)
    accelerate(fused, layout=layout)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "kernels_on_cpu", False)
        assert_equal(penalty(fused, x), penalty(network, x))
    fused, x = fused.to(triton_device), x.detach().to(triton_device).requires_grad_()
    with pytest.raises(RuntimeError, match="norm_act can be differentiated once; .* without accelerate"):
        penalty(fused, x)


def test_kernels_compute_the_same(triton_device):
    """One block of each kind by the Triton kernels, from contiguous tensors and an expanded gradient."""
    torch.manual_seed(4)
    layers = [nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.InstanceNorm2d(6, affine=True), nn.ReLU()]
    network = nn.Sequential(*layers).to(triton_device)
    fused = copy.deepcopy(network)
    accelerate(fused)
    x = torch.randn(2, 6, 5, 7, device=triton_device, requires_grad=True)
    results = []
    for net in (network, fused):
        gradients = torch.autograd.grad(net(x).sum() * 3, [x, *net.parameters()])
        results.append([net(x), *gradients, *net.state_dict().values()])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4, check_stride=False)

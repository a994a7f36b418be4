"""Checkpoints of pytorch-CycleGAN-and-pix2pix, against a construction of its networks from plain layers."""

import importlib.util
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from fastpix2pix.errors import UserError
from fastpix2pix.interop.junyanz import export_weights, load_weights
from fastpix2pix.kernels.reference import dropout_mask
from fastpix2pix.models import PatchDiscriminator, UNetGenerator

NETWORKS = Path(__file__).parent / "junyanz_miniature" / "models" / "networks.py"
NGF = NDF = 4


@pytest.fixture(scope="module")
def networks():
    spec = importlib.util.spec_from_file_location("junyanz_networks", NETWORKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomised(network):
    """The network with every tensor of its state away from the value that it starts with."""
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(int(torch.randint(1, 1000, ())))
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2)
        else:
            value.add_(torch.randn_like(value) * 0.1)
    return network


def their_generator(networks, depth=8, norm="batch", dropout=False):
    kind = {7: "unet_128", 8: "unet_256"}[depth]
    return randomised(networks.define_G(3, 3, NGF, kind, norm, dropout, "normal", 0.02))


def our_generator(depth=8, norm="batch", dropout=0.0, seed=3):
    return UNetGenerator("junyanz", ngf=NGF, num_downs=depth, norm=norm, dropout=dropout, seed=seed)


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and state[key].is_contiguous(), key
        assert torch.equal(state[key], value), key


def assert_same_results(ours, theirs, x):
    for training in (True, False):
        expected = theirs.train(training).double()(x)
        torch.testing.assert_close(ours.train(training).double()(x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("depth", (7, 8))
@pytest.mark.parametrize("norm", ("batch", "instance"))
@pytest.mark.parametrize("dropout", (False, True))
def test_generator_takes_their_weights_and_gives_them_back(networks, tmp_path, depth, norm, dropout):
    torch.manual_seed(0)
    theirs = their_generator(networks, depth, norm, dropout)
    state = theirs.state_dict()
    torch.save(state, tmp_path / "latest_net_G.pth")
    ours = our_generator(depth, norm, 0.5 * dropout)
    load_weights(ours, tmp_path / "latest_net_G.pth")
    assert_same_state(export_weights(ours), state)
    ours.dropout = 0  # for the comparison without dropout; where it goes has a test of its own
    for block in ours.ups:
        block.epilogue.config = block.epilogue.config._replace(dropout=0.0)
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    assert_same_results(ours, theirs, torch.randn(2, 3, 256, 256, dtype=torch.float64))


@pytest.mark.parametrize("n_layers", (1, 3, 5))
@pytest.mark.parametrize("norm", ("batch", "instance"))
def test_discriminator_takes_their_weights_and_gives_them_back(networks, n_layers, norm):
    torch.manual_seed(0)
    theirs = randomised(networks.define_D(6, NDF, "n_layers", n_layers, norm, "normal", 0.02))
    ours = PatchDiscriminator("junyanz", ndf=NDF, n_layers=n_layers, norm=norm)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    load_weights(ours, {f"module.{key}": value for key, value in state.items()})
    assert_same_state(export_weights(ours), state)
    assert_same_results(ours, theirs, torch.randn(2, 6, 128, 128, dtype=torch.float64))


@pytest.mark.parametrize("norm", ("batch", "instance"))
def test_weights_of_ours_load_into_theirs(networks, norm):
    torch.manual_seed(1)
    ours, theirs = randomised(our_generator(norm=norm)), their_generator(networks, norm=norm)
    theirs.load_state_dict(export_weights(ours))
    assert_same_results(ours, theirs, torch.randn(1, 3, 256, 256, dtype=torch.float64))
    our_d = randomised(PatchDiscriminator("junyanz", ndf=NDF, norm=norm))
    their_d = networks.define_D(6, NDF, "basic", 3, norm, "normal", 0.02)
    their_d.load_state_dict(export_weights(our_d))
    assert_same_results(our_d, their_d, torch.randn(1, 6, 64, 64, dtype=torch.float64))


def test_exported_weights_are_a_copy():
    ours = our_generator()
    before = export_weights(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    for key, value in export_weights(ours).items():
        assert key.endswith(("running_mean", "running_var", "tracked")) or not torch.equal(value, before[key])


def test_dropout_is_where_theirs_is(networks):
    """Their three dropout layers, made to draw our masks, give our result."""
    torch.manual_seed(2)
    theirs, ours = their_generator(networks, dropout=True).double(), our_generator(dropout=0.5).double()
    load_weights(ours, theirs.state_dict())
    rng, calls = ours.rng.clone(), []

    def our_mask(layer, args, result):
        calls.append(layer)
        return args[0] * dropout_mask(args[0], 0.5, rng, len(calls))

    for layer in theirs.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.register_forward_hook(our_mask)
    x = torch.randn(1, 3, 256, 256, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-11)
    assert len(calls) == 3


def test_16_bit_weights_are_exported_in_float32(networks):
    ours = our_generator()
    ours.downs[0].conv.to(torch.bfloat16)
    state = export_weights(ours)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert torch.equal(state["model.model.0.weight"], ours.downs[0].conv.weight.float())


def test_files_of_old_pytorch(networks):
    """Before 0.4.1 batch norms had no counter, and before 0.4 instance norms had running statistics."""
    theirs = their_generator(networks)
    old = {key: value for key, value in theirs.state_dict().items() if "num_batches" not in key}
    ours = our_generator()
    load_weights(ours, old)
    state = export_weights(ours)
    assert list(state) == list(theirs.state_dict())
    assert all(torch.equal(state[key], value) for key, value in old.items())
    assert all(value == 0 for key, value in state.items() if "num_batches" in key)

    theirs = their_generator(networks, norm="instance")
    ours = our_generator(norm="instance")
    statistics = {"model.model.1.model.2.running_mean": torch.zeros(8)}
    load_weights(ours, {**theirs.state_dict(), **statistics})
    assert_same_state(export_weights(ours), theirs.state_dict())


def message(module, source):
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(UserError) as raised:
        load_weights(module, source)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    return str(raised.value)


def test_a_checkpoint_of_another_network_is_refused(networks, tmp_path):
    ours = our_generator()
    told = message(ours, their_generator(networks, depth=7).state_dict())
    assert "a U-Net with 7 downsamplings and batch norm" in told
    assert "the module is a U-Net with 8 downsamplings and batch norm" in told
    assert "instance or no norm" in message(ours, their_generator(networks, norm="instance").state_dict())
    discriminator = networks.define_D(6, NDF, "n_layers", 4, "batch", "normal", 0.02).state_dict()
    assert "a discriminator with 4 strided layers and batch norm" in message(ours, discriminator)
    assert "a ResNet generator" in message(ours, {"model.10.conv_block.1.weight": torch.zeros(1)})
    assert "a pixel discriminator" in message(ours, {"net.0.weight": torch.zeros(1)})

    wider = networks.define_G(3, 3, 2 * NGF, "unet_256", "batch", False, "normal", 0.02).state_dict()
    told = message(ours, wider)
    assert "model.model.0.weight of shape (8, 3, 4, 4), the module (4, 3, 4, 4)" in told

    assert "does not exist" in message(ours, tmp_path / "latest_net_G.pth")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert "not a readable PyTorch state_dict" in message(ours, tmp_path / "notes.txt")
    torch.save(OrderedDict(epoch=3), tmp_path / "other.pth")
    assert "not a bare state_dict" in message(ours, tmp_path / "other.pth")


def test_only_networks_of_the_preset_are_served():
    with pytest.raises(UserError, match="preset='junyanz'"):
        export_weights(UNetGenerator("tutorial", ngf=NGF))
    with pytest.raises(UserError, match="Conv2d is not one of"):
        load_weights(torch.nn.Conv2d(3, 3, 1), {})

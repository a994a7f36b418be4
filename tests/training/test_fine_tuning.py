"""A run that begins with the weights of another: what is taken is what is there, and all is said."""

import numpy as np
import pytest
import torch
from tiny import step_of, tiny_config
from tiny_run import SMALL, steps_saved, write_pairs

from fastpix2pix import checkpoint, train
from fastpix2pix.errors import UserError
from fastpix2pix.interop import junyanz, keras
from fastpix2pix.models import NetworkOptions, build_networks
from fastpix2pix.training.fine_tuning import begin_with
from fastpix2pix.training.resume import Position, training_state


def fresh(preset="tutorial", netG="unet_64", ngf=4, seed=1, **options):  # noqa: N803
    return build_networks(NetworkOptions(preset, netG, ngf, 4, seed=seed, **options))


def others(preset="tutorial", netG="unet_64", ngf=4, **options):  # noqa: N803
    """Networks whose every tensor, statistics too, is unlike any fresh one's."""
    networks = fresh(preset, netG, ngf, seed=7, **options)
    with torch.no_grad():
        for network in networks:
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return networks


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture
def run(tmp_path):
    """Folder of a run, and its networks."""
    config = tiny_config(netG="unet_64", crop_size=64, load_size=64, ngf=4, ndf=4, checkpoints_dir=tmp_path)
    step = step_of(config)
    for mine, theirs in zip((step.generator, step.discriminator), others(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    checkpoint.save(config.run_folder, 5, training_state(step, config, {}, Position(5)), keep=1)
    return config.run_folder, (step.generator, step.discriminator)


def test_a_run_gives_both_networks_whole(run):
    folder, theirs = run
    for path in (folder, checkpoint.latest(folder)):
        mine = fresh()
        lines = begin_with(*mine, path)
        assert same(mine[0], theirs[0]) and same(mine[1], theirs[1])
        assert ["tensors taken" in line for line in lines] == [True, True, False]
        assert "drawn anew" not in "".join(lines) and "begin anew" in lines[-1]


@pytest.mark.parametrize("beside", [True, False])
def test_weights_of_junyanz(tmp_path, beside):
    theirs, mine = others("junyanz"), fresh("junyanz")
    untouched = fresh("junyanz")
    torch.save(junyanz.export_weights(theirs[0]), tmp_path / "50_net_G.pth")
    if beside:
        torch.save(junyanz.export_weights(theirs[1]), tmp_path / "50_net_D.pth")
    lines = begin_with(*mine, tmp_path / "50_net_G.pth")
    assert same(mine[0], theirs[0])
    assert same(mine[1], theirs[1] if beside else untouched[1])
    assert ("discriminator drawn anew, for there is no 50_net_D.pth beside it" in lines[1]) == (not beside)


def test_weights_of_keras(tmp_path):
    theirs, mine = others(), fresh()
    np.savez(tmp_path / "generator.npz", *keras.export_weights(theirs[0]))
    lines = begin_with(*mine, tmp_path / "generator.npz")
    assert same(mine[0], theirs[0]) and "discriminator drawn anew" in lines[1]


def test_a_deeper_network_takes_the_outer_levels(run):
    """Levels that see the image at the same scale have the same number from the outside."""
    folder, (theirs, _) = run
    generator, discriminator = fresh(netG="unet_128", n_layers_D=2)
    own = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    lines = begin_with(generator, discriminator, folder)
    for level in range(6):
        assert torch.equal(generator.downs[level].conv.weight, theirs.downs[level].conv.weight)
    for level in range(1, 5):  # decoder blocks from the outside; the innermost has another width here
        assert torch.equal(generator.ups[-level].conv.weight, theirs.ups[-level].conv.weight)
    assert torch.equal(generator.last.weight, theirs.last.weight)
    anew = ("ups.0.conv.weight", "ups.1.conv.weight", "downs.6.conv.weight")
    assert all(torch.equal(generator.state_dict()[name], own[name]) for name in anew)
    assert "drawn anew: downs.6.conv.weight (absent there, 32x32x4x4 here)" in lines[0] and "more" in lines[0]
    assert "last.weight (1x32x4x4 there, 1x16x4x4 here)" in lines[1]


def test_what_cannot_be_begun_with_is_refused(run, tmp_path):
    folder, _ = run
    with pytest.raises(UserError, match="layers are those of preset tutorial; add --preset tutorial"):
        begin_with(*fresh("junyanz"), folder)
    with pytest.raises(UserError, match="holds no checkpoint; give the folder"):
        begin_with(*fresh(), tmp_path)
    (tmp_path / "latest_net_G.pth").touch()
    with pytest.raises(UserError, match="holds no checkpoint; give .*latest_net_G.pth"):
        begin_with(*fresh(), tmp_path)
    with pytest.raises(UserError, match="no tensor of its generator has the shape of one here"):
        mine = fresh(ngf=3)
        mine[0].last = torch.nn.ConvTranspose2d(6, 2, 4, 2, 1)  # else its bias would fit
        begin_with(*mine, folder)


def test_the_command_begins_there_once(tmp_path, capsys):
    root = write_pairs(tmp_path / "pairs")
    where = ["--dataroot", str(root), "--checkpoints_dir", str(tmp_path)]
    train.main([*SMALL, *where, "--name", "a", "--steps", "2"])
    before = checkpoint.load(checkpoint.latest(tmp_path / "a"))
    source = ["--init_from", str(tmp_path / "a"), "--lr", "0"]
    train.main([*SMALL, *where, "--name", "b", "--steps", "1", "--seed", "3", *source])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'a'}: generator, " in said and "moments of Adam" in said
    after = checkpoint.load(checkpoint.latest(tmp_path / "b"))
    for network in ("generator", "discriminator"):
        for name, weight in before[network].items():
            if "running" not in name:
                assert torch.equal(weight, after[network][name]), name
    assert int(after["gen_optimizer"]["state"][0]["step"]) == 1
    checkpoint.latest(tmp_path / "a").unlink()  # a run that goes on does not look there again
    train.main(["--checkpoints_dir", str(tmp_path), "--name", "b", "--continue_train", "--steps", "2"])
    assert steps_saved(tmp_path / "b") == [1, 2] and "generator, " not in capsys.readouterr().out

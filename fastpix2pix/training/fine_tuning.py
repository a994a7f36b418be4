"""Fine-tuning: two fresh networks begin with the weights of others, wherever those come from."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpix2pix import checkpoint
from fastpix2pix.errors import UserError
from fastpix2pix.interop import keras
from fastpix2pix.interop.junyanz import weights as junyanz
from fastpix2pix.models import PatchDiscriminator, UNetGenerator

LISTED = 4  # tensors that are not taken, named in a line


def begin_with(generator: UNetGenerator, discriminator: PatchDiscriminator, path: Path) -> list[str]:
    """Copy what fits from the networks at ``path``, and return lines that say what was taken and what not.

    path: the folder of a run (its newest checkpoint), a ``step_*.pt``, a ``*_net_G.pth`` of
    pytorch-CycleGAN-and-pix2pix (with the ``*_net_D.pth`` beside it), or an ``.npz`` of the tutorial's
    generator. A tensor fits if it has the name and the shape of one here; levels of a U-Net of another depth
    are counted from the outside. Steps, moments and learning rate are not looked at.

    Raises UserError when nothing fits, or the weights are those of another preset, whose layers compute
    something else.
    """
    found, without_discriminator = _read(path, generator, discriminator)
    lines = []
    for name, network in (("generator", generator), ("discriminator", discriminator)):
        state = found.get(name)
        if state is None:
            lines.append(f"{path}: discriminator drawn anew, {without_discriminator}")
            continue
        fitting, missing = _fitting(network, state)
        if name == "generator" and not fitting:
            raise UserError(
                f"--init_from {path}: no tensor of its generator has the shape of one here; give its --ngf "
                "and --netG"
            )
        network.load_state_dict(fitting, strict=False)
        lines.append(f"{path}: {name}, {len(fitting)} of {len(fitting) + len(missing)} tensors taken")
        if missing:
            more = len(missing) - LISTED
            named = [*missing[:LISTED], *([f"{more} more"] if more > 0 else [])]
            lines[-1] += f"; drawn anew: {', '.join(named)}"
    return [*lines, f"{path}: moments of Adam, steps and learning rate begin anew"]


def _read(
    path: Path, generator: UNetGenerator, discriminator: PatchDiscriminator
) -> tuple[dict[str, dict[str, Tensor]], str]:
    """The state_dicts at ``path`` by "generator" and "discriminator", in our names; and why there is no
    second one, if so."""
    if path.suffix == ".npz":
        read = keras.read_generator(path)
        _check_preset(path, read.preset, generator)
        return {"generator": _aligned(read.state_dict(), read.num_downs, generator)}, "for it holds none"
    if path.suffix == ".pth":
        read = junyanz.read_generator(path)
        _check_preset(path, read.preset, generator)
        found = {"generator": _aligned(read.state_dict(), read.num_downs, generator)}
        beside = path.with_name(path.name.replace("_net_G", "_net_D"))
        if beside == path or not beside.is_file():
            return (
                found,
                f"for there is no {beside.name} beside it" if beside != path else "for it holds none",
            )
        other = discriminator.fresh()
        try:
            junyanz.load_weights(other, beside)
        except UserError as error:
            return found, f"for {error}"
        return found | {"discriminator": other.state_dict()}, ""
    file = checkpoint.latest(path) if path.is_dir() else path
    if file is None:
        theirs = path / "latest_net_G.pth"
        raise UserError(
            f"--init_from {path}: holds no checkpoint; give "
            + (str(theirs) if theirs.is_file() else "the folder of a run, or a .pt, .pth or .npz file")
        )
    state = checkpoint.load(file)
    _check_preset(path, state["config"].get("preset"), generator)
    depth = len({key.split(".")[1] for key in state["generator"] if key.startswith("downs.")})
    aligned = _aligned(state["generator"], depth, generator)
    return {"generator": aligned, "discriminator": state["discriminator"]}, ""


def _check_preset(path: Path, preset: object, generator: UNetGenerator) -> None:
    if preset != generator.preset:
        raise UserError(f"--init_from {path}: its layers are those of preset {preset}; add --preset {preset}")


def _aligned(state: dict[str, Tensor], depth: int, generator: UNetGenerator) -> dict[str, Tensor]:
    """``state`` with its decoder blocks, counted from the innermost, numbered as ``generator``'s."""
    inner = generator.num_downs - depth

    def renamed(key: str) -> str:
        return re.sub(r"^ups\.(\d+)", lambda match: f"ups.{int(match[1]) + inner}", key)

    return {renamed(key): value for key, value in state.items()}


def _fitting(network: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of ``state`` that ``network`` can take, and in words those of its own that none is for."""
    fitting, missing = {}, []
    for name, own in network.state_dict().items():
        other = state.get(name)
        if isinstance(other, Tensor) and other.shape == own.shape:
            fitting[name] = other
        else:
            there = "absent" if not isinstance(other, Tensor) else _shape(other)
            missing.append(f"{name} ({there} there, {_shape(own)} here)")
    return fitting, missing


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"

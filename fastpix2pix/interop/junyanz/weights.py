"""Weights of pytorch-CycleGAN-and-pix2pix in and out of our networks of preset "junyanz".

Its checkpoints (latest_net_G.pth, latest_net_D.pth) are bare state_dicts whose keys spell out nested
nn.Sequentials. In the U-Net each level holds the next one inside, between its convolution and its
transposed convolution.
"""

import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpix2pix.errors import UserError
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.models.blocks import Block

if TYPE_CHECKING:
    from fastpix2pix.training.optim import MasterAdam

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
NOT_LEARNED = ("running_mean", "running_var", "num_batches_tracked")
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel, DistributedDataParallel and torch.compile put before every key."""


class _Level(NamedTuple):
    """Positions in one level's nn.Sequential; activations and dropout take positions too."""

    down: int
    down_norm: int | None
    inner: int | None
    up: int
    up_norm: int | None


OUTERMOST = _Level(down=0, down_norm=None, inner=1, up=3, up_norm=None)
BETWEEN = _Level(down=1, down_norm=2, inner=3, up=5, up_norm=6)
INNERMOST = _Level(down=1, down_norm=None, inner=None, up=3, up_norm=4)


class _Entry(NamedTuple):
    """One key of the state_dict, and the attribute of our module that holds its value."""

    key: str
    owner: nn.Module
    attribute: str

    @property
    def value(self) -> Tensor:
        """A tensor; ``num_batches_tracked``, which we keep as a number beside the norm, made into one."""
        return torch.as_tensor(getattr(self.owner, self.attribute, 0))


def _block_entries(block: Block, conv_key: str, norm_key: str | None) -> Iterator[_Entry]:
    epilogue = block.epilogue
    yield _Entry(f"{conv_key}.weight", block.conv, "weight")
    if block.conv.bias is not None:
        yield _Entry(f"{conv_key}.bias", block.conv, "bias")
    elif epilogue.norm is None and epilogue.bias is not None:
        yield _Entry(f"{conv_key}.bias", epilogue, "bias")
    if epilogue.norm == "batch":
        yield from (_Entry(f"{norm_key}.{name}", epilogue, name) for name in BATCH_NORM)


def _generator_entries(
    generator: UNetGenerator, depth: int = 0, prefix: str = "model.model"
) -> Iterator[_Entry]:
    deepest = generator.num_downs - 1
    at = OUTERMOST if depth == 0 else INNERMOST if depth == deepest else BETWEEN
    yield from _block_entries(generator.downs[depth], f"{prefix}.{at.down}", f"{prefix}.{at.down_norm}")
    if depth < deepest:
        yield from _generator_entries(generator, depth + 1, f"{prefix}.{at.inner}.model")
    if depth > 0:
        yield from _block_entries(
            generator.ups[deepest - depth], f"{prefix}.{at.up}", f"{prefix}.{at.up_norm}"
        )
    else:
        yield from (_Entry(f"{prefix}.{at.up}.{name}", generator.last, name) for name in ("weight", "bias"))


def _discriminator_entries(discriminator: PatchDiscriminator) -> Iterator[_Entry]:
    yield from _block_entries(discriminator.blocks[0], "model.0", None)
    position = 2
    for block in discriminator.blocks[1:]:
        yield from _block_entries(block, f"model.{position}", f"model.{position + 1}")
        position += 3
    yield from (_Entry(f"model.{position}.{name}", discriminator.last, name) for name in ("weight", "bias"))


def _entries(module: nn.Module) -> list[_Entry]:
    """Everything that the checkpoint of ``module`` holds, in its order."""
    if getattr(module, "preset", None) == "junyanz":
        if isinstance(module, UNetGenerator):
            return list(_generator_entries(module))
        if isinstance(module, PatchDiscriminator):
            return list(_discriminator_entries(module))
    raise UserError(
        f"{type(module).__name__} is not one of pytorch-CycleGAN-and-pix2pix's networks; its weights fit "
        "UNetGenerator and PatchDiscriminator with preset='junyanz'"
    )


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a checkpoint such as latest_net_G.pth")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not a readable PyTorch state_dict; give a file that save_networks wrote"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a bare state_dict; give a file that save_networks wrote")
    return state


def _unwrapped(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def _described(keys: set[str]) -> str:
    """What network a state_dict belongs to, in words."""
    if any(".conv_block." in key for key in keys):
        return "a ResNet generator"
    if "net.0.weight" in keys:
        return "a pixel discriminator"
    norm = "batch" if any(key.endswith("running_mean") for key in keys) else "instance or no"
    if "model.model.0.weight" in keys:
        depth = max(key.count("model.") for key in keys) - 1
        return f"a U-Net with {depth} downsamplings and {norm} norm"
    if "model.0.weight" in keys:
        last = max(int(key.split(".")[1]) for key in keys)
        return f"a discriminator with {(last - 2) // 3} strided layers and {norm} norm"
    return "an unknown network"


def load_weights(module: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copy a checkpoint of pytorch-CycleGAN-and-pix2pix into a network of preset "junyanz".

    source: the path of ``*_net_G.pth`` or ``*_net_D.pth``, or such a state_dict, with or without the prefix
    of a parallel or compiled module. Tensors take the module's type and device. Files of PyTorch before
    0.4.1, without ``num_batches_tracked`` or with statistics of instance norms, load as they do there.

    Raises UserError when it belongs to another network; the module is then unchanged.
    """
    entries = _entries(module)
    name = "the state_dict" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else _read(Path(source))
    state = {_unwrapped(key): value for key, value in state.items()}

    expected = {entry.key for entry in entries}
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    surplus = {
        key for key in state.keys() - expected if module.norm == "batch" or not key.endswith(NOT_LEARNED)
    }
    if surplus or expected - optional - state.keys():
        raise UserError(
            f"{name} holds {_described(state.keys())}, the module is {_described(expected)}; "
            "build the module to match it"
        )
    for entry in entries:
        if entry.key in state and state[entry.key].shape != entry.value.shape:
            raise UserError(
                f"{name} has {entry.key} of shape {tuple(state[entry.key].shape)}, the module "
                f"{tuple(entry.value.shape)}; build the module with the checkpoint's widths and channels"
            )
    with torch.no_grad():
        for entry in entries:
            if entry.attribute == "num_batches_tracked":
                entry.owner.num_batches_tracked = int(state.get(entry.key, 0))
            else:
                entry.value.copy_(state[entry.key])


def read_generator(path: str | Path) -> UNetGenerator:
    """The U-Net that a ``*_net_G.pth`` belongs to, with its weights; on the CPU, their default dropout.

    Raises UserError when the file is not the checkpoint of a U-Net.
    """
    state = {_unwrapped(key): value for key, value in _read(Path(path)).items()}
    first, last = (state.get(f"model.model.{at}.weight") for at in (OUTERMOST.down, OUTERMOST.up))
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise UserError(f"{path} holds {_described(state.keys())}; give the weights of a U-Net generator")
    generator = UNetGenerator(
        "junyanz",
        in_channels=first.shape[1],
        out_channels=last.shape[1],
        ngf=first.shape[0],
        num_downs=max(key.count("model.") for key in state) - 1,
        # Files of PyTorch before 0.4.1 hold statistics of instance norms too, but only batch norm learns.
        norm="batch" if "model.model.1.model.2.weight" in state else "instance",
    )
    load_weights(generator, state)
    return generator


def export_weights(module: nn.Module, optimizer: "MasterAdam | None" = None) -> OrderedDict[str, Tensor]:
    """The state_dict that pytorch-CycleGAN-and-pix2pix would save: the inverse of ``load_weights``.

    A copy on the CPU, in float32 (float64 if the module is), in the order and layout of its own files; where
    the module's weights have 16 bits, those of its ``optimizer``'s masters. ``num_batches_tracked`` is what
    was loaded: no forward pass of ours counts batches, or needs to.
    """
    masters = {} if optimizer is None else dict(zip(optimizer.parameters(), optimizer.masters(), strict=True))
    state = OrderedDict()
    for entry in _entries(module):
        value = masters.get(entry.value, entry.value).detach()
        dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        state[entry.key] = value.to("cpu", dtype, copy=True).contiguous()
    return state

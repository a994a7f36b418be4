"""What a checkpoint holds of a training, and how a step is set to it, for an exact resume."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpix2pix.config import ARCHITECTURE, TrainConfig
from fastpix2pix.errors import NotFinite, UserError
from fastpix2pix.training.step import TrainStep


class Position(NamedTuple):
    """Where a training stands: steps done, and the samples of the present epoch that are consumed."""

    steps: int = 0
    epoch: int = 0
    sample: int = 0


class Undo:
    """Takes back a step that failed, mostly for want of memory, before it moved a weight.

    What a step changes before that is little: running statistics, counters, Adam's clock.
    """

    def __init__(self, step: TrainStep):
        self._step, self._optimizers = step, (step.gen_optimizer, step.disc_optimizer)
        large = {step.ring.rows.data_ptr()}
        for optimizer in self._optimizers:
            for p in optimizer.parameters():
                own = [tensor for name, tensor in optimizer.state[p].items() if name != "step"]
                large |= {tensor.data_ptr() for tensor in (p, *own)}
        self._live = [tensor for tensor in step.state() if tensor.data_ptr() not in large]
        self._kept = [tensor.clone() for tensor in self._live]
        self._updates = self._count()

    def _count(self) -> int:
        return sum(optimizer.updates for optimizer in self._optimizers)

    def mark(self) -> None:
        """A step begins."""
        torch._foreach_copy_(self._kept, self._live)
        self._updates = self._count()

    def take_back(self) -> bool:
        """Set everything to where it was at ``mark``; False, and nothing done, if a weight moved since."""
        if self._count() != self._updates:
            return False
        torch._foreach_copy_(self._live, self._kept)
        self._step.forget_gradients()
        return True


def training_state(step: TrainStep, config: TrainConfig, environment: dict, position: Position) -> dict:
    """All that an exact resume needs, as plain values and tensors; weights in float32 always.

    config is the request, environment what this machine made of it. Where several ranks train, all of them
    call this together, and what they get is that of a whole network, whatever their number.
    """
    step.average_statistics()
    gen_optimizer, disc_optimizer = step.gen_optimizer.state_dict(), step.disc_optimizer.state_dict()
    return {
        "config": config.to_dict(),
        "environment": environment,
        "step": position.steps,
        "generator": full_precision(step.generator, gen_optimizer),
        "discriminator": full_precision(step.discriminator, disc_optimizer),
        "gen_optimizer": gen_optimizer,
        "disc_optimizer": disc_optimizer,
        "loss_scale": None if step.loss_scale is None else step.loss_scale.state_dict(),
        "dropout_rng": step.generator.rng,
        "data": {"epoch": position.epoch, "position": position.sample},
    }


def check_finite(state: dict) -> None:
    """Raise NotFinite when a floating-point tensor of the ``training_state`` holds an infinity or a NaN.

    Looks at the tensors where they are, and waits for the device once.
    """
    tensors = dict(_floating(state))
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
    if not finite.all():
        name = [*tensors][int((~finite).nonzero()[0])]
        raise NotFinite(
            f"{name} is not finite at step {state['step']}, which is not saved; go on from the last "
            "checkpoint with --continue_train and a lower --lr, or start anew if there is none"
        )


def _floating(value: object, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested dictionaries and lists, by their place in them."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield where, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _floating(part, f"{where}.{key}" if where else str(key))


def full_precision(network: nn.Module, optimizer: dict) -> dict[str, Tensor]:
    """The network's ``state_dict`` with the masters of its optimizer's in place of 16-bit weights."""
    masters = (state["master"] for state in optimizer["state"].values())
    return {**network.state_dict(), **dict(zip(dict(network.named_parameters()), masters, strict=True))}


def check_architecture(config: TrainConfig, state: dict, path: Path) -> None:
    """Raise UserError when the checkpoint at ``path`` is of other networks than ``config``'s."""
    for field in ARCHITECTURE:
        mine, theirs = getattr(config, field), state["config"].get(field, getattr(TrainConfig, field))
        if mine != theirs:
            raise UserError(
                f"--{field} {mine}: {path} was trained with {theirs}; drop the flag, or start another run "
                "with another --name"
            )


def restore(step: TrainStep, state: dict, path: Path) -> Position:
    """Set ``step`` to the ``training_state`` in the checkpoint at ``path``, and return where it stands.

    Raises UserError, with ``step`` as it was, when an entry is missing, or of another type or shape.
    """
    wanted = training_state(step, TrainConfig(), {}, Position())
    for name in ("config", "environment", "loss_scale"):  # depend on the machine, or may be absent
        del wanted[name]
    if step.loss_scale is not None and state.get("loss_scale") is not None:
        wanted["loss_scale"] = step.loss_scale.state_dict()
    if difference := _difference(wanted, state):
        raise UserError(
            f"{path}: {difference}: not a checkpoint of this version and configuration; delete it to use the "
            "one before it, or use the version that wrote it"
        )
    step.generator.load_state_dict(state["generator"])
    step.discriminator.load_state_dict(state["discriminator"])
    step.gen_optimizer.load_state_dict(state["gen_optimizer"])
    step.disc_optimizer.load_state_dict(state["disc_optimizer"])
    if "loss_scale" in wanted:
        step.loss_scale.load_state_dict(state["loss_scale"])
    step.set_dropout_rng(state["dropout_rng"])
    return Position(state["step"], state["data"]["epoch"], state["data"]["position"])


def _difference(wanted: object, found: object, where: str = "") -> str | None:
    """The first entry of ``wanted`` that ``found`` lacks or has in another type or shape, in words.

    Tensors may be of another floating-point type, and dictionaries may hold more than is wanted.
    """
    if isinstance(wanted, Tensor):
        if not isinstance(found, Tensor) or found.is_floating_point() != wanted.is_floating_point():
            return f"{where} is {_kind(found)}, not {_kind(wanted)}"
        if found.shape != wanted.shape:
            return f"{where} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
        return None
    kinds = (float, int) if isinstance(wanted, float) else type(wanted)
    if not isinstance(found, kinds) or isinstance(found, bool) != isinstance(wanted, bool):
        return f"{where or 'all of it'} is {_kind(found)}, not {_kind(wanted)}"
    if isinstance(wanted, int) and found < 0:
        return f"{where} is {found}"
    if isinstance(wanted, dict):
        missing = [key for key in wanted if key not in found]
        if missing:
            return f"{where + '.' if where else ''}{missing[0]} is missing"
        keys = list(wanted)
    elif isinstance(wanted, list | tuple):
        if len(found) != len(wanted):
            return f"{where} has {len(found)} entries, not {len(wanted)}"
        keys = list(range(len(wanted)))
    else:
        return None
    parts = (_difference(wanted[key], found[key], f"{where}.{key}" if where else f"{key}") for key in keys)
    return next((part for part in parts if part is not None), None)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__

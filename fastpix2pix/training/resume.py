"""What a checkpoint holds of a training, and how a step is set to it, for an exact resume."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from fastpix2pix.config import ARCHITECTURE, TrainConfig
from fastpix2pix.errors import UserError
from fastpix2pix.training.optim import MasterAdam
from fastpix2pix.training.step import TrainStep


class Position(NamedTuple):
    """Where a training stands: steps done, and the samples of the present epoch that are consumed."""

    steps: int = 0
    epoch: int = 0
    sample: int = 0


def training_state(step: TrainStep, config: TrainConfig, environment: dict, position: Position) -> dict:
    """All that an exact resume needs, as plain values and tensors; weights in float32 always.

    config is the request, environment what this machine made of it.
    """
    return {
        "config": config.to_dict(),
        "environment": environment,
        "step": position.steps,
        "generator": full_precision(step.generator, step.gen_optimizer),
        "discriminator": full_precision(step.discriminator, step.disc_optimizer),
        "gen_optimizer": step.gen_optimizer.state_dict(),
        "disc_optimizer": step.disc_optimizer.state_dict(),
        "loss_scale": None if step.loss_scale is None else step.loss_scale.state_dict(),
        "dropout_rng": step.generator.rng,
        "data": {"epoch": position.epoch, "position": position.sample},
    }


def full_precision(network: nn.Module, optimizer: MasterAdam) -> dict[str, Tensor]:
    """The network's ``state_dict`` with the optimizer's masters in place of 16-bit weights."""
    masters = dict(zip(dict(network.named_parameters()), optimizer.masters(), strict=True))
    return {**network.state_dict(), **masters}


def check_architecture(config: TrainConfig, state: dict, path: Path) -> None:
    """Raise UserError when the checkpoint at ``path`` is of other networks than ``config``'s."""
    for field in ARCHITECTURE:
        mine, theirs = getattr(config, field), state["config"][field]
        if mine != theirs:
            raise UserError(
                f"--{field} {mine}: {path} was trained with {theirs}; drop the flag, or start another run "
                "with another --name"
            )


def restore(step: TrainStep, state: dict) -> Position:
    """Set ``step`` to a checkpoint's ``training_state``, and return where it stands."""
    step.generator.load_state_dict(state["generator"])
    step.discriminator.load_state_dict(state["discriminator"])
    step.gen_optimizer.load_state_dict(state["gen_optimizer"])
    step.disc_optimizer.load_state_dict(state["disc_optimizer"])
    if step.loss_scale is not None and state["loss_scale"] is not None:
        step.loss_scale.load_state_dict(state["loss_scale"])
    step.generator.rng.copy_(state["dropout_rng"])
    return Position(state["step"], state["data"]["epoch"], state["data"]["position"])

"""Train pix2pix (Isola et al., CVPR 2017) as fast as the hardware allows, and use what was trained:

model = fastpix2pix.load("checkpoints/facades")
photo = model(Image.open("labels.png"))

Parts for other people's code: the networks, ``TrainStep``, ``accelerate``, ``MasterAdam``, ``PatchGANLoss``;
``docs/api.md`` describes them.
"""

import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

# As a command (python -m fastpix2pix.train): no signal during the imports, or later, makes a traceback.
if sys.argv[:1] == ["-m"]:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import_module("fastpix2pix.signals").end_with_a_line()

if TYPE_CHECKING:
    from fastpix2pix.acceleration import accelerate
    from fastpix2pix.config import TrainConfig
    from fastpix2pix.losses import PatchGANLoss
    from fastpix2pix.models import NetworkOptions, PatchDiscriminator, UNetGenerator
    from fastpix2pix.training.objective import Objective
    from fastpix2pix.training.optim import MasterAdam
    from fastpix2pix.training.options import StepOptions
    from fastpix2pix.training.step import TrainStep
    from fastpix2pix.translator import load

__version__ = "0.1.0"

__all__ = [
    "MasterAdam",
    "NetworkOptions",
    "Objective",
    "PatchDiscriminator",
    "PatchGANLoss",
    "StepOptions",
    "TrainConfig",
    "TrainStep",
    "UNetGenerator",
    "__version__",
    "accelerate",
    "load",
]

_HOMES = {
    "MasterAdam": "fastpix2pix.training.optim",
    "NetworkOptions": "fastpix2pix.models",
    "Objective": "fastpix2pix.training.objective",
    "PatchDiscriminator": "fastpix2pix.models",
    "PatchGANLoss": "fastpix2pix.losses",
    "StepOptions": "fastpix2pix.training.options",
    "TrainConfig": "fastpix2pix.config",
    "TrainStep": "fastpix2pix.training.step",
    "UNetGenerator": "fastpix2pix.models",
    "accelerate": "fastpix2pix.acceleration",
    "load": "fastpix2pix.translator",
}

_CLONE = Path(__file__).parents[1]
if not (Path(__file__).parent / "kernels").is_dir() and (_CLONE / "kernels" / "launch.py").is_file():
    __path__.append(str(_CLONE))  # in a clone, kernels/ lies beside this folder; setup.py maps it in a wheel


if not TYPE_CHECKING:  # a checker that saw it would take every name for one of ours

    def __getattr__(name: str):
        """What ``__all__`` names, imported when it is asked for: ``import fastpix2pix`` alone stays quick."""
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

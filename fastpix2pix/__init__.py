"""Train pix2pix (Isola et al., CVPR 2017) as fast as the hardware allows, and use what was trained:

model = fastpix2pix.load("checkpoints/facades")
photo = model(Image.open("labels.png"))

Parts for other people's code: ``TrainStep``, ``accelerate``, ``MasterAdam``, ``PatchGANLoss``.
"""

from importlib import import_module

_HOMES = {
    "load": "fastpix2pix.translator",
    "TrainStep": "fastpix2pix.step",
    "accelerate": "fastpix2pix.acceleration",
    "MasterAdam": "fastpix2pix.optim",
    "PatchGANLoss": "fastpix2pix.losses",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """What ``__all__`` names, imported when it is asked for: ``import fastpix2pix`` alone stays quick."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

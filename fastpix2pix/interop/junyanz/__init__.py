"""pytorch-CycleGAN-and-pix2pix: its weights in and out, and its programs on our backend.

    python -m fastpix2pix.interop.junyanz train.py --dataroot ./datasets/facades --model pix2pix ...

runs that repository's unchanged ``train.py`` (or ``test.py``) with our networks and our training step behind
its ``Pix2PixModel``. ``install()`` does the same from inside a program.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fastpix2pix.interop.junyanz.weights import export_weights, load_weights, read_generator

if TYPE_CHECKING:
    from fastpix2pix.interop.junyanz.backend import install

__all__ = ["export_weights", "install", "load_weights", "read_generator"]


def __getattr__(name: str):
    """``install`` is imported when it is asked for, with all of training; weights need none of it."""
    if name == "install":
        return import_module("fastpix2pix.interop.junyanz.backend").install
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

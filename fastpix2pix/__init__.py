"""Train pix2pix (Isola et al., CVPR 2017) as fast as the hardware allows, and use what was trained:

model = fastpix2pix.load("checkpoints/facades")
photo = model(Image.open("labels.png"))
"""

__all__ = ["load"]


def __getattr__(name: str):
    """``load``, imported when it is asked for: ``import fastpix2pix`` alone stays quick."""
    if name == "load":
        from fastpix2pix.translator import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

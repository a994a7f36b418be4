"""The portable loader's worker processes."""

import gc
import os

import numpy as np
from PIL import Image

from fastpix2pix.data import LoaderOptions, open_loader


def test_garbage_is_collected_before_workers_are_forked(tmp_path):
    """Collected in a worker, a forgotten DALI pipeline hangs it."""
    (tmp_path / "train").mkdir()
    for i in range(2):
        Image.fromarray(np.full((8, 16, 3), i, np.uint8)).save(tmp_path / "train" / f"{i}.png")
    collected_by = []

    class Forgotten:
        def __init__(self):
            self.itself = self

        def __del__(self):
            collected_by.append(os.getpid())

    gc.disable()
    try:
        Forgotten()
        options = LoaderOptions(loader="portable", load_size=8, crop_size=8, num_threads=1)
        loader = open_loader(tmp_path, options)
        next(loader.stream())
        assert collected_by == [os.getpid()] and gc.get_freeze_count() == 0
    finally:
        gc.enable()
        loader.close()

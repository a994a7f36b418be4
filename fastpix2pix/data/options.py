"""How pairs of files become batches, as plain values."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fastpix2pix.data.resize import Interpolation
from fastpix2pix.errors import UserError

Direction = Literal["AtoB", "BtoA"]
Kind = Literal["dali", "portable"]
Requested = Literal["auto", "dali", "portable"]


@dataclass(frozen=True)
class LoaderOptions:
    """How pairs become batches. Raises ``UserError``, which calls fields by their command-line flags."""

    direction: Direction = "BtoA"
    """"AtoB" makes A, the left half, the source and B the target."""
    load_size: int = 286
    """Every half is resized to this size squared ..."""
    crop_size: int = 256
    """... and cropped to this one, by the decisions of :func:`epoch_plan`."""
    interpolation: Interpolation = "nearest"
    flip: bool = True
    shuffle: bool = True
    max_dataset_size: int | None = None
    """Only the first so many pairs are used."""
    batch_size: int = 1
    seed: int = 0
    loader: Requested = "auto"
    """Who decodes: NVIDIA DALI, or Pillow ("portable"); "auto" takes DALI where it works."""
    num_threads: int = 4
    """Threads (DALI) or processes (portable) that decode."""
    cache_bytes: int = 0
    """A data set whose resized pixels (8 bit) fit in here is decoded once and kept on the device."""
    chunk: int | None = None
    """Pairs that are decoded in one run, rounded down to whole batches: 64 on a GPU, 16 on the CPU."""
    rank: int = 0
    """Of ``ranks`` loaders that share the samples of every step, ``batch_size`` each, this is which."""
    ranks: int = 1

    def __post_init__(self):
        for name, least in {
            "load_size": 1,
            "crop_size": 1,
            "batch_size": 1,
            "num_threads": 1,
            "seed": 0,
            "rank": 0,
            "ranks": 1,
        }.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: give a number of at least {least}")
        if self.max_dataset_size is not None and self.max_dataset_size < 1:
            raise UserError(f"--max_dataset_size {self.max_dataset_size}: give a number of at least 1")
        for name, most in {"num_threads": 1024, "seed": 2**63 - 1}.items():
            if getattr(self, name) > most:
                raise UserError(f"--{name} {getattr(self, name)}: give a number of at most {most}")
        if self.load_size < self.crop_size:
            raise UserError(
                f"--load_size {self.load_size} is smaller than --crop_size {self.crop_size}: a crop does not "
                "fit; make load_size at least crop_size"
            )
        for name, choices in {"direction": Direction, "loader": Requested}.items():
            if getattr(self, name) not in get_args(choices):
                raise UserError(f"--{name} {getattr(self, name)}: give one of {', '.join(get_args(choices))}")

    def chunk_size(self, device: torch.device) -> int:
        """Pairs that are decoded in one run on ``device``."""
        chunk = self.chunk or (16 if device.type == "cpu" else 64)
        return max(1, chunk // self.batch_size) * self.batch_size

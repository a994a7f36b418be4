"""How pairs of files become batches, as plain values."""

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch

from fastpix2pix.data.resize import Interpolation
from fastpix2pix.data.sides import Range, Side, check_range
from fastpix2pix.errors import UserError

T = TypeVar("T")

Direction = Literal["AtoB", "BtoA"]
Kind = Literal["dali", "portable"]
Requested = Literal["auto", "dali", "portable"]


@dataclass(frozen=True)
class LoaderOptions:
    """How pairs become batches. Raises ``UserError``, which calls fields by their command-line flags."""

    direction: Direction = "BtoA"
    """"AtoB" makes A, the left half, the source and B the target."""
    input_nc: int = 3
    """Channels of the source ..."""
    output_nc: int = 3
    """... and of the target."""
    input_range: Range | None = None
    """The values of the source's files that become -1 and 1; of integers, by default, all that there are."""
    output_range: Range | None = None
    """The same of the target's."""
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
            "input_nc": 1,
            "output_nc": 1,
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

        for name, values in {"input": self.input_range, "output": self.output_range}.items():
            check_range(f"--{name}_range", values)

    @property
    def sides(self) -> tuple[Side, Side]:
        """What A and B have to be."""
        return oriented(
            Side("input", self.input_nc, self.input_range),
            Side("output", self.output_nc, self.output_range),
            self.direction,
        )

    def chunk_size(self, device: torch.device) -> int:
        """Pairs that are decoded in one run on ``device``."""
        chunk = self.chunk or (16 if device.type == "cpu" else 64)
        return max(1, chunk // self.batch_size) * self.batch_size


def oriented(a: T, b: T, direction: Direction) -> tuple[T, T]:
    """(source, target) of what belongs to A and to B; and (A, B) of source and target."""
    return (a, b) if direction == "AtoB" else (b, a)

"""The two sides of a pair, input and output: their channels, and how values in files become [-1, 1]."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastpix2pix.data.pictures import DTYPES, Header, can_hold, channels_in_words
from fastpix2pix.data.resize import Interpolation, resize
from fastpix2pix.errors import UserError

Name = Literal["input", "output"]
Range = tuple[float, float]

SUFFIXES = (".png", ".tif", ".npy")  # what results are written as


def check_range(flag: str, values: Range | None) -> None:
    """Raise UserError unless it is a lower and an upper end."""
    if values is not None and not (all(map(isfinite, values)) and values[0] < values[1]):
        raise UserError(f"{flag} {values[0]:g} {values[1]:g}: give two finite numbers, the lower one first")


@dataclass(frozen=True)
class Side:
    """What one side of pairs is.

    name: as in --input_nc and --output_nc. channels, range: what these and --input_range, --output_range
    say; range: the values in files that become -1 and 1, None: 0 and the largest of an integer type. dtype,
    suffix: how files hold it, which results are written as.
    """

    name: Name
    channels: int = 3
    range: Range | None = None
    dtype: str = "uint8"
    suffix: str = ".png"

    @property
    def plain(self) -> bool:
        """Whether all of it is 8-bit RGB, which is kept in 8 bits up to the network."""
        return (self.channels, self.range, self.dtype) == (3, None, "uint8")

    @property
    def kept_as(self) -> torch.dtype:
        """Of the images between decoding and the network."""
        return torch.uint8 if self.plain else torch.float32

    @property
    def limits(self) -> Range:
        """The values in files that become -1 and 1."""
        return self.range or (0.0, float(np.iinfo(self.dtype).max))

    @property
    def span(self) -> float:
        """The distance between the least and the greatest value, for metrics."""
        return self.limits[1] - self.limits[0]

    def check(self, path: object, header: Header) -> None:
        """Raise UserError unless a file can be this side's."""
        if not header.offers(self.channels):
            raise UserError(
                f"{path}: holds {header}, and the network's {self.name} has {self.channels}; train with "
                f"--{self.name}_nc {header.channels}, or give other files"
            )
        if header.dtype == "float32" and self.range is None:
            raise UserError(
                f"{path}: holds floating-point values; train with --{self.name}_range LOW HIGH, the values "
                "that become -1 and 1"
            )

    def kept(self, samples: np.ndarray) -> Tensor:
        """uint8, uint16 or float32 (height, width, channels) -> (1, height, width, channels): 8-bit RGB as it
        is, all else as float32 in [-1, 1], what lies outside the range at its ends."""
        if self.plain and samples.dtype == np.uint8:
            return torch.from_numpy(samples[None].copy())
        low, high = replace(self, dtype=str(samples.dtype)).limits
        scaled = (samples.astype(np.float32) - np.float32(low)) / np.float32((high - low) / 2) - np.float32(1)
        return torch.from_numpy(scaled.clip(-1, 1)[None])

    def restored(self, image: Tensor) -> np.ndarray:
        """(channels, height, width) in [-1, 1] -> (height, width, channels) of ``dtype``, values of files."""
        low, high = self.limits
        values = (image.detach().float().cpu() + 1) * ((high - low) / 2) + low
        if self.dtype != "float32":
            values = values.round().clamp(0, np.iinfo(self.dtype).max)
        return values.permute(1, 2, 0).numpy().astype(self.dtype)

    def resized(self, samples: np.ndarray, size: int, interpolation: Interpolation) -> np.ndarray:
        """``samples`` as a square of ``size``, in their own type and range, as training resizes them."""
        image = resize(self.kept(samples), size, interpolation)[0]
        if image.dtype == torch.uint8:
            return image.numpy()
        return replace(self, dtype=str(samples.dtype)).restored(image.permute(2, 0, 1))

    def alike(self, samples: np.ndarray) -> np.ndarray:
        """(height, width, channels) of another type in the type and range of this side."""
        if samples.dtype == self.dtype:
            return samples
        return self.restored(self.kept(samples)[0].permute(2, 0, 1))

    def of_file(self, header: Header, suffix: str) -> "Side":
        """This side as the file of ``header`` holds it, to be written as ``suffix`` where that can be."""
        suffix = suffix if can_hold(suffix, self.channels, header.dtype) else ".tif"
        if (header.dtype, suffix) == (self.dtype, self.suffix):
            return self  # of many pairs, in most cases
        return replace(self, dtype=header.dtype, suffix=suffix)

    # ---- as a run's checkpoint and an exported file record it

    @property
    def files(self) -> str:
        """How files hold it, e.g. "uint16 .tif"."""
        return f"{self.dtype} {self.suffix}"

    def record(self) -> dict[str, str]:
        """Range and files in words."""
        record = {f"{self.name}_files": self.files}
        if self.range is not None:
            record[f"{self.name}_range"] = "{} {}".format(*self.range)
        return record

    def recorded(self, record: Mapping[str, str]) -> "Side":
        """This side with what ``record`` says of it. Raises ValueError for what it never says."""
        range = self.range
        if low_high := record.get(f"{self.name}_range"):
            low, high = map(float, low_high.split(" "))
            range = low, high
        dtype, suffix = record.get(f"{self.name}_files", self.files).split(" ")
        scaled = dtype in DTYPES and (range is not None or dtype != "float32")
        if not scaled or suffix not in SUFFIXES or not can_hold(suffix, self.channels, dtype):
            raise ValueError(f"{self.name}_files: {dtype} {suffix}")
        return replace(self, range=range, dtype=dtype, suffix=suffix)

    def __str__(self) -> str:
        of = "" if self.range is None else f", {self.range[0]:g} to {self.range[1]:g}"
        return f"{channels_in_words(self.channels)} of {self.dtype}{of}"


def of_8_bits(name: Name, channels: int) -> Side:
    """A side of which nothing but the channels is known."""
    return Side(name, channels).of_file(Header((0, 0), channels, "uint8"), ".png")


def widest(sides: Iterable[Side]) -> Side:
    """The side that holds the values of all, which differ in nothing but their files: the first of the widest
    type."""
    return max(sides, key=lambda side: DTYPES.index(side.dtype))

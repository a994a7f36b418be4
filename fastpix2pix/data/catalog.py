"""The pix2pix data sets by name: where each is published, how it is paired, how large it is."""

from dataclasses import dataclass
from typing import Literal

BASE_URL = "https://efrosgans.eecs.berkeley.edu/pix2pix/datasets"


@dataclass(frozen=True)
class Dataset:
    """One published data set of side-by-side pairs.

    direction: the customary task, "AtoB" where the left half is the input, "BtoA" where the right one is.
    pairs: published number of pairs per split.
    size: (height, width) in pixels of one half.
    mebibytes: size of the published archive; twice as much bounds what a download or an extraction may write.
    note: what is on the left and on the right, and where it comes from.
    """

    name: str
    direction: Literal["AtoB", "BtoA"]
    pairs: dict[str, int]
    size: tuple[int, int]
    mebibytes: int
    note: str

    @property
    def url(self) -> str:
        return f"{BASE_URL}/{self.name}.tar.gz"

    @property
    def limit(self) -> int:
        """Bytes that neither the archive nor its contents may exceed; the JPEGs inside do not compress."""
        return 2 * self.mebibytes * 2**20


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="facades",
            direction="BtoA",
            pairs={"train": 400, "val": 100, "test": 106},
            size=(256, 256),
            mebibytes=29,
            note="photo | label map of its architecture, CMP Facades",
        ),
        Dataset(
            name="cityscapes",
            direction="BtoA",
            pairs={"train": 2975, "val": 500},
            size=(256, 256),
            mebibytes=99,
            note="street photo | label map, Cityscapes; licence: cityscapes-dataset.com",
        ),
        Dataset(
            name="maps",
            direction="AtoB",
            pairs={"train": 1096, "val": 1098},
            size=(600, 600),
            mebibytes=239,
            note="aerial photo | street map, scraped from Google Maps",
        ),
        Dataset(
            name="edges2shoes",
            direction="AtoB",
            pairs={"train": 49825, "val": 200},
            size=(256, 256),
            mebibytes=2048,
            note="edges | photo of a shoe, UT Zappos50K",
        ),
        Dataset(
            name="edges2handbags",
            direction="AtoB",
            pairs={"train": 138567, "val": 200},
            size=(256, 256),
            mebibytes=8192,
            note="edges | photo of a handbag, Amazon images of the iGAN project",
        ),
        Dataset(
            name="night2day",
            direction="AtoB",
            pairs={"train": 17823, "val": 10, "test": 2287},
            size=(256, 256),
            mebibytes=1946,
            note="the same place by night | by day, Transient Attributes",
        ),
    )
}

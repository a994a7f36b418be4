"""``python -m fastpix2pix.data``: check a folder of pairs, or download a data set by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastpix2pix import cli
from fastpix2pix.data.check import check
from fastpix2pix.data.download import fetch_dataset


@dataclass
class Check:
    """Decode and pair every file of a data set, and say what would be converted."""

    path: tyro.conf.Positional[Path]
    """Folder with train/ (and val/, test/)."""


@dataclass
class Download:
    """Download one of the pix2pix data sets, unless it is there already."""

    name: tyro.conf.Positional[str]
    """facades, cityscapes, maps, edges2shoes, edges2handbags or night2day."""
    folder: Path = Path("datasets")
    """Where the data set's own folder goes."""


def run(command: Check | Download) -> None:
    if isinstance(command, Check):
        check(command.path)
    else:
        print(fetch_dataset(command.name, command.folder))


Command = (
    Annotated[Check, tyro.conf.subcommand("check")] | Annotated[Download, tyro.conf.subcommand("download")]
)


def main(argv: list[str] | None = None) -> None:
    cli.run(Command, run, argv)


if __name__ == "__main__":
    main()

"""From a configuration dataclass to a command: typed flags, and one line for a user's mistake."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from fastpix2pix.errors import UserError

Config = TypeVar("Config")


def run(config_class: type[Config], command: Callable[[Config], None], argv: Sequence[str] | None = None) -> None:
    """Parse ``argv`` (default: the process's) into ``config_class`` and call ``command`` with it.

    Field names become ``--snake_case`` flags, as users of other pix2pix programs know them; the string
    below each field is its help. A ``UserError`` ends the process with one line on stderr and exit code
    2, the code that a bad flag gives too.
    """
    try:
        config = tyro.cli(
            config_class, args=argv, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,)
        )
        command(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

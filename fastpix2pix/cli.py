"""From a configuration dataclass to a command: typed flags, and one line for a user's mistake."""

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TypeVar

import tyro
from PIL import Image

from fastpix2pix.errors import UserError

Config = TypeVar("Config")


def run(
    config_class: type[Config],
    command: Callable[[Config], None],
    argv: Sequence[str] | None = None,
    *,
    default: Callable[[Sequence[str]], Config | None] = lambda argv: None,
) -> None:
    """Parse ``argv`` (default: the process's) into ``config_class`` and call ``command`` with it.

    Field names become ``--snake_case`` flags, as users of other pix2pix programs know them; the string
    below each field is its help. ``default`` may look at ``argv`` and return a configuration that supplies
    whatever no flag says. A ``UserError`` ends the process with one line on stderr
    and exit code 2, the code that a bad flag gives too; an interrupt ends it with 130.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are not in its encoding
    # Its error, at twice the size, is enough; which sizes fit is for the command to say.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        with _interrupts_as_exceptions():
            options: dict[str, Any] = {} if (found := default(argv)) is None else {"default": found}
            config = tyro.cli(
                config_class,
                args=argv,
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
                **options,
            )
            command(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _interrupts_as_exceptions() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in the body; a command's imports and its end are left to the system,
    which ends it without a traceback."""
    previous = signal.getsignal(signal.SIGINT)
    if previous != signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)

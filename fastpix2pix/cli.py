"""From a configuration dataclass to a command: typed flags, and one line for a user's mistake."""

import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import SequenceMatcher
from io import StringIO, TextIOWrapper
from typing import Any, TypeVar

import tyro
from PIL import Image

from fastpix2pix.errors import UserError

Config = TypeVar("Config")

LIKELY = 0.8
"""How alike (difflib's ratio) an unknown flag and one of ours are for the one to be taken for the other."""


def run(
    config_class: type[Config],
    command: Callable[[Config], None],
    argv: Sequence[str] | None = None,
    *,
    default: Callable[[Sequence[str]], Config | None] = lambda argv: None,
    habits: Callable[[Sequence[str]], tuple[list[str], list[str]]] = lambda argv: ([*argv], []),
    decide: Callable[[Callable[[], Config]], Config] = lambda parse: parse(),
    complain: Callable[[str], None] | None = None,
) -> None:
    """Parse ``argv`` (default: the process's) into ``config_class`` and call ``command`` with it.

    Field names become ``--snake_case`` flags, as users of other pix2pix programs know them; the string
    below each field is its help. ``default`` may look at ``argv`` and return a configuration that supplies
    whatever no flag says. ``habits`` turns flags of other programs in ``argv`` into ours, before anything
    else, and returns lines to say of them. ``decide`` calls the parser, or gets a configuration from
    elsewhere. A ``UserError`` ends the process with one line on stderr, or as ``complain`` says it, and exit
    code 2, the code that a bad flag gives too; an interrupt ends it with 130.
    """
    typed = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that are not in its encoding
    # Its error, at twice the size, is enough; which sizes fit is for the command to say.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    def parse() -> Config:
        words, lines = habits(typed)
        for line in lines:
            print(line)
        options: dict[str, Any] = {}
        if (found := default(words)) is not None:
            options = {"default": found}
            # Of a switch that is on already, tyro offers the one that turns it off alone.
            words = [word for word in words if getattr(found, _field(word), None) is not True]
        return _parse(config_class, words, _program(command), **options)

    try:
        with _interrupts_as_exceptions():
            command(decide(parse))
    except UserError as error:
        if complain is None:
            print(f"error: {error}", file=sys.stderr)
        else:
            complain(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _field(word: str) -> str:
    """The field that a word of the command line would be the flag of."""
    return word[2:].replace("-", "_") if word.startswith("--") else ""


def _program(command: Callable) -> str:
    """How the command is started, as people type it."""
    module = command.__module__
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        module = module if spec is None else spec.name
    return f"python -m {module.removesuffix('.__main__')}"


def _parse(config_class: type[Config], argv: Sequence[str], program: str, **options) -> Config:
    """``argv`` as a configuration. Raises UserError, which is one line where tyro prints a box of them."""
    told = StringIO()
    try:
        with redirect_stderr(told):
            return tyro.cli(
                config_class,
                args=argv,
                prog=program,
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help, which is on stdout
        raise UserError(f"{_what_is_wrong(told.getvalue())}; see {program} --help") from None


def _what_is_wrong(box: str) -> str:
    """The first paragraph of tyro's box, and the flag that it takes to be meant, where that is likely."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    if len(lines) > 1 and lines[1] and not lines[1].strip("-"):
        lines = lines[2:]  # the title, which in ASCII is no part of the frame
    rules = [i for i, line in enumerate(lines) if line and not line.strip("─-")]
    first = lines[: rules[0]] if rules else lines
    if "" in first:
        first = first[: first.index("")]
    meant = [line.split()[0] for line in lines[len(first) :] if line.startswith("--")]
    typed = re.search(r"nrecognized options: (--[\w-]+)", first[0])
    likeness = {flag: SequenceMatcher(None, typed[1], flag).ratio() for flag in meant if typed}
    best = max(likeness, key=likeness.__getitem__, default="")
    hint = f"; did you mean {best}?" if best and likeness[best] > LIKELY else ""
    return " ".join(first).rstrip(".") + hint


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

"""The exceptions that a user's own mistake may raise, and the want of memory in its many forms."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend.

    ``str(error)`` is one line that names the file or value, says what is wrong with it, and gives the
    remedy. Commands print it as ``error: ...`` and exit with 2; library callers may catch it. What a
    terminal could not show of a file's name, or would obey, is escaped.
    """

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the host or of a GPU, is what was missing."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


# Of PyTorch's allocator on a CPU; of the CUDA runtime, cuBLAS and cuDNN.
_NO_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def out_of_memory_is_one_line(remedy: str) -> Iterator[None]:
    """A UserError in the place of whatever says that memory is missing."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ [A-Za-z]+)", str(error))
        more = f", when {asked[1]} more were needed" if asked else ""
        raise UserError(f"out of memory{more}; {remedy}") from error


class NotFinite(UserError):
    """A training whose losses or weights are no numbers any more: its state is not worth saving."""

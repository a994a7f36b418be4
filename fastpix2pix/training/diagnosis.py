"""From an exception of CUDA, Triton or a compiler to one line with its cause and its remedy."""

import subprocess
import sysconfig
from pathlib import Path


def explain(error: BaseException) -> str:
    """The cause, and what mends it where that is known, in one line.

    Triton builds its launcher with the machine's C compiler at the first launch; slim images have neither a
    compiler nor Python's headers. What it raises has many types, so names and texts are looked at.
    """
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if "Failed to find C compiler" in text:
        return "Triton finds no C compiler for its launcher; install gcc"
    if isinstance(error, subprocess.CalledProcessError) or kind == "CalledProcessError":
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not headers.exists():
            return f"Triton's launcher does not compile, for {headers} is missing; install python3-dev"
        return f"Triton's launcher does not compile ({_short(text)}); see the compiler's own lines above"
    if kind == "OutOfResources":
        return f"a kernel needs more of this GPU than it has ({_short(text)}); please report it"
    if kind == "PTXASError":
        return f"ptxas refuses a kernel ({_short(text)}); update Triton"
    if kind == "CompilationError":
        return f"Triton does not compile a kernel ({_short(text)}); update Triton"
    if "no kernel image is available" in text:
        return "a library has no code for this GPU; install a PyTorch build that serves it"
    return f"{kind}: {_short(text)}" if text else kind


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."

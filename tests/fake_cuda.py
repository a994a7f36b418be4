"""Host code that drives GPUs, run without one: fake tensors on "cuda:0" and "cuda:1", a CPU build of torch.

``Machine.run(function, *arguments)`` calls ``function(watch, *arguments)`` in a process of its own, where
torch believes in two GPUs: tensors there have shapes, types and devices but no values, kernels are not
launched, streams and events are names. ``function`` is a module's own; it marks what matters by
``with watch("label"):``, and what went on inside each such section comes back as a ``Section``.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parent


class Transfer(NamedTuple):
    """One copy between devices. pinned: whether its host side is page-locked. where: the line that asked."""

    op: str
    source: str
    target: str
    non_blocking: bool
    pinned: bool
    elements: int
    where: str


class Launch(NamedTuple):
    """One Triton kernel. devices: of its tensors. current, stream: where Triton would enqueue it."""

    kernel: str
    devices: list[str]
    current: str
    stream: int


@dataclass
class Section:
    """What the host did.

    ops: calls of each operator below autograd. devices: tensors that they took or gave, by device.
    transfers: copies between devices. waits: what makes the host wait for the device, or read a value, with
    the line that asked. mixtures: operators on tensors of several devices at once. launches: of Triton
    kernels, in order. calls: of torch.cuda that name a device or a stream, as in "Stream cuda:1".
    """

    ops: dict[str, int]
    devices: dict[str, int]
    transfers: list[Transfer]
    waits: list[str]
    mixtures: list[str]
    launches: list[Launch]
    calls: list[str]


class Report(NamedTuple):
    """result: what the function returned, through JSON."""

    result: Any
    sections: dict[str, Section]


def missing() -> str | None:
    """Why there can be no fake GPU here, or None."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this build of torch has a CUDA of its own"
    return None if shutil.which("g++") else "no C++ compiler (g++)"


class Machine:
    """Where functions run; ``library`` is fake_cuda_hooks.cpp, compiled."""

    def __init__(self, library: Path):
        self.library = library

    @classmethod
    def build(cls, folder: Path) -> "Machine":
        import torch

        root = Path(torch.__file__).parent
        library = folder / "libfake_cuda.so"
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-Wall"]
        command += [f"-isystem{root / 'include'}", str(TESTS / "fake_cuda_hooks.cpp"), "-o", str(library)]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
        subprocess.run(command, check=True)
        return cls(library)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Report:
        """``function(watch, *arguments)`` on fake GPUs; arguments go through JSON.

        Raises AssertionError with the child's error output if it fails.
        """
        call = json.dumps([inspect.getfile(function), function.__name__, arguments])
        command = [sys.executable, str(TESTS / "fake_cuda_child.py"), str(self.library), call]
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        result, sections = json.loads(done.stdout.splitlines()[-1])
        return Report(result, {label: _section(values) for label, values in sections.items()})


def _section(values: dict[str, Any]) -> Section:
    values["transfers"] = [Transfer(*transfer) for transfer in values["transfers"]]
    values["launches"] = [Launch(*launch) for launch in values["launches"]]
    return Section(**values)

"""Fixtures shared by all tests: the real facades, where they exist; the golden numbers; Triton's device.

Triton decides when a kernel is defined whether it will be interpreted or compiled. Without a GPU this file
has them interpreted, in this process only: child processes (``python -m fastpix2pix...``) see the world as
users do. Ops on CPU tensors still take their reference, except in a test that asks for ``triton_device``.

The whole suite is shared by several processes, file by file (``-n 0``: one).
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Threads of processes that share cores wait for each other; the variable is for child processes as well.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(workers))))

import torch  # noqa: E402 (after the variable is set)


def _why_not_interpreted() -> str | None:
    """Why kernels can't run in Triton's interpreter here; None if they can."""
    try:
        triton, numpy = (tuple(map(int, version(package).split(".")[:2])) for package in ("triton", "numpy"))
    except PackageNotFoundError:
        return "Triton is not installed"
    if triton < (3, 7) and numpy >= (2, 4):
        return f"the interpreter of Triton {version('triton')} does not run with numpy {version('numpy')}"
    return None


NOT_INTERPRETED = None if torch.cuda.is_available() else _why_not_interpreted()
if not torch.cuda.is_available() and NOT_INTERPRETED is None:
    os.environ["TRITON_INTERPRET"] = "1"
from fastpix2pix import host_memory  # noqa: E402 (after the variable is set)
from fastpix2pix.kernels import language, launch  # noqa: E402

if language.INTERPRETING:
    language.triton.knobs.runtime.interpret = True  # for the rest of this process ...
os.environ.pop("TRITON_INTERPRET", None)  # ... and not for its children
launch.kernels_on_cpu = False
# A training keeps what it frees, until its process ends; of this process that would be everybody's memory.
host_memory.keep_freed_memory = lambda: None


def _patch_language_once_a_launch() -> None:
    """Spend the interpreter's time on kernels: it prepares triton.language anew for every helper function
    that a kernel calls, which is two thirds of a run, while once for each module and launch is enough.
    """
    from triton.runtime import interpreter

    patch, prepared = interpreter._patch_lang, set()

    class Prepared:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            prepared.clear()
            self.scope.restore()

    def patch_once(function):
        module = id(function.__globals__)
        if module not in prepared:
            prepared.add(module)
            return Prepared(patch(function))

    interpreter._patch_lang = patch_once


if language.INTERPRETING:
    _patch_language_once_a_launch()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Plain ``pytest`` runs in a process a core, at most four; what names files or tests runs in one, and so
    does everything where a GPU's memory would be shared."""
    if workers:
        return  # this is one of them
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    distributable = CORES > 1 and not torch.cuda.is_available() and config.pluginmanager.hasplugin("xdist")
    if whole and distributable and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = min(CORES, 4), "loadfile"


HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def facades() -> Path:
    """Folder with ``train/`` and ``test/`` of the real facades (photo left, label map right)."""
    path = Path(os.environ.get("FASTPIX2PIX_FACADES", HERE.parents[1] / "shared" / "facades"))
    if not path.is_dir():
        pytest.skip(f"{path} is absent; set FASTPIX2PIX_FACADES to use a copy elsewhere")
    return path


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """``golden(name)``: numbers that TensorFlow computed, from ``golden/<name>.json``."""
    return lambda name: json.loads((HERE / "golden" / f"{name}.json").read_text())


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Device on which every op runs its Triton kernels: compiled where there is a GPU, else interpreted."""
    if torch.cuda.is_available():
        return "cuda"
    if not language.INTERPRETING:
        pytest.skip(NOT_INTERPRETED)
    monkeypatch.setattr(launch, "kernels_on_cpu", True)
    return "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))

"""Compile a program's kernels in parallel, before the first step would compile them one after the other.

They go to Triton's cache on disk, where the launching process finds them. The key of an entry consists of
the kernel's source, its ``Variant``, the target, environment variables that Triton reads, and Triton itself:
it is the same in every process on a machine.

A worker is a plain subprocess and not one of multiprocessing, because the latter would first import the main
module of the program: torch, the data loaders and all.
"""

import os
import pickle
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from enum import Enum
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from subprocess import DEVNULL, PIPE, Popen
from typing import TYPE_CHECKING, Any

from fastpix2pix.kernels.variants import AbsentGPU, Variant

if TYPE_CHECKING:
    from fastpix2pix.kernels.launch import Launch

MIN_VARIANTS = 4
"""Variants for which a worker is started: it takes about as long to start as to compile one or two."""


class Outcome(Enum):
    COMPILED = "compiled"
    FOUND = "found in the cache"
    FAILED = "failed"


def precompile(
    launches: "Iterable[Launch]",
    device_capability: tuple[int, int],
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Put the kernels of ``launches`` into Triton's cache on disk; returns how many were compiled.

    launches: as ``launch.observed(..., run=False)`` collects them, with tensors of any device, meta included.
    device_capability: ``torch.cuda.get_device_capability()`` of the GPU that they will run on. workers: most
    processes to start, by default one for each CPU that this process may use. progress: called after each
    kernel with the number of those done and of all.

    Kernels in the cache are not compiled again; a file beside them tells when that is so of all, and no
    process is started. A kernel that does not compile is passed over: it will fail again when it is launched,
    and say why. Raises OSError if no process can be started.
    """
    variants = list(dict.fromkeys(launch.variant for launch in launches))
    variants = [variant for variant in variants if variant.module != "__main__"]  # workers have another
    receipt = _receipt(variants, device_capability)
    if receipt.exists() or not variants:
        return 0
    arch = 10 * device_capability[0] + device_capability[1]
    workers = min(workers or _usable_cpus(), -(-len(variants) // MIN_VARIANTS))
    pool, started, idle = ThreadPoolExecutor(workers), [], SimpleQueue()

    def compile_one(variant: Variant) -> Outcome:
        worker = idle.get()
        try:
            return worker.compile(variant)
        finally:
            idle.put(worker)

    try:
        for _ in range(workers):
            started.append(_Worker(arch))
            idle.put(started[-1])
        futures = [pool.submit(compile_one, variant) for variant in variants]
        for done, _ in enumerate(as_completed(futures), 1):
            if progress is not None:
                progress(done, len(variants))
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in started:
            worker.stop()
    outcomes = [future.result() for future in futures]
    if Outcome.FAILED not in outcomes:
        with suppress(OSError):
            receipt.touch()
    return outcomes.count(Outcome.COMPILED)


def _receipt(variants: Iterable[Variant], device_capability: tuple[int, int]) -> Path:
    """The file in Triton's cache that exists when all ``variants`` are there as well."""
    import triton

    modules = sorted({variant.module for variant in variants})
    sources = [Path(sys.modules[module].__file__).read_bytes() for module in modules]
    key = repr((triton.__version__, device_capability, sorted(map(repr, variants)), sources))
    return Path(triton.knobs.cache.dir) / f"fastpix2pix-{sha256(key.encode()).hexdigest()[:32]}"


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that compiles one variant at a time; it is replaced when it dies."""

    def __init__(self, arch: int):
        self._arch = arch
        self._process = self._start()

    def _start(self) -> Popen:
        code = "import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); "
        code += f"from {__name__} import serve; serve()"
        process = Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        self._send(process, sys.path)
        self._send(process, self._arch)
        return process

    @staticmethod
    def _send(process: Popen, value: Any) -> None:
        pickle.dump(value, process.stdin)
        process.stdin.flush()

    def compile(self, variant: Variant) -> Outcome:
        try:
            self._send(self._process, variant)
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.stop()
            self._process = self._start()
            return Outcome.FAILED

    def stop(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # a request that could not be sent
                pipe.close()
        self._process.wait()


# ------------------------------------------------------------------------------------- in a worker's process


def serve() -> None:
    """Read an architecture and variants from stdin, compile each, and answer on stdout."""
    from triton.runtime import driver

    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print must not go among the replies
    driver.set_active(AbsentGPU(pickle.load(requests)))
    while True:
        try:
            variant = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_compile(variant), replies)
        replies.flush()


def _compile(variant: Variant) -> Outcome:
    from triton import knobs

    hits = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        compiled = variant.compile()
    except Exception:
        return Outcome.FAILED
    if compiled is None:  # the kernel was defined for the interpreter
        return Outcome.FAILED
    with suppress(Exception):  # no C compiler, for instance; the launch will say so
        _build_launcher(compiled)
    return Outcome.FOUND if hits == [True] else Outcome.COMPILED


def _build_launcher(compiled: Any) -> None:
    """Triton before 3.7 compiles a launcher in C for each kernel's signature, and caches that too."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(compiled.src, compiled.metadata)

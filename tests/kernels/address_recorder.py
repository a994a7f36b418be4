"""Every address that a kernel's programs touch, under Triton's interpreter, checked launch by launch.

On a GPU the programs of a launch run at the same time and in any order, which the interpreter, running one
after the other, does not show. ``recorded`` notes what each program loads, stores and updates atomically
(masked-off lanes touch nothing) and reports

* a race: a byte that one program writes and another one touches. That all of them store the same value is
  no excuse: such a byte wants an atomic. Bytes that are only ever touched by atomics are none.
* a stray access: outside the elements of every tensor that the kernel was given;
* an undeclared access: a byte read (or written) of a tensor that the launch does not declare in ``reads``
  (or ``writes``); an atomic update counts as a write alone;
* an untrue declaration: elements of a declared tensor that no program reads (or writes). A single element
  that is declared as written may be left alone: it is a flag. So may what ``ONE_ROW`` names.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastpix2pix.kernels import launch
from fastpix2pix.kernels.launch import Launch

ONE_ROW = {("loss_row_write", "rows")}
"""Arguments of kernels that write one row of a ring buffer, found by a counter on the device."""


class Access(NamedTuple):
    """addresses: of the elements touched by one operation of one program. size: of an element, in bytes."""

    addresses: np.ndarray
    size: int
    program: int
    writes: bool
    atomic: bool


class Finding(NamedTuple):
    """kind: race, stray, undeclared read, undeclared write, never read or never written. argument: path of
    the tensor in the kernel's arguments, or where there is none "?". count: of bytes.
    """

    kernel: str
    kind: str
    argument: str
    count: int

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}, {self.count} bytes of {self.argument}"


@dataclass
class Recording:
    launches: Counter[str] = field(default_factory=Counter)
    programs: int = 0
    accesses: int = 0
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.launches.total()} launches of {len(self.launches)} kernels, {self.programs} programs, "
            f"{self.accesses} accesses, {len(self.findings)} findings"
        )


# --------------------------------------------------------------------------------------------- addresses


def element_addresses(tensor: Tensor) -> np.ndarray:
    """The address of every element."""
    size = tensor.element_size()
    addresses = np.full((1,) * tensor.ndim, tensor.data_ptr(), dtype=np.int64)
    for dim, (length, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = np.arange(length, dtype=np.int64) * (stride * size)
        addresses = addresses + steps.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return addresses.ravel()


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an argument, each with its path: ``masters.3``, ``x.pointer``."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for name, member in zip(names, value, strict=True):
            yield from tensors_in(member, f"{path}.{name}")


class Memory:
    """The bytes of all storages that a launch may touch, side by side; one mark a byte in each array."""

    def __init__(self, tensors: Sequence[Tensor], accesses: Sequence[Access]):
        sizes = [t.element_size() for t in tensors] + [access.size for access in accesses]
        self.grain = min(sizes)  # bytes that share a mark: accesses are aligned to their own size
        spans = {(s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
        starts, lengths = np.array(sorted(spans), dtype=np.int64).reshape(-1, 2).T
        self._starts, self._ends = starts, starts + lengths
        marks = -(-lengths // self.grain)
        self._first = np.cumsum(marks) - marks
        self.marks = int(marks.sum())

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Indices of the marks of elements at ``addresses``, -1 outside all storages."""
        if size > self.grain:
            within = np.arange(0, size, self.grain, dtype=np.int64)
            addresses = (addresses[:, None] + within).ravel()
        storage = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = (storage >= 0) & (addresses < self._ends[storage])
        place = self._first[storage] + (addresses - self._starts[storage]) // self.grain
        return np.where(inside, place, -1)

    def of(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """bool (marks,): which bytes are an element's of ``tensors``."""
        marked = np.zeros(self.marks, dtype=bool)
        for tensor in tensors:
            marked[self.places(element_addresses(tensor), tensor.element_size())] = True
        return marked


# -------------------------------------------------------------------------------------------- the check


def check(this: Launch, accesses: Sequence[Access]) -> list[Finding]:
    """What is wrong with one launch."""
    names = this.kernel.arg_names
    given = [pair for name, arg in zip(names, this.args, strict=False) for pair in tensors_in(arg, name)]
    reads, writes = ([t for t in some if t is not None] for some in (this.reads, this.writes))
    memory = Memory([*(tensor for _, tensor in given), *reads, *writes], accesses)

    toucher = np.full(memory.marks + 1, -1, dtype=np.int64)  # the last mark is for what lies outside
    shared, read, written, plain = (np.zeros(memory.marks + 1, dtype=bool) for _ in range(4))
    located = [(memory.places(access.addresses, access.size), access) for access in accesses]
    for place, access in located:
        toucher[place] = access.program
        (written if access.writes else read)[place] = True
        if not access.atomic:
            plain[place] = True
    for place, access in located:
        shared[place[toucher[place] != access.program]] = True
    stray = int(sum((place < 0).sum() for place, _ in located)) * memory.grain
    shared, read, written, plain = (marks[:-1] for marks in (shared, read, written, plain))

    owned = memory.of([tensor for _, tensor in given])
    may_read, may_write = memory.of(reads), memory.of(writes)
    must_write = memory.of([t for t in writes if t.numel() > 1])
    found = {
        "race": shared & written & plain,
        "stray": (read | written) & ~owned,
        "undeclared read": read & ~may_read & owned,
        "undeclared write": written & ~may_write & owned,
        "never read": may_read & ~read,
        "never written": must_write & ~written,
    }
    findings = [Finding(this.name, "stray", "?", stray)] if stray else []
    for kind, marks in found.items():
        for argument, tensor in given:
            mine = memory.of([tensor]) & marks if marks.any() else marks
            if kind == "never written" and (this.name, argument) in ONE_ROW:
                marks = marks & ~mine
            elif mine.any():
                findings.append(Finding(this.name, kind, argument, int(mine.sum()) * memory.grain))
                marks = marks & ~mine
        if marks.any():
            findings.append(Finding(this.name, kind, "?", int(marks.sum()) * memory.grain))
    return findings


# ------------------------------------------------------------------------------------------- the interpreter


@contextmanager
def _replaced(owner: type, **methods: Callable) -> Iterator[None]:
    """Methods of a class, each wrapped: the replacement gets the original first."""
    originals = {name: getattr(owner, name) for name in methods if hasattr(owner, name)}
    for name, original in originals.items():

        def wrapped(self, *args, original=original, method=methods[name]):
            return method(original, self, *args)

        setattr(owner, name, wrapped)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


@contextmanager
def recorded() -> Iterator[Recording]:
    """Checks every launch made inside; the recording is complete at the end. Not to be nested."""
    from triton.runtime.interpreter import InterpreterBuilder

    recording, pending = Recording(), []
    accesses: list[Access] = []
    program, atomic = -1, False

    def settle() -> None:
        if pending:
            recording.findings += check(pending.pop(), accesses)
        recording.accesses += sum(access.addresses.size for access in accesses)
        accesses.clear()

    def began(this: Launch) -> None:
        settle()
        pending.append(this)
        recording.launches[this.name] += 1

    def set_grid_idx(original, builder, x, y, z):
        nonlocal program
        _, ny, nz = builder.grid_dim
        program = (x * ny + y) * nz + z
        recording.programs += 1
        return original(builder, x, y, z)

    def note(pointers, mask, writes: bool) -> None:
        addresses = pointers.data if mask is None else pointers.data[mask.data]
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        flat = np.ravel(addresses).astype(np.int64)
        if flat.size:
            accesses.append(Access(flat, size, program, writes, atomic))

    def load(original, builder, pointers, mask, *rest):
        note(pointers, mask, writes=False)
        return original(builder, pointers, mask, *rest)

    def store(original, builder, pointers, value, mask, *rest):
        note(pointers, mask, writes=True)
        return original(builder, pointers, value, mask, *rest)

    def atomically(original, builder, *args):
        """Of an atomic that the interpreter makes of a load or a store."""
        nonlocal atomic
        atomic = True
        try:
            return original(builder, *args)
        finally:
            atomic = False

    def rmw(original, builder, operation, pointers, value, mask, *rest):
        atomically(lambda _: note(pointers, mask, writes=True), builder)
        return original(builder, operation, pointers, value, mask, *rest)

    def cas(original, builder, pointers, *rest):
        atomically(lambda _: note(pointers, None, writes=True), builder)
        return original(builder, pointers, *rest)

    with (
        _replaced(
            InterpreterBuilder,
            set_grid_idx=set_grid_idx,
            create_masked_load=load,
            create_masked_store=store,
            create_atomic_load=atomically,
            create_atomic_store=atomically,
            create_atomic_poll=atomically,
            create_atomic_rmw=rmw,
            create_atomic_cas=cas,
        ),
        launch.observed(began),
    ):
        yield recording
        settle()


@contextmanager
def in_order(order: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Programs of every launch run in the order that ``order`` gives for their number."""
    from triton.runtime.interpreter import InterpreterBuilder

    permutations: dict[int, Sequence[int]] = {}

    def set_grid_idx(original, builder, x, y, z):
        nx, ny, nz = builder.grid_dim
        if nx * ny * nz not in permutations:
            permutations[nx * ny * nz] = order(nx * ny * nz)
        index = int(permutations[nx * ny * nz][(x * ny + y) * nz + z])
        return original(builder, index // (ny * nz), index // nz % ny, index % nz)

    with _replaced(InterpreterBuilder, set_grid_idx=set_grid_idx):
        yield

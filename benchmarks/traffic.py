"""What a training step does to memory: every operator and kernel launch with its bytes, by kind of work.

    python -m benchmarks.traffic

A step is traced on the CPU as it would run on a GPU. Our kernels are asked for, and not run, so each launch
counts once with the tensors that it declares (tests hold those against what the kernels touch). PyTorch's
operators are caught by a dispatch mode, below autograd and autocast; convolutions are not computed, only
allocated, because their results don't matter. The same rules hold for our step and for the peers':

* ``operands``: each tensor that an operator reads or writes counts once. Views and allocations are free; a
  ``foreach`` or fused operator is one operator.
* ``moved``: what must cross the memory bus were nothing cached; a tensor that is updated in place counts
  twice. The roofline is made of these.
* ``launches``: kernels. An operator counts as one, a convolution's backward pass as one for each gradient.
  Of our own launches the grid is known too, and which of them the step sends to its second stream.

What is not seen: copies between memory formats inside a cuDNN convolution, other operators' further launches,
and what a launch reads again from a cache. All but the last favour the peers.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from benchmarks.peers import FUSED, PeerStep, Tuning
from benchmarks.workload import Workload
from fastpix2pix.kernels import deep_conv, launch
from fastpix2pix.models import build_networks
from fastpix2pix.models.blocks import Block
from fastpix2pix.training.distributed import Exchange
from fastpix2pix.training.precision import WORKING_TYPES
from fastpix2pix.training.step import TrainStep
from fastpix2pix.training.streams import SideStream

KINDS = ("convolution", "optimizer", "epilogue", "loss", "copy", "other")

# Name of an operator or kernel up to its first match here decides its kind; optimizers are found by their
# place in the source instead.
_KIND_OF_NAME = {
    "conv": "convolution",
    "norm_act": "epilogue",
    "gan_loss": "loss",
    "tanh_l1": "loss",
    "loss_row": "loss",
    "native_batch_norm": "epilogue",
    "leaky_relu": "epilogue",
    "relu": "epilogue",
    "threshold": "epilogue",
    "dropout": "epilogue",
    "bernoulli": "epilogue",
    "cat": "epilogue",
    "tanh": "loss",
    "binary_cross_entropy": "loss",
    "mean": "loss",
    "abs": "loss",
    "sgn": "loss",
    "copy": "copy",
    "clone": "copy",
    "fill": "copy",
    "zero": "copy",
    "ones": "copy",
    "new_zeros": "copy",
}


class Grid(NamedTuple):
    """programs: of one launch. warps: of one program. trips: see ``launch.Launch``."""

    programs: int
    warps: int
    trips: int


class Entry(NamedTuple):
    """One operator or launch.

    grid: of a launch of ours. aside: on the step's second stream. joined: how often that was joined before.
    """

    name: str
    kind: str
    operands: int
    moved: int
    flops: int
    launches: int = 1
    grid: Grid | None = None
    aside: bool = False
    joined: int = 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _identity(tensor: Tensor) -> tuple:
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _traffic(reads: list[Tensor], writes: list[Tensor]) -> tuple[int, int]:
    """(operands, moved) of an operation on these tensors."""
    read, written = ({_identity(t): _bytes(t) for t in tensors if t.numel()} for tensors in (reads, writes))
    return sum({**read, **written}.values()), sum(read.values()) + sum(written.values())


def _in_optimizer() -> bool:
    """Whether an optimizer's step is on the stack: torch's, or ours."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        ours = "fastpix2pix.training.optim", "fastpix2pix.kernels.adam"
        if module.startswith("torch.optim.") or module in ours:
            return True
        frame = frame.f_back
    return False


def _kind(name: str) -> str:
    if _in_optimizer():
        return "optimizer"
    return next((kind for part, kind in _KIND_OF_NAME.items() if part in name), "other")


class Trace(TorchDispatchMode):
    """Collects an ``Entry`` for every operator and launch inside ``with trace():``."""

    def __init__(self):
        super().__init__()
        self.entries: list[Entry] = []
        self.aside, self.joined = False, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self, launch.observed(self._on_launch, run=False):
            yield

    def _add(self, name: str, reads: list[Tensor], writes: list[Tensor], **details: Any) -> None:
        details = {"flops": 0, "aside": self.aside, "joined": self.joined, **details}
        self.entries.append(Entry(name, _kind(name), *_traffic(reads, writes), **details))

    def _on_launch(self, made: launch.Launch) -> None:
        reads, writes = ([t for t in tensors if t is not None] for tensors in (made.reads, made.writes))
        grid = Grid(made.programs, made.options.get("num_warps", _USUAL_WARPS), made.trips)
        self._add(made.name, reads, writes, grid=grid, flops=made.flops)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = _allocate(func, args) if name.startswith("convolution") else func(*args, **kwargs)
        if func.is_view or "empty" in name or name.startswith(_FREE):
            return result
        reads = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        writes = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            alias = argument.alias_info
            if alias is not None and alias.is_write and argument.name != _NOT_WRITTEN:
                writes += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        if name.startswith(_WRITE_ONLY):
            reads = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        launches = len(writes) if name == "convolution_backward" else 1
        self._add(name, reads, writes, flops=flops, launches=launches)
        return result


_USUAL_WARPS = 4
"""Of a Triton program whose launch does not say."""


_FREE = ("detach", "_local_scalar_dense", "_record_function")
"""Operators without work for the device."""

_WRITE_ONLY = ("copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_")
"""Operators whose first argument is written without being read."""

_NOT_WRITTEN = "grads"
"""Fused optimizers declare their gradients as written, which happens only where a grad_scale divides them."""


def _allocate(func: Callable, args: tuple) -> Any:
    """What a convolution returns, uncomputed: channels-last if one of its operands is, as from cuDNN."""
    on_meta = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args))
    last = any(_is_channels_last(t) for t in tree_leaves(args) if isinstance(t, Tensor))

    def allocate(like: Tensor) -> Tensor:
        result = torch.zeros(like.shape, dtype=like.dtype)
        return result.contiguous(memory_format=torch.channels_last) if last and like.ndim == 4 else result

    return tree_map_only(Tensor, allocate, on_meta)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


# ------------------------------------------------------------------------------------------------ steps

# On a GPU torch's Adam updates several tensors in an operator by itself.
PLAIN_ON_GPU = Tuning(adam=(("foreach", True),))
TUNED = Tuning(channels_last=True, autocast=torch.bfloat16, adam=FUSED)


def _images(workload: Workload, dtype: torch.dtype) -> list[Tensor]:
    image = torch.zeros(workload.batch_size, 3, workload.size, workload.size, dtype=dtype)
    return [image.contiguous(memory_format=torch.channels_last).clone() for _ in range(2)]


class Measures(NamedTuple):
    """What a step can be traced without, to see what it brings."""

    deep_convolutions: bool = True
    fused_update: bool = True
    split_masters: bool = True


def our_step(
    workload: Workload, precision: str, exchange: Exchange | None = None, *, split_masters: bool = True
) -> TrainStep:
    """Our step in ``precision``; exchange: of a rank among several."""
    networks = build_networks(workload.network_options())
    # Where kernels are asked for, the optimizers lay out masters as on a GPU.
    with launch.observed(lambda _: None, run=False) if split_masters else nullcontext():
        return TrainStep(*networks, workload.step_options(precision), exchange)


def trace_ours(
    workload: Workload,
    precision: str,
    measures: Measures | None = None,
    step: TrainStep | None = None,
    capability: tuple[int, int] = launch.TENSOR_CORES_SINCE,
) -> list[Entry]:
    """Our step in ``precision``, with the copies that bring a pair into the captured graph, as on a GPU of
    this compute capability. step: as of ``our_step``.
    """
    measures = Measures() if measures is None else measures
    step = our_step(workload, precision, split_masters=measures.split_masters) if step is None else step
    if not measures.fused_update:
        for block in step.generator.modules():
            if isinstance(block, Block):
                block.take_gradient = None
    dtype = WORKING_TYPES[precision]
    slots, images = _images(workload, dtype), _images(workload, dtype)
    trace = Trace()
    _mark(trace, step.side)
    with launch.assuming(capability), _set(deep_conv, "offered", measures.deep_convolutions), trace():
        torch._foreach_copy_(slots, images)
        step.body(*slots)
    return trace.entries


def _mark(trace: Trace, side: SideStream) -> None:
    """Let the trace see what the step sends to its second stream, and where that is joined."""
    fork, join = side.fork, side.join

    def fork_traced(work: Callable[[], None], uses: Iterable[Tensor]) -> None:
        trace.aside = True
        fork(work, uses)
        trace.aside = False

    def join_traced() -> None:
        join()
        trace.joined += 1

    side.fork, side.join = fork_traced, join_traced  # type: ignore[method-assign]


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def trace_peer(workload: Workload, tuning: Tuning) -> list[Entry]:
    """A peer's second step, when its optimizers have their state."""
    step = PeerStep(workload, tuning)
    images = _images(workload, torch.float32)
    trace = Trace()
    with trace():
        step(*images)
        trace.entries.clear()
        step(*images)
    return trace.entries


def trace_all(preset: str, batch_size: int = 1) -> dict[str, list[Entry]]:
    """Our step in bf16 and the peers', full networks at 256x256."""
    workload = Workload(preset=preset, batch_size=batch_size)
    return {
        "plain PyTorch": trace_peer(workload, PLAIN_ON_GPU),
        "tuned PyTorch": trace_peer(workload, TUNED),
        "fastpix2pix": trace_ours(workload, "bf16"),
    }


def summary(entries: list[Entry]) -> dict[str, dict[str, float]]:
    """Operators, launches, GB of operands, GB moved and GFLOP, by kind and in total."""
    rows = {kind: [entry for entry in entries if entry.kind == kind] for kind in KINDS}
    return {
        kind: {
            "operators": len(some),
            "launches": sum(entry.launches for entry in some),
            "operands_gb": sum(entry.operands for entry in some) / 1e9,
            "moved_gb": sum(entry.moved for entry in some) / 1e9,
            "gflop": sum(entry.flops for entry in some) / 1e9,
        }
        for kind, some in {**rows, "total": entries}.items()
    }


def largest(entries: list[Entry], count: int = 12) -> list[tuple[str, str, int, float]]:
    """(kind, name, times, GB of operands) of what moves most."""
    times, operands = Counter(), Counter()
    for entry in entries:
        times[entry.kind, entry.name] += 1
        operands[entry.kind, entry.name] += entry.operands
    return [(*key, times[key], total / 1e9) for key, total in operands.most_common(count)]


def main() -> None:
    for preset in ("tutorial", "junyanz"):
        for name, entries in trace_all(preset).items():
            print(f"\n{preset}, {name}: {'':14} operators  launches  operands GB  moved GB    GFLOP")
            for kind, row in summary(entries).items():
                print(
                    f"  {kind:40} {row['operators']:10} {row['launches']:9} {row['operands_gb']:12.3f} "
                    f"{row['moved_gb']:9.3f} {row['gflop']:8.1f}"
                )


if __name__ == "__main__":
    main()

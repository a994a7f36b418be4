"""The child process of fake_cuda.py: loads the hooks, then torch; runs one function; prints what it saw."""

import ctypes
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

hooks = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # torch looks for them once, while it is loaded
hooks.fake_cuda_exchange_stream.restype = ctypes.c_int64
hooks.fake_cuda_exchange_stream.argtypes = [ctypes.c_int, ctypes.c_int64]

import torch  # noqa: E402
from fake_cuda import Launch, Section, Transfer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402

aten = torch.ops.aten
LOOK = -1  # exchanging for it leaves the device or the stream as it was
READS_VALUES = {
    aten._local_scalar_dense.default: "a value is read",
    aten.nonzero.default: "the size of the result depends on values",
    aten.masked_select.default: "the size of the result depends on values",
    aten._unique2.default: "the size of the result depends on values",
    aten.equal.default: "a value is read",
    aten.is_nonzero.default: "a value is read",
}
CODE = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("fastpix2pix", "kernels", "tests")]


def where() -> str:
    """The innermost line of this project that is being run."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and any(path.startswith(folder) for folder in CODE):
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the project"


def perform(func, args, kwargs):
    """The operator on fake tensors."""
    if func not in (aten._fused_adam_.default, aten._fused_adam_.tensor_lr):
        return func(*args, **kwargs)
    # It gives nothing and knows no fake tensors. What its CUDA kernel takes (fused_adam_impl.cu):
    vectors = [tensor for tensors in args[:4] for tensor in tensors]
    scalars = [*args[5], *(kwargs.get(name) for name in ("lr", "grad_scale", "found_inf"))]
    scalars = [scalar for scalar in scalars if isinstance(scalar, Tensor)]
    if len({tensor.device for tensor in (*vectors, *scalars)}) > 1:
        raise RuntimeError("_fused_adam_: tensors of several devices")
    if vectors[0].is_cuda and any(scalar.dtype != torch.float32 for scalar in scalars):
        raise RuntimeError("_fused_adam_: on a GPU steps, lr, grad_scale and found_inf are read as float32")
    return None


class Recorder(TorchDispatchMode):
    """Notes what happens while a section is open."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: dict[str, Section] = {}
        self.open: list[Section] = []
        self._pinned = WeakIdKeyDictionary()

    @contextmanager
    def watch(self, label: str) -> Iterator[None]:
        section = Section(Counter(), Counter(), [], [], [], [], [])
        self.sections[label] = section
        self.open.append(section)
        try:
            yield
        finally:
            self.open.remove(section)

    def call(self, what: str, *, waits: bool = False) -> None:
        for section in self.open:
            section.calls.append(what)
            if waits:
                section.waits.append(f"{what} ({where()})")

    def launch(self, kernel: str, tensors: list[Tensor]) -> None:
        devices = sorted({str(tensor.device) for tensor in tensors})
        index = current_device()
        for section in self.open:
            section.launches.append(Launch(kernel, devices, f"cuda:{index}", stream_of(index)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim" or not self.open:
            result = perform(func, args, kwargs)
        else:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._note(func, args, kwargs, given)
            result = perform(func, args, kwargs)
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            for section in self.open:
                section.ops[str(func)] += 1
                section.devices.update(str(tensor.device) for tensor in (*given, *made))
        if kwargs.get("pin_memory"):
            self._pinned[result] = True
        return result

    def _note(self, func, args, kwargs, given: list[Tensor]) -> None:
        devices = sorted({str(tensor.device) for tensor in given})
        line = where()
        if func in (aten._to_copy.default, aten.copy_.default):
            self._transfer(func, args, kwargs, line)
        elif len(devices) > 1:
            for section in self.open:
                section.mixtures.append(f"{func} on {', '.join(devices)} ({line})")
        on_gpu = any(device.startswith("cuda") for device in devices)
        reason = READS_VALUES.get(func)
        if func in (aten.index.Tensor, aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            reason = "the number of elements depends on values"
        if reason and on_gpu:
            for section in self.open:
                section.waits.append(f"{func}: {reason} ({line})")

    def _transfer(self, func, args, kwargs, line: str) -> None:
        if func is aten.copy_.default:
            target, source = args[:2]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            there, host = target.device, target if target.device.type == "cpu" else source
        else:
            source, there = args[0], kwargs.get("device") or args[0].device
            non_blocking, host = kwargs.get("non_blocking", False), source
        if torch.device(there) == source.device:
            return
        pinned = host in self._pinned
        transfer = Transfer(
            str(func), str(source.device), str(there), non_blocking, pinned, source.numel(), line
        )
        for section in self.open:
            section.transfers.append(transfer)
            if not non_blocking:
                section.waits.append(f"{func}: a blocking copy, {source.device} to {there} ({line})")


recorder = Recorder()

# ---------------------------------------------------------------------------------- torch.cuda, by name only


def exchange_device(index: int) -> int:
    return hooks.fake_cuda_exchange_device(index)


def current_device() -> int:
    return exchange_device(LOOK)


def stream_of(index: int) -> int:
    return hooks.fake_cuda_exchange_stream(index, LOOK)


def index_of(device: Any) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current_device() if index is None else index


class Stream:
    """A stream that is its device and a number; 0 is the default stream."""

    _made = 0

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None):
        self.device = torch.device("cuda", index_of(device))
        if number is None:
            Stream._made += 1
            number = Stream._made
            recorder.call(f"Stream {self.device}")
        self.cuda_stream = self.stream_id = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.device, self.cuda_stream))

    def __str__(self) -> str:
        return f"{self.device} stream {self.cuda_stream}"

    def wait_stream(self, other: "Stream") -> None:
        recorder.call(f"wait_stream {self} for {other}")

    def wait_event(self, event: "Event") -> None:
        recorder.call(f"wait_event {self} for {event.stream}")

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        recorder.call(f"synchronize {self}", waits=True)


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any):
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        recorder.call(f"record {self.stream}")

    def wait(self, stream: Stream | None = None) -> None:
        recorder.call(f"wait_event {stream or current_stream()} for {self.stream}")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0

    def synchronize(self) -> None:
        recorder.call(f"synchronize event of {self.stream}", waits=True)


class CUDAGraph:
    """What is launched between begin and end is noted like everything else; replays are named."""

    capturing = False

    def capture_begin(self, *_: Any, **__: Any) -> None:
        CUDAGraph.capturing = True
        recorder.call(f"capture {current_stream()}")

    def capture_end(self) -> None:
        CUDAGraph.capturing = False

    def replay(self) -> None:
        recorder.call(f"replay {current_stream()}")

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def reset(self) -> None:
        pass


def current_stream(device: Any = None) -> Stream:
    index = index_of(device)
    return Stream(index, number=stream_of(index))


@contextmanager
def stream(entered: Stream | None) -> Iterator[None]:
    """As the real one, which makes the stream's device the current one too."""
    if entered is None:
        yield
        return
    device = hooks.fake_cuda_exchange_device(entered.device.index)
    previous = hooks.fake_cuda_exchange_stream(entered.device.index, entered.cuda_stream)
    try:
        yield
    finally:
        hooks.fake_cuda_exchange_stream(entered.device.index, previous)
        hooks.fake_cuda_exchange_device(device)


def set_device(device: Any) -> None:
    hooks.fake_cuda_exchange_device(index_of(device))
    recorder.call(f"set_device cuda:{current_device()}")


def set_stream(entered: Stream) -> None:
    hooks.fake_cuda_exchange_device(entered.device.index)
    hooks.fake_cuda_exchange_stream(entered.device.index, entered.cuda_stream)


PROPERTIES = SimpleNamespace(
    name="Fake GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32
)
FAKES = {
    "CUDAGraph": CUDAGraph,
    "graph_pool_handle": lambda: (0, 1),
    "Event": Event,
    "Stream": Stream,
    "current_device": current_device,
    "current_stream": current_stream,
    "default_stream": lambda device=None: Stream(index_of(device), number=0),
    "device_count": lambda: 2,
    "empty_cache": lambda: None,
    "get_arch_list": lambda: ["sm_90"],
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "init": lambda: None,
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: CUDAGraph.capturing,
    "is_initialized": lambda: True,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "set_device": set_device,
    "set_stream": set_stream,
    "stream": stream,
    "synchronize": lambda device=None: recorder.call(f"synchronize cuda:{index_of(device)}", waits=True),
    # Two functions of Python's, as torch.compile looks functions up in a table; those of ctypes have no hash.
    "_exchange_device": exchange_device,
    "_lazy_init": lambda: None,
    "_maybe_exchange_device": lambda index: exchange_device(index),
}


def replace_parameters(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """In place of ``Module._apply``, behind ``to``: fake tensors can't be exchanged inside a parameter."""
    for child in module.children():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else change(buffer)
    return module


def install() -> None:
    """Let ``torch.cuda`` name fake devices, and Triton launch nothing."""
    for name, fake in FAKES.items():
        setattr(torch.cuda, name, fake)
    torch._C._host_emptyCache = lambda: None
    torch.nn.Module._apply = replace_parameters
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return

    def run(kernel, *args, grid, warmup, **options):
        leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        recorder.launch(kernel.__name__, leaves)

    JITFunction.run = run


class FakeGpus(FakeTensorMode):
    avoid_device_init = True  # there is none, whatever torch.cuda.is_available says


def load(file: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def main(call: str) -> None:
    file, name, arguments = json.loads(call)
    install()
    function = load(file, name)
    with FakeGpus(), recorder:
        result = function(recorder.watch, *arguments)
    print(json.dumps([result, {label: vars(section) for label, section in recorder.sections.items()}]))


if __name__ == "__main__":
    main(sys.argv[2])

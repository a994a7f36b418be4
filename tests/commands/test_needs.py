"""What a training needs is estimated right, and refused in one line where it is not there; memory that runs
out later is one line too, with the state saved."""

import json
import math
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from tiny_run import SMALL, error_line, steps_saved, write_pairs

from fastpix2pix import checkpoint, needs, train, translate
from fastpix2pix.config import TrainConfig
from fastpix2pix.errors import UserError, is_out_of_memory
from fastpix2pix.free_memory import free_memory, in_words
from fastpix2pix.models import NetworkOptions, UNetGenerator, build_networks
from fastpix2pix.monitor import Monitor
from fastpix2pix.training.optim import MasterAdam

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------- the estimate


@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("more", [{}, {"netG": "unet_64", "n_layers_D": 1}, {"n_layers_D": 5}])
def test_parameters_are_counted_exactly(preset, norm, more):
    options = NetworkOptions(preset=preset, norm=norm, ngf=7, ndf=5, **more)
    networks = build_networks(options)
    assert needs.parameters(options) == sum(p.numel() for network in networks for p in network.parameters())


def test_counting_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    needs.parameters(NetworkOptions(ngf=4, ndf=4))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_the_size_of_a_checkpoint_is_known_before(run, tmp_path):
    code, _, _ = run("--steps", 1, "--ngf", 8, "--ndf", 8)
    assert code == 0
    size = checkpoint.latest(tmp_path / "run").stat().st_size
    options = tiny_config(ngf=8, ndf=8).network_options()
    assert needs.checkpoint_size(options) < size < 1.1 * needs.checkpoint_size(options)


MEASURED = """
import json, re, sys
import torch
import fastpix2pix.train
from fastpix2pix.config import TrainConfig
from fastpix2pix.models import build_networks
from fastpix2pix.training.prepare import prepare_step
config = TrainConfig(precision="fp32", **json.loads(sys.argv[1]))
torch.set_num_threads(1)
networks = build_networks(config.network_options())
size = config.crop_size
prepared = prepare_step(*networks, config.step_options(), torch.device("cpu"), image_size=size)
images = torch.rand(2, config.batch_size, 3, size, size).contiguous()
source, target = (half.contiguous(memory_format=torch.channels_last) for half in images)
for _ in range(2):
    prepared.run(source, target)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says about memory")
@pytest.mark.parametrize(
    "flags",
    [
        {"ngf": 8, "ndf": 8},
        {"preset": "junyanz", "ngf": 16, "ndf": 16, "batch_size": 4},
        {"ngf": 16, "ndf": 64, "batch_size": 2},
        {"netG": "unet_128", "crop_size": 128, "load_size": 128, "ngf": 64, "ndf": 16, "batch_size": 2},
    ],
)
def test_the_estimate_is_near_the_peak_of_a_training(flags):
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(flags)], capture_output=True, text=True, check=True
    )
    parts = needs.memory_parts(TrainConfig(**flags), CPU, "fp32")
    estimate = sum(part.size for part in parts if part.what != "pairs being decoded")  # there are none here
    assert 1 / needs.WITHIN < int(ended.stdout) / estimate < needs.WITHIN


# ---------------------------------------------------------------------------------------------- what there is


def plant(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


MACHINE = {"proc/meminfo": "MemTotal:  8000000 kB\nMemAvailable:  4000000 kB\nSwapFree:  1000000 kB\n"}
UNLIMITED = (
    "Limit                     Soft Limit           Hard Limit           Units\n"
    "Max data size             unlimited            unlimited            bytes\n"
    "Max address space         unlimited            unlimited            bytes\n"
)
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "900\n",
    "sys/fs/cgroup/a/memory.max": "2000000\n",
    "sys/fs/cgroup/a/memory.current": "1500000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 300000\nactive_file 7\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/c\n4:memory:/docker/abc\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",  # as a container sees it, which has no abc
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
    "sys/fs/cgroup/memory/memory.stat": "cache 3\ninactive_file 5\ntotal_inactive_file 100000\n",
}
LIMITED = {
    "proc/self/limits": UNLIMITED.replace(
        "Max address space         unlimited", "Max address space         9000000  "
    ),
    "proc/self/status": "Name:\tpython\nVmSize:\t    4000 kB\nVmData:\t    1000 kB\n",
}
DATA_LIMITED = {
    **LIMITED,
    "proc/self/limits": UNLIMITED.replace(
        "Max data size             unlimited", "Max data size             3000000  "
    ),
}


@pytest.mark.parametrize(
    ("files", "left", "whose"),
    [
        ({}, math.inf, "this machine"),
        (MACHINE, 5000000 * 1024, "this machine"),
        ({**MACHINE, **V2}, 800000, "cgroup"),
        ({**MACHINE, **V1}, 700000, "cgroup"),
        ({**MACHINE, **LIMITED}, 9000000 - 4000 * 1024, "ulimit"),
        ({**MACHINE, **DATA_LIMITED}, 3000000 - 1000 * 1024, "ulimit"),
        ({**MACHINE, "proc/self/limits": UNLIMITED}, 5000000 * 1024, "this machine"),
        ({**MACHINE, "proc/self/cgroup": "0::/\n"}, 5000000 * 1024, "this machine"),
        ({**MACHINE, **V2, "sys/fs/cgroup/a/memory.current": "9000000\n"}, 0, "cgroup"),
    ],
)
def test_the_least_of_machine_container_and_limits_counts(tmp_path, files, left, whose):
    plant(tmp_path, files)
    found, who = free_memory(CPU, tmp_path)
    assert found == left and whose in who


def test_a_gpu_is_asked_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    assert free_memory(torch.device("cuda", 1)) == (9 << 30, "GPU")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (5 << 20, "5 MiB"),
        (3 << 29, "1.5 GiB"),
        (5000 << 30, "5000 GiB"),
        (2**90, "10^18 GiB"),
        (10**400, "GiB"),
    ],
)
def test_sizes_for_people(size, words):
    assert words in in_words(size)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--ngf", 10_000_000], "lower --ngf or --ndf"),
        (["--ndf", 10**30], "lower --ngf or --ndf"),
        (["--load_size", 100_000], "lower --load_size"),
        (["--load_size", 10**12], "lower --load_size"),
        (["--print_freq", 10**12], "lower --print_freq"),
        (["--print_freq", "1e12"], "--print_freq"),
        (["--crop_size", 65536, "--load_size", 65536], "lower --batch_size, --crop_size"),
        (["--batch_size", 10**9], "lower --batch_size, --crop_size"),
        (["--seed", 10**30], "--seed"),
        (["--num_threads", 10**9], "--num_threads"),
        (["--n_layers_D", 10**9], "--n_layers_D"),
    ],
)
def test_absurd_values_are_refused_at_once(run, tmp_path, monkeypatch, flags, remedy):
    """Before data are looked at, and a network of that size is built."""
    monkeypatch.setattr(train, "data_folder", lambda config: pytest.fail("too late"))
    code, _, err = run("--steps", 1, *flags)
    assert code == 2 and remedy in error_line(err)
    assert not (tmp_path / "run").exists()


def test_a_batch_above_the_data_set_is_refused(run):
    code, _, err = run("--steps", 1, "--batch_size", 4)
    assert (
        code == 2 and error_line(err) == "error: --batch_size 4: the data set has 3 pairs; give at most that"
    )


def test_a_cache_above_what_there_is_is_refused(run, monkeypatch):
    there = sum(
        part.size for part in needs.memory_parts(tiny_config(ngf=4, ndf=4, load_size=32), CPU, "fp32")
    )
    monkeypatch.setattr(needs, "free_memory", lambda device: (there * 1.01, "a test"))
    monkeypatch.setattr("fastpix2pix.data.Loader.resized_bytes", 10 * there)
    code, _, err = run("--steps", 1, "--cache", 1000)
    assert code == 2 and "the cache of decoded pairs, and a test leaves" in error_line(err)
    assert error_line(err).endswith("lower --cache")
    assert run("--steps", 1, "--cache", 0)[0] == 0


def test_what_may_not_fit_is_said_and_tried(run, monkeypatch):
    there = sum(
        part.size for part in needs.memory_parts(tiny_config(ngf=4, ndf=4, load_size=32), CPU, "fp32")
    )
    monkeypatch.setattr(needs, "free_memory", lambda device: (there / 1.2, "a test"))
    code, out, _ = run("--steps", 1)
    assert code == 0 and out.count("warning: this training needs about") >= 1
    monkeypatch.setattr(needs, "free_memory", lambda device: (there / 1.4, "a test"))
    code, _, err = run("--steps", 1, "--name", "other")
    assert code == 2 and "mostly for the libraries, and a test leaves" in error_line(err)


def test_with_a_gpu_both_memories_are_checked(monkeypatch):
    """16-bit weights with their masters and moments need more than 32-bit ones."""
    there = {"cuda": 950 << 20, "cpu": 800 << 20}
    monkeypatch.setattr(needs, "free_memory", lambda device: (there[device.type], device.type))
    gpu = torch.device("cuda", 1)
    for precision, per_parameter in (("fp32", 16), ("bf16", 18)):
        weights, *_ = needs.memory_parts(TrainConfig(), gpu, precision)
        assert weights.size == 57183620 * per_parameter
    needs.check_memory(TrainConfig(), gpu, "bf16")
    with pytest.raises(UserError, match="what a step keeps, and cuda leaves 950 MiB; lower --batch_size"):
        needs.check_memory(TrainConfig(batch_size=64), gpu, "bf16")
    there["cpu"] = 500 << 20
    with pytest.raises(UserError, match="the libraries, and cpu leaves 500 MiB"):
        needs.check_memory(TrainConfig(), gpu, "bf16")


def test_a_disk_without_room_for_the_checkpoints_is_refused(run, tmp_path, monkeypatch):
    size = needs.checkpoint_size(tiny_config(ngf=4, ndf=4).network_options())
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: usage(2.5 * size))
    code, _, err = run("--steps", 9, "--save_latest_freq", 1, "--keep_checkpoints", 2)
    assert code == 2 and "left, and the checkpoints need" in error_line(err)
    assert run("--steps", 2, "--save_latest_freq", 1, "--keep_checkpoints", 2)[0] == 0  # two in all
    assert steps_saved(tmp_path / "run") == [1, 2]
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: usage(1.1 * size))  # beside these two
    assert run("--steps", 4, "--continue_train")[0] == 0


# --------------------------------------------------------------------------------------- memory that runs out

NO_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY = {
    "CPU": NO_MEMORY,
    "numpy": MemoryError("Unable to allocate 4.00 TiB for an array with shape (1, 2) and data type float64"),
    "CUDA": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity"
    ),
}


def failing(monkeypatch, owner: type, method: str, call: int, error: Exception) -> None:
    """The ``call``-th call of the method raises, when it has done its work."""
    original, calls = getattr(owner, method), []

    def fail(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(0)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(owner, method, fail)


@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_step_that_runs_out_of_memory_is_taken_back_and_the_one_before_saved(run, tmp_path, kind, preset):
    """Though the generator has counted its dropout and updated its statistics; going on is exact."""
    flags = ["--steps", 6, "--preset", preset, "--batch_size", 2]
    assert run(*flags, "--name", "undisturbed")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, UNetGenerator, "before_tanh", 4, OUT_OF_MEMORY[kind])
        code, _, err = run(*flags)
    assert code == 2 and error_line(err).startswith("error: out of memory")
    assert "--batch_size" in error_line(err) and steps_saved(tmp_path / "run") == [3]
    assert run("--continue_train")[0] == 0
    wanted, found = (checkpoint.load(checkpoint.latest(tmp_path / name)) for name in ("undisturbed", "run"))
    for network in ("generator", "discriminator"):
        assert all(torch.equal(value, found[network][name]) for name, value in wanted[network].items())
    assert torch.equal(wanted["dropout_rng"], found["dropout_rng"])


def test_a_step_that_has_moved_a_weight_is_not_saved(run, tmp_path, monkeypatch):
    failing(monkeypatch, MasterAdam, "step_parameters", 5, NO_MEMORY)
    code, _, err = run("--steps", 6, "--save_latest_freq", 2)
    assert code == 2 and error_line(err).startswith("error: out of memory")
    assert steps_saved(tmp_path / "run") == [2] and "is saved" not in err


def test_samples_that_run_out_of_memory_end_with_the_state_saved(run, tmp_path, monkeypatch):
    failing(monkeypatch, Monitor, "show_samples", 1, NO_MEMORY)
    code, _, err = run("--steps", 6, "--display_freq", 3)
    assert code == 2 and error_line(err).startswith("error: out of memory")
    assert steps_saved(tmp_path / "run") == [3]


def test_only_want_of_memory_is_called_so():
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(
        ValueError("out of memory")
    )


def test_translating_what_memory_does_not_hold_is_one_line(tmp_path, dataroot, monkeypatch, capsys):
    config = tiny_config(ngf=4, ndf=4, n_layers_D=1)
    networks = build_networks(config.network_options())
    weights = dict(zip(("generator", "discriminator"), (n.state_dict() for n in networks), strict=True))
    checkpoint.save(tmp_path / "old", 1, {"config": config.to_dict(), "step": 1, **weights}, keep=1)
    failing(monkeypatch, UNetGenerator, "before_tanh", 2, NO_MEMORY)
    flags = ["--run", tmp_path / "old", "--input", dataroot / "train", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        translate.main([*map(str, flags)])
    line = error_line(capsys.readouterr().err)
    assert stop.value.code == 2 and "out of memory, when 4398046511104 bytes more were needed; " in line
    assert "--resize" in line and not (tmp_path / "out").exists()


LIMITS_ITSELF = """
import resource, sys
from fastpix2pix import host_memory, train
from fastpix2pix.monitor import Monitor
host_memory.HEAP = 0  # else the heap has room enough
stepped = Monitor.stepped
def limiting(self):
    stepped(self)
    if self.bar.n == 3:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), -1))
        self.hold = [bytearray(1 << 16) for _ in range(4)]
        from fastpix2pix.models import generator
        forward = generator.UNetGenerator.before_tanh
        def greedy(network, source):
            source.new_empty(1 << 28)  # what another program has taken
            return forward(network, source)
        generator.UNetGenerator.before_tanh = greedy
Monitor.stepped = limiting
train.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit that Linux enforces")
def test_memory_that_really_runs_out(tmp_path):
    data = write_pairs(tmp_path / "pairs")
    flags = [
        *SMALL,
        "--dataroot",
        str(data),
        "--checkpoints_dir",
        str(tmp_path),
        "--name",
        "run",
        "--steps",
        "9",
    ]
    ended = subprocess.run([sys.executable, "-c", LIMITS_ITSELF, *flags], capture_output=True, text=True)
    assert ended.returncode == 2 and error_line(ended.stderr).startswith(
        "error: out of memory, when 1073741824 "
    )
    assert steps_saved(tmp_path / "run") == [3]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit that Linux enforces")
def test_a_limit_of_the_shell_is_seen(tmp_path):
    data = write_pairs(tmp_path / "pairs")
    flags = [
        *SMALL,
        "--dataroot",
        str(data),
        "--checkpoints_dir",
        str(tmp_path),
        "--ngf",
        "64",
        "--ndf",
        "64",
    ]
    command = [
        sys.executable,
        "-m",
        "fastpix2pix.train",
        *flags,
        "--batch_size",
        "3",
        "--print_freq",
        str(10**9),
    ]
    limited = ["sh", "-c", f"ulimit -v 12000000 && exec {' '.join(command)}"]
    ended = subprocess.run(limited, capture_output=True, text=True)
    line = error_line(ended.stderr)
    assert ended.returncode == 2 and re.search("the limit of this process .ulimit. leaves [0-9.]+ GiB", line)

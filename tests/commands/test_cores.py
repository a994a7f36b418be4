"""Threads follow what a process may use, not what the machine has."""

import os
from pathlib import Path

import pytest
import torch

from fastpix2pix import cores, train
from fastpix2pix.config import TrainConfig
from tests.tiny_run import SMALL, write_pairs


@pytest.fixture
def sixteen(monkeypatch):
    """An affinity mask of 16 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def machine(root: Path, groups: str, **files: str) -> Path:
    """A root folder with /proc/self/cgroup and the control files given by their paths ("__" for "/")."""
    for path, text in {"proc__self__cgroup": groups, **files}.items():
        file = root / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V1 = "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"sys__fs__cgroup__cpu.max": "max 100000"}, 16),
        ("0::/\n", {"sys__fs__cgroup__cpu.max": "400000 100000"}, 4),
        ("0::/\n", {"sys__fs__cgroup__cpu.max": "270000 100000"}, 2),
        ("0::/\n", {"sys__fs__cgroup__cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"sys__fs__cgroup__cpu.max": "6400000 100000"}, 16),
        ("0::/a/b\n", {"sys__fs__cgroup__a__cpu.max": "300000 100000"}, 3),
        (
            "0::/a/b\n",
            {f"sys__fs__cgroup__a{sub}__cpu.max": q for sub, q in (("", "9 1"), ("__b", "5 1"))},
            5,
        ),
        # The host's path, which the container does not see: its own limit is at the mount.
        ("0::/kubepods/pod7\n", {"sys__fs__cgroup__cpu.max": "200000 100000"}, 2),
        (
            V1,
            {
                "sys__fs__cgroup__cpu__docker__abc__cpu.cfs_quota_us": "600000",
                "sys__fs__cgroup__cpu__docker__abc__cpu.cfs_period_us": "100000",
            },
            6,
        ),
        (
            V1,
            {
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000",
            },
            16,
        ),
    ],
)
def test_quotas_of_control_groups_limit_the_cores(sixteen, tmp_path, groups, files, expected):
    assert cores.usable_cores(machine(tmp_path, groups, **files)) == expected


def test_a_machine_without_control_groups_has_its_affinity(sixteen, tmp_path):
    assert cores.usable_cores(tmp_path) == 16


def test_threads_are_those_asked_for_else_no_more_than_the_cores(threads, monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)
    torch.set_num_threads(8)
    cores.use_threads(None)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(2)  # OMP_NUM_THREADS=2
    cores.use_threads(None)
    assert torch.get_num_threads() == 2
    cores.use_threads(5)
    assert torch.get_num_threads() == 5


def test_beside_a_step_on_the_cpu_half_the_cores_decode(monkeypatch):
    for usable, expected in ((1, 1), (2, 1), (6, 3), (64, 4)):
        monkeypatch.setattr(cores, "usable_cores", lambda usable=usable: usable)
        assert cores.loader_threads(4) == expected


@pytest.mark.parametrize(
    ("threads", "got", "advice"),
    [
        (8, 7.5, None),
        (8, 5.0, None),
        (8, 4.1, "--threads 4 may"),
        (2, 0.4, "--threads 1 may"),
        (1, 0.3, None),
    ],
)
def test_a_busy_machine_is_told_to_use_fewer_threads(threads, got, advice):
    seconds = iter((100.0, 110.0))
    cpu_seconds = iter((7.0, 7.0 + 10 * got))
    share = cores.CoreShare(threads, wall=lambda: next(seconds), cpu=lambda: next(cpu_seconds))
    line = share.advice()
    assert line is None if advice is None else advice in line


def parsed(argv: list[str], monkeypatch) -> TrainConfig:
    configs: list[TrainConfig] = []

    def command(config: TrainConfig, ranks: object) -> None:
        configs.append(config)

    monkeypatch.setattr(train, "train", command)
    train.main(argv)
    return configs[0]


def test_quick_stands_for_flags_and_each_can_be_given_another_value(monkeypatch):
    assert parsed([], monkeypatch) == TrainConfig()
    quick = parsed(["--quick"], monkeypatch)
    assert (quick.ngf, quick.ndf, quick.steps, quick.display_freq) == (16, 16, 1500, 250)
    other = parsed(["--quick", "--ngf", "8", "--n_epochs", "2"], monkeypatch)
    assert (other.ngf, other.ndf, other.steps, other.n_epochs) == (8, 16, None, 2)
    assert "quick" not in quick.to_dict()


def test_the_start_line_says_both_kinds_of_threads(tmp_path, threads, capsys):
    root = write_pairs(tmp_path / "pairs")
    flags = ["--dataroot", str(root), "--checkpoints_dir", str(tmp_path), "--steps", "1"]
    train.main([*SMALL, *flags, "--threads", "1", "--num_threads", "3"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "pairs from" in line)
    assert "loader, 3 threads" in line and "fp32, 1 threads" in line

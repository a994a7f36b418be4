"""How launches are observed, and what the kernels compile to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpix2pix.kernels import launch, report
from fastpix2pix.kernels import norm_act as kernels
from fastpix2pix.kernels.reference import NormActConfig

pytestmark = pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
NO_IMAGE_WRITTEN = {"norm_act_statistics", "norm_act_backward_sums"}
"""What these write are partial sums, but for the backward pass of a layer without statistics."""


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, since kernels are interpreted in this one."""
    return subprocess.run(
        [sys.executable, "-m", "fastpix2pix.kernels.report", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def compile_all(file: Path, architectures, dtypes, layers=()) -> list[dict]:
    arguments = ["--json", str(file), "--arch", *map(str, architectures), "--dtype", *dtypes]
    done = command(*arguments, *(["--layer", *layers] if layers else []))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert {row["arch"] for row in rows} == set(architectures)
    assert {row["dtype"] for row in rows} == set(dtypes)
    assert all(row["kernel"] in done.stdout and row["label"] in done.stdout for row in rows)
    return rows


def check_norm_act(rows: list[dict]) -> None:
    rows = [row for row in rows if row["kernel"].startswith("norm_act")]
    assert len({row["kernel"] for row in rows}) == 6
    for row in rows:
        assert row["stack"] == 0, row
        assert row["load_bits"] == 128, row
        assert row["store_bits"] == 128 or row["kernel"] in NO_IMAGE_WRITTEN, row
        assert row["occupancy"] * report.MULTIPROCESSORS[row["arch"]].warps >= row["num_warps"], row


# One layer of each regime, the second with dropout: all six kernels of norm_act.
LAYERS = ("tutorial down 64x64x128", "junyanz up 16x16x512")


def test_kernels_compile_for_all_gpus_in_16_bit(tmp_path):
    check_norm_act(compile_all(tmp_path / "rows.json", ARCHITECTURES, ["bf16"], LAYERS))


def test_kernels_compile_in_fp32(tmp_path):
    check_norm_act(compile_all(tmp_path / "rows.json", [80], ["fp32"], LAYERS))


@pytest.mark.slow
def test_every_layer_compiles_for_all_gpus_in_all_types(tmp_path):
    rows = compile_all(tmp_path / "rows.json", ARCHITECTURES, list(report.DTYPES))
    check_norm_act(rows)
    assert not [row for row in rows if row["stack"]]


def test_refuses_to_report_on_interpreted_kernels():
    done = command(TRITON_INTERPRET="1")
    assert done.returncode == 1 and done.stderr.startswith("error: TRITON_INTERPRET is set")


def test_names_a_layer_that_there_is_not():
    done = command("--layer", "attention", "--arch", "80", "--dtype", "fp32")
    assert done.returncode == 1 and "no layer is called attention" in done.stderr


@pytest.mark.parametrize(
    "code, loads, stores",
    [
        ("LDG.E.128 R4, desc[UR4][R8.64] ;\n LDG.E R4 ;\n STG.E.64 desc[UR4][R2.64], R4 ;", 128, 64),
        ("@!P0 LDG.E.U16 R4, [R2] ;\n STG.E.U8.SYS [R2], R8", 16, 8),
        ("LDG.E.64.CONSTANT R4 ;\n STG.E [R2], R8", 64, 32),
        ("@%p1 ld.global.v4.b32 { %r1 };\n st.global.v2.b16 [ %rd1 ]", 128, 32),
        ("ld.global.b64 { %rd2 };\n st.shared.v4.b32 [%r1]", 64, 0),
    ],
)
def test_reads_the_widest_access(code, loads, stores):
    assert report._widest(code, r"LDG\.E|ld\.global") == loads
    assert report._widest(code, r"STG\.E|st\.global") == stores


@pytest.mark.parametrize(
    "arch, num_warps, registers, shared, occupancy, limit",
    [
        (80, 8, 32, 0, 1.0, "warps"),
        (80, 8, 64, 0, 0.5, "registers"),
        (80, 8, 65, 0, 0.375, "registers"),  # 72 registers are taken
        (86, 1, 32, 0, 16 / 48, "programs"),
        (90, 4, 32, 113 * 1024, 8 / 64, "shared memory"),  # each program takes one KiB more
        (70, 4, 32, 48 * 1024, 8 / 64, "shared memory"),
    ],
)
def test_occupancy(arch, num_warps, registers, shared, occupancy, limit):
    assert report._occupancy(arch, num_warps, registers, shared) == (occupancy, limit)


# ---------------------------------------------------------------------------------------- observed launches


def forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    config = NormActConfig(slope=0.2)
    return kernels.norm_act_forward(x, None, None, None, None, None, config, out).y


def image(*shape: int, device: str) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(device, memory_format=torch.channels_last)


def test_launches_are_seen_in_order_and_can_run_again(triton_device):
    x = image(1, 4, 40, 40, device=triton_device)
    launches = []
    with launch.observed(launches.append):
        y = forward(x)
    assert [this.name for this in launches] == ["norm_act_statistics", "norm_act_forward_apply"]
    x.copy_(image(1, 4, 40, 40, device=triton_device).flip(2) * 3 + 1)
    for this in launches:
        this.run()
    assert torch.equal(y, forward(x)), "the same tensors, computed again"
    assert len(launches) == 2, "nothing is seen outside"


def test_bytes_are_those_of_the_operands(triton_device):
    x = image(1, 12, 8, 8, device=triton_device)
    out = torch.zeros((1, 24, 8, 8), device=triton_device).to(memory_format=torch.channels_last)[:, :12]
    launches = []
    with launch.observed(launches.append):
        forward(x, out)
    (this,) = launches
    assert this.bytes_moved == 2 * 12 * 64 * 4 + 2 * 12 * 4  # x, y; mean and rstd; not the slice's neighbours


def test_planned_launches_compute_nothing():
    x = image(1, 12, 8, 8, device="cpu")
    out = torch.full_like(x, 7.0)
    launches = []
    with launch.observed(launches.append, run=False):
        forward(x, out)
    assert len(launches) == 1 and (out == 7.0).all()
    assert not launch.use_triton(x), "the CPU has its reference again"

"""What the kernels compile to, by the compile report: the launches of a real step of both presets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastpix2pix.kernels import report
from fastpix2pix.kernels.language import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
NO_IMAGE_WRITTEN = {"norm_act_statistics", "norm_act_backward_sums"}
"""These write partial sums, except in the backward pass of a layer without statistics."""


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command, in a process of its own: in this one kernels are interpreted."""
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
        # A thread that reads a full vector of fp32 partial sums has half a vector of 16-bit results.
        of_partials = row["label"].endswith(" sums")
        full = 64 if of_partials and row["dtype"] != "fp32" else 128
        assert row["store_bits"] >= full or row["kernel"] in NO_IMAGE_WRITTEN, row
        assert row["occupancy"] * report.MULTIPROCESSORS[row["arch"]].warps >= row["num_warps"], row


def check_deep_conv(rows: list[dict]) -> None:
    rows = [row for row in rows if row["kernel"].startswith("deep_conv_to")]
    assert len({row["kernel"] for row in rows}) >= 2 and min(row["arch"] for row in rows) >= 80
    for row in rows:
        assert row["stack"] == 0, row
        assert row["num_warps"] == 4, row
        assert row["load_bits"] == row["store_bits"] == 128, row
        assert row["registers"] <= 128, row
        if row["dtype"] != "fp32":
            newest = {90: "wgmma", 100: "tcgen05"}.get(row["arch"], "mma")
            assert row["tensor_cores"] == newest, row


# The smallest tile, which is the most latency-bound layer's, and the largest one.
DEEP_LAYERS = (
    "deep_conv_to_small tutorial 2x2x512",
    "deep_conv_to_big tutorial 2x2x512",
    "deep_conv_to_big tutorial 16x16x512",
)


def test_deep_convolutions_stream_weights_into_the_newest_tensor_cores(tmp_path):
    rows = compile_all(tmp_path / "rows.json", [80, 90, 100], ["bf16"], DEEP_LAYERS)
    check_deep_conv(rows)
    assert all(row["registers"] <= 80 for row in rows if " 2x2x512" in row["label"]), rows


def test_deep_convolutions_are_not_reported_on_where_they_are_not_used(tmp_path):
    """Beside them there are kernels for every architecture."""
    layers = [DEEP_LAYERS[0], "gan_loss_target junyanz"]
    rows = compile_all(tmp_path / "rows.json", [75, 80], ["bf16"], layers)
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        ("deep_conv_to_small", 80),
        ("gan_loss_target", 75),
        ("gan_loss_target", 80),
    }


# A layer of each regime, the first with a skip connection and the second with dropout: all six kernels.
LAYERS = (
    "norm_act_statistics tutorial 64x64x128",
    "tutorial 64x64x128 skip",
    "junyanz 16x16x512 dropout",
)


def test_kernels_compile_for_all_gpus_in_16_bit(tmp_path):
    check_norm_act(compile_all(tmp_path / "rows.json", ARCHITECTURES, ["bf16"], LAYERS))


def test_kernels_compile_in_fp32(tmp_path):
    check_norm_act(compile_all(tmp_path / "rows.json", [80], ["fp32"], LAYERS))


@pytest.mark.slow
def test_every_layer_compiles_for_all_gpus_in_all_types(tmp_path):
    rows = compile_all(tmp_path / "rows.json", ARCHITECTURES, list(report.DTYPES))
    check_norm_act(rows)
    check_deep_conv(rows)
    assert not [row for row in rows if row["stack"]]


# Layers as they go down, with a skip connection, and up, with dropout. Those of both presets have at most 16
# partial sums, or 4 of one gradient and 8 of the other.
SPLIT_LAUNCHES = """
import torch
from fastpix2pix.kernels.launch import observed
from fastpix2pix.kernels.norm_act import norm_act_backward, norm_act_forward
from fastpix2pix.kernels.reference import NormActConfig

def some(precision, layers):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    down, up = NormActConfig(slope=0.2, skip_slope=0.3), NormActConfig(slope=0.0, dropout=0.5)
    rng = torch.empty(2, dtype=torch.int64, device="meta")
    seen = []
    for side, channels, splits in layers:
        x, dskip = torch.empty(2, 1, side, side, channels, dtype=dtype, device="meta").movedim(-1, 2)
        sums = torch.empty(splits, side**2, 2 * channels, device="meta")[:, :, channels:]
        row = torch.empty(channels, device="meta")
        with observed(seen.append, run=False):
            for config in (down, up):
                y = norm_act_forward(x, row, row, row, row, rng, config, partials=sums)
                saved = x, row, row, y.mean, y.rstd, rng, config
                if config is up:
                    norm_act_backward(None, None, *saved, dy_partials=sums)
                    continue
                norm_act_backward(None, dskip, *saved, dy_partials=sums)
                norm_act_backward(None, None, *saved, dy_partials=sums, dskip_partials=sums)
    return [(f"launch {i}", launch) for i, launch in enumerate(seen)]

def one(precision):
    return some(precision, [(4, 512, 16)])

def every(precision):
    return some(precision, [(1, 512, 16), (2, 512, 16), (4, 512, 16), (8, 512, 16), (16, 512, 8)])
"""


def compile_split(folder: Path, which: str, architectures, dtypes) -> list[dict]:
    (folder / "split.py").write_text(SPLIT_LAUNCHES)
    numbers = "--arch", *map(str, architectures), "--dtype", *dtypes
    file = folder / "rows.json"
    done = command("--launches", f"split:{which}", "--json", str(file), *numbers, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert {row["kernel"] for row in rows} == {"norm_act_forward_whole", "norm_act_backward_whole"}
    return rows


def test_partial_sums_are_read_without_spills(tmp_path):
    for row in compile_split(tmp_path, "one", (80, 90), ["bf16"]):
        assert row["stack"] == 0 and row["load_bits"] == 128, row


@pytest.mark.slow
def test_partial_sums_are_read_without_spills_on_all_gpus(tmp_path):
    """Where there are any: our convolutions, which leave them, need tensor cores."""
    for row in compile_split(tmp_path, "every", ARCHITECTURES[2:], ["bf16", "fp32"]):
        assert row["stack"] == 0 and row["load_bits"] == 128, row
        assert row["occupancy"] * report.MULTIPROCESSORS[row["arch"]].warps >= row["num_warps"], row


def test_refuses_to_report_on_interpreted_kernels():
    done = command(TRITON_INTERPRET="1")
    assert done.returncode == 1 and done.stderr.startswith("error: TRITON_INTERPRET is set")


def test_names_a_layer_that_there_is_not():
    done = command("--layer", "attention", "--arch", "80", "--dtype", "fp32")
    assert done.returncode == 1 and "no launch is called attention" in done.stderr


def test_reports_on_the_launches_of_any_function(tmp_path):
    """Also a launch of one's own, here of a tensor that no network has."""
    (tmp_path / "my_step.py").write_text(
        "import torch\n"
        "from fastpix2pix.kernels.gan_loss import gan_loss\n"
        "from fastpix2pix.kernels.launch import observed\n"
        "def launches(precision):\n"
        "    logits = torch.empty(2, 1, 9, 9, device='meta', dtype={'bf16': torch.bfloat16}[precision])\n"
        "    seen = []\n"
        "    with observed(seen.append, run=False):\n"
        "        gan_loss(logits)\n"
        "    return [('mine 9x9', launch) for launch in seen]\n"
    )
    file = tmp_path / "rows.json"
    arguments = ["--launches", "my_step:launches", "--arch", "90", "--dtype", "bf16", "--json", str(file)]
    done = command(*arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())
    assert (row["kernel"], row["label"], row["programs"]) == ("gan_loss_both", "mine 9x9", 1)
    assert row["bytes_moved"] == (162 + 162 + 81) * 2 + 4 * 4  # logits, both gradients; four losses

    done = command("--launches", "my_step:none", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "my_step:none" in done.stderr and "MODULE:FUNCTION" in done.stderr


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
        (87, 8, 32, 0, 1.0, "warps"),  # as sm_86, whose multiprocessors hold 48 warps
    ],
)
def test_occupancy(arch, num_warps, registers, shared, occupancy, limit):
    assert report._occupancy(arch, num_warps, registers, shared) == (occupancy, limit)

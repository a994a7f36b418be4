"""The machine code of the fused update: the launches of both presets' deep layers, on every GPU it is for."""

import json
import re
import subprocess
import sys

import pytest

from fastpix2pix.kernels.language import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)


def compile_all(architectures, precisions) -> None:
    """In a process of its own: in this one kernels are interpreted. Prints a row for each compilation."""
    from triton.runtime import driver

    from fastpix2pix.kernels import report
    from fastpix2pix.kernels.launch import assuming
    from fastpix2pix.kernels.variants import AbsentGPU
    from fastpix2pix.training.precision import set_float32_math
    from fastpix2pix.training.trace import kernel_launches

    for precision in precisions:
        set_float32_math(precision)
        for arch in architectures:
            with assuming(divmod(arch, 10)):
                labelled = kernel_launches(precision.replace("tf32", "fp32"))
            variants = {this.variant: (label, this) for label, this in labelled if this.name == "deep_update"}
            driver.set_active(AbsentGPU(arch))
            for variant, (label, this) in variants.items():
                row = report.measure(report.Item(label, precision, variant, 1, this.bytes_moved), arch)
                code = variant.compile().asm
                streams = re.findall(
                    r"tt\.(?:load|store) .*: tensor<\d+x!tt\.ptr<f32>, (#\w+)>", code["ttgir"]
                )
                vectors = [
                    re.search(rf"^{name} = .*sizePerThread = \[(\d+)\]", code["ttgir"], re.M)[1]
                    for name in streams
                ]
                facts = {
                    "tile": [this.options["BLOCK_ROWS"], this.options["BLOCK_COLUMNS"]],
                    "instructions": re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", code["ptx"]),
                    "stream bits": sorted({32 * int(values) for values in vectors}),
                    "streams": len(streams),
                }
                print(json.dumps({**vars(row), **facts}))


def compiled(architectures, precisions) -> list[dict]:
    script = f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r}); "
    script += f"import {__name__} as m; m.compile_all({architectures!r}, {precisions!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    for row in rows:
        assert row["stack"] == 0, row
        large, fma = row["tile"] == [64, 64], row["arch"] < 80
        assert row["registers"] <= (128 if large or fma else 80), row
        # The gradient's, from the accumulator to the streams.
        assert row["conversions"] == 1, row
        assert row["stream bits"] == [128], row
        assert row["streams"] == (6 if row["dtype"] in ("tf32", "fp32") else 4), row
        assert row["load_bits"] == row["store_bits"] == 128, row
        expected = {"mma.sync"}
        if row["dtype"] == "fp32" or fma:
            expected = set()
        elif large and row["arch"] in (90, 100):
            expected = {"wgmma.mma_async" if row["arch"] == 90 else "tcgen05.mma"}
        assert set(row["instructions"]) == expected, row


def test_one_conversion_full_vectors_and_tensor_cores():
    rows = compiled([75, 90], ["bf16", "fp16"])
    check(rows)
    assert {tuple(row["tile"]) for row in rows if row["arch"] == 90} == {(32, 64), (64, 64)}
    assert {tuple(row["tile"]) for row in rows if row["arch"] == 75} == {(32, 64)}


@pytest.mark.slow
def test_one_conversion_full_vectors_and_tensor_cores_on_all_gpus():
    rows = compiled(list(ARCHITECTURES), ["bf16", "fp16", "tf32", "fp32"])
    check(rows)
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)

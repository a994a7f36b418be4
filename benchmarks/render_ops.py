"""Writes the tables of docs/ops/: launches and bytes, counted, and what ``benchmarks/results/`` measured.

python -m benchmarks.render_ops
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.render import circumstances, hardware, number, paragraph, table
from fastpix2pix.kernels import adam, deep_conv, gan_loss, launch, norm_act, tanh_l1
from fastpix2pix.kernels.reference import NormActConfig

PAGES = Path(__file__).resolve().parents[1] / "docs" / "ops"
BEGIN, END = "<!-- {}: begin (python -m benchmarks.render_ops) -->", "<!-- {}: end -->"
DTYPE = torch.bfloat16


def image(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="meta").contiguous(memory_format=torch.channels_last)


def vector(size: int) -> Tensor:
    return torch.empty(size, device="meta")


def counted(call: Callable[[], Any]) -> tuple[Any, str, str]:
    """What a call returns, and its launches and kB, each operand of a launch counted once."""
    made: list[launch.Launch] = []
    with launch.observed(made.append, run=False):
        result = call()
    return result, str(len(made)), number(sum(one.bytes_moved for one in made) / 1e3)


def norm_act_launches() -> str:
    rows = []
    for what, config, shape in (
        ("batch norm", NormActConfig(slope=0.2), (1, 64, 128, 128)),
        ("batch norm", NormActConfig(slope=0.2), (1, 512, 16, 16)),
        ("batch norm", NormActConfig(slope=0.2), (1, 512, 2, 2)),
        ("instance norm", NormActConfig(groups=4, slope=0.0), (4, 256, 64, 64)),
        ("running statistics", NormActConfig(training=False, slope=0.2), (1, 512, 16, 16)),
        ("bias, no norm", NormActConfig(norm=False, slope=0.2), (1, 64, 128, 128)),
    ):
        x, width = image(*shape), shape[1]
        parameters = vector(width), vector(width)
        running = (vector(width), vector(width)) if config.norm and config.groups == 1 else (None, None)
        made, *forward = counted(
            lambda x=x, p=parameters, r=running, c=config: norm_act.norm_act_forward(x, *p, *r, None, c)
        )
        _, *backward = counted(
            lambda x=x, p=parameters, m=made, c=config: norm_act.norm_act_backward(
                x, None, x, *p, m.mean, m.rstd, None, c
            )
        )
        rows.append((f"{what}, {'x'.join(map(str, shape))}", *forward, *backward))
    header = ("bf16", "launches forward", "kB", "launches backward", "kB")
    return table(header, rows)


def tanh_l1_launches() -> str:
    x, bias = image(1, 3, 256, 256), vector(3)
    _, *forward = counted(lambda: tanh_l1.tanh_l1_forward(x, bias, x))
    _, *backward = counted(lambda: tanh_l1.tanh_l1_backward(x, vector(1)[0], x, x, bias))
    header = ("bf16", "launches forward", "kB", "launches backward", "kB")
    return table(header, [("1x3x256x256", *forward, *backward)])


def gan_loss_launches() -> str:
    logits = torch.empty(2, 1, 30, 30, device="meta")
    _, *both = counted(lambda: gan_loss.gan_loss(logits))
    _, *one = counted(lambda: gan_loss.gan_target_loss(logits[:1], True))
    rows = [("gan_loss, [real; fake] of 30x30", *both), ("gan_target_loss, 30x30", *one)]
    return table(("fp32, losses and gradients", "launches", "kB"), rows)


def adam_launches() -> str:
    form, clock = adam.AdamForm(0.5, 0.999, 1e-7, True), adam.AdamClock.create(torch.device("meta"))
    rows = []
    for what, split, sizes in (
        ("bf16, split master, 512x512x4x4", True, [512 * 512 * 16]),
        ("fp16, copy of the master, 512x512x4x4", False, [512 * 512 * 16]),
        ("bf16, split masters, 20 of 512", True, [512] * 20),
    ):
        dtype = torch.bfloat16 if split else torch.float16
        parameters = [
            adam.AdamTensors(
                vector(size),
                vector(size),
                None if split else vector(size),
                vector(size).to(dtype),
                vector(size).to(torch.int16) if split else None,
            )
            for size in sizes
        ]
        grads = [vector(size).to(dtype) for size in sizes]
        _, *made = counted(lambda p=parameters, g=grads: adam.update(p, g, clock, form))
        rows.append((what, *made))
    return table(("moments in fp32", "launches", "kB"), rows)


def deep_conv_launches() -> str:
    weight = image(512, 512, 4, 4)
    rows = []
    for side in (8, 2):
        small, big = image(1, 512, side, side), image(1, 512, 2 * side, 2 * side)
        for what, call in (
            ("big to small", lambda big=big: deep_conv.deep_conv_small(big, weight)),
            ("small to big", lambda small=small: deep_conv.deep_conv_big(small, weight)),
            ("weight gradient", lambda small=small, big=big: deep_conv.deep_conv_weight(small, big)),
        ):
            _, *made = counted(call)
            rows.append((f"{what}, {side}x{side} and {2 * side}x{2 * side}", *made))
    return table(("bf16, weight 512x512x4x4", "launches", "kB"), rows)


def measured(what: str, words: str, rows: Callable[[dict[str, Any]], str]) -> str:
    parts = []
    for result in results.committed():
        if result["what"] == what:
            where = f"{hardware(result)} ({circumstances(result)})"
            said = f"Measured on {where}, medians of {result['conditions']['rounds']} rounds: {words}"
            parts += [paragraph(said), rows(result)]
    return "\n\n".join(parts) or "Not measured yet."


def accelerate_rows(result: dict[str, Any]) -> str:
    by_name: dict[str, dict[str, Any]] = {}
    for row in result["figures"]:
        by_name.setdefault(row["network"], {})[row["layout"]] = row
    header = ("network", "norms fused", "left", "contiguous, times as fast", "channels-last, times as fast")
    rows = []
    for name, layouts in by_name.items():
        one = layouts["contiguous"]
        ratios = (f"{layouts[layout]['cpu']:.2f}" for layout in ("contiguous", "channels-last"))
        rows.append((name, str(one["fused"]), str(one["left"]), *ratios))
    return table(header, rows)


def ops_rows(result: dict[str, Any]) -> str:
    header = ("forward and backward", "ms", "times as fast as torch", "as torch.compile")
    return table(
        header,
        [
            (
                f"{row['op']}, {row['shape']}, {row['layout']}",
                number(row["ms"]["fastpix2pix"]),
                *(f"{row['times_as_fast_as'][side]:.2f}" for side in ("torch", "torch.compile")),
            )
            for row in result["figures"]
        ],
    )


def tables() -> dict[tuple[str, str], str]:
    """By page and name."""
    networks = (
        "how many times as fast a forward and backward pass is accelerated, in CPU time of one thread, with "
        "16 channels in the first layer and 128 pixels a side (256 for the generator of PyTorch-GAN)."
    )
    ops = "CPU time of one thread, in turns with PyTorch's own layers and with torch.compile of them."
    return {
        ("norm_act.md", "launches"): norm_act_launches(),
        ("tanh_l1.md", "launches"): tanh_l1_launches(),
        ("gan_loss.md", "launches"): gan_loss_launches(),
        ("adam.md", "launches"): adam_launches(),
        ("deep_conv.md", "launches"): deep_conv_launches(),
        ("norm_act.md", "measured"): measured("ops", ops, ops_rows),
        ("accelerate.md", "measured"): measured("accelerate", networks, accelerate_rows),
    }


def rendered(page: str, text: str) -> str:
    """``text`` of ``page`` with its tables between their marks."""
    for (its_page, name), new in tables().items():
        if its_page == page:
            before, _, rest = text.partition(BEGIN.format(name))
            _, _, after = rest.partition(END.format(name))
            text = f"{before}{BEGIN.format(name)}\n\n{new}\n\n{END.format(name)}{after}"
    return text


def main() -> None:
    for page in sorted({page for page, _ in tables()}):
        path = PAGES / page
        path.write_text(rendered(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes what ``benchmarks/results/`` says into README's section on speed, and draws ``docs/speed.svg``.

    python -m benchmarks.render

Every figure in that section comes from there. Those of a model are called so.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import results

COUNTED = "H100"  # the GPU of the model whose 16-bit type is the one that operators are shown for
ROOT = Path(__file__).resolve().parents[1]
README, PLOT = ROOT / "README.md", ROOT / "docs" / "speed.svg"
BEGIN, END = "<!-- speed: begin (python -m benchmarks.render writes this part) -->", "<!-- speed: end -->"

Result = dict[str, Any]


# ------------------------------------------------------------------------------------------------- words


def hardware(result: Result) -> str:
    """Where a result comes from, in a few words."""
    environment = result["environment"]
    cpu, gpu = environment["cpu"], environment["gpu"]
    pytorch = f"PyTorch {environment['versions']['torch']}"
    if gpu is not None:
        limit = f", power limit {gpu['power.limit']}" if "power.limit" in gpu else ""
        return f"{gpu['name']}{limit}, {pytorch}, CUDA {gpu['cuda']}"
    return f"{cpu['threads']} of {cpu['cores']} cores of {cpu['name']} ({cpu['simd']}), {pytorch}"


def circumstances(result: Result) -> str:
    """Date and commit, and whether the machine had other work to do."""
    environment = result["environment"]
    cpu = environment["cpu"]
    busy = ""
    if cpu["load"] is not None and cpu["load"] > cpu["cores"] / 2:
        busy = f"; other programs kept the machine busy (load {cpu['load']}), which stretches every time"
    return f"{environment['date']}, commit {environment['commit']}{busy}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def images(result: Result) -> str:
    conditions = result["conditions"]
    preset, batch_size, side = (conditions[key] for key in ("preset", "batch_size", "pixels"))
    return f"{preset}, batch {batch_size}, {side}x{side}"


# ---------------------------------------------------------------------------------------------- sections


def comparison(result: Result) -> str:
    """One training step: contenders in turns."""
    rows = [
        (
            f"**{row['name']}**" if row["ours"] else row["name"],
            f"{row['ms']:.3g}",
            f"{row['over_plain']['wall']:.2f}",
            f"{row['over_tuned']['wall']:.2f}",
            f"{row['over_plain']['cpu']:.2f}",
            f"{row['over_tuned']['cpu']:.2f}",
        )
        for row in result["figures"]
    ]
    header = ("measured step", "ms", "x plain", "x tuned", "x plain, CPU time", "x tuned, CPU time")
    return (
        f"Measured: {images(result)}, on {hardware(result)} ({circumstances(result)}). Full networks, from "
        "the same weights, in turns in one process; medians of "
        f"{result['conditions']['rounds']} rounds, and how many times as fast within a round."
        f"\n\n{table(header, rows)}"
    )


def suite(result: Result) -> str:
    """Loader, epoch, first step and memory, from a run of the pytest suites."""
    rows = []
    for benchmark in result["benchmarks"]:
        extra, case = benchmark["extra_info"], benchmark["name"].partition("[")[2].rstrip("]")
        if "pairs_per_s" in extra:
            loader = f"loader alone, {case.replace('-', ', ', 1)}"
            rows.append((loader, f"{extra['pairs_per_s']:.3g} pairs/s"))
        if "waiting_for_data_share" in extra:
            share = f"{100 * extra['waiting_for_data_share']:.2f} %"
            rows.append((f"waiting for data, {benchmark['group']}, {case}", share))
        if "first_step_s" in extra:
            rows.append((f"from start to first step done, {case}", f"{extra['first_step_s']:.3g} s"))
            rows.append((f"peak memory of training, {case}", f"{extra['peak_memory_mb'] / 1e3:.2f} GB"))
    return (
        f"Measured around the step, on {hardware(result)} ({circumstances(result)}):\n\n"
        f"{table(('around the step', 'measured'), rows)}"
    )


def model(result: Result) -> str:
    """What the roofline says of four GPUs."""
    gpus, assumed = result["model"], result["assumed"]
    rows = [
        (
            f"**{name}**" if name == "fastpix2pix" else name,
            str(row["operators"]),
            f"{row['operands_gb']:.2f}",
            *(f"{gpu['steps'][name]['ms']:.2f}" for gpu in gpus.values()),
        )
        for name, row in gpus[COUNTED]["steps"].items()
    ]
    header = ("step", "operators", "GB", *(f"{name} (model), ms" for name in gpus))
    return (
        f"Counted and modelled, not measured: {images(result)}. Operators, and the bytes of their operands, "
        "are counted by tracing a step, plain PyTorch in fp32, the others in 16 bits. Milliseconds are a "
        "model: published bandwidth and arithmetic rates, every operand through memory, "
        f"{assumed['eager_operator_us']:g} us of the host for each operator of an eager step, "
        f"{assumed['captured_launch_us']:g} us between the launches of our captured one."
        f"\n\n{table(header, rows)}"
    )


def roofline(result: Result) -> str:
    """How far measured steps are from their floor; for results of a GPU."""
    rates = ", ".join(f"{name} {value:.0f}" for name, value in result["rates"].items())
    rows = [
        (row["name"], f"{row['ms']:.3g}", f"{row['floor_ms']:.3g}", f"{row['over_floor']:.2f}")
        for row in result["measured"]
    ]
    header = ("step", "ms, measured", "ms, model's floor", "measured / floor")
    return (
        f"Measured against the model's floor: {images(result)}, on {hardware(result)} "
        f"({circumstances(result)}); rates measured there: {rates}.\n\n{table(header, rows)}"
    )


def section(all_results: list[Result]) -> str:
    """The part of README between the two marks."""
    of = {what: [r for r in all_results if r["what"] == what] for what in ("comparison", "suite", "roofline")}
    parts = [comparison(result) for result in of["comparison"]]
    if not any(result["environment"]["gpu"] for result in of["comparison"]):
        parts.append("Nothing here was measured on a GPU yet.")
    parts += [roofline(result) for result in of["roofline"] if "measured" in result]
    parts += [model(result) for result in of["roofline"]]
    parts += [suite(result) for result in of["suite"]]
    parts.append(f"![The same as bars]({PLOT.relative_to(README.parent).as_posix()})")
    return "\n\n".join(parts)


def replaced(text: str, new: str) -> str:
    """``text`` with ``new`` between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


# -------------------------------------------------------------------------------------------------- plot


def ladders(all_results: list[Result]) -> list[tuple[str, list[tuple[str, float, bool]]]]:
    """For each panel its title, and (rung, ms, ours) from the top down."""
    panels = []
    for result in all_results:
        if result["what"] == "comparison":
            device = result["environment"]["gpu"] or result["environment"]["cpu"]
            rungs = [(row["rung"], row["ms"], row["ours"]) for row in result["figures"]]
            panels.append((f"measured: {images(result)}, {device['name']}", rungs))
    for result in all_results:
        if result["what"] == "roofline":
            for name, gpu in result["model"].items():
                rungs = [(who, row["ms"], who == "fastpix2pix") for who, row in gpu["steps"].items()]
                panels.append((f"model: {images(result)}, {name}", rungs))
    return panels


def plot(all_results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "fastpix2pix", "font.size": 9}
    panels = ladders(all_results)
    heights = [len(rungs) for _, rungs in panels]
    size = (8, 0.6 * len(panels) + 0.32 * sum(heights))
    figure, axes = pyplot.subplots(len(panels), figsize=size, height_ratios=heights, squeeze=False)
    for axis, (title, rungs) in zip(axes[:, 0], panels, strict=True):
        names, values, ours = zip(*rungs, strict=True)
        bars = axis.barh(names, values, color=["tab:green" if mine else "tab:gray" for mine in ours])
        axis.bar_label(bars, fmt="%.3g ms", padding=3)
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlim(0, 1.15 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    all_results = results.committed()
    README.write_text(replaced(README.read_text(encoding="utf-8"), section(all_results)), encoding="utf-8")
    plot(all_results, PLOT)


if __name__ == "__main__":
    main()

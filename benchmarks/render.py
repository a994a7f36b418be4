"""Writes what ``benchmarks/results/`` says into README and docs/speed.md, and draws docs/speed.svg.

    python -m benchmarks.render

Every figure on speed in these two comes from there: README has the steps that were measured, the page all.
Those of a model are called so.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import results

COUNTED = "H100"  # the GPU of the model whose 16-bit type is the one that operators are shown for
ROOT = Path(__file__).resolve().parents[1]
README, PAGE, PLOT = ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "speed.svg"
PEERS = ("plain PyTorch", "tuned PyTorch")
IN_GRAPHS = "tuned PyTorch, in CUDA graphs"
NOT_ON_GPU = "Nothing here was measured on a GPU yet."
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
    """Commit and date, and whether the machine had other work to do."""
    environment = result["environment"]
    cpu, busy = environment["cpu"], ""
    if cpu["load"] is not None and cpu["load"] > cpu["cores"] / 2:
        busy = f", after a minute in which the machine had other work (load {cpu['load']})"
    return f"commit {environment['commit']}, {environment['date']}{busy}"


def images(result: Result) -> str:
    conditions = result["conditions"]
    preset, batch_size, side = (conditions[key] for key in ("preset", "batch_size", "pixels"))
    return f"{preset}, batch {batch_size}, {side}x{side}"


def number(value: float) -> str:
    """Three digits, or as many as there are before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def emphasised(name: str) -> str:
    return f"**{name}**" if name.startswith("fastpix2pix") else name


# ---------------------------------------------------------------------------------------------- sections


def comparison(result: Result) -> list[str]:
    """One training step: variants in turns."""
    words = (
        f"Measured: a step of {images(result)}, on {hardware(result)} ({circumstances(result)}). From the "
        "same weights, in turns, each in a process of its own; medians of "
        f"{result['conditions']['rounds']} rounds, and how many times as fast within a round."
    )
    rows = [
        (
            emphasised(row["name"]),
            number(row["ms"]),
            f"{row['over_plain']['wall']:.2f}",
            f"{row['over_tuned']['wall']:.2f}",
        )
        for row in result["figures"]
    ]
    return [paragraph(words), table(("measured", "ms", "x plain", "x tuned"), rows)]


def suite(result: Result) -> list[str]:
    """Loader, epoch, first step and memory, from a run of the pytest suites."""
    rows = []
    for benchmark in result["benchmarks"]:
        extra, case = benchmark["extra_info"], benchmark["name"].partition("[")[2].rstrip("]")
        if "pairs_per_s" in extra:
            kind, _, memory = case.partition("-")
            rows.append((f"loader alone, {kind}, {memory}", f"{number(extra['pairs_per_s'])} pairs/s"))
        if "waiting_for_data_share" in extra:
            share = f"{100 * extra['waiting_for_data_share']:.2f} %"
            rows.append((f"waiting for data in {benchmark['group']}, {case}", share))
        if "first_step_s" in extra:
            rows.append((f"{case}: from its start to the first step's end", f"{extra['first_step_s']:.1f} s"))
            rows.append((f"{case}: peak memory", f"{extra['peak_memory_mb'] / 1e3:.2f} GB"))
    words = f"Measured around the step, on {hardware(result)} ({circumstances(result)}):"
    return [paragraph(words), table(("measured", ""), rows)]


def model(rooflines: list[Result]) -> list[str]:
    """What the rooflines say of GPUs: by bandwidth alone, and with latency."""
    assumed, gpus = rooflines[0]["assumed"], rooflines[0]["model"]
    counted = gpus[COUNTED]["sixteen"]
    others = (f", {gpu['sixteen']} on the {name}" for name, gpu in gpus.items() if gpu["sixteen"] != counted)
    words = (
        "Counted, and a model; not measured. Operators, the bytes of their operands (each tensor once) and "
        "the bytes that they move (each read and each write) are counted by tracing a step, plain PyTorch in "
        f"fp32, the others in {counted}. Milliseconds are a model "
        f"({counted}{''.join(others)}): published bandwidth and arithmetic rates, every byte through "
        f"memory, {assumed['eager_operator_us']:g} us of the host for each operator of an eager step, "
        f"{assumed['captured_launch_us']:g} us between the launches of a captured one."
    )
    latency = (
        "The same with latency, a model too: "
        f"{assumed['node_us']:g} us before each launch, {assumed['trip_us']:g} us for each time that its "
        f"programs wait for memory, with {assumed['resident_warps']} warps at a time on a multiprocessor "
        "(assumed), and of the L2 cache's bandwidth the share of the multiprocessors that have a program. A "
        "library's launches are taken to fill the device and to wait once. The last row of each step is what "
        "it would take if its second stream, until it is joined, never had to wait for the first."
    )
    rows, with_latency = [], []
    for result in rooflines:
        models = result["model"].values()
        for name, row in result["model"][COUNTED]["steps"].items():
            title = f"{images(result)}: {emphasised(name)}"
            counts = str(row["operators"]), f"{row['operands_gb']:.2f}", f"{row['moved_gb']:.2f}"
            rows.append((title, *counts, *(f"{gpu['steps'][name]['ms']:.2f}" for gpu in models)))
            times = ([(gpu["steps"][name][key]) for gpu in models] for key in ("latency_ms", "overlapped_ms"))
            alone, beside = ([f"{value:.2f}" for value in some] for some in times)
            with_latency.append((title, str(row["launches"]), *alone))
            if name == "fastpix2pix":
                with_latency.append((f"{title}, second stream", str(row["launches"]), *beside))
    columns = [f"{name}, ms (model)" for name in gpus]
    return [
        paragraph(words),
        table(("step", "operators", "GB operands", "GB moved", *columns), rows),
        paragraph(latency),
        table(("step, with latency", "launches", *columns), with_latency),
    ]


def climb(result: Result) -> list[str]:
    """What each measure brings on one GPU, by the model with latency."""
    words = (
        f"What each measure brings to a step of {images(result)}, by the model with latency, in which a "
        "library's convolution waits for memory once and ours as often as it does (on a GPU both are timed, "
        "and the faster one is taken):"
    )
    rows = [
        (row["rung"], str(row["operators"]), f"{row['moved_gb']:.2f}", f"{row['ms']:.2f}")
        for row in result["ladder"][COUNTED]
    ]
    header = (f"on an {COUNTED}", "operators", "GB moved", "ms (model)")
    return [paragraph(words), table(header, rows)]


def over_floor(result: Result) -> list[str]:
    """How far the steps measured on a GPU are from their floor."""
    rates = ", ".join(f"{name} {number(value)}" for name, value in result["rates"].items())
    words = (
        f"Measured against the model with the rates of this very GPU ({rates}): {images(result)}, on "
        f"{hardware(result)} ({circumstances(result)})."
    )
    rows = [
        (emphasised(row["name"]), number(row["ms"]), number(row["floor_ms"]), f"{row['over_floor']:.2f}")
        for row in result["measured"]
    ]
    return [paragraph(words), table(("step", "ms, measured", "ms (model)", "measured / model"), rows)]


def modelled(result: Result) -> str:
    """What a roofline says of one GPU, in a sentence."""
    steps = result["model"][COUNTED]["steps"]
    plain, tuned, graphs, ours = (
        f"{steps[name]['latency_ms']:.2f} ms" for name in (*PEERS, IN_GRAPHS, "fastpix2pix")
    )
    return (
        f"A model, not a measurement, with latency, puts a step of {images(result)} on an {COUNTED} at "
        f"{ours} ({steps['fastpix2pix']['overlapped_ms']:.2f} ms if its second stream never has to wait), "
        f"plain PyTorch at {plain}, tuned PyTorch at {tuned}, and that in CUDA graphs at {graphs}."
    )


def summary(all_results: list[Result]) -> str:
    """What README says between the two marks: a row for each step that was measured."""
    of = kinds(all_results)
    rows = []
    for result in of["comparison"]:
        figures = {row["name"]: row for row in result["figures"]}
        name, ours = min(
            ((name, row) for name, row in figures.items() if name.startswith("fastpix2pix")),
            key=lambda named: named[1]["ms"],
        )
        rows.append(
            (
                f"{images(result)}, {name.removeprefix('fastpix2pix ')}",
                *(f"{number(figures[peer]['ms'])} ms" for peer in PEERS),
                f"**{number(ours['ms'])} ms**",
                f"{ours['over_plain']['wall']:.2f}, {ours['over_tuned']['wall']:.2f}",
                f"{hardware(result)}, {result['environment']['date']}",
            )
        )
    header = ("a training step", *PEERS, "**fastpix2pix**", "times as fast", "measured on")
    parts = [table(header, rows)]
    if not on_gpu(of["comparison"]):
        parts.append(paragraph(" ".join([NOT_ON_GPU, *map(modelled, of["roofline"][:1])])))
        parts += [part for result in of["roofline"][:1] for part in climb(result)]
    return "\n\n".join(parts)


def on_gpu(comparisons: list[Result]) -> bool:
    """Whether any step was measured on a GPU."""
    return any(result["environment"]["gpu"] for result in comparisons)


def section(all_results: list[Result]) -> str:
    """What docs/speed.md says between the two marks."""
    of = kinds(all_results)
    parts = [part for result in of["comparison"] for part in comparison(result)]
    if not on_gpu(of["comparison"]):
        parts.append(NOT_ON_GPU)
    parts += [part for result in of["roofline"] if "measured" in result for part in over_floor(result)]
    if of["roofline"]:
        parts += model(of["roofline"])
        parts += [part for result in of["roofline"] for part in climb(result)]
    parts += [part for result in of["suite"] for part in suite(result)]
    parts.append(f"![Milliseconds per step, measured and modelled]({PLOT.name})")
    return "\n\n".join(parts)


RENDERED = {README: summary, PAGE: section}


def kinds(all_results: list[Result]) -> dict[str, list[Result]]:
    """Results by what they are, the default preset first."""
    by_preset = sorted(
        all_results, key=lambda result: result.get("conditions", {}).get("preset") != "tutorial"
    )
    return {
        what: [result for result in by_preset if result["what"] == what]
        for what in ("comparison", "suite", "roofline")
    }


def replaced(text: str, new: str) -> str:
    """``text`` with ``new`` between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


# -------------------------------------------------------------------------------------------------- plot


def ladders(all_results: list[Result]) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each panel its title, and (rung, ms) from the top down: the default preset at batch 1."""
    panels = []
    for what, some in kinds(all_results).items():
        for result in some:
            if result.get("conditions") is None or not images(result).startswith("tutorial, batch 1,"):
                continue
            if what == "comparison":
                device = result["environment"]["gpu"] or result["environment"]["cpu"]
                rungs = [(row["rung"], row["ms"]) for row in result["figures"]]
                panels.append((f"measured: {images(result)}, {device['name']}", rungs))
            else:
                for name, gpu in result["model"].items():
                    rungs = [(who, row["latency_ms"]) for who, row in gpu["steps"].items()]
                    rungs.append(("fastpix2pix, second stream", gpu["steps"]["fastpix2pix"]["overlapped_ms"]))
                    panels.append((f"model with latency: {images(result)}, {name}", rungs))
    return panels


def plot(all_results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "fastpix2pix", "svg.fonttype": "none", "font.size": 9}
    panels = ladders(all_results)
    heights = [len(rungs) for _, rungs in panels]
    size = (8, 0.6 * len(panels) + 0.32 * sum(heights))
    figure, axes = pyplot.subplots(len(panels), figsize=size, height_ratios=heights, squeeze=False)
    for axis, (title, rungs) in zip(axes[:, 0], panels, strict=True):
        names, values = zip(*rungs, strict=True)
        colors = ["tab:green" if name.startswith("fastpix2pix") else "tab:gray" for name in names]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [f"{number(value)} ms" for value in values], padding=3)
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlim(0, 1.2 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    all_results = results.committed()
    for path, words in RENDERED.items():
        path.write_text(replaced(path.read_text(encoding="utf-8"), words(all_results)), encoding="utf-8")
    plot(all_results, PLOT)


if __name__ == "__main__":
    main()

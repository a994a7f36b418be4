"""``python -m fastpix2pix.evaluate``: how close the images of runs come to their targets."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastpix2pix import cli, environment
from fastpix2pix.data.options import Direction, oriented
from fastpix2pix.data.pairs import Pair, find_pairs
from fastpix2pix.errors import UserError
from fastpix2pix.metrics import image_metrics
from fastpix2pix.perceptual import FeatureDistances, PerceptualDistance
from fastpix2pix.translate import statistics_of
from fastpix2pix.translator import Translator, load

CONFIDENT = 1.96  # standard errors on either side that hold a mean in 95 of 100 cases
HIGHER_IS_BETTER = ("PSNR", "SSIM")


@dataclass
class EvaluateConfig:
    """Measure trained runs on pairs: L1, PSNR and SSIM of every image, and FID, KID and LPIPS where their
    networks are given as files.

    OUTPUT/metrics.json holds the means and how they came about, OUTPUT/metrics.csv every image. Several runs
    are compared with the first, image by image.
    """

    run: tuple[Path, ...]
    """Folder of a run (its newest checkpoint is used), a step_*.pt, a *_net_G.pth, or an .npz of the
    tutorial's generator; several of them are compared."""
    input: Path
    """Folder of pairs: side-by-side images, or A/ and B/ with files of the same names."""
    output: Path = Path("evaluation")
    """Folder for metrics.json and metrics.csv."""
    direction: Direction | None = None
    """Which half of a pair is translated: AtoB the left one. Default: as the network was trained."""
    resize: bool = False
    """Resize images to the size of the training first, as both references test."""
    eval: bool = False
    """Normalise by the running statistics, without dropout, instead of by each image's own statistics, with
    dropout, as both references test."""
    seed: int = 0
    """Of the dropout."""
    num_test: int | None = None
    """Measure the first so many pairs alone."""
    inception: Path | None = None
    """InceptionV3 of torch-fidelity (weights-inception-2015-12-05-6726825d.pth): gives FID and KID."""
    lpips: Path | None = None
    """AlexNet of torchvision (alexnet-owt-7be5be79.pth): gives LPIPS."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("--run: give at least one run")
        if self.num_test is not None and self.num_test < 1:
            raise UserError(f"--num_test {self.num_test}: give a number of at least 1")


@dataclass(frozen=True)
class Measured:
    """What one run came to. images: the metrics of each image by its name; whole: those of all together."""

    run: Path
    translator: Translator
    images: dict[str, dict[str, float]]
    whole: dict[str, float]

    def mean(self) -> dict[str, float]:
        """Of each metric over all images, then those that only all images together have."""
        names = next(iter(self.images.values()))
        return {name: self.values(name).mean().item() for name in names} | self.whole

    def values(self, metric: str) -> np.ndarray:
        return np.array([values[metric] for values in self.images.values()])


def evaluate(config: EvaluateConfig) -> None:
    """Measure as ``config`` says, write both files and say the means. Raises UserError."""
    if not config.input.is_dir():
        raise UserError(
            f"--input {config.input}: no such folder; give one of pairs, like datasets/facades/test"
        )
    distances = None if config.inception is None else FeatureDistances(config.inception, config.device)
    perceptual = None if config.lpips is None else PerceptualDistance(config.lpips, config.device)
    measured: list[Measured] = []
    for run in config.run:
        translator = load(
            run,
            device=config.device,
            evaluation=config.eval,
            seed=config.seed,
            direction=config.direction,
        )
        pairs = pairs_in(config.input, translator)[: config.num_test]
        if not measured:
            print(f"each image is normalised by {statistics_of(translator)}")
            if config.inception is not None:
                print(
                    f"FID of few images is too high: compare it between runs on these same {len(pairs)} alone"
                )
        measured.append(measure(run, translator, pairs, config.resize, distances, perceptual))
        print(f"{run}: {translator.source}, {len(pairs)} images: {_in_words(measured[-1].mean())}")
    for other in measured[1:]:
        print(f"{other.run} beside {measured[0].run}: {_difference_in_words(compare(measured[0], other))}")
    write(config, measured)


def pairs_in(folder: Path, translator: Translator) -> list[Pair]:
    """The pairs in ``folder``. Raises UserError where there are none, or they are not what it translates."""
    folder = folder.resolve()
    sides = oriented(translator.input, translator.output, translator.direction)
    return find_pairs(folder.parent, folder.name, sides)


def measure(
    run: Path,
    translator: Translator,
    pairs: Sequence[Pair],
    resize: bool,
    distances: FeatureDistances | None = None,
    perceptual: PerceptualDistance | None = None,
) -> Measured:
    """Translate every pair's source and hold the result against its target, as files would hold them."""
    images: dict[str, dict[str, float]] = {}
    for pair in tqdm(pairs, desc=str(run), unit=" images"):
        a, b = pair.read()
        source, target = oriented(a, b, translator.direction)
        if resize:
            source, target = translator.resize(source), translator.resize(target, translator.output)
        both = translator(np.ascontiguousarray(source)), translator.output.alike(target)
        generated, wanted = (torch.from_numpy(image.copy()) for image in both)
        images[pair.name] = image_metrics(generated, wanted, translator.output.span)
        if perceptual is not None:
            images[pair.name]["LPIPS"] = perceptual(generated, wanted)
        if distances is not None:
            distances.add(generated, wanted)
    return Measured(run, translator, images, {} if distances is None else distances.take())


def compare(first: Measured, other: Measured) -> dict[str, tuple[float, float]]:
    """(mean, half width of its 95 % confidence interval) of the difference, other - first, image by image.

    By the normal approximation of paired differences; the width is NaN for fewer than two images.
    """
    differences = {}
    for metric in next(iter(first.images.values())):
        difference = other.values(metric) - first.values(metric)
        count = len(difference)
        spread = difference.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
        differences[metric] = (difference.mean().item(), CONFIDENT * float(spread))
    return differences


def _in_words(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())


def _difference_in_words(differences: dict[str, tuple[float, float]]) -> str:
    """A difference counts when its interval does not hold 0."""
    words = []
    for metric, (mean, width) in differences.items():
        better = (mean > 0) == (metric in HIGHER_IS_BETTER)
        verdict = ("better" if better else "worse") if abs(mean) > width else "no clear difference"
        words.append(f"{metric} {mean:+.4g} ± {width:.2g} ({verdict})")
    return ", ".join(words)


def write(config: EvaluateConfig, measured: Sequence[Measured]) -> None:
    """Write metrics.csv, then metrics.json. Raises UserError where that cannot be."""
    report = {
        "input": str(config.input),
        "images": len(measured[0].images),
        "resized": config.resize,
        "statistics": statistics_of(measured[0].translator),
        "seed": config.seed,
        "versions": environment.versions(),
        "runs": [
            {
                "run": str(one.run),
                "source": one.translator.source,
                "direction": one.translator.direction,
                "mean": _plain(one.mean()),
                "beside_the_first": {
                    metric: {"mean": mean, "half_width_95": None if math.isnan(width) else width}
                    for metric, (mean, width) in (
                        compare(measured[0], one) if one is not measured[0] else {}
                    ).items()
                },
            }
            for one in measured
        ],
    }
    metrics = [*next(iter(measured[0].images.values()))]
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        with open(
            config.output / "metrics.csv", "w", newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            rows = csv.writer(file)
            rows.writerow(["run", "name", *metrics])
            for one in measured:
                rows.writerows([one.run, name, *values.values()] for name, values in one.images.items())
        (config.output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{config.output}: {error.strerror or error}; choose another --output") from error
    print(f"{config.output / 'metrics.json'} holds the means, metrics.csv beside it every image")


def _plain(means: dict[str, float]) -> dict[str, float | None]:
    """For JSON, which has no infinity (PSNR of equal images) and no NaN (SSIM of tiny ones)."""
    return {name: value if math.isfinite(value) else None for name, value in means.items()}


def main(argv: list[str] | None = None) -> None:
    cli.run(EvaluateConfig, evaluate, argv)


if __name__ == "__main__":
    main()

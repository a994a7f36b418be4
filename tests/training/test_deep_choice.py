"""Who computes the deep layers' convolutions: by measurement, with a timer of the test's own."""

from functools import cache

import pytest
import torch

from fastpix2pix.kernels import deep_conv, language
from fastpix2pix.kernels.deep_conv import Problem
from fastpix2pix.models import NetworkOptions, build_networks
from fastpix2pix.training import deep_choice, prepare
from fastpix2pix.training.deep_choice import choose, problems_of
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.trace import step_launches

CPU = torch.device("cpu")
PROBLEMS = [
    Problem("small", 1, 1, 2, 16, 32, torch.float32),
    Problem("big", 1, 2, 1, 16, 32, torch.float32),
    Problem("weight", 2, 1, 1, 16, 32, torch.float32),
]


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(deep_conv, "offered", True)
    monkeypatch.setattr(deep_conv, "chosen", {})


@pytest.fixture
def ours_by_reference(monkeypatch):
    """Where the choice is tested, ours is the reference."""
    products = {
        "small": deep_conv.reference.deep_conv_small,
        "big": deep_conv.reference.deep_conv_big,
        "weight": deep_conv.reference.deep_conv_weight,
    }
    monkeypatch.setattr(deep_conv, "solve", lambda problem, a, b: products[problem.product](a, b))


by_reference = pytest.mark.usefixtures("ours_by_reference")


def timer(*microseconds: float):
    """Gives these times, two for each problem: ours, the library's."""
    times = iter(microseconds)

    def time(run) -> float:
        run()
        return next(times)

    return time


@by_reference
def test_the_faster_one_is_chosen_for_each_product():
    said = []
    choice = choose(PROBLEMS, "auto", CPU, timer(10, 30, 50, 20, 7, 7), said.append)
    assert choice.chosen == {PROBLEMS[0]: True, PROBLEMS[1]: False, PROBLEMS[2]: False}
    assert said == ["deep convolutions: Triton for 1 of 3 products, 37 us instead of 57"]


@by_reference
def test_asked_for_ours_nothing_is_timed():
    said = []
    choice = choose(PROBLEMS, "triton", CPU, None, said.append)
    assert all(choice.chosen.values()) and len(choice.chosen) == 3
    assert said == ["deep convolutions: Triton for 3 of 3 products"]


@by_reference
@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_what_fails_or_computes_something_else_is_left_to_the_library(monkeypatch, asked):
    right = deep_conv.solve

    def solve(problem, a, b):
        if problem.product == "big":
            raise RuntimeError("PTXAS died")
        result = right(problem, a, b)
        return result * 1.05 if problem.product == "weight" else result

    monkeypatch.setattr(deep_conv, "solve", solve)
    said = []
    choice = choose(PROBLEMS, asked, CPU, timer(1, 2), said.append)
    assert choice.chosen == {PROBLEMS[0]: True, PROBLEMS[1]: False, PROBLEMS[2]: False}
    assert said[0] == (
        "  deep convolution 2x1x16 to 4x2x32: the library's, for ours failed: RuntimeError: PTXAS died"
    )
    assert said[1].startswith(
        "  deep convolution weight of 2x2x32 and 1x1x16, batch 2: the library's, for ours failed: results "
        "differ from the library's by 5.0e-02"
    )
    assert said[2].startswith("deep convolutions: Triton for 1 of 3 products")


@by_reference
def test_a_result_that_is_nan_is_not_ours(monkeypatch):
    right = deep_conv.solve
    monkeypatch.setattr(deep_conv, "solve", lambda *operands: right(*operands) * float("nan"))
    choice = choose(PROBLEMS[:1], "triton", CPU, None, lambda _: None)
    assert str(choice) == "library" and not any(choice.chosen.values())


@by_reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_is_given_the_same_product(dtype):
    for problem in PROBLEMS:
        problem = problem._replace(dtype=dtype)
        operands = deep_choice._operands(problem, CPU)
        mine, theirs = (
            solve(problem, *operands) for solve in (deep_conv.solve, deep_choice.solve_by_library)
        )
        assert theirs.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.1 if dtype != torch.float32 else 1e-4)


# ------------------------------------------------------------------------------- what a step will meet

needs_triton = pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")


@cache
def traced(precision: str = "bf16", *, offered: bool = True) -> list:
    """Launches of a whole step of the tutorial's networks; ``offered`` names what is set in the process."""
    assert deep_conv.offered == offered
    options = StepOptions(precision=precision)
    return step_launches(lambda: build_networks(NetworkOptions(), "meta"), options, size=256)


@needs_triton
def test_the_problems_are_those_of_the_deep_layers():
    problems = problems_of(traced(precision="fp16"))
    sides = [(p.product, p.height, p.small_channels, p.big_channels) for p in problems]
    assert sides.count(("small", 1, 512, 512)) == 1  # the bottleneck's statistics: forward only
    assert ("big", 1, 512, 512) in sides, "the first layer up"
    for side in (2, 4, 8, 16):
        assert ("small", side, 512, 512 if side < 16 else 256) in sides
    assert ("big", 16, 1024, 256) in sides
    assert "weight" not in {side[0] for side in sides}, "gradients go straight into Adam"
    assert all(p.pixels <= 256 for p in problems) and len(set(problems)) == len(problems)
    assert ("small", 32, 256, 128) not in sides


@needs_triton
def test_before_sm_80_and_on_request_there_is_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(deep_conv, "offered", False)
    launches = traced(offered=False)
    assert not problems_of(launches)
    assert prepare.choose_deep_convolutions(launches, StepOptions(), CPU, pytest.fail) == "library"


@needs_triton
def test_what_was_chosen_is_what_the_step_asks(monkeypatch):
    launches, said = traced(), []
    monkeypatch.setattr(prepare, "ColdTimer", lambda device: None)
    monkeypatch.setattr(
        prepare,
        "choose",
        lambda problems, *_: deep_choice.DeepChoice(
            tuple(deep_choice.Verdict(p, 1.0, 2.0) for p in problems)
        ),
    )
    words = prepare.choose_deep_convolutions(launches, StepOptions(), CPU, said.append)
    assert words.startswith("Triton for ") and set(deep_conv.chosen) == set(problems_of(launches))


@needs_triton
def test_a_measurement_that_cannot_be_made_is_no_obstacle(monkeypatch):
    def fails(device):
        raise RuntimeError("no memory")

    monkeypatch.setattr(prepare, "ColdTimer", fails)
    said = []
    assert prepare.choose_deep_convolutions(traced(), StepOptions(), CPU, said.append) == "library"
    assert said == [
        "deep convolutions: the library's, for they could not be measured: RuntimeError: no memory"
    ]
    assert not deep_conv.chosen


# ----------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="before sm_80"
)
def test_ours_is_measured_and_right_on_this_gpu():
    device, said = torch.device("cuda", torch.cuda.current_device()), []
    problems = problems_of(traced(precision="fp16"))
    choice = choose(problems, "auto", device, deep_choice.ColdTimer(device), said.append)
    for verdict in choice.verdicts:
        print(deep_choice.describe(verdict.problem), verdict.ours, verdict.library)
    assert not [verdict.failure for verdict in choice.verdicts if verdict.failure]
    assert all(verdict.ours > 0 and verdict.library > 0 for verdict in choice.verdicts)

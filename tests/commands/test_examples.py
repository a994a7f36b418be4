"""What the documentation says that examples and benchmarks print is what they print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import render_ops
from fastpix2pix import accelerate
from fastpix2pix.kernels import language
from tests.interop.published_networks import HDGlobal

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "use-it-in-your-own-pix2pix.md"
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def without_last_digit(text: str) -> str:
    """Numbers to two places: another processor may round the third differently."""
    return re.sub(r"\d+\.\d{3}", lambda found: f"{float(found[0]):.2f}", text)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_the_guide_says(name):
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    guide = GUIDE.read_text(encoding="utf-8")
    said = re.search(rf"<!-- output of examples/{name} -->\n```\n(.*?)```", guide, re.DOTALL)[1]
    assert without_last_digit(done.stdout) == without_last_digit(said)


def test_the_guide_shows_what_accelerate_says_of_a_residual_generator():
    text = GUIDE.read_text(encoding="utf-8")
    first, *fused = re.search(r"accelerate\(generator\)\)\n```\n\n```\n(.*?)```", text, re.DOTALL)[
        1
    ].splitlines()
    report = str(accelerate(HDGlobal(4, downs=2, blocks=6), layout="channels_last")).splitlines()
    assert first == report[0]
    assert [line for line in report if line in fused] == [line for line in fused if line.strip() != "..."]


@pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("page", sorted({page for page, _ in render_ops.tables()}))
def test_tables_of_ops_are_those_that_were_generated(page):
    text = (ROOT / "docs" / "ops" / page).read_text(encoding="utf-8")
    assert text == render_ops.rendered(page, text)

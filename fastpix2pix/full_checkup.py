"""``doctor --full``: what a GPU's owner can run in ten minutes, as one file to attach to an issue."""

import getpass
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE = Path(__file__).parents[1]
MINUTES = 10
TAIL = 20_000  # characters of a program's output that are kept, its last ones


@dataclass(frozen=True)
class Program:
    """One measurement, in a process of its own.

    arguments: of the Python interpreter, ``{json}`` standing for the file that it writes. seconds: the most
    that it may take. needs: the folder of a clone without which it can't run.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    needs: str


PROGRAMS = (
    # P: what tests that pass print, their measurements.
    Program("GPU tests", ("-m", "pytest", "-m", "gpu", "tests", "-q", "-rfEP", "--no-header"), 240, "tests"),
    Program(
        "step against its peers",
        ("-m", "benchmarks.compare", "--eager", "--rounds", "5", "--output", "{json}"),
        200,
        "benchmarks",
    ),
    Program(
        "kernels",
        ("-m", "pytest", "benchmarks/bench_kernels.py", "-q", "--benchmark-only", "--benchmark-json={json}"),
        200,
        "benchmarks",
    ),
    Program("start to first step", ("-m", "benchmarks.cold_start"), 90, "benchmarks"),
)


def full_checkup(
    checks: list[dict[str, str]],
    versions: dict[str, Any],
    output: Path,
    *,
    programs: tuple[Program, ...] = PROGRAMS,
    say: Callable[[str], None] = print,
) -> None:
    """Run ``programs`` one after the other, ten minutes in all, and write ``output``.

    checks, versions: what ``doctor`` found. The file names neither this machine's folders nor its user.
    """
    deadline = time.monotonic() + 60 * MINUTES
    measured = []
    for program in programs:
        say(f"{program.name} (at most {program.seconds} s)")
        entry = _run(program, min(program.seconds, deadline - time.monotonic()))
        say(f"  {entry['outcome']}")
        measured.append(entry)
    report = {"what": "doctor --full", "versions": versions, "checks": checks, "programs": measured}
    output.write_text(redacted(json.dumps(report, indent=1)) + "\n", encoding="utf-8")
    say(f"{output}: attach it to an issue; it names no folder of this machine and no user")


def _run(program: Program, seconds: float) -> dict[str, Any]:
    if not (CLONE / program.needs).is_dir():
        return {"name": program.name, "outcome": f"skipped: needs a clone, for its folder {program.needs}/"}
    if seconds <= 0:
        return {"name": program.name, "outcome": f"skipped: the {MINUTES} minutes are over"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        arguments = [argument.replace("{json}", str(result)) for argument in program.arguments]
        began = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=CLONE,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
            outcome, text = f"exit code {done.returncode}", done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            outcome = f"stopped after {seconds:.0f} s"
            text = "".join(_decoded(part) for part in (error.stdout, error.stderr))
        entry: dict[str, Any] = {
            "name": program.name,
            "outcome": outcome,
            "seconds": round(time.monotonic() - began, 1),
        }
        if result.is_file():
            entry["result"] = json.loads(result.read_text(encoding="utf-8"))
        entry["output"] = text[-TAIL:]
        return entry


def _decoded(part: bytes | str | None) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""


def redacted(text: str) -> str:
    """``text`` without this machine's folders, host and user: the longest known folder first."""
    known = {
        os.getcwd(): "HERE",
        str(CLONE): "CLONE",
        sys.prefix: "PYTHON",
        sys.base_prefix: "PYTHON",
        tempfile.gettempdir(): "TEMP",
        str(Path.home()): "HOME",
    }
    for folder in sorted(known, key=len, reverse=True):
        if len(folder) > 1:
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", known[folder], text)
    text = re.sub(r"/(?:home|Users|root|mnt|media|scratch|data)/[^\s\"':]+", "FOLDER", text)
    for name, stands_for in ((platform.node(), "HOST"), (_user(), "USER")):
        if len(name) > 2:
            text = re.sub(rf"\b{re.escape(name)}\b", stands_for, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no entry for this user id, as in containers
        return ""

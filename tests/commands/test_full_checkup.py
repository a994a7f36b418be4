"""``doctor --full``: what is run, what is kept of it, and what does not leave the machine."""

import getpass
import json
import platform
import sys
import tempfile
from pathlib import Path

from fastpix2pix import doctor, full_checkup
from fastpix2pix.full_checkup import Program, redacted


def program(code: str, seconds: int = 20, needs: str = "fastpix2pix") -> Program:
    return Program("a program", ("-c", code), seconds, needs)


def run(tmp_path, *programs) -> dict:
    output = tmp_path / "doctor.json"
    checks = [{"check": "step", "outcome": "PASS", "detail": f"seen in {Path.home()}"}]
    full_checkup.full_checkup(checks, {"torch": "2"}, output, programs=programs, say=lambda line: None)
    return json.loads(output.read_text())


def test_results_output_and_exit_codes_are_kept(tmp_path):
    report = run(
        tmp_path,
        program("import json; json.dump({'ms': 1.5}, open('{json}', 'w')); print('measured')"),
        program("raise SystemExit('no such GPU')"),
        program("import time; print('begun', flush=True); time.sleep(60)", seconds=2),
        program("", needs="no_such_folder"),
    )
    good, bad, slow, absent = report["programs"]
    assert good["result"] == {"ms": 1.5} and good["outcome"] == "exit code 0"
    assert good["output"] == "measured\n"
    assert bad["outcome"] == "exit code 1" and "no such GPU" in bad["output"]
    assert slow["outcome"] == "stopped after 2 s" and "begun" in slow["output"]
    assert absent["outcome"] == "skipped: needs a clone, for its folder no_such_folder/"
    assert report["versions"] == {"torch": "2"} and report["checks"][0]["outcome"] == "PASS"


def test_ten_minutes_are_the_most(tmp_path, monkeypatch):
    monkeypatch.setattr(full_checkup, "MINUTES", 0)
    (entry,) = run(tmp_path, program("print('never')"))["programs"]
    assert entry["outcome"] == "skipped: the 0 minutes are over"


def test_no_folder_host_or_user_leaves_the_machine(tmp_path):
    secrets = [
        *(str(full_checkup.CLONE), sys.prefix, tempfile.gettempdir(), str(tmp_path), str(Path.home())),
        *("/home/ada/pairs/1.jpg", "/Users/ada/x", "/mnt/disk/y"),
    ]
    text = redacted(" ".join(f'"{secret}/file.py"' for secret in secrets) + " torch 2.13.0 sm_90 1/2")
    for secret in secrets:
        assert secret not in text
    assert "TEMPTEMP" not in redacted(f"{tempfile.gettempdir()}/tmpabc")
    assert "CLONE/file.py" in text and text.endswith("torch 2.13.0 sm_90 1/2")
    for name in (platform.node(), getpass.getuser()):
        assert len(name) < 3 or name not in redacted(f"run by {name} on it")
    report = run(tmp_path, program("import os; print(os.getcwd())"))
    assert str(full_checkup.CLONE) not in json.dumps(report) and str(Path.home()) not in json.dumps(report)


def test_the_doctor_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"good": lambda device: "fine"})
    seen = []
    monkeypatch.setattr(doctor, "full_checkup", lambda *arguments: seen.append(arguments))
    doctor.examine(doctor.DoctorConfig(device="cpu", full=True, output=tmp_path / "d.json"))
    ((checks, versions, output),) = seen
    assert checks == [{"check": "good", "outcome": "PASS", "detail": "fine"}]
    assert output == tmp_path / "d.json" and versions["torch"]


def test_what_it_runs_exists():
    for each in full_checkup.PROGRAMS:
        assert (full_checkup.CLONE / each.needs).is_dir()
        module = each.arguments[each.arguments.index("-m") + 1]
        if module.startswith("benchmarks."):
            assert (full_checkup.CLONE / f"{module.replace('.', '/')}.py").is_file()
        for argument in each.arguments:
            if argument.endswith(".py"):
                assert (full_checkup.CLONE / argument).is_file()


def test_what_gpu_tests_measure_is_kept(tmp_path):
    """They print it, also where they pass."""
    (tmp_path / "test_gain.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_gain():\n    print('0.9 ms in one stream, 0.8 in two')\n"
    )
    gpu_tests = next(each for each in full_checkup.PROGRAMS if each.name == "GPU tests")
    arguments = [argument.replace("tests", str(tmp_path)) for argument in gpu_tests.arguments]
    (entry,) = run(tmp_path, Program("GPU tests", tuple(arguments), 60, "tests"))["programs"]
    assert entry["outcome"] == "exit code 0" and "0.9 ms in one stream, 0.8 in two" in entry["output"]

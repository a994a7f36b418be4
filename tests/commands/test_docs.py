"""The documentation is true: commands parse, examples run, pages of options and names are complete."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image
from tiny import random_images, step_of, tiny_config
from torch import nn

import fastpix2pix
from fastpix2pix import checkpoint, cli
from fastpix2pix.config import TrainConfig
from fastpix2pix.demo import DemoConfig
from fastpix2pix.doctor import DoctorConfig
from fastpix2pix.evaluate import EvaluateConfig
from fastpix2pix.export import ExportConfig
from fastpix2pix.report import ReportConfig
from fastpix2pix.timelapse import TimelapseConfig
from fastpix2pix.training.resume import Position, training_state
from fastpix2pix.translate import TranslateConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        (page.name, " ".join(match.split()))
        for page in PAGES
        for match in re.findall(
            r"python -m (fastpix2pix[\w.]*(?: [^`\n|&;()]+)?)", page.read_text(encoding="utf-8")
        )
    }
)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_parses(monkeypatch, page, command):
    parsed = []

    def parse(config_class, _command, argv=None, habits=lambda argv: (argv, []), **_options):
        argv, _lines = habits(argv)
        flags = (tyro.conf.FlagCreatePairsOff,)
        parsed.append(tyro.cli(config_class, args=argv, use_underscores=True, config=flags))

    name, *arguments = shlex.split(command, comments=True)
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    assert '__name__ == "__main__"' in Path(module.__file__).read_text(encoding="utf-8")
    # Without arguments it is a command named in a sentence; interop.junyanz runs other people's scripts.
    if set(arguments) - {"--help"} and "interop" not in name:
        monkeypatch.setattr(cli, "run", parse)
        module.main(arguments)
        assert len(parsed) == 1


def test_there_are_commands_to_test():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


CONFIGURATIONS = {
    "train": TrainConfig,
    "translate": TranslateConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "demo": DemoConfig,
    "timelapse": TimelapseConfig,
    "doctor": DoctorConfig,
}


def test_page_of_options_names_each_with_its_default():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    written, command = {}, ""
    for line in page.splitlines():
        if named := re.match(r"`python -m fastpix2pix\.(\w+)`", line):
            command = named[1]
        elif line.startswith("| `--"):
            flags, defaults = (re.findall(r"`([^`]*)`|(required)", cell) for cell in line.split("|")[1:3])
            defaults = [code or word for code, word in defaults] or [""] * len(flags)
            written |= {(command, flag): default for (flag, _), default in zip(flags, defaults, strict=True)}
    expected = {}
    for command, configuration in CONFIGURATIONS.items():
        for field in dataclasses.fields(configuration):
            required = field.default is dataclasses.MISSING
            absent = field.default is None or field.default is False
            value = "required" if required else "" if absent else str(field.default)
            expected[command, f"--{field.name}"] = value
    assert written == expected


# ------------------------------------------------------------------------------------------ examples


@pytest.fixture
def what_examples_speak_of(tmp_path, monkeypatch) -> dict:
    """A run in ``checkpoints/facades`` and a ``labels.png``, in a folder to be in; and networks by name."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(name="facades", ngf=2, ndf=2)
    state = training_state(step_of(config), config, {}, Position(steps=1))
    checkpoint.save(config.run_folder, 1, state, keep=1)
    Image.new("RGB", (40, 30)).save("labels.png")
    generator = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    return {
        "torch": torch,
        "generator": generator,
        "discriminator": nn.Conv2d(6, 1, 4),
        "network": generator,
        "loader": random_images(2, tiny_config()),
    }


@pytest.mark.parametrize("page", ["api.md", "use-it-in-your-own-pix2pix.md"])
def test_examples_run(what_examples_speak_of, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "interop" not in block]  # these want another repository's files
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, page, "exec"), what_examples_speak_of)


def test_page_of_the_interface_describes_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert not [name for name in fastpix2pix.__all__ if f"`{name}`" not in page]

"""What the package promises as a whole: its names, what importing it costs, which way imports point."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import step_of, tiny_config

import fastpix2pix
from fastpix2pix import checkpoint
from fastpix2pix.training.resume import Position, training_state

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, folder: Path, *arguments: str) -> str:
    """What ``code`` prints when Python runs it in ``folder``."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_can_be_imported_and_listed():
    for name in fastpix2pix.__all__:
        assert getattr(fastpix2pix, name) is not None
        assert name in dir(fastpix2pix)
    with pytest.raises(AttributeError, match="no attribute 'Unheard'"):
        _ = fastpix2pix.Unheard


def test_import_from_the_folder_that_contains_the_clone(tmp_path):
    """There, Python meets a folder called fastpix2pix that is no package before the installed one."""
    (tmp_path / "fastpix2pix" / "docs").mkdir(parents=True)
    code = "import fastpix2pix, fastpix2pix.kernels; print(fastpix2pix.__version__, fastpix2pix.__file__)"
    version, file = python(code, tmp_path).split(maxsplit=1)
    assert version == fastpix2pix.__version__
    assert Path(file).samefile(fastpix2pix.__file__)


def test_importing_the_package_alone_is_quick(tmp_path):
    assert python("import sys, fastpix2pix; print('torch' in sys.modules)", tmp_path) == "False"


OF_TRAINING = [
    "fastpix2pix.data.download",
    "fastpix2pix.data.painter",
    "fastpix2pix.monitor",
    "fastpix2pix.train",
    "fastpix2pix.training.optim",
    "fastpix2pix.training.step",
    "pooch",
    "requests",
    "tensorboard",
    "torch.utils.tensorboard",
    "tyro",
]


def test_using_a_trained_model_imports_nothing_of_training(tmp_path):
    config = tiny_config(name="run", checkpoints_dir=tmp_path)
    state = training_state(step_of(config), config, {}, Position(steps=7))
    checkpoint.save(config.run_folder, 7, state, keep=1)
    code = (
        "import json, sys, fastpix2pix, torch\n"
        "model = fastpix2pix.load(sys.argv[1], device='cpu')\n"
        "assert model(torch.zeros(3, 32, 32)).shape == (3, 32, 32)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    imported = json.loads(python(code, tmp_path, str(config.run_folder)))
    assert "fastpix2pix.translator" in imported
    assert not set(OF_TRAINING) & set(imported)


# ------------------------------------------------------------------------------------------- architecture


def _modules() -> dict[str, Path]:
    """Every module of the package by its name; ``kernels/`` lies beside the others."""
    found = {}
    for package, folder in (("fastpix2pix", ROOT / "fastpix2pix"), ("fastpix2pix.kernels", ROOT / "kernels")):
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = _modules()


def _imported(node: ast.AST) -> Iterator[str]:
    """What the code below ``node`` imports, wherever it does; imports for type checkers alone excepted."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module is not None, "imports in this package are absolute"
        full = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name if name in MODULES else node.module for name in full)
    for child in ast.iter_child_nodes(node):
        yield from _imported(child)


IMPORTS = {
    name: {other for other in _imported(ast.parse(file.read_text(encoding="utf-8"))) if other in MODULES}
    for name, file in MODULES.items()
}

LAYERS = [
    "signals",
    "errors presets pixels tiling cores device environment host_memory free_memory history metrics"
    " perceptual page",
    "kernels",
    "models losses acceleration rewriting",
    "training data config checkpoint monitor loss_table wandb_run report gallery cli interop translator"
    " picture_model",
]
"""From the bottom up, where the package's own ``__init__`` is too; a module may import its own layer and
those below. What is not named here is a command: it lies above them all."""


def _layer(module: str) -> int:
    part = [*module.split("."), ""][1]
    ranks = [rank for rank, names in enumerate(LAYERS) if part in names.split()]
    return ranks[0] if ranks else 0 if not part else len(LAYERS)


def test_imports_point_down():
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if _layer(other) > _layer(name)
    ]
    assert upwards == []


@pytest.mark.parametrize("closed", ["kernels", "data"])
def test_parts_that_know_nothing_of_the_networks(closed):
    """``kernels`` stands alone; ``data`` knows no model and no training."""
    allowed = {
        "kernels": {"kernels"},
        "data": {"data", "cli", "cores", "device", "errors", "pixels", "presets", "signals"},
    }[closed]
    for name, others in IMPORTS.items():
        if name.startswith(f"fastpix2pix.{closed}"):
            assert {other.split(".")[1] for other in others} <= allowed, name


def test_no_circle_of_imports():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


def _decided_by(node: ast.AST) -> list[ast.AST | None]:
    """What ``node`` compares with, or looks something up by."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Dict):
        return node.keys
    return list(ast.walk(node.pattern)) if isinstance(node, ast.match_case) else []


def test_what_a_preset_means_is_said_in_presets_alone():
    """Elsewhere a preset may be named, as a default or as the one that a file format belongs to, and its
    rules be read; what code does must not hang on its name. Interop may refuse the other preset's networks.
    """
    for name, file in MODULES.items():
        if name == "fastpix2pix.presets" or name.startswith("fastpix2pix.interop"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            values = {part.value for part in _decided_by(node) if isinstance(part, ast.Constant)}
            assert not values & {"tutorial", "junyanz"}, f"{name}: {ast.unparse(node)}"


def test_every_folder_of_the_package_is_installed(monkeypatch):
    """setup.py lists packages by hand; one that it forgets is missing from a wheel, and only there."""
    setuptools = pytest.importorskip("setuptools")
    said = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    monkeypatch.chdir(ROOT)
    exec((ROOT / "setup.py").read_text(encoding="utf-8"), {"__name__": "__main__"})
    packages = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    assert sorted(said["packages"]) == sorted(packages)
    assert said["package_dir"] == {"fastpix2pix.kernels": "kernels"}
    assert said["package_data"] == {"fastpix2pix": ["py.typed"]}

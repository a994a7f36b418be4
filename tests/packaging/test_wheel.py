"""The built wheel holds the whole package, and the first command runs from it in a clean environment."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a command prints; its error is the test's."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _has_what_builds() -> bool:
    try:
        return int(version("setuptools").split(".")[0]) >= 77 and bool(version("wheel"))
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by ``python -m build`` from a copy of the files that a build needs."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("fastpix2pix", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    alone = ["--no-isolation"] if _has_what_builds() else []  # else it fetches setuptools
    run(sys.executable, "-m", "build", "--wheel", *alone, "--outdir", out, source, cwd=out)
    (built,) = out.iterdir()
    return built


@pytest.mark.slow
def test_wheel_holds_every_module_and_nothing_else(wheel):
    expected = {"fastpix2pix/py.typed"}
    for package, folder in (("fastpix2pix", ROOT / "fastpix2pix"), ("fastpix2pix/kernels", ROOT / "kernels")):
        expected |= {f"{package}/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "fastpix2pix/kernels/norm_act_kernels.py" in found
    assert found == expected


@pytest.mark.slow
def test_first_command_runs_from_the_wheel(wheel, tmp_path):
    """In a virtual environment that sees this one's PyTorch, but not the clone."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # A path in a .pth file comes last, and .pth files there, as of an editable install, are not followed.
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "packages_of_another.pth").write_text("\n".join(others) + "\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    where = "import fastpix2pix.kernels.norm_act as module; print(module.__file__)"
    assert Path(run(python, "-c", where, cwd=tmp_path).strip()).is_relative_to(site)

    small = (
        "--netG unet_32 --load_size 32 --crop_size 32 --ngf 4 --ndf 4 --steps 2 --num_threads 1 --device cpu"
    )
    folder = tmp_path / "cache" / "synthetic-v1-400-20-20-seed0"
    paint = (
        "import sys; from pathlib import Path; import numpy as np; from fastpix2pix.data.painter import *\n"
        "for split in ('train', 'test'):\n"
        "    folder = Path(sys.argv[1], split)\n"
        "    folder.mkdir(parents=True)\n"
        "    for i in range(2): paint_pair(np.random.default_rng(i)).save(folder / f'{i}.jpg')"
    )
    run(python, "-c", paint, folder, cwd=tmp_path)
    cache = {"FASTPIX2PIX_CACHE": str(tmp_path / "cache")}
    said = run(python, "-m", "fastpix2pix.train", *small.split(), cwd=tmp_path, **cache)
    assert "done: 2 steps" in said
    use = (
        "import fastpix2pix, numpy as np\n"
        "model = fastpix2pix.load('checkpoints/experiment_name', device='cpu')\n"
        "print(model.source, model(np.zeros((40, 50, 3), np.uint8)).shape)"
    )
    assert run(python, "-c", use, cwd=tmp_path).strip() == "experiment_name, step 2 (40, 50, 3)"

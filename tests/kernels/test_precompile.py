"""Kernels that were compiled beforehand, in other processes, are found in Triton's cache by the training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastpix2pix.kernels import precompile as module
from fastpix2pix.kernels.language import HAS_TRITON
from fastpix2pix.kernels.launch import Launch, observed
from fastpix2pix.kernels.precompile import precompile
from fastpix2pix.kernels.variants import Variant

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

ARCH = (9, 0)

OPS = """
import torch
from fastpix2pix.kernels import adam, launch, norm_act
from fastpix2pix.kernels.reference import NormActConfig

def vectors(device):
    # Aligned to 16 bytes, and not: the kernels differ.
    buffer = torch.zeros(200, device=device)
    return [buffer[:64], buffer[64:128], buffer[129:]]

def ops(device):
    clock = adam.AdamClock.create(torch.device(device))
    form = adam.AdamForm(0.5, 0.999, 1e-7, True)
    adam.advance(adam.Tick(clock, form))
    for vector in vectors(device):
        adam.update([adam.AdamTensors(vector, vector, vector)], [vector], clock, form)
    # Every argument that may be None or 1 is, once.
    pairs = torch.zeros(1, 4, 6, 32, dtype=torch.float16, device=device).permute(0, 3, 1, 2)
    weight, rng = torch.ones(16, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    for batch, c in ((pairs[:, 16:], 16), (pairs[:, :1], 1)):
        config = NormActConfig(dropout=0.5, layer=c)
        norm_act.norm_act_forward(batch, weight[:c], weight[:c], None, None, rng, config)
"""

COMPILE = """
import json
from triton import knobs
from triton.runtime import driver
from fastpix2pix.kernels.variants import AbsentGPU

driver.set_active(AbsentGPU(90))
launches, hits = [], []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
with launch.observed(launches.append, run=False):
    ops("cpu")
for made in launches:
    made.compile()
print(json.dumps(hits))
"""


def collected(device: str) -> list[Launch]:
    scope, launches = {}, []
    exec(OPS, scope)
    with observed(launches.append, run=False):
        scope["ops"](device)
    return launches


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def compiled_in_a_fresh_process() -> list[bool]:
    """Whether each kernel that is compiled there, for tensors that exist, was found in the cache."""
    command = [sys.executable, "-c", OPS + COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_fresh_process_finds_every_kernel(cache, monkeypatch):
    launches, calls = collected("meta"), []
    assert precompile(launches, ARCH, workers=2, progress=lambda *done: calls.append(done)) == 5
    assert calls == [(done, 5) for done in range(1, 6)]
    assert compiled_in_a_fresh_process() == [True] * 5

    monkeypatch.setattr(module, "Popen", lambda *_, **__: pytest.fail("no process is needed"))
    assert precompile(launches, ARCH) == 0


def test_launches_of_one_variant_are_compiled_once():
    launches = collected("meta")
    assert len(launches) == 6 and len({made.variant for made in launches}) == 5
    assert [made.variant for made in launches] == [made.variant for made in collected("cpu")]


def test_a_kernel_that_fails_is_passed_over(cache, tmp_path, monkeypatch):
    """One that raises, and one that takes its worker with it."""
    deadly = tmp_path / "dies_on_import.py"
    deadly.write_text("import os; os._exit(1)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, deadly.stem, SimpleNamespace(__file__=str(deadly)))
    bad = [
        Variant(deadly.stem, "kernel", (), ()),
        Variant("fastpix2pix.kernels.adam_kernels", "there_is_no_such_kernel", (), ()),
    ]
    launches = [*(SimpleNamespace(variant=variant) for variant in bad), collected("meta")[0]]
    assert precompile(launches, ARCH, workers=1) == 1
    assert not list(cache.glob("fastpix2pix-*")), "the next start tries again"


def test_nothing_to_compile(cache):
    assert precompile([], ARCH) == 0


def test_workers_do_not_import_torch():
    """It takes longer to import than a kernel to compile."""
    names = ("precompile", "norm_act_kernels", "gan_loss_kernels", "tanh_l1_kernels", "adam_kernels")
    names += ("deep_conv_kernels",)
    code = "".join(f"import fastpix2pix.kernels.{name}\n" for name in names)
    code += "import sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

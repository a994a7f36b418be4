"""The self-check, both sides on the CPU: what it sees, and what is given up when something fails."""

import subprocess
from functools import partial

import pytest
import torch

from fastpix2pix.errors import UserError
from fastpix2pix.kernels import language, launch
from fastpix2pix.models import NetworkOptions, build_networks
from fastpix2pix.training import losses, selfcheck
from fastpix2pix.training.diagnosis import explain
from fastpix2pix.training.options import StepOptions
from fastpix2pix.training.selfcheck import Comparison, Networks, verify_or_fall_back

CPU = torch.device("cpu")
errors = pytest.importorskip("triton.runtime.errors", reason="Triton is not installed")


def compare(precision="fp32"):
    networks = Networks(*build_networks(NetworkOptions(netG="unet_32", ngf=8, ndf=8)))
    options = StepOptions(precision=precision)
    return selfcheck.compare_with_reference(networks, options, CPU, size=32, graph=False).difference


def test_equal_steps_differ_by_nothing_and_16_bits_by_their_rounding():
    assert compare() == 0
    assert 0 < compare("bf16") < selfcheck.TOLERANCE["bf16"]


def test_a_loss_that_is_one_percent_off_is_seen(monkeypatch):
    write, calls = losses.LossRing.write, []

    def every_fourth(self, terms, lambda_l1):
        calls.append(1)
        l1 = terms.gen_l1 * (1.01 if len(calls) % 4 == 0 else 1.0)
        write(self, terms._replace(gen_l1=l1), lambda_l1)

    monkeypatch.setattr(losses.LossRing, "write", every_fourth)
    assert compare() == pytest.approx(0.01, rel=0.1)


def test_the_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    compare()
    assert torch.equal(torch.random.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------- falling back


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """As on a GPU with Triton; whatever is switched off is on again after the test."""
    monkeypatch.setattr(language, "HAS_TRITON", True)
    monkeypatch.setattr(launch, "kernels_on_gpu", True)


class Machine:
    """Compares as a GPU would of which some ways ((kernels, graph) pairs) fail: an exception is raised, a
    number is the difference, a string why a capture failed. ``tried``: the ways that were compared.
    """

    def __init__(self, **ways):
        self.ways, self.tried = ways, []

    def __call__(self, graph: bool) -> Comparison:
        way = f"{'kernels' if launch.kernels_on_gpu else 'plain'}{'_graph' if graph else ''}"
        self.tried.append(way)
        result = self.ways.get(way, 1e-6)
        if isinstance(result, Exception):
            raise result
        if isinstance(result, str):
            return Comparison(1e-6, False, result)
        return Comparison(result, graph)


verify = partial(verify_or_fall_back, tolerance=1e-3, graph=True, say=lambda line: None)


def test_a_good_gpu_loses_nothing(recwarn):
    machine = Machine()
    assert verify(machine) == (True, True, ())
    assert machine.tried == ["kernels_graph"] and not recwarn


NO_COMPILER = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
FAILURES = {
    "no C compiler": (NO_COMPILER, "finds no C compiler for its launcher; install gcc"),
    "no Python.h": (subprocess.CalledProcessError(1, ["gcc"]), "Triton's launcher does not compile"),
    "out of resources": (
        errors.OutOfResources(300000, 232448, "shared memory"),
        "more of this GPU than",
    ),
    "ptxas": (errors.PTXASError("fatal: unsupported target"), "ptxas refuses a kernel"),
    "anything else": (ValueError("Pointer argument cannot be accessed"), "ValueError: Pointer argument"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_kernels_that_fail_are_given_up_for_plain_pytorch_in_a_graph(failure):
    error, line = FAILURES[failure]
    machine = Machine(kernels_graph=error, kernels=error)
    with pytest.warns(RuntimeWarning) as warned:
        assert verify(machine)[:2] == (True, False)
    assert machine.tried == ["kernels_graph", "kernels", "plain_graph"]
    assert not launch.kernels_on_gpu
    (message,) = (str(warning.message) for warning in warned)
    assert line in message and "goes on with plain PyTorch in a CUDA graph" in message and "\n" not in message


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    line = explain(subprocess.CalledProcessError(1, ["gcc"]))
    assert line.endswith("Python.h is missing; install python3-dev")


def test_a_capture_that_fails_leaves_the_kernels():
    machine = Machine(kernels_graph="operation not permitted when stream is capturing")
    with pytest.warns(RuntimeWarning, match="Triton kernels, slower; given up: the CUDA graph: operation"):
        assert verify(machine)[:2] == (False, True)
    assert machine.tried == ["kernels_graph"], "what was compared is the eager step already"


def test_a_graph_that_computes_something_else_is_given_up():
    machine = Machine(kernels_graph=0.5)
    with pytest.warns(RuntimeWarning, match="in a CUDA graph: losses differ from the reference by 5.0e-01"):
        assert verify(machine)[:2] == (False, True)
    assert launch.kernels_on_gpu


def test_what_is_left_is_checked_again():
    machine = Machine(kernels_graph=0.5, kernels=float("nan"), plain_graph="refused")
    with pytest.warns(RuntimeWarning, match="plain PyTorch, slower"):
        assert verify(machine)[:2] == (False, False)
    assert machine.tried == ["kernels_graph", "kernels", "plain_graph"]


def test_plain_pytorch_that_disagrees_stops_the_run():
    machine = Machine(kernels_graph=0.5, kernels=0.5, plain_graph=0.5, plain=0.5)
    with pytest.raises(UserError, match="does not compute what the CPU does, with plain PyTorch neither"):
        verify(machine)
    assert machine.tried == ["kernels_graph", "kernels", "plain_graph", "plain"]


def test_no_graph_is_tried_where_none_was_asked_for():
    machine = Machine(kernels=0.5)
    with pytest.warns(RuntimeWarning):
        assert verify(machine, graph=False)[:2] == (False, False)
    assert machine.tried == ["kernels", "plain"]


def test_memory_that_does_not_suffice_is_the_users_to_mend():
    with pytest.raises(UserError, match="does not hold one step on one image; use a smaller --crop_size"):
        verify(Machine(kernels_graph=torch.OutOfMemoryError("CUDA out of memory.")))

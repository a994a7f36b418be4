"""The benchmarks' own truth: the peers compute what we compute, and traffic is counted by its rules."""

import json
import math
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._functorch import config as functorch_config
from torch.nn import functional as F

from benchmarks import compare, outsiders, render, results, roofline, scaling, timing, traffic
from benchmarks.peers import FUSED, PLAIN, PeerStep, Tuning, tuned
from benchmarks.processes import time_in_turns
from benchmarks.timing import Seconds
from benchmarks.variants import RunningVariant, StepVariant, all_variants
from benchmarks.workload import Workload
from fastpix2pix.errors import UserError
from fastpix2pix.kernels import launch
from fastpix2pix.kernels.norm_act import norm_act_forward
from fastpix2pix.kernels.reference import NormActConfig
from fastpix2pix.models import build_networks
from fastpix2pix.training.step import TrainStep

ROOT = Path(__file__).resolve().parents[2]


def miniature(preset, **options):
    small = {"netG": "unet_64", "size": 64, "ngf": 4, "ndf": 4, "no_dropout": True}
    return Workload(preset=preset, **(small | options))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_the_peers_losses_are_ours(preset, batch_size):
    """Nothing is shared but the weights: neither networks, losses, update rule nor Adam."""
    workload = miniature(preset, batch_size=batch_size, ngf=8, ndf=8)
    networks = [network.double() for network in build_networks(workload.network_options())]
    with torch.no_grad():
        # The tutorial's fresh bottleneck is 0, where rounding would decide what a ReLU lets through.
        for parameter in (p for network in networks for p in network.parameters() if p.ndim == 1):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    peers = []
    for tuning in (PLAIN, tuned("cpu")):
        peer = PeerStep(workload, tuning)
        peer.generator.double(), peer.discriminator.double()
        peers.append(peer.load_ours(*networks))
    ours = TrainStep(*networks, workload.step_options())
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        images = torch.rand(2, batch_size, 3, 64, 64, generator=generator, dtype=torch.float64) * 2 - 1
        expected = ours(*images)._asdict()
        for peer in peers:
            losses = peer(*images)
            for name, loss in expected.items():
                # The ring that our losses come from is float32.
                torch.testing.assert_close(losses[name].float(), loss, rtol=2e-6, atol=0)


@pytest.fixture
def functorch_settings():
    """Compiled peers change one; it is put back. Since pytest 9.2 monkeypatch would delete it."""
    with functorch_config.patch(donated_buffer=True):
        yield


@pytest.mark.usefixtures("functorch_settings")
def test_a_peer_that_does_not_compile_runs_eagerly(monkeypatch, capsys):
    def refusing(network, *, options):
        assert options["max_autotune"] and options["triton.cudagraphs"]
        for name in ("max_autotune_conv_bwd_weight_backends", "max_autotune_conv_bwd_input_backends"):
            assert not hasattr(torch._inductor.config, name) or options[name] == "ATEN,TRITON"

        def fail(*images):
            raise RuntimeError("no compiler here\nand much more")

        return fail

    workload = miniature("tutorial")
    pair = workload.pairs(1)[0]
    networks = build_networks(workload.network_options())
    expected = PeerStep(workload).load_ours(*networks)(*pair)
    monkeypatch.setattr(torch, "compile", refusing)
    peer = PeerStep(workload, Tuning(compiled=True)).load_ours(*networks)
    assert peer(*pair) == expected
    assert capsys.readouterr().out == "torch.compile gave up, so this runs eagerly: no compiler here\n"
    peer(*pair)
    assert not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("functorch_settings")
@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_a_compiled_peer_computes_the_same(preset, capsys):
    workload = miniature(preset)
    networks = build_networks(workload.network_options())
    expected, compiled = (
        PeerStep(workload, Tuning(compiled=compiled)).load_ours(*networks) for compiled in (False, True)
    )
    for pair in workload.pairs(2):
        losses = compiled(*pair)
        for name, loss in expected(*pair).items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=0)
    assert not capsys.readouterr().out, "it did compile"


def test_dropout_of_the_peers():
    """The blocks that drop are those of the reference: output sizes 2, 4, 8 of the tutorial, 4, 8, 16."""
    for preset, sizes in (("tutorial", [2, 4, 8]), ("junyanz", [4, 8, 16])):
        peer = PeerStep(Workload(preset=preset, ngf=1, ndf=1))
        dropping = [
            2 ** (i + 1)
            for i, up in enumerate(peer.generator.ups)
            if isinstance(up.dropout, torch.nn.Dropout)
        ]
        assert dropping == sizes


# ---------------------------------------------------------------------------------------------- outsiders

CHECKOUT = Path(__file__).parents[1] / "interop" / "junyanz_miniature"
ITS_OPTIONS = """
import options

class BaseOptions:
    def parse(self):
        return options.parse(train=True)

class TrainOptions(BaseOptions):
    pass  # takes --gpu_ids
"""


def test_a_checkout_of_junyanz_takes_part_with_its_own_code(tmp_path):
    """In a process of its own, as every variant: its modules are called models, options and data."""
    checkout = tmp_path / "checkout"
    shutil.copytree(CHECKOUT, checkout)
    (checkout / "options").mkdir()
    (checkout / "options.py").rename(checkout / "options" / "__init__.py")
    (checkout / "options" / "train_options.py").write_text(ITS_OPTIONS, encoding="utf-8")
    program = f"""
from pathlib import Path
import torch
from benchmarks import outsiders
from benchmarks.workload import Workload

torch.manual_seed(0)
step = outsiders.junyanz_program(Path({str(checkout)!r}), Workload("junyanz", ngf=2, ndf=2))
print("losses", *step().values())
before = [p.clone() for p in step.__closure__[0].cell_contents.netG.parameters()]
step()
after = [*step.__closure__[0].cell_contents.netG.parameters()]
print("moved", sum(bool((a != b).any()) for a, b in zip(before, after)), "of", len(after))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    losses, moved = (
        line.split() for line in done.stdout.splitlines() if line.startswith(("losses", "moved"))
    )
    expected = [math.log(2), 100 * 0.5, math.log(2), math.log(2)]  # G_GAN, G_L1, D_real, D_fake when fresh
    assert [float(loss) for loss in losses[1:]] == pytest.approx(expected, rel=0.1)
    assert int(moved[1]) == int(moved[3]) > 20


def test_what_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--junyanz .*: no models/pix2pix_model.py in it"):
        outsiders.check_checkout(tmp_path, "junyanz")
    with pytest.raises(UserError, match="add --preset junyanz"):
        outsiders.check_checkout(CHECKOUT, "tutorial")


@pytest.mark.skipif(not outsiders.has_tensorflow(), reason="TensorFlow is not installed")
def test_the_tensorflow_tutorial_takes_part():
    """Its first losses are those of fresh networks: a discriminator that can't tell, an image of noise."""
    program = """
from benchmarks import outsiders
from benchmarks.workload import Workload

print("losses", *outsiders.tensorflow_tutorial(Workload(ngf=4, ndf=4))())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    total, disc = (float(loss) for loss in done.stdout.split("losses", 1)[1].split())
    assert disc == pytest.approx(2 * math.log(2), rel=0.3)
    assert total == pytest.approx(math.log(2) + 100 * 0.5, rel=0.1)  # |uniform - about 0| is 1/2


# ------------------------------------------------------------------------------------------------ traffic


def traced(body):
    trace = traffic.Trace()
    with trace():
        body()
    return trace.entries


def test_operands_and_movement():
    x, y = torch.zeros(2, 250), torch.zeros(500)

    def body():
        x.add_(1)  # read and written
        z = x.view(-1) + y  # a view is free
        y.copy_(z)  # written only
        x[0].mul_(x[1])  # slices are operands of their own
        torch.empty(1000)
        y + y  # one operand, used twice
        torch._foreach_copy_([y, x], [z, x.clone()])  # written only, each

    names = ["add_", "add", "copy_", "mul_", "add", "clone", "_foreach_copy_"]
    entries = traced(body)
    assert [entry.name for entry in entries] == names
    assert [entry.operands for entry in entries] == [2000, 6000, 4000, 2000, 4000, 4000, 8000]
    assert [entry.moved for entry in entries] == [4000, 6000, 4000, 3000, 4000, 4000, 8000]


def test_convolutions_are_counted_and_not_computed():
    x = torch.ones(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(5, 3, 4, 4, requires_grad=True)
    made = []
    (entry,) = traced(lambda: made.append(F.conv2d(x, weight, stride=2, padding=1)))
    assert entry.kind == "convolution"
    assert entry.flops == 2 * (4 * 4) * 5 * (3 * 4 * 4)  # a multiplication and an addition a tap
    assert entry.operands == entry.moved == 4 * (3 * 64 + 5 * 48 + 5 * 16)
    assert made[0].shape == (1, 5, 4, 4) and not made[0].any()
    assert made[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options, operands, moved",
    [({"foreach": True}, 48, 72), ({"fused": True}, 16, 28)],
)
def test_optimizers(options, operands, moved):
    """Plain Adam: twelve vectors of the parameters' size go by, six of them updated in place. Fused: weight,
    gradient and both moments, three of them updated."""
    weights = [torch.zeros(1000, requires_grad=True) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    adam = torch.optim.Adam(weights, **options)
    adam.step()
    entries = traced(adam.step)
    assert {entry.kind for entry in entries} == {"optimizer"}
    assert sum(entry.operands for entry in entries) == pytest.approx(operands * 3000, rel=0.01)
    assert sum(entry.moved for entry in entries) == pytest.approx(moved * 3000, rel=0.01)


@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_launches_declare_what_they_are_given(preset, precision):
    """A launch of the step declares the images and vectors among its arguments, and no others."""
    workload = miniature(preset)
    networks = build_networks(workload.network_options())
    step = TrainStep(*networks, workload.step_options(precision))
    dtype = next(step.generator.parameters()).dtype
    images = torch.zeros(2, 1, 3, 64, 64, dtype=dtype)
    launches = []
    with launch.observed(launches.append, run=False):
        step.body(*images)
    assert len({made.name for made in launches}) >= 10

    def memory(tensors):
        tensors = (t for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 2)
        return {t.untyped_storage().data_ptr() for t in tensors}

    for made in launches:
        assert memory((*made.reads, *made.writes)) == memory(torch.utils._pytree.tree_leaves(made.args))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adam_moves_28_bytes_a_weight(precision):
    """Gradient 4, master, both moments 8 each; in 16 bit gradient 2 and working copy 2: of every weight but
    the bottleneck's at batch 1, which does not learn. The two clocks add a few bytes."""
    workload = Workload(ngf=8, ndf=8)
    generator, discriminator = build_networks(workload.network_options())
    weights = sum(p.numel() for network in (generator, discriminator) for p in network.parameters())
    weights -= generator.downs[-1].conv.weight.numel()
    entries = traffic.trace_ours(workload, precision, traffic.Measures(False, False, False))
    moved = sum(entry.moved for entry in entries if entry.kind == "optimizer")
    assert 28 * weights < moved < 28 * weights + 1000


@pytest.mark.parametrize("preset, most_operators", [("tutorial", 125), ("junyanz", 138)])
def test_the_step_stays_lean(preset, most_operators):
    """Traffic that creeps in: per step at batch 1, however narrow the networks are."""
    workload = Workload(preset=preset, ngf=8, ndf=8)
    ours = traffic.summary(traffic.trace_ours(workload, "bf16"))
    plain = traffic.summary(traffic.trace_peer(workload, traffic.PLAIN_ON_GPU))
    assert ours["total"]["operators"] < most_operators < plain["total"]["operators"] * 0.65
    assert ours["total"]["operands_gb"] < 0.4 * plain["total"]["operands_gb"]
    assert ours["copy"]["operands_gb"] < 0.005  # a pair, into the graph and into the discriminator's input
    assert ours["copy"]["operators"] <= 4  # source and target apart, and dropout's counter


@pytest.mark.parametrize(
    "preset, most_operators, most_gb, most_ms", [("tutorial", 130, 1.85, 0.8), ("junyanz", 145, 2.0, 0.89)]
)
def test_the_full_step_by_the_model_with_latency(preset, most_operators, most_gb, most_ms):
    """On an H100, with the second stream beside the first; of our launches all but Adam's and the deep
    convolutions together at most 250 us."""
    entries = traffic.trace_ours(Workload(preset=preset), "bf16")
    gpu = roofline.GPUS["H100"]
    flops = 1e12 * gpu.flops["bf16"]
    assert len(entries) <= most_operators
    assert sum(entry.moved for entry in entries) < 1e9 * most_gb
    ours = [entry for entry in entries if entry.grid and not entry.name.startswith(("adam", "deep"))]
    assert sum(roofline.launch_seconds(entry, gpu, flops) for entry in ours) < 250e-6
    assert roofline.latency_seconds(entries, gpu, flops, overlap=True) < 1e-3 * most_ms


@pytest.mark.parametrize("preset, most_gb, most_ms", [("tutorial", 1.9, 2.85), ("junyanz", 2.05, 3.05)])
def test_the_full_step_on_a_gpu_without_tensor_cores_for_triton(preset, most_gb, most_ms):
    """A V100 in fp16, one launch after the other: weights of at most 64 pixels are updated in one pass."""
    gpu = roofline.GPUS["V100"]
    entries = traffic.trace_ours(Workload(preset=preset), "fp16", capability=gpu.capability)
    names = Counter(entry.name for entry in entries)
    assert names["deep_update"] == (7 if preset == "tutorial" else 8) and "deep_conv_to_small" not in names
    assert sum(entry.moved for entry in entries) < 1e9 * most_gb
    assert roofline.latency_seconds(entries, gpu, 1e12 * gpu.flops["fp16"]) < 1e-3 * most_ms
    aside = {entry.name for entry in entries if entry.aside}
    assert aside == {"adam_mark_non_finite"}, "no weight moves before all gradients are known"
    assert names["adam_mark_non_finite"] == 8, (
        "four of large gradients, four of all the others and the images"
    )


def test_float32_is_traced_as_a_gpu_runs_it():
    """Not as the CPU does, with convolutions of its own."""
    counts = []
    for precision in ("fp32", "bf16"):
        entries = traffic.trace_ours(Workload(ngf=8, ndf=8), precision)
        counts.append(traffic.summary(entries)["convolution"])
    assert counts[0]["operators"] == counts[1]["operators"]
    assert counts[0]["operands_gb"] == 2 * counts[1]["operands_gb"]


# ------------------------------------------------------------------------------------------ measurements


@pytest.mark.parametrize("preset", ["tutorial", "junyanz"])
def test_variants_start_from_the_same_weights_on_the_same_images(preset):
    """Those that compute in float32: which ones do depends on the processor, so the list is made here."""
    workload = miniature(preset, ngf=8, ndf=8)
    variants = [
        StepVariant("plain", "", PLAIN),
        StepVariant("channels-last", "", Tuning(channels_last=True)),
        StepVariant("fused Adam", "", Tuning(channels_last=True, adam=FUSED)),
        StepVariant("ours", ""),
    ]

    def first_losses(variant):
        losses = RunningVariant(variant, workload, torch.device("cpu")).step()
        return torch.stack(list(losses.values() if isinstance(losses, dict) else losses))

    first, *others = map(first_losses, variants)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-6)


def test_ratios_do_not_drift_with_the_machine(monkeypatch):
    """In every round all calls have their turn; a machine that gets slower and slower changes no ratio."""
    now, made = 0.0, []

    def call(name, seconds):
        def work():
            nonlocal now
            made.append(name)
            now += seconds * (1 + len(made))

        return work

    monkeypatch.setattr(timing, "clock", lambda: now)
    calls = {"slow": call("slow", 3), "fast": call("fast", 1)}
    turns = {name: partial(timing.timed, work, times=2) for name, work in calls.items()}
    seconds = timing.interleaved(turns, rounds=400)
    rounds = {tuple(made[i : i + 4]) for i in range(0, len(made), 4)}
    assert len(made) == 400 * 4
    assert rounds == {("slow", "slow", "fast", "fast"), ("fast", "fast", "slow", "slow")}
    slow, fast = ([taken.wall for taken in seconds[name]] for name in ("slow", "fast"))
    assert fast[-1] > 100 * fast[0]
    assert 2 * sum(slow + fast) == pytest.approx(now)
    assert timing.speedup(slow, fast) == pytest.approx(3, rel=0.01)


def test_timing_in_turns():
    """Seconds are those of the variant's own process, within the time that passed here."""
    variants = all_variants(torch.device("cpu"))[:2]
    began = time.perf_counter()
    seconds = time_in_turns(variants, miniature("tutorial", ngf=8, ndf=8), torch.device("cpu"), rounds=3)
    elapsed = time.perf_counter() - began
    assert list(seconds) == [variant.name for variant in variants]
    taken = [turn for turns in seconds.values() for turn in turns]
    assert len(taken) == 6 and all(turn.cpu > 0 for turn in taken)
    assert 0 < sum(turn.wall for turn in taken) < elapsed


def test_a_variant_that_cannot_run_is_named():
    eights = StepVariant("ours in 8 bits", "", precision="fp8")
    with pytest.raises(RuntimeError, match="ours in 8 bits has stopped"):
        time_in_turns([eights], miniature("tutorial"), torch.device("cpu"), rounds=1)


def test_comparison_figures():
    seconds = {
        "plain PyTorch": [Seconds(8, 80), Seconds(4, 40), Seconds(6, 60)],
        "tuned PyTorch": [Seconds(4, 20), Seconds(4, 20), Seconds(9, 45)],
        "ours": [Seconds(2, 4), Seconds(1, 2), Seconds(3, 6)],
    }
    figures = compare.figures(seconds, "ours")
    assert (figures["ms"], figures["cpu_ms"]) == (2000, 4000)
    assert figures["over_plain"] == {"wall": 4, "cpu": 20}  # of 4, 4, 2 and 20, 20, 10
    assert figures["over_tuned"] == {"wall": 3, "cpu": 7.5}  # of 2, 4, 3 and 5, 10, 7.5


def bench_kernels():
    pytest.importorskip("pytest_benchmark")
    from benchmarks import bench_kernels

    return bench_kernels


def _tensors(values):
    return [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    "case", ["norm_act down 16x16x512", "tanh_l1 256x256", "adam 512x512x4x4", "conv 8x8, 512 to 512",
             "transposed conv 4x4, 1024 to 512", "weight gradient and adam 4x4x512"],
)  # fmt: skip
def test_what_is_timed_is_the_same_work(case, monkeypatch):
    """By whichever means; torch.compile and dropout aside, which run on a GPU or draw their own masks.
    In fp32 on every processor: in 16 bit the sides round at different places."""
    bench = bench_kernels()
    monkeypatch.setattr(bench, "DTYPE", torch.float32)
    make, sides = (
        (bench.CONVOLUTIONS[case], ("fastpix2pix", "torch")) if "conv" in case else bench.CASES[case]
    )
    made = {}
    for side in set(sides) - {"torch.compile"}:
        torch.manual_seed(0)
        made[side] = _tensors(make()[side]())
    expected = made.pop("fastpix2pix")
    assert made and all(value.any() for value in expected)
    for others in made.values():
        for other, value in zip(others, expected, strict=True):
            torch.testing.assert_close(other, value, rtol=1e-3, atol=2e-4 * value.abs().max().item())


def test_the_gan_losses_that_are_timed_are_the_same():
    calls = bench_kernels().gan_loss_calls()
    ours, (disc, gen) = calls["fastpix2pix"](), calls["torch"]()
    torch.testing.assert_close(disc[0], ours.disc_grad)
    torch.testing.assert_close(gen[0][1:], ours.gen_grad)


# ------------------------------------------------------------------------------------------------- model


def entries(*figures):
    return [traffic.Entry("x", "other", 0, moved, flops) for moved, flops in figures]


def test_model_of_a_step():
    """At 100 bytes and 10 operations a second: bound by memory, by arithmetic, by neither."""
    step = entries((500, 20), (100, 40), (0, 0))
    assert roofline.device_seconds(step, 100, 10) == 5 + 4
    launches, operators = 3e-6 * roofline.CAPTURED_LAUNCH_US, 3e-6 * roofline.EAGER_OPERATOR_US
    assert roofline.captured_seconds(step, 1e8, 1e7) == pytest.approx(9e-6 + launches)
    assert roofline.eager_seconds(step, 100, 10) == 9  # the host is done long before
    assert roofline.eager_seconds(step, 1e8, 1e7) == pytest.approx(operators)


def launch_entry(moved=0, *, programs=None, warps=8, trips=1, aside=False, launches=1, flops=0, joined=0):
    grid = None if programs is None else traffic.Grid(programs, warps, trips)
    return traffic.Entry("x", "other", 0, moved, flops, launches, grid, aside, joined)


GPU = roofline.Gpu(bandwidth=100, l2=1000, multiprocessors=10, flops={})


def microseconds(entry):
    return 1e6 * roofline.launch_seconds(entry, GPU, 1e12)


def test_latency_of_a_launch():
    """Ten multiprocessors, two programs of eight warps on each; 100 GB/s of memory, 1000 of the L2 cache."""
    node, trip = roofline.NODE_US, roofline.TRIP_US
    assert microseconds(launch_entry()) == pytest.approx(node + trip)
    assert microseconds(launch_entry(launches=2)) == pytest.approx(2 * node + trip)
    assert microseconds(launch_entry(10**6)) == pytest.approx(node + 10)
    assert microseconds(launch_entry(10**6, flops=20 * 10**6)) == pytest.approx(node + 20)
    assert microseconds(launch_entry(programs=20, trips=3)) == pytest.approx(node + 3 * trip)
    assert microseconds(launch_entry(programs=21, trips=3)) == pytest.approx(node + 6 * trip), "two waves"
    assert microseconds(launch_entry(programs=21, warps=4)) == pytest.approx(node + trip)
    assert microseconds(launch_entry(programs=11, warps=32)) == pytest.approx(node + 2 * trip)
    old = replace(GPU, capability=(7, 0), flops={"fp32": 0.5})
    for programs, busy in ((None, 10), (10, 20)):  # a library's on tensor cores, ours by FMA
        entry = launch_entry(flops=10**7, programs=programs)
        assert 1e6 * roofline.launch_seconds(entry, old, 1e12) == pytest.approx(node + busy)
    # One of ten multiprocessors takes a tenth of what the cache gives, ten take less time than memory.
    assert microseconds(launch_entry(10**6, programs=1)) == pytest.approx(node + trip + 10)
    assert microseconds(launch_entry(10**6, programs=10)) == pytest.approx(node + 10)


def test_a_second_stream_hides_what_is_shorter():
    """Of the launches from the first one aside on, in nodes and trips: 2 and 1, then the bus decides."""
    one = 1e-6 * (roofline.NODE_US + roofline.TRIP_US)

    def seconds(entries, overlap=True):
        return roofline.latency_seconds(entries, GPU, 1e12, overlap=overlap) / one

    here, aside = launch_entry(), launch_entry(aside=True)
    step = [here, here, aside, here, here]
    assert seconds(step, overlap=False) == pytest.approx(5)
    assert seconds(step) == pytest.approx(2 + 2)
    assert seconds([here, aside, aside, here]) == pytest.approx(1 + 2)
    assert seconds([here, here]) == pytest.approx(2)
    after = launch_entry(joined=1)
    assert seconds([aside, here, after, after]) == pytest.approx(1 + 2), "after the join nothing is beside"
    assert seconds([aside, here, launch_entry(aside=True, joined=1), after]) == pytest.approx(1 + 1)
    heavy = 10**8  # bytes: 1 ms each, on one bus
    both = [launch_entry(heavy, aside=True), launch_entry(heavy)]
    assert 1e3 * roofline.latency_seconds(both, GPU, 1e12, overlap=True) == pytest.approx(2)


def test_one_layer_counted_by_hand():
    """bf16, 16x16 pixels of 512 channels: x, y and skip; weight, bias and running statistics read, these
    last and the saved ones written, float32."""
    x = torch.zeros(1, 512, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    rows = torch.zeros(4, 512).unbind()
    config = NormActConfig(slope=0.3, skip_slope=0.3)
    (entry,) = traced(lambda: norm_act_forward(x, *rows, None, config))
    assert entry.moved == 3 * 2 * 16 * 16 * 512 + 8 * 4 * 512
    assert entry.operands == entry.moved - 2 * 4 * 512
    assert entry.grid == traffic.Grid(programs=32, warps=8, trips=1)


def test_measured_rates(monkeypatch):
    """A clock that shows a second more whenever it is read: operations are divided by what passed."""
    ticks = iter(range(1000))
    monkeypatch.setattr(roofline, "clock", lambda: next(ticks))
    device = torch.device("cpu")
    assert roofline.copy_bandwidth.__wrapped__(device, size=1000) == 2000
    assert roofline.matmul_rate.__wrapped__(device, "fp32", size=10) == 2 * 10**3


# ----------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("page", "words"), render.RENDERED.items(), ids=lambda value: getattr(value, "name", "")
)
def test_pages_say_what_was_measured(page, words):
    text = page.read_text(encoding="utf-8")
    assert text.count(render.BEGIN) == text.count(render.END) == 1
    assert render.replaced(text, words(results.committed())) == text, "run python -m benchmarks.render"


def test_without_their_packages_the_benchmarks_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cpuinfo", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[bench\]"'):
        results.environment(torch.device("cpu"))


def test_committed_results_describe_themselves_and_no_machine():
    committed = results.committed()
    assert {result["what"] for result in committed} == {
        "comparison",
        "roofline",
        "scaling",
        "suite",
        "accelerate",
        "ops",
    }
    for result in committed:
        environment = result["environment"]
        assert environment["versions"]["torch"] and environment["commit"] and environment["date"]
        assert environment["gpu"] or environment["cpu"]["name"]
    text = json.dumps(committed)
    assert not re.search(r"/(home|root|tmp|work|mnt|Users|opt|usr)\b|\"node\"|hostname", text)


def test_the_page_on_many_gpus_shows_the_committed_model():
    (result,) = (one for one in results.committed() if one["what"] == "scaling")
    page = (render.ROOT / "docs" / "many-gpus.md").read_text(encoding="utf-8")
    assert "\n".join(scaling.table(result)) in page, "copy what python -m benchmarks.scaling prints"


def test_model_of_an_exchange():
    """Of a miniature: bytes by hand, from the weights; PCIe slower than NVLink, more ranks more bytes."""
    workload, exchange = miniature("tutorial"), scaling.Counting(4)
    step = traffic.our_step(workload, "bf16", exchange)
    exchange.sent, exchange.collectives = 0.0, 0
    traffic.trace_ours(workload, "bf16", step=step)
    weights = sum(
        p.numel() * p.element_size() for one in (step.generator, step.discriminator) for p in one.parameters()
    )
    # Of weights so few as these, alignment to 64 elements adds a few percent; and the losses, 5 floats.
    assert 1 <= exchange.sent / (2 * weights * 3 / 4) < 1.04
    rank = scaling.Rank([], 100e6, 10)
    link = scaling.Link("A100", 100)
    expected = 100e6 / (0.7 * 100e9) + 10 * 30e-6
    assert scaling.exchange_seconds(rank, link) == pytest.approx(expected)


def test_a_modelled_time_is_called_so():
    numbers = {
        "operators": 3,
        "launches": 4,
        "operands_gb": 1.0,
        "moved_gb": 1.5,
        "device_ms": 1.0,
        "ms": 2.0,
    }
    numbers |= {"latency_ms": 3.0, "overlapped_ms": 2.5}
    peers = "plain PyTorch", "tuned PyTorch", "tuned PyTorch, in CUDA graphs"
    rows = dict.fromkeys((*peers, "fastpix2pix"), numbers)
    result = {
        "what": "roofline",
        "conditions": {"preset": "tutorial", "batch_size": 1, "pixels": 256},
        "assumed": {
            "eager_operator_us": 8.0,
            "captured_launch_us": 1.5,
            "node_us": 2.0,
            "trip_us": 0.7,
            "resident_warps": 16,
        },
        "ladder": {"H100": [{"rung": "+ a graph", "operators": 3, "moved_gb": 1.5, "ms": 2.0}]},
        "model": {name: {"sixteen": gpu.sixteen, "steps": rows} for name, gpu in roofline.GPUS.items()},
    }
    lines = render.section([result]).splitlines()
    headers = [line for line in lines if "H100" in line]
    assert [header.count("ms (model)") for header in headers] == [len(roofline.GPUS)] * 2 + [1]
    assert "| + a graph | 3 | 1.50 | 2.00 |" in lines
    assert (
        "| tutorial, batch 1, 256x256: **fastpix2pix** | 3 | 1.00 | 1.50 | 2.00 | 2.00 | 2.00 | 2.00 |"
        in lines
    )
    assert "| tutorial, batch 1, 256x256: **fastpix2pix** | 4 | 3.00 | 3.00 | 3.00 | 3.00 |" in lines
    beside = "| tutorial, batch 1, 256x256: **fastpix2pix**, second stream | 4 | 2.50 | 2.50 | 2.50 | 2.50 |"
    assert beside in lines
    assert "Nothing here was measured on a GPU yet." in lines
    summary = " ".join(render.summary([result]).split())
    assert "A model, not a measurement, with latency, puts a step" in summary
    assert "256x256 on an H100 at 3.00 ms (2.50 ms if its second stream never has to wait)" in summary
    assert all(title.startswith("model with latency: ") for title, _ in render.ladders([result]))


def test_a_gpu_that_was_measured_is_named():
    figures = {"ms": 1.2345, "over_plain": {"wall": 3.0}, "over_tuned": {"wall": 2.0}}
    environment = {
        "cpu": {"name": "C", "cores": 16, "threads": 16, "simd": "AVX512", "load": 1.0},
        "gpu": {"name": "NVIDIA X", "cuda": "12.8", "power.limit": "350.00 W"},
        "versions": {"torch": "2.9"},
        "commit": "abc",
        "date": "2026-01-01",
    }
    conditions = {"preset": "junyanz", "batch_size": 4, "pixels": 256, "rounds": 11}
    names = ("plain PyTorch", "tuned PyTorch", "fastpix2pix bf16, captured", "fastpix2pix fp32")
    rows = [figures | {"name": name, "ms": ms} for name, ms in zip(names, (4, 3, 1.2345, 2), strict=True)]
    result = {"what": "comparison", "environment": environment, "conditions": conditions, "figures": rows}
    text = render.section([result])
    assert "NVIDIA X, power limit 350.00 W, PyTorch 2.9, CUDA 12.8" in " ".join(text.split())
    assert "| **fastpix2pix bf16, captured** | 1.23 | 3.00 | 2.00 |" in text
    assert "on a GPU yet" not in text and "busy" not in text
    text = render.summary([result])
    fastest = "| junyanz, batch 4, 256x256, bf16, captured | 4 ms | 3 ms | **1.23 ms** | 3.00, 2.00 |"
    assert fastest in text and "NVIDIA X, power limit 350.00 W, PyTorch 2.9, CUDA 12.8" in text
    assert "model" not in text


def test_results_of_the_suites_do_not_name_the_host():
    pytest.importorskip("cpuinfo")
    from benchmarks.conftest import pytest_benchmark_update_json

    output = {
        "machine_info": {"node": platform.node()},
        "commit_info": {"project": "folder"},
        "datetime": "now",
        "benchmarks": [{"name": "test_step", "stats": {"median": 1.23456789, "data": [1.0, 2.0]}}],
    }
    pytest_benchmark_update_json(output)
    assert set(output) == {"what", "environment", "benchmarks"}
    assert output["benchmarks"][0]["stats"] == {"median": 1.2346}
    assert platform.node() not in json.dumps(output)
    assert output["environment"]["cpu"]["threads"] == torch.get_num_threads()

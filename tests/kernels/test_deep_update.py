"""Weight gradient and Adam in one kernel, against convolution and Adam in fp64."""

import numpy as np
import pytest
import torch
from address_recorder import in_order, recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastpix2pix.kernels import adam, deep_update, language, launch, reference
from fastpix2pix.kernels.adam import AdamClock, AdamForm, AdamTensors

KERAS, TORCH = AdamForm(0.5, 0.999, 1e-7, True), AdamForm(0.9, 0.99, 1e-8, False)


@pytest.fixture(params=["triton", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the inputs: of the kernel, then of its twin."""
    return request.getfixturevalue("triton_device") if request.param == "triton" else "cpu"


class Layer:
    """A deep layer's images, weight and moments, and what fp64 makes of them."""

    def __init__(self, n, cs, cb, h, w, dtype, device, slices=False):
        self.generator = torch.Generator().manual_seed(n * cs + cb + h)
        self.dtype, self.device = dtype, device
        self.small = self._image(n, cs, h, w, slices)
        self.big = self._image(n, cb, 2 * h, 2 * w, slices)
        self.shape = cs, cb, 4, 4
        master = self._random(*self.shape) * 0.02
        # Moments of the gradient's own size: were v far smaller, rounding of the gradient would be magnified.
        pixels = n * h * w
        m = self._random(*self.shape) * pixels**0.5
        v = (self._random(*self.shape).square() + 0.1) * pixels
        self.exact = [t.double() for t in (master, m, v)]
        flat = [t.permute(0, 2, 3, 1).flatten().to(device, copy=True) for t in (m, v, master)]
        if dtype.itemsize == 2:
            flat[2:] = [None, *reference.split_master(flat[2], dtype)]
        self.weight = AdamTensors(*flat)
        self.clock = AdamClock.create(torch.device(device))
        self.clock.lr.fill_(2e-3)
        self.scale: dict[str, torch.Tensor] = {}

    def scale_gradients(self, scale, found_inf=0.0):
        """Have an image multiplied by a loss scale."""
        self.small = (self.small.float() * scale).to(self.dtype)
        numbers = {"grad_scale": scale, "found_inf": found_inf}
        self.scale = {name: torch.tensor(number, device=self.device) for name, number in numbers.items()}

    def _random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def _image(self, n, c, h, w, slices):
        """Channels-last; with ``slices`` the second half of a wider image's channels."""
        wide = self._random(n, 2 * c if slices else c, h, w).to(self.device, self.dtype)
        return wide.contiguous(memory_format=torch.channels_last)[:, -c:]

    def exact_gradient(self):
        """The weight gradient of the convolution that maps big to small, where small is the output's."""
        weight = torch.zeros(self.shape, dtype=torch.float64, requires_grad=True)
        out = F.conv2d(self.big.double().cpu(), weight, stride=2, padding=1)
        return torch.autograd.grad(out, weight, self.small.double().cpu())[0]

    def step(self, form):
        adam.advance(adam.Tick(self.clock, form))
        deep_update.update(self.small, self.big, self.weight, self.clock, form, **self.scale)
        numbers = {"lr": self.clock.lr.cpu(), "step": self.clock.step.cpu()}
        numbers |= {name: number.cpu() for name, number in self.scale.items()}
        master, m, v = self.exact
        reference.adam_step(master, self.exact_gradient(), m, v, None, **numbers, **form._asdict())

    def results(self):
        m, v, master, working, remainder = self.weight
        if master is None:
            master = reference.join_master(working, remainder)
        cs, cb, *_ = self.shape
        return [t.cpu().view(cs, 4, 4, cb).permute(0, 3, 1, 2) for t in (master, m, v)]

    def check(self):
        for actual, exact in zip(self.results(), self.exact, strict=True):
            slack = 1e-6 * exact.abs().max().item()
            torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=slack)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Images, rows, columns, height and width of the small image; a type.
LAYERS = {
    "1 pixel": (1, 40, 80, 1, 1, BF16),
    "1 pixel, fp32": (1, 24, 16, 1, 1, FP32),
    "2 images of a pixel, fp16": (2, 24, 16, 1, 1, FP16),
    "3 images of a pixel": (3, 16, 48, 1, 1, FP32),
    "2x2": (1, 7, 16, 2, 2, BF16),
    "2 images of 2x3": (2, 33, 16, 2, 3, BF16),
    "4x4": (1, 24, 80, 4, 4, BF16),
    "3 images of 4x4": (3, 24, 16, 4, 4, FP32),
    "8x8": (1, 31, 16, 8, 8, BF16),
    "8x8, fp16": (1, 40, 80, 8, 8, FP16),
    "2 images of 8x8": (2, 24, 16, 8, 8, FP32),
    "13x11": (1, 72, 16, 13, 11, BF16),
    "16x16": (1, 24, 80, 16, 16, BF16),
    "16x16, fp32": (1, 24, 16, 16, 16, FP32),
    "16x16, fp16": (1, 72, 16, 16, 16, FP16),
    "512 columns": (1, 16, 512, 2, 2, BF16),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_equals_gradient_and_adam_in_fp64(device, layer):
    layer = Layer(*LAYERS[layer], device)
    for form in (KERAS, TORCH):
        layer.step(form)
    layer.check()


@pytest.mark.parametrize("layer", [name for name, (n, *_, h, w, _) in LAYERS.items() if n * h * w <= 64])
def test_without_tensor_cores_too(triton_device, layer):
    """Sixteen pixels at a time."""
    layer, launches = Layer(*LAYERS[layer], triton_device), []
    with launch.assuming((7, 5)), launch.observed(launches.append):
        for form in (KERAS, TORCH):
            layer.step(form)
    layer.check()
    assert {this.options["BLOCK_PIXELS"] for this in launches if this.name == "deep_update"} == {16}


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_gradients_are_divided_by_the_loss_scale(triton_device, split):
    """The images' products are beyond fp16, the gradient is not; a whole master has a working copy."""
    layer = Layer(1, 24, 48, 4, 4, FP16, triton_device)
    if not split:
        m, v, _, working, remainder = layer.weight
        layer.weight = AdamTensors(m, v, reference.join_master(working, remainder), working)
    layer.scale_gradients(2.0**14)
    assert (layer.exact_gradient().abs() > 65504).float().mean() > 0.1
    for form in (KERAS, TORCH):
        layer.step(form)
    layer.check()
    if not split:
        assert torch.equal(layer.weight.working, layer.weight.master.half())


def test_nothing_moves_once_something_is_not_finite(triton_device):
    layer = Layer(1, 24, 48, 4, 4, FP16, triton_device)
    layer.scale_gradients(2.0**8, found_inf=1.0)
    before = [tensor.clone() for tensor in layer.weight.writes]
    layer.step(KERAS)
    for mine, was in zip(layer.weight.writes, before, strict=True):
        assert torch.equal(mine, was)
    layer.check()  # nor does the reference's


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["small", "big", None]),
    st.sampled_from([torch.inf, -torch.inf, torch.nan]),
)
def test_a_gradient_is_finite_just_where_both_images_are(seed, where, value):
    """In float32, of the largest values that float16 has, and a value that is not finite anywhere."""
    random = torch.Generator().manual_seed(seed)

    def image(channels, side):
        signs = torch.randint(0, 2, (2, channels, side, side), generator=random) * 2 - 1
        return (signs * 65504.0).half()

    images = {"small": image(3, 8), "big": image(2, 16)}
    if where is not None:
        flat = images[where].view(-1)
        flat[torch.randint(len(flat), (), generator=random)] = value
    gradient = reference.deep_conv_weight(*(one.float() for one in images.values()))
    assert bool(gradient.isfinite().all()) is (where is None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("rows, columns, side", [(512, 512, 1), (1024, 512, 2), (512, 256, 16)])
def test_layers_of_both_presets(triton_device, rows, columns, side, dtype):
    layer = Layer(1, rows, columns, side, side, dtype, triton_device)
    layer.step(TORCH)
    layer.check()


def test_images_may_be_slices_of_channels(device):
    layer = Layer(2, 40, 48, 3, 2, torch.bfloat16, device, slices=True)
    layer.step(KERAS)
    layer.check()


def test_kernel_and_twin_differ_by_the_order_of_sums_alone(triton_device, monkeypatch):
    """Of the masters most are equal bit for bit, the others by an ulp of their update."""
    ways = [Layer(1, 40, 48, 4, 4, torch.bfloat16, triton_device) for _ in range(2)]
    ways[0].step(KERAS)
    monkeypatch.setattr(deep_update, "use_triton", lambda tensor: False)
    ways[1].step(KERAS)
    mine, twin = (way.results()[0] for way in ways)
    assert (mine != twin).float().mean() < 0.2
    torch.testing.assert_close(mine, twin, rtol=1e-6, atol=1e-8)


def test_the_kernel_reads_the_gradient_as_it_was_summed(device):
    """In float32: sums of 64 products of bf16 values are no bf16 values."""
    layer = Layer(1, 16, 16, 8, 8, torch.bfloat16, device)
    layer.weight.exp_avg.zero_()
    layer.clock.lr.fill_(0.0)
    adam.advance(adam.Tick(layer.clock, KERAS))
    deep_update.update(layer.small, layer.big, layer.weight, layer.clock, KERAS)
    _, m, _ = layer.results()
    torch.testing.assert_close(m.double(), layer.exact_gradient() / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, rows, columns, side", [(1, 40, 48, 1), (2, 12, 5, 2), (1, 33, 16, 4)])
def test_on_a_cpu_a_few_rows_at_a_time(n, rows, columns, side, monkeypatch):
    """Of whole masters, in chunks that do not divide the rows: the update by float64's gradient."""
    monkeypatch.setattr(deep_update, "use_triton", lambda tensor: False)
    monkeypatch.setattr(adam, "use_triton", lambda tensor: False)
    monkeypatch.setattr(adam, "CPU_CHUNK", 7 * 16 * columns)
    layer = Layer(n, rows, columns, side, side, torch.bfloat16, "cpu")
    m, v, _, working, remainder = layer.weight
    layer.weight = AdamTensors(m, v, reference.join_master(working, remainder), working)
    for form in (KERAS, TORCH):
        layer.step(form)
    layer.check()
    assert torch.equal(working, layer.weight.master.bfloat16())


def test_on_a_cpu_thin_products_alone(monkeypatch):
    """With more pixels a product in bf16 is faster, and with weights in fp32 a gradient that is stored."""
    monkeypatch.setattr(deep_update, "use_triton", lambda tensor: False)

    def served(side, dtype):
        shapes = (1, 24, side, side), (1, 10, 2 * side, 2 * side), (24, 10, 4, 4)
        images = (torch.zeros(shape, dtype=dtype) for shape in shapes)
        return deep_update.serves(*(t.contiguous(memory_format=torch.channels_last) for t in images))

    assert served(4, torch.bfloat16)
    assert not served(5, torch.bfloat16)
    assert not served(4, torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda small, big, weight: (small, big, weight.contiguous()),
        lambda small, big, weight: (small.double(), big.double(), weight.double()),
        lambda small, big, weight: (small, big, weight[:, :, :3, :3]),
        lambda small, big, weight: (small, big, weight[:, :24]),
        lambda small, big, weight: (small.float(), big, weight),
    ],
    ids=["layout", "fp64", "3x3", "columns", "types"],
)
def test_weights_that_have_no_kernel(triton_device, change):
    small, big, weight = (
        torch.zeros(shape, dtype=torch.bfloat16, device=triton_device).contiguous(
            memory_format=torch.channels_last
        )
        for shape in ((1, 24, 2, 2), (1, 32, 4, 4), (24, 32, 4, 4))
    )
    assert deep_update.serves(small, big, weight)
    assert not deep_update.serves(*change(small, big, weight))


@pytest.mark.parametrize("side, before_sm_80", [(8, True), (9, False)])
def test_without_tensor_cores_images_of_few_pixels_alone(triton_device, side, before_sm_80):
    small, big, weight = (
        torch.zeros(shape, dtype=FP16, device=triton_device).contiguous(memory_format=torch.channels_last)
        for shape in ((1, 24, side, side), (1, 32, 2 * side, 2 * side), (24, 32, 4, 4))
    )
    assert deep_update.serves(small, big, weight)
    with launch.assuming((7, 0)):
        assert deep_update.serves(small, big, weight) is before_sm_80


@pytest.mark.parametrize("side, trips", [(1, 2), (8, 2), (16, 5)])
def test_trips_to_memory(side, trips):
    """Blocks of at most 64 pixels one after the other, and then the weight's streams."""
    small, big = (torch.empty(1, 32, s, s, dtype=BF16, device="meta") for s in (side, 2 * side))
    vectors = torch.empty(3, 32 * 32 * 16, device="meta").unbind()
    clock, launches = AdamClock.create(torch.device("meta")), []
    with launch.observed(launches.append, run=False):
        deep_update.update(small, big, AdamTensors(*vectors), clock, KERAS)
    assert [(this.name, this.trips) for this in launches] == [("deep_update", trips)]


@pytest.mark.skipif(not language.INTERPRETING, reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_programs_keep_to_themselves_and_their_order_does_not_matter(triton_device, dtype):
    made = []
    for order in (range, lambda n: range(n - 1, -1, -1), np.random.default_rng(0).permutation):
        layer = Layer(2, 40, 80, 2, 3, dtype, triton_device)
        if dtype == FP16:
            layer.scale_gradients(2.0**8)
        with recorded() as recording, in_order(order):
            layer.step(KERAS)
        assert recording.launches == {"adam_advance": 1, "deep_update": 1}
        assert not recording.findings, [str(finding) for finding in recording.findings]
        made.append([tensor.clone() for tensor in layer.weight.writes])
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))

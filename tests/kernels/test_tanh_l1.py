"""tanh + L1, forward and backward: kernels against the fp64 reference, that against autograd and Keras."""

import pytest
import torch
from golden import recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import RTOL, assert_stored
from torch import Tensor

from fastpix2pix.kernels import launch, reference
from fastpix2pix.kernels import tanh_l1 as kernels
from fastpix2pix.kernels.tanh_l1 import BLOCK, tanh_l1, tanh_l1_backward, tanh_l1_forward

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# The network's images, as large as the interpreter can take, and odd shapes.
SHAPES = [(1, 3, 64, 32), (2, 3, 7, 5), (3, 1, 33, 17), (1, 17, 1, 1), (2, 130, 3, 1), (1, 3, 1, 400)]


@pytest.fixture(params=["triton", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Device of the inputs: of the kernels, then of the reference on the CPU."""
    return request.getfixturevalue("triton_device") if request.param == "triton" else "cpu"


class Images:
    """Random images of one shape: in [-1, 1] or, before tanh, of every magnitude."""

    def __init__(self, shape, dtype, device, seed=0):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def plain(self, low: float = -1.0, high: float = 1.0) -> Tensor:
        values = torch.rand(self.shape, generator=self.generator) * (high - low) + low
        return values.to(self.device, self.dtype).to(memory_format=torch.channels_last)

    def before_tanh(self) -> Tensor:
        return self.plain() * 10.0 ** self.plain(-4.0, 1.5)

    def slot(self, before: int, after: int) -> tuple[Tensor, Tensor]:
        """A buffer of twice the batch and more channels, full of sevens, and a slice of it."""
        n, c, h, w = self.shape
        buffer = torch.full((2 * n, before + c + after, h, w), 7.0, dtype=self.dtype, device=self.device)
        buffer = buffer.to(memory_format=torch.channels_last)
        return buffer, buffer[n:, before : before + c]

    def bias(self) -> Tensor:
        values = torch.randn(self.shape[1], generator=self.generator)
        return values.to(self.device, reference.compute_dtype(self.dtype)) * 0.1


def check_forward(images: Images, before: int | None, after: int, biased: bool) -> None:
    x, target, bias = images.before_tanh(), images.plain(), images.bias() if biased else None
    buffer, out = (None, None) if before is None else images.slot(before, after)
    fake, l1 = tanh_l1_forward(x, bias, target, out)
    exact, _ = reference.tanh_l1_forward(x.double(), None if bias is None else bias.double(), target.double())
    # x + bias is rounded, which tanh passes on where the sum is close to 0.
    assert_stored(fake, exact, slack=RTOL[torch.float32] * 0.1 if images.dtype != torch.float64 else 1e-15)
    assert_stored(l1, (fake.double() - target.double()).abs().mean())
    assert l1.dtype == reference.compute_dtype(images.dtype) and l1.shape == ()
    if out is not None:
        assert fake.data_ptr() == out.data_ptr()
        out.fill_(7.0)
        assert (buffer == 7.0).all(), "something was written beside the slice"


def check_backward(
    images: Images, before: int, after: int, biased: bool, has_dfake: bool, has_dl1: bool
) -> None:
    _, fake = images.slot(before, after)
    fake.copy_(images.before_tanh().double().tanh())
    target = images.plain()
    target[..., ::3] = fake[..., ::3]  # where they are equal, the gradient of the distance is 0
    bias = images.bias() if biased else None
    dfake = dl1 = None
    if has_dfake:
        _, dfake = images.slot(after, before)
        dfake.copy_(images.plain())
    if has_dl1:
        dl1 = torch.tensor(100.0, dtype=reference.compute_dtype(images.dtype), device=images.device)
    dx, dbias = tanh_l1_backward(dfake, dl1, fake, target, bias)
    wide = [None if t is None else t.double() for t in (dfake, dl1, fake, target, bias)]
    exact_dx, exact_dbias = reference.tanh_l1_backward(*wide)
    slack = 1e-2 * RTOL[dx.dtype] * exact_dx.abs().max().item()  # of the two gradients' sum
    assert dx.dtype == images.dtype and dx.is_contiguous(memory_format=torch.channels_last)
    assert_stored(dx, exact_dx, slack)
    assert (dbias is None) == (bias is None)
    if bias is not None:
        assert dbias.dtype == bias.dtype
        assert_stored(dbias, exact_dbias, slack=1e-6 * exact_dx.abs().sum().item() / len(bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(triton_device, shape, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "SUM_BLOCK", 8)  # so that the partial sums take more than one round
    images = Images(shape, dtype, triton_device)
    check_forward(images, None, 0, biased=True)
    check_forward(images, 3, 0, biased=False)
    check_backward(images, 3, 0, biased=True, has_dfake=True, has_dl1=True)
    check_backward(images, 1, 2, biased=False, has_dfake=False, has_dl1=True)
    check_backward(images, 0, 0, biased=True, has_dfake=True, has_dl1=False)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
    before=st.integers(0, 5),
    after=st.integers(0, 3),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_slice_equals_the_reference(shape, dtype, before, after, biased, seed):
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(launch, "kernels_on_cpu", launch.INTERPRETING)
        images = Images(shape, dtype, "cuda" if torch.cuda.is_available() else "cpu", seed)
        check_forward(images, before, after, biased)
        check_backward(images, before, after, biased, has_dfake=True, has_dl1=True)


def test_tanh_is_accurate_from_the_smallest_to_the_largest_input(triton_device):
    magnitudes = torch.logspace(-30, 2, 4000, dtype=torch.float64)
    x = torch.cat((magnitudes, -magnitudes, torch.zeros(1).double())).view(1, 1, 1, -1).to(triton_device)
    for dtype in (torch.float64, torch.float32):
        stored = x.to(dtype)
        fake, _ = tanh_l1_forward(stored, None, torch.zeros_like(stored))
        assert_stored(fake, stored.double().tanh())
        assert fake.abs().max() == 1.0


def test_gradients_are_accurate_where_tanh_saturates(device):
    # 1 - tanh^2, rounded so, is off by up to 6e-5 of itself here.
    fake = 1 - torch.logspace(-5, -2, 99, device=device).view(1, 3, 3, 11).to(
        memory_format=torch.channels_last
    )
    dx, _ = tanh_l1_backward(torch.ones_like(fake), None, fake, torch.zeros_like(fake), None)
    torch.testing.assert_close(dx.double(), 1 - fake.double().square(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("biased", [True, False])
def test_is_the_derivative_of_what_it_computes(device, biased):
    images = Images((2, 3, 2, 1), torch.float64, device)
    x, target = images.plain().requires_grad_(), images.plain()
    arguments = (x, images.bias().requires_grad_()) if biased else (x,)
    assert torch.autograd.gradcheck(lambda x, bias=None: tanh_l1(x, bias, target), arguments)


def test_equals_separate_operators_with_the_image_going_on_through_a_buffer(device):
    images = Images((1, 3, 9, 8), torch.float64, device)
    x, bias, target = images.plain(-2, 2), images.bias(), images.plain()
    weights = images.plain()
    results = []
    for fused in (True, False):
        a, b = x.clone().requires_grad_(), bias.clone().requires_grad_()
        if fused:
            buffer, out = images.slot(3, 0)
            fake, l1 = tanh_l1(a, b, target, out=out)
            assert torch.equal(buffer[1:, 3:], fake) and not buffer.requires_grad
        else:
            fake = torch.tanh(a + b.view(1, -1, 1, 1))
            l1 = (target - fake).abs().mean()
        ((fake * weights).sum() + 100 * l1).backward()
        results.append((fake.detach(), l1.detach(), a.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_l1_and_total_gradient(device, golden, dtype):
    numbers, inputs = golden("losses"), recipe.loss_inputs()
    assert recipe.digest(inputs.values()) == numbers["inputs_sha256"]
    exact = numbers[str(dtype).removeprefix("torch.")]
    fake, target = (
        torch.from_numpy(inputs[name]).permute(0, 3, 1, 2).to(device, dtype)
        for name in ("gen_output", "target")
    )
    rtol = 1e-12 if dtype == torch.float64 else 2e-6

    _, l1 = tanh_l1_forward(fake.double().atanh().to(dtype), None, target)
    assert l1.item() == pytest.approx(exact["l1"], rel=rtol)

    dl1 = torch.tensor(100.0, dtype=dtype, device=device)
    dx, _ = tanh_l1_backward(None, dl1, fake, target, None)
    total = exact["d total/d gen_output"]
    before_tanh = (dx / (1 - fake.square())).permute(0, 2, 3, 1).reshape(-1)
    assert before_tanh[total["sample_idx"]].tolist() == pytest.approx(total["sample"], rel=1e-5)
    assert before_tanh.double().norm().item() == pytest.approx(total["l2"], rel=rtol)


def test_the_same_bits_every_time(triton_device):
    images = Images((2, 3, 40, 31), torch.float32, triton_device)
    x, target, bias, dfake = images.before_tanh(), images.plain(), images.bias(), images.plain()
    dl1 = torch.tensor(1.0, device=triton_device)
    runs = []
    for _ in range(2):
        fake, l1 = tanh_l1_forward(x, bias, target)
        runs.append((fake, l1, *tanh_l1_backward(dfake, dl1, fake, target, bias)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_nan_is_not_hidden(device):
    x = torch.zeros(1, 3, 4, 4, device=device)
    x[0, 1, 2, 3] = torch.nan
    fake, l1 = tanh_l1_forward(x, None, torch.zeros_like(x))
    assert fake.isnan().sum() == 1 and fake[0, 1, 2, 3].isnan() and l1.isnan()


def test_images_of_any_layout(device):
    images = Images((2, 3, 6, 5), torch.float32, device)
    x, target, bias, dfake = images.plain(), images.plain(), images.bias(), images.plain()
    dl1 = torch.tensor(2.0, device=device)

    def run(x, target, dfake):
        fake, l1 = tanh_l1_forward(x, bias, target)
        return fake, l1, *tanh_l1_backward(dfake, dl1, fake, target, bias)

    # The gradient of a sum has no strides at all.
    flat = torch.ones((), device=device).expand(2, 3, 6, 5)
    pairs = zip(
        (*run(x, target, dfake), *run(x, target, torch.ones_like(x))),
        (*run(x.contiguous(), target.contiguous(), dfake.contiguous()), *run(x, target, flat)),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_an_unfit_out_is_refused(triton_device):
    images = Images((1, 3, 4, 4), torch.float32, triton_device)
    x, target = images.plain(), images.plain()
    for out in (x[:, :2], x.half(), torch.zeros(1, 3, 4, 4, device=triton_device)):
        with pytest.raises(ValueError, match="it must be torch.float32"):
            tanh_l1_forward(x, None, target, out)


def test_passes_over_memory_once(triton_device):
    images = Images((1, 3, 64, 64), torch.bfloat16, triton_device)
    x, target, bias = images.plain(), images.plain(), images.bias()
    seen = []
    with launch.observed(seen.append):
        fake, _ = tanh_l1_forward(x, bias, target)
        tanh_l1_backward(x, torch.ones((), device=triton_device), fake, target, bias)
    image, programs = 2 * x.numel(), -(-x.numel() // BLOCK)
    assert [(each.name, each.bytes_moved) for each in seen] == [
        ("tanh_l1_forward_map", 3 * image + 4 * 3 + 4 * programs),
        ("tanh_l1_sums", 4 * programs + 4),
        ("tanh_l1_backward_map", 4 * image + 4 + 12 * programs),
        ("tanh_l1_sums", 12 * programs + 12),
    ]

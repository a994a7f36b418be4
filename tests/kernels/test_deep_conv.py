"""The deep layers' convolutions: their products against float64, and who may take a weight gradient."""

import pytest
import torch
from rounding import RTOL
from torch.nn import functional as F

from fastpix2pix.kernels import deep_conv, language, launch, reference
from fastpix2pix.kernels.norm_act import norm_act
from fastpix2pix.kernels.reference import NormActConfig
from fastpix2pix.models.blocks import Join


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def images(
    n: int, h: int, w: int, cs: int, cb: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A small image, a big one, and a weight."""
    return (
        random(n, cs, h, w, dtype=dtype, seed=1),
        random(n, cb, 2 * h, 2 * w, dtype=dtype, seed=2),
        random(cs, cb, 4, 4, dtype=dtype, seed=3),
    )


# ---------------------------------------------------------------------------------------- the reference


def test_the_reference_products_are_each_others_derivatives():
    small, big, weight = images(2, 3, 2, 5, 4, torch.float64)
    big.requires_grad_(), weight.requires_grad_()
    y = reference.deep_conv_small(big, weight)
    dbig, dweight = torch.autograd.grad(y, (big, weight), small)
    torch.testing.assert_close(reference.deep_conv_big(small, weight), dbig)
    torch.testing.assert_close(reference.deep_conv_weight(small, big), dweight)


# ------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_in_double_precision(transposed):
    small, big, weight = images(2, 2, 3, 3, 4, torch.float64)
    conv = deep_conv.conv_transpose2d if transposed else deep_conv.conv2d
    x = (small if transposed else big).requires_grad_()
    expected = F.conv_transpose2d(x, weight, None, 2, 1) if transposed else F.conv2d(x, weight, None, 2, 1)
    torch.testing.assert_close(conv(x, weight), expected)
    assert torch.autograd.gradcheck(conv, (x, weight.requires_grad_()))


@pytest.mark.parametrize("transposed", [False, True])
def test_with_its_epilogue_it_is_the_two_ops_in_turn(transposed):
    small, big, weight = images(1, 4, 4, 6, 8)
    x = small if transposed else big
    conv = deep_conv.conv_transpose2d if transposed else deep_conv.conv2d
    channels = 8 if transposed else 6
    config = NormActConfig(skip_slope=0.5, slope=0.2, dropout=0.5, layer=3)
    rng = torch.tensor([7, 1])
    results = []
    for fused in (True, False):
        inputs = [
            t.clone().requires_grad_() for t in (x, weight, torch.ones(channels), torch.zeros(channels))
        ]
        running = torch.zeros(channels), torch.ones(channels)
        a, b, *affine = inputs
        if fused:
            y = deep_conv.conv_norm_act(
                a, b, *affine, *running, transposed=transposed, config=config, rng=rng
            )
        else:
            y = norm_act(conv(a, b), *affine, *running, config=config, rng=rng)
        torch.autograd.backward(y, [random(*t.shape, seed=5 + i) for i, t in enumerate(y)])
        results.append([*y, *running, *(t.grad for t in inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


# -------------------------------------------------------------------------------- who takes the gradient


class Taker:
    """Notes what it is asked, and whether the input gradient was there by then."""

    def __init__(self, answer: bool):
        self.answer, self.asked = answer, []

    def __call__(self, small: torch.Tensor, big: torch.Tensor) -> bool:
        self.asked.append((small.clone(), big.clone()))
        return self.answer


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_gradient_is_offered_and_computed_if_it_is_not_taken(transposed, answer):
    small, big, weight = images(1, 2, 2, 3, 4)
    x, dy = (small, big) if transposed else (big, small)
    taker = Taker(answer)
    conv = deep_conv.conv_transpose2d if transposed else deep_conv.conv2d
    x.requires_grad_(), weight.requires_grad_()
    conv(x, weight, taker).backward(dy)
    ((seen_small, seen_big),) = taker.asked
    assert torch.equal(seen_small, small) and torch.equal(seen_big, big)
    expected = reference.deep_conv_big(small, weight) if not transposed else None
    expected = reference.deep_conv_small(big, weight) if transposed else expected
    torch.testing.assert_close(x.grad, expected)
    if answer:
        assert weight.grad is None
    else:
        torch.testing.assert_close(weight.grad, reference.deep_conv_weight(small, big))


def test_the_input_gradient_comes_from_the_weight_as_it_was():
    """Whoever takes the gradient may overwrite the weight at once."""
    small, big, weight = images(1, 2, 2, 3, 4)
    parameter, big = weight.clone().requires_grad_(), big.requires_grad_()

    def take(small, big):
        parameter.data.fill_(float("nan"))
        return True

    deep_conv.conv2d(big, parameter, take).backward(small)
    torch.testing.assert_close(big.grad, reference.deep_conv_big(small, weight))


def test_nobody_is_asked_for_the_gradient_of_a_frozen_weight():
    small, big, weight = images(1, 2, 2, 3, 4)
    taker = Taker(True)
    deep_conv.conv2d(big.requires_grad_(), weight, taker).backward(small)
    assert not taker.asked


# -------------------------------------------------------------------------------------- which are deep


@pytest.mark.parametrize(
    "n, h, w, weights, transposed, deep",
    [
        (1, 32, 32, 2**20, False, True),
        (2, 32, 32, 2**20, False, False),
        (1, 34, 32, 2**20, False, False),
        (1, 16, 16, 2**20, True, True),
        (3, 16, 16, 2**20, True, False),
        (1, 32, 32, 2**20 - 16, False, False),
        (1, 3, 2, 2**20, False, False),  # an odd side
        (1, 3, 2, 2**20, True, True),
    ],
)
def test_a_layer_is_deep_by_its_pixels_and_weights(n, h, w, weights, transposed, deep):
    x = torch.empty(n, 16, h, w, device="meta")
    weight = torch.empty(weights // 256, 16, 4, 4, device="meta")
    assert deep_conv.is_deep(x, weight, transposed=transposed) is deep


# ----------------------------------------------------------------------------------------- the kernels

needs_interpreter = pytest.mark.skipif(not language.HAS_TRITON, reason="Triton is not installed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SUMMING = 2**-20
"""Error of a sum in float32, in units of the size that it would have if no terms cancelled."""
SIZES = [
    # n, h, w, small channels, big channels
    (1, 1, 1, 19, 48),  # one pixel: 12 of 16 taps meet only padding
    (1, 1, 3, 70, 16),  # one row; more than one tile of channels, the last one ragged
    (2, 3, 2, 5, 80),
    (3, 2, 4, 33, 16),
    (1, 9, 9, 17, 32),  # more than one tile of pixels
    (1, 16, 16, 16, 16),
]
PRODUCTS = {
    "small": (deep_conv.deep_conv_small, reference.deep_conv_small),
    "big": (deep_conv.deep_conv_big, reference.deep_conv_big),
    "weight": (deep_conv.deep_conv_weight, reference.deep_conv_weight),
}


def check_product(product: str, precision: str, size: tuple, device: str) -> list[launch.Launch]:
    """One product by its kernels against float64; its launches."""
    n, h, w, cs, cb = size
    small, big, weight = (t.to(device) for t in images(n, h, w, cs, cb, DTYPES[precision]))
    operands = {"small": (big, weight), "big": (small, weight), "weight": (small, big)}[product]
    mine, plain = PRODUCTS[product]
    launches = []
    with launch.observed(launches.append):
        got = mine(*operands)
    exact = [t.double() for t in operands]
    expected, magnitude = plain(*exact), plain(*(t.abs() for t in exact))
    assert got.dtype == small.dtype and got.shape == expected.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    allowed = RTOL[got.dtype] * expected.abs() + SUMMING * magnitude
    assert ((got.double() - expected).abs() <= allowed).all()
    return launches


@needs_interpreter
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_those_of_the_reference(triton_device, product, size, precision):
    check_product(product, precision, size, triton_device)


@needs_interpreter
@pytest.mark.parametrize("splits", [3, 4])
@pytest.mark.parametrize("product", ["small", "big"])
def test_a_split_sum_is_added_up(triton_device, monkeypatch, product, splits):
    """Also where the blocks are not shared evenly."""
    monkeypatch.setattr(deep_conv, "choose_splits", lambda *_, **__: splits)
    launches = check_product(product, "bf16", (1, 2, 2, 40, 48), triton_device)
    assert [this.name for this in launches] == [f"deep_conv_to_{product}", "deep_conv_add"]
    assert launches[0].grid[2] == splits


@needs_interpreter
def test_partial_sums_are_added_in_their_order(triton_device):
    partials = torch.randn(5, 4, 24, generator=torch.Generator().manual_seed(0)).to(triton_device)
    image = torch.empty(1, 24, 2, 2, dtype=torch.float16, device=triton_device)
    image = image.contiguous(memory_format=torch.channels_last)
    expected = reference.add_partials(partials, image.clone(memory_format=torch.preserve_format))
    assert torch.equal(deep_conv.add_up(deep_conv.Sums(image, partials)), expected)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    "product, size",
    [
        ("small", (1, 1, 1, 512, 512)),
        ("big", (1, 1, 1, 512, 512)),
        ("small", (1, 2, 2, 1024, 512)),
        ("big", (2, 4, 4, 512, 256)),
        ("weight", (3, 2, 2, 512, 512)),
        ("small", (1, 16, 16, 256, 512)),
        ("weight", (1, 16, 16, 128, 128)),
    ],
    ids=str,
)
def test_products_of_full_layers(triton_device, product, size, precision):
    check_product(product, precision, size, triton_device)


@needs_interpreter
@pytest.mark.parametrize("transposed", [False, True])
def test_a_deep_layer_on_kernels_is_that_on_the_reference(triton_device, monkeypatch, transposed):
    """Forward with partial sums that norm_act reads, and backward."""
    monkeypatch.setattr(deep_conv, "choose_splits", lambda *_, **__: 3)
    small, big, weight = images(1, 2, 2, 24, 32, torch.bfloat16)
    x, channels = (small, 32) if transposed else (big, 24)
    config = NormActConfig(slope=0.2, skip_slope=0.5)
    results, launches = [], []
    for kernels in (True, False):
        monkeypatch.setattr(launch, "kernels_on_cpu", kernels and triton_device == "cpu")
        monkeypatch.setattr(launch, "kernels_on_gpu", kernels)
        monkeypatch.setattr(deep_conv, "chosen", Always())
        ones = torch.ones(channels), torch.zeros(channels)
        inputs = [t.clone().to(triton_device).requires_grad_() for t in (x / 8, weight / 8, *ones)]
        running = [t.clone().to(triton_device) for t in ones]
        with launch.observed(launches.append):
            y = deep_conv.conv_norm_act(*inputs, *running, transposed=transposed, config=config)
            gradients = [random(*t.shape, dtype=t.dtype, seed=5 + i) for i, t in enumerate(y)]
            torch.autograd.backward(y, [g.to(triton_device) for g in gradients])
        results.append([*y, *running, *(t.grad for t in inputs)])
    forward, back = ("big", "small") if transposed else ("small", "big")
    assert [this.name for this in launches] == [
        f"deep_conv_to_{forward}",
        "norm_act_forward_whole",
        "norm_act_backward_whole",
        f"deep_conv_to_{back}",
        "deep_conv_add",
        "deep_conv_to_weight",
    ]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def two_layers(device: str, *, passage: deep_conv.Passage | None, also_read: bool = False):
    """Gradients of all that two deep layers in turn read, down and up again."""
    weights = [random(24, 32, 4, 4, dtype=torch.float16, seed=i).div_(8).to(device) for i in (1, 2)]
    x = random(1, 32, 4, 4, dtype=torch.float16, seed=3).to(device)
    affine = [t.to(device) for t in (torch.ones(24), torch.zeros(24), torch.ones(32), torch.zeros(32))]
    inputs = [t.requires_grad_() for t in (x, *weights, *affine)]
    x, first, second, *affine = inputs
    config = NormActConfig(slope=0.2)
    between = deep_conv.conv_norm_act(x, first, *affine[:2], transposed=False, config=config, after=passage)
    y = deep_conv.conv_norm_act(between, second, *affine[2:], transposed=True, config=config, before=passage)
    loss = y.float().square().sum() + (between.float().sum() if also_read else 0.0)
    loss.backward()
    return [t.grad for t in inputs]


def with_and_without_passage(monkeypatch, layers) -> list[int]:
    """Launches of deep_conv_add with a passage and without; ``layers(passage)`` is the same both times."""
    monkeypatch.setattr(deep_conv, "choose_splits", lambda *_, **__: 3)
    monkeypatch.setattr(deep_conv, "chosen", Always())
    results, adds = [], []
    for passage in (deep_conv.Passage(), None):
        launches = []
        with launch.observed(launches.append):
            results.append(layers(passage))
        adds.append(sum(this.name == "deep_conv_add" for this in launches))
        assert passage is None or passage._left is None
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())
    return adds


@needs_interpreter
def test_between_deep_layers_a_gradient_passes_as_partial_sums(triton_device, monkeypatch):
    adds = with_and_without_passage(monkeypatch, lambda passage: two_layers(triton_device, passage=passage))
    assert adds == [1, 2]


def joined_layers(device: str, *, passage: deep_conv.Passage | None, skip_first: bool):
    """Gradients of all that three deep layers read: down, and up, whose results lie side by side, and up."""
    weights = [
        random(*shape, 4, 4, dtype=torch.float16, seed=i).div_(8).to(device)
        for i, shape in enumerate(((24, 32), (40, 32), (24 + 32, 16)))
    ]
    big, small = (
        random(1, c, side, side, dtype=torch.float16, seed=c).to(device) for c, side in ((32, 8), (40, 2))
    )
    affine = [one.to(device) for c in (24, 32, 16) for one in (torch.ones(c), torch.zeros(c))]
    inputs = [t.requires_grad_() for t in (big, small, *weights, *affine)]
    joined = torch.empty(1, 56, 4, 4, dtype=torch.float16, device=device)
    joined = joined.contiguous(memory_format=torch.channels_last)
    parts = (joined[:, :24], joined[:, 24:]) if skip_first else (joined[:, 32:], joined[:, :32])
    config = NormActConfig(slope=0.2)
    y, skip = deep_conv.conv_norm_act(
        big,
        weights[0],
        *affine[:2],
        transposed=False,
        config=config._replace(skip_slope=0.5),
        skip_out=parts[0],
        skip_after=passage,
    )
    up = deep_conv.conv_norm_act(
        small, weights[1], *affine[2:4], transposed=True, config=config, out=parts[1], after=passage
    )
    x = Join.apply(*((skip, up) if skip_first else (up, skip)), (joined,))
    out = deep_conv.conv_norm_act(x, weights[2], *affine[4:], transposed=True, config=config, before=passage)
    (out.float().square().sum() + y.float().sum()).backward()
    return [t.grad for t in inputs]


@needs_interpreter
@pytest.mark.parametrize("skip_first", [True, False])
def test_a_gradient_passes_to_both_layers_whose_results_were_joined(triton_device, monkeypatch, skip_first):
    adds = with_and_without_passage(
        monkeypatch, lambda passage: joined_layers(triton_device, passage=passage, skip_first=skip_first)
    )
    assert adds == [2, 3]  # the inputs' own gradients are whole


@needs_interpreter
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_second_reader_of_what_lies_between_deep_layers_is_an_error(triton_device, monkeypatch):
    monkeypatch.setattr(deep_conv, "choose_splits", lambda *_, **__: 3)
    monkeypatch.setattr(deep_conv, "chosen", Always())
    with pytest.raises(RuntimeError, match="another reader than that layer"):
        two_layers(triton_device, passage=deep_conv.Passage(), also_read=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        two_layers(triton_device, passage=deep_conv.Passage(), also_read=True)


class Always(dict):
    """Every problem is ours."""

    def get(self, problem, default=None):
        return True


@needs_interpreter
def test_what_the_kernels_do_not_take_is_the_librarys(triton_device):
    for size, dtype in (((1, 2, 2, 8, 24), torch.bfloat16), ((1, 2, 2, 8, 16), torch.float64)):
        small, big, weight = (t.to(triton_device) for t in images(*size, dtype))
        launches = []
        with launch.observed(launches.append):
            got = deep_conv.conv2d(big, weight.requires_grad_())
            got.backward(small)
        assert not launches
        torch.testing.assert_close(got, reference.deep_conv_small(big, weight), rtol=0.02, atol=0.1)


@needs_interpreter
def test_on_a_gpu_only_what_was_chosen_is_ours(monkeypatch):
    problem = deep_conv.problem_of("small", torch.Size((1, 32, 2, 2)), 32, torch.bfloat16)

    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

    assert not deep_conv.solved_here(problem, OnGpu)
    monkeypatch.setattr(deep_conv, "chosen", {problem: True})
    assert deep_conv.solved_here(problem, OnGpu)
    assert not deep_conv.solved_here(problem._replace(product="big"), OnGpu)
    monkeypatch.setattr(deep_conv, "offered", False)
    assert not deep_conv.solved_here(problem, OnGpu)


# ----------------------------------------------------------------------------------------- block sizes


def test_splits_fill_a_gpu_and_keep_partial_sums_small():
    for pixels in (1, 4, 16, 64, 256):
        for summed_by_next in (False, True):
            tile = deep_conv.choose_product_tile(pixels, 2)
            tiles = 8 * -(-pixels // tile.pixels)
            weight_bytes, values = 512 * 512 * 32, 512 * pixels
            splits = deep_conv.choose_splits(
                tiles,
                256,
                weight_bytes,
                values,
                num_stages=tile.num_stages,
                summed_by_next=summed_by_next,
            )
            assert tiles * splits >= 64
            assert splits * values * 4 <= weight_bytes


def test_nothing_is_split_where_there_are_programs_enough_or_a_launch_costs_more():
    def splits(tiles, blocks, weight_bytes, *, summed_by_next=True):
        return deep_conv.choose_splits(
            tiles, blocks, weight_bytes, 2**10, num_stages=5, summed_by_next=summed_by_next
        )

    assert splits(1024, 8, 2**23) == 1
    assert splits(32, 8, 2**20, summed_by_next=False) == 1
    assert splits(32, 8, 2**20) > 1
    assert splits(1, 16, 2**15) == 4, "as many loads as are under way"
    assert splits(1, 3, 2**15) == 1


@pytest.mark.parametrize("side, to_small, weight", [(1, 1, 1), (2, 4, 1), (8, 4, 2), (16, 8, 4)])
def test_trips_to_memory_of_a_layer_of_512_channels(side, to_small, weight):
    """Of (2 side, 2 side) pixels and (side, side): the shares' blocks of 32 channels of 16 taps (of 4, where
    the image is one pixel), 5 or 4 loaded ahead; blocks of 16 or 32 pixels, 2 ahead."""
    launches = []
    small, big = (
        torch.empty(1, s, s, 512, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
        for s in (side, 2 * side)
    )
    of_weight = torch.empty(512, 4, 4, 512, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
    with launch.observed(launches.append, run=False):
        deep_conv.deep_conv_small(big, of_weight)
        deep_conv.deep_conv_weight(small, big)
    product, *_, gradient = launches
    taps = 4 if side == 1 else 16
    assert (product.name, gradient.name) == ("deep_conv_to_small", "deep_conv_to_weight")
    assert product.trips == -(-(taps * 16 // product.grid[2]) // (5 if side < 5 else 4)) == to_small
    assert gradient.trips == weight

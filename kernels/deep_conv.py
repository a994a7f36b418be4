"""The deep layers' convolutions, 4x4 with stride 2 and padding 1: the weight is far larger than the images.

A convolution relates a *big* image (N, Cb, 2 h, 2 w) to a *small* one (N, Cs, h, w); going down it is conv2d,
going up conv_transpose2d. Its weight is (Cs, Cb, 4, 4) in either. There are three products:

* ``small = big * weight``: conv2d forward, and the input gradient of conv_transpose2d;
* ``big = small * weight``: conv_transpose2d forward, and the input gradient of conv2d;
* the weight gradient, of which each value is a sum over the pixels of the small image.

The backward pass computes the input gradient first. Then nothing reads the weight any more, and its gradient
may be taken by somebody who updates the weight at once (``TakeGradient``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.cpu_conv import (
    TRANSPOSED_STRIDE,
    ConvContext,
    ConvGradients,
    conv2d_forward,
    conv_gradients,
    conv_transpose2d_forward,
)
from fastpix2pix.kernels.deep_conv_kernels import (
    Math,
    deep_conv_add,
    deep_conv_to_big,
    deep_conv_to_small,
    deep_conv_to_weight,
)
from fastpix2pix.kernels.images import as_pixels, image_pointer
from fastpix2pix.kernels.language import INTERPRETING, ImagePointer, tl
from fastpix2pix.kernels.launch import launch, on_tensor_cores, use_triton
from fastpix2pix.kernels.norm_act import in_one_launch, norm_act_backward, norm_act_forward
from fastpix2pix.kernels.reference import NormActConfig
from fastpix2pix.kernels.tiles import cdiv, next_power_of_2, pipelined_trips

MAX_PIXELS = 256
"""The most pixels of a deep layer's small image, the whole batch together."""

MIN_WEIGHTS = 2**20
"""The fewest elements of a deep layer's weight."""

TakeGradient = Callable[[Tensor, Tensor], bool]
"""Called in a backward pass with (small, big): the two images of which the weight gradient is a product, one
of them a gradient. True: taken, the weight is updated by whoever was called, and autograd gets no gradient.
False: the gradient is computed and returned as usual."""

Product = Literal["small", "big", "weight"]


class Problem(NamedTuple):
    """One product of one layer: all that decides how fast it is computed.

    height, width: of the small image.
    """

    product: Product
    n: int
    height: int
    width: int
    small_channels: int
    big_channels: int
    dtype: torch.dtype

    @property
    def pixels(self) -> int:
        """Of the small image, the whole batch together."""
        return self.n * self.height * self.width

    @property
    def taps(self) -> tuple[int, int]:
        """Rows and columns of the kernel that meet more than padding."""
        return 2 if self.height == 1 else 4, 2 if self.width == 1 else 4


offered = True
"""Whether the kernels are used at all; turned off where the user wants the library's convolutions."""

chosen: Mapping[Problem, bool] = {}
"""On a GPU, whether a problem is solved by our kernels (else by the library), as found before the first step
(``training.deep_choice``). What is not there is the library's: nothing gets slower unmeasured."""


# ---------------------------------------------------------------------------------------- block sizes


@dataclass(frozen=True)
class ProductTile:
    """The block of a product that a program computes, in registers.

    channels, pixels: its sides; of the weight gradient, the channels of the small and of the big image.
    depth: terms of the sum that are loaded at a time. num_stages: such loads that are under way at a time.
    """

    channels: int
    pixels: int
    depth: int
    num_stages: int
    num_warps: int = 4


ROW_BYTES = 64
"""Bytes of a row of the weight that a program loads at a time: two sectors. The next load takes the next two,
and several are under way, so pages of memory are read whole."""

LEAST_SIDE = 16
"""The shortest side of a tile that tensor cores are used for."""


def choose_product_tile(pixels: int, itemsize: int) -> ProductTile:
    """The weight's channels by all pixels, as far as registers hold them.

    In 16 bit 64 channels, the rows of one instruction of Hopper's and Blackwell's tensor cores, which so
    serve however few the pixels are. The weight streams through shared memory: with few pixels the registers
    (at most 80) leave room for many programs and the stages keep 25 kB of each one under way; with more, the
    sums take the registers (at most 128) and the image's blocks as much shared memory as the weight's, so
    that 5 stages (40 kB) leave two programs to a multiprocessor with 100 kB.

    In fp32 32 channels: Hopper's instruction takes such factors in one order only, and to turn them costs the
    weight its full vectors. Four warps, as in loops over taps and channels at once eight have computed wrong
    results (pytorch issue 173068).
    """
    side = min(max(next_power_of_2(pixels), LEAST_SIDE), 64 if itemsize == 2 else 32)
    channels = 64 if itemsize == 2 else 32
    return ProductTile(channels, side, ROW_BYTES // itemsize, 6 if side == 16 else 5)


def choose_weight_tile(pixels: int, itemsize: int) -> ProductTile:
    """Of the weight gradient: few pixels make short sums, so what counts is to store full vectors by many
    programs; with many pixels a square tile reads each image less often."""
    if itemsize > 2:
        return ProductTile(32, 32, 16, 3)
    return ProductTile(64, 32, 16, 3) if pixels <= 64 else ProductTile(64, 64, 32, 3)


# A model of time, to choose between more programs and fewer partial sums; its constants are an H100's.
BYTES_PER_US = 2.85e6
"""Memory bandwidth (85 % of 3.35 TB/s)."""
TRIP_US = 0.7
"""From asking for a block to having multiplied it (assumed)."""
PROGRAMS_AT_ONCE = 4 * 132
"""Of four warps (assumed): four on each multiprocessor."""
LAUNCH_US = 2.0
"""Of one more node of a captured graph (assumed)."""
SPLITS = (1, 2, 4, 8, 16, 32)
"""Into how many partial sums a sum may be split."""


def choose_splits(
    tiles: int,
    blocks: int,
    weight_bytes: int,
    result_values: int,
    *,
    num_stages: int,
    summed_by_next: bool,
) -> int:
    """How many programs share the sum of one tile.

    tiles: programs without a split. blocks: of the sum (``ProductTile.depth`` terms each). weight_bytes: read
    in all. result_values: of the image that comes out. summed_by_next: whether the next op, which there is
    anyway, adds the partial sums up.
    """

    def microseconds(splits: int) -> float:
        waits = pipelined_trips(cdiv(blocks, splits), num_stages) * cdiv(tiles * splits, PROGRAMS_AT_ONCE)
        partial_bytes = 0 if splits == 1 else splits * result_values * 4
        extra = 0.0 if splits == 1 or summed_by_next else LAUNCH_US
        own = max(TRIP_US * waits, (weight_bytes + partial_bytes) / BYTES_PER_US)
        return own + partial_bytes / BYTES_PER_US + extra

    return min((splits for splits in SPLITS if splits <= blocks), key=microseconds)


ADD_BLOCK = 512
"""Values of one program that adds up partial sums: one vector of fp32 a thread, so that even a 4x4 image of
512 channels has 16 programs."""


# ------------------------------------------------------------------------------------------- launching


def float32_convolutions_use_tf32() -> bool:
    """What this process has set for float32 convolutions on a GPU, through whichever interface."""
    if has_fp32_precision():
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return torch.backends.cudnn.allow_tf32


def has_fp32_precision() -> bool:
    """Whether this PyTorch has the newer interface to tf32 (2.9 and later)."""
    return hasattr(torch.backends.cudnn, "conv")


def _math(dtype: torch.dtype) -> Math:
    operand = tl.float32 if INTERPRETING else getattr(tl, str(dtype).removeprefix("torch."))
    return Math(operand, "tf32" if float32_convolutions_use_tf32() else "ieee")


def problem_of(product: Product, small: torch.Size, big_channels: int, dtype: torch.dtype) -> Problem:
    """small: shape of the small image."""
    n, small_channels, height, width = small
    return Problem(product, n, height, width, small_channels, big_channels, dtype)


def _small_shape(big: Tensor, small_channels: int) -> torch.Size:
    n, _, height, width = big.shape
    return torch.Size((n, small_channels, height // 2, width // 2))


def fits(problem: Problem) -> bool:
    """Whether the kernels take a problem: its type, and weights that move in full vectors."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    return problem.dtype in types and problem.big_channels % 16 == 0


def solved_here(problem: Problem, x: Tensor) -> bool:
    """Whether our kernels solve ``problem`` for images where ``x`` is (else the library does).

    Never without tensor cores, as the library has them on every GPU.
    """
    if not (offered and use_triton(x) and fits(problem)):
        return False
    return chosen.get(problem, False) if x.is_cuda else on_tensor_cores(x)


class Sums(NamedTuple):
    """A product's result. image: channels-last memory. partials: float32 (splits, pixels, channels) that are
    still to be added up into ``image``, pixels in the order N, H, W; None where ``image`` is complete.
    """

    image: Tensor
    partials: Tensor | None


def _result(problem: Problem, like: Tensor, splits: int) -> tuple[Sums, ImagePointer]:
    """Memory for a product's result, and where the kernel writes."""
    if problem.product == "small":
        shape = problem.n, problem.small_channels, problem.height, problem.width
    else:
        shape = problem.n, problem.big_channels, 2 * problem.height, 2 * problem.width
    image = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    if splits == 1:
        return Sums(image, None), ImagePointer(image, shape[1])
    pixels = image.numel() // shape[1]
    partials = torch.empty((splits, pixels, shape[1]), dtype=torch.float32, device=like.device)
    return Sums(image, partials), ImagePointer(partials, shape[1])


def _met(weight: Tensor, taps: tuple[int, int]) -> Tensor:
    """The part of the weight that is read."""
    rows, columns = (slice((4 - count) // 2, (4 + count) // 2) for count in taps)
    return weight[:, :, rows, columns]


def _multiply(problem: Problem, x: Tensor, weight: Tensor, summed_by_next: bool) -> Sums:
    """``small = big * weight`` or ``big = small * weight``, by one launch."""
    to_small = problem.product == "small"
    x = as_pixels(x)
    tile = choose_product_tile(problem.pixels, x.element_size())
    pixel_tiles, read = cdiv(problem.pixels, tile.pixels), _met(weight, problem.taps)
    rows, columns = problem.taps
    if to_small:
        programs = cdiv(problem.small_channels, tile.channels)
        blocks, values = rows * columns * cdiv(problem.big_channels, tile.depth), problem.small_channels
    else:
        programs = 4 * cdiv(problem.big_channels, tile.channels)
        blocks = rows * columns // 4 * cdiv(problem.small_channels, tile.depth)
        values = 4 * problem.big_channels
    splits = choose_splits(
        pixel_tiles * programs,
        blocks,
        read.numel() * read.element_size(),
        problem.pixels * values,
        num_stages=tile.num_stages,
        summed_by_next=summed_by_next,
    )
    sums, out = _result(problem, x, splits)
    launch(
        deep_conv_to_small if to_small else deep_conv_to_big,
        (pixel_tiles, programs, splits),
        image_pointer(x),
        weight,
        out,
        problem.pixels,
        problem.height,
        problem.width,
        problem.small_channels,
        problem.big_channels,
        TAPS=problem.taps,
        TILE=tile,
        MATH=_math(x.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        reads=(x, read),
        writes=(out.pointer,),
        trips=pipelined_trips(cdiv(blocks, splits), tile.num_stages),
        flops=2 * problem.pixels * read.numel(),
    )
    return sums


def add_up(sums: Sums) -> Tensor:
    """The complete image, by a launch where partial sums are left."""
    image, partials = sums
    if partials is None:
        return image
    launch(
        deep_conv_add,
        (cdiv(image.numel(), ADD_BLOCK),),
        partials,
        image,
        image.numel(),
        SPLITS=partials.shape[0],
        BLOCK=ADD_BLOCK,
        num_warps=4,
        reads=(partials,),
        writes=(image,),
    )
    return image


def _weight_gradient(problem: Problem, small: Tensor, big: Tensor) -> Tensor:
    small, big = as_pixels(small), as_pixels(big)
    tile = choose_weight_tile(problem.pixels, small.element_size())
    dweight = torch.empty(
        (problem.small_channels, problem.big_channels, 4, 4),
        dtype=small.dtype,
        device=small.device,
        memory_format=torch.channels_last,
    )
    grid = (
        cdiv(problem.big_channels, tile.pixels),
        16,
        cdiv(problem.small_channels, tile.channels),
    )
    launch(
        deep_conv_to_weight,
        grid,
        image_pointer(small),
        image_pointer(big),
        dweight,
        problem.pixels,
        problem.height,
        problem.width,
        problem.small_channels,
        problem.big_channels,
        TILE=tile,
        MATH=_math(small.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        reads=(small, big),
        writes=(dweight,),
        trips=pipelined_trips(cdiv(problem.pixels, tile.depth), tile.num_stages),
        flops=2 * problem.pixels * dweight.numel(),
    )
    return dweight


def solve(problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    """One product by our kernels, whatever is chosen. first, second: the big image and the weight, the small
    image and the weight, or, for the weight gradient, the small image and the big one."""
    if problem.product == "weight":
        return _weight_gradient(problem, first, second)
    return add_up(_multiply(problem, first, second, summed_by_next=False))


def deep_conv_small(big: Tensor, weight: Tensor) -> Tensor:
    """``reference.deep_conv_small``, by kernels on a GPU."""
    problem = problem_of("small", _small_shape(big, weight.shape[0]), weight.shape[1], big.dtype)
    if not (use_triton(big) and fits(problem)):
        return reference.deep_conv_small(big, weight)
    return solve(problem, big, weight)


def deep_conv_big(small: Tensor, weight: Tensor) -> Tensor:
    """``reference.deep_conv_big``, by kernels on a GPU."""
    problem = problem_of("big", small.shape, weight.shape[1], small.dtype)
    if not (use_triton(small) and fits(problem)):
        return reference.deep_conv_big(small, weight)
    return solve(problem, small, weight)


def deep_conv_weight(small: Tensor, big: Tensor) -> Tensor:
    """``reference.deep_conv_weight``, by a kernel on a GPU."""
    problem = problem_of("weight", small.shape, big.shape[1], small.dtype)
    if not (use_triton(small) and fits(problem)):
        return reference.deep_conv_weight(small, big)
    return solve(problem, small, big)


# ---------------------------------------------------------------------------------- forward and backward


def is_deep(x: Tensor, weight: Tensor, *, transposed: bool) -> bool:
    """Whether a 4x4 convolution of ``x`` with stride 2 and padding 1 and without bias is a deep layer's.

    Never while a graph is exported or compiled: it should say "convolution".
    """
    n, _, h, w = x.shape
    pixels = n * h * w if transposed else n * (h // 2) * (w // 2)
    return (
        pixels <= MAX_PIXELS
        and weight.numel() >= MIN_WEIGHTS
        and (transposed or h % 2 == w % 2 == 0)
        and x.dtype == weight.dtype
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


class DeepContext(NamedTuple):
    """State of a deep convolution saved for backward.

    transposed: whether x is the small image. x: the input. kept: what the library's convolution saved; it
    holds the weight too, as it is or in another form.
    """

    transposed: bool
    x: Tensor
    kept: ConvContext


def forward(
    x: Tensor, weight: Tensor, *, transposed: bool, summed_by_next: bool = False
) -> tuple[Sums, DeepContext]:
    """The convolution's output and its state for ``backward``. Not differentiable by itself.

    summed_by_next: whether the next op adds partial sums up; else there are none.
    """
    small = x.shape if transposed else _small_shape(x, weight.shape[0])
    problem = problem_of("big" if transposed else "small", small, weight.shape[1], x.dtype)
    if solved_here(problem, x):
        weight = weight.contiguous(memory_format=torch.channels_last)
        sums = _multiply(problem, x, weight, summed_by_next)
        if not summed_by_next:
            sums = Sums(add_up(sums), None)
        kept = ConvContext(TRANSPOSED_STRIDE, None, tuple(x.shape[2:]), x, weight)
    elif transposed:
        y, kept = conv_transpose2d_forward(x, weight)
        sums = Sums(y, None)
    else:
        y, kept = conv2d_forward(x, weight, None, TRANSPOSED_STRIDE)
        sums = Sums(y, None)
    return sums, DeepContext(transposed, x, kept)


def backward(
    dy: Tensor,
    state: DeepContext,
    take_gradient: TakeGradient | None,
    *,
    needs_x: bool,
    needs_weight: bool,
    before: "Passage | None" = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, in this order; None for one that is not needed or that was taken.

    before: where x's gradient may be left in part.
    """
    small, big = (state.x, dy) if state.transposed else (dy, state.x)
    problem = problem_of("small" if state.transposed else "big", small.shape, big.shape[1], dy.dtype)
    # Where the library went forward on the CPU, it kept the weight in another form.
    ours = state.kept.tiling is None and solved_here(problem, dy)
    library: ConvGradients | None = None
    dx = None
    if needs_x and ours:
        dx = _input_gradient(problem, dy, state.kept.weight, before)
    elif needs_x:
        library = conv_gradients(dy, state.kept, transposed=state.transposed)
        dx = library.x()
    if not needs_weight or (take_gradient is not None and take_gradient(small, big)):
        return dx, None
    problem = problem._replace(product="weight")
    if solved_here(problem, dy):
        return dx, solve(problem, small, big)
    library = library or conv_gradients(dy, state.kept, transposed=state.transposed)
    return dx, library.weight()


def _input_gradient(problem: Problem, dy: Tensor, weight: Tensor, before: "Passage | None") -> Tensor:
    if before is None or torch.is_anomaly_enabled():  # which looks for NaN in every gradient
        return solve(problem, dy, weight)
    return before.leave(_multiply(problem, dy, weight, summed_by_next=True))


def _save(ctx, state: DeepContext, *others: Tensor | None) -> None:
    ctx.save_for_backward(state.x, state.kept.x, state.kept.weight, *others)
    ctx.transposed, ctx.kept = state.transposed, state.kept[:3]


def _saved(ctx) -> tuple[DeepContext, tuple[Tensor | None, ...]]:
    x, kept_x, kept_weight, *others = ctx.saved_tensors
    return DeepContext(ctx.transposed, x, ConvContext(*ctx.kept, kept_x, kept_weight)), tuple(others)


class Passage:
    """Where a deep layer leaves its input's gradient as partial sums, for the layers before, whose backward
    passes add up what they need where they need it: a launch less.

    Only for an input that nothing else reads: a deep layer's y, or one's y and another's skip side by side.
    To autograd the gradient is an image whose memory nobody has written.
    """

    def __init__(self) -> None:
        self._left: Sums | None = None
        self._channels = 0  # that nobody has taken yet

    def leave(self, sums: Sums) -> Tensor:
        """The image to return to autograd."""
        self._left = None if sums.partials is None else sums
        self._channels = sums.image.shape[1]
        return sums.image

    def partials_of(self, gradient: Tensor | None) -> Tensor | None:
        """What was left for ``gradient``, the image or a slice of its channels, once; None where it is
        complete. RuntimeError if it is another tensor."""
        if self._left is None:
            return None
        image, partials = self._left
        if gradient is None or gradient.untyped_storage()._cdata != image.untyped_storage()._cdata:
            self._left = None
            raise RuntimeError("the input of a deep layer has another reader than that layer")
        channels = gradient.shape[1]
        self._channels -= channels
        if not self._channels:
            self._left = None
        return partials.narrow(2, gradient.storage_offset() - image.storage_offset(), channels)


def _out_pixels(x: Tensor, transposed: bool) -> int:
    n, _, h, w = x.shape
    return 4 * n * h * w if transposed else n * h * w // 4


class _DeepConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, transposed, take_gradient):
        sums, state = forward(x, weight, transposed=transposed)
        _save(ctx, state)
        ctx.take_gradient = take_gradient
        return sums.image

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        state, _ = _saved(ctx)
        return *backward(dy, state, ctx.take_gradient, needs_x=needs_x, needs_weight=needs_weight), None, None


class _DeepConvNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        conv_weight,
        weight,
        bias,
        running,
        rng,
        config,
        slots,
        transposed,
        take_gradient,
        passages,
    ):
        few = in_one_launch(_out_pixels(x, transposed), config)
        (pre, partials), state = forward(x, conv_weight, transposed=transposed, summed_by_next=few)
        y, skip, mean, rstd = norm_act_forward(
            pre, weight, bias, *running, rng, config, *slots, partials=partials
        )
        _save(ctx, state, pre, weight, bias, mean, rstd)
        ctx.rng, ctx.config, ctx.take_gradient, ctx.passages = rng, config, take_gradient, passages
        ctx.set_materialize_grads(False)
        # Detached: a result in memory handed in as a view must not join that view's autograd history.
        return (y.detach(), skip.detach()) if skip is not None else y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dskip=None):
        needs_x, needs_weight, *needs_affine = ctx.needs_input_grad[:4]
        (before, after, skip_after), (state, saved) = ctx.passages, _saved(ctx)
        dy_partials, dskip_partials = (
            None if passage is None else passage.partials_of(gradient)
            for passage, gradient in ((after, dy), (skip_after, dskip))
        )
        dpre, dweight, dbias = norm_act_backward(
            dy if dy_partials is None else None,
            dskip if dskip_partials is None else None,
            *saved,
            ctx.rng,
            ctx.config,
            any(needs_affine),
            dy_partials=dy_partials,
            dskip_partials=dskip_partials,
        )
        gradients = backward(
            dpre, state, ctx.take_gradient, needs_x=needs_x, needs_weight=needs_weight, before=before
        )
        return *gradients, dweight, dbias, *[None] * 7


def conv2d(x: Tensor, weight: Tensor, take_gradient: TakeGradient | None = None) -> Tensor:
    """``F.conv2d`` with stride 2 and padding 1, from (N, Cb, 2 h, 2 w) to (N, Cs, h, w), differentiable once.

    weight: (Cs, Cb, 4, 4), channels-last. take_gradient: see ``TakeGradient``.
    """
    return _DeepConv.apply(x, weight, False, take_gradient)


def conv_transpose2d(x: Tensor, weight: Tensor, take_gradient: TakeGradient | None = None) -> Tensor:
    """``F.conv_transpose2d`` with stride 2 and padding 1, from (N, Cs, h, w) to (N, Cb, 2 h, 2 w),
    differentiable once.

    weight: (Cs, Cb, 4, 4), channels-last. take_gradient: see ``TakeGradient``.
    """
    return _DeepConv.apply(x, weight, True, take_gradient)


def conv_norm_act(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    transposed: bool,
    config: NormActConfig,
    rng: Tensor | None = None,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
    take_gradient: TakeGradient | None = None,
    before: Passage | None = None,
    after: Passage | None = None,
    skip_after: Passage | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``norm_act`` of ``conv2d``, or with ``transposed`` of ``conv_transpose2d``, as one differentiable op.

    weight, bias and what follows: as for ``norm_act``. before: the passage from the deep layers that x comes
    from. after, skip_after: those to the deep layer that y and that skip goes to.
    """
    return _DeepConvNormAct.apply(
        x,
        conv_weight,
        weight,
        bias,
        (running_mean, running_var),
        rng,
        config,
        (out, skip_out),
        transposed,
        take_gradient,
        (before, after, skip_after),
    )

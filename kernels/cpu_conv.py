"""The 4x4 convolutions of pix2pix, fast on the CPU: as matrix products over tiles of the images.

A convolution relates a *big* image to a *small* one; going down it is conv2d, going up conv_transpose2d. Each
one's input gradient is the other, and both have the same weight gradient, for the weight is (small channels,
big channels, 4, 4) in either. In terms of tiles the three are products of the same three matrices,

    small = big @ weight^T        big = small @ weight        weight = small^T @ big,

and what differs is how the images and the weight are brought into matrix form (``Tiling``):

* one output per tile: the big image is unfolded (im2col), and the weight is used as it lies in memory. The
  libraries' convolutions reorder the weight, three times a step, which takes far longer than the arithmetic
  where images are 1x1 to 16x16.
* several outputs per tile: minimal filtering (Winograd, "Arithmetic complexity of computations", 1980; Lavin
  & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016). Tiles and weight are brought into
  another basis, in which neighbouring outputs share products: 2.6 to 4 times fewer multiplications. With a
  stride of 2, even and odd pixels are treated as channels, and the kernel is 2x2.

In float32 it rounds about as the libraries do (tests/kernels/test_cpu_conv.py). On a CPU
without 16-bit arithmetic, where the libraries emulate it 10 to 100 times slower than float32, 16-bit images
are convolved in float32 and rounded once. Everything else (GPU tensors, other kernels) goes to PyTorch's
convolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastpix2pix.kernels.launch import use_triton

KERNEL_SIZE = 4
PADDING = 1
TRANSPOSED_STRIDE = 2

# Where the polynomials of a tile are evaluated, by number of points; None is infinity, which gives the
# leading coefficient. Of some thousand sets tried, those with the smallest rounding error in float32.
POINTS = {
    3: (1, -1, None),
    4: (0, 1, -1, None),
    5: (1 / 3, -1 / 3, 4 / 3, -4 / 3, None),
    6: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2, None),
}

# Outputs per tile to choose from, by stride. Larger tiles save more products and round worse.
OUTPUTS = {1: (1, 2, 3), 2: (1, 2, 3, 4)}

# Cost of a value of an unfolded image, of a tile in another basis and of a weight in another basis, forward
# and backward together, in multiply-adds of a large matrix product. Measured with AVX2: a core does
# 40 of those in a ns.
UNFOLD_COST = 20
TILE_COST = 50
WEIGHT_COST = 20

Grid = tuple[int, int]
"""Tiles that cover an image: rows, columns."""


# ---------------------------------------------------------------------------------------------- tilings


@dataclass(frozen=True)
class Tiling:
    """How images are cut into square tiles, and the tiles and the weight brought into matrix form.

    stride: of the convolution, 1 or 2. outputs: pixels of the small image per tile and side. Tiles of the
    small image lie side by side; those of the big one, of all pixels that the outputs depend on, overlap.

    Matrix form has the tiles (of the weight: the small channels) first, then the coordinates of the basis,
    then channels.
    """

    stride: int
    outputs: int

    @property
    def phases(self) -> int:
        """Neighbouring pixels per side that count as channels."""
        return 1 if self.outputs == 1 else self.stride

    @property
    def taps(self) -> int:
        """Of the kernel, per side and phase."""
        return KERNEL_SIZE // self.phases

    @property
    def step(self) -> int:
        """From one tile of the big image to the next, in pixels per side and phase."""
        return self.outputs * self.stride // self.phases

    @property
    def points(self) -> int:
        """Of a tile of the big image: pixels per side and phase."""
        return self.outputs - 1 + self.taps

    def grid(self, height: int, width: int) -> Grid:
        """Tiles that cover a small image."""
        return -(-height // self.outputs), -(-width // self.outputs)

    def cost(self, n: int, height: int, width: int, small_channels: int, big_channels: int) -> int:
        """Estimated time of one of the three products with its share of the forms, in multiply-adds."""
        rows, columns = self.grid(height, width)
        tiles, channels = n * rows * columns, self.phases**2 * big_channels
        products = self.points**2 * tiles * channels * small_channels
        if self.outputs == 1:
            return products + UNFOLD_COST * self.points**2 * tiles * channels
        in_tiles, in_weights = tiles * (channels + small_channels), channels * small_channels
        return products + self.points**2 * (TILE_COST * in_tiles + WEIGHT_COST * in_weights)

    # ----------------------------------------------------------------------------------- the big image

    def unfold(self, big: Tensor, grid: Grid) -> Tensor:
        """(N, C, H, W) to its tiles, (tiles, points ** 2, phases ** 2 * C); zeros around the image."""
        (n, c, h, w), (rows, columns) = big.shape, grid
        step, points, phases = self.step, self.points, self.phases
        below, right = (phases * (step * (count - 1) + points) - PADDING for count in grid)
        padded = F.pad(big.permute(0, 2, 3, 1), (0, 0, PADDING, right - w, PADDING, below - h))
        image, row, pixel, _ = padded.stride()
        tiles = padded.as_strided(
            (n, rows, columns, points, points, phases, phases, c),
            (image, step * phases * row, step * phases * pixel, phases * row, phases * pixel, row, pixel, 1),
        )
        return tiles.reshape(n * rows * columns, points**2, phases**2 * c)

    def fold(self, tiles: Tensor, n: int, size: tuple[int, int], grid: Grid) -> Tensor:
        """Adjoint of ``unfold``: add the overlapping tiles up to an image of ``size``."""
        (h, w), (rows, columns) = size, grid
        step, points, phases = self.step, self.points, self.phases
        tiles = tiles.reshape(n, rows, columns, points, points, phases, phases, -1)
        tiles = tiles.permute(0, 1, 3, 5, 2, 4, 6, 7)  # n, rows, points, phases, columns, points, phases, c
        c = tiles.shape[-1]
        reach = -(-points // step)  # a tile spans so many steps
        tall, wide = rows + reach - 1, columns + reach - 1
        padded = tiles.new_zeros(n, tall, step, phases, wide, step, phases, c)
        for i in range(reach):
            for j in range(reach):
                part = tiles[:, :, i * step : (i + 1) * step, :, :, j * step : (j + 1) * step]
                padded[:, i : i + rows, : part.shape[2], :, j : j + columns, : part.shape[5]] += part
        padded = padded.view(n, tall * step * phases, wide * step * phases, c)
        return padded[:, PADDING : PADDING + h, PADDING : PADDING + w].permute(0, 3, 1, 2)

    def big_matrices(self, big: Tensor, grid: Grid) -> Tensor:
        tiles = self.unfold(big, grid)
        if self.outputs == 1:
            return tiles.flatten(1).unsqueeze(1)
        return _each(basis(self, big.dtype).big, tiles)

    def big_image(self, matrices: Tensor, n: int, size: tuple[int, int], grid: Grid) -> Tensor:
        """Adjoint of ``big_matrices``; channels-last."""
        if self.outputs > 1:
            matrices = _each(basis(self, matrices.dtype).big.t(), matrices)
        return self.fold(matrices, n, size, grid)

    # --------------------------------------------------------------------------------- the small image

    def small_matrices(self, small: Tensor, grid: Grid) -> Tensor:
        (n, c, h, w), (rows, columns), outputs = small.shape, grid, self.outputs
        small = small.permute(0, 2, 3, 1)
        if (h, w) != (rows * outputs, columns * outputs):
            small = F.pad(small, (0, 0, 0, columns * outputs - w, 0, rows * outputs - h))
        tiles = small.reshape(n, rows, outputs, columns, outputs, c).transpose(2, 3)
        tiles = tiles.reshape(n * rows * columns, outputs**2, c)
        return tiles if outputs == 1 else _each(basis(self, small.dtype).small, tiles)

    def small_image(self, matrices: Tensor, n: int, size: tuple[int, int], grid: Grid) -> Tensor:
        """Adjoint of ``small_matrices``; channels-last."""
        (h, w), (rows, columns), outputs = size, grid, self.outputs
        if outputs > 1:
            matrices = _each(basis(self, matrices.dtype).small.t(), matrices)
        tiles = matrices.reshape(n, rows, columns, outputs, outputs, -1).transpose(2, 3)
        image = tiles.reshape(n, rows * outputs, columns * outputs, -1)
        return image[:, :h, :w].permute(0, 3, 1, 2)

    # -------------------------------------------------------------------------------------- the weight

    def weight_matrices(self, weight: Tensor) -> Tensor:
        small_channels, taps, phases = weight.shape[0], self.taps, self.phases
        weight = weight.permute(0, 2, 3, 1)
        if self.outputs == 1:
            return weight.reshape(small_channels, 1, -1)
        kernels = weight.reshape(small_channels, taps, phases, taps, phases, -1).transpose(2, 3)
        return _each(basis(self, weight.dtype).weight, kernels.reshape(small_channels, taps**2, -1))

    def weight_gradient(self, matrices: Tensor) -> Tensor:
        """Adjoint of ``weight_matrices``; channels-last."""
        small_channels, taps, phases = matrices.shape[0], self.taps, self.phases
        if self.outputs > 1:
            kernels = _each(basis(self, matrices.dtype).weight.t(), matrices)
            matrices = kernels.view(small_channels, taps, taps, phases, phases, -1).transpose(2, 3)
        return matrices.reshape(small_channels, KERNEL_SIZE, KERNEL_SIZE, -1).permute(0, 3, 1, 2)


class Basis(NamedTuple):
    """Matrices (points ** 2, values of a square) that bring tiles and kernels into another basis.

    With d a tile of the big image, g the kernel and y the outputs:  y = small^T ((weight g) * (big d)).
    """

    big: Tensor
    weight: Tensor
    small: Tensor


@cache
def basis(tiling: Tiling, dtype: torch.dtype) -> Basis:
    """The algorithm of Toom and Cook, transposed.

    A product of polynomials is known by its values at as many points as it has coefficients, and those are
    products of the factors' values. Filtering is the transpose of multiplying by the kernel (Blahut, "Fast
    algorithms for signal processing", 2010, chapter 5). Kronecker products make squares of lines.
    """

    def values(coefficients: int) -> Tensor:
        """(points, coefficients): evaluates a polynomial."""
        leading = [0.0] * (coefficients - 1) + [1.0]
        rows = [
            leading if point is None else [point**k for k in range(coefficients)]
            for point in POINTS[tiling.points]
        ]
        return torch.tensor(rows, dtype=torch.float64)

    lines = torch.linalg.inv(values(tiling.points)).t(), values(tiling.taps), values(tiling.outputs)
    return Basis(*(torch.kron(line, line).to(dtype) for line in lines))


def _each(matrix: Tensor, tiles: Tensor) -> Tensor:
    """``matrix`` times every tile."""
    return torch.bmm(matrix.expand(tiles.shape[0], -1, -1), tiles)


# One matrix product per coordinate of the basis, which is the middle dimension of all matrix forms. With one
# coordinate and a weight that is larger than the image, the weight is the left factor: measured with MKL,
# that takes between half and nearly all of the time of the other order, except for weight^T and 2 to 8 tiles,
# where it takes 3 to 15 times as long.


def _small(big: Tensor, weight: Tensor) -> Tensor:
    tiles, coordinates, _ = big.shape
    if coordinates == 1 and tiles <= weight.shape[0]:
        return torch.mm(weight[:, 0], big[:, 0].t()).t().unsqueeze(1)
    return torch.bmm(big.transpose(0, 1), weight.permute(1, 2, 0)).transpose(0, 1)


def _big(small: Tensor, weight: Tensor) -> Tensor:
    tiles, coordinates, _ = small.shape
    if coordinates == 1 and 16 <= tiles <= weight.shape[0]:
        return torch.mm(weight[:, 0].t(), small[:, 0].t()).t().unsqueeze(1)
    return torch.bmm(small.transpose(0, 1), weight.transpose(0, 1)).transpose(0, 1)


def _weight(small: Tensor, big: Tensor) -> Tensor:
    return torch.bmm(small.permute(1, 2, 0), big.transpose(0, 1)).transpose(0, 1)


@cache
def choose_tiling(
    stride: int, n: int, height: int, width: int, small_channels: int, big_channels: int
) -> Tiling:
    """The tiling that is estimated to be fastest, for a small image of (n, small_channels, height, width)."""
    return min(
        (Tiling(stride, outputs) for outputs in OUTPUTS[stride]),
        key=lambda tiling: tiling.cost(n, height, width, small_channels, big_channels),
    )


# ----------------------------------------------------------------------------------------- convolutions


def uses_tiles(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether a convolution runs here (else it is PyTorch's).

    Not with a single small channel, for which the matrices are too thin. Not when CPU tensors take the
    Triton path, nor while a graph is exported or compiled: it should say "convolution".
    """
    return (
        x.device.type == "cpu"
        and not use_triton(x)
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and weight.shape[0] > 1
        and weight.shape[2:] == (KERNEL_SIZE, KERNEL_SIZE)
        and stride in OUTPUTS
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


@cache
def _cpu_has(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for ``dtype``, so that convolutions in it are not emulated."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def is_widened(x: Tensor) -> bool:
    """Whether a convolution of ``x`` is computed in float32 and rounded; never on the Triton path."""
    return x.device.type == "cpu" and not use_triton(x) and not _cpu_has(x.dtype)


def _widened(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


class ConvContext(NamedTuple):
    """State of a convolution saved for backward.

    tiling: None where PyTorch's convolution ran. size: of the input image. x, weight: the inputs in matrix
    form (unchanged where there is no tiling) and in the type that is computed in.
    """

    stride: int
    tiling: Tiling | None
    size: tuple[int, int]
    x: Tensor
    weight: Tensor


def conv2d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> tuple[Tensor, ConvContext]:
    """A convolution with padding 1, and its state for ``conv2d_backward``. Not differentiable by itself.

    x: (N, in, H, W); weight: (out, in, 4, 4); both are copied if they are not channels-last. bias: (out,).
    """
    n, _, h, w = x.shape
    if is_widened(x):
        y, kept = conv2d_forward(*_widened(x, weight, bias), stride)
        return y.to(x.dtype), kept
    if not uses_tiles(x, weight, stride):
        return F.conv2d(x, weight, bias, stride, PADDING), ConvContext(stride, None, (h, w), x, weight)
    size = tuple((side + 2 * PADDING - KERNEL_SIZE) // stride + 1 for side in (h, w))
    tiling = choose_tiling(stride, n, *size, *weight.shape[:2])
    grid = tiling.grid(*size)
    kept = ConvContext(stride, tiling, (h, w), tiling.big_matrices(x, grid), tiling.weight_matrices(weight))
    return _plus(tiling.small_image(_small(kept.x, kept.weight), n, size, grid), bias), kept


def conv2d_backward(
    dy: Tensor,
    kept: ConvContext,
    *,
    needs_x: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = False,
    rows: slice = slice(None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias from the output's; None for those that are not needed.

    rows: the images of the batch to which dy belongs. The weight's gradient needs all of them.
    """
    if dy.dtype != kept.weight.dtype:
        gradients = conv2d_backward(
            dy.to(kept.weight.dtype),
            kept,
            needs_x=needs_x,
            needs_weight=needs_weight,
            needs_bias=needs_bias,
            rows=rows,
        )
        return tuple(None if gradient is None else gradient.to(dy.dtype) for gradient in gradients)
    if kept.tiling is None:
        needs = [needs_x, needs_weight, needs_bias]
        return _library_backward(dy, kept.x[rows], kept.weight, kept.stride, needs)
    tiling, grid = kept.tiling, kept.tiling.grid(*dy.shape[2:])
    small = tiling.small_matrices(dy, grid)
    dx = dweight = None
    if needs_x:
        dx = tiling.big_image(_big(small, kept.weight), dy.shape[0], kept.size, grid)
    if needs_weight:
        dweight = tiling.weight_gradient(_weight(small, kept.x))
    return dx, dweight, dy.sum((0, 2, 3)) if needs_bias else None


def conv_transpose2d_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, ConvContext]:
    """A transposed convolution with stride 2 and padding 1, and its state for ``conv_transpose2d_backward``.

    Not differentiable by itself. x: (N, in, H, W); weight: (in, out, 4, 4).
    """
    n, _, h, w = x.shape
    if is_widened(x):
        y, kept = conv_transpose2d_forward(*_widened(x, weight))
        return y.to(x.dtype), kept
    if not uses_tiles(x, weight, TRANSPOSED_STRIDE):
        y = F.conv_transpose2d(x, weight, None, TRANSPOSED_STRIDE, PADDING)
        return y, ConvContext(TRANSPOSED_STRIDE, None, (h, w), x, weight)
    tiling = choose_tiling(TRANSPOSED_STRIDE, n, h, w, *weight.shape[:2])
    grid, size = tiling.grid(h, w), (TRANSPOSED_STRIDE * h, TRANSPOSED_STRIDE * w)
    small, matrices = tiling.small_matrices(x, grid), tiling.weight_matrices(weight)
    kept = ConvContext(TRANSPOSED_STRIDE, tiling, (h, w), small, matrices)
    return tiling.big_image(_big(small, matrices), n, size, grid), kept


def conv_transpose2d_backward(
    dy: Tensor, kept: ConvContext, *, needs_x: bool = True, needs_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight from the output's; None for those that are not needed."""
    gradients = conv_gradients(dy, kept, transposed=True)
    return gradients.x() if needs_x else None, gradients.weight() if needs_weight else None


class ConvGradients(NamedTuple):
    """The gradients of a convolution's input and weight, each computed when it is called for."""

    x: Callable[[], Tensor]
    weight: Callable[[], Tensor]


def conv_gradients(dy: Tensor, kept: ConvContext, *, transposed: bool) -> ConvGradients:
    """Of ``conv2d_forward``, or of ``conv_transpose2d_forward``; what both need is computed at once."""
    dtype, dy = dy.dtype, dy.to(kept.weight.dtype)
    if kept.tiling is None:
        backward = partial(_library_backward, dy, kept.x, kept.weight, kept.stride, transposed=transposed)
        return ConvGradients(
            lambda: backward([True, False, False])[0].to(dtype),
            lambda: backward([False, True, False])[1].to(dtype),
        )
    tiling, weight = kept.tiling, kept.weight
    grid = tiling.grid(*(kept.size if transposed else dy.shape[2:]))
    n, size = dy.shape[0], kept.size
    if transposed:
        big = tiling.big_matrices(dy, grid)
        return ConvGradients(
            lambda: tiling.small_image(_small(big, weight), n, size, grid).to(dtype),
            lambda: tiling.weight_gradient(_weight(kept.x, big)).to(dtype),
        )
    small = tiling.small_matrices(dy, grid)
    return ConvGradients(
        lambda: tiling.big_image(_big(small, weight), n, size, grid).to(dtype),
        lambda: tiling.weight_gradient(_weight(small, kept.x)).to(dtype),
    )


def _library_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, needs: list[bool], *, transposed: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    bias_sizes, dilation, output_padding, groups = [dy.shape[1]], [1, 1], [0, 0], 1
    return torch.ops.aten.convolution_backward(
        dy,
        x,
        weight,
        bias_sizes,
        [stride] * 2,
        [PADDING] * 2,
        dilation,
        transposed,
        output_padding,
        groups,
        needs,
    )


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.view(1, -1, 1, 1)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride):
        y, kept = conv2d_forward(x, weight, bias, stride)
        ctx.save_for_backward(kept.x, kept.weight)
        ctx.kept = kept[:3]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        kept = ConvContext(*ctx.kept, *ctx.saved_tensors)
        gradients = conv2d_backward(
            dy, kept, needs_x=needs_x, needs_weight=needs_weight, needs_bias=needs_bias
        )
        return *gradients, None


class _ConvTranspose2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        y, kept = conv_transpose2d_forward(x, weight)
        ctx.save_for_backward(kept.x, kept.weight)
        ctx.kept = kept[:3]
        return _plus(y, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        kept = ConvContext(*ctx.kept, *ctx.saved_tensors)
        gradients = conv_transpose2d_backward(dy, kept, needs_x=needs_x, needs_weight=needs_weight)
        return *gradients, dy.sum((0, 2, 3)) if needs_bias else None


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int) -> Tensor:
    """``F.conv2d`` with padding 1, from (N, in, H, W) to (N, out, h, w). Differentiable once."""
    if is_widened(x):
        return conv2d(*_widened(x, weight, bias), stride=stride).to(x.dtype)
    if uses_tiles(x, weight, stride):
        return _Conv2d.apply(x, weight, bias, stride)
    return F.conv2d(x, weight, bias, stride, PADDING)


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv_transpose2d`` with stride 2 and padding 1, from (N, in, H, W) to (N, out, 2 H, 2 W).

    weight: (in, out, 4, 4). Differentiable once.
    """
    if is_widened(x):
        return conv_transpose2d(*_widened(x, weight, bias)).to(x.dtype)
    if uses_tiles(x, weight, TRANSPOSED_STRIDE):
        return _ConvTranspose2d.apply(x, weight, bias)
    return F.conv_transpose2d(x, weight, bias, TRANSPOSED_STRIDE, PADDING)

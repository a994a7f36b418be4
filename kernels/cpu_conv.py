"""The 4x4 convolutions of pix2pix, fast on the CPU: as matrix products over tiles of the images.

A convolution relates a *big* image to a *small* one; going down it is conv2d, going up conv_transpose2d. Each
one's input gradient is the other, and both have the same weight gradient, for the weight is (small channels,
big channels, 4, 4) in either. In terms of tiles the three are products of the same three matrices,

    small = big @ weight^T        big = small @ weight        weight = small^T @ big,

and what differs is how the images and the weight are brought into matrix form (``Tiling``):

* one output per tile: the big image is unfolded (im2col), and the weight is used as it lies in memory. The
  libraries' convolutions reorder the weight, three times a step, which takes far longer than the arithmetic
  where images are 1x1 to 16x16. The big image comes out of its product as tiles to be added up; in 16 bits
  each of them would be rounded, so there the small image is unfolded, and what is added up is one sum.
* several outputs per tile: minimal filtering (Winograd, "Arithmetic complexity of computations", 1980; Lavin
  & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016). Tiles and weight are brought into
  another basis, in which neighbouring outputs share products: 2.6 to 4 times fewer multiplications. With a
  stride of 2, even and odd pixels are treated as channels, and the kernel is 2x2.

In float32 it rounds about as the libraries do, in bfloat16, with one output per tile alone, exactly as often
(tests/kernels/test_cpu_conv.py). On a CPU without 16-bit arithmetic, where the libraries emulate it 10 to 100
times slower than float32, 16-bit images are convolved in float32 and rounded once. Everything else (GPU
tensors, other kernels, and layers of which the libraries are faster) goes to PyTorch's convolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
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


class Rates(NamedTuple):
    """What one core of some kind of processor does, as measured, to choose the fastest way by.

    products: multiply-adds of a large matrix product in a ns. unfolded, gathered, in_tile, in_weight,
    as_it_lies: ns for a value of an unfolded big image, of an unfolded small one, of a tile in another basis,
    of a weight in another basis and of a weight that stays as it is, forward and backward together. library,
    library_weight: of PyTorch's convolution, multiply-adds in a ns, and ns for a weight, forward and backward
    together; None where it is nowhere the fastest.
    """

    products: float
    unfolded: float
    in_tile: float = 0.0
    in_weight: float = 0.0
    gathered: float = 0.0
    as_it_lies: float = 0.0
    library: float | None = None
    library_weight: float = 0.0


FLOAT32_AVX2 = Rates(products=40, unfolded=0.5, in_tile=1.25, in_weight=0.5)
"""An AMD EPYC of 2023, with MKL and oneDNN."""

FLOAT32_AVX512 = Rates(products=62, unfolded=0.6, in_tile=1.6, in_weight=0.8)
"""An Intel Xeon of the fifth generation, with MKL."""

BFLOAT16_AMX = Rates(
    products=350,
    unfolded=0.15,
    gathered=0.15,
    as_it_lies=0.4,
    library=330,
    library_weight=1.33,
)
"""The same Xeon, whose matrix units oneDNN uses."""

FEW_PIXELS = 16
"""Of a small image, the whole batch together: up to so many, moving a weight takes longer than arithmetic
with it, however wasteful."""

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

    def cost(
        self, rates: Rates, n: int, height: int, width: int, small_channels: int, big_channels: int
    ) -> float:
        """Estimated ns of one of the three products with its share of the forms, on one core."""
        rows, columns = self.grid(height, width)
        tiles, channels = n * rows * columns, self.phases**2 * big_channels
        squares, weights = self.points**2, channels * small_channels
        products = squares * tiles * weights / rates.products
        if self.outputs == 1:
            in_tiles = rates.unfolded * channels + rates.gathered * small_channels
            return products + squares * (in_tiles * tiles + rates.as_it_lies * weights)
        in_tiles = tiles * (channels + small_channels)
        return products + squares * (rates.in_tile * in_tiles + rates.in_weight * weights)

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
# where it takes 3 to 15 times as long. And measured with oneDNN, in 16 bits a factor that is neither a matrix
# as it lies in memory nor its transpose is copied first, and a transposed left factor takes twice as long.


def _small(big: Tensor, weight: Tensor) -> Tensor:
    tiles, coordinates, _ = big.shape
    if coordinates > 1:
        return torch.bmm(big.transpose(0, 1), weight.permute(1, 2, 0)).transpose(0, 1)
    if tiles <= weight.shape[0]:
        return torch.mm(weight[:, 0], big[:, 0].t()).t().unsqueeze(1)
    return torch.mm(big[:, 0], weight[:, 0].t()).unsqueeze(1)


def _big(small: Tensor, weight: Tensor) -> Tensor:
    tiles, coordinates, _ = small.shape
    if coordinates == 1 and 16 <= tiles <= weight.shape[0]:
        return torch.mm(weight[:, 0].t(), small[:, 0].t()).t().unsqueeze(1)
    return torch.bmm(small.transpose(0, 1), weight.transpose(0, 1)).transpose(0, 1)


def _weight(small: Tensor, big: Tensor) -> Tensor:
    if small.element_size() == 2:
        return torch.mm(small[:, 0].t().contiguous(), big[:, 0]).unsqueeze(1)
    return torch.bmm(small.permute(1, 2, 0), big.transpose(0, 1)).transpose(0, 1)


def _big_image(
    tiling: Tiling, small: Tensor, weight: Tensor, n: int, size: tuple[int, int], grid: Grid
) -> Tensor:
    """The product that gives the big image, (N, C, H, W) channels-last, from matrix forms."""
    if small.element_size() > 2:
        return tiling.big_image(_big(small, weight), n, size, grid)
    image = small.view(n, *grid, -1)
    return _gathered(image, weight.view(weight.shape[0], KERNEL_SIZE, KERNEL_SIZE, -1), tiling.stride, size)


def _gathered(small: Tensor, weight: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """The big image (N, Cb, H, W) of (N, h, w, Cs) and (Cs, 4, 4, Cb): every pixel is one sum.

    Pixel S u + p of a side, with p < S, sees 4 / S neighbours of the small one, from u + (2 p - 2) / S on;
    the i-th of them by the kernel's row 3 - p - S i. So there is a product for each (p, q), of the small
    image's windows and a copy of that part of the kernels. With few pixels it is faster to multiply all of
    the kernels, as they lie, by windows that are mostly zeros.
    """
    (n, h, w, small_channels), big_channels = small.shape, weight.shape[-1]
    seen, before = KERNEL_SIZE // stride, 2 // stride
    rows, columns = (-(-side // stride) for side in size)
    below, right = (count + stride + seen - 2 - before for count in (rows, columns))
    padded = F.pad(small, (0, 0, before, right - w, before, below - h))
    parts = list(product(range(stride), range(stride), range(seen), range(seen)))
    if n * h * w <= FEW_PIXELS:
        windows = small.new_zeros(n, rows, stride, columns, stride, small_channels, KERNEL_SIZE, KERNEL_SIZE)
        for p, q, i, j in parts:
            window = padded[:, p + i : p + i + rows, q + j : q + j + columns]
            windows[:, :, p, :, q, :, 3 - p - stride * i, 3 - q - stride * j] = window
        big = torch.mm(windows.view(-1, KERNEL_SIZE**2 * small_channels), weight.flatten(0, 2))
    else:
        image, row, pixel, _ = padded.stride()
        windows = padded.as_strided(
            (stride, stride, n, rows, columns, seen, seen, small_channels),
            (row, pixel, image, row, pixel, row, pixel, 1),
        ).reshape(stride**2, n * rows * columns, seen**2 * small_channels)
        kernels = weight.new_empty(stride, stride, seen, seen, small_channels, big_channels)
        for p, q, i, j in parts:
            kernels[p, q, i, j] = weight[:, 3 - p - stride * i, 3 - q - stride * j]
        sums = torch.bmm(windows, kernels.view(stride**2, -1, big_channels))
        big = sums.view(stride, stride, n, rows, columns, big_channels).permute(2, 3, 0, 4, 1, 5)
    big = big.reshape(n, stride * rows, stride * columns, big_channels)
    return big[:, : size[0], : size[1]].permute(0, 3, 1, 2)


@cache
def choose_tiling(
    rates: Rates,
    outputs: tuple[int, ...],
    stride: int,
    n: int,
    height: int,
    width: int,
    small_channels: int,
    big_channels: int,
) -> Tiling | None:
    """The tiling that is estimated to be fastest, of those with so many ``outputs``; None: the library.

    For a small image of (n, small_channels, height, width).
    """
    layer = n, height, width, small_channels, big_channels
    tilings = [Tiling(stride, count) for count in outputs]
    best = min(tilings, key=lambda tiling: tiling.cost(rates, *layer))
    if rates.library is None:
        return best
    weights = KERNEL_SIZE**2 * small_channels * big_channels
    library = n * height * width * weights / rates.library + weights * rates.library_weight
    return best if best.cost(rates, *layer) < library else None


# ----------------------------------------------------------------------------------------- convolutions


def find_tiling(
    x: Tensor, weight: Tensor, stride: int, height: int, width: int, rates: Rates | None = None
) -> Tiling | None:
    """How a convolution is computed here, or None: by PyTorch's.

    height, width: of the small image. rates: of the processor; by default of this one.

    Not with a single small channel, for which the matrices are too thin. Not when CPU tensors take the
    Triton path, nor while a graph is exported or compiled: it should say "convolution".
    """
    if (
        x.device.type != "cpu"
        or use_triton(x)
        or x.dtype != weight.dtype
        or weight.shape[0] == 1
        or weight.shape[2:] != (KERNEL_SIZE, KERNEL_SIZE)
        or stride not in OUTPUTS
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    ):
        return None
    rates = rates_of_this_cpu(x.dtype) if rates is None else rates
    if rates is None:
        return None
    outputs = OUTPUTS[stride] if x.element_size() > 2 else OUTPUTS[stride][:1]
    return choose_tiling(rates, outputs, stride, x.shape[0], height, width, *weight.shape[:2])


@cache
def rates_of_this_cpu(dtype: torch.dtype) -> Rates | None:
    """By what instructions it has, so that every start of a run chooses the same; None: the library's."""
    if dtype in (torch.float32, torch.float64):
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        return FLOAT32_AVX512 if wide else FLOAT32_AVX2
    return BFLOAT16_AMX if dtype == torch.bfloat16 and multiplies_bf16_matrices() else None


def multiplies_bf16_matrices() -> bool:
    """Whether this CPU has matrix units for bf16 (AMX) and PyTorch's convolutions can use them."""
    return torch.cpu._is_amx_tile_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 (AVX512-BF16, which comes with AMX too) and
    PyTorch's convolutions can use them."""
    return torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
    height, width = _small_size(h, w, stride)
    tiling = find_tiling(x, weight, stride, height, width)
    if tiling is None:
        return F.conv2d(x, weight, bias, stride, PADDING), ConvContext(stride, None, (h, w), x, weight)
    grid = tiling.grid(height, width)
    kept = ConvContext(stride, tiling, (h, w), tiling.big_matrices(x, grid), tiling.weight_matrices(weight))
    y = tiling.small_image(_small(kept.x, kept.weight), n, (height, width), grid)
    return _plus(y, bias), kept


def _small_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Of conv2d's output."""
    rows, columns = ((side + 2 * PADDING - KERNEL_SIZE) // stride + 1 for side in (height, width))
    return rows, columns


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
        dx = _big_image(tiling, small, kept.weight, dy.shape[0], kept.size, grid)
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
    tiling = find_tiling(x, weight, TRANSPOSED_STRIDE, h, w)
    if tiling is None:
        y = F.conv_transpose2d(x, weight, None, TRANSPOSED_STRIDE, PADDING)
        return y, ConvContext(TRANSPOSED_STRIDE, None, (h, w), x, weight)
    grid, size = tiling.grid(h, w), (TRANSPOSED_STRIDE * h, TRANSPOSED_STRIDE * w)
    small, matrices = tiling.small_matrices(x, grid), tiling.weight_matrices(weight)
    kept = ConvContext(TRANSPOSED_STRIDE, tiling, (h, w), small, matrices)
    return _big_image(tiling, small, matrices, n, size, grid), kept


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
        lambda: _big_image(tiling, small, weight, n, size, grid).to(dtype),
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
    if find_tiling(x, weight, stride, *_small_size(*x.shape[2:], stride)) is not None:
        return _Conv2d.apply(x, weight, bias, stride)
    return F.conv2d(x, weight, bias, stride, PADDING)


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv_transpose2d`` with stride 2 and padding 1, from (N, in, H, W) to (N, out, 2 H, 2 W).

    weight: (in, out, 4, 4). Differentiable once.
    """
    if is_widened(x):
        return conv_transpose2d(*_widened(x, weight, bias)).to(x.dtype)
    if find_tiling(x, weight, TRANSPOSED_STRIDE, *x.shape[2:]) is not None:
        return _ConvTranspose2d.apply(x, weight, bias)
    return F.conv_transpose2d(x, weight, bias, TRANSPOSED_STRIDE, PADDING)

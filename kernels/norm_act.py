"""Normalisation, dropout and activation of a convolution's output, as one differentiable op.

Two regimes, by the number of pixels:

* few (the inner layers): a program owns a slice of the channels in all groups and holds all pixels of one in
  registers, so statistics and result come from one launch that reads each image once;
* many (the outer layers): one launch leaves the partial sums of chunks of pixels in a workspace, the next
  combines them, always in the same order, and writes the result.

With running statistics, or with many pixels and no norm, a layer needs only one launch of the second regime.
In the first regime an image may come as the partial sums of a convolution that has split its own sum. The
kernels are in norm_act_kernels.py, their block sizes in tiles.py.
"""

from math import prod

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpix2pix.kernels import cpu_norm, reference
from fastpix2pix.kernels.images import as_pixels, image_pointer, output_like
from fastpix2pix.kernels.launch import DTYPES, launch, use_triton
from fastpix2pix.kernels.norm_act_kernels import (
    Constants,
    Dropout,
    Parameters,
    Saved,
    Splits,
    Workspace,
    norm_act_backward_apply,
    norm_act_backward_sums,
    norm_act_backward_whole,
    norm_act_forward_apply,
    norm_act_forward_whole,
    norm_act_statistics,
)
from fastpix2pix.kernels.reference import (
    NormActBackward,
    NormActConfig,
    NormActForward,
    check_partials,
    compute_dtype,
    dropout_threshold,
)
from fastpix2pix.kernels.tiles import (
    CHUNK_BACKWARD,
    CHUNK_FORWARD,
    FEW_PIXELS,
    WHOLE_BACKWARD,
    WHOLE_FORWARD,
    Chunks,
    cdiv,
    choose_tile,
    choose_whole_tile,
    elementwise_chunks,
    next_power_of_2,
    reduction_chunks,
    trips,
)


def _constants(config: NormActConfig, dtype: torch.dtype) -> Constants:
    return Constants(
        config.eps,
        config.momentum,
        config.unbiased,
        config.slope,
        config.skip_slope,
        dropout_threshold(config.dropout),
        1.0 / (1.0 - config.dropout),
        DTYPES[dtype],
    )


def _dropout(rng: Tensor | None, config: NormActConfig) -> Dropout:
    return Dropout(rng, config.layer) if config.dropout else Dropout(None, 0)


def _splits(partials: Tensor | None) -> tuple[Splits, int]:
    """The kernels' argument, and how many partial sums it has."""
    if partials is None:
        return Splits(None, 0, 0), 0
    return Splits(partials, partials.shape[1], partials.stride(1)), partials.shape[0]


def _store_sum(partials: Tensor, image: Tensor) -> Tensor:
    """``reference.add_partials`` in whatever order one reduction adds them."""
    n, c, h, w = image.shape
    return image.copy_(partials.sum(0).view(n, h, w, c).permute(0, 3, 1, 2))


def _itemsize(x: Tensor, *partials: Tensor | None) -> int:
    """Bytes of one value of what a program reads most of."""
    return max(x.element_size(), *(0 if some is None else some.element_size() for some in partials))


def in_one_launch(pixels: int, config: NormActConfig) -> bool:
    """Whether an image of so many pixels, of all groups, is of the first regime."""
    return pixels <= FEW_PIXELS and (config.training or not config.norm)


def _apply_trips(shares: Chunks, groups_combined: int) -> int:
    """Of a launch that reads partial sums: the first tile comes with them.

    groups_combined: of which the parameters' program reads the partial sums, one after the other.
    """
    return max(1 + trips(shares.tiles, loaded_before=1), groups_combined)


def norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rng: Tensor | None,
    config: NormActConfig,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
    *,
    partials: Tensor | None = None,
) -> NormActForward:
    """``reference.norm_act_forward``, by kernels on a GPU. ValueError for an ``out`` that x does not fit."""
    if not use_triton(x):
        if partials is None and cpu_norm.serves(x, weight, bias, config):
            return cpu_norm.epilogue_forward(
                x, weight, bias, running_mean, running_var, rng, config, out, skip_out
            )
        return reference.norm_act_forward(
            x, weight, bias, running_mean, running_var, rng, config, out, skip_out, partials=partials
        )
    if partials is not None:
        check_partials(partials, x)
        x = output_like(x, x)
    x, y = as_pixels(x), output_like(x, out)
    skip = None if config.skip_slope is None else output_like(x, skip_out)
    channels, dtype = x.shape[1], compute_dtype(x.dtype)
    groups = config.groups if config.norm else 1
    pixels = x.numel() // (groups * channels)
    saved = Saved(None, None)
    if not config.norm:
        parameters = Parameters(None, bias)
    else:
        parameters = Parameters(weight, None if weight is None else bias, running_mean, running_var)
        mean = torch.empty((groups, channels), dtype=dtype, device=x.device)
        saved = Saved(mean, torch.empty_like(mean))
    images, dropout = (image_pointer(x), image_pointer(y), image_pointer(skip)), _dropout(rng, config)
    constants = _constants(config, dtype)
    takes_statistics = config.norm and config.training
    updated = parameters[2:] if takes_statistics else ()

    if in_one_launch(groups * pixels, config):
        tile = choose_whole_tile(pixels, channels, _itemsize(x, partials), WHOLE_FORWARD)
        splits, count = _splits(partials)
        launch(
            norm_act_forward_whole,
            (1, cdiv(channels, tile.channels)),
            images[0],
            splits,
            *images[1:],
            parameters,
            saved,
            dropout,
            groups,
            pixels,
            channels,
            CONSTANTS=constants,
            SPLITS=count,
            TILE=tile,
            num_warps=tile.num_warps,
            reads=(x if partials is None else partials, *parameters, dropout.rng),
            writes=(None if partials is None else x, y, skip, *saved, *updated),
            trips=groups,
        )
        return NormActForward(y, skip, *saved)

    if partials is not None:
        _store_sum(partials, x)
    tile = choose_tile(pixels, channels, x.element_size(), CHUNK_FORWARD)
    programs = cdiv(channels, tile.channels), groups
    chunks, shares = reduction_chunks(pixels, tile), elementwise_chunks(pixels, tile, prod(programs))
    chunk_sums = Workspace(None, groups, chunks.count)
    if takes_statistics:
        workspace = torch.empty((2, groups, chunks.count, channels), dtype=dtype, device=x.device)
        chunk_sums = Workspace(workspace, groups, chunks.count)
        launch(
            norm_act_statistics,
            (chunks.count, *programs),
            image_pointer(x),
            chunk_sums,
            pixels,
            chunks.pixels,
            channels,
            DTYPE=DTYPES[dtype],
            TILE=tile,
            num_warps=tile.num_warps,
            reads=(x,),
            writes=(workspace,),
            trips=trips(chunks.tiles),
        )
    has_updates = takes_statistics and running_mean is not None
    launch(
        norm_act_forward_apply,
        (shares.count + has_updates, *programs),
        *images,
        parameters,
        saved,
        chunk_sums,
        dropout,
        pixels,
        chunks.pixels,
        shares.pixels,
        channels,
        CONSTANTS=constants,
        CHUNKS=next_power_of_2(chunks.count),
        TILE=tile,
        num_warps=tile.num_warps,
        reads=(x, chunk_sums.pointer, *parameters, dropout.rng),
        writes=(y, skip, *saved, *updated),
        trips=_apply_trips(shares, groups if has_updates else 0) if takes_statistics else trips(shares.tiles),
    )
    return NormActForward(y, skip, *saved)


def norm_act_backward(
    dy: Tensor | None,
    dskip: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rng: Tensor | None,
    config: NormActConfig,
    needs_affine: bool = True,
    *,
    dy_partials: Tensor | None = None,
    dskip_partials: Tensor | None = None,
) -> NormActBackward:
    """``reference.norm_act_backward``, by kernels on a GPU."""
    if not use_triton(x):
        some = dy is not None or dskip is not None
        whole = dy_partials is None and dskip_partials is None
        if some and whole and cpu_norm.serves(x, weight, bias, config):
            return cpu_norm.epilogue_backward(
                dy, dskip, x, weight, bias, mean, rstd, rng, config, needs_affine
            )
        return reference.norm_act_backward(
            dy,
            dskip,
            x,
            weight,
            bias,
            mean,
            rstd,
            rng,
            config,
            needs_affine,
            dy_partials=dy_partials,
            dskip_partials=dskip_partials,
        )
    for given in (dy_partials, dskip_partials):
        if given is not None:
            check_partials(given, x)
    x = as_pixels(x)
    dy, dskip = (None if gradient is None else as_pixels(gradient) for gradient in (dy, dskip))
    dx = output_like(x)
    channels, dtype = x.shape[1], compute_dtype(x.dtype)
    if mean is None:
        groups, parameters, saved = 1, Parameters(None, bias), Saved(None, None)
    else:
        groups, parameters = mean.shape[0], Parameters(weight, None if weight is None else bias)
        saved = Saved(mean.contiguous(), rstd.contiguous())
    pixels = x.numel() // (groups * channels)
    constants, dropout = _constants(config, dtype), _dropout(rng, config)
    through_statistics = mean is not None and config.training
    wanted = parameters[:2] if needs_affine else (None, None)
    one_launch = in_one_launch(groups * pixels, config)
    dweight = dbias = None
    if through_statistics or one_launch:
        dweight, dbias = (None if p is None else torch.empty_like(p) for p in wanted)

    if not one_launch:
        if dy_partials is not None:
            dy, dy_partials = _store_sum(dy_partials, output_like(x)), None
        if dskip_partials is not None:
            dskip, dskip_partials = _store_sum(dskip_partials, output_like(x)), None
    images = image_pointer(x), image_pointer(dy), image_pointer(dskip)
    reads = x, dy, dy_partials, dskip, dskip_partials, *parameters, *saved, dropout.rng

    if one_launch:
        itemsize = _itemsize(x, dy_partials, dskip_partials)
        tile = choose_whole_tile(pixels, channels, itemsize, WHOLE_BACKWARD)
        (splits, count), (skip_splits, skip_count) = _splits(dy_partials), _splits(dskip_partials)
        launch(
            norm_act_backward_whole,
            (1, cdiv(channels, tile.channels)),
            *images[:2],
            splits,
            images[2],
            skip_splits,
            image_pointer(dx),
            parameters,
            saved,
            dweight,
            dbias,
            dropout,
            groups,
            pixels,
            channels,
            CONSTANTS=constants,
            SPLITS=count,
            DSKIP_SPLITS=skip_count,
            TILE=tile,
            num_warps=tile.num_warps,
            reads=reads,
            writes=(dx, dweight, dbias),
            trips=groups,
        )
        return NormActBackward(dx, dweight, dbias)

    tile = choose_tile(pixels, channels, x.element_size(), CHUNK_BACKWARD)
    programs = cdiv(channels, tile.channels), groups
    shares = elementwise_chunks(pixels, tile, prod(programs))
    sums = through_statistics or wanted[1] is not None
    chunks = reduction_chunks(pixels, tile) if sums else shares
    workspace = None
    if sums:
        workspace = torch.empty((2, groups, chunks.count, channels), dtype=dtype, device=x.device)
    partials = Workspace(workspace, groups, chunks.count)
    early_dx = None if through_statistics else dx
    launch(
        norm_act_backward_sums,
        (chunks.count, *programs),
        *images,
        image_pointer(early_dx),
        parameters,
        saved,
        partials,
        dropout,
        pixels,
        chunks.pixels,
        channels,
        CONSTANTS=constants,
        TILE=tile,
        num_warps=tile.num_warps,
        reads=reads,
        writes=(workspace, early_dx),
        trips=trips(chunks.tiles),
    )
    if through_statistics:
        launch(
            norm_act_backward_apply,
            (shares.count + (dweight is not None), *programs),
            *images,
            image_pointer(dx),
            parameters,
            saved,
            partials,
            dweight,
            dbias,
            dropout,
            pixels,
            shares.pixels,
            channels,
            CONSTANTS=constants,
            CHUNKS=next_power_of_2(chunks.count),
            TILE=tile,
            num_warps=tile.num_warps,
            reads=(*reads, workspace),
            writes=(dx, dweight, dbias),
            trips=_apply_trips(shares, groups if dweight is not None else 0),
        )
    elif sums:
        totals = reversed(workspace.sum((1, 2)).unbind())
        dweight, dbias = (None if p is None else t.to(p.dtype) for p, t in zip(wanted, totals, strict=True))
    return NormActBackward(dx, dweight, dbias)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running, rng, config, slots):
        y, skip, mean, rstd = norm_act_forward(x, weight, bias, *running, rng, config, *slots)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.rng, ctx.config = rng, config
        ctx.set_materialize_grads(False)
        # Detached: a result in memory handed in as a view must not join that view's autograd history.
        return (y.detach(), skip.detach()) if skip is not None else y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dskip=None):
        needs_affine = any(ctx.needs_input_grad[1:3])
        gradients = norm_act_backward(dy, dskip, *ctx.saved_tensors, ctx.rng, ctx.config, needs_affine)
        return *gradients, None, None, None, None


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    config: NormActConfig,
    rng: Tensor | None = None,
    out: Tensor | None = None,
    skip_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Differentiable ``norm_act_forward``: y, or (y, skip) when ``config.skip_slope`` is a number.

    ``out`` and ``skip_out`` are plain memory to write into, not inputs of the autograd graph: the results
    are new tensors that share it.
    """
    return _NormAct.apply(x, weight, bias, (running_mean, running_var), rng, config, (out, skip_out))

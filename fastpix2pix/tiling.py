"""An image too large for the memory, translated in overlapping tiles that are blended into one."""

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of ``tile`` pixels begin, as few as cover ``length`` with at least ``overlap`` in common.

    They are spread evenly: the first begins at 0, the last ends at ``length``.
    """
    if length <= tile:
        return [0]
    count = 1 + -(-(length - tile) // (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def blend_tiles(translate: Callable[[Tensor], Tensor], source: Tensor, tile: int, overlap: int) -> Tensor:
    """``translate`` applied to tiles of ``source`` (1, c, height, width), blended where they overlap.

    translate: (1, c, h, w) -> (1, c', h, w), with h and w at most ``tile``. Each tile's weight falls
    linearly to its edges over ``overlap`` pixels, so that no seam is where a tile ends.
    """
    height, width = source.shape[-2:]
    total = weights = None
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            here = (..., slice(top, top + tile), slice(left, left + tile))
            generated = translate(source[here])
            if total is None or weights is None:
                total = generated.new_zeros((*generated.shape[:2], height, width))
                weights = generated.new_zeros((1, 1, height, width))
            down, across = (_ramp(n, overlap, generated) for n in generated.shape[-2:])
            weight = down[:, None] * across
            total[here] += generated * weight
            weights[here] += weight
    assert total is not None and weights is not None
    return total / weights


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """(length,): rises from above 0 to 1 over ``overlap`` pixels, and falls again to the other end."""
    from_edge = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
    return (torch.minimum(from_edge, from_edge.flip(0)) / overlap).clamp_(max=1)

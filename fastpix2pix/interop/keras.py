"""Weights of the TensorFlow tutorial's Keras models, in and out.

The tutorial's ``Generator()`` and ``Discriminator()`` list their weights in the order of their layers, each
block as kernel, gamma, beta, moving_mean, moving_variance (kernel alone in the first block, kernel and bias
in the last layer). Kernels are (height, width, in, out) for Conv2D and (height, width, out, in) for
Conv2DTranspose; both become PyTorch's layout by the same reversal, without a spatial flip.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastpix2pix.errors import UserError
from fastpix2pix.models import Block, PatchDiscriminator, UNetGenerator

KERAS_FROM_TORCH = (2, 3, 1, 0)
TORCH_FROM_KERAS = (3, 2, 0, 1)


def _in_keras_order(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight, in the order of ``get_weights()``."""
    if not isinstance(module, UNetGenerator | PatchDiscriminator) or module.preset != "tutorial":
        raise UserError(
            f"{type(module).__name__} is not one of the tutorial's networks; Keras weights fit "
            "UNetGenerator and PatchDiscriminator with preset='tutorial'"
        )
    state = module.state_dict()
    for name, child in module.named_modules():
        if isinstance(child, Block):
            parts = [f"{name}.conv.weight"]
            parts += [f"{name}.epilogue.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
            yield from ((part, state[part]) for part in parts if part in state)
    yield from ((part, state[part]) for part in ("last.weight", "last.bias"))


def load_weights(module: nn.Module, arrays: Sequence[np.ndarray]) -> None:
    """Copy ``arrays``, what ``keras_model.get_weights()`` returns, into a network of preset "tutorial".

    Raises UserError when the number of arrays or a shape shows that they belong to another network; the
    module is then unchanged.
    """
    pairs = list(_in_keras_order(module))
    if len(pairs) != len(arrays):
        raise UserError(
            f"{len(arrays)} Keras arrays for a {type(module).__name__} that has {len(pairs)}; pass all of "
            "get_weights() of the matching model, moving statistics included"
        )
    values = []
    for (name, tensor), array in zip(pairs, arrays, strict=True):
        value = torch.as_tensor(np.asarray(array))
        value = value.permute(TORCH_FROM_KERAS) if value.ndim == 4 else value
        if value.shape != tensor.shape:
            raise UserError(
                f"Keras array for {name} has shape {tuple(value.shape)} in PyTorch's order, not "
                f"{tuple(tensor.shape)}; build the module with the widths of the Keras model"
            )
        values.append(value)
    with torch.no_grad():
        for (_, tensor), value in zip(pairs, values, strict=True):
            tensor.copy_(value)


def export_weights(module: nn.Module) -> list[np.ndarray]:
    """What ``keras_model.set_weights()`` takes: the inverse of ``load_weights``, in float32 or float64."""
    arrays = []
    for _, tensor in _in_keras_order(module):
        tensor = tensor.detach().cpu()
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        tensor = tensor.permute(KERAS_FROM_TORCH) if tensor.ndim == 4 else tensor
        arrays.append(tensor.contiguous().numpy())
    return arrays

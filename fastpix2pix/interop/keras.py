"""Weights of the TensorFlow tutorial's Keras models, in and out.

The tutorial's ``Generator()`` and ``Discriminator()`` list their weights in the order of their layers, each
block as kernel, gamma, beta, moving_mean, moving_variance (kernel alone in the first block, kernel and bias
in the last layer). Kernels are (height, width, in, out) for Conv2D and (height, width, out, in) for
Conv2DTranspose; both become PyTorch's layout by the same reversal, without a spatial flip.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastpix2pix.errors import UserError
from fastpix2pix.models import PatchDiscriminator, UNetGenerator
from fastpix2pix.models.blocks import Block
from fastpix2pix.models.generator import MIN_DOWNS

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


def read_generator(path: str | Path) -> UNetGenerator:
    """The tutorial's generator with the weights in ``path``, on the CPU.

    path: a file that ``np.savez(path, *generator.get_weights())`` wrote. Depth, width and channels follow
    from the arrays. Raises UserError when they are not a generator's.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError(f"{path} is no file; give one that np.savez wrote")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[f"arr_{i}"] for i in range(len(file.files))]
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} holds no list of arrays; write it with np.savez(path, *generator.get_weights())"
        ) from error
    # kernel alone, 5 arrays for each further encoder block and each decoder block, kernel and bias at the end
    num_downs, rest = divmod(len(arrays) - 3, 10)
    if rest or num_downs < MIN_DOWNS - 1 or arrays[0].ndim != 4 or arrays[-2].ndim != 4:
        raise UserError(f"{path} holds {len(arrays)} arrays, which no generator of the tutorial's kind has")
    generator = UNetGenerator(
        "tutorial",
        in_channels=arrays[0].shape[2],
        out_channels=arrays[-2].shape[2],
        ngf=arrays[0].shape[3],
        num_downs=num_downs + 1,
    )
    load_weights(generator, arrays)
    return generator


def export_weights(module: nn.Module) -> list[np.ndarray]:
    """What ``keras_model.set_weights()`` takes: the inverse of ``load_weights``, in float32 or float64."""
    arrays = []
    for _, tensor in _in_keras_order(module):
        tensor = tensor.detach().cpu()
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        tensor = tensor.permute(KERAS_FROM_TORCH) if tensor.ndim == 4 else tensor
        arrays.append(tensor.contiguous().numpy())
    return arrays

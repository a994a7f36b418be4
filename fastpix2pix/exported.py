"""An exported ONNX file as a function from image to image, without PyTorch's network."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from fastpix2pix.data.resize import resize
from fastpix2pix.errors import UserError
from fastpix2pix.pixels import normalize, to_uint8
from fastpix2pix.translator import mirror_padding

try:
    import onnxruntime
except ImportError:
    onnxruntime = None


class ExportedModel:
    """What ``python -m fastpix2pix.export`` wrote, run by ONNX Runtime on the CPU; dropout is left out.

    Has what :class:`fastpix2pix.translator.Translator` offers for pictures: direction, size (pixels a side
    of the smallest image that it takes), source, in_channels, out_channels, and the call. Raises UserError
    when onnxruntime is not installed or ``path`` is no such file.
    """

    interpolation: Literal["nearest"] = "nearest"  # the file does not say how the training resized

    def __init__(self, path: Path):
        if onnxruntime is None:
            raise UserError('an ONNX file needs onnxruntime; run pip install "fastpix2pix[export]"')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; shapes that vary make it warn
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            model = path.read_bytes()
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; give an exported ONNX file") from error
        except Exception as error:  # ONNX Runtime's own, which have no common class
            raise UserError(f"{path}: is no ONNX file that can be run ({error})") from error
        meta = self._session.get_modelmeta()
        try:
            self.direction = meta.custom_metadata_map["direction"]
            self.size = int(meta.custom_metadata_map["multiple_of"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{path}: was not written by python -m fastpix2pix.export, so its input is unknown"
            ) from error
        self.in_channels, self.out_channels = (
            value.shape[1] for value in (self._session.get_inputs()[0], self._session.get_outputs()[0])
        )
        self.source = f"{meta.description}, from {os.path.basename(path)}"

    def __call__(self, image: Image.Image) -> Image.Image:
        """Translate an 8-bit picture of any size: mirrored outwards to a size that fits, then cropped."""
        array = np.asarray(image.convert("L" if self.in_channels == 1 else "RGB"))
        source = normalize(torch.from_numpy(np.atleast_3d(array).copy())[None], torch.float32)
        (rows, inside_rows), (columns, inside_columns) = (
            mirror_padding(n, self.size) for n in source.shape[-2:]
        )
        padded = source[:, :, rows][..., columns].contiguous()
        (generated,) = self._session.run(None, {"input": padded.numpy()})
        picture = to_uint8(torch.from_numpy(generated[0])[:, inside_rows, inside_columns])
        return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)

    def resize(self, image: np.ndarray) -> np.ndarray:
        """``image`` uint8 (height, width, 3) as a square of ``size``, by nearest neighbour."""
        return resize(torch.from_numpy(image[None].copy()), self.size, self.interpolation)[0].numpy()

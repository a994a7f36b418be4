"""An exported ONNX file as a function from image to image, without PyTorch's network."""

import os
from pathlib import Path

import torch
from torch import Tensor

from fastpix2pix.data.options import Direction
from fastpix2pix.data.resize import Interpolation
from fastpix2pix.data.sides import Side
from fastpix2pix.errors import UserError
from fastpix2pix.picture_model import PictureModel
from fastpix2pix.translator import mirror_padding

try:
    import onnxruntime
except ImportError:
    onnxruntime = None


DIRECTIONS: dict[str, Direction] = {"AtoB": "AtoB", "BtoA": "BtoA"}


class ExportedModel(PictureModel):
    """What ``python -m fastpix2pix.export`` wrote, run by ONNX Runtime on the CPU; dropout is left out.

    size: pixels a side of the smallest image that it takes. Raises UserError when onnxruntime is not
    installed or ``path`` is no such file.
    """

    interpolation: Interpolation = "nearest"  # the file does not say how the training resized

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
        said = meta.custom_metadata_map
        ends = self._session.get_inputs()[0], self._session.get_outputs()[0]
        try:
            self.direction = DIRECTIONS[said["direction"]]
            self.size = int(said["multiple_of"])
            self.input = Side("input", ends[0].shape[1]).recorded(said)
            self.output = Side("output", ends[1].shape[1]).recorded(said)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{path}: was not written by python -m fastpix2pix.export, so its input is unknown"
            ) from error
        self.source = f"{meta.description}, from {os.path.basename(path)}"

    def _translate_one(self, source: Tensor) -> Tensor:
        """Mirrored outwards to a size that fits, then cropped."""
        (rows, inside_rows), (columns, inside_columns) = (
            mirror_padding(n, self.size) for n in source.shape[-2:]
        )
        padded = source[:, :, rows][..., columns].contiguous().cpu().numpy()
        (generated,) = self._session.run(None, {"input": padded})
        return torch.from_numpy(generated)[:, :, inside_rows, inside_columns]

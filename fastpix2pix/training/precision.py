"""Which type the networks compute in, and how float32 is computed."""

from typing import Any

import torch

from fastpix2pix.errors import UserError
from fastpix2pix.kernels.cpu_conv import multiplies_bf16
from fastpix2pix.kernels.deep_conv import has_fp32_precision
from fastpix2pix.training.options import Precision

WORKING_TYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


def choose_precision(asked: Precision | None, device: torch.device) -> Precision:
    """``asked``, or the best for ``device``: bf16 on sm_80 and later, fp16 on older GPUs; on a CPU bf16 where
    it multiplies such values, and fp32 elsewhere.

    On a CPU that is a property of the processor, so that every start of a run chooses the same. A step of the
    full networks takes 0.74 of its time in fp32 there with matrix units and 0.84 without (two cores of each,
    docs/speed.md); without instructions for it bf16 is emulated, 10 to 100 times slower.

    Raises UserError for tf32 without a GPU.
    """
    if asked is not None:
        if device.type != "cuda" and asked == "tf32":
            raise UserError(f"--precision tf32 needs an NVIDIA GPU; on {device.type} use fp32")
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if multiplies_bf16() else "fp32"


# PyTorch 2.9 has a second interface to tf32 (``fp32_precision``) beside ``allow_tf32``. Reading the older one
# after somebody has set only the newer raises RuntimeError, so both are set, and the newer one is read.


def set_float32_math(precision: str) -> None:
    """Let float32 convolutions use tf32 tensor cores for precision "tf32" alone; search for the best ones."""
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if has_fp32_precision():
        # cudnn.rnn too: the older interface stands for both, and refuses to be read where they differ.
        cudnn: Any = torch.backends.cudnn  # conv and rnn are made while running
        for library in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
            library.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.benchmark = True

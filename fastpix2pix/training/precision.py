"""Which type the networks compute in, and how float32 is computed."""

import statistics
import time
from typing import Any

import torch
from torch.nn import functional as F

from fastpix2pix.errors import UserError
from fastpix2pix.training.options import Precision

WORKING_TYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
# On a CPU 16 bits must earn their rounding.
WORTHWHILE = 1.2


def choose_precision(asked: Precision | None, device: torch.device) -> Precision:
    """``asked``, or the best for ``device``: bf16 on sm_80 and later, fp16 on older GPUs, and on a CPU bf16
    where it is measured at least 1.2 times as fast as fp32, which is the choice elsewhere.

    Raises UserError for tf32 without a GPU.
    """
    if asked is not None:
        if device.type != "cuda" and asked == "tf32":
            raise UserError(f"--precision tf32 needs an NVIDIA GPU; on {device.type} use fp32")
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if bf16_speedup() >= WORTHWHILE else "fp32"


def bf16_speedup() -> float:
    """How many times as fast a middle layer's convolution is in bf16 as in fp32 on this CPU, both ways.

    Without instructions for it bf16 is emulated, 10 to 100 times slower; then 0, without trying.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0.0
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(5):
        for dtype, taken in seconds.items():
            x = torch.randn(1, 128, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
            weight = torch.randn(256, 128, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
            inputs = (x.requires_grad_(), weight.requires_grad_())
            began = time.perf_counter()
            F.conv2d(*inputs, stride=2, padding=1).sum().backward()
            taken.append(time.perf_counter() - began)
    fp32, bf16 = (statistics.median(taken) for taken in seconds.values())
    return fp32 / bf16


# PyTorch 2.9 has a second interface to tf32 (``fp32_precision``) beside ``allow_tf32``. Reading the older one
# after somebody has set only the newer raises RuntimeError, so both are set, and the newer one is read.


def _has_fp32_precision() -> bool:
    return hasattr(torch.backends.cudnn, "conv")


def set_float32_math(precision: str) -> None:
    """Let float32 convolutions use tf32 tensor cores for precision "tf32" alone; search for the best ones."""
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if _has_fp32_precision():
        # cudnn.rnn too: the older interface stands for both, and refuses to be read where they differ.
        cudnn: Any = torch.backends.cudnn  # conv and rnn are made while running
        for library in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
            library.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.benchmark = True


def float32_convolutions_use_tf32() -> bool:
    """What this process has set for float32 convolutions on a GPU, through whichever interface."""
    if _has_fp32_precision():
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return torch.backends.cudnn.allow_tf32

"""What kernels are written with: ``triton``, ``tl``, and the argument type that they share.

Where Triton is not installed, ``triton`` and ``tl`` are stand-ins with which kernels can be defined and never
called. Nothing here imports torch: see variants.py.
"""

import os
from typing import Any, NamedTuple

try:
    import triton
    import triton.language as tl
except ImportError:  # kernels become plain functions
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda decorated: decorated))
    tl = SimpleNamespace(constexpr=None, float32=None, float64=None)
    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""The kernels were defined for Triton's interpreter: they take CPU tensors and are never compiled.

Triton reads the variable when a kernel is defined, so it must be set before the first import.
"""


class ImagePointer(NamedTuple):
    """An image among a kernel's arguments.

    pointer: to the first pixel, or None where there is no such image. stride: elements from one pixel to the
    next, which is more than there are channels where the image is a slice of a wider buffer.
    """

    pointer: Any
    stride: Any

"""What it means that a kernel's result equals the fp64 reference."""

import torch
from torch import Tensor

# Half a unit in the last place of a 16-bit type; the interpreter cuts bf16 off where a GPU rounds, which
# makes it a whole one.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}

# Below the normal numbers of a type there is no relative accuracy.
ATOL = {torch.float64: 1e-300, torch.float32: 2e-38, torch.float16: 2.0**-25, torch.bfloat16: 2e-38}


def assert_stored(actual: Tensor, exact: Tensor, slack: float = 0.0) -> None:
    """``actual`` is ``exact`` (fp64) as its own type can hold it, give or take ``slack``."""
    kind = actual.dtype
    torch.testing.assert_close(actual.double().cpu(), exact.cpu(), rtol=RTOL[kind], atol=ATOL[kind] + slack)

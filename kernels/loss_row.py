"""What a step records of its losses: one row of a ring buffer, in one launch."""

from typing import NamedTuple

from torch import Tensor

from fastpix2pix.kernels import reference
from fastpix2pix.kernels.launch import launch, use_triton
from fastpix2pix.kernels.loss_row_kernels import loss_row_write


class LossTerms(NamedTuple):
    """Scalars of a step, on its device: the generator's two terms, the discriminator's loss and its two."""

    gen_gan: Tensor
    gen_l1: Tensor
    disc: Tensor
    disc_real: Tensor
    disc_fake: Tensor


def write_loss_row(rows: Tensor, written: Tensor, terms: LossTerms, lambda_l1: Tensor) -> None:
    """``reference.write_loss_row``, in one launch on a GPU."""
    if not use_triton(rows):
        reference.write_loss_row(rows, written, terms, lambda_l1)
        return
    launch(
        loss_row_write,
        (1,),
        rows,
        written,
        tuple(terms),
        lambda_l1,
        len(rows),
        num_warps=1,
        reads=(written, *terms, lambda_l1),
        writes=(rows, written),
    )

"""Triton kernel of ``loss_row``, in one program.

Arguments:

* rows: pointer to (capacity, 1 + terms) float32. written: pointer to an int64 scalar, the rows so far.
* terms: tuple of pointers to scalars, the fields of a ``loss_row.LossTerms``. lambda_l1: pointer to a scalar.
"""

from fastpix2pix.kernels.language import tl, triton


@triton.jit(do_not_specialize=("capacity",))
def loss_row_write(rows, written, terms, lambda_l1, capacity):
    """Reads written, terms and lambda_l1; writes one row of rows, and counts written up."""
    count = tl.load(written)
    row = rows + count % capacity * (len(terms) + 1)
    tl.store(row, tl.load(terms[0]) + tl.load(lambda_l1) * tl.load(terms[1]))
    for i in tl.static_range(len(terms)):
        tl.store(row + 1 + i, tl.load(terms[i]))
    tl.store(written, count + 1)

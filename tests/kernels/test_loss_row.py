"""loss_row: the kernel against the reference, and both against arithmetic by hand."""

import pytest
import torch
from address_recorder import recorded

from fastpix2pix.kernels import loss_row, reference
from fastpix2pix.kernels.loss_row import LossTerms


def terms_of(dtype: torch.dtype, device: str) -> LossTerms:
    """Scalars of one tensor, as gan_loss makes them, and one by itself."""
    disc, gen, real, fake = torch.tensor([1.5, 0.25, 0.75, 0.6875], dtype=dtype, device=device).unbind()
    return LossTerms(gen, torch.tensor(0.3, dtype=dtype, device=device), disc, real, fake)


@pytest.mark.parametrize("ops", [loss_row, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_go_round(triton_device, ops, dtype):
    device = triton_device if ops is loss_row else "cpu"
    terms, lambda_l1 = terms_of(dtype, device), torch.tensor(100.0, dtype=dtype, device=device)
    total = torch.tensor(0.25, dtype=dtype) + torch.tensor(100.0, dtype=dtype) * terms.gen_l1.cpu()
    expected = [total.float().item(), 0.25, torch.tensor(0.3).item(), 1.5, 0.75, 0.6875]
    written = torch.tensor([2**33 + 1], device=device)  # 2**33 is 2 modulo 3
    for place in (0, 1, 2, 0):
        rows = torch.zeros((3, 6), device=device)
        ops.write_loss_row(rows, written, terms, lambda_l1)
        assert rows[place].tolist() == expected
        assert rows.count_nonzero() == 6
    assert written.item() == 2**33 + 5


def test_the_kernel_touches_what_it_declares(triton_device):
    rows, written = torch.zeros((7, 6), device=triton_device), torch.zeros(1, dtype=int, device=triton_device)
    lambda_l1 = torch.tensor(100.0, device=triton_device)
    with recorded() as recording:
        loss_row.write_loss_row(rows, written, terms_of(torch.float32, triton_device), lambda_l1)
    assert recording.launches == {"loss_row_write": 1}
    assert not recording.findings, list(map(str, recording.findings))

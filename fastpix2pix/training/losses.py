"""The losses of a step, and the device's record of those of the last steps."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpix2pix.kernels.loss_row import LossTerms, write_loss_row


class Losses(NamedTuple):
    """Scalar tensors on the training device; it is reading a value that waits for the step.

    The first four are the TensorFlow tutorial's. disc_real_loss and disc_fake_loss are the discriminator's
    two terms before the preset's factor: log 2 = 0.69 each where it can't tell real from fake.
    """

    gen_total_loss: Tensor
    gen_gan_loss: Tensor
    gen_l1_loss: Tensor
    disc_loss: Tensor
    disc_real_loss: Tensor
    disc_fake_loss: Tensor


class LossRing:
    """The losses of the last ``capacity`` steps, on the training device, so that no step waits for the host.

    ``write`` is part of the step's body; it finds its row by a counter on the device.
    """

    def __init__(self, capacity: int, device: torch.device):
        self.rows = torch.zeros(capacity, len(Losses._fields), device=device)
        self.written = torch.zeros(1, dtype=torch.int64, device=device)

    def write(self, terms: LossTerms, lambda_l1: Tensor) -> None:
        write_loss_row(self.rows, self.written, terms, lambda_l1)

    def row(self, step: int) -> Losses:
        """The losses of the step numbered ``step`` from 0, as views of the ring."""
        return Losses(*self.rows[step % len(self.rows)].unbind())

    def last(self, count: int, done: int) -> Tensor:
        """(count, 6) float32, oldest first: the newest ``count`` steps, when ``done`` have been written.

        By slices: indexing with a list of numbers would copy them to the device and wait for it.
        """
        capacity = len(self.rows)
        first, end = (done - count) % capacity, done % capacity
        if count and first >= end:
            return torch.cat((self.rows[first:], self.rows[:end]))
        return self.rows[first:end].clone()

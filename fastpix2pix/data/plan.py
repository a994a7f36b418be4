"""Every random decision of an epoch, as data: the order of the pairs, their crops and their flips."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """One epoch's decisions; entry ``i`` of each array belongs to the ``i``-th sample of the epoch."""

    order: np.ndarray  # int64 (count,): which pair
    top: np.ndarray  # int64 (count,): first row of the crop, 0 ... load_size - crop_size
    left: np.ndarray  # int64 (count,): first column of the crop, 0 ... load_size - crop_size
    mirror: np.ndarray  # bool (count,): flipped left to right after the crop, p = 0.5


class Chunk(NamedTuple):
    """The plan of samples that are decoded together: those of one rank in consecutive batches of an epoch."""

    epoch: int
    batches: tuple["GlobalBatch", ...]
    which: np.ndarray  # int64 (n,): indices of the pairs; these four as in Plan
    top: np.ndarray
    left: np.ndarray
    mirror: np.ndarray


class GlobalBatch(NamedTuple):
    """What all ranks take in one step: consecutive samples of an epoch, as many each."""

    start: int  # the first sample's position in the epoch
    share: int  # samples of each rank
    end: int  # the position after it: that of the next batch, or the epoch's length after its last one

    def of(self, rank: int) -> range:
        """The positions of ``rank``'s samples."""
        return range(self.start + rank * self.share, self.start + (rank + 1) * self.share)


def global_batches(count: int, position: int, batch_size: int, ranks: int) -> Iterator[GlobalBatch]:
    """The batches of an epoch of ``count`` samples from ``position`` on, ``batch_size`` for each rank.

    The last one is smaller where that does not divide the rest, and the fewer than ``ranks`` samples that are
    left then are not taken: every rank makes the same steps on as many images.
    """
    while count - position >= ranks:
        share = min(batch_size, (count - position) // ranks)
        after = position + ranks * share
        yield GlobalBatch(position, share, after if count - after >= ranks else count)
        position = after


def epoch_plan(
    seed: int,
    epoch: int,
    count: int,
    *,
    load_size: int,
    crop_size: int,
    flip: bool = True,
    shuffle: bool = True,
) -> Plan:
    """The decisions of ``epoch`` for ``count`` pairs: a pure function of its arguments.

    It is the tutorial's ``random_jitter`` (offsets uniform over both ends, mirror with p = 0.5) written
    down before any pixel is read, so every loader that obeys it sees the same samples and a run resumes
    from (epoch, position) alone. Switching ``flip`` or ``shuffle`` off changes none of the other
    decisions.
    """
    # Raw words of a bit generator are the same in every release of numpy; Generator's methods need not be.
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw((4, count))
    offsets = np.uint64(load_size - crop_size + 1)
    return Plan(
        order=np.argsort(words[0], kind="stable") if shuffle else np.arange(count),
        top=(words[1] % offsets).astype(np.int64),
        left=(words[2] % offsets).astype(np.int64),
        mirror=(words[3] >> np.uint64(63)).astype(bool) & flip,
    )

"""Every random decision of an epoch, as data: the order of the pairs, their crops and their flips."""

from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """One epoch's decisions; entry ``i`` of each array belongs to the ``i``-th sample of the epoch."""

    order: np.ndarray  # int64 (count,): which pair
    top: np.ndarray  # int64 (count,): first row of the crop, 0 ... load_size - crop_size
    left: np.ndarray  # int64 (count,): first column of the crop, 0 ... load_size - crop_size
    mirror: np.ndarray  # bool (count,): flipped left to right after the crop, p = 0.5


class Chunk(NamedTuple):
    """The plan of consecutive samples of one epoch that are decoded together."""

    epoch: int
    start: int  # the first sample's position in the epoch
    which: np.ndarray  # int64 (n,): indices of the pairs; these four as in Plan
    top: np.ndarray
    left: np.ndarray
    mirror: np.ndarray


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

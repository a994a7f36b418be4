"""The plan of an epoch: statistics, reproducibility, and that it stays what it is."""

import numpy as np
import pytest

from fastpix2pix.data.plan import epoch_plan

SIZES = {"load_size": 286, "crop_size": 256}


def test_every_pair_once_and_every_offset_with_both_ends():
    plan = epoch_plan(0, 0, 20000, **SIZES)
    assert np.array_equal(np.sort(plan.order), np.arange(20000))
    for offsets in (plan.top, plan.left):
        # 31 offsets, 645 expected each: six standard deviations are 150
        counts = np.bincount(offsets, minlength=31)
        assert len(counts) == 31 and abs(counts - 20000 / 31).max() < 150
    assert abs(plan.mirror.mean() - 0.5) < 6 * 0.5 / 20000**0.5


def test_decisions_are_independent_of_each_other():
    plan = epoch_plan(1, 2, 20000, **SIZES)
    correlations = np.corrcoef(np.stack([d.astype(float) for d in plan]))
    assert abs(correlations - np.eye(4)).max() < 6 / 20000**0.5


def test_seed_and_epoch_choose_the_decisions():
    plans = {(s, e): epoch_plan(s, e, 400, **SIZES) for s in (0, 1) for e in (0, 1)}
    again = epoch_plan(1, 0, 400, **SIZES)
    assert all(np.array_equal(a, b) for a, b in zip(again, plans[1, 0], strict=True))
    for key, plan in plans.items():
        for other_key, other in plans.items():
            if key != other_key:
                assert all(not np.array_equal(a, b) for a, b in zip(plan, other, strict=True))


def test_a_switch_changes_its_own_decision_only():
    plan = epoch_plan(3, 4, 100, **SIZES)
    fixed = epoch_plan(3, 4, 100, **SIZES, flip=False, shuffle=False)
    assert not fixed.mirror.any() and np.array_equal(fixed.order, np.arange(100))
    assert np.array_equal(fixed.top, plan.top) and np.array_equal(fixed.left, plan.left)


def test_no_room_means_no_offset():
    plan = epoch_plan(0, 0, 50, load_size=256, crop_size=256)
    assert not plan.top.any() and not plan.left.any()


@pytest.mark.parametrize(
    "seed, epoch, first",
    [
        (
            0,
            0,
            [
                [3, 2, 1, 0, 4, 5],
                [17, 16, 4, 27, 18, 26],
                [21, 15, 5, 5, 2, 6],
                [False, False, False, False, True, True],
            ],
        ),
        (
            7,
            199,
            [
                [4, 2, 0, 3, 1, 5],
                [18, 20, 16, 26, 7, 12],
                [4, 8, 8, 25, 18, 7],
                [True, False, False, True, False, False],
            ],
        ),
    ],
)
def test_decisions_never_change_between_versions(seed, epoch, first):
    """A resumed run must meet the samples that the run before it planned."""
    plan = epoch_plan(seed, epoch, 6, **SIZES)
    assert [d.tolist() for d in plan] == first

"""Held-out scores: their intervals, and the rise from one to another."""

from __future__ import annotations

import numpy as np
import pytest

from esfast.held_out import HeldOut, rise, wilson
from esfast.tasks import Score


def held_out(values, solved=None) -> HeldOut:
    marks = solved or [None] * len(values)
    scores = tuple(Score(v, solved=s) for v, s in zip(values, marks, strict=True))
    return HeldOut(0, scores, tuple("" for _ in values))


def test_the_interval_is_the_textbooks():
    values = [0.0, 1.0, 1.0, 0.5]
    mean, half = 0.625, 1.959964 * np.std(values, ddof=1) / 2
    assert held_out(values).interval == pytest.approx((mean - half, mean + half))
    assert held_out([0.3]).interval == (0.3, 0.3)
    assert held_out([0.0, 1.0], [False, True]).solved == 0.5
    assert held_out([0.0, 1.0]).solved is None


def test_scores_that_are_all_wrong_or_right_have_the_interval_of_a_share():
    assert held_out([0.0] * 8).interval == wilson(0.0, 8)
    assert held_out([1.0] * 96).interval[0] < 0.97
    assert held_out([1.0, 0.0, 1.0]).interval == wilson(2 / 3, 3)


def test_wilsons_interval_keeps_to_shares_and_has_width():
    # Newcombe (1998), Stat. Med. 17: 81 of 263 and 0 of 20
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    for count in range(1, 2001):
        assert wilson(1.0, count)[1] == 1.0 and wilson(0.0, count)[0] == 0.0, count


def test_the_rise_is_paired():
    before, after = held_out([0.0, 0.5, 1.0]), held_out([0.1, 0.6, 1.1])
    assert rise(before, after)[0] == pytest.approx(0.1)
    assert rise(before, after)[1] > 1e6  # every prompt rose alike
    assert rise(before, before) == (0.0, 0.0)
    apart = held_out([1.0, 0.5, 1.0])
    assert rise(before, apart) == pytest.approx((1 / 3, 1.0))

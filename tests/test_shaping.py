"""Fitness shaping against its formulas, ties, equal rewards and NaN."""

from __future__ import annotations

import numpy as np
import pytest

from esfast import EsfastError
from esfast.shaping import METHODS, centered_rank, group_centered, rank, raw, shape, z_score

REWARDS = np.array([0.5, -1.0, 3.0, 0.5, 2.0, 0.5, -1.0])


def average_ranks(x: np.ndarray) -> np.ndarray:
    """0-based ranks, ties averaged, by counting."""
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def test_rank() -> None:
    got = rank(REWARDS)
    r = average_ranks(REWARDS)
    want = (r - r.mean()) / r.std()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert got.mean() == pytest.approx(0, abs=1e-15) and got.std() == pytest.approx(1, abs=1e-12)


def test_z_score() -> None:
    want = (REWARDS - REWARDS.mean()) / (REWARDS.std() + 1e-8)
    np.testing.assert_allclose(z_score(REWARDS), want, rtol=1e-14)


def test_centered_rank() -> None:
    want = average_ranks(REWARDS) / (len(REWARDS) - 1) - 0.5
    np.testing.assert_allclose(centered_rank(REWARDS), want, rtol=1e-14, atol=1e-16)
    ends = centered_rank(np.array([3.0, 1.0, 2.0]))
    assert list(ends) == [0.5, -0.5, 0.0]


def test_raw() -> None:
    assert np.array_equal(raw(REWARDS), REWARDS)


def test_group_centered_forgets_how_hard_a_prompt_is() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.random((6, 5))
    got = group_centered(rewards)
    assert got.shape == (6,)
    shifted = group_centered(rewards + np.array([0.0, 100.0, -3.0, 7.0, 0.5]))
    np.testing.assert_allclose(got, shifted, atol=1e-12)
    scores = ((rewards - rewards.mean(axis=0)) / rewards.std(axis=0)).mean(axis=1)
    np.testing.assert_allclose(got, scores / scores.std(), rtol=1e-6, atol=1e-12)
    assert got.mean() == pytest.approx(0, abs=1e-12)


def test_a_prompt_on_which_all_agree_says_nothing() -> None:
    rewards = np.random.default_rng(1).random((6, 4))
    rewards[:, 2] = 0.1
    moved = rewards.copy()
    moved[:, 2] = 0.7
    np.testing.assert_allclose(group_centered(rewards), group_centered(moved), atol=1e-14)


@pytest.mark.parametrize("size", range(2, 40))
def test_members_whose_prompts_add_up_alike_are_equal(size: int) -> None:
    """Each solves another prompt, or the same number of them: rounding alone tells them apart."""
    rng = np.random.default_rng(size)
    assert not group_centered(np.eye(size)).any()
    rows = np.array([np.roll([0.0, 0.1, 0.3, 1e6], k % 4) for k in range(4 * size)])
    assert not group_centered(rows[rng.permutation(4 * size)]).any()
    one_better = np.eye(size)
    one_better[0, -1] = 0.5
    assert np.argmax(group_centered(one_better)) == 0


@pytest.mark.parametrize("prompts", [2, 5, 64])
def test_what_counts_as_rounding_of_a_sum(prompts: int) -> None:
    """A deviation of up to 2^-40 a prompt; the half of it and twice as much, here."""
    for share in (0.5, 2.0):
        column = np.array([-1.0, 0.0, 1.0])
        rewards = np.stack([column, -column] * (prompts // 2) + [np.zeros(3)] * (prompts % 2), 1)
        rewards[1, 0] += share * 2.0**-40 * prompts * 1.5
        scores = (rewards - rewards.mean(0)) / np.where(rewards.std(0) == 0, 1, rewards.std(0))
        assert scores.sum(1).std() / prompts == pytest.approx(share * 2.0**-40, rel=0.2)
        assert group_centered(rewards).any() == (share > 1)


@pytest.mark.parametrize("power", [-1060, -900, -300, 300, 900, 1015])
def test_the_scale_of_rewards_does_not_matter(power: int) -> None:
    """Whatever their squares would overflow to; a power of two rounds nothing."""
    rewards = np.random.default_rng(5).integers(-9, 10, (8, 3)).astype(float)
    scaled = np.ldexp(rewards, power)
    assert np.isfinite(scaled).all()
    assert np.array_equal(group_centered(scaled), group_centered(rewards))
    assert np.array_equal(rank(scaled[:, 0]), rank(rewards[:, 0]))
    if power > 0:  # below, the 1e-8 of the formula decides
        want = (rewards[:, 0] - rewards[:, 0].mean()) / rewards[:, 0].std()
        np.testing.assert_allclose(z_score(scaled[:, 0]), want, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e300, 5e-324])
@pytest.mark.parametrize("size", [1, 2, 3, 30, 97])
def test_equal_rewards_give_exact_zeros(method: str, value: float, size: int) -> None:
    rewards = np.full(size, value)
    if method == "group_centered":
        rewards = np.tile(rewards[:, None], 7)
    got = shape(rewards, method)
    assert got.shape == (size,) and not got.any()


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_and_equivariant(method: str) -> None:
    """The same rewards give the same bits, and a permutation of members permutes the fitness."""
    rng = np.random.default_rng(3)
    rewards = rng.integers(0, 5, (24, 6)) / 7
    if method != "group_centered":
        rewards = rewards.mean(axis=1)
    order = rng.permutation(24)
    once, again = shape(rewards, method), shape(rewards, method)
    assert np.array_equal(once, again)
    permuted = shape(rewards[order], method)
    if method in ("rank", "centered_rank", "raw"):
        assert np.array_equal(permuted, once[order])
    np.testing.assert_allclose(permuted, once[order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_better_is_never_worse(method: str) -> None:
    rewards = np.random.default_rng(4).random(40).round(1)
    given = rewards[:, None] if method == "group_centered" else rewards
    got = shape(given, method)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(got[order]) >= 0).all()
    ties = np.diff(rewards[order]) == 0
    assert (np.abs(np.diff(got[order])[ties]) < 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
def test_nan_raises_by_default(method: str) -> None:
    rewards = np.array([[0.0], [float("nan")], [1.0]])
    with pytest.raises(EsfastError, match=r"(?i)nan"):
        shape(rewards if method == "group_centered" else rewards[:, 0], method)


@pytest.mark.parametrize("method", METHODS)
def test_nan_may_count_as_the_worst(method: str) -> None:
    rewards = np.array([[0.3], [float("nan")], [1.0], [-2.0]])
    got = shape(rewards if method == "group_centered" else rewards[:, 0], method, nan="worst")
    assert np.isfinite(got).all()
    assert got[1] == got.min()
    assert got[2] == got.max()


@pytest.mark.parametrize("method", METHODS)
def test_all_nan_is_all_equal_or_refused(method: str) -> None:
    rewards = np.full((3, 1), np.nan)
    given = rewards if method == "group_centered" else rewards[:, 0]
    try:
        got = shape(given, method, nan="worst")
    except EsfastError:
        return
    assert not got.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 1e308])
def test_huge_rewards_never_become_nan(method: str, value: float) -> None:
    rewards = np.array([[0.0], [value], [1.0], [-value]])
    given = rewards if method == "group_centered" else rewards[:, 0]
    try:
        got = shape(given, method)
    except EsfastError:
        return
    assert not np.isnan(got).any()


def test_bad_arguments_are_refused() -> None:
    for rewards, method, said in (
        (REWARDS, "best", "shaping 'best' is unknown"),
        (REWARDS.reshape(7, 1), "rank", r"shape \(7, 1\); expected one reward a member"),
        (np.array([]), "rank", r"shape \(0,\); expected one reward a member"),
        (REWARDS, "group_centered", r"shape \(7,\); expected a \[population, prompts\] matrix"),
    ):
        with pytest.raises(EsfastError, match=said):
            shape(rewards, method)
    with pytest.raises(EsfastError, match="nan='ignore' is unknown"):
        shape(REWARDS, "rank", nan="ignore")


def test_lists_and_float32_are_taken() -> None:
    assert np.array_equal(shape([1.0, 2.0, 4.0], "rank"), rank(np.array([1, 2, 4], np.float32)))


@pytest.mark.parametrize("method", METHODS)
def test_a_refusal_names_rank_only_where_it_would_help(method: str) -> None:
    """It orders infinities, and takes no NaN either."""
    rewards = np.array([[1.0], [float("nan")]])
    with pytest.raises(EsfastError) as refused:
        shape(rewards if method == "group_centered" else rewards[:, 0], method)
    assert ("use 'rank'" in str(refused.value)) == (method not in ("rank", "centered_rank"))

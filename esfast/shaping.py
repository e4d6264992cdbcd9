"""Rewards to fitness: what a member's reward weighs in the update. float64, in the core.

rank            centred ranks, ties averaged, scaled to unit variance (the default: alpha means the
                same as with z-scores, and one outlier cannot take over a generation)
z_score         (r - mean) / (std + 1e-8), ddof 0 (Qiu et al., arXiv 2509.24372)
centered_rank   ranks scaled to [-0.5, 0.5], ties averaged (Salimans et al., arXiv 1703.03864)
raw             the rewards themselves
group_centered  a [population, prompts] matrix: per prompt (r - mean) / std over the population,
                then the mean over prompts, scaled to unit variance

Rewards that are all equal give zeros with every method, and so do sums over prompts that differ by
their rounding alone. Magnitudes do not matter: the squares of 1e200 do not overflow. NaN:
`nan="raise"` refuses them, and `nan="worst"` gives them the lowest finite reward (of their prompt),
the declared cost of a failure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from esfast import _core
from esfast.errors import ConfigError, DataError, require_one_of

METHODS = ("rank", "z_score", "centered_rank", "raw", "group_centered")


def _worst_for_nan(values: np.ndarray) -> np.ndarray:
    filled = values.copy()
    for column in filled.reshape(len(filled), -1).T:
        finite = column[np.isfinite(column)]
        column[np.isnan(column)] = finite.min() if finite.size else 0.0
    return filled


def as_rewards(rewards: ArrayLike) -> np.ndarray:
    """The rewards as float64, masked ones NaN. DataError where they are no regular array of
    numbers."""
    try:
        if isinstance(rewards, np.ma.MaskedArray):
            rewards = np.ma.filled(rewards.astype(np.float64), np.nan)
        given = np.asarray(rewards)
        if given.dtype.kind not in "biufO":
            raise TypeError(f"numpy calls them {given.dtype}")
        return np.array(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # torch's is the last
        raise DataError(
            f"the rewards are not numbers ({error}); give one a member, a float as reward.item() "
            "of a tensor is, or a matrix of them."
        ) from error


def _checked(rewards: ArrayLike, method: str, nan: str) -> np.ndarray:
    if nan not in ("raise", "worst"):
        raise ConfigError(f"nan={nan!r} is unknown; choose 'raise' or 'worst'.")
    values = as_rewards(rewards)
    dimensions = 2 if method == "group_centered" else 1
    if values.ndim != dimensions or values.size == 0:
        expected = "a [population, prompts] matrix" if dimensions == 2 else "one reward a member"
        raise DataError(f"{method} got rewards of shape {values.shape}; expected {expected}.")
    if nan == "worst":
        values = _worst_for_nan(values)
    unusable = np.isnan(values) if "rank" in method else ~np.isfinite(values)
    if unusable.any():
        first = tuple(int(i) for i in np.argwhere(unusable)[0])
        ordered = "" if "rank" in method else " (or use 'rank', which orders infinities)"
        raise DataError(
            f"{int(unusable.sum())} of {values.size} rewards cannot be used by {method}: the first "
            f"is {values[first]} at {list(first)}. Return a finite reward{ordered}, or pass "
            "nan='worst' to give NaN the lowest finite one."
        )
    return values


def shape(rewards: ArrayLike, method: str = "rank", nan: str = "raise") -> np.ndarray:
    """Fitness of each member, float64 [population], from rewards by the named method.

    rewards: [population], or [population, prompts] for "group_centered". Errors: ConfigError for an
    unknown method, DataError for a wrong shape or unusable rewards.
    """
    require_one_of("shaping", method, METHODS)
    return np.asarray(getattr(_core, method)(_checked(rewards, method, nan)))


def rank(rewards: ArrayLike, nan: str = "raise") -> np.ndarray:
    """Centred ranks, ties averaged, unit variance. float64 [population] in and out."""
    return shape(rewards, "rank", nan)


def z_score(rewards: ArrayLike, nan: str = "raise") -> np.ndarray:
    """(r - mean) / (std + 1e-8) with ddof 0. float64 [population] in and out."""
    return shape(rewards, "z_score", nan)


def centered_rank(rewards: ArrayLike, nan: str = "raise") -> np.ndarray:
    """Ranks from -0.5 to 0.5, ties averaged. float64 [population] in and out."""
    return shape(rewards, "centered_rank", nan)


def raw(rewards: ArrayLike, nan: str = "raise") -> np.ndarray:
    """The rewards (zeros where all are equal). float64 [population] in and out."""
    return shape(rewards, "raw", nan)


def group_centered(rewards: ArrayLike, nan: str = "raise") -> np.ndarray:
    """Standardised per prompt, averaged over prompts: [population, prompts] -> [population]."""
    return shape(rewards, "group_centered", nan)

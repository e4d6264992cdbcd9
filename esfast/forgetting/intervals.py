"""95 % intervals of means and ratios over prompts (Student's t, ratios linearised).

    mean of x_i         m +- t * s / sqrt(n)
    ratio sum x / sum w r +- t * s_e / sqrt(n),  e_i = (x_i - r w_i) / mean(w)

A prompt is the unit that is drawn, so samples and tokens of one prompt count together. The ratio's
linearisation is the usual one of survey sampling (Cochran, Sampling Techniques, 1977, chapter 2).
Not promised: their coverage for a handful of prompts of very uneven divergence; and they speak of
prompts like these, not of another run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from esfast.errors import ConfigError

_T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_Z = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def record(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def text(self) -> str:
        """ "0.0123 [0.0098, 0.0148]"."""
        return f"{self.value:.4g} [{self.low:.3g}, {self.high:.3g}]"


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of one value a prompt; ConfigError for fewer than two prompts."""
    return ratio_of(values, np.ones(len(values)))


def ratio_of(values: np.ndarray, weights: np.ndarray) -> Estimate:
    """sum(values) / sum(weights), one of each a prompt; ConfigError for fewer than two prompts."""
    count = len(values)
    if count < 2:
        raise ConfigError(f"{count} prompt has no spread to make an interval of; give 2 or more.")
    ratio = float(values.sum() / weights.sum())
    errors = (values - ratio * weights) / weights.mean()
    half = t95(count - 1) * math.sqrt(float(errors @ errors) / (count - 1) / count)
    return Estimate(ratio, ratio - half, ratio + half)


def t95(freedom: int) -> float:
    """The 97.5 % point of Student's t, to 0.01 %: tabled up to 10 degrees of freedom, then the
    expansion in 1 / freedom (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z, n = _Z, freedom
    first = (z**3 + z) / (4 * n)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + first + second + third

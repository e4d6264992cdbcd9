"""What the held-out prompts scored, and whether it rose: means with 95 % intervals.

    mean +- 1.96 * s / sqrt(n)            s: sample deviation of the prompts' scores
    shares, and scores that are all 0 or 1: Wilson's interval, which keeps to [0, 1] and has width
    where all or none are right
    rise in standard errors: mean(d) / (s_d / sqrt(n)), d = after - before, prompt by prompt

The interval speaks of prompts like these, not of another run's noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from esfast.tasks.base import Example, Score

Z95 = 1.959964


@dataclass(frozen=True)
class HeldOut:
    """Scores of the held-out prompts at one generation, in the order of the prompts."""

    generation: int
    scores: tuple[Score, ...]
    completions: tuple[str, ...]

    @cached_property
    def values(self) -> np.ndarray:
        """float64 [prompts]."""
        return np.array([score.value for score in self.scores], dtype=np.float64)

    @property
    def mean(self) -> float:
        """The held-out score."""
        return float(self.values.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean."""
        return interval_of_mean(self.values)

    @property
    def solved(self) -> float | None:
        """The share of prompts answered rightly by the strictest reading; None if not said."""
        marks = [score.solved for score in self.scores if score.solved is not None]
        return sum(marks) / len(self.scores) if marks else None

    @property
    def solved_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of `solved`."""
        return None if self.solved is None else wilson(self.solved, len(self.scores))

    @property
    def failed(self) -> int:
        """Answers that could not be scored and have the failure reward."""
        return sum(score.failed for score in self.scores)

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "generation": self.generation,
            "prompts": len(self.scores),
            "score": self.mean,
            "score_95": list(self.interval),
            "solved": self.solved,
            "solved_95": None if self.solved_interval is None else list(self.solved_interval),
            "failed_rewards": self.failed,
        }

    def text(self) -> str:
        """ "0.834 [0.790, 0.878]"."""
        low, high = self.interval
        return f"{self.mean:.3f} [{low:.3f}, {high:.3f}]"


def rise(before: HeldOut, after: HeldOut) -> tuple[float, float]:
    """(mean difference, the same in standard errors of the paired difference)."""
    difference = after.values - before.values
    mean = float(difference.mean())
    error = standard_error(difference)
    if error == 0.0:
        return mean, math.copysign(math.inf, mean) if mean else 0.0
    return mean, mean / error


def samples(
    examples: Sequence[Example], before: HeldOut | None, after: HeldOut | None
) -> list[dict[str, Any]]:
    """The answers to the first of the held-out prompts, before and after, with their scores."""
    shown: list[dict[str, Any]] = []
    for index, example in enumerate(examples):
        sample: dict[str, Any] = {"prompt": example.prompt}
        for when, held_out in (("before", before), ("after", after)):
            if held_out is not None:
                answer, score = held_out.completions[index], held_out.scores[index].value
                generation = held_out.generation
                sample[when] = {"answer": answer, "score": score, "generation": generation}
        shown.append(sample)
    return shown


def interval_of_mean(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of one value a prompt; of no width for a single prompt, unless its
    value is 0 or 1."""
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(mean, len(values))
    half = Z95 * standard_error(values)
    return mean - half, mean + half


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` trials."""
    z2 = Z95 * Z95 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    # 128 of 128 gives an upper limit of 1 - 1e-16: rounding must not leave the share out.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0

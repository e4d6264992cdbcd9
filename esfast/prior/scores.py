"""What a prior task scored at one generation, and what came of it over a run.

    score +- 1.96 s / sqrt(n)      over the n prompts; Wilson's interval where all are 0 or 1
    sampled score                  a prompt's mean over its K samples first, then as above: samples
                                   of one prompt are not independent, and n stays the prompts'
    change = final - before, dip = worst - before, recovery = final - worst

Intervals of differences are paired, prompt by prompt; they have width 0 where no prompt's value
differs. "Before" is generation 0, and so is "worst" where a score never fell. The worst of many
noisy evaluations lies lower than the truth: its interval speaks of one evaluation, not of having
been picked. Where a lower value is better (perplexity), worst is the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esfast.held_out import Z95, interval_of_mean, standard_error

KINDS = ("greedy", "sampled")


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval.

    values: of each prompt, in the order of the prompts; empty where the metric is of all prompts
    together. samples and temperature: how the answers were drawn; 1 and 0 for greedy ones.
    """

    score: float
    low: float
    high: float
    values: tuple[float, ...] = ()
    samples: int = 1
    temperature: float = 0.0

    @classmethod
    def of(
        cls, values: Sequence[float] | np.ndarray, samples: int = 1, temperature: float = 0.0
    ) -> Estimate:
        """From one value a prompt (its mean over the samples), kept to six digits: what is computed
        of them is the same in a run that goes on, which has them from its file."""
        array = np.asarray(values, dtype=np.float64)
        mean = float(array.mean())
        low, high = interval_of_mean(array)
        kept = tuple(round(float(value), 6) for value in array)
        return cls(mean, low, high, kept, samples, temperature)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Estimate:
        """The inverse of `record`."""
        low, high = record["score_95"]
        kept = tuple(record["values"])
        return cls(record["score"], low, high, kept, record["samples"], record["temperature"])

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "score": self.score,
            "score_95": [self.low, self.high],
            "samples": self.samples,
            "temperature": self.temperature,
            "values": list(self.values),
        }

    def text(self) -> str:
        """ "0.734 [0.615, 0.827]"."""
        return f"{self.score:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class PriorScore:
    """One task at one generation.

    source: the name that the task was asked for by, which may stand for several tasks; metric: what
    the score is; sampled: None where the task has no answers to sample, or none were asked for;
    failed: answers whose scoring failed; seconds: of the evaluation. read_tokens and
    generated_tokens: of all prompts and answers, greedy and sampled; None where the engine did not
    say, and in the files of an earlier esfast; 0 where another run measured.
    """

    generation: int
    task: str
    source: str
    metric: str
    prompts: int
    greedy: Estimate
    sampled: Estimate | None = None
    higher_is_better: bool = True
    failed: int = 0
    seconds: float = 0.0
    read_tokens: int | None = None
    generated_tokens: int | None = None

    def record(self) -> dict[str, Any]:
        """A line of prior.jsonl."""
        return {
            **{name: value for name, value in vars(self).items() if name not in KINDS},
            "greedy": self.greedy.record(),
            "sampled": None if self.sampled is None else self.sampled.record(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PriorScore:
        """The inverse of `record`. Raises KeyError, TypeError or ValueError for another line."""
        sampled = record["sampled"]
        estimates = {
            "greedy": Estimate.from_record(record["greedy"]),
            "sampled": None if sampled is None else Estimate.from_record(sampled),
        }
        return cls(**{**record, **estimates})


def outcome(scores: Sequence[PriorScore]) -> dict[str, Any]:
    """What came of one task, as summary.json has it: a part a kind of answer ("greedy", "sampled").

    scores: of one task, at one generation or more.
    """
    ordered = sorted(scores, key=lambda score: score.generation)
    last = ordered[-1]
    out: dict[str, Any] = {
        "task": last.task,
        "metric": last.metric,
        "prompts": last.prompts,
        "higher_is_better": last.higher_is_better,
        "evaluations": len(ordered),
        "failed": sum(score.failed for score in ordered),
    }
    for kind in KINDS:
        points = [(s.generation, getattr(s, kind)) for s in ordered if getattr(s, kind) is not None]
        out[kind] = _outcome(points, last.higher_is_better) if points else None
    return out


def _outcome(points: list[tuple[int, Estimate]], higher_is_better: bool) -> dict[str, Any]:
    (first, before), (at_end, final) = points[0], points[-1]
    sign = 1.0 if higher_is_better else -1.0
    worst_at, worst = min(points, key=lambda point: sign * point[1].score)
    return {
        "before": before.score,
        "before_95": [before.low, before.high],
        "before_generation": first,
        "worst": worst.score,
        "worst_95": [worst.low, worst.high],
        "worst_generation": worst_at,
        "final": final.score,
        "final_95": [final.low, final.high],
        "final_generation": at_end,
        "dip": worst.score - before.score,
        "dip_95": difference_interval(before, worst),
        "change": final.score - before.score,
        "change_95": difference_interval(before, final),
        "recovery": final.score - worst.score,
        "recovery_95": difference_interval(worst, final),
    }


def difference_interval(before: Estimate, after: Estimate) -> list[float] | None:
    """95 % interval of after - before, paired over the prompts; None without a value a prompt."""
    if not before.values or len(before.values) != len(after.values):
        return None
    difference = np.subtract(after.values, before.values)
    half = Z95 * standard_error(difference)
    mean = float(difference.mean())
    return [mean - half, mean + half]

"""What came of one task after another: scores by task and stage, transfer, forgetting.

    R[i][j]            score of task j after stage i; row 0 is the model before any training
    learned            R[s][j] - R[0][j]       s: the last stage that trained task j
    forward transfer   R[s-1][j] - R[0][j]     what the stages before its own did to it
    backward transfer  R[S][j] - R[s][j]       what the stages after it did (Lopez-Paz and Ranzato,
                                               arXiv 1706.08840), here task by task
    peak               the highest score at an evaluation of its own stage; curves are shown as
                       shares of it, where it is above 0
    forgetting         peak - R[S][j]          (after Chaudhry et al., arXiv 1801.10112)

All of it for greedy and, where they were drawn, for sampled answers; differences have paired 95 %
intervals (`esfast.prior.scores`). A peak is the highest of noisy evaluations and lies above the
truth; forgetting inherits that, backward transfer does not. Tasks of --prior-tasks belong to no
stage: they have scores, and a curve as a share of what they were before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esfast.continual.stages import Stage, scores_of
from esfast.prior.evaluation import label
from esfast.prior.scores import KINDS, Estimate, difference_interval


@dataclass(frozen=True)
class Point:
    """One evaluation of one task; `at` counts generations over all stages, `stage` is from 1."""

    at: int
    stage: int
    estimate: Estimate


def results(stages: Sequence[Stage]) -> dict[str, Any]:
    """The results of the stages that are there so far: a part a kind of answer, plain JSON."""
    return {kind: _of_kind(stages, kind) for kind in KINDS}


def _of_kind(stages: Sequence[Stage], kind: str) -> dict[str, Any] | None:
    points = points_of(stages, kind)
    if not points:
        return None
    own = {label(stage.source): stage for stage in stages}  # the last that trained a task
    return {
        "tasks": [_task(name, points[name], own.get(name), len(stages)) for name in points],
        "matrix": _matrix(points, stages),
    }


def points_of(stages: Sequence[Stage], kind: str) -> dict[str, list[Point]]:
    """Task -> its evaluations in order. A stage's generation 0 is the end of the one before, and
    counts once."""
    points: dict[str, list[Point]] = {}
    for stage in stages:
        for score in scores_of(stage):
            estimate: Estimate | None = getattr(score, kind)
            if estimate is not None and not (stage.number > 1 and score.generation == 0):
                point = Point(stage.begins + score.generation, stage.number, estimate)
                points.setdefault(score.task, []).append(point)
    return points


def _matrix(points: dict[str, list[Point]], stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """A row a finished stage, and one before them: the scores of every task with intervals."""
    rows = []
    for number in range(len(stages) + 1):
        ends = stages[number - 1].begins + stages[number - 1].generations if number else 0
        found = {name: _at(there, ends) for name, there in points.items()}
        scores = {
            name: {"score": e.score, "score_95": [e.low, e.high]} if e else None
            for name, e in found.items()
        }
        trained = label(stages[number - 1].source) if number else None
        rows.append({"after_stage": number, "trained": trained, "at": ends, "scores": scores})
    return rows


def _at(points: Sequence[Point], at: int) -> Estimate | None:
    return next((point.estimate for point in points if point.at == at), None)


def _task(name: str, points: list[Point], own: Stage | None, stages: int) -> dict[str, Any]:
    scale, peak_at = _scale(points, own)
    record: dict[str, Any] = {
        "task": name,
        "own_stage": own and own.number,
        "peak": scale,
        "peak_at": peak_at,
        "curve": [_curve_point(point, scale) for point in points],
    }
    if own is not None:
        record |= _transfer(points, own, scale)
    return record


def _scale(points: list[Point], own: Stage | None) -> tuple[float, int]:
    """What a curve is a share of: the own stage's peak, or what a prior task was before."""
    if own is None:
        return points[0].estimate.score, points[0].at
    inside = [point for point in points if own.begins <= point.at <= own.begins + own.generations]
    best = max(inside or points, key=lambda point: point.estimate.score)
    return best.estimate.score, best.at


def _curve_point(point: Point, scale: float) -> dict[str, Any]:
    one = point.estimate
    shares = [value / scale if scale > 0 else None for value in (one.score, one.low, one.high)]
    return {
        "at": point.at,
        "stage": point.stage,
        "score": one.score,
        "score_95": [one.low, one.high],
        "of_peak": shares[0],
        "of_peak_95": shares[1:],
    }


def _transfer(points: list[Point], own: Stage, peak: float) -> dict[str, Any]:
    first, last = points[0].estimate, points[-1].estimate
    start, end = _at(points, own.begins), _at(points, own.begins + own.generations)
    later = [point for point in points if point.at >= own.begins + own.generations]
    worst = min(later, key=lambda point: point.estimate.score, default=None)
    return {
        "learned": _difference(first, end),
        "forward_transfer": _difference(first, start),
        "backward_transfer": _difference(end, last),
        "forgetting": peak - last.score,
        "kept_of_peak": last.score / peak if peak > 0 else None,
        "worst_since": worst and worst.estimate.score,
        "worst_since_at": worst and worst.at,
    }


def _difference(before: Estimate | None, after: Estimate | None) -> dict[str, Any] | None:
    if before is None or after is None:
        return None
    return {
        "value": after.score - before.score,
        "value_95": difference_interval(before, after),
    }

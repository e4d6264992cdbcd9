"""What came of one task after another: scores by task and stage, transfer, forgetting.

    R[i][j]            score of task j after stage i; row 0 is the model before any training
    learned            R[s][j] - R[0][j]       s: the stage that trained task j
    forward transfer   R[s-1][j] - R[0][j]     what the stages before its own did to it
    backward transfer  R[e][j] - R[s][j]       what the stages after it did (Lopez-Paz and Ranzato,
                                               arXiv 1706.08840), here task by task; e: the last
    peak               the highest score at an evaluation of its own stage, after training began;
                       curves are shown as shares of it, where it is above 0
    forgetting         peak - R[e][j]          (after Chaudhry et al., arXiv 1801.10112)

What has no stages that it is of is None: forward transfer of the first task, backward transfer and
forgetting of one that nothing came after yet. A task that is trained twice has a result a training:
e of the first is the last stage before it is trained again, and the second learned R[s] - R[s-1]
and has no forward transfer, since its score there is what the first training left.

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
    tasks: list[dict[str, Any]] = []
    for name, there in points.items():
        own = [stage for stage in stages if label(stage.source) == name]
        tasks += [_training(name, there, own, n) for n in range(len(own))]
        tasks += [] if own else [_record(name, None, there, there[0])]
    return {"tasks": tasks, "matrix": _matrix(points, stages)}


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
        ends = _end(stages[number - 1]) if number else 0
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


def _training(name: str, points: list[Point], own: Sequence[Stage], number: int) -> dict[str, Any]:
    """One of a task's trainings; `own`: the stages of all of them."""
    stage = own[number]
    begins = stage.begins if number else 0
    until = own[number + 1].begins if number + 1 < len(own) else points[-1].at
    seen = [point for point in points if begins <= point.at <= until]
    peak = _peak(seen, stage)
    before, end = (_at(seen, at) for at in (stage.begins, _end(stage)))
    first = seen[0].estimate if seen else None
    return {
        **_record(name, stage.number, seen, peak),
        "learned": _difference(first, end),
        "forward_transfer": _difference(first, before) if begins < stage.begins else None,
        **_since(seen, stage, peak),
    }


def _record(
    name: str, stage: int | None, points: list[Point], peak: Point | None
) -> dict[str, Any]:
    """`peak`: what the curve is a share of; of a task without a stage what it was before."""
    scale = None if peak is None else peak.estimate.score
    return {
        "task": name,
        "own_stage": stage,
        "peak": scale,
        "peak_at": None if peak is None else peak.at,
        "curve": [_curve_point(point, scale or 0.0) for point in points],
    }


def _peak(points: Sequence[Point], own: Stage) -> Point | None:
    """None where nothing was evaluated since the stage began to train. What it started with, at
    `begins`, is the work of what came before it."""
    inside = [point for point in points if own.begins < point.at <= _end(own)]
    return max(inside, key=lambda point: point.estimate.score, default=None)


def _end(stage: Stage) -> int:
    return stage.begins + stage.generations


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


def _since(points: list[Point], own: Stage, peak: Point | None) -> dict[str, Any]:
    """What later stages took; None where there are none yet."""
    names = ("backward_transfer", "forgetting", "kept_of_peak", "worst_since", "worst_since_at")
    if peak is None or points[-1].at <= _end(own):
        return dict.fromkeys(names)
    last, top = points[-1].estimate, peak.estimate.score
    later = [point for point in points if point.at >= _end(own)]
    worst = min(later, key=lambda point: point.estimate.score)
    took = _difference(_at(points, _end(own)), last)
    kept = last.score / top if top > 0 else None
    values = (took, top - last.score, kept, worst.estimate.score, worst.at)
    return dict(zip(names, values, strict=True))


def _difference(before: Estimate | None, after: Estimate | None) -> dict[str, Any] | None:
    if before is None or after is None:
        return None
    return {
        "value": after.score - before.score,
        "value_95": difference_interval(before, after),
    }

"""Reading forgetting.json's records: what its tables, files and pictures have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SPARSE = 1e-6  # of arXiv 2601.20861
OWN, EQUAL = "own norm", "equal norm"
Row = dict[str, Any]


def models(found: Row) -> Iterator[tuple[str, str, Row]]:
    """(at which norm, name, record) of what has KL and scores: subjects, then the controls."""
    for subject in found["subjects"]:
        yield OWN, subject["name"], subject
    for control in (found["equal_norm"] or {"controls": []})["controls"]:
        yield EQUAL, control["name"], control


def scored(found: Row) -> Iterator[tuple[str, str, Row]]:
    """`models`, the base first."""
    yield "base", "base", {"scores": found["base_scores"]}
    yield from models(found)


def unscored(name: str, score: Row) -> list[str]:
    """A note where answers of a SCORE could not be scored."""
    failed, at = score["failed_rewards"], score["generation"]
    if not failed:
        return []
    when = "" if at is None else f" at generation {at}"
    return [
        f"{name}{when}: {failed} of {score['count']} answers to {score['prompts']} could not be "
        "scored, and are in its score with the failure reward."
    ]


def last(records: list[Row]) -> list[Row]:
    """Those of the last generation among `records`."""
    latest = max((record["generation"] or 0 for record in records), default=0)
    return [record for record in records if (record["generation"] or 0) == latest]


def sparsity(found: Row, change: Row) -> float | None:
    """The share of a CHANGE below SPARSE."""
    return change["below"][found["thresholds"].index(SPARSE)]


def within_one_ulp(found: Row, change: Row) -> float | None:
    """The share of a CHANGE within one unit in the last place."""
    return change["within_ulps"][found["ulps"].index(1)]

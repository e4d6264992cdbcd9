"""`esfast report` says what its numbers are not: answers that could not be scored, runs that did
not end, runs that are no seeds, and the worst that was picked after looking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_page import words_of
from report_runs import run_folder, write, write_lines

pytestmark = pytest.mark.usefixtures("undrawn")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_answers_that_could_not_be_scored_stand_beside_their_scores(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    prior = lines(run / "prior.jsonl")
    for record in prior:
        record["failed"] = 12 * (record["task"] == "capitals" and record["generation"] == 1)
    write_lines(run / "prior.jsonl", prior)
    rows = lines(run / "metrics.jsonl")
    rows[1]["failed_rewards"], rows[2]["failed_rewards"] = 4, 3
    write_lines(run / "metrics.jsonl", rows)
    summary = content(run / "summary.json")
    summary["held_out_after"]["failed_rewards"] = 5
    write(run / "summary.json", summary)
    found = content(run / "forgetting" / "forgetting.json")
    found["equal_norm"]["controls"][0]["scores"][0]["failed_rewards"] = 6
    write(run / "forgetting" / "forgetting.json", found)
    words = words_of(run)
    for shown in (
        "0.600 [0.550, 0.650] 5 not scored",  # the final score, at a glance
        "7 5 held-out, 12 of prior tasks",  # failed rewards, there too
        "[0.355, 0.445] at 1 12 not scored",  # the worst of capitals
        "capitals, run: answers that could not be scored: 12 at generation 1, the worst score",
        "held-out 5 at generation 3; of training 7 at 2 generations from 2 to 3",
        "0.310 [0.260, 0.360] 6 not scored",  # of a control
    ):
        assert shown in words, shown
    assert words.count("not scored") == 5  # final, worst (greedy, sampled), caption, control

"""`esfast report` says what its numbers are not: answers that could not be scored, runs that did
not end, runs that are no seeds, and the worst that was picked after looking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_page import words_of
from report_runs import DONE, run_folder, write, write_lines

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


def stopped(run: Path, after: int, evaluated: bool = True) -> Path:
    """The run as it is where it was killed after so many generations: without a summary."""
    (run / "summary.json").unlink()
    rows = lines(run / "metrics.jsonl")[:after]
    rows = rows if evaluated else [{**row, "held_out": None} for row in rows]
    write_lines(run / "metrics.jsonl", rows)
    prior = [s for s in lines(run / "prior.jsonl") if s["generation"] <= after * evaluated]
    write_lines(run / "prior.jsonl", prior)
    return run


def test_a_killed_run_has_no_score_before(tmp_path: Path) -> None:
    """Generation 0's stands in the summary alone; the first one that there is is no untrained
    model's."""
    words = words_of(stopped(run_folder(tmp_path / "run"), 2))
    assert "run ES 2 of 3 0.500 [0.450, 0.550] -0.500" in words  # final, no before, no rise
    assert "-0.500 [-0.500, -0.500] capitals at generation 1" in words
    assert "the held-out score before training. It comes with esfast train --resume" in words


def test_a_run_that_failed_before_its_first_evaluation_has_no_final_score(tmp_path: Path) -> None:
    run = stopped(run_folder(tmp_path / "run"), 1, evaluated=False)
    before = {"generation": 0, "score": 0.3, "score_95": [0.25, 0.35], "prompts": 9}
    summary = {"status": "failed", "generations": 1, "held_out_before": before, "rise": None,
               "held_out_after": None, "seconds": {"generation": 9.0}}  # fmt: skip
    write(run / "summary.json", summary)
    words = words_of(run)
    assert "run ES 1 of 3 0.300 [0.250, 0.350] 0." in words  # before, then the norm
    assert "+0.000" not in words
    assert "run greedy 0.900 [0.855, 0.945] run sampled" in words  # before, nothing since


def test_a_final_score_of_an_earlier_generation_says_so(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    summary = content(run / "summary.json")
    write(run / "summary.json", {**summary, "status": "interrupted", "generations": DONE + 2})
    words = words_of(run)
    assert "0.600 [0.550, 0.650] at generation 3 +0.300 5.2 s.e." in words
    assert "0.700 [0.655, 0.745] at generation 3" in words  # of capitals
    assert words.count("at generation 3") == 7  # final, fall, norm; two tasks, greedy and sampled

"""`esfast report` says what its numbers are not: answers that could not be scored, runs that did
not end, runs that are no seeds, and the worst that was picked after looking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_page import words_of
from report_runs import DONE, held_out, run_folder, write, write_lines

from esfast import AnchoredDecay
from esfast.html_report import read_runs
from esfast.html_report.report_data import Points, ReportData
from esfast.journal import read_journal
from esfast.prior.scores import Estimate, PriorScore

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
        "7 held-out 5 prior tasks 12",  # failed rewards, there too
        "[0.355, 0.445] at 1 12 not scored",  # the worst of capitals
        "capitals, run: answers that could not be scored: 12 at generation 1 (in worst)",
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
    assert "-0.500 [-0.500, -0.500] capitals, worst of 2 at generation 1" in words
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


def with_final(run: Path, final: float) -> Path:
    """The run with another held-out score at its end."""
    rows, summary = lines(run / "metrics.jsonl"), content(run / "summary.json")
    rows[-1]["held_out"] = summary["held_out_after"] = held_out(DONE, final)
    write_lines(run / "metrics.jsonl", rows)
    write(run / "summary.json", summary)
    return run


def test_a_run_made_again_is_no_further_seed(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, seed=1) for name in ("es-a", "es-b")]
    words = words_of(*runs)
    assert "es (1 of 2 runs): curves and means leave out es-b (of the same seed as es-a)." in words
    assert "2 seeds" not in words and "Means over seeds" not in words
    third = with_final(run_folder(tmp_path / "es-c", seed=2), 0.8)
    words = words_of(*runs, third)
    assert "es (2 of 3 runs) 2 0.700 [-0.571, 1.971]" in words


def test_runs_of_one_check_value_have_one_diagnosis(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, seed=1) for name in ("a", "b")]
    found = content(runs[0] / "forgetting" / "forgetting.json")
    found["subjects"][0] |= {"chain": read_journal(runs[0]).chains[-1].hex(), "source": "old/a"}
    write(tmp_path / "both.json", found)
    for run in runs:
        shutil.rmtree(run / "forgetting")
    words = words_of(*runs, flags=("--forgetting", str(tmp_path / "both.json")))
    assert "Not here for b: measured norms" not in words


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ({"arguments": {"anchor_model": "elsewhere"}}, "anchor tiny elsewhere"),
        ({"arguments": {"engine": "vllm"}}, "engine transformers vllm"),
        ({"device": "cuda:1"}, "device cpu cuda"),
        ({"prior": {"every": 5, "seed": 2, "tasks": [{"source": "sums"}]}}, "prior.tasks – sums"),
    ],
)
def test_runs_of_other_conditions_are_no_seeds_of_one_setting(
    tmp_path: Path, place: dict[str, Any], shown: str
) -> None:
    decay = AnchoredDecay("l2", 10.0)
    runs = [run_folder(tmp_path / f"es-{seed}", seed=seed, decay=decay) for seed in (1, 2)]
    assert "es (2 seeds)" in words_of(*runs)
    write(runs[1] / "config.json", {**content(runs[1] / "config.json"), **place})
    words = words_of(*runs)
    assert "es (2 seeds)" not in words and shown in words


def test_the_seed_of_prior_tasks_and_the_number_of_a_device_are_no_conditions(
    tmp_path: Path,
) -> None:
    runs = [run_folder(tmp_path / f"es-{seed}", seed=seed) for seed in (1, 2)]
    for seed, run in enumerate(runs):
        prior = {"every": 5, "seed": seed, "tasks": [{"source": "sums"}]}
        engine = {
            "arguments": {"engine": "transformers"} if seed else {}
        }  # none: an earlier esfast
        said = {"device": f"cuda:{seed}", "prior": prior, **engine}
        write(run / "config.json", {**content(run / "config.json"), **said})
    assert "es (2 seeds)" in words_of(*runs)


def test_a_run_that_did_not_end_is_no_part_of_the_mean(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / f"es-{seed}", seed=seed) for seed in (1, 2, 3)]
    with_final(runs[1], 0.8)
    stopped(runs[2], 2)
    words = words_of(*runs, run_folder(tmp_path / "grpo", method="grpo"))
    assert "es (2 of 3 runs) 2 0.700 [-0.571, 1.971]" in words
    assert "curves and means leave out es-3 (2 of 3 generations)" in words
    assert "bands of a single run: left, 95 % intervals over the held-out prompts" in words
    assert "bands of a single run: 95 % intervals over the prompts" in words


def test_curves_are_of_the_runs_that_ended(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / f"es-{seed}", seed=seed) for seed in (1, 2, 3)]
    stopped(folders[2], 2)
    report = ReportData(tuple(read_runs([str(folder) for folder in folders])))
    (series,) = report.series(
        lambda run: Points([r["generation"] for r in run.rows], [1.0 for _ in run.rows])
    )
    assert list(series.x) == [1, 2, 3]
    ((number, _, members),) = report.subject_groups
    assert [s.name for s in report.averaged(number, members)] == ["es-1", "es-2"]


def test_the_largest_fall_over_seeds_is_of_one_task(tmp_path: Path) -> None:
    """Tasks that fall in one seed and rise in the other have not fallen."""
    changes = {1: {"a": -0.2, "b": 0.1, "c": -0.11}, 2: {"a": 0.2, "b": -0.1, "c": -0.09}}
    runs = []
    for seed, found in changes.items():
        runs.append(run_folder(tmp_path / f"es-{seed}", seed=seed))
        scores = [
            PriorScore(at, task, task, "score", 10, Estimate.of([0.5 + change * (at > 0)] * 10))
            for task, change in found.items()
            for at in (0, DONE)
        ]
        write_lines(runs[-1] / "prior.jsonl", [score.record() for score in scores])
    words = words_of(*runs)
    assert "-0.100 [-0.227, +0.027] c, worst of 3" in words
    assert (
        "The largest fall is the worst of 3 tasks, picked after looking: its interval does not"
        in words
    )
    assert "-0.200 [-0.200, -0.200] a, worst of 3" in words  # of the first seed alone

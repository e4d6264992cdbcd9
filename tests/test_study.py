"""The forgetting study: its table, its resuming, and what it makes of rows. Nothing is trained."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ALL_COMPLETED
from pathlib import Path

import pytest

from esfast import cli, plots
from esfast.errors import ConfigError, EsfastError

STUDY = Path(__file__).parent.parent / "benchmarks" / "forgetting"
sys.path.insert(0, str(STUDY))

import study_rows  # noqa: E402
import study_runs  # noqa: E402
import study_summary  # noqa: E402
from prior_rewards import fluent  # noqa: E402
from study_figures import Drawing  # noqa: E402
from study_table import CPU, PRIOR_TASKS, ROOT, SCALES, SEEDS, Arm, short_name  # noqa: E402


@pytest.fixture(params=sorted(SCALES))
def scale(request):
    return SCALES[request.param]


def test_every_run_of_the_table_is_a_command_line_that_esfast_takes(scale, tmp_path):
    parser = cli.build_parser()
    for run in scale.runs():
        arguments = study_runs.first_arguments(run, scale, tmp_path / run.key, "model")
        parsed = parser.parse_args(arguments)
        assert parsed.seed == run.seed
        for step in study_runs.steps_left(run, scale, study_runs.Work(tmp_path), "model"):
            parser.parse_args(step.arguments)
        if run.arm.decay:
            assert parsed.alpha * parsed.weight_decay_lambda == pytest.approx(run.arm.decay)


def test_names_are_unique_and_every_main_arm_has_three_seeds(scale):
    keys = [run.key for run in scale.runs()]
    assert len(set(keys)) == len(keys) == sum(len(arm.seeds) for arm in scale.arms)
    assert len({arm.name for arm in scale.arms}) == len(scale.arms)
    assert all(len(set(arm.seeds)) >= 3 for arm in scale.arms if arm.main)


def test_the_larger_population_has_as_many_evaluations(scale):
    def answers(key: str) -> int:
        flags = next(arm for arm in scale.arms if arm.key == key).flags
        of = dict(zip(flags[::2], flags[1::2], strict=True))
        return int(of["--population-size"]) * int(of["--prompts"])

    assert answers("es-large") == answers("es") == answers("es-l2")


def test_the_sweep_has_a_point_without_decay_and_about_five_with(scale):
    strengths = [arm.decay for arm in scale.arms if arm.decay is not None]
    assert len(set(strengths)) == len(strengths) >= 5
    assert 0.0 in strengths and max(strengths) < 1
    assert all(SEEDS[0] in arm.seeds for arm in scale.arms if arm.decay is not None)


def test_the_files_of_the_prior_tasks_are_there_and_have_rows_that_differ():
    files = [task.partition("@")[0] for task in PRIOR_TASKS if ".jsonl" in task]
    assert files
    for name in files:
        rows = [json.loads(line) for line in (ROOT / name).read_text().splitlines()]
        assert len({row["prompt"] for row in rows}) == len(rows) >= 30
        assert all(row["answers"] for row in rows)


def test_short_names():
    assert [short_name(task) for task in PRIOR_TASKS] == [
        "capitals", "opposites", "plurals", "copying", "writing",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The sea is wide and blue today.", 1.0),
        ("The sea is wide.", 0.0),  # too short
        ("The hills are wide and blue today.", 0.0),  # not the topic
        ("The sea is wide, and the sea is wide again.", 0.0),  # repeats itself
    ],
)
def test_fluent(text, expected):
    assert fluent({"answers": ["sea"]}, text) == expected


# --- resuming ------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path) -> study_runs.Work:
    return study_runs.Work(tmp_path / "work")


def steps(run, work) -> list[str]:
    return [step.arguments[0] for step in study_runs.steps_left(run, CPU, work, "model")]


def leave(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_what_is_finished_is_skipped_and_what_was_begun_goes_on(work):
    run = CPU.runs()[0]
    folder = work.folder(run)
    assert steps(run, work) == ["train", "forgetting"]
    leave(folder, config={})
    (going_on, _) = study_runs.steps_left(run, CPU, work, "model")
    assert going_on.arguments == ("train", "--resume", str(folder))
    leave(folder, summary={"status": "interrupted"})
    assert steps(run, work) == ["train", "forgetting"]
    leave(folder, summary={"status": "finished"})
    assert steps(run, work) == ["forgetting"]
    assert study_runs.steps_left(run, CPU, work, "model", train_only=True) == []
    leave(work.diagnosis(run), forgetting={})
    assert steps(run, work) == []


def test_controls_wait_for_their_runs_and_are_made_once(scale, work):
    assert study_runs.control_step(scale, work, "model") is None
    for run in scale.runs():
        leave(work.folder(run), summary={"status": "finished"})
    step = study_runs.control_step(scale, work, "model")
    assert step is not None
    parsed = cli.build_parser().parse_args(step.arguments)
    assert parsed.subjects[0].endswith("es-l2-seed1") and not parsed.kl
    leave(work.controls, forgetting={})
    assert study_runs.control_step(scale, work, "model") is None


def test_a_work_folder_of_other_settings_is_refused(work):
    run = CPU.runs()[0]
    work.claim(run, ("train", "--alpha", "1"))
    work.claim(run, ("train", "--alpha", "1"))
    with pytest.raises(ConfigError, match="other settings"):
        work.claim(run, ("train", "--alpha", "2"))


def test_a_run_that_fails_stops_the_study_and_is_named(work, monkeypatch):
    ran = []

    def fail(arguments, log, running=None):
        ran.append(arguments[0])
        raise EsfastError("`esfast train` ended with exit code 2")

    monkeypatch.setattr(study_runs, "process", fail)
    monkeypatch.setattr(study_runs, "FIRST_EXCEPTION", ALL_COMPLETED)  # as if run_all woke late
    runner = study_runs.Runner(CPU, work, "model", lambda text: None)
    with pytest.raises(EsfastError, match="exit code 2"):
        runner.run_all(CPU.runs(), lambda run, seconds: None)
    assert set(ran) <= {"train", "grpo"} and len(ran) <= CPU.jobs


def test_a_process_that_begins_as_the_study_stops_is_stopped(work, monkeypatch):
    """In another thread, between its look and its process."""
    runner = study_runs.Runner(CPU, work, "model", lambda text: None)
    popen = subprocess.Popen

    def begin(command, **options):
        runner._running.stop()
        return popen([sys.executable, "-c", "import time; time.sleep(30)"], **options)

    monkeypatch.setattr("subprocess.Popen", begin)
    with pytest.raises(EsfastError, match="exit code -15"):
        runner.run_all(CPU.runs()[:1], lambda run, seconds: None)


def test_a_study_runs_what_is_left_and_nothing_twice(work, monkeypatch):
    ran: list[tuple[str, str]] = []

    def pretend(arguments, log, running=None):
        name = "forgetting" if arguments[0] == "forgetting" else "summary"
        folder = Path(arguments[arguments.index("--output") + 1])
        run = folder.parent if name == "forgetting" else folder
        ran.append((folder.name if name == "forgetting" else name, run.name))
        leave(folder, config={}, **{name: {"status": "finished"}})

    monkeypatch.setattr(study_runs, "process", pretend)
    leave(work.folder(CPU.runs()[1]), summary={"status": "finished"})
    leave(work.diagnosis(CPU.runs()[1]), forgetting={})
    done = []
    runner = study_runs.Runner(CPU, work, "model", lambda text: None)
    runner.run_all(CPU.runs(), lambda run, seconds: done.append(run.key))
    assert sorted(done) == sorted(run.key for run in CPU.runs())
    assert len(ran) == len(set(ran)) >= 2 * (len(done) - 1)
    assert CPU.runs()[1].key not in {key for _, key in ran}
    ran.clear()
    runner.run_all(CPU.runs(), lambda run, seconds: None)
    assert ran == []


# --- arithmetic of rows --------------------------------------------------------------------------


def test_mean_and_interval_are_students():
    mean, low, high = study_rows.mean_and_interval([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2.0, 2 - half, 2 + half))
    assert study_rows.mean_and_interval([5.0]) == (5.0, -math.inf, math.inf)


def row(arm: str, seed: int, **numbers: float) -> dict:
    return {"run": f"{arm}-{seed}", "arm": arm, "seed": seed, "main": 1, **numbers}


def test_summary_is_an_arm_a_row_and_leaves_out_what_is_not_there():
    rows = [row("ES", s, norm=float(s)) for s in SEEDS] + [row("GRPO", 1, target_after=0.5)]
    es, grpo = study_rows.summarise(rows)
    assert (es["arm"], es["seeds"], es["norm"]) == ("ES", 3, 2.0)
    assert es["norm_low"] == pytest.approx(2 - 4.303 / math.sqrt(3))
    assert "norm" not in grpo and grpo["target_after"] == 0.5 and grpo["target_after_low"] is None


def test_differences_are_paired_by_seed():
    rows = [row("A", 1, x=3.0), row("A", 2, x=5.0), row("B", 2, x=1.0), row("B", 3, x=0.0)]
    assert study_rows.paired(rows, "A", "B", "x") == [4.0]


def test_change_columns_are_those_of_the_last_generation():
    whole = {"norm": 2.0, "relative_norm": 0.1, "mean_abs": 1e-3, "max_abs": 0.1,
             "unchanged": 0.25, "below": [0.2, 0.3], "elements": 10}  # fmt: skip
    drift = [{"generation": g, "whole": {**whole, "norm": float(g)}} for g in (5, 10)]
    kl = [
        {"generation": g, "prompts": "questions:capitals", "kind": "prior", "samples_from": "base",
         "exact": {"token_weighted": {"value": g / 100}}}
        for g in (5, 10)
    ]  # fmt: skip
    report = {"thresholds": [1e-7, 1e-6], "subjects": [{"drift": drift, "kl": kl}]}
    found = study_rows.change_columns(report)
    assert found["norm"] == 10.0 and found["below_1e-6"] == 0.3
    assert found["kl_base_first_capitals"] == 0.1


def test_control_rows_are_of_base_runs_and_controls(tmp_path):
    def scores(value: float) -> list[dict]:
        kinds = (("arithmetic", "target"), ("questions:capitals", "prior"))
        shared = {"score": value, "score_95": [value, value]}
        return [{"prompts": prompts, "kind": kind, **shared} for prompts, kind in kinds]

    drift = [{"whole": {"norm": 3.0}}]
    report = {
        "base_scores": scores(0.1),
        "subjects": [{"name": "es", "kind": "run", "drift": drift, "scores": scores(0.2)}],
        "equal_norm": {
            "controls": [{"name": "noise", "kind": "random", "norm": 2.0, "scores": scores(0.3)}]
        },
    }
    (tmp_path / "forgetting.json").write_text(json.dumps(report))
    rows = study_rows.control_rows(tmp_path / "forgetting.json")
    seen = [(row["name"], row["task"], row["norm"], row["score"]) for row in rows]
    assert seen[::2] == [
        ("base", "target", 0.0, 0.1), ("es", "target", 3.0, 0.2), ("noise", "target", 2.0, 0.3),
    ]  # fmt: skip
    assert {row["task"] for row in rows[1::2]} == {"capitals"}


def test_rows_survive_their_csv(tmp_path):
    rows = [row("ES", 1, norm=0.125), {**row("GRPO", 2), "command": "esfast grpo, with a comma"}]
    study_rows.write_csv(tmp_path / "rows.csv", rows)
    read = study_rows.read_csv(tmp_path / "rows.csv")
    assert read[0]["norm"] == 0.125 and "norm" not in read[1]
    assert read[1]["command"] == "esfast grpo, with a comma"


def test_rows_say_where_they_come_from():
    runs = [{"run": "es-seed1", "commit": "of the run"}]
    origin = {"commit": "of the analysis", "device": "a processor", "threads": 1}
    of_run, mean = study_rows.stamped(
        [{"run": "es-seed1", "norm": 1.0}, {"arm": "ES"}], origin, runs
    )
    assert of_run == {**origin, "commit": "of the run", "run": "es-seed1", "norm": 1.0}
    assert mean == {**origin, "arm": "ES"}


def test_pictures_are_drawn_of_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "PIXELS_PER_INCH", 30)
    rows, curves = [], []
    for arm in ("ES", "GRPO"):
        for seed in SEEDS:
            numbers = {"norm": 1.0 + seed, "below_1e-6": 0.5, "target_after": 0.9}
            numbers |= {f"capitals_{part}": -0.1 for part in ("dip", "change", "recovery")}
            rows.append({**row(arm, seed, **numbers), "kl_base_first_target": 0.1})
            for task in (study_rows.TARGET, "capitals"):
                point = {"task": task, "generation": 2, "score": 0.5, "low": 0.4, "high": 0.6}
                curves.append({**row(arm, seed), **point})
    for strength, seed in ((0.0, 1), (0.5, 2)):
        rows[seed]["alpha_lambda"] = strength
    drawn = Drawing(rows, curves, "made by a test").draw(tmp_path)
    names = {path.stem for path in drawn}
    assert names == {
        "target", "prior", "outcome", "change", "kl", "score_against_norm", "lambda",
    }  # fmt: skip
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_tables_say_mean_interval_and_paired_difference():
    rows = [row("ES, N 16", s, target_after=0.5 + s / 10, norm=2.0) for s in SEEDS]
    rows += [row("GRPO", s, target_after=0.4 + s / 10, norm=1.0) for s in SEEDS]
    curves = [{**row("GRPO", 1), "task": "capitals", "generation": 0, "score": 0.5}]
    text = study_summary.markdown(rows, curves, [])
    assert "| GRPO | -0.1 [-0.1, -0.1] | -1 [-1, -1] |" in text
    assert "| ES, N 16 | 3 | 0.7 [0.452, 0.948] | 2 [2, 2] |" in text


def test_an_arm_is_frozen():
    with pytest.raises(AttributeError):
        Arm("a", "A", "train").key = "b"  # type: ignore[misc]

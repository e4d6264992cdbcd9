"""From run folders to the study's rows: a row a run, a row a run x task x evaluation, and means.

Everything is read from the folders (config.json, summary.json, metrics.jsonl, prior.jsonl,
forgetting.json), nothing is trained or measured here; a figure that a folder does not have is an
empty cell. The interval of a mean over seeds is Student's, t * s / sqrt(n): with three seeds t is
4.3, and two arms whose intervals overlap are not told apart.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_runs import DIAGNOSED, STORED, Work, finished
from study_table import Scale, StudyRun, short_name

from esfast.forgetting.laws import norms_of_coefficients
from esfast.journal import read_journal
from esfast.prior.evaluation import PRIOR
from esfast.prior.scores import PriorScore, outcome
from esfast.run_folder import CONFIG, METRICS, SUMMARY, read_json, read_lines
from esfast.whole_file import write_table

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""t of a 95 % interval at 1, 2, ... degrees of freedom."""
TARGET = "target"
SPARSE_BELOW = 1e-6
Row = dict[str, Any]


def curve_rows(run: StudyRun, folder: Path) -> list[Row]:
    """The scores of a run at every evaluation: of the target task, and of each prior task."""
    summary = read_json(folder / SUMMARY)
    held_out = [summary["held_out_before"]]
    held_out += [line["held_out"] for line in read_lines(folder / METRICS) if line["held_out"]]
    rows = [_point(run, TARGET, r["generation"], r["score"], r["score_95"]) for r in held_out]
    for score in prior_scores(folder):
        interval = (score.greedy.low, score.greedy.high)
        task = short_name(score.task)
        rows.append(_point(run, task, score.generation, score.greedy.score, interval))
    return rows


def _point(
    run: StudyRun, task: str, generation: int, score: float, interval: Sequence[float]
) -> Row:
    return {
        "run": run.key,
        "arm": run.arm.name,
        "seed": run.seed,
        "task": task,
        "generation": generation,
        "score": score,
        "low": interval[0],
        "high": interval[1],
    }


def prior_scores(folder: Path) -> list[PriorScore]:
    """What prior.jsonl holds; nothing where it is not there."""
    path = folder / PRIOR
    return [PriorScore.from_record(line) for line in read_lines(path)] if path.exists() else []


def run_row(run: StudyRun, work: Work) -> Row:
    """One run in one row: scores, what came of each prior task, the change, KL, cost, origin."""
    folder = work.folder(run)
    config, summary = read_json(folder / CONFIG), read_json(folder / SUMMARY)
    before, after = summary["held_out_before"], summary["held_out_after"]
    row: Row = {
        "run": run.key,
        "arm": run.arm.name,
        "seed": run.seed,
        "alpha_lambda": run.arm.decay,
        "main": int(run.arm.main),
        "target_before": before["score"],
        "target_after": after["score"],
        "target_after_bf16": (summary.get("held_out_as_bfloat16") or after)["score"],
        "solved_after": after["solved"],
    }
    row |= _prior_columns(prior_scores(folder))
    row |= _change(run, work)
    row |= {
        "seconds": sum(summary["seconds"].values()),
        "peak_over_inference": summary["peak_over_inference"],
        **{f"cost_{name}": value for name, value in flat(summary.get("cost") or {}).items()},
        "commit": config["made"]["commit"],
        "target_isa": config["made"]["target"],
        "command": config["made"]["command"],
    }
    return row


def _prior_columns(scores: Sequence[PriorScore]) -> Row:
    row: Row = {}
    for task in dict.fromkeys(score.task for score in scores):
        came = outcome([score for score in scores if score.task == task])["greedy"]
        for part in ("before", "dip", "change", "recovery"):
            row[f"{short_name(task)}_{part}"] = came[part]
    return row


def _change(run: StudyRun, work: Work) -> Row:
    """The columns of both diagnoses, where they are there."""
    there, stored = (work.diagnosis(run, kind) / DIAGNOSED for kind in ("", STORED))
    row = change_columns(read_json(there)) if there.exists() else {}
    same = row if run.arm.command == "train" else {}  # ES trains what it stores
    as_stored = change_columns(read_json(stored)) if stored.exists() else same
    kept = ("norm", "unchanged", "below_1e-6")
    return row | {f"{name}_bf16": as_stored[name] for name in kept if name in as_stored}


def drift_rows(run: StudyRun, work: Work) -> list[Row]:
    """The change at each generation measured, beside what the journal's coefficients imply."""
    path = work.diagnosis(run) / DIAGNOSED
    if not path.exists() or run.arm.command != "train":
        return []
    journal = read_journal(work.folder(run))
    rows = []
    for drift in read_json(path)["subjects"][0]["drift"]:
        whole, generation = drift["whole"], drift["generation"]
        row = {"run": run.key, "arm": run.arm.name, "seed": run.seed, "generation": generation}
        row |= {name: whole[name] for name in ("norm", "relative_norm", "unchanged")}
        norms = norms_of_coefficients(journal.generations, whole["elements"])
        row["norm_of_coefficients"] = float(norms[generation])
        rows.append(row)
    return rows


def control_rows(path: Path) -> list[Row]:
    """Scores of changes brought to one length, beside those of the base and of the runs."""
    report = read_json(path)
    base = {"name": "base", "kind": "base", "scores": report["base_scores"]}
    norms = {s["name"]: s["drift"][-1]["whole"]["norm"] for s in report["subjects"]}
    runs = [{**s, "norm": norms[s["name"]], "kind": "as it was"} for s in report["subjects"]]
    rows = []
    for record in (base, *runs, *report["equal_norm"]["controls"]):
        for score in record["scores"]:
            task = TARGET if score["kind"] == TARGET else short_name(score["prompts"])
            row = {"name": record["name"], "kind": record["kind"], "norm": record.get("norm", 0.0)}
            row |= {"task": task, "score": score["score"]}
            rows.append({**row, "low": score["score_95"][0], "high": score["score_95"][1]})
    return rows


def change_columns(report: Mapping[str, Any]) -> Row:
    """From forgetting.json: the change at the last generation, and KL there."""
    subject = report["subjects"][0]
    whole = subject["drift"][-1]["whole"]
    sparse = report["thresholds"].index(SPARSE_BELOW)
    row: Row = {
        "norm": whole["norm"],
        "relative_norm": whole["relative_norm"],
        "mean_abs": whole["mean_abs"],
        "max_abs": whole["max_abs"],
        "unchanged": whole["unchanged"],
        "below_1e-6": whole["below"][sparse],
        "elements": whole["elements"],
    }
    last = subject["drift"][-1]["generation"]
    for kl in subject["kl"]:
        if kl["generation"] == last:
            direction = f"kl_{kl['samples_from']}_first"
            value = kl["exact"]["token_weighted"]
            name = TARGET if kl["kind"] == TARGET else short_name(kl["prompts"])
            row[f"{direction}_{name}"] = value["value"]
    return row


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record under joined names."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{name}_")
        elif isinstance(value, (int, float)):
            numbers[prefix + name] = value
    return numbers


def finished_runs(scale: Scale, work: Work) -> list[StudyRun]:
    """The runs that came to their end."""
    return [run for run in scale.runs() if finished(work.folder(run))]


def gather(scale: Scale, work: Work) -> tuple[list[Row], list[Row]]:
    """Rows of the runs that are finished, and of their evaluations."""
    there = finished_runs(scale, work)
    rows = [run_row(run, work) for run in there]
    curves = [row for run in there for row in curve_rows(run, work.folder(run))]
    return rows, curves


def mean_and_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval; an infinite one where there is but one value.

    Raises ValueError for none.
    """
    array = np.array(list(values), dtype=np.float64)
    if not len(array):
        raise ValueError("a mean of no values")
    mean = float(array.mean())
    if len(array) == 1:
        return mean, -math.inf, math.inf
    half = STUDENT[min(len(array) - 1, len(STUDENT)) - 1]
    half *= float(array.std(ddof=1)) / math.sqrt(len(array))
    return mean, mean - half, mean + half


def summarise(rows: Sequence[Row], skip: Sequence[str] = ("run", "seed", "main")) -> list[Row]:
    """Mean and interval of every numeric column, an arm a row, in the order of the rows."""
    out = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        line: Row = {"arm": arm, "seeds": len(of_arm)}
        for column in columns(of_arm):
            values = [row[column] for row in of_arm if _is_number(row.get(column))]
            if column not in skip and values:
                mean, low, high = mean_and_interval(values)
                spread = len(values) > 1
                line[column] = mean
                line[f"{column}_low"] = low if spread else None
                line[f"{column}_high"] = high if spread else None
        out.append(line)
    return out


def paired(rows: Sequence[Row], arm: str, other: str, column: str) -> list[float]:
    """`column` of `arm` less that of `other`, seed by seed, where both have it."""
    of = {
        name: {row["seed"]: row[column] for row in rows if row["arm"] == name and column in row}
        for name in (arm, other)
    }
    return [of[arm][seed] - of[other][seed] for seed in sorted(of[arm].keys() & of[other].keys())]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def columns(rows: Sequence[Row]) -> list[str]:
    """All columns of the rows, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def stamped(rows: Sequence[Row], origin: Row, runs: Sequence[Row]) -> list[Row]:
    """The rows behind where they come from: of a run's rows the commit is that of the run."""
    commits = {run["run"]: run["commit"] for run in runs}
    return [
        {**origin, "commit": commits.get(row.get("run"), origin["commit"]), **row} for row in rows
    ]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows as CSV, six significant digits; appears whole."""
    cells = ({name: _cell(value) for name, value in row.items()} for row in rows)
    write_table(path, columns(rows), cells)


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote: numbers as numbers, empty cells left out."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: _value(text) for name, text in row.items() if text != ""}
            for row in csv.DictReader(file)
        ]


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text

#!/usr/bin/env python
"""The study of forgetting: ES, ES with anchored decay, a larger population, and GRPO.

    python benchmarks/forgetting/study.py               # resumable; two hours of processor time
    python benchmarks/forgetting/study.py --analyse     # tables and pictures again
    python benchmarks/forgetting/study.py --scale gpu --model HUB/NAME   # not yet run

Runs the table of study_table.py in a work folder (a run that is finished is skipped, one that was
begun goes on), then writes into benchmarks/results/forgetting/SCALE/: runs.csv (a row a run),
curves.csv (a row a run, task and evaluation), drift.csv (the change by generation beside what the
law gives), controls.csv (scores of changes brought to one length), summary.csv and summary.md
(means over seeds with intervals), study.json (how it was made), pictures, and report.html through
`esfast report`.
The tuned model of an ES run is removed once the run is finished: its journal is the model (`esfast
replay`).

What it does not do: choose settings. Sigma, alpha and the population are those of the default job,
lambdas are stated in study_table.py, and no arm was tuned on the prior tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from study_figures import Drawing
from study_rows import (
    columns,
    control_rows,
    drift_rows,
    finished_runs,
    gather,
    stamped,
    summarise,
    write_csv,
)
from study_runs import DIAGNOSED, Runner, Work, control_step, process
from study_summary import markdown
from study_table import ROOT, SCALES, Scale, StudyRun

from esfast.errors import ConfigError, EsfastError
from esfast.provenance import commit, device_name, one_line, provenance
from esfast.whole_file import write_whole

INTERRUPTED, MENDABLE = 130, 2
RESULTS = Path("benchmarks") / "results" / "forgetting"


def main() -> int:
    """Runs what is left, then the analysis; returns the exit code."""
    args = _arguments()
    os.chdir(ROOT)  # so that the commands that are recorded name no folder of this machine
    scale = SCALES[args.scale]
    try:
        model = _model(args, scale)
        work = Work(Path(args.work or Path("runs") / f"forgetting-{scale.name}"))
        runs = _chosen(scale, args.only)
        if not args.analyse:
            _run(Runner(scale, work, model, print, args.train_only), runs)
        if not args.train_only:
            analyse(scale, work, Path(args.output or RESULTS / scale.name), args.report)
    except EsfastError as error:
        print(f"study: {error}", file=sys.stderr)
        return MENDABLE
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--model", default=None, help="folder or hub name; gpu has none of its own")
    parser.add_argument("--work", default=None, help="runs/forgetting-SCALE if not given")
    parser.add_argument("--output", default=None, help=f"{RESULTS}/SCALE if not given")
    parser.add_argument("--only", default=None, metavar="PREFIX", help="runs of this name alone")
    parser.add_argument("--train-only", action="store_true", help="diagnose at a later call")
    parser.add_argument("--analyse", action="store_true", help="run nothing")
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _model(args: argparse.Namespace, scale: Scale) -> str:
    model = args.model or scale.model
    if model is None:
        raise ConfigError(f"the {scale.name} scale has no model of its own; name one with --model.")
    return str(model)


def _chosen(scale: Scale, only: str | None) -> list[StudyRun]:
    runs = [run for run in scale.runs() if run.key.startswith(only or "")]
    if not runs:
        raise ConfigError(f"no run's name begins with {only!r}; see study_table.py.")
    return runs


def _run(runner: Runner, runs: Sequence[StudyRun]) -> None:
    todo = [run for run in runs if runner.left(run)]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with bar:
        task = bar.add_task("runs", total=len(runs), completed=len(runs) - len(todo), left="")
        runner.note = bar.console.print
        seconds: list[float] = []

        def after(run: StudyRun, spent: float) -> None:
            seconds.append(spent)
            left = sum(seconds) / len(seconds) * (len(todo) - len(seconds)) / runner.scale.jobs
            bar.update(task, advance=1, left=f"left about {left / 60:.0f} min")
            bar.console.print(f"{run.key}: {spent:.0f} s")

        started = perf_counter()
        runner.run_all(todo, after)
    _control(runner)
    runner.work.add_session(perf_counter() - started, len(todo))


def _control(runner: Runner) -> None:
    step = control_step(runner.scale, runner.work, runner.model)
    if step is not None and not runner.train_only:
        runner.note("changes of one length")
        shutil.rmtree(runner.work.controls, ignore_errors=True)
        process(step.arguments, runner.work.path / "logs" / "controls.log")


def analyse(scale: Scale, work: Work, output: Path, report: bool) -> None:
    """Tables, pictures and report of the runs that are finished."""
    rows, curves = gather(scale, work)
    if not rows:
        raise ConfigError(f"{work.path} has no finished run; leave out --analyse.")
    output.mkdir(parents=True, exist_ok=True)
    made = {
        **provenance(["python", *map(shlex.quote, _relative(sys.argv))]),
        "device": device_name(),
        "scale": scale.name,
        "runs": len(rows),
        "sessions": work.sessions(),
        "commits_of_runs": sorted({str(row["commit"]) for row in rows}),
    }
    drift = [row for run in finished_runs(scale, work) for row in drift_rows(run, work)]
    diagnosed = work.controls / DIAGNOSED
    controls = control_rows(diagnosed) if diagnosed.exists() else []
    means = summarise([row for row in rows if row["main"]])
    tables = {
        "runs": rows,
        "curves": curves,
        "drift": drift,
        "controls": controls,
        "summary": means,
    }
    origin = {"commit": commit(), "device": made["device"], "threads": scale.threads}
    for name, table in tables.items():
        write_csv(output / f"{name}.csv", stamped(table, origin, rows))
    write_whole(output / "summary.md", markdown(rows, curves, controls).encode())
    _write_json(output / "study.json", made)
    drawn = Drawing(rows, curves, one_line(made)).draw(output)
    print(f"study: {len(rows)} runs, {len(columns(rows))} columns, {len(drawn)} pictures: {output}")
    if report:
        _report(scale, work, output)


def _report(scale: Scale, work: Work, output: Path) -> None:
    """All runs of the main arms, grouped by arm; the sweep is in the tables and pictures."""
    folders = [str(work.folder(run)) for run in finished_runs(scale, work) if run.arm.main]
    title = f"Forgetting: the study at the {scale.name} scale"
    arguments = ["report", *folders, "-o", str(output / "report.html"), "--title", title]
    process(arguments, work.path / "logs" / "report.log")


def _relative(arguments: Sequence[str]) -> list[str]:
    script = Path(arguments[0]).resolve()
    here = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    return [str(here), *arguments[1:]]


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps({**content, "commit": commit()}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())

"""Runs the study's table: every run is a command of esfast in a process of its own.

    WORK/runs/KEY/         the run folder that esfast wrote; in it forgetting/, its diagnosis
    WORK/commands/KEY.json the arguments that it was begun with
    WORK/logs/KEY.log      what they printed

What is finished is skipped; an ES run that was begun goes on from its journal (to the same bits as
one that was never stopped); a GRPO run has no journal and is begun anew. A work folder whose
commands are others is refused, so that rows of two studies are never mixed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from study_table import SEEDS, Scale, StudyRun

import esfast
from esfast.errors import ConfigError, EsfastError
from esfast.html_report.run_data import DIAGNOSTICS
from esfast.run_folder import CONFIG, MODEL, SUMMARY, append_line, read_json, read_lines
from esfast.whole_file import write_whole

DIAGNOSED = DIAGNOSTICS.name
STORED = "-as-bfloat16"
"""Ends the name of the folder that diagnoses a checkpoint as bf16 would store it."""
SESSIONS = "sessions.jsonl"
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Step:
    """One process of a run: what it does, its arguments after `esfast`, the file that ends it."""

    title: str
    arguments: tuple[str, ...]
    result: Path


class Work:
    """The study's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for part in ("runs", "commands", "logs"):
            (path / part).mkdir(parents=True, exist_ok=True)

    def folder(self, run: StudyRun) -> Path:
        """The run folder of a run, there or not."""
        return self.path / "runs" / run.key

    def diagnosis(self, run: StudyRun, kind: str = "") -> Path:
        """Where the diagnosis of a run goes, in its folder as `esfast report` looks for it.

        kind: STORED or nothing.
        """
        return self.folder(run) / f"{DIAGNOSTICS.parent}{kind}"

    @property
    def controls(self) -> Path:
        """Where the controls of equal norm go."""
        return self.path / "controls"

    def log(self, run: StudyRun) -> Path:
        """What the run's processes printed."""
        return self.path / "logs" / f"{run.key}.log"

    def add_session(self, seconds: float, runs: int) -> None:
        """Writes down how long the script ran, and for how many runs."""
        append_line(self.path / SESSIONS, {"seconds": round(seconds, 1), "runs": runs})

    def sessions(self) -> list[dict[str, Any]]:
        """How long the script ran each time that it came to its end."""
        path = self.path / SESSIONS
        return list(read_lines(path)) if path.exists() else []

    def claim(self, run: StudyRun, arguments: Sequence[str]) -> None:
        """Writes down how a run is begun. ConfigError where it was begun in another way."""
        path = self.path / "commands" / f"{run.key}.json"
        asked = json.dumps(list(arguments), indent=1) + "\n"
        if path.exists() and path.read_text(encoding="utf-8") != asked:
            raise ConfigError(
                f"{self.path} has a run {run.key!r} with other settings ({path}); give another "
                "folder with --work, or remove that run and this file."
            )
        write_whole(path, asked.encode())


def finished(folder: Path) -> bool:
    """Whether the run of `folder` came to its end."""
    path = folder / SUMMARY
    return path.exists() and read_json(path).get("status") == "finished"


def steps_left(
    run: StudyRun, scale: Scale, work: Work, model: str, train_only: bool = False
) -> list[Step]:
    """What is still to be done of a run; nothing where all of it is there."""
    folder = work.folder(run)
    steps = []
    if not finished(folder):
        steps.append(Step("training", _training(run, scale, folder, model), folder / SUMMARY))
    if not train_only:
        steps += _diagnoses(run, scale, work, model)
    return [step for step in steps if step.title == "training" or not step.result.exists()]


def _diagnoses(run: StudyRun, scale: Scale, work: Work, model: str) -> list[Step]:
    """An ES run from its journal; a checkpoint of fp32 also as bf16 would store it."""
    threads = _threads(scale)
    if run.arm.command == "train":
        kinds = {"": (*scale.diagnostics, *scale.drift_every)}
    else:
        change_alone = ("--no-kl", "--score", "0", "--no-plots")
        kinds = {"": scale.diagnostics, STORED: ("--as-dtype", "bfloat16", *change_alone)}
    steps = []
    for kind, flags in kinds.items():
        output = work.diagnosis(run, kind)
        where = ("forgetting", str(_subject(run, work)), "--base", model, "--output", str(output))
        steps.append(Step("diagnosing", (*where, *flags, *threads), output / DIAGNOSED))
    return steps


def control_step(scale: Scale, work: Work, model: str) -> Step | None:
    """Changes of one length, whatever made them; None before its runs are there, or once done.

    The first seed's l2 run gives the length; ES, the larger population and GRPO are brought to it,
    and so is noise.
    """
    wanted = ("es-l2", "es", "es-large", "grpo")
    runs = {run.arm.key: run for run in scale.runs() if run.seed == SEEDS[0]}
    there = [runs[key] for key in wanted if key in runs and finished(work.folder(runs[key]))]
    result = work.controls / DIAGNOSED
    if len(there) < len(wanted) or result.exists():
        return None
    subjects = [str(_subject(run, work)) for run in there]
    output = ("--base", model, "--output", str(work.controls), "--equal-norm", "whole", "--no-kl")
    flags = (*output, *scale.controls, *_threads(scale))
    return Step("controls", ("forgetting", *subjects, *flags), result)


def _subject(run: StudyRun, work: Work) -> Path:
    """What `esfast forgetting` looks at: a run's journal, or a checkpoint."""
    return work.folder(run) if run.arm.command == "train" else work.folder(run) / MODEL


def first_arguments(run: StudyRun, scale: Scale, folder: Path, model: str) -> tuple[str, ...]:
    """The arguments that begin a run."""
    return (
        *(run.arm.command, "--model", model, *scale.shared),
        *(*scale.of_command[run.arm.command], *run.arm.flags, *_threads(scale)),
        *("--seed", str(run.seed), "--output", str(folder)),
    )


def _threads(scale: Scale) -> tuple[str, ...]:
    return () if scale.threads is None else ("--threads", str(scale.threads))


def _training(run: StudyRun, scale: Scale, folder: Path, model: str) -> tuple[str, ...]:
    if run.arm.command == "train" and (folder / CONFIG).exists():
        return ("train", "--resume", str(folder))
    return first_arguments(run, scale, folder, model)


class Running:
    """The processes of all threads, until they are stopped; what begins afterwards is as well."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """One has begun."""
        self._processes.add(process)
        if self.stopped.is_set():  # since its thread looked
            process.terminate()

    def discard(self, process: subprocess.Popen[bytes]) -> None:
        """One has ended."""
        self._processes.discard(process)

    def stop(self) -> None:
        """Ctrl-C to what runs: esfast finishes the generation's record and closes its journal."""
        self.stopped.set()
        for process in list(self._processes):
            process.terminate()
        for process in list(self._processes):
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)


class Runner:
    """Runs what is left, `jobs` runs at once; tells `note` a line a step."""

    def __init__(
        self,
        scale: Scale,
        work: Work,
        model: str,
        note: Callable[[str], None],
        train_only: bool = False,
    ) -> None:
        self.scale = scale
        self.train_only = train_only
        self.work = work
        self.model = model
        self.note = note
        self._running = Running()

    def left(self, run: StudyRun) -> list[Step]:
        """What is still to be done of a run."""
        return steps_left(run, self.scale, self.work, self.model, self.train_only)

    def run_all(self, runs: Sequence[StudyRun], after: Callable[[StudyRun, float], None]) -> None:
        """All steps of all runs. The first failure, or Ctrl-C, stops the others and is raised."""
        for run in runs:
            folder = self.work.folder(run)
            began = first_arguments(run, self.scale, folder, self.model)
            self.work.claim(run, began)
        with ThreadPoolExecutor(self.scale.jobs) as pool:
            futures = [pool.submit(self._run, run, after) for run in runs]
            try:
                self._wait(futures)
            except BaseException:
                self._running.stop()
                for future in futures:
                    future.cancel()
                raise

    def _wait(self, futures: Sequence[Future[None]]) -> None:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()

    def _run(self, run: StudyRun, after: Callable[[StudyRun, float], None]) -> None:
        started = perf_counter()
        for step in self.left(run):
            if self._running.stopped.is_set():
                return
            self.note(f"{run.key}: {step.title}")
            try:
                self._process(run, step)
            except BaseException:
                self._running.stopped.set()  # before this thread begins the next run
                raise
        after(run, perf_counter() - started)

    def _process(self, run: StudyRun, step: Step) -> None:
        folder = self.work.folder(run)
        if step.title == "training" and "--resume" not in step.arguments and folder.exists():
            shutil.rmtree(folder)  # of a run without a journal that did not come to its end
        if step.title == "diagnosing":
            shutil.rmtree(step.result.parent, ignore_errors=True)  # of one that was cut off
        process(step.arguments, self.work.log(run), self._running)
        if not step.result.exists():
            raise EsfastError(f"{step.title} of {run.key} left no {step.result}.")
        if run.arm.command == "train":
            shutil.rmtree(folder / MODEL, ignore_errors=True)  # the journal is the model


def process(arguments: Sequence[str], log_path: Path, running: Running | None = None) -> None:
    """`esfast ARGUMENTS` in a process that is in `running` meanwhile, its output added to a log.

    Raises EsfastError for an exit code other than 0.
    """
    with log_path.open("ab") as log:
        log.write(f"$ esfast {shlex.join(arguments)}\n".encode())
        log.flush()
        command = [sys.executable, "-m", "esfast", *arguments]
        started = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
        if running is not None:
            running.add(started)
        code = started.wait()
        if running is not None:
            running.discard(started)
    if code:
        raise EsfastError(
            f"`esfast {arguments[0]}` ended with exit code {code}; see {log_path}. The same "
            "command goes on from here."
        )


def _environment() -> dict[str, str]:
    """The processes find the same esfast as this one, wherever they are started."""
    source = str(Path(esfast.__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "COLUMNS": "160"}

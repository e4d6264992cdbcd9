"""What a report reads: run folders, and the diagnostics that `esfast forgetting` left.

Missing parts are None or empty, and the report says so; a damaged file is a DataError. Nothing is
computed here that a file does not say.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError, DataError
from esfast.fast_slow.cycles import Cycle, read_cycles
from esfast.forgetting.subjects import told_apart
from esfast.home_folders import at_home
from esfast.journal import JOURNAL, Journal, read_journal
from esfast.prior.evaluation import PRIOR, read_scores
from esfast.prior.scores import PriorScore
from esfast.run_folder import CONFIG, METRICS, SAMPLES, SUMMARY, read_config, read_json, read_lines

DIAGNOSTICS = Path("forgetting", "forgetting.json")
FORMAT, VERSION = "esfast-forgetting", 1
Record = dict[str, Any]


NEEDED = ("generation", "reward_mean", "reward_spread", "total_seconds")  # of metrics.jsonl


@dataclass(frozen=True)
class Subject:
    """A run or checkpoint that `esfast forgetting` measured: `record` is its SUBJECT, `file` the
    whole forgetting.json that it stands in (esfast/forgetting/__init__.py), `source` where it lies.
    """

    name: str
    record: Mapping[str, Any]
    file: Mapping[str, Any]
    source: Path

    @property
    def last(self) -> Mapping[str, Any] | None:
        """The change at the last measured generation."""
        return self.record["drift"][-1] if self.record["drift"] else None


@dataclass(frozen=True)
class RunData:
    """One run folder.

    name: in legends and tables; path: as it was given; rows: of metrics.jsonl; subject: of esfast
    forgetting, None where it was not run; cycles: of a fast-slow run.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    rows: tuple[Record, ...]
    summary: Mapping[str, Any] | None
    samples: tuple[Record, ...]
    journal: Journal | None
    prior: tuple[PriorScore, ...]
    subject: Subject | None
    cycles: tuple[Cycle, ...] = ()

    @property
    def method(self) -> str:
        """ "ES", "ES + l2", "fast-slow ES" or "GRPO"."""
        if self.command == "grpo":
            return "GRPO"
        decay = self.config["settings"].get("strategy", {}).get("decay")
        plain = "fast-slow ES" if self.command == "fast-slow" else "ES"
        return f"{plain} + {decay['kind']}" if decay else plain

    @property
    def command(self) -> str:
        """Of esfast, that made the run."""
        method = self.config.get("method")
        return str(method) if method in ("grpo", "fast-slow") else "train"

    @cached_property
    def held_out(self) -> tuple[Record, ...]:
        """Scores on the target's held-out prompts, by generation, each once."""
        found = [row["held_out"] for row in self.rows if row.get("held_out")]
        if self.summary:
            ends = [self.summary.get(f"held_out_{when}") for when in ("before", "after")]
            found += [record for record in ends if record]
        return tuple(sorted({r["generation"]: r for r in found}.values(), key=_generation))

    @property
    def before(self) -> Record | None:
        """The held-out score before training; None where no file has it, as of a killed run: it
        stands in the summary alone."""
        return next((r for r in self.held_out if r["generation"] == 0), None)

    @property
    def final(self) -> Record | None:
        """The last held-out score of weights that training moved."""
        return self.held_out[-1] if self.held_out and self.held_out[-1]["generation"] else None

    @property
    def generations(self) -> int:
        """How many there are, by the summary or the lines so far."""
        if self.summary and "generations" in self.summary:
            return int(self.summary["generations"])
        return int(self.rows[-1]["generation"]) if self.rows else 0

    @property
    def failed_rewards(self) -> int | None:
        """Answers of training that could not be scored; None where no generation is written."""
        if self.summary and "failed_rewards" in self.summary:
            return int(self.summary["failed_rewards"])
        return sum(row.get("failed_rewards", 0) for row in self.rows) if self.rows else None

    @property
    def prior_tasks(self) -> list[str]:
        """Names of the prior tasks, in the order of their first scores."""
        return list(dict.fromkeys(score.task for score in self.prior))

    def prior_of(self, task: str) -> list[PriorScore]:
        """A prior task's scores by generation."""
        return sorted((s for s in self.prior if s.task == task), key=lambda s: s.generation)

    @property
    def seed(self) -> int | None:
        """What runs of one family differ in."""
        settings = self.config["settings"]
        found = (settings.get("strategy") or settings).get("seed")
        return None if found is None else int(found)

    @property
    def conditions(self) -> Record:
        """What decides a result beside model, task and settings: the anchor of decay (None without
        decay), the engine, the kind of device, the prior tasks and how they are asked."""
        flags = self.config.get("arguments") or {}
        decay = (self.config["settings"].get("strategy") or {}).get("decay")
        prior = self.config.get("prior") or {}
        only = None if self.command == "grpo" else "transformers"  # before there were more
        return {
            "anchor": (flags.get("anchor_model") or self.config.get("model")) if decay else None,
            "engine": flags.get("engine") or only,
            "device": str(self.config.get("device")).partition(":")[0],
            "prior": prior if prior.get("tasks") else None,
        }

    @property
    def family(self) -> str:
        """Equal for runs that differ in their seed alone."""
        names = ("method", "model", "dtype", "task", "settings")
        kept = {name: self.config.get(name) for name in names}
        kept = json.loads(json.dumps({**kept, **self.conditions}))
        settings = kept["settings"]
        for place in (settings, settings.get("strategy"), settings.get("sampling"), kept["prior"]):
            if place:
                place.pop("seed", None)
        return json.dumps(kept, sort_keys=True)


def read_runs(paths: Sequence[str], names: Sequence[str] | None = None) -> list[RunData]:
    """The runs of these folders, in order.

    names: one a run; else the folders' own, with their parents where two are alike. Raises
    ConfigError for names that do not fit, DataError for a folder that is no run or is damaged.
    """
    folders = [at_home(path) for path in paths]
    if len({folder.resolve() for folder in folders}) != len(folders):
        raise ConfigError("a run is given twice; give each once.")
    own = told_apart([folder.resolve().parts for folder in folders]) or []
    chosen = own if names is None else list(names)
    if len(chosen) != len(folders) or len(set(chosen)) != len(chosen) or not all(chosen):
        raise ConfigError(
            f"--names has {', '.join(chosen)} for {len(folders)} runs; give one name a run, "
            "separated by commas, each another."
        )
    return [read_run(folder, name) for folder, name in zip(folders, chosen, strict=True)]


def read_run(folder: Path, name: str) -> RunData:
    """One run. Raises DataError where `folder` is none, or a file in it is damaged."""
    if not (folder / CONFIG).is_file():
        raise DataError(
            f"'{folder}' is no run folder: it has no {CONFIG}. Give the folder that esfast train, "
            "grpo or fast-slow wrote (its --output)."
        )
    config = read_config(folder)
    journal = read_journal(folder) if (folder / JOURNAL).exists() else None
    if "made" not in config or "settings" not in config:
        raise DataError(f"'{folder / CONFIG}' is not a run's: it has no 'made' or no 'settings'.")
    return RunData(
        name=name,
        path=folder,
        config=config,
        rows=_metrics(folder / METRICS),
        summary=read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else None,
        samples=_samples(folder / SAMPLES),
        journal=journal,
        prior=tuple(read_scores(folder / PRIOR)),
        subject=_own_subject(folder, name, journal),
        cycles=tuple(read_cycles(folder)),
    )


def read_subjects(path: str | Path) -> list[Subject]:
    """All subjects of a forgetting.json, or of the folder that holds one. Raises DataError."""
    given = at_home(path)
    file = given / DIAGNOSTICS.name if given.is_dir() else given
    content = read_json(file)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise DataError(
            f"'{file}' is {content.get('format')!r} version {content.get('version')!r}; expected "
            f"{FORMAT!r} version {VERSION}, as esfast forgetting writes it."
        )
    made_from = _made_from(file.resolve().parent, content)
    return [
        Subject(str(s["name"]), s, content, made_from / at_home(str(s["source"])))
        for s in content["subjects"]
    ]


def _made_from(folder: Path, content: Mapping[str, Any]) -> Path:
    """The folder that a diagnosis was made in: its sources are relative to that, and so is its
    --output, which is `folder`. Where that does not tell, the current one."""
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--output", default="/")
    words = shlex.split(str((content.get("made") or {}).get("command", "")))
    output = Path(parser.parse_known_args(words)[0].output)
    kept = len(folder.parts) - len(output.parts)
    if output.is_absolute() or folder.parts[max(kept, 0) :] != output.parts:
        return Path.cwd()
    return Path(*folder.parts[:kept])


def with_subjects(
    runs: Sequence[RunData], subjects: Sequence[Subject]
) -> tuple[list[RunData], list[Subject]]:
    """The runs with what further diagnostics say of them, and what is of none of them."""
    filled, used = [], set()
    for run in runs:
        found = [s for s in subjects if is_of(s, run.path, run.journal)]
        used |= {id(subject) for subject in found}
        if found:  # runs of one seed have one check value: its own folder's is the better
            best = ([s for s in found if _lies_in(s, run.path)] or found)[-1]
            run = replace(run, subject=replace(best, name=run.name))
        filled.append(run)
    return filled, [subject for subject in subjects if id(subject) not in used]


def _own_subject(folder: Path, name: str, journal: Journal | None) -> Subject | None:
    """The run itself among the subjects of its own diagnostics, or what is alone there."""
    if not (folder / DIAGNOSTICS).exists():
        return None
    subjects = read_subjects(folder / DIAGNOSTICS)
    own = [s for s in subjects if is_of(s, folder, journal)] or (
        subjects if len(subjects) == 1 else []
    )
    return replace(own[0], name=name) if own else None


def is_of(subject: Subject, folder: Path, journal: Journal | None) -> bool:
    """Whether a subject is this run, by its journal's check value, or lies in its folder."""
    chain = subject.record.get("chain")
    if chain is not None and journal is not None:
        return chain in (journal.chains[-1].hex(), journal.chain_at(len(journal.generations)))
    return _lies_in(subject, folder)


def _lies_in(subject: Subject, folder: Path) -> bool:
    source, run = subject.source.resolve(), folder.resolve()
    return source == run or run in source.parents


def _samples(path: Path) -> tuple[Record, ...]:
    return tuple(read_json(path, list)) if path.exists() else ()  # a list, unlike the others


def _metrics(path: Path) -> tuple[Record, ...]:
    rows = _lines(path)
    for number, row in enumerate(rows, start=1):
        missing = [key for key in NEEDED if key not in row]
        if missing:
            raise DataError(f"{path} line {number} has no {missing[0]!r}: it is no generation's.")
    return rows


def _lines(path: Path) -> tuple[Record, ...]:
    return tuple(read_lines(path)) if path.exists() else ()


def _generation(record: Mapping[str, Any]) -> int:
    return int(record["generation"])

"""`esfast forgetting RUN [RUN|CHECKPOINT ...] --base MODEL --output FOLDER`: what has changed.

Replays each run from its journal and measures the change of its weights at chosen generations:
norm, sparsity, energy, by layer and module group; then what the change does to answers, KL in both
directions and scores; with --equal-norm, whether its length or its direction does that. Checkpoints
of any other method stand beside runs. docs/forgetting.md says what each number is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from esfast.diagnosis.files import write_files
from esfast.diagnosis.prompts import prompt_sets
from esfast.diagnosis.recorded import recorded_anchor
from esfast.diagnosis.records import unscored
from esfast.diagnosis.steps import Steps
from esfast.diagnosis.table import print_tables
from esfast.errors import ConfigError
from esfast.forgetting.answers import Pair, PromptSet
from esfast.forgetting.change import THRESHOLDS, ULPS
from esfast.forgetting.divergence import SampleSettings
from esfast.forgetting.drift import DriftReport, Tensors, drift
from esfast.forgetting.energy import SHARES
from esfast.forgetting.equal_norm import Difference, RandomDirection
from esfast.forgetting.groups import GROUPS
from esfast.forgetting.subjects import Base, Moment, Run, Subject, names_of, open_subject
from esfast.home_folders import place
from esfast.models import model_folder
from esfast.plots import require_plots
from esfast.provenance import provenance
from esfast.run_folder import require_free
from esfast.train_flags import DTYPES, add_task_flags, natural, positive, thread_count

LENGTHS = ("whole", "tensor")


def add_forgetting_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast forgetting`."""
    parser.add_argument("subjects", nargs="+", metavar="RUN", help="run folder, or a checkpoint's")
    parser.add_argument("--base", required=True, metavar="MODEL", help="the runs' --model")
    parser.add_argument(
        "--anchor-model",
        default=None,
        metavar="MODEL",
        help="the runs' own, where config.json does not lead to it",
    )
    parser.add_argument(
        "--output", required=True, type=place, metavar="FOLDER", help="new or empty"
    )
    parser.add_argument("--at", default="last", help="generations, such as 0,10,last")
    parser.add_argument("--every", type=positive, default=None, help="and every so many of them")
    parser.add_argument("--as-dtype", choices=DTYPES, default=None, help="compare as stored in it")
    parser.add_argument("--threads", type=thread_count, default=None, help="all cores if not given")
    parser.add_argument("--device", default="cpu", help="of the replay and of the answers")
    parser.add_argument(
        "--plots", action=argparse.BooleanOptionalAction, default=True, help="PNGs in --output"
    )
    _add_answer_flags(parser.add_argument_group("answers"))
    add_task_flags(parser.add_argument_group("target task; the first run's own if not given"))


def _add_answer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kl", action=argparse.BooleanOptionalAction, default=True, help="in both directions"
    )
    group.add_argument("--kl-at", default="last", help="generations, as --at")
    group.add_argument("--kl-prompts", default=None, metavar="TASK,...", help="prior tasks, too")
    group.add_argument("--kl-count", type=positive, default=32, help="prompts a task")
    group.add_argument("--kl-tokens", type=positive, default=32, help="of an answer at most")
    group.add_argument("--kl-samples", type=positive, default=1, help="answers a prompt")
    group.add_argument("--kl-seed", type=natural, default=0, help="of the answers")
    group.add_argument("--kl-dtype", choices=DTYPES, default="float32", help="of both models")
    group.add_argument("--score", type=natural, default=64, help="prompts a task; 0: no scores")
    group.add_argument(
        "--score-tokens",
        type=positive,
        default=None,
        help="the first run's --max-new-tokens on its own task, else the task's own",
    )
    group.add_argument(
        "--equal-norm", choices=LENGTHS, default=None, help="controls: changes of one length"
    )
    group.add_argument("--random-directions", type=natural, default=1, help="of the controls")
    group.add_argument("--batch-size", type=positive, default=32, help="rows decoded together")


@dataclass
class Reference:
    """The change whose length the controls take: the first subject's last one."""

    name: str
    report: DriftReport
    base: Tensors

    def length(self, by: str) -> float | dict[str, float]:
        """In all, or tensor by tensor."""
        if by == "whole":
            return self.report.whole.norm
        return {tensor.name: tensor.change.norm for tensor in self.report.tensors}


@dataclass
class Diagnosis:
    """One call of the command on its way: what is measured, with what, and what came of it."""

    args: argparse.Namespace
    base: Base
    sets: Sequence[PromptSet]
    steps: Steps
    pair: Pair | None = None
    notes: list[str] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)
    reference: Reference | None = None

    @property
    def total(self) -> int:
        """Elements of the base."""
        return sum(tensor.numel() for tensor in self.base.tensors.values())

    def subject(self, subject: Subject) -> dict[str, Any]:
        """SUBJECT of forgetting.json."""
        record = {**subject.record(), "drift": [], "kl": [], "scores": []}
        self.notes += subject.notes()
        every = subject.generations(_words(self.args.at), self.args.every)
        answered = subject.generations(_words(self.args.kl_at), None) if self.pair else []
        at = sorted({*every, *answered}, key=lambda generation: generation or 0)
        replaying = partial(self._replaying, subject.name)
        machine = (self.args.threads, self.args.device)
        for moment in subject.moments(self.base, at, replaying, *machine):
            report = self._drift(subject.name, moment)
            known = {"generation": moment.generation, "checksum": moment.checksum}
            record["drift"].append({**known, **report.record()})
            if self.pair is not None and moment.generation in answered:
                self.pair.put(moment.tuned)
                self._answers(subject.name, moment.generation, record)
            if moment.generation == at[-1] and self.args.equal_norm:
                self._control(subject.name, moment, report)
        return record

    def _replaying(self, name: str, done: int, wanted: int) -> None:
        self.steps.show(f"{name}: replaying to generation {wanted}", done, wanted)

    def _drift(self, name: str, moment: Moment) -> DriftReport:
        at = "" if moment.generation is None else f" at generation {moment.generation}"
        told = partial(self.steps.show, f"{name}: drift{at}", total=self.total)
        dtype = None if self.args.as_dtype is None else getattr(torch, self.args.as_dtype)
        report = drift(moment.base, moment.tuned, dtype=dtype, after=told)
        for alone in sorted(set(moment.base) ^ set(moment.tuned)):  # tied in the other
            where = "the base" if alone in moment.base else name
            note = f"{name}: '{alone}' is stored by {where} alone and is not compared."
            if note not in self.notes:
                self.notes.append(note)
        return report

    def _answers(self, name: str, generation: int | None, record: dict[str, Any]) -> None:
        """KL and scores of the pair's tuned model, added to `record`."""
        assert self.pair is not None
        for prompts in self.sets:
            if self.args.kl:
                few = prompts.first(self.args.kl_count)
                total = len(few.examples) * self.args.kl_samples
                told = partial(self.steps.show, f"{name}: KL on {prompts.name}", total=total)
                told(0)
                record["kl"] += self.pair.kl(few, generation, told)
            if self.args.score:
                self.steps.show(f"{name}: scoring {prompts.name}", 0, 1)
                score = self.pair.score(prompts.first(self.args.score), generation)
                record["scores"].append(score)
                self.notes += unscored(name, score)

    def _control(self, name: str, moment: Moment, report: DriftReport) -> None:
        if self.reference is None:
            self.reference = Reference(name, report, moment.base)
        if report.whole.norm == 0.0 or self.reference.report.whole.norm == 0.0:
            self.notes.append(f"{name} did not change the weights: it has no control.")
            return
        direction = Difference(moment.base, moment.tuned)
        self._moved(name, "subject", moment.generation, direction, None)

    def random_controls(self) -> None:
        """Noise of the reference's length."""
        if self.reference is None or self.reference.report.whole.norm == 0.0:
            return
        for seed in range(self.args.random_directions):
            direction = RandomDirection(self.reference.base, seed)
            self._moved(f"random direction {seed}", "random", None, direction, seed)

    def _moved(
        self, name: str, kind: str, generation: int | None, direction: Tensors, seed: int | None
    ) -> None:
        assert self.pair is not None and self.reference is not None
        self.steps.show(f"{name}: brought to one length", 0, 1)
        length = self.reference.length(self.args.equal_norm)
        done = self.pair.move(self.reference.base, direction, length)
        record: dict[str, Any] = {
            "name": name,
            "kind": kind,
            "generation": generation,
            "norm": done.norm,
            "scale": done.scale,
            "seed": seed,
            "kl": [],
            "scores": [],
        }
        self._answers(f"{name}, one length", generation, record)
        self.controls.append(record)

    def equal_norm(self) -> dict[str, Any] | None:
        """EQUAL_NORM of forgetting.json."""
        if self.reference is None or not self.controls:
            return None
        return {
            "norm": self.reference.report.whole.norm,
            "reference": self.reference.name,
            "by": self.args.equal_norm,
            "controls": self.controls,
        }

    def base_scores(self) -> list[dict[str, Any]]:
        """The base's own."""
        if self.pair is None or not self.args.score:
            return []
        scores = [self.pair.score_base(prompts.first(self.args.score)) for prompts in self.sets]
        self.notes += [note for score in scores for note in unscored("base", score)]
        return scores


def run_forgetting(args: argparse.Namespace) -> int:
    """Measures, writes, prints. What can be refused is refused before a model is loaded."""
    output = Path(args.output)
    require_free(output)
    require_plots(args.plots)
    subjects = _subjects(args)
    for subject in subjects:
        subject.generations(_words(args.at), args.every)
        subject.generations(_words(args.kl_at), None)
    notes: list[str] = []
    sets = prompt_sets(args, notes) if args.kl or args.score else []
    console = Console(markup=False, emoji=False)  # it shows names of runs and tasks
    try:
        _require_answers(args, sets)
        base = Base.of(args.base)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        with Steps(console) as steps:
            pair = _pair(args, base) if sets else None
            found = _measured(Diagnosis(args, base, sets, steps, pair, notes), subjects)
    finally:
        for prompts in sets:
            prompts.task.close()
    written = write_files(output, found, args.plots)
    print_tables(console, found)
    console.print(f"{len(written)} files in {output}", highlight=False, soft_wrap=True)
    return 0


def _subjects(args: argparse.Namespace) -> list[Subject]:
    """What the command line names. ConfigError for an anchor that no run's decay pulls to."""
    given = [] if args.anchor_model is None else [model_folder(args.anchor_model)]
    subjects = [
        open_subject(source, name, _elsewhere(args.base, [*given, *recorded_anchor(source)]))
        for source, name in zip(args.subjects, names_of(args.subjects), strict=True)
    ]
    if given and not any(isinstance(s, Run) and s.journal.header.config.decay for s in subjects):
        raise ConfigError(
            f"none of the runs has weight decay, so nothing pulls to --anchor-model "
            f"{args.anchor_model}; leave it out."
        )
    return subjects


def _elsewhere(base: str, anchors: Sequence[Path]) -> list[Path]:
    """Those that are not the base, whose file need not have the checksum of a run's weights."""
    if not anchors:
        return []
    own = model_folder(base).resolve()
    return [folder for folder in anchors if folder.resolve() != own]


def _measured(diagnosis: Diagnosis, subjects: Sequence[Subject]) -> dict[str, Any]:
    """forgetting.json."""
    pair = diagnosis.pair
    records = [diagnosis.subject(subject) for subject in subjects]
    diagnosis.random_controls()
    return {
        "format": "esfast-forgetting",
        "version": 1,
        "made": provenance(diagnosis.args.command_line),
        "base": diagnosis.base.record(),
        "groups": list(GROUPS),
        "thresholds": list(THRESHOLDS),
        "ulps": list(ULPS),
        "energy_shares": list(SHARES),
        "subjects": records,
        "samples": pair.record() if pair is not None and diagnosis.args.kl else None,
        "base_scores": diagnosis.base_scores(),
        "equal_norm": diagnosis.equal_norm(),
        "notes": diagnosis.notes,
    }


def _pair(args: argparse.Namespace, base: Base) -> Pair:
    settings = SampleSettings(args.kl_tokens, args.kl_samples, args.kl_seed)
    return Pair(base, getattr(torch, args.kl_dtype), args.device, args.batch_size, settings)


def _require_answers(args: argparse.Namespace, sets: Sequence[PromptSet]) -> None:
    if args.equal_norm and not sets:
        raise ConfigError(
            "--equal-norm compares answers, and there are no prompts to answer: give --task or "
            "--kl-prompts, and leave --kl or --score on."
        )
    for prompts in sets:
        there = len(prompts.examples)
        if args.kl and min(there, args.kl_count) < 2:
            mend = "raise --kl-count" if there > 1 else "give it more held-out ones (--eval-data)"
            raise ConfigError(
                f"KL on {prompts.name} has {min(there, args.kl_count)} prompt; an interval takes 2 "
                f"or more: {mend}, or leave KL out with --no-kl."
            )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]

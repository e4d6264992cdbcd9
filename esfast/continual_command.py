"""`esfast continual`: one task after another from the same weights, resumable at any moment.

    esfast continual --tasks arithmetic,questions:plurals --generations 20,20 \\
        --weight-decay-type l2 --weight-decay-lambda auto --anchor original --output runs/two
    esfast continual --resume runs/two

Every stage is a run as `esfast train` makes it, from the model that the stage before saved. All
tasks of the sequence, and --prior-tasks, are evaluated throughout. One process: no torchrun.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from esfast import continual_plots
from esfast.continual import Stage, chain_of, handed_on, plan, results
from esfast.continual.stages import CONTINUAL, SEEDS_A_STAGE
from esfast.errors import ConfigError, DataError, EsfastError
from esfast.home_folders import place
from esfast.loggers import require_packages
from esfast.models import load_model, require_transformers
from esfast.parameters import ParameterTable
from esfast.plots import draw_run, require_plots
from esfast.prior import PriorTasks
from esfast.prior.evaluation import OwnTask, PriorTask, label
from esfast.prior.scores import KINDS
from esfast.provenance import provenance
from esfast.resume import PastRun, flag_of, flags_of, given_flags
from esfast.run_folder import (
    CONFIG,
    PLOTS,
    alone,
    folder_for,
    read_config,
    read_json,
    require_free,
)
from esfast.train_command import run_job
from esfast.train_flags import add_train_arguments, prior_of, strategy_of, task_of
from esfast.weights import Weights
from esfast.whole_file import remove_leftover_files, write_whole

ANCHORS = ("original", "stage")
ONE_TASK = ("task", "data", "eval_data", "reward")
"""Flags of `esfast train` that name its one task."""


def add_continual_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `esfast train`, but a list of tasks for one, each with its generations."""
    parser.conflict_handler = "resolve"  # the flags below replace those of the same name
    add_train_arguments(parser)
    group = parser.add_argument_group("sequence")
    group.add_argument(
        "--tasks",
        default=None,
        metavar="A,B,C",
        help="tasks, FILE.jsonl with answers, or FILE.jsonl@module:function with a reward",
    )
    group.add_argument(
        "--task-option", action="append", default=[], metavar="TASK:NAME=VALUE",
        help="such as countdown:max_target=50; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--generations", default="10", metavar="N,N,N", help="of each stage, or one number for all"
    )
    group.add_argument("--anchor", choices=ANCHORS, default="original", help="what decay pulls to")
    group.add_argument(
        "--resume", default=None, type=place, metavar="DIR", help="go on with this folder"
    )


@dataclass(frozen=True)
class TaskSequence:
    """The flags of a sequence, where it lies, its stages, and how it was made."""

    args: argparse.Namespace
    folder: Path
    stages: list[Stage]
    made: Mapping[str, Any]


def run_continual(args: argparse.Namespace) -> int:
    """The stages that are left; returns the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "esfast continual is one process; run its stages with torchrun and esfast train "
            "--model STAGE/model instead."
        )
    sequence = _begun(args) if args.resume is None else _taken_up(args)
    with alone(sequence.folder):
        return _run(sequence, new=args.resume is None)


def _run(sequence: TaskSequence, new: bool) -> int:
    if new:
        _write(sequence, "running")
    else:
        remove_leftover_files(sequence.folder, sequence.folder / PLOTS)
    for stage in sequence.stages:
        if stage.finished:
            _redraw(sequence, stage)
            continue
        code = _started(sequence, stage, new)
        _write(sequence, "stopped" if code else "running")
        if code:
            return code
        gc.collect()  # the stage's model, before the next is loaded
    _write(sequence, "finished")
    if sequence.args.plots:
        continual_plots.draw_continual(sequence.folder)
    found = read_json(sequence.folder / CONTINUAL)
    for line in [*result_lines(found), f"folder: {sequence.folder}"]:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _begun(args: argparse.Namespace) -> TaskSequence:
    """A new sequence, after everything was refused that can be."""
    given = [name for name in ONE_TASK if getattr(args, name) is not None]
    if given:
        said = f"{flag_of(given[0])} is of a single task"
        raise ConfigError(f"{said}; give a sequence with --tasks A,B,C.")
    if args.anchor == "stage" and args.anchor_model is not None:
        raise ConfigError("--anchor stage and --anchor-model are two anchors; leave one out.")
    if args.anchor == "stage" and args.weight_decay_type == "none":
        raise ConfigError(
            "--anchor stage needs --weight-decay-type l1 or l2: without decay nothing pulls to it."
        )
    sources, counts = _sources(args.tasks), _counts(args)
    folder = folder_for(args.output, "continual")
    stages = plan(folder, sources, counts)
    sequence = TaskSequence(args, folder, stages, provenance(args.command_line))
    require_transformers()
    require_packages(args.log_to)
    require_plots(args.plots)
    for stage in stages:
        of_stage = stage_args(sequence, stage)
        strategy_of(of_stage)
        task_of(of_stage).close()
    _prior(sequence, stages[0]).close()
    require_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return sequence


def _taken_up(args: argparse.Namespace) -> TaskSequence:
    """A sequence that goes on with its own flags. Raises ConfigError where others are given."""
    start = args.command_line.index("continual") + 1
    given = given_flags(args.command_line[start:], add_continual_arguments)
    others = sorted(given.keys() - {"resume"})
    if others:
        raise ConfigError(f"a sequence goes on with its own flags; leave out {flag_of(others[0])}.")
    folder = Path(args.resume)
    recorded = read_json(folder / CONTINUAL)
    flags = recorded.get("arguments")
    if not isinstance(flags, dict):
        raise DataError(f"{folder / CONTINUAL} does not say with which flags it started.")
    merged = argparse.Namespace(**{**vars(args), **flags, "resume": None})
    stages = plan(folder, _sources(merged.tasks), _counts(merged))
    sequence = TaskSequence(merged, folder, stages, recorded["made"])
    _require_chain(sequence)
    return sequence


def _require_chain(sequence: TaskSequence) -> None:
    """The stages that are there fit together, and so does the model that the next starts from."""
    finished = [stage for stage in sequence.stages if stage.finished]
    links = chain_of(finished)
    if not links or len(finished) == len(sequence.stages):
        return
    last = finished[-1]
    model = load_model(last.model, dtype=getattr(torch, sequence.args.dtype)).model
    seen = Weights(ParameterTable.from_module(model)).checksum()
    if seen != links[-1]["end_checksum"]:
        raise DataError(
            f"{last.model} has weights with checksum {seen}, and {last.folder} ended with "
            f"{links[-1]['end_checksum']}: it was changed since. Restore it with esfast replay."
        )


def _redraw(sequence: TaskSequence, stage: Stage) -> None:
    """The pictures of a stage that was over: it may have been killed before they were drawn."""
    remove_leftover_files(stage.folder / PLOTS)
    if sequence.args.plots:
        draw_run(stage.folder)


def _started(sequence: TaskSequence, stage: Stage, new: bool) -> int:
    """`_run_stage`; a `new` sequence that is refused before any stage has a folder leaves none."""
    try:
        return _run_stage(sequence, stage)
    except EsfastError:
        if new and not any(one.folder.exists() for one in sequence.stages):
            (sequence.folder / CONTINUAL).unlink(missing_ok=True)
            with suppress(OSError):  # something else is in it
                sequence.folder.rmdir()
        raise


def _run_stage(sequence: TaskSequence, stage: Stage) -> int:
    args = stage_args(sequence, stage)
    past = None
    if (stage.folder / CONFIG).exists():
        past = PastRun(args, read_config(stage.folder), {})
    elif stage.folder.exists():  # killed before it had written anything
        _require_nothing_in(stage.folder)
        shutil.rmtree(stage.folder)
    return run_job(args, past, lambda _: _prior(sequence, stage))


def _require_nothing_in(folder: Path) -> None:
    """DataError for a stage that wrote something and has lost the file that says what it is."""
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if there:
        raise DataError(
            f"{folder} holds {', '.join(there[:3])} but no {CONFIG}, so the stage cannot go on. "
            "Put the file back, or move the folder away to train the stage again."
        )


def stage_args(sequence: TaskSequence, stage: Stage) -> argparse.Namespace:
    """The flags with which `esfast train` would run the stage."""
    args = sequence.args
    earlier = sequence.stages[: stage.number - 1]
    model = str(earlier[-1].model) if earlier else args.model
    anchor = args.anchor_model
    if args.weight_decay_type != "none" and args.anchor == "original" and earlier:
        anchor = anchor or args.model
    return argparse.Namespace(
        **{
            **vars(args),
            **_named(stage.source, args),
            "generations": stage.generations,
            "seed": args.seed + SEEDS_A_STAGE * (stage.number - 1),
            "model": model,
            "anchor_model": anchor,
            "output": str(stage.folder),
            "stages_left": len(sequence.stages) - stage.number + 1,
        }
    )


def _named(source: str, args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `esfast train` that name the task of a stage."""
    options = [_option(text, args.tasks) for text in args.task_option]
    own = [option for name, option in options if name == source]
    file, at, reward = source.partition("@")
    if not file.endswith(".jsonl"):
        return {"task": source, "task_option": own}
    if at:
        return {"task": None, "data": file, "reward": reward, "task_option": own}
    return {"task": "questions", "data": file, "task_option": own}


def _option(text: str, tasks: str) -> tuple[str, str]:
    """(task, NAME=VALUE) of a --task-option."""
    name, equals, value = text.partition("=")
    task, colon, option = name.rpartition(":")
    if not (equals and colon and option) or task not in _sources(tasks):
        raise ConfigError(f"--task-option {text!r} is not of the form TASK:NAME=VALUE, with a TASK "
                          f"of --tasks {tasks}.")  # fmt: skip
    return task, f"{option}={value}"


def _prior(sequence: TaskSequence, stage: Stage) -> PriorTasks:
    """All tasks of the sequence, and the --prior-tasks; what the stage before ended with is known
    of its weights."""
    args = sequence.args
    extra = prior_of(args)
    tasks: list[PriorTask] = []
    try:
        for source in dict.fromkeys(stage.source for stage in sequence.stages):
            of_one = argparse.Namespace(**{**vars(args), **_named(source, args)})
            tasks.append(OwnTask(source, task_of(of_one), extra.settings, args.max_new_tokens))
        known = handed_on(sequence.stages[stage.number - 2]) if stage.number > 1 else []
        return PriorTasks([*tasks, *extra.tasks], extra.settings, known)
    except BaseException:
        for task in [*tasks, *extra.tasks]:
            task.close()
        raise


def _write(sequence: TaskSequence, status: str) -> None:
    """continual.json, from the stages' folders."""
    args, stages = sequence.args, sequence.stages
    found = {
        "format": "esfast-continual",
        "version": 1,
        "made": sequence.made,
        "status": status,
        "tasks": [label(stage.source) for stage in stages],
        "generations": [stage.generations for stage in stages],
        "decay": args.weight_decay_type,
        "anchor": args.anchor if args.weight_decay_type != "none" else None,
        "arguments": flags_of(args, add_continual_arguments),
        "stages": chain_of([stage for stage in stages if stage.finished]),
        "results": results(stages),
    }
    data = json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n"
    write_whole(sequence.folder / CONTINUAL, data)


def _sources(text: str | None) -> list[str]:
    names = [name.strip() for name in (text or "").split(",")]
    if not all(names):
        seen = "is not given" if text is None else f"is {text!r}"
        raise ConfigError(f"--tasks {seen}; write the sequence as --tasks A,B,C.")
    return names


def _counts(args: argparse.Namespace) -> list[int]:
    """Generations a stage."""
    tasks = len(_sources(args.tasks))
    parts = [part.strip() for part in str(args.generations).split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--generations {args.generations!r} is not of the form 100,100,100.")
    counts = [int(part) for part in parts]
    counts = counts * tasks if len(counts) == 1 else counts
    if len(counts) != tasks:
        raise ConfigError(
            f"--generations has {len(counts)} numbers and --tasks {tasks} names; give as many, or "
            "one number for all."
        )
    return counts


def result_lines(found: Mapping[str, Any]) -> list[str]:
    """A table of scores a kind of answer, and below it what came of every trained task."""
    lines: list[str] = []
    for kind in KINDS:
        part = found["results"][kind]
        if part is not None:
            lines += ["", f"{kind} scores after each stage", *_table(part["matrix"])]
            lines += [_outcome(task) for task in part["tasks"] if task["own_stage"]]
    return lines


def _table(matrix: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(matrix[0]["scores"])
    width = max(len(name) for name in names)
    heads = continual_plots.heads_of(matrix)
    wide = [max(7, len(head)) for head in heads]
    lines = [" " * width + "".join(f"  {h:>{w}}" for h, w in zip(heads, wide, strict=True))]
    for name in names:
        cells = [row["scores"][name] for row in matrix]
        shown = [f"{cell['score']:.3f}" if cell else "-" for cell in cells]
        row = "".join(f"  {text:>{w}}" for text, w in zip(shown, wide, strict=True))
        lines.append(f"{name:{width}}{row}")
    return lines


def _outcome(task: Mapping[str, Any]) -> str:
    parts = [f"{task['task']} (stage {task['own_stage']})"]
    for name in ("learned", "forward_transfer", "backward_transfer"):
        one = task[name]
        if one is not None:
            spread = one["value_95"]
            shown = f" [{spread[0]:+.3f}, {spread[1]:+.3f}]" if spread else ""
            parts.append(f"{name.replace('_', ' ')} {one['value']:+.3f}{shown}")
    if task["kept_of_peak"] is not None:
        parts.append(f"kept {task['kept_of_peak']:.2f} of its peak {task['peak']:.3f}")
    return "  ".join(parts)

"""`esfast grpo`: the GRPO baseline, from flags to a run folder like that of `esfast train`.

The defaults are those of the default job: SmolLM2-135M-Instruct on small sums, minutes on two
cores.
"""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esfast.checkpoint import save_model
from esfast.disk_room import require_disk_for_grpo
from esfast.errors import ConfigError, DataError
from esfast.grpo import CHECKPOINTS, COMPUTE_DTYPES, GrpoConfig, GrpoRun
from esfast.grpo_trl import SETTINGS, newest_checkpoint, require_trl
from esfast.idle_flags import told_idle
from esfast.loggers import make_loggers, require_packages
from esfast.measure import Clock
from esfast.models import DEFAULT_MODEL, without_bars
from esfast.opening import open_transformers
from esfast.plots import require_plots
from esfast.prior import PriorTasks
from esfast.prompt_room import Dealt, require_prompts_fit
from esfast.provenance import provenance, version
from esfast.report import exit_code, print_result
from esfast.resume import PastRun, flags_of, resumed
from esfast.run_folder import METRICS, MODEL, RunFolder, alone, folder_for, require_free
from esfast.tasks import Task
from esfast.train_flags import (
    above_zero,
    add_prior_flags,
    add_run_flags,
    add_task_flags,
    natural,
    not_negative,
    positive,
    prior_of,
    sampling_of,
    settings_of,
    task_of,
    thread_count,
)
from esfast.training_run import require_not_over

DTYPES = ("float32", "bfloat16")
TUNED = (
    "the default learning rate, by short runs of SmolLM2-135M-Instruct on the arithmetic task "
    "(docs/forgetting.md); another model or task needs its own"
)
NOT_TUNED = (
    "group size, prompts a generation, beta, epsilon, temperature; all else is TRL's default"
)


def add_grpo_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast grpo`."""
    _add_model_flags(parser.add_argument_group("model"))
    add_task_flags(parser.add_argument_group("task"))
    _add_grpo_flags(parser.add_argument_group("GRPO"))
    run = parser.add_argument_group("run")
    run.add_argument("--generations", "--steps", type=positive, default=10, help="batches")
    add_run_flags(run, prompts=8)
    run.add_argument("--checkpoint-every", type=natural, default=0, help="generations; 0: never")
    add_prior_flags(parser.add_argument_group("prior tasks"))


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub name")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="trained, and saved")
    group.add_argument(
        "--compute-dtype",
        choices=COMPUTE_DTYPES,
        default="float32",
        help="of products of float32 weights",
    )
    group.add_argument("--device", default="cpu", help="cpu, or cuda")
    group.add_argument("--threads", type=thread_count, default=None, help="all cores if not given")
    group.add_argument("--batch-size", type=positive, default=64, help="rows decoded together")


def _add_grpo_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--learning-rate", type=not_negative, default=3e-5, help="AdamW's")
    group.add_argument("--group-size", type=positive, default=8, help="completions a prompt")
    group.add_argument("--iterations", type=positive, default=1, help="optimiser steps a batch")
    group.add_argument("--beta", type=not_negative, default=0.0, help="weight of KL to the start")
    group.add_argument("--epsilon", type=above_zero, default=0.2, help="clipping of the ratio")
    group.add_argument("--temperature", type=above_zero, default=1.0, help="of the completions")
    group.add_argument("--micro-batch", type=positive, default=16, help="completions a pass")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower")
    group.add_argument("--seed", type=natural, default=0, help="of prompts and completions")


def run_grpo(args: argparse.Namespace) -> int:
    """The run; returns the exit code. What can be refused is refused before a model is loaded."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("esfast grpo is one process; run it without torchrun.")
    clock = Clock(args.started_before)
    past = resumed(args, add_grpo_arguments) if args.resume is not None else None
    args = past.args if past is not None else args
    require_trl()
    require_packages(args.log_to)
    require_plots(args.plots)
    task = task_of(args)
    with closing(task), closing(prior_of(args)) as prior:
        config = settings_of(GrpoConfig, args, sampling=sampling_of(args, task))
        return _train(args, config, task, prior, past, clock)


def _train(
    args: argparse.Namespace,
    config: GrpoConfig,
    task: Task,
    prior: PriorTasks,
    past: PastRun | None,
    clock: Clock,
) -> int:
    output = folder_for(args.output, f"grpo-{task.name}")
    description = {**_description(args, config, task), "prior": prior.describe()}
    if past is None:
        require_free(output)
        done, checkpoint, changes = 0, None, None
    else:
        description, changes = past.described(description), past.changes
        done, checkpoint = _goes_on_from(
            output, past.recorded["arguments"].get("checkpoint_every", 0)
        )
        require_not_over(config.generations, done)
    loaded, engine = open_transformers(args)
    require_disk_for_grpo(engine, config, output, done, past is not None)
    require_prompts_fit(engine, task, Dealt(config, config.seed), prior)
    run = GrpoRun(
        engine,
        task,
        config,
        RunFolder(output, description, changes, done),
        save_model=lambda path: without_bars()(save_model)(loaded, path, made=description),
        loggers=make_loggers(args.log_to, output, description),
        clock=clock,
    )
    run.prior = prior
    for line in [*_said(args, run), *told_idle(args, add_grpo_arguments)]:
        run.progress.note(line)
    if past is not None and checkpoint is None:
        run.progress.note("stopped before its first checkpoint: the run begins anew")
    with alone(output):
        result = run.run(checkpoint)
    print_result(run.progress.console, result, output)
    return exit_code(result, output, config, draw=args.plots)


def _goes_on_from(run: Path, every: int) -> tuple[int, Path | None]:
    """Generation and folder of the newest checkpoint; 0 and None for a run that was stopped before
    its first and so begins anew. DataError where more is there, which that would replace."""
    found = newest_checkpoint(run / CHECKPOINTS)
    if found is not None:
        return found
    metrics = run / METRICS
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if (run / MODEL).exists() or 0 < every < lines:
        raise DataError(
            f"{run / CHECKPOINTS} holds no whole checkpoint to go on from, and the run is past its "
            "beginning. Put back what it had, or start a new run; --checkpoint-every N writes them."
        )
    return 0, None


def _description(args: argparse.Namespace, config: GrpoConfig, task: Task) -> dict[str, Any]:
    return {
        "made": provenance(args.command_line, ["trl"]),
        "method": "grpo",
        "model": str(args.model),
        "dtype": args.dtype,
        "device": args.device,
        "task": task.describe(),
        "settings": asdict(config),
        "tuning": {"tuned": TUNED, "not_tuned": NOT_TUNED, "fixed": dict(SETTINGS)},
        "arguments": flags_of(args, add_grpo_arguments),
    }


def _said(args: argparse.Namespace, run: GrpoRun) -> list[str]:
    """What is trained and how, for the console."""
    config = run.config
    steps = f"{config.iterations} step{'s' if config.iterations > 1 else ''}"
    return [
        f"GRPO through TRL {version('trl')}: all {run.account.parameters / 1e6:.1f} M weights in "
        f"{args.dtype} (products in {config.compute_dtype}), {SETTINGS['optimizer']}, learning "
        f"rate {config.learning_rate:g}, "
        f"{SETTINGS['learning_rate_schedule']}",
        f"a generation: {config.prompts} prompts x {config.group_size} completions, {steps}; "
        f"beta {config.beta:g}, epsilon {config.epsilon:g}, temperature "
        f"{config.sampling.temperature:g}",
        f"tuned: {TUNED}; not tuned: {NOT_TUNED} or as config.json says",
    ]

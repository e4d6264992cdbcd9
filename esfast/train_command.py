"""`esfast train`: from flags to a model, a task, an engine and a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esfast import plots
from esfast.checkpoint import LoadedModel, save_model
from esfast.journal import parse
from esfast.launch.torchrun import join_workers
from esfast.launch.workers import Workers
from esfast.loggers import make_loggers, require_packages
from esfast.measure import Clock
from esfast.models import load_model, model_folder
from esfast.prior import PriorTasks
from esfast.provenance import provenance
from esfast.replay import catch_up
from esfast.report import print_result
from esfast.resume import PastRun, flags_of, resumed
from esfast.rollout import Rollout, TrainConfig, follow, strategy_over
from esfast.run_folder import RunFolder, require_free
from esfast.snapshots import SNAPSHOTS
from esfast.tasks import Task
from esfast.train import Trainer
from esfast.train_flags import (
    add_train_arguments,
    config_of,
    prior_of,
    strategy_of,
    task_of,
    told_decay,
)

if TYPE_CHECKING:
    from esfast.engines.transformers import TransformersEngine

INTERRUPTED = 130
SEED_DERIVATION = (
    "member k of generation g has the seed that docs/noise.md derives from (run seed, g, k), an "
    "antithetic pair the seed of k // 2; journal.esj has the coefficients (docs/journal.md)"
)


def run_train(args: argparse.Namespace) -> int:
    """The run; returns the exit code. What can be refused is refused before a model is loaded."""
    past = resumed(args, add_train_arguments) if args.resume is not None else None
    return run_job(args if past is None else past.args, past, prior_of)


def run_job(
    args: argparse.Namespace,
    past: PastRun | None,
    prior_tasks: Callable[[argparse.Namespace], PriorTasks],
) -> int:
    """One training with the flags of `args`; past: of a run that goes on. Returns the exit code.

    prior_tasks: what makes the prior tasks of the run's flags.
    """
    clock = Clock(args.started_before)
    strategy = strategy_of(args)
    require_packages(args.log_to)
    task = task_of(args)
    workers = join_workers()
    try:
        config = config_of(args, strategy, task)
        if workers.rank:
            return _follow(args, config, task, workers)
        with closing(prior_tasks(args)) as prior:
            return _train(args, config, task, prior, past, clock, workers)
    finally:
        workers.close()
        task.close()


def _train(
    args: argparse.Namespace,
    config: TrainConfig,
    task: Task,
    prior: PriorTasks,
    past: PastRun | None,
    clock: Clock,
    workers: Workers,
) -> int:
    output = _output(args, task)
    description = {**_description(args, config, task), "prior": prior.describe()}
    if past is None:
        require_free(output)
    else:
        description = past.described(description)
    loaded, engine = _model(args)
    trainer = Trainer(
        engine,
        task,
        config,
        RunFolder(output, description, None if past is None else past.changes),
        save_model=lambda path: save_model(loaded, path, made=description),
        anchor=_anchor(args, loaded),
        loggers=make_loggers(args.log_to, output, description),
        clock=clock,
    )
    trainer.rollout.workers = workers
    trainer.prior = prior
    for line in told_decay(args, config.strategy):
        trainer.progress.note(line)
    result = trainer.run()
    print_result(trainer.progress.console, result, output)
    if args.plots:
        plots.draw_run(output)
    if result.status == "interrupted":
        print(
            f"esfast: interrupted; {output} is complete up to generation {result.generations} of "
            f"{config.generations}.",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0


def _follow(args: argparse.Namespace, config: TrainConfig, task: Task, workers: Workers) -> int:
    """A worker that does not lead: no folder, no output, the same updates."""
    loaded, engine = _model(args)
    rollout = Rollout(engine, task, config, Clock())
    rollout.workers = workers
    es = strategy_over(engine, config, _anchor(args, loaded))
    journal = parse(workers.share(None), "the journal of worker 0")
    snapshots = Path(args.resume) / SNAPSHOTS if args.resume is not None else None
    catch_up(es, journal, snapshots, note=lambda text: None)
    engine.weights_changed()
    follow(rollout, es, config.generations)
    return 0


def _model(args: argparse.Namespace) -> tuple[LoadedModel, TransformersEngine]:
    from esfast.engines.transformers import TransformersEngine

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    loaded = load_model(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    engine = TransformersEngine(loaded.model, loaded.tokenizer, batch_size=args.batch_size)
    return loaded, engine


def _anchor(args: argparse.Namespace, loaded: LoadedModel) -> Path:
    """The folder of the model that decay pulls to."""
    return loaded.folder if args.anchor_model is None else model_folder(args.anchor_model)


def _description(args: argparse.Namespace, config: TrainConfig, task: Task) -> dict[str, Any]:
    return {
        "made": provenance(args.command_line),
        "model": str(args.model),
        "dtype": args.dtype,
        "device": args.device,
        "task": task.describe(),
        "settings": asdict(config),
        "arguments": flags_of(args, add_train_arguments),
        "seed_derivation": SEED_DERIVATION,
    }


def _output(args: argparse.Namespace, task: Task) -> Path:
    if args.output is not None:
        return Path(args.output)
    name = task.name.replace(":", "-")
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"

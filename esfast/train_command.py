"""`esfast train`: from flags to a model, a task, an engine and a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esfast.disk_room import require_disk_for_train
from esfast.failures import Failures
from esfast.journal import JOURNAL, parse
from esfast.launch.torchrun import join_workers
from esfast.launch.workers import Workers
from esfast.loggers import make_loggers, require_packages
from esfast.measure import Clock
from esfast.opening import Opened, open_engine
from esfast.prior import PriorTasks
from esfast.prompt_room import Dealt, require_prompts_fit
from esfast.provenance import provenance
from esfast.ray_command import open_fleet, require_launcher
from esfast.replay import catch_up
from esfast.report import exit_code, print_result
from esfast.resume import PastRun, flags_of, resumed
from esfast.rollout import Rollout, TrainConfig, follow, strategy_over
from esfast.run_folder import RunFolder, folder_for, require_free, require_journal
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
    require_launcher(args)
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
    output = folder_for(args.output, task.name)
    description = {**_description(args, config, task), "prior": prior.describe()}
    if past is None:
        require_free(output)
    else:
        description = past.described(description)
        require_journal(output)
    opened = _opened(args, output)
    with closing(opened.engine):
        stages = getattr(args, "stages_left", 1)  # of esfast continual
        require_disk_for_train(opened.engine, config, output, past is not None, stages)
        require_prompts_fit(opened.engine, task, Dealt(config, config.strategy.seed), prior)
        trainer = Trainer(
            opened.engine,
            task,
            config,
            RunFolder(output, description, None if past is None else past.changes),
            save_model=lambda path: opened.save(path, description),
            anchor=opened.anchor,
            loggers=make_loggers(args.log_to, output, description),
            clock=clock,
        )
        trainer.rollout.workers = workers
        trainer.prior = prior
        for line in told_decay(args, config.strategy):
            trainer.progress.note(line)
        result = trainer.run()
    print_result(trainer.progress.console, result, output)
    return exit_code(result, output, config.generations, draw=args.plots)


def _follow(args: argparse.Namespace, config: TrainConfig, task: Task, workers: Workers) -> int:
    """A worker that does not lead: no folder, no output, the same updates."""
    opened = open_engine(args)
    rollout = Rollout(opened.engine, task, config, Clock())
    rollout.workers = workers
    rollout.failures = Failures(
        lambda text: print(f"worker {workers.rank}: {text}", file=sys.stderr)
    )
    es = strategy_over(opened.engine, config, opened.anchor)
    journal = parse(workers.share(None), "the journal of worker 0")
    snapshots = Path(args.resume) / SNAPSHOTS if args.resume is not None else None
    catch_up(es, journal, snapshots, note=lambda text: None)
    opened.engine.weights_changed()
    follow(rollout, es, config.generations)
    return 0


def _opened(args: argparse.Namespace, output: Path) -> Opened:
    return open_fleet(args, output / JOURNAL) if args.launcher == "ray" else open_engine(args)


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

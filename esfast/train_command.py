"""`esfast train`: from flags to a model, a task, an engine and a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esfast.disk_room import require_disk_for_train
from esfast.engines.products import told_products
from esfast.failures import Failures
from esfast.idle_flags import told_idle
from esfast.journal import JOURNAL, parse
from esfast.launch.torchrun import join_workers
from esfast.launch.workers import Workers
from esfast.loggers import make_loggers, require_packages
from esfast.measure import Clock
from esfast.opening import Opened, open_engine, packages_of
from esfast.plots import require_plots
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


class TrainJob:
    """What `run_job` takes from `esfast train`; a command that trains with evolution strategies in
    another way overrides it. method: as config.json names that way, and the run's folder."""

    method: str | None = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The flags of the command."""
        add_train_arguments(parser)

    def task(self, args: argparse.Namespace) -> Task:
        """The task that the flags name. Raises ConfigError, DataError."""
        return task_of(args)

    def config(self, args: argparse.Namespace, task: Task) -> TrainConfig:
        """The settings that the flags name. Raises ConfigError."""
        return config_of(args, strategy_of(args), task)

    @contextmanager
    def trainer(
        self, args: argparse.Namespace, config: TrainConfig, task: Task
    ) -> Iterator[Callable[..., Trainer]]:
        """What makes the trainer, with `Trainer`'s arguments. Raises ConfigError and DataError for
        what no model is needed to refuse."""
        yield Trainer


def run_train(args: argparse.Namespace) -> int:
    """The run; returns the exit code. What can be refused is refused before a model is loaded."""
    past = resumed(args, add_train_arguments) if args.resume is not None else None
    return run_job(args if past is None else past.args, past, prior_of)


def run_job(
    args: argparse.Namespace,
    past: PastRun | None,
    prior_tasks: Callable[[argparse.Namespace], PriorTasks],
    job: TrainJob | None = None,
) -> int:
    """One training with the flags of `args`; past: of a run that goes on. Returns the exit code.

    prior_tasks: what makes the prior tasks of the run's flags; job: where it is not `esfast train`.
    """
    job = job or TrainJob()
    clock = Clock(args.started_before)
    require_launcher(args)
    strategy_of(args)  # what it refuses, before a task starts processes
    require_packages(args.log_to)
    require_plots(args.plots)
    task = job.task(args)
    workers = join_workers()
    try:
        config = job.config(args, task)
        if workers.rank:
            return _follow(args, config, task, workers)
        with closing(prior_tasks(args)) as prior:
            return _train(args, config, task, prior, past, clock, workers, job)
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
    job: TrainJob,
) -> int:
    output = folder_for(args.output, f"{job.method}-{task.name}" if job.method else task.name)
    description = {**_description(args, config, task, job), "prior": prior.describe()}
    if past is None:
        require_free(output)
    else:
        description = past.described(description)
        require_journal(output)
    with job.trainer(args, config, task) as make, _opened(args, output) as opened:
        description["device"] = opened.device
        stages = getattr(args, "stages_left", 1)  # of esfast continual
        require_disk_for_train(opened.engine, config, output, past is not None, stages)
        require_prompts_fit(opened.engine, task, Dealt(config, config.strategy.seed), prior)
        trainer = make(
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
        idle = [] if hasattr(args, "stages_left") else told_idle(args, job.add_arguments)
        slow = told_products(getattr(opened.engine, "model", None))
        for line in [*told_decay(args, config.strategy), *idle, *slow]:
            trainer.progress.note(line)
        result = trainer.run()
    print_result(trainer.progress.console, result, output)
    return exit_code(result, output, config, draw=args.plots)


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


@contextmanager
def _opened(args: argparse.Namespace, output: Path) -> Iterator[Opened]:
    ray = args.launcher == "ray"
    opened = open_fleet(args, output / JOURNAL) if ray else open_engine(args)
    with closing(opened.engine):
        yield opened


def _description(
    args: argparse.Namespace, config: TrainConfig, task: Task, job: TrainJob
) -> dict[str, Any]:
    return {
        "made": provenance(args.command_line, packages_of(args)),
        **({"method": job.method} if job.method else {}),
        "model": str(args.model),
        "dtype": args.dtype,
        "task": task.describe(),
        "settings": asdict(config),
        "arguments": flags_of(args, job.add_arguments),
        "seed_derivation": SEED_DERIVATION,
    }

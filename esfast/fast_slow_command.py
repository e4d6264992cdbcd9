"""`esfast fast-slow`: cycles of evolving prompts (GEPA) and weights (evolution strategies).

    esfast fast-slow --cycles 2 --generations-per-cycle 6 --kept-prompts 4 --metric-calls 960
    esfast fast-slow --resume runs/RUN

The flags of `esfast train` but --generations, and a run folder as that writes it, with the prompts
of each cycle (docs/fast_slow.md). One process: neither torchrun nor Ray.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

from esfast.errors import ConfigError
from esfast.fast_slow.instructed import Instructed
from esfast.fast_slow.reflection import FunctionReflection
from esfast.fast_slow.search import require_gepa
from esfast.fast_slow.trainer import INSTRUCTION, FastSlowConfig, FastSlowTrainer, require_budget
from esfast.launch.torchrun import under_torchrun
from esfast.resume import resumed
from esfast.rollout import TrainConfig
from esfast.tasks import Task
from esfast.tasks.reward_pool import Limits
from esfast.train import Trainer
from esfast.train_command import TrainJob, run_job
from esfast.train_flags import (
    above_zero,
    add_engine_flags,
    add_es_run_flags,
    add_model_flags,
    add_prior_flags,
    add_run_flags,
    add_strategy_flags,
    add_task_flags,
    positive,
    prior_of,
    sampling_of,
    settings_of,
    strategy_of,
    task_of,
)


def add_fast_slow_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `esfast train`, but cycles for generations."""
    parser.conflict_handler = "resolve"  # --shaping below replaces that of the strategy's flags
    add_model_flags(parser.add_argument_group("model"))
    add_engine_flags(parser.add_argument_group("engine"))
    add_task_flags(parser.add_argument_group("task"))
    add_strategy_flags(parser.add_argument_group("evolution strategy"))
    add_cycle_flags(parser.add_argument_group("cycles of prompts and weights"))
    run = parser.add_argument_group("run")
    add_run_flags(run, prompts=64)
    add_es_run_flags(run)
    add_prior_flags(parser.add_argument_group("prior tasks"))


def add_cycle_flags(group: argparse._ArgumentGroup) -> None:
    """FastSlowConfig's fields; the defaults are the paper's, but for the number of cycles."""
    group.add_argument("--cycles", type=positive, default=2, help="of a search and its updates")
    group.add_argument(
        "--generations-per-cycle", type=positive, default=6, metavar="T", help="updates"
    )
    group.add_argument("--kept-prompts", type=positive, default=4, metavar="K", help="of a search")
    group.add_argument("--metric-calls", type=positive, default=960, help="of a cycle's search")
    group.add_argument(
        "--pareto-size",
        type=positive,
        default=None,
        help="problems of a cycle that candidates are scored on; all if not given",
    )
    group.add_argument("--instruction", default=INSTRUCTION, help="before each problem, at first")
    group.add_argument(
        "--reflection",
        default=None,
        metavar="MODULE:FUNCTION",
        help="text in, text out: writes new instructions; the model itself if not given",
    )
    group.add_argument("--reflection-timeout", type=above_zero, default=60.0, help="seconds a call")
    group.add_argument("--reflection-tokens", type=positive, default=256, help="of the model's own")
    group.add_argument(
        "--reflection-temperature", type=above_zero, default=1.0, help="of the model's own"
    )
    group.add_argument(
        "--shaping",
        choices=("group_centered",),
        default="group_centered",
        help="a problem's answers are one group",
    )


class FastSlowJob(TrainJob):
    """What differs from `esfast train`."""

    method = "fast-slow"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The flags of the command."""
        add_fast_slow_arguments(parser)

    def task(self, args: argparse.Namespace) -> Task:
        """The task that the flags name, with the instruction before its prompts."""
        return Instructed(task_of(args), args.instruction)

    def config(self, args: argparse.Namespace, task: Task) -> TrainConfig:
        """The settings that the flags name."""
        args.generations = args.cycles * args.generations_per_cycle
        sampling = sampling_of(args, task)
        return settings_of(FastSlowConfig, args, strategy=strategy_of(args), sampling=sampling)

    @contextmanager
    def trainer(
        self, args: argparse.Namespace, config: TrainConfig, task: Task
    ) -> Iterator[Callable[..., Trainer]]:
        """With the reflection's process, where it has one."""
        assert isinstance(config, FastSlowConfig) and isinstance(task, Instructed)
        require_gepa()
        require_budget(task, config)
        task.train_batch(config.strategy.seed, 0, config.prompts)  # prompts take the instruction,
        task.held_out(config.eval_size)  # or are refused
        if config.reflection is None:
            yield FastSlowTrainer
            return
        limits = Limits(args.reflection_timeout, 1, Limits.bytes_of(args.reward_memory))
        with closing(FunctionReflection(config.reflection, limits)) as reflection:
            yield partial(FastSlowTrainer, reflection=reflection)


def run_fast_slow(args: argparse.Namespace) -> int:
    """The run; returns the exit code. What can be refused is refused before a model is loaded."""
    past = resumed(args, add_fast_slow_arguments) if args.resume is not None else None
    args = args if past is None else past.args
    if under_torchrun() or args.launcher == "ray":
        raise ConfigError(
            "esfast fast-slow is one process: run it without torchrun and without --launcher ray. "
            "--engine vllm with --tensor-parallel-size takes several devices."
        )
    return run_job(args, past, prior_of, FastSlowJob())

"""`esfast train`: from flags to a model, a task, an engine and a run.

The defaults are those of the default job: SmolLM2-135M-Instruct learns to answer small sums with
the bare equation, in minutes on two cores. The papers' settings for models of 0.5-8 B parameters
are --sigma 1e-3 --alpha 5e-4 --population-size 30 --prompts 200 --generations 500.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esfast import plots
from esfast.anchor import Anchor
from esfast.checkpoint import LoadedModel, save_model
from esfast.engines.base import Sampling
from esfast.errors import ConfigError
from esfast.evolution import EvolutionStrategy
from esfast.journal import parse
from esfast.launch.torchrun import join_workers
from esfast.launch.workers import Workers
from esfast.loggers import LOGGERS, make_loggers, require_packages
from esfast.measure import Clock
from esfast.members import NOISES
from esfast.models import DEFAULT_MODEL, load_model
from esfast.provenance import provenance
from esfast.replay import catch_up
from esfast.report import print_result
from esfast.resume import PastRun, flags_of, resumed
from esfast.rollout import Rollout, TrainConfig, follow
from esfast.run_folder import RunFolder, require_free
from esfast.shaping import METHODS
from esfast.snapshots import SNAPSHOTS
from esfast.strategy import DECAYS, ROUNDINGS, AnchoredDecay, StrategyConfig
from esfast.tasks import Task, make_task
from esfast.train import Trainer
from esfast.weights import MEMORIES

if TYPE_CHECKING:
    from esfast.engines.transformers import TransformersEngine

INTERRUPTED = 130
DTYPES = ("bfloat16", "float16", "float32")
PAPER_LAMBDA = {"l1": 0.01, "l2": 10.0}
SEED_DERIVATION = (
    "member k of generation g has the seed that docs/noise.md derives from (run seed, g, k), an "
    "antithetic pair the seed of k // 2; journal.esj has the coefficients (docs/journal.md)"
)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast train`."""
    _add_model_flags(parser.add_argument_group("model"))
    _add_task_flags(parser.add_argument_group("task"))
    _add_strategy_flags(parser.add_argument_group("evolution strategy"))
    _add_run_flags(parser.add_argument_group("run"))


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub name")
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    group.add_argument("--device", default="cpu", help="where the model lives")
    group.add_argument("--threads", type=_positive, default=None, help="all cores if not given")
    group.add_argument("--batch-size", type=_positive, default=64, help="rows decoded together")
    group.add_argument("--memory", choices=MEMORIES, default="lean", help="how members are undone")


def _add_task_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--task", default=None, help="arithmetic if not given; see docs/adding.md")
    group.add_argument("--task-option", action="append", default=[], metavar="NAME=VALUE")
    group.add_argument("--data", default=None, help="JSONL file of prompts")
    group.add_argument("--eval-data", default=None, help="JSONL file of held-out prompts")
    group.add_argument("--reward", default=None, metavar="MODULE:FUNCTION", help="needs --data")
    group.add_argument("--reward-timeout", type=_above_zero, default=10.0, help="s a completion")
    group.add_argument("--reward-workers", type=_positive, default=1, help="processes")
    group.add_argument("--failure-reward", type=_finite, default=0.0, help="where scoring fails")


def _add_strategy_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sigma", type=_above_zero, default=0.003, help="noise scale")
    group.add_argument("--alpha", type=_above_zero, default=0.006, help="step size")
    group.add_argument("--population-size", type=_positive, default=16)
    group.add_argument("--antithetic", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--noise", choices=NOISES, default="gaussian")
    group.add_argument("--shaping", choices=METHODS, default="rank")
    group.add_argument("--rounding", choices=ROUNDINGS, default="stochastic")
    group.add_argument("--weight-decay-type", choices=("none", *DECAYS), default="none")
    group.add_argument("--weight-decay-lambda", type=_finite, default=None, metavar="LAMBDA")
    group.add_argument("--seed", type=_natural, default=0)


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--generations", type=_positive, default=10)
    group.add_argument("--prompts", type=_positive, default=64, help="a generation")
    group.add_argument("--fixed-prompts", action="store_true", help="the same every generation")
    group.add_argument("--max-new-tokens", type=_positive, default=None, help="the task's own")
    group.add_argument("--temperature", type=_finite, default=0.0, help="of the members; 0: greedy")
    group.add_argument("--eval-every", type=_positive, default=5, help="generations")
    group.add_argument("--eval-size", type=_positive, default=96, help="held-out prompts at most")
    group.add_argument("--resume", default=None, metavar="RUN", help="go on with this run folder")
    group.add_argument("--snapshot-every", type=_natural, default=0, help="generations; 0: never")
    group.add_argument("--checksum-every", type=_positive, default=10, help="generations")
    group.add_argument("--output", default=None, help="run folder; runs/TASK-TIME if not given")
    group.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--log-to", choices=LOGGERS, action="append", default=[])


def run_train(args: argparse.Namespace) -> int:
    """The run; returns the exit code. What can be refused is refused before a model is loaded."""
    clock = Clock(args.started_before)
    past = resumed(args, add_train_arguments) if args.resume is not None else None
    args = past.args if past is not None else args
    strategy = _strategy(args)
    require_packages(args.log_to)
    task = _task(args)
    workers = join_workers()
    try:
        config = _config(args, strategy, task)
        if workers.rank:
            return _follow(args, config, task, workers)
        return _train(args, config, task, past, clock, workers)
    finally:
        workers.close()
        task.close()


def _train(
    args: argparse.Namespace,
    config: TrainConfig,
    task: Task,
    past: PastRun | None,
    clock: Clock,
    workers: Workers,
) -> int:
    output = _output(args, task)
    description = _description(args, config, task)
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
        anchor=_anchor(config.strategy, loaded, engine),
        loggers=make_loggers(args.log_to, output, description),
        clock=clock,
    )
    trainer.rollout.workers = workers
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
    anchor = _anchor(config.strategy, loaded, engine)
    es = EvolutionStrategy(
        engine.table(), config.strategy, memory=config.memory, anchor=anchor, threads=config.threads
    )
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


def _strategy(args: argparse.Namespace) -> StrategyConfig:
    kind, weight = args.weight_decay_type, args.weight_decay_lambda
    if kind == "none" and weight is not None:
        raise ConfigError("--weight-decay-lambda needs --weight-decay-type l1 or l2.")
    decay = None
    if kind != "none":
        decay = AnchoredDecay(kind, PAPER_LAMBDA[kind] if weight is None else weight)
    return StrategyConfig(
        sigma=args.sigma,
        alpha=args.alpha,
        population_size=args.population_size,
        seed=args.seed,
        noise=args.noise,
        antithetic=args.antithetic,
        shaping=args.shaping,
        decay=decay,
        rounding=args.rounding,
    )


def _config(args: argparse.Namespace, strategy: StrategyConfig, task: Task) -> TrainConfig:
    limit = args.max_new_tokens or task.max_new_tokens
    return TrainConfig(
        strategy=strategy,
        sampling=Sampling(limit, temperature=args.temperature, seed=args.seed),
        generations=args.generations,
        prompts=args.prompts,
        fixed_prompts=args.fixed_prompts,
        eval_every=args.eval_every,
        eval_size=args.eval_size,
        memory=args.memory,
        threads=args.threads,
        checksum_every=args.checksum_every,
        snapshot_every=args.snapshot_every,
    )


def _task(args: argparse.Namespace) -> Task:
    name = args.task or ("custom" if args.reward else "arithmetic")
    options = dict(_task_option(text) for text in args.task_option)
    if args.reward and name != "custom":
        raise ConfigError(f"--reward goes with a task of your own; leave out --task {name}.")
    for flag, option in (("data", args.data), ("eval_data", args.eval_data)):
        if option is not None:
            options[flag] = option
    if name == "custom":
        options |= {
            "reward": args.reward,
            "timeout": args.reward_timeout,
            "workers": args.reward_workers,
            "failure_reward": args.failure_reward,
        }
    return make_task(name, **options)


def _task_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"--task-option {text!r} is not of the form name=value.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _output(args: argparse.Namespace, task: Task) -> Path:
    if args.output is not None:
        return Path(args.output)
    name = task.name.replace(":", "-")
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _anchor(
    strategy: StrategyConfig, loaded: LoadedModel, engine: TransformersEngine
) -> Anchor | None:
    """The model that training starts from, read from its file: no resident memory."""
    if strategy.decay is None:
        return None
    return Anchor.from_safetensors(loaded.folder, engine.table())


def _number(text: str, kind: type, holds: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def _positive(text: str) -> int:
    return _number(text, int, lambda n: n >= 1, "a whole number of 1 or more")


def _natural(text: str) -> int:
    return _number(text, int, lambda n: n >= 0, "a whole number of 0 or more")


def _above_zero(text: str) -> float:
    return _number(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def _finite(text: str) -> float:
    return _number(text, float, math.isfinite, "a finite number")

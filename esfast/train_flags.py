"""The flags of `esfast train`, and what they make: a strategy, a task, the settings of a run.

The defaults are those of the default job: SmolLM2-135M-Instruct learns to answer small sums with
the bare equation, in minutes on two cores. The papers' settings for models of 0.5-8 B parameters
are --sigma 1e-3 --alpha 5e-4 --population-size 30 --prompts 200 --generations 500.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from esfast.engines.base import Sampling
from esfast.errors import ConfigError
from esfast.home_folders import model_place, place
from esfast.loggers import LOGGERS
from esfast.members import NOISES
from esfast.models import DEFAULT_MODEL
from esfast.prior import PriorSettings, PriorTask, PriorTasks, make_prior_task
from esfast.prior.harness import HarnessTask
from esfast.rollout import TrainConfig
from esfast.shaping import METHODS
from esfast.strategy import DECAYS, ROUNDINGS, AnchoredDecay, StrategyConfig
from esfast.tasks import OF_DATA_SETS, TASKS, Task, make_task
from esfast.tasks.reward_pool import Limits
from esfast.weights import MEMORIES, MOST_THREADS

LAUNCHERS = ("auto", "ray")
ENGINES = ("transformers", "vllm")
DTYPES = ("bfloat16", "float16", "float32")
PAPER_LAMBDA = {"l1": 0.01, "l2": 10.0}
AUTO = "auto"
REWARD_FLAGS = {
    "timeout": "--reward-timeout", "workers": "--reward-workers", "memory": "--reward-memory",
    "limits": "--reward-timeout, --reward-workers and --reward-memory",
}  # fmt: skip
"""Of a task's options, those with flags of another name."""
Settings = TypeVar("Settings")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast train`."""
    add_model_flags(parser.add_argument_group("model"))
    add_engine_flags(parser.add_argument_group("engine"))
    add_task_flags(parser.add_argument_group("task"))
    add_strategy_flags(parser.add_argument_group("evolution strategy"))
    run = parser.add_argument_group("run")
    # 5 end within four minutes on two free Zen 4 cores, the model fetched and converted.
    run.add_argument("--generations", type=positive, default=5, help="updates")
    add_run_flags(run, prompts=64)
    add_es_run_flags(run)
    add_prior_flags(parser.add_argument_group("prior tasks"))


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """Which model, and how it is held."""
    group.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub name")
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    group.add_argument("--device", default="cpu", help="cpu, or cuda")
    group.add_argument("--threads", type=thread_count, default=None, help="all cores if not given")
    group.add_argument("--launcher", choices=LAUNCHERS, default="auto", help="docs/workers.md")
    group.add_argument("--engines", type=positive, default=None, help="that ray starts; else 1")
    group.add_argument(
        "--batch-size", type=positive, default=None, help="rows decoded together; 64, or vLLM's own"
    )
    group.add_argument(
        "--memory", choices=MEMORIES, default="lean",
        help="what undoes a member: lost bits, a base copy, an fp32 one",
    )  # fmt: skip


def add_engine_flags(group: argparse._ArgumentGroup) -> None:
    """What generates, and how vLLM is started."""
    group.add_argument("--engine", choices=ENGINES, default="transformers", help="docs/engines.md")
    group.add_argument("--tensor-parallel-size", type=positive, default=1, help="of vLLM: devices")
    group.add_argument(
        "--gpu-memory-utilization",
        type=above_zero,
        default=None,
        help="of vLLM: the share of a device's memory, 0 to 1; its own if not given",
    )
    group.add_argument(
        "--engine-option", action="append", default=[], metavar="NAME=VALUE",
        help="a further argument of vllm.LLM, such as max_model_len=4096; repeatable",
    )  # fmt: skip


def add_task_flags(group: argparse._ArgumentGroup) -> None:
    """Where prompts and rewards come from."""
    names = ", ".join(f"{name}:DATASET" if name in OF_DATA_SETS else name for name in TASKS)
    group.add_argument("--task", default=None, help=f"{names}; arithmetic if not given")
    group.add_argument(
        "--task-option", action="append", default=[], metavar="NAME=VALUE",
        help="of the task, such as max_target=50 of countdown; repeatable",
    )  # fmt: skip
    group.add_argument("--data", default=None, help="JSONL file of prompts: docs/adding.md")
    group.add_argument("--eval-data", default=None, help="JSONL file of held-out prompts")
    group.add_argument(
        "--reward", default=None, metavar="MODULE:FUNCTION", help="your own; needs --data"
    )
    group.add_argument(
        "--reward-timeout", type=above_zero, default=10.0, help="seconds a completion"
    )
    group.add_argument("--reward-workers", type=positive, default=1, help="processes that score")
    group.add_argument(
        "--reward-memory", type=not_negative, default=None, metavar="GIB",
        help="of each process; 0: no limit; if not given, a quarter of what is free between them",
    )  # fmt: skip
    group.add_argument("--failure-reward", type=finite, default=0.0, help="where scoring fails")


def add_strategy_flags(group: argparse._ArgumentGroup) -> None:
    """StrategyConfig's fields."""
    group.add_argument("--sigma", type=above_zero, default=0.003, help="spread of a member's noise")
    group.add_argument("--alpha", type=above_zero, default=0.006, help="step size")
    group.add_argument("--population-size", type=positive, default=16, help="members")
    group.add_argument(
        "--antithetic", action=argparse.BooleanOptionalAction, default=True,
        help="members in pairs, noise added and subtracted",
    )  # fmt: skip
    group.add_argument("--noise", choices=NOISES, default="gaussian", help="docs/noise.md")
    group.add_argument("--shaping", choices=METHODS, default="rank", help="rewards to fitness")
    group.add_argument("--rounding", choices=ROUNDINGS, default="stochastic", help="of updates")
    group.add_argument(
        "--weight-decay-type", choices=("none", *DECAYS), default="none", help="pull to the anchor"
    )
    group.add_argument(
        "--weight-decay-lambda",
        type=finite_or_auto,
        default=None,
        metavar="LAMBDA",
        help="auto: the paper's strength (l2: alpha * lambda 5e-3; l1: lambda * sqrt(N) 0.055); if "
        "not given, the paper's lambda itself (l2: 10; l1: 0.01)",
    )
    group.add_argument(
        "--anchor-model", default=None, metavar="MODEL", help="what decay pulls to; --model's own"
    )
    group.add_argument("--seed", type=natural, default=0, help="of members, prompts, samples")


def add_run_flags(group: argparse._ArgumentGroup, prompts: int) -> None:
    """On what and where, but not how long. prompts: the default."""
    group.add_argument("--prompts", type=positive, default=prompts, help="a generation")
    group.add_argument("--fixed-prompts", action="store_true", help="the same every generation")
    group.add_argument(
        "--max-new-tokens", type=positive, default=None, help="an answer; else the task's"
    )
    group.add_argument("--eval-every", type=positive, default=5, help="generations")
    group.add_argument("--eval-size", type=positive, default=96, help="held-out prompts at most")
    group.add_argument(
        "--resume", default=None, type=place, metavar="RUN", help="go on with this run folder"
    )
    group.add_argument(
        "--output",
        default=None,
        type=model_place,
        help="run folder; a new one in runs/ if not given",
    )
    group.add_argument(
        "--plots", action=argparse.BooleanOptionalAction, default=True, help="PNGs, at the end"
    )
    group.add_argument(
        "--log-to", choices=LOGGERS, action="append", default=[], help="as it goes; repeatable"
    )


def add_es_run_flags(group: argparse._ArgumentGroup) -> None:
    """What of a run only ES has."""
    group.add_argument("--temperature", type=finite, default=0.0, help="of the members; 0: greedy")
    group.add_argument("--snapshot-every", type=natural, default=0, help="generations; 0: never")
    group.add_argument("--checksum-every", type=positive, default=10, help="generations")


def add_prior_flags(group: argparse._ArgumentGroup) -> None:
    """Which tasks, how often, and how many answers."""
    group.add_argument(
        "--prior-tasks",
        default=None,
        metavar="A,B,C",
        help="what should not be forgotten: tasks, JSONL or YAML files, names of lm-eval's",
    )
    group.add_argument("--prior-every", type=positive, default=5, help="generations")
    group.add_argument("--prior-size", type=positive, default=64, help="prompts a task at most")
    group.add_argument(
        "--prior-samples", type=natural, default=4, help="a prompt, beside the greedy answer"
    )
    group.add_argument("--prior-temperature", type=above_zero, default=1.0, help="of the samples")
    group.add_argument("--prior-path", default=None, help="folder of further lm-eval YAML tasks")


def settings_of(kind: type[Settings], args: argparse.Namespace, **given: object) -> Settings:
    """A dataclass of settings: fields that are not given are flags of the same name."""
    names = {field.name for field in fields(kind)} - given.keys()  # type: ignore[arg-type]
    return kind(**given, **{name: getattr(args, name) for name in names})


def strategy_of(args: argparse.Namespace) -> StrategyConfig:
    """The strategy that the flags name. Raises ConfigError."""
    kind, weight = args.weight_decay_type, args.weight_decay_lambda
    if kind == "none" and weight is not None:
        raise ConfigError("--weight-decay-lambda needs --weight-decay-type l1 or l2.")
    if kind == "none" and args.anchor_model is not None:
        raise ConfigError(
            "--anchor-model needs --weight-decay-type l1 or l2: without decay nothing pulls to it."
        )
    decay = None
    if kind != "none" and weight == AUTO:
        decay = AnchoredDecay.automatic(kind, args.alpha, args.population_size)
    elif kind != "none":
        decay = AnchoredDecay(kind, PAPER_LAMBDA[kind] if weight is None else weight)
    return settings_of(StrategyConfig, args, decay=decay)


def told_decay(args: argparse.Namespace, strategy: StrategyConfig) -> list[str]:
    """What --weight-decay-lambda auto came to, as a line; none where it was not asked for."""
    decay = strategy.decay
    if decay is None or args.weight_decay_lambda != AUTO:
        return []
    if decay.kind == "l1":
        held = f"lambda * sqrt(N) is {decay.weight * strategy.population_size**0.5:.3g}"
        place = f"a population of {strategy.population_size}"
    else:
        held = f"alpha * lambda is {strategy.alpha * decay.weight:g}"
        place = f"alpha {strategy.alpha:g}"
    told = f"{decay.kind} decay with lambda {decay.weight:.6g}: {held}"
    return [f"{told}, as in arXiv 2605.30148, at {place}"]


def config_of(args: argparse.Namespace, strategy: StrategyConfig, task: Task) -> TrainConfig:
    """The settings of the run. Raises ConfigError."""
    return settings_of(TrainConfig, args, strategy=strategy, sampling=sampling_of(args, task))


def sampling_of(args: argparse.Namespace, task: Task) -> Sampling:
    """How the answers of training are drawn. Raises ConfigError."""
    limit = args.max_new_tokens or task.max_new_tokens
    return Sampling(limit, temperature=args.temperature, seed=args.seed)


def task_of(args: argparse.Namespace) -> Task:
    """The task that the flags name. Raises ConfigError, DataError."""
    name = args.task or ("custom" if args.reward else "arithmetic")
    options = dict(option(text, "--task-option") for text in args.task_option)
    if args.reward and name != "custom":
        raise ConfigError(f"--reward goes with a task of your own; leave out --task {name}.")
    if args.data and not (args.task or args.reward):
        raise ConfigError(
            "--data needs to be told how its answers are scored: --reward module:function for a "
            "function of yours, or --task questions or gsm8k."
        )
    flags = _of_task(name, args)
    _require_once(options, flags)
    return make_task(name, **options, **flags)


def _of_task(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The options of the task that have flags of their own."""
    files = {"data": args.data, "eval_data": args.eval_data}
    options: dict[str, Any] = {n: path for n, path in files.items() if path is not None}
    if name == "custom":
        options |= {
            "reward": args.reward,
            "timeout": args.reward_timeout,
            "workers": args.reward_workers,
            "memory": args.reward_memory,
            "failure_reward": args.failure_reward,
        }
    elif name.startswith("reasoning_gym"):
        memory = Limits.bytes_of(args.reward_memory)
        options["limits"] = Limits(args.reward_timeout, args.reward_workers, memory)
        options["failure_reward"] = args.failure_reward
    return options


def _require_once(options: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """ConfigError for a --task-option that a flag would overrule without a word."""
    for name in sorted(options.keys() & flags.keys()):
        flag = REWARD_FLAGS.get(name) or "--" + name.replace("_", "-")
        raise ConfigError(
            f"--task-option {name}={options[name]} would be overruled by {flag}; give that instead."
        )


def prior_of(args: argparse.Namespace) -> PriorTasks:
    """The prior tasks that the flags name; none where none are named.

    Raises ConfigError, DataError; EsfastError where a task's data cannot be had.
    """
    settings = PriorSettings(
        every=args.prior_every,
        size=args.prior_size,
        samples=args.prior_samples,
        temperature=args.prior_temperature,
        seed=args.seed,
    )
    tasks: list[PriorTask] = []
    try:
        for name in prior_names(args.prior_tasks):
            tasks.append(make_prior_task(name, settings, args.prior_path))
        if args.prior_path is not None and not any(isinstance(t, HarnessTask) for t in tasks):
            raise ConfigError(
                f"--prior-path {args.prior_path} holds tasks of lm-evaluation-harness, and "
                "--prior-tasks names none of those; name one, or leave --prior-path out."
            )
        return PriorTasks(tasks, settings)
    except BaseException:
        for task in tasks:
            task.close()
        raise


def prior_names(text: str | None) -> list[str]:
    """The names in --prior-tasks. Raises ConfigError for an empty one."""
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"--prior-tasks {text!r} has an empty name; write a,b,c.")
    return names


def option(text: str, flag: str) -> tuple[str, Any]:
    """A name=value of `flag`, the value as JSON where it is some. Raises ConfigError."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"{flag} {text!r} is not of the form name=value.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _number(text: str, kind: type, holds: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def positive(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    return _number(text, int, lambda n: n >= 1, "a whole number of 1 or more")


def thread_count(text: str) -> int:
    """An argparse type: how many threads. More than any machine has cores ends the process where
    they are started."""
    return _number(text, int, lambda n: 1 <= n <= MOST_THREADS, f"from 1 to {MOST_THREADS}")


def natural(text: str) -> int:
    """An argparse type: a whole number of 0 or more."""
    return _number(text, int, lambda n: n >= 0, "a whole number of 0 or more")


def above_zero(text: str) -> float:
    """An argparse type: a number above 0."""
    return _number(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def not_negative(text: str) -> float:
    """An argparse type: a finite number of 0 or more."""
    return _number(text, float, lambda x: 0 <= x < math.inf, "a number of 0 or more")


def finite(text: str) -> float:
    """An argparse type: a finite number."""
    return _number(text, float, math.isfinite, "a finite number")


def finite_or_auto(text: str) -> float | str:
    """An argparse type: a finite number, or "auto"."""
    return AUTO if text == AUTO else _number(text, float, math.isfinite, "a number or 'auto'")

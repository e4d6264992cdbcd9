"""The tasks that `esfast train` knows by name.

To add one: a file beside this one with a subclass of `Task`, and a line in TASKS. Each module is
imported only when its task is asked for.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from esfast.errors import ConfigError
from esfast.tasks.base import Example, PoolTask, Score, Task

__all__ = ["TASKS", "Example", "PoolTask", "Score", "Task", "make_task"]

TASKS: dict[str, tuple[str, str]] = {
    "arithmetic": ("esfast.tasks.arithmetic", "Arithmetic"),
    "countdown": ("esfast.tasks.countdown", "Countdown"),
    "custom": ("esfast.tasks.custom", "Custom"),
    "gsm8k": ("esfast.tasks.gsm8k", "Gsm8k"),
    "questions": ("esfast.tasks.questions", "Questions"),
    "reasoning_gym": ("esfast.tasks.reasoning_gym", "ReasoningGym"),
}
"""Name -> (module, class)."""
OF_DATA_SETS = ("questions", "reasoning_gym")
"""Tasks that are named with one of their data sets: NAME:DATASET."""


PLAIN: dict[object, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text"),
    "bool": ((bool,), "true or false"),
}


def make_task(name: str, /, **options: Any) -> Task:
    """The task called `name`; `reasoning_gym:DATASET` names a data set of that package,
    `questions:DATASET` one of the sets kept with that task.

    Raises ConfigError for a name or an option that is not there, and what the task raises.
    """
    kind, _, dataset = name.partition(":")
    if kind not in TASKS or (dataset and kind not in OF_DATA_SETS):
        there = (f"{n}:DATASET" if n in OF_DATA_SETS else n for n in sorted(TASKS))
        raise ConfigError(f"there is no task {name!r}; there are {', '.join(there)}.")
    if kind in OF_DATA_SETS:
        options = {"dataset": dataset, **options}
    module, class_name = TASKS[kind]
    make = getattr(import_module(module), class_name)
    _check_options(name, make, options)
    return make(**options)


def _check_options(name: str, make: type, options: dict[str, Any]) -> None:
    parameters = inspect.signature(make).parameters
    for option, value in options.items():
        _check_kind(name, option, value, parameters.get(option))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        taken = ", ".join(parameters) or "no options"
        raise ConfigError(f"task {name!r} has no option {', '.join(unknown)}; it takes {taken}.")


def _check_kind(name: str, option: str, value: Any, parameter: inspect.Parameter | None) -> None:
    """ConfigError where an option that is a number, a text or a switch got something else."""
    kind = PLAIN.get(parameter.annotation) if parameter is not None else None
    if kind is None:
        return
    accepted, expected = kind
    if not isinstance(value, accepted) or isinstance(value, bool) is not (bool in accepted):
        raise ConfigError(f"task {name!r} got {option}={value!r}; expected {expected}.")

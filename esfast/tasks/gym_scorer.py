"""reasoning-gym's scorers behind `reward_process`: they are somebody else's code, and some evaluate
the answer, so they run in processes of their own, under the limits of a user's reward function.

It is loaded by path there: the standard library and reasoning_gym alone, no torch. Importing that
takes 1.2 s, 3.6 s without kept bytecode, and more on busy cores (first answers missed their 10 s):
it is part of the process's start, not of an answer's time. Problems travel as JSON, in which
tuples, fractions, and mappings whose keys are no texts, are marked.
"""

from __future__ import annotations

import json
from fractions import Fraction
from functools import lru_cache
from typing import Any

if __name__ == "reward_file":  # as `reward_process.load` names it; the run itself needs no scorers
    import reasoning_gym

TUPLE, PAIRS, FRACTION = "__tuple__", "__pairs__", "__fraction__"


def score(example: dict[str, Any], completion: str) -> float:
    """What the data set's scorer gives to an answer.

    example: "dataset", its name; "config", its options; "row", the problem as `to_json` makes it.
    """
    dataset = _dataset(example["dataset"], json.dumps(example["config"]))
    return float(dataset.score_answer(completion, from_json(example["row"])))


@lru_cache(maxsize=4)
def _dataset(name: str, config: str) -> Any:
    return reasoning_gym.create_dataset(name, **json.loads(config))


def to_json(value: Any) -> Any:
    """The value with what JSON would change marked: tuples, fractions, keys that are no texts."""
    if isinstance(value, Fraction):
        return {FRACTION: str(value)}
    if isinstance(value, tuple):
        return {TUPLE: [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: to_json(item) for key, item in value.items()}
        return {PAIRS: [[to_json(key), to_json(item)] for key, item in value.items()]}
    return value


def from_json(value: Any) -> Any:
    """What `to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {TUPLE}:
            return tuple(from_json(item) for item in value[TUPLE])
        if value.keys() == {FRACTION}:
            return Fraction(value[FRACTION])
        if value.keys() == {PAIRS}:
            return {from_json(key): from_json(item) for key, item in value[PAIRS]}
        return {key: from_json(item) for key, item in value.items()}
    return value

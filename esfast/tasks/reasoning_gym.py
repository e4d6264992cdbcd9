"""Any data set of the reasoning-gym package (106 procedural ones), by name.

    esfast train --task reasoning_gym:countdown --task-option min_numbers=3

The data set's own scorer decides the reward (1.0 right; many give 0.05 to what can be read and 0.01
to the rest). It wants the bare answer, so that is extracted first: the last <answer>...</answer>,
else what follows the last "answer is" or "Answer:", else the end of the text; as many lines as the
known answer has, since grids have several. Some scorers evaluate the answer as Python; such an
answer has to pass `esfast.tasks.harmless` first, else it is worth 0. And all scorers run in
processes of their own, with limits of time and memory (`gym_scorer`): one that hangs or crashes
costs its answer the failure reward, and the run goes on.

Making 2000 problems takes up to 17 s, so they are kept in the cache folder as JSON. A process with
fixed hashes makes them (`gym_rows`), so that they are the same in every worker of a run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError
from esfast.model_cache import cache_folder
from esfast.tasks.base import Example, Score, require_failure_reward, split
from esfast.tasks.gym_scorer import from_json, to_json
from esfast.tasks.harmless import is_formula, is_plain
from esfast.tasks.reward_pool import Limits, PooledTask, RewardPool
from esfast.whole_file import write_whole

HELD_OUT_SHARE = 0.2
SOLVED = 0.99
SCORER = Path(__file__).with_name("gym_scorer.py")
ROWS = Path(__file__).with_name("gym_rows.py")
ROWS_RECIPE = 3  # counted up where other problems are made, so that kept ones are not taken

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# The last part: "**Answer:** 42" closes its emphasis after the colon.
_SAID = re.compile(r"answer[ \t*]*(?:is\b|:)(?:[ \t:]|\*+(?=\s|:|\Z))*", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*```\w*[ \t]*(?:\n|\Z)", re.MULTILINE)
_MARKS = "*`$"


class ReasoningGym(PooledTask):
    """Trains on `size` problems of one data set, of which a fifth is held out."""

    max_new_tokens = 128

    def __init__(
        self,
        /,
        dataset: str = "",
        size: int = 1000,
        problems_seed: int = 0,
        limits: Limits | None = None,
        failure_reward: float = 0.0,
        **options: Any,
    ):
        """`options` go to the data set's configuration; `limits` are its scorer's, and an answer
        that it cannot score gets the `failure_reward`.

        Raises ConfigError for an unknown data set or option, or without the package.
        """
        if size < 5:
            raise ConfigError(f"reasoning_gym got size={size}; expected 5 problems or more.")
        if "seed" in options:
            raise ConfigError(
                f"reasoning_gym got seed={options['seed']!r}, which it calls problems_seed; give "
                "that."
            )
        require_failure_reward(failure_reward)
        self.name, self.failure_reward = f"reasoning_gym:{dataset}", failure_reward
        config = {**options, "size": size, "seed": problems_seed}
        made = _create(dataset, config)
        self._request = {"dataset": dataset, "config": config}
        self._checks = _checks(type(made))
        rows = _cached_rows(dataset, config)
        examples = {row["question"]: Example(row["question"], row["question"], row) for row in rows}
        self.pool = RewardPool(f"{SCORER}:score", limits or Limits())
        super().__init__(*split([*examples.values()], HELD_OUT_SHARE))

    def score(self, example: Example, completion: str) -> Score:
        """What the data set's scorer gives to the extracted answer. Raises RewardFailure."""
        answer = extract_answer(completion, example.data["answer"])
        if answer != example.data["answer"] and not all(check(answer) for check in self._checks):
            return Score(0.0, "The answer is not in a plain form that can be scored.", solved=False)
        request = {**self._request, "row": to_json(dict(example.data))}
        value = self.pool.call(request, answer).value
        solved, known = value >= SOLVED, example.data["answer"]
        wrong = "Not right." if known is None else f"Not right; a right answer is {known}"
        return Score(value, "Right." if solved else wrong, solved=solved)


def extract_answer(completion: str, known: str | None = "") -> str:
    """The bare answer in a completion.

    known: the problem's own answer, which tells the form alone: how many lines, and whether a full
    stop or a mark at its ends belongs to it. None where there is none to compare with.
    """
    tagged = _TAGGED.findall(completion)
    if tagged:
        return tagged[-1].strip()
    text = _FENCE.sub("", completion).strip()
    said = _after_said(text)
    if known is None:
        on_its_line = bool(said) and not said.startswith("\n")
        return _bare(said.split("\n")[0], "") if on_its_line else (said or text).strip()
    lines = (said or text).strip().split("\n")
    count = known.strip().count("\n") + 1
    kept = "\n".join(lines[:count] if said else lines[-count:]).strip()
    return _bare(kept, known.strip()) if count == 1 else kept


def _after_said(text: str) -> str:
    """What follows the last words that announce an answer and are followed by anything."""
    rests = [text[found.end() :] for found in _SAID.finditer(text)]
    return next((rest for rest in reversed(rests) if rest.strip()), "")


def _bare(text: str, known: str) -> str:
    """The text without emphasis and final full stop, unless a known answer has them itself."""
    marks = "".join(mark for mark in _MARKS if mark not in known[:1] + known[-1:]) + " \t"
    text = text.strip(marks)
    return text if known.endswith(".") else text.removesuffix(".").strip(marks)


def _create(name: str, config: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            f"task reasoning_gym needs the reasoning-gym package ({error}); "
            "pip install reasoning-gym."
        ) from None
    if name not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no data set {name!r}; there are {', '.join(sorted(DATASETS))}. "
            "Write reasoning_gym:NAME."
        )
    try:
        return reasoning_gym.create_dataset(name, **config)
    except (TypeError, AssertionError, ValueError) as error:
        accepted = ", ".join(inspect.signature(DATASETS[name][1]).parameters)
        raise ConfigError(
            f"reasoning-gym data set {name!r} refuses its options ({error}); it takes {accepted}."
        ) from None


def _checks(dataset: type) -> list[Callable[[str], bool]]:
    """What an answer has to pass, given what the source of the scorer calls on it."""
    module = sys.modules[dataset.__module__]
    source = inspect.getsource(module)
    sympy_parser = getattr(getattr(module, "parse_expr", None), "__module__", "")
    checks: list[Callable[[str], bool]] = []
    if re.search(r"(?<!literal_)\b(eval|exec)\(", source):
        checks.append(is_plain)
    if sympy_parser.startswith("sympy") or re.search(r"\b(sympy|sp)\.(parse_expr|sympify)", source):
        checks.append(is_formula)
    return checks


def _cached_rows(name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    version = metadata.version("reasoning-gym")
    key = json.dumps([name, version, config, ROWS_RECIPE], sort_keys=True, default=str)
    path = (
        cache_folder()
        / "reasoning_gym"
        / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    )
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    rows = _made_rows(name, config)
    with suppress(OSError):  # made again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(rows).encode())
    return from_json(rows)


def _made_rows(name: str, config: dict[str, Any]) -> Any:
    """The problems as `gym_scorer.to_json` marks them, the same whatever this process's hashes are.
    Raises ConfigError."""
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, str(ROWS)],
        input=json.dumps([name, config]).encode(),
        capture_output=True,
        check=False,
        env=environment,
    )
    said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
    wrong = f"the process that makes them ended with code {done.returncode} and said: {said[-1]}"
    told = {"error": wrong} if done.returncode else json.loads(done.stdout)
    if "error" in told:
        raise ConfigError(
            f"reasoning-gym data set {name!r} cannot make its problems: {told['error']:.500}. Try "
            "other options, or another data set."
        )
    return told["rows"]

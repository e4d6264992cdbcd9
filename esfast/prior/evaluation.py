"""Evaluates prior tasks on whatever weights an engine holds, and keeps the scores.

    prior = PriorTasks([make_prior_task(name, settings) for name in names], settings)
    prior.keep_in(folder / "prior.jsonl", until=0)
    prior.evaluate(engine, generation)        # list[PriorScore], a line each in the file
    prior.summary()                           # per task: before, worst, final, recovery

Independent of how the weights are trained. A task is answered greedily and, with `samples` K, K
times a prompt at `temperature`, with the same random numbers at every evaluation. What is in the
file is not evaluated again. Tasks are never averaged over one another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from esfast.engines.base import Bounded, Completion, Engine, Sampling
from esfast.errors import ConfigError, DataError
from esfast.prior.harness import HarnessTask
from esfast.prior.scores import Estimate, PriorScore, outcome
from esfast.prior.settings import PriorSettings
from esfast.run_folder import NO_JSON, append_line, read_lines
from esfast.tasks import TASKS, Task, make_task
from esfast.tasks.custom import Custom
from esfast.tasks.questions import Questions
from esfast.whole_file import write_whole

PRIOR = "prior.jsonl"
HARNESS = "lm_eval:"
FILE = ".jsonl"
OF_FILES = ("custom", "gsm8k")
"""Tasks of esfast's that read a file of the user's."""


class PriorTask(Protocol):
    """One task asked for, or several under one name (a group of lm-evaluation-harness)."""

    source: str
    names: tuple[str, ...]

    def evaluate(self, engine: Engine, generation: int) -> list[PriorScore]:
        """A score each of `names`, under the weights as they are."""
        ...

    def describe(self) -> dict[str, Any]:
        """What config.json records; plain JSON values."""
        ...

    def close(self) -> None:
        """Give up processes; twice does no harm."""
        ...


@dataclass
class _Answered:
    """What one evaluation of a task came to so far."""

    read: int = 0
    generated: int = 0
    failed: int = 0

    def add(self, completions: Sequence[Completion]) -> None:
        self.read += sum(completion.prompt_tokens for completion in completions)
        self.generated += sum(completion.tokens for completion in completions)


class OwnTask:
    """A task of esfast's, of which the held-out prompts are answered."""

    def __init__(
        self, source: str, task: Task, settings: PriorSettings, max_new_tokens: int | None = None
    ) -> None:
        """max_new_tokens: the task's own, if not given."""
        self.source = source
        self.names: tuple[str, ...] = (label(source),)
        self.task = task
        self.settings = settings
        self.max_new_tokens = max_new_tokens or task.max_new_tokens
        self._examples = task.held_out(settings.size)

    def evaluate(self, engine: Engine, generation: int) -> list[PriorScore]:
        """Greedy answers, then K samples of every prompt."""
        began = time.perf_counter()
        limit, settings = self.max_new_tokens, self.settings
        answered = _Answered()
        greedy = self._values(engine, Sampling(limit), 1, answered)
        sampled = None
        if settings.samples:
            drawn = Sampling(limit, temperature=settings.temperature, seed=settings.seed)
            values = self._values(engine, drawn, settings.samples, answered)
            sampled = Estimate.of(values, settings.samples, settings.temperature)
        return [
            PriorScore(
                generation=generation,
                task=self.names[0],
                source=self.source,
                metric="score",
                prompts=len(self._examples),
                greedy=Estimate.of(greedy),
                sampled=sampled,
                failed=answered.failed,
                seconds=time.perf_counter() - began,
                read_tokens=answered.read or None,  # no prompt is empty: the engine did not say
                generated_tokens=answered.generated if answered.read else None,
            )
        ]

    def require_room(self, engine: Bounded) -> None:
        """ConfigError, by number and first words, where a prompt is too long for the model."""
        prompts = [example.prompt for example in self._examples]
        kind = f"prompt of prior task {self.names[0]}, number"
        engine.require_room(prompts, self.max_new_tokens, kind)

    def _values(
        self, engine: Engine, sampling: Sampling, samples: int, answered: _Answered
    ) -> np.ndarray:
        """float64 [prompts], the mean over a prompt's samples."""
        repeated = [example for example in self._examples for _ in range(samples)]
        completions = engine.generate([example.prompt for example in repeated], sampling)
        scores = self.task.score_all(repeated, [completion.text for completion in completions])
        answered.add(completions)
        answered.failed += sum(score.failed for score in scores)
        values = np.array([score.value for score in scores], dtype=np.float64)
        return np.asarray(values.reshape(-1, samples).mean(axis=1))

    def describe(self) -> dict[str, Any]:
        """The task's own words."""
        return {"source": self.source, **self.task.describe()}

    def close(self) -> None:
        """End what the task holds."""
        self.task.close()


def label(source: str) -> str:
    """A task's name in results: the stem of a JSONL file, else what it was asked for by."""
    file = source.partition("@")[0]
    return Path(file).stem if file.endswith(FILE) else source


def make_prior_task(
    source: str, settings: PriorSettings, harness_path: str | Path | None = None
) -> PriorTask:
    """The prior task that `source` names.

    A built-in task (`countdown`, `questions:capitals`, `reasoning_gym:DATASET`); a JSONL file
    (PATH.jsonl with answers in its rows, or PATH.jsonl@module:function with a reward function); a
    task, group or tag of lm-evaluation-harness by name, `lm_eval:NAME` where esfast has one of the
    same name, or PATH.yaml. harness_path: a folder of further YAML tasks.
    Raises ConfigError, DataError.
    """
    own = make_own_prior_task(source, settings)
    return own or HarnessTask(source, source.removeprefix(HARNESS), settings, harness_path)


def make_own_prior_task(source: str, settings: PriorSettings) -> OwnTask | None:
    """As `make_prior_task`, without lm-evaluation-harness: None for what would be a task of its."""
    kind, _, dataset = source.partition(":")
    file, at, reward = source.partition("@")
    if file.endswith(FILE) and at:
        task = Custom(reward, data=file, evaluation_only=True)
        return OwnTask(source, task, settings)
    if source.endswith(FILE):
        return OwnTask(source, Questions(data=source, evaluation_only=True), settings)
    if kind == "questions":
        return OwnTask(source, Questions(dataset, evaluation_only=True), settings)
    if kind in OF_FILES:
        raise ConfigError(
            f"{source!r} is no prior task: it reads a file. Name the file itself, FILE.jsonl with "
            "answers or FILE.jsonl@module:function with a reward (lm-eval's is lm_eval:gsm8k)."
        )
    return OwnTask(source, make_task(source), settings) if kind in TASKS else None


class PriorTasks:
    """A set of prior tasks and what they scored so far."""

    def __init__(
        self,
        tasks: Sequence[PriorTask],
        settings: PriorSettings,
        known: Sequence[PriorScore] = (),
    ) -> None:
        """known: scores that need not be measured, since another run measured the same weights.
        What they cost is on that run's account.

        Raises ConfigError where two tasks have one name.
        """
        names = [name for task in tasks for name in task.names]
        twice = sorted({name for name in names if names.count(name) > 1})
        self._names = names
        if twice:
            raise ConfigError(f"prior task {twice[0]!r} is given twice; leave one out.")
        self.tasks = tuple(tasks)
        self.settings = settings
        self.scores: list[PriorScore] = [
            replace(score, read_tokens=0, generated_tokens=0)
            for score in known
            if score.task in names
        ]
        self._path: Path | None = None

    def keep_in(self, path: Path, until: int) -> None:
        """Writes to `path` from now on, and takes up what is there up to generation `until`.

        Later lines, and a last one that was not written whole, are dropped from the file. Raises
        DataError for a file that is damaged elsewhere.
        """
        self._path = path
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1].splitlines()
        scores = _scores(path, map(json.loads, whole))
        kept = [score for score in scores if score.generation <= until]
        there = {(score.generation, score.task) for score in kept}
        new = [score for score in self.scores if (score.generation, score.task) not in there]
        self.scores = kept + new
        if not self.scores and not data:
            return
        lines = [json.dumps(score.record(), ensure_ascii=False) + "\n" for score in self.scores]
        write_whole(path, "".join(lines).encode())

    def due(self, generation: int, last: int) -> bool:
        """Whether to evaluate at `generation` of a run that ends at `last`: something is not known
        that is wanted at every k-th generation and at the end."""
        wanted = generation % self.settings.every == 0 or generation == last
        return wanted and len(self.at(generation)) < len(self._names)

    def evaluate(self, engine: Engine, generation: int) -> list[PriorScore]:
        """The scores of all tasks at `generation`, under the weights as they are now.

        Those that were evaluated before are not evaluated again. Each new one is written down as
        soon as it is there.
        """
        for task in self.tasks:
            there = {score.task for score in self.at(generation)}
            if there.issuperset(task.names):
                continue
            for score in task.evaluate(engine, generation):
                if score.task in there:
                    continue
                if self._path is not None:
                    append_line(self._path, score.record())
                self.scores.append(score)
        return self.at(generation)

    def at(self, generation: int) -> list[PriorScore]:
        """What is known of one generation, in the order of the tasks."""
        order = self._names
        there = [s for s in self.scores if s.generation == generation and s.task in order]
        return sorted(there, key=lambda score: order.index(score.task))

    def of(self, name: str) -> list[PriorScore]:
        """One task's scores by generation."""
        return sorted(
            (score for score in self.scores if score.task == name),
            key=lambda score: score.generation,
        )

    def summary(self) -> list[dict[str, Any]]:
        """What came of every task; see `esfast.prior.scores.outcome`."""
        return [outcome(self.of(name)) for name in self._names if self.of(name)]

    def tokens(self) -> tuple[int, int] | None:
        """(read, generated) of every evaluation that this run's file holds; None where one of them
        is not known."""
        read, generated = 0, 0
        for score in self.scores:
            if score.read_tokens is None or score.generated_tokens is None:
                return None
            read, generated = read + score.read_tokens, generated + score.generated_tokens
        return read, generated

    def describe(self) -> dict[str, Any]:
        """What config.json records."""
        return {**asdict(self.settings), "tasks": [task.describe() for task in self.tasks]}

    def close(self) -> None:
        """Close every task."""
        for task in self.tasks:
            with suppress(OSError):
                task.close()


def read_scores(path: Path) -> list[PriorScore]:
    """What `PriorTasks.keep_in` has written; nothing where there is no file. Raises DataError."""
    return _scores(path, read_lines(path)) if path.exists() else []


def _scores(path: Path, records: Iterable[Mapping[str, Any]]) -> list[PriorScore]:
    try:
        return [PriorScore.from_record(record) for record in records]
    except DataError:  # of `read_lines`, which names the line
        raise
    except (KeyError, TypeError, *NO_JSON) as error:
        raise DataError(f"{path} has a line that is no prior task's score ({error}).") from None

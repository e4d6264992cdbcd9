"""Tasks of lm-evaluation-harness (lm-eval), by name or from local YAML, on the live model.

lm-eval's own model class for transformers, HFLM, is given the model that the engine edits, and
lm-eval's own code asks, filters and scores: a number here is what `lm_eval --model hf` gives for
the same weights, without a chat template. A group or tag counts as its single tasks, each with a
score of its own. The score is the task's first metric; its interval is over the prompts, and for a
metric that is no mean over prompts lm-eval's own standard error (bootstrapped).

Sampled scores are there for tasks that generate text; ranking given answers by their likelihood has
nothing to sample. Not promised: tasks that run what a model wrote as code (lm-eval's UNSAFE_CODE)
are refused.
"""

from __future__ import annotations

import copy
import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esfast.engines.base import Engine
from esfast.errors import ConfigError, EsfastError, first_line
from esfast.held_out import Z95
from esfast.prior.scores import Estimate, PriorScore
from esfast.prior.settings import PriorSettings
from esfast.tasks import TASKS

ROWS = 8
"""Rows a forward pass: the logits of all positions are kept, 20 MB a row of 100 tokens in fp32."""
DRAWS = 1000
"""Of the bootstrap, for metrics that are no mean over prompts."""
MEAN_TOLERANCE = 1e-6


class HarnessTask:
    """A task, group or tag of lm-eval, or a YAML file."""

    def __init__(
        self,
        source: str,
        name: str,
        settings: PriorSettings,
        include: str | Path | None = None,
    ) -> None:
        """include: a folder of further YAML tasks. Raises ConfigError where there is no such task,
        EsfastError where its data cannot be had."""
        self.source = source
        self.settings = settings
        self._tasks = _load(source, name, include)
        self.names: tuple[str, ...] = tuple(self._tasks)
        unsafe = [name for name, task in self._tasks.items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe:
            raise ConfigError(
                f"prior task {unsafe[0]!r} runs what the model writes as code; esfast does not. "
                "Leave it out."
            )

    def evaluate(self, engine: Engine, generation: int) -> list[PriorScore]:
        """Every task's score under the weights as they are; seconds and tokens of a group are
        shared evenly among its tasks."""
        began = time.perf_counter()
        model = _live_model(engine, self.source)
        count = _TokenCount(model)
        greedy = _run(model, self._tasks, self.settings.size)
        drawn = self._sampled(model)
        seconds = (time.perf_counter() - began) / len(self._tasks)
        read, generated = (_shared(n, len(self._tasks)) for n in (count.read, count.generated))
        return [
            PriorScore(
                generation=generation,
                task=name,
                source=self.source,
                metric=greedy[name].metric,
                prompts=greedy[name].prompts,
                greedy=greedy[name].estimate,
                sampled=drawn.get(name),
                higher_is_better=greedy[name].higher_is_better,
                seconds=seconds,
                read_tokens=read[at],
                generated_tokens=generated[at],
            )
            for at, name in enumerate(self.names)
        ]

    def _sampled(self, model: Any) -> dict[str, Estimate]:
        """Of the tasks that generate, and whose metric is a mean over prompts."""
        settings = self.settings
        tasks = {n: t for n, t in self._tasks.items() if t.OUTPUT_TYPE == "generate_until"}
        if not tasks or not settings.samples:
            return {}
        values: dict[str, list[tuple[float, ...]]] = {name: [] for name in tasks}
        for sample in range(settings.samples):
            seed = settings.seed * settings.samples + sample
            with _sampling(model, settings.temperature, seed):
                for name, reading in _run(model, tasks, settings.size).items():
                    values[name].append(reading.estimate.values)
        return {
            name: Estimate.of(np.mean(drawn, axis=0), settings.samples, settings.temperature)
            for name, drawn in values.items()
            if all(drawn)
        }

    def describe(self) -> dict[str, Any]:
        """Names, lm-eval's version and the tasks' own."""
        import lm_eval

        versions = {name: task.VERSION for name, task in self._tasks.items()}
        return {"source": self.source, "lm_eval": lm_eval.__version__, "tasks": versions}

    def close(self) -> None:
        """Nothing is held."""


class _TokenCount:
    """Tokens through a model of lm-eval from now on, each row's own: padding is not counted, and a
    context is for each of its continuations, though lm-eval computes some of them once.

    A generated answer that ends with a stop text counts one token too many where others go on.
    """

    def __init__(self, model: Any) -> None:
        self.read = self.generated = 0
        self._model = model
        self._rank, self._write = model._loglikelihood_tokens, model._model_generate
        model._loglikelihood_tokens, model._model_generate = self._ranked, self._written

    def _ranked(self, requests: list[Any], **settings: Any) -> Any:
        """The last token of a continuation is judged, and not read."""
        longest = self._model.max_length
        self.read += sum(min(len(a) + len(b) - 1, longest) for _, a, b in requests)
        return self._rank(requests, **settings)

    def _written(self, context: torch.Tensor, **settings: Any) -> torch.Tensor:
        rows: torch.Tensor = self._write(context=context, **settings)
        self.read += int(settings["attention_mask"].sum())
        answers, tokenizer = rows[:, context.shape[1] :], self._model.tokenizer
        ends = (answers == tokenizer.eos_token_id) | (answers == tokenizer.pad_token_id)
        self.generated += int((ends.cumsum(dim=1) - ends.int() == 0).sum())
        return rows


def _shared(total: int, tasks: int) -> list[int]:
    """As even as whole numbers are."""
    return [total // tasks + (at < total % tasks) for at in range(tasks)]


class _Reading:
    """What lm-eval says of one task: its first metric, with an interval."""

    def __init__(self, name: str, results: dict[str, Any]) -> None:
        samples = results["samples"][name]
        metric, kind = samples[0]["metrics"][0], samples[0]["filter"]
        own = [row[metric] for row in samples if row["filter"] == kind]
        self.metric = f"{metric},{kind}"
        self.prompts = len(own)
        self.higher_is_better = results["higher_is_better"].get(name, {}).get(metric) is not False
        said = results["results"][name]
        score, error = float(said[self.metric]), said.get(f"{metric}_stderr,{kind}")
        if _is_mean(own, score):
            self.estimate = Estimate.of(own)
        elif isinstance(error, float):
            self.estimate = Estimate(score, score - Z95 * error, score + Z95 * error)
        else:
            raise ConfigError(
                f"prior task {name!r}: lm-eval has no standard error for its metric {metric!r}. "
                "Give a YAML file with a metric that is a mean over the prompts."
            )


def _is_mean(own: list[Any], score: float) -> bool:
    numbers = all(isinstance(value, (bool, int, float, np.number)) for value in own)
    return numbers and abs(float(np.mean(own)) - score) <= MEAN_TOLERANCE * max(1.0, abs(score))


def _load(source: str, name: str, include: str | Path | None) -> dict[str, Any]:
    """Single tasks by name, with their data."""
    is_file = name.endswith((".yaml", ".yml"))
    if is_file and not Path(name).is_file():
        raise ConfigError(f"there is no file {name} for the prior task {source!r}.")
    with _quiet():
        tasks = _known_tasks(None if include is None else str(include), False)
        if not is_file and name not in tasks.task_index:
            tasks = _known_tasks(None if include is None else str(include), True)
        if not is_file and name not in tasks.task_index:
            raise ConfigError(
                f"there is no prior task {source!r}: it is no task of esfast's "
                f"({', '.join(sorted(TASKS))}), no .jsonl or .yaml file, and lm-eval has none of "
                "that name. A folder of YAML tasks is given with --prior-path."
            )
        try:
            loaded = tasks.load(name)
        except Exception as error:  # the hub's, the network's, the YAML's
            raise EsfastError(
                f"prior task {source!r} could not be loaded by lm-eval: {first_line(error)}. "
                "Check the file, or the network where its data comes from a hub."
            ) from None
    return dict(loaded["tasks"])


@lru_cache(maxsize=4)
def _known_tasks(include: str | None, own: bool) -> Any:
    """An index of the YAML files in `include` and, with `own`, of lm-eval's: seconds to read."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"tasks of lm-evaluation-harness need lm-eval ({error}): "
            "pip install -c constraints.txt '.[forgetting]'"
        ) from None
    if include is not None and not Path(include).is_dir():
        raise ConfigError(f"--prior-path {include} is no folder; give one that holds YAML tasks.")
    return TaskManager(include_path=include, include_defaults=own)


def _live_model(engine: Engine, source: str) -> Any:
    """lm-eval's model class over the engine's model; the engine's tokenizer stays as it is."""
    model, tokenizer = getattr(engine, "model", None), getattr(engine, "tokenizer", None)
    if not isinstance(model, torch.nn.Module) or tokenizer is None:
        raise ConfigError(
            f"prior task {source!r} is one of lm-evaluation-harness, which works on a model of "
            f"transformers; the engine is {type(engine).__name__}. Use --engine transformers, or "
            "prior tasks of esfast's own."
        )
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=min(ROWS, getattr(engine, "batch_size", ROWS)),
        )


def _run(model: Any, tasks: dict[str, Any], size: int) -> dict[str, _Reading]:
    from lm_eval.evaluator import evaluate

    with _quiet(), torch.inference_mode():
        results = evaluate(
            model,
            {"tasks": tasks, "groups": {}, "group_map": {}},
            limit=size,
            bootstrap_iters=DRAWS,
        )
    return {name: _Reading(name, results) for name in tasks}


@contextmanager
def _sampling(model: Any, temperature: float, seed: int) -> Iterator[None]:
    """`model` draws its tokens, from the whole distribution; torch's own generators are put back.

    HFLM takes the settings of each request, which say do_sample: false for nearly every task.
    """
    ask = model._model_generate

    def drawn(context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> Any:
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return ask(context=context, max_length=max_length, stop=stop, **settings)

    model._model_generate = drawn
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        model._model_generate = ask


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's bars and warnings on standard error: what matters is raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

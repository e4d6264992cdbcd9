"""What a training run measures and tells, whatever moves its weights: evolution strategies
(train.py) or GRPO (grpo.py).

Held-out scores, greedy: before, every `eval_every` generations, after. Prior tasks, on their own
account of time. Peak memory of generating alone, and of the run. A line a generation for the
folder, the loggers and the console; in the end the samples, the model and the summary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from esfast import measure
from esfast.cost import Account
from esfast.engines.base import Engine, Measured
from esfast.errors import ConfigError
from esfast.failures import Failures
from esfast.held_out import HeldOut, rise, samples
from esfast.loggers import Logger, still_logging
from esfast.measure import FINISH, LOOP, PRIOR_TASKS, RECORDS, SETUP, Clock
from esfast.prior import PriorSettings, PriorTasks
from esfast.prior.evaluation import PRIOR
from esfast.prior.scores import PriorScore
from esfast.progress import GenerationReport, RunProgress
from esfast.run_folder import SAMPLES, SUMMARY, RunFolder
from esfast.tasks.base import Example, Task

SAMPLES_SHOWN = 4


@dataclass(frozen=True)
class Memory:
    """Peak bytes: of generating without training, of the whole run; None where not measured."""

    inference_bytes: int | None
    peak_bytes: int | None

    @property
    def ratio(self) -> float | None:
        """The run's peak over the peak of generating alone."""
        if self.inference_bytes is None or self.peak_bytes is None:
            return None
        return self.peak_bytes / self.inference_bytes


@dataclass(frozen=True)
class TrainResult:
    """What came of a run; `status` is "finished", "interrupted" or "failed". cost: the record of
    its `esfast.cost.Account`, None where not all of it is known; failures: why answers, held-out
    ones among them, could not be scored, since the run was last started."""

    status: str
    generations: int
    before: HeldOut | None
    after: HeldOut | None
    prompts: tuple[Example, ...]
    memory: Memory
    clock: Clock
    failed_rewards: int
    failures: tuple[Mapping[str, Any], ...]
    prior: PriorTasks
    cost: dict[str, Any] | None

    @property
    def rise(self) -> tuple[float, float] | None:
        """The held-out score's rise, and the same in standard errors; None before the first."""
        if self.before is None or self.after is None:
            return None
        return rise(self.before, self.after)

    def record(self) -> dict[str, Any]:
        """summary.json; plain JSON values."""
        difference, errors = self.rise or (None, None)
        return {
            "status": self.status,
            "generations": self.generations,
            "held_out_before": self.before and self.before.record(),
            "held_out_after": self.after and self.after.record(),
            "rise": difference,
            "rise_in_standard_errors": errors if errors is None or math.isfinite(errors) else None,
            "failed_rewards": self.failed_rewards,
            "failure_reasons": list(self.failures),
            "prior": self.prior.summary(),
            "cost": self.cost,
            "seconds": dict(self.clock.seconds),
            "outside_share_of_loop": self.clock.outside_share(),
            "outside_share_of_run": self.clock.outside_share((*LOOP, SETUP, FINISH)),
            "inference_peak_bytes": self.memory.inference_bytes,
            "peak_bytes": self.memory.peak_bytes,
            "peak_over_inference": self.memory.ratio,
        }


def _shown(score: PriorScore) -> str:
    failed = f" ({score.failed} answers could not be scored)" if score.failed else ""
    return f"{score.task} {score.greedy.score:.3f}{failed}"


def _numbers(scores: Sequence[PriorScore]) -> dict[str, float]:
    """As the loggers take them."""
    numbers = {}
    for score in scores:
        for kind, part in (("greedy", score.greedy), ("sampled", score.sampled)):
            if part is not None:
                numbers[f"prior/{score.task}/{kind}"] = part.score
    return numbers


def require_not_over(generations: int, done: int) -> None:
    """ConfigError for a run that goes on to fewer generations than it has: its config.json would
    name a number that its weights are past."""
    if generations < done:
        raise ConfigError(
            f"the run has {done} generations already, and was told to end after {generations}; "
            "what was trained is not taken back. Ask for as many or more, or leave the flag out."
        )


class RunSettings(Protocol):
    """What the settings of both methods say; see TrainConfig and GrpoConfig."""

    @property
    def generations(self) -> int: ...
    @property
    def completions(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def eval_size(self) -> int: ...


class TrainingRun(ABC):
    """One run; `prior`, `progress` and `loggers` may be set before it starts."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        config: RunSettings,
        folder: RunFolder,
        save_model: Callable[[Path], object],
        loggers: Sequence[Logger],
        clock: Clock | None,
        members: int,
    ) -> None:
        """`save_model` writes the live weights to a folder; `clock` may have started earlier;
        `members`: steps of the bar a generation."""
        self.engine = engine
        self.config = config
        self.folder = folder
        self.loggers = loggers
        self.clock = clock or Clock()
        self.progress = RunProgress(config.generations, members)
        self.account = Account()
        self.prior = PriorTasks((), PriorSettings())
        self._save_model = save_model
        self._held_out = tuple(task.held_out(config.eval_size))
        self._before: HeldOut | None = None
        self._after: HeldOut | None = None
        self._peaks = engine if isinstance(engine, Measured) else measure
        self._inference_peak: int | None = None
        self._first_logged = 0
        self._failed_rewards = 0
        self.failures = Failures(lambda text: self.progress.note(text))

    @abstractmethod
    def _evaluate(self, generation: int) -> HeldOut:
        """Answers the held-out prompts under the weights as they are."""

    def _measure_start(self, done: int, warm_up: Callable[[], object]) -> None:
        """The scores before training, and what generating costs without it: `warm_up` generates as
        a generation will. done: generations of the run's earlier part."""
        self._first_logged = done + 1 if done else 0
        self.clock.lap(SETUP)
        can_measure = self._peaks.reset_peak()
        self._before = self._evaluate(0)
        count = len(self._held_out)
        self.progress.note(f"held-out before: {self._before.text()} ({count} prompts)")
        if not done:
            self._log(0, self._held_out_scores(self._before))
        self.prior.keep_in(self.folder.path / PRIOR, done)
        self._evaluate_prior(0)
        warm_up()
        self._inference_peak = self._peaks.peak_bytes() if can_measure else None

    def _evaluate_if_due(self, generation: int) -> HeldOut | None:
        """The held-out prompts every `eval_every` generations and at the end."""
        if generation < self.config.generations and generation % self.config.eval_every:
            return None
        self._after = self._evaluate(generation)
        return self._after

    def _answer_again(self, generation: int) -> HeldOut:
        """For the samples and the summary of a run that was over when it went on; counted only
        where no line of metrics.jsonl has counted it."""
        before, lines = replace(self.account.evaluation), self.folder.lines()
        held_out = self._evaluate(generation)
        if lines and lines[-1]["generation"] == generation and lines[-1].get("held_out"):
            self.account.evaluation = before
        return held_out

    def _evaluate_prior(self, generation: int) -> None:
        """Where it is due and not known already, as from before the run was stopped."""
        if self.prior.due(generation, self.config.generations):
            self.clock.lap(RECORDS)
            self.progress.doing("prior tasks")
            scores = self.prior.evaluate(self.engine, generation)
            if generation >= self._first_logged:  # earlier ones would hide what was logged since
                self._log(generation, _numbers(scores))
            shown = ", ".join(map(_shown, scores))
            self.progress.note(f"prior tasks at generation {generation}: {shown}")
            self.clock.lap(PRIOR_TASKS)

    def _record(
        self, report: GenerationReport, held_out: HeldOut | None, **method: Mapping[str, float]
    ) -> None:
        """method: a method's own numbers of the generation, under its name."""
        numbers = report.numbers()
        self.folder.add_metrics({**self._line(report, held_out), **method})
        for own in method.values():
            numbers.update(own)
        self._log(report.generation, {**numbers, **self._held_out_scores(held_out)})
        self.progress.generation(report, held_out)
        self.clock.lap(RECORDS)

    def _log(self, generation: int, numbers: Mapping[str, float]) -> None:
        note = self.progress.note
        self.loggers = still_logging(self.loggers, lambda x: x.log(generation, numbers), note)

    def _line(self, report: GenerationReport, held_out: HeldOut | None) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        return {
            "generation": report.generation,
            **report.numbers(),
            "total_seconds": dict(self.clock.seconds),
            **self._evaluated(held_out),
            "cost": self.account.counts(),
        }

    def _evaluated(self, held_out: HeldOut | None) -> dict[str, dict[str, Any] | None]:
        """What a line of metrics.jsonl holds of the held-out prompts, None where not evaluated."""
        return {"held_out": None if held_out is None else held_out.record()}

    def _held_out_scores(self, held_out: HeldOut | None) -> dict[str, float]:
        """The same for loggers."""
        lines = self._evaluated(held_out).items()
        return {f"{name}_score": line["score"] for name, line in lines if line is not None}

    def _write_samples(self) -> None:
        shown = self._held_out[:SAMPLES_SHOWN]
        self.folder.write(SAMPLES, samples(shown, self._before, self._after))

    def _summarise(self, status: str, generations: int, **method: object) -> TrainResult:
        """Closes the loggers and writes the summary, which comes last. method: further entries."""
        still_logging(self.loggers, lambda logger: logger.close(), self.progress.note)
        self.clock.lap(FINISH)
        least = self._inference_peak  # the kernel's peak may go back by some pages
        peak = None if least is None else max(least, self._peaks.peak_bytes())
        result = TrainResult(
            status=status,
            generations=generations,
            before=self._before,
            after=self._after,
            prompts=self._held_out,
            memory=Memory(self._inference_peak, peak),
            clock=self.clock,
            failed_rewards=self._failed_rewards,
            failures=tuple(self.failures.record()),
            prior=self.prior,
            cost=self.account.record(self.prior.tokens()),
        )
        self.folder.write(SUMMARY, {**result.record(), **method})
        return result

"""The training loop: evolution strategies over an engine and a task.

A generation: every member answers the same prompts; its reward is the mean score; the strategy
turns rewards into coefficients, which go to the run folder before the weights move; one update.
The held-out prompts are answered at the start, every `eval_every` generations and at the end,
greedily and by the model itself, no member.

What stops a run (Ctrl-C, an engine or a disk that fails) leaves the weights those of the last whole
generation, and the folder with all that was measured until then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from esfast.anchor import Anchor
from esfast.engines.base import Engine, Sampling
from esfast.errors import ConfigError
from esfast.evolution import EvolutionStrategy
from esfast.held_out import HeldOut, rise
from esfast.loggers import Logger
from esfast.measure import (
    FINISH,
    GENERATION,
    LOOP,
    PERTURB,
    RECORDS,
    SCORING,
    SETUP,
    UPDATE,
    Clock,
    peak_bytes,
    reset_peak,
)
from esfast.progress import GenerationReport, RunProgress
from esfast.resources import readable, require_memory
from esfast.run_folder import SAMPLES, SUMMARY, RunFolder
from esfast.strategy import StrategyConfig
from esfast.tasks.base import Example, Score, Task

SAMPLES_SHOWN = 4


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run beside its model and task.

    `prompts`: a generation; `fixed_prompts`: the same ones every generation; `sampling`: of the
    members (held-out answers are greedy); `eval_every`: generations; `eval_size`: held-out prompts
    at most; `memory`, `threads`: as `esfast.Weights` takes them.
    """

    strategy: StrategyConfig
    sampling: Sampling
    generations: int = 10
    prompts: int = 32
    fixed_prompts: bool = False
    eval_every: int = 5
    eval_size: int = 128
    memory: str = "lean"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("generations", "prompts", "eval_every", "eval_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more.")


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
    """What came of a run; `status` is "finished", "interrupted" or "failed"."""

    status: str
    generations: int
    before: HeldOut | None
    after: HeldOut | None
    prompts: tuple[Example, ...]
    memory: Memory
    clock: Clock
    failed_rewards: int

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
            "rise_in_standard_errors": errors,
            "failed_rewards": self.failed_rewards,
            "seconds": dict(self.clock.seconds),
            "outside_share_of_loop": self.clock.outside_share(),
            "outside_share_of_run": self.clock.outside_share((*LOOP, SETUP, FINISH)),
            "inference_peak_bytes": self.memory.inference_bytes,
            "peak_bytes": self.memory.peak_bytes,
            "peak_over_inference": self.memory.ratio,
        }


class Trainer:
    """Runs one training; owns the order of things."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        config: TrainConfig,
        folder: RunFolder,
        *,
        save_model: Callable[[Path], object],
        anchor: Anchor | None = None,
        loggers: list[Logger] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`save_model` writes the live weights to a folder; `clock` may have started earlier."""
        self.engine = engine
        self.task = task
        self.config = config
        self.folder = folder
        self.loggers = loggers or []
        self.clock = clock or Clock()
        self.progress = RunProgress(config.generations, config.strategy.population_size)
        self._save_model = save_model
        self._anchor = anchor
        self._held_out = tuple(task.held_out(config.eval_size))
        self._greedy = replace(config.sampling, temperature=0.0)
        self._before: HeldOut | None = None
        self._after: HeldOut | None = None
        self._inference_peak: int | None = None
        self._failed_rewards = 0
        self.es: EvolutionStrategy | None = None

    def run(self) -> TrainResult:
        """The whole run. Ctrl-C ends it early, with what there is; errors are raised again."""
        with self.progress:
            try:
                self._start()
                self._loop()
                status = "finished"
            except KeyboardInterrupt:
                status = "interrupted"
            except BaseException:
                self._restore()
                with suppress(Exception):  # the first error is the one to tell
                    self._finish("failed")
                raise
            self._restore()
            return self._finish(status)

    def _start(self) -> None:
        """What generating costs without training is measured before any ES structure exists."""
        self.clock.lap(SETUP)
        can_measure = reset_peak()
        self._before = self._evaluate(0)
        self.progress.note(
            f"held-out before: {self._before.text()} ({len(self._held_out)} prompts)"
        )
        self.engine.generate([example.prompt for example in self._batch(0)], self._sampling(0))
        self._inference_peak = peak_bytes() if can_measure else None
        self.clock.lap(SETUP)
        self.es = EvolutionStrategy(
            self.engine.table(),
            self.config.strategy,
            memory=self.config.memory,
            anchor=self._anchor,
            threads=self.config.threads,
        )
        self._tell_memory(self.es)
        self.folder.write(SAMPLES, self._samples())
        self.clock.lap(SETUP)

    def _tell_memory(self, es: EvolutionStrategy) -> None:
        config = self.config.strategy
        use = es.weights.memory_use()
        needed = es.weights.expected_bytes(config.sigma, config.noise)
        if self.config.memory == "lean":
            require_memory(needed, "restoring members exactly", "Free some, or lower --sigma.")
        weights = use.weights_bytes
        self.progress.note(
            f"{self.config.memory} memory: {readable(needed)} beside {readable(weights)} of "
            f"weights ({needed / weights:.2f} of them)"
        )

    def _loop(self) -> None:
        assert self.es is not None
        for generation in range(self.config.generations):
            report = self._generation(self.es, generation)
            last = generation + 1 == self.config.generations
            due = last or (generation + 1) % self.config.eval_every == 0
            held_out = self._evaluate(generation + 1) if due else None
            self._after = held_out or self._after
            self._record(report, held_out)

    def _generation(self, es: EvolutionStrategy, generation: int) -> GenerationReport:
        started = sum(self.clock.seconds.values())
        tokens = self.engine.tokens_generated
        generating = self.clock.seconds[GENERATION]
        scores = self._rewards(es, generation)
        failed = sum(score.failed for row in scores for score in row)
        self._failed_rewards += failed
        matrix = np.array([[score.value for score in row] for row in scores], dtype=np.float64)
        saturated = self._step(es, generation, matrix)
        members = matrix.mean(axis=1)
        tokens = self.engine.tokens_generated - tokens
        return GenerationReport(
            generation=generation + 1,
            reward_mean=float(members.mean()),
            reward_spread=float(members.std()),
            reward_best=float(members.max()),
            failed_rewards=failed,
            tokens_per_second=tokens / max(self.clock.seconds[GENERATION] - generating, 1e-9),
            seconds=sum(self.clock.seconds.values()) - started,
            outside_share=self.clock.outside_share(),
            saturated=saturated,
        )

    def _rewards(self, es: EvolutionStrategy, generation: int) -> list[list[Score]]:
        """Every member's scores on the generation's prompts: [population][prompts]."""
        batch, sampling = self._batch(generation), self._sampling(generation)
        scores = []
        self.clock.lap(RECORDS)
        for index, _ in enumerate(es.population()):
            self.engine.weights_changed()
            self.clock.lap(PERTURB)
            scores.append(self._answers(batch, sampling)[0])
            self.progress.member(generation, index)
            self.clock.lap(RECORDS)
        self.clock.lap(PERTURB)
        return scores

    def _step(self, es: EvolutionStrategy, generation: int, matrix: np.ndarray) -> int:
        """Writes the generation down, then moves the weights; returns how many saturated."""
        grouped = self.config.strategy.shaping == "group_centered"
        rewards = matrix if grouped else matrix.mean(axis=1)
        members = es.strategy.members(generation)
        self.folder.add_generation(
            {
                "generation": generation,
                "generation_seed": f"{es.strategy.generation_seed(generation):016x}",
                "seeds": [f"{member.seed:016x}" for member in members],
                "signs": [member.sign for member in members],
                "indices": [member.index for member in members],
                "coefficients": [float(c).hex() for c in es.strategy.coefficients(rewards)],
                "rewards": rewards.tolist(),
            }
        )
        self.clock.lap(RECORDS)
        report = es.step(rewards)
        self.engine.weights_changed()
        self.clock.lap(UPDATE)
        return report.saturated

    def _answers(self, batch: list[Example], sampling: Sampling) -> tuple[list[Score], list[str]]:
        completions = self.engine.generate([example.prompt for example in batch], sampling)
        self.clock.lap(GENERATION)
        texts = [completion.text for completion in completions]
        scores = self.task.score_all(batch, texts)
        self.clock.lap(SCORING)
        return scores, texts

    def _evaluate(self, generation: int) -> HeldOut:
        self.progress.doing("held-out prompts")
        scores, texts = self._answers(list(self._held_out), self._greedy)
        return HeldOut(generation, tuple(scores), tuple(texts))

    def _batch(self, generation: int) -> list[Example]:
        dealt = 0 if self.config.fixed_prompts else generation
        return self.task.train_batch(self.config.strategy.seed, dealt, self.config.prompts)

    def _sampling(self, generation: int) -> Sampling:
        """All members of a generation share the sampling's random numbers."""
        return replace(self.config.sampling, seed=self.config.sampling.seed + generation)

    def _record(self, report: GenerationReport, held_out: HeldOut | None) -> None:
        line: dict[str, Any] = {"generation": report.generation, **report.numbers()}
        line["total_seconds"] = dict(self.clock.seconds)
        line["held_out"] = held_out and held_out.record()
        self.folder.add_metrics(line)
        numbers = report.numbers()
        if held_out is not None:
            numbers["held_out_score"] = held_out.mean
        for logger in self.loggers:
            logger.log(report.generation, numbers)
        self.progress.generation(report, held_out)
        self.clock.lap(RECORDS)

    def _restore(self) -> None:
        if self.es is not None:
            self.es.weights.restore()
            self.engine.weights_changed()

    def _samples(self) -> list[dict[str, Any]]:
        """Answers before and after (the last that were measured), with their scores."""
        samples: list[dict[str, Any]] = []
        for index, example in enumerate(self._held_out[:SAMPLES_SHOWN]):
            sample: dict[str, Any] = {"prompt": example.prompt}
            for when, held_out in (("before", self._before), ("after", self._after)):
                if held_out is not None:
                    answer, score = held_out.completions[index], held_out.scores[index].value
                    generation = held_out.generation
                    sample[when] = {"answer": answer, "score": score, "generation": generation}
            samples.append(sample)
        return samples

    def _finish(self, status: str) -> TrainResult:
        """Samples, model, loggers, and last the summary."""
        self.clock.lap(RECORDS)
        self.progress.doing("saving")
        self.folder.write(SAMPLES, self._samples())
        generations = self.es.generation if self.es is not None else 0
        if generations:
            self._save_model(self.folder.model)
        for logger in self.loggers:
            logger.close()
        self.clock.lap(FINISH)
        peak = None if self._inference_peak is None else peak_bytes()
        result = TrainResult(
            status=status,
            generations=generations,
            before=self._before,
            after=self._after,
            prompts=self._held_out,
            memory=Memory(self._inference_peak, peak),
            clock=self.clock,
            failed_rewards=self._failed_rewards,
        )
        self.folder.write(SUMMARY, result.record())
        return result

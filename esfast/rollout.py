"""What the members of a generation earn: every member answers the same prompts, somebody's task
scores them. Shared by the loop that leads a run and by the workers that follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from esfast.bounds import require_whole
from esfast.engines.base import Completion, Engine, Sampling
from esfast.engines.fleet import Fleet
from esfast.evolution import EvolutionStrategy
from esfast.failures import Failures
from esfast.journal_format import GENERATION, GenerationRecord, decode, encode
from esfast.launch.workers import Alone, Workers
from esfast.measure import GENERATION as GENERATING
from esfast.measure import PERTURB, RECORDS, SCORING, UPDATE, Clock
from esfast.strategy import StrategyConfig
from esfast.tasks.base import Example, Pending, Score, Task


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run beside its model and task.

    `prompts`: a generation; `fixed_prompts`: the same ones every generation; `sampling`: of the
    members (held-out answers are greedy); `eval_every`: generations; `eval_size`: held-out prompts
    at most; `memory`, `threads`: as `esfast.Weights` takes them; `checksum_every`: generations
    between recorded checksums; `snapshot_every`: generations between snapshots, 0 for none.
    """

    strategy: StrategyConfig
    sampling: Sampling
    generations: int = 5
    prompts: int = 64
    fixed_prompts: bool = False
    eval_every: int = 5
    eval_size: int = 128
    memory: str = "lean"
    threads: int | None = None
    checksum_every: int = 10
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        counts = ("generations", "prompts", "eval_every", "eval_size", "checksum_every")
        require_whole(self, 1, *counts)
        require_whole(self, 0, "snapshot_every")

    @property
    def completions(self) -> int:
        """Answers of members a generation."""
        return self.prompts * self.strategy.population_size


@dataclass(frozen=True)
class Earned:
    """What a population earned.

    rewards: float64 [population], a member's mean over the prompts, or [population, prompts] where
    the shaping is group_centered. By all workers together: failed, scores that failed; read and
    tokens, of prompts and of answers; seconds of generating.
    """

    rewards: np.ndarray
    failed: int
    read: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Spent:
    """What answering some prompts took: tokens read and generated, and seconds."""

    read: int
    tokens: int
    seconds: float = 0.0


COLUMNS = 4
"""Of a row, before the rewards."""


def row_of(scores: list[Score], spent: Spent, grouped: bool) -> np.ndarray:
    """What a member earned: failed scores, what was spent, its reward (or one a prompt)."""
    values = np.array([score.value for score in scores], dtype=np.float64)
    failed = sum(score.failed for score in scores)
    rewards = values if grouped else [values.mean()]
    return np.array([failed, spent.read, spent.tokens, spent.seconds, *rewards], dtype=np.float64)


def earned_of(rows: np.ndarray, grouped: bool) -> Earned:
    """What the population earned, from every member's `row_of`."""
    rewards = np.ascontiguousarray(rows[:, COLUMNS:] if grouped else rows[:, COLUMNS])
    failed, read, tokens, seconds = rows[:, :COLUMNS].sum(axis=0)
    return Earned(rewards, int(failed), int(read), int(tokens), float(seconds))


class Rollout:
    """Generates and scores under the weights as they are; `workers` may be set before the run."""

    def __init__(self, engine: Engine, task: Task, config: TrainConfig, clock: Clock) -> None:
        self.engine = engine
        self.task = task
        self.config = config
        self.clock = clock
        self.workers: Workers = Alone()
        self.failures = Failures()

    def answers(
        self, batch: list[Example], sampling: Sampling
    ) -> tuple[list[Score], list[str], Spent]:
        """Scores and texts, one of each a prompt, and the tokens that they took."""
        completions = self.engine.generate([example.prompt for example in batch], sampling)
        self.clock.lap(GENERATING)
        wait, spent = self._in_flight(batch, completions)
        scores = wait()
        self.failures.add(scores, "a held-out answer")
        self.clock.lap(SCORING)
        return scores, [completion.text for completion in completions], spent

    def _in_flight(
        self, batch: list[Example], completions: Sequence[Completion], seconds: float = 0.0
    ) -> tuple[Pending, Spent]:
        """The scores on their way, and what their answers took."""
        pending = self.task.score_later(batch, [completion.text for completion in completions])
        self.clock.lap(SCORING)
        read = sum(completion.prompt_tokens for completion in completions)
        return pending, Spent(read, sum(completion.tokens for completion in completions), seconds)

    def _members(
        self, es: EvolutionStrategy, batch: list[Example], sampling: Sampling
    ) -> Generator[tuple[int, Sequence[Completion]], None, None]:
        """The members that fall to this worker, by number, each with its completions."""
        generation, size = es.generation, self.config.strategy.population_size
        if isinstance(self.engine, Fleet):
            prompts = [example.prompt for example in batch]
            for answers in self.engine.members(generation, size, prompts, sampling):
                spent = {PERTURB: answers.perturb_seconds, GENERATING: answers.generate_seconds}
                self.clock.share(spent)
                yield answers.number, answers.completions
            return
        order = {member: number for number, member in enumerate(es.strategy.members(generation))}
        for member in es.population(self.workers.deal(generation, size)):
            self.engine.weights_changed()
            self.clock.lap(PERTURB)
            completions = self.complete(order[member], batch, sampling)
            self.clock.lap(GENERATING)
            yield order[member], completions

    def batch(self, generation: int) -> list[Example]:
        """The generation's prompts."""
        dealt = 0 if self.config.fixed_prompts else generation
        return self.task.train_batch(self.config.strategy.seed, dealt, self.config.prompts)

    def complete(
        self, number: int, batch: Sequence[Example], sampling: Sampling
    ) -> list[Completion]:
        """What member `number` of the population, which is applied, answers to the batch."""
        return self.engine.generate([example.prompt for example in batch], sampling)

    def sampling(self, generation: int) -> Sampling:
        """All members of a generation share the sampling's random numbers."""
        return replace(self.config.sampling, seed=self.config.sampling.seed + generation)

    def population(
        self, es: EvolutionStrategy, after: Callable[[int], None] = lambda number: None
    ) -> Earned:
        """Evaluates the members that fall to this worker, and gathers what all of them earned.

        Scoring goes on while the next members generate; what is counted as scoring is the wait for
        it. after: called with the number of each member that has generated here.
        """
        generation, size = es.generation, self.config.strategy.population_size
        batch, sampling = self.batch(generation), self.sampling(generation)
        grouped = self.config.strategy.shaping == "group_centered"
        rows = np.zeros((size, COLUMNS + (len(batch) if grouped else 1)))
        pending: dict[int, tuple[Pending, Spent]] = {}
        self.clock.lap(RECORDS)
        began = self.clock.seconds[GENERATING]
        with closing(self._members(es, batch, sampling)) as members:
            for number, completions in members:
                seconds = self.clock.seconds[GENERATING] - began
                began += seconds
                pending[number] = self._in_flight(batch, completions, seconds)
                after(number)
                self.clock.lap(RECORDS)
        self.clock.lap(PERTURB)
        for number, (wait, spent) in sorted(pending.items()):
            scores = wait()
            self.failures.add(scores, "an answer")
            rows[number] = row_of(scores, spent, grouped)
        self.clock.lap(SCORING)
        own = rows[:, 0].sum()
        rows = self.workers.gather(rows)
        self.clock.lap(PERTURB)
        self.failures.elsewhere(int(rows[:, 0].sum() - own))
        return earned_of(rows, grouped)

    def update(self, es: EvolutionStrategy, record: GenerationRecord | None) -> int:
        """Applies the leader's record at every worker; returns how many weights saturated.

        record: the leader's, on disk already; None at the others. StateError where the workers'
        weights are apart.
        """
        data = self.workers.share(None if record is None else encode(record)[1])
        shared = decode(GENERATION, data, es.config)
        assert isinstance(shared, GenerationRecord)
        if shared.checksum is not None:
            own = shared.checksum if record is not None else es.weights.checksum()
            self.workers.compare(own, es.generation)
        self.clock.lap(RECORDS)
        report = es.apply(shared)
        self.engine.weights_changed()
        self.clock.lap(UPDATE)
        return report.saturated


def strategy_over(
    engine: Engine, config: TrainConfig, anchor: Path | None = None
) -> EvolutionStrategy:
    """A run at generation 0 over an engine's weights.

    anchor: the folder of the model that decay pulls to; without it a copy is kept.
    """
    decays = config.strategy.decay is not None
    weights = engine.live_weights(
        config.memory, decays and (anchor or True), threads=config.threads
    )
    return EvolutionStrategy(weights, config.strategy)


def follow(rollout: Rollout, es: EvolutionStrategy, generations: int) -> None:
    """The whole loop of a worker that does not lead: it evaluates, and applies what it is sent."""
    while es.generation < generations:
        rollout.population(es)
        rollout.update(es, None)
    rollout.workers.compare(es.weights.checksum(), es.generation)

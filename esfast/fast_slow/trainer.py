"""The loop of `esfast train`, with a search for prompts before each cycle of generations.

Seeds, coefficients, journal, exact restore and resume are `Trainer`'s: prompts decide rewards, and
the journal holds what came of those. A cycle's prompts are in the run's folder before its first
generation. The held-out prompts are answered twice: under the instruction that the run started
with, whose score only the weights move, and under the best prompt of the cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from esfast.bounds import require_whole
from esfast.cost import Tokens
from esfast.engines.base import Sampling
from esfast.errors import ConfigError
from esfast.evolution import EvolutionStrategy
from esfast.fast_slow.cycles import HELD_OUT_PROMPT, PROMPTS, Cycle, cycles_until
from esfast.fast_slow.instructed import Instructed, under
from esfast.fast_slow.reflection import OwnReflection, Reflection
from esfast.fast_slow.search import MINIBATCH, Asker, InstructionAdapter, keep, search
from esfast.fast_slow.split import SplitRollout
from esfast.held_out import HeldOut
from esfast.measure import PROMPT_SEARCH, RECORDS
from esfast.progress import GenerationReport
from esfast.provenance import version
from esfast.rollout import TrainConfig
from esfast.tasks.base import Example
from esfast.tasks.draws import digest_int
from esfast.train import Trainer
from esfast.training_run import TrainResult

REASONS_SHOWN = 3  # the others are in prompts.jsonl
MOST_PROBLEMS = 1_000_000  # of a cycle, which are held at once
INSTRUCTION = "Do exactly what the task below asks for."


@dataclass(frozen=True)
class FastSlowConfig(TrainConfig):
    """Settings of a run beside its model and task; those of `esfast train`, and

    `generations_per_cycle`: T; `kept_prompts`: K; `metric_calls`: answers that a cycle's search may
    score; `pareto_size`: problems of a cycle that candidates are scored on, None for all;
    `instruction`: the first; `reflection`: module:function, None for the model itself, which then
    writes `reflection_tokens` at most at `reflection_temperature`. Raises ConfigError.
    """

    generations_per_cycle: int = 6
    kept_prompts: int = 4
    metric_calls: int = 960
    pareto_size: int | None = None
    instruction: str = INSTRUCTION
    reflection: str | None = None
    reflection_tokens: int = 256
    reflection_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("generations_per_cycle", "kept_prompts", "metric_calls", "reflection_tokens")
        require_whole(self, 1, *counts)
        if self.pareto_size is not None:
            require_whole(self, 1, "pareto_size")
        self._check_population()
        self._check_texts()
        if self.generations % self.generations_per_cycle:
            raise ConfigError(
                f"{self.generations} generations are no whole number of cycles of "
                f"{self.generations_per_cycle}."
            )
        if self.dealt > MOST_PROBLEMS:
            raise ConfigError(
                f"generations_per_cycle * prompts is {self.generations_per_cycle} * {self.prompts};"
                f" expected {MOST_PROBLEMS} at most: a cycle's problems are held at once."
            )

    def _check_population(self) -> None:
        strategy = self.strategy
        groups = strategy.population_size // (2 if strategy.antithetic else 1)
        if self.kept_prompts > groups:
            what = "antithetic pairs" if strategy.antithetic else "members"
            raise ConfigError(
                f"kept_prompts is {self.kept_prompts}, and the population has {groups} {what}: "
                "some prompts would be asked by none. Keep fewer prompts, or take a larger "
                "population."
            )
        if strategy.shaping != "group_centered":
            raise ConfigError(
                f"shaping is {strategy.shaping!r}; fast-slow training normalises the answers to a "
                "problem as one group, which is 'group_centered'."
            )

    def _check_texts(self) -> None:
        try:
            self.instruction.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"instruction is {self.instruction!a:.80}, which holds half a character (a "
                "surrogate); write it in UTF-8."
            ) from None
        Sampling(self.reflection_tokens, temperature=self.reflection_temperature)

    @property
    def cycles(self) -> int:
        """How many."""
        return self.generations // self.generations_per_cycle

    @property
    def dealt(self) -> int:
        """Problems of a cycle, those that are dealt twice twice."""
        return self.prompts * (1 if self.fixed_prompts else self.generations_per_cycle)


def problems_of(task: Instructed, config: FastSlowConfig, cycle: int) -> list[Example]:
    """The distinct problems of a cycle's batches, without an instruction, as they are dealt."""
    first = cycle * config.generations_per_cycle
    dealt = range(first, first + config.generations_per_cycle)
    seed, count = config.strategy.seed, config.prompts
    found: dict[str, Example] = {}
    for generation in [0] if config.fixed_prompts else dealt:
        for example in task.task.train_batch(seed, generation, count):
            found.setdefault(example.id, example)
    return list(found.values())


def require_budget(task: Instructed, config: FastSlowConfig) -> None:
    """ConfigError where a cycle's metric calls do not do for its first proposal."""
    if config.metric_calls >= min(config.dealt, config.pareto_size or config.dealt) + 2 * MINIBATCH:
        return
    for cycle in range(1 if config.fixed_prompts else config.cycles):
        problems = len(problems_of(task, config, cycle))
        scored_on = min(problems, config.pareto_size or problems)
        least = scored_on + 2 * MINIBATCH
        if config.metric_calls < least:
            raise ConfigError(
                f"metric_calls is {config.metric_calls}; expected {least} or more: candidates are "
                f"scored on {scored_on} problems of a cycle's {problems}, and a proposal takes "
                f"{2 * MINIBATCH} more. Allow more with --metric-calls, or score on fewer with "
                "--pareto-size."
            )


class FastSlowTrainer(Trainer):
    """Runs one fast-slow training; `task` is an `Instructed`, `reflection` None for the model."""

    config: FastSlowConfig
    rollout: SplitRollout

    def __init__(self, *args: Any, reflection: Reflection | None = None, **rest: Any) -> None:
        """As of `Trainer`."""
        super().__init__(*args, **rest)
        assert isinstance(self.rollout.task, Instructed)
        self.task = self.rollout.task
        self.rollout = SplitRollout(self.engine, self.task, self.config, self.clock)
        self.rollout.failures = self.failures
        tokens, temperature = self.config.reflection_tokens, self.config.reflection_temperature
        self._reflection = reflection or OwnReflection(self.engine, tokens, temperature)
        self._with_prompt: HeldOut | None = None
        self.cycles: list[Cycle] = []

    # --- what the loop of `esfast train` asks for ---------------------------------------------

    def _start(self) -> None:
        writer = self.folder.journal
        done = 0 if writer is None else writer.generation
        each = self.config.generations_per_cycle
        self.cycles = cycles_until(self.folder.path, done, each)
        super()._start()

    def _go_on(self, done: int) -> None:
        self._count_search()
        super()._go_on(done)
        for cycle in self.cycles:
            if cycle.generation == done:  # no line of metrics.jsonl has counted them yet
                self.account.evaluation.prompt += cycle.held_out_tokens.prompt
                self.account.evaluation.generated += cycle.held_out_tokens.generated
        self.clock.seconds[PROMPT_SEARCH] = sum(cycle.seconds for cycle in self.cycles)

    def _generation(self, es: EvolutionStrategy) -> GenerationReport:
        number = es.generation // self.config.generations_per_cycle
        if number == len(self.cycles):
            self._keep(self._searched(number, es.generation))
        self.rollout.instructions = self.cycles[number].prompts
        return super()._generation(es)

    def _evaluate_if_due(self, generation: int) -> HeldOut | None:
        """At the end of every cycle too."""
        if generation % self.config.generations_per_cycle:
            return super()._evaluate_if_due(generation)
        self._after = self._evaluate(generation)
        return self._after

    def _evaluate(self, generation: int) -> HeldOut:
        before = replace(self.account.evaluation)
        held_out = super()._evaluate(generation)
        if generation:
            cycle = self.cycles[(generation - 1) // self.config.generations_per_cycle]
            try:
                self._with_prompt = self._evaluate_under(generation, cycle.prompts[0], held_out)
            except BaseException:  # a run that goes on evaluates both again
                self.account.evaluation = before
                raise
        return held_out

    def _evaluate_under(
        self, generation: int, prompt: str, known: HeldOut | None = None
    ) -> HeldOut:
        """known: the answers under the first instruction, of the same weights."""
        if known is not None and prompt == self.task.instruction:
            return known
        return self._answered(generation, under(self._held_out, prompt))

    def _evaluated(self, held_out: HeldOut | None) -> dict[str, dict[str, Any] | None]:
        with_prompt = None if held_out is None else self._with_prompt
        record = None if with_prompt is None else with_prompt.record()
        return {**super()._evaluated(held_out), HELD_OUT_PROMPT: record}

    def _summarise(self, status: str, generations: int, **method: object) -> TrainResult:
        """Adds what the prompts came to, and says it."""
        with_prompt = None if self._after is None else self._with_prompt
        if self._after is not None and with_prompt is not None:
            self.progress.note(
                f"held-out at generation {self._after.generation}: {self._after.text()} under the "
                f"first instruction, {with_prompt.text()} under the best prompt"
            )
        found = {
            "cycles": len(self.cycles),
            "prompts": list(self.cycles[-1].prompts) if self.cycles else [],
            HELD_OUT_PROMPT: with_prompt and with_prompt.record(),
            "metric_calls": sum(cycle.metric_calls for cycle in self.cycles),
            "reflections": sum(cycle.reflections for cycle in self.cycles),
        }
        return super()._summarise(status, generations, fast_slow=found, **method)

    # --- the search ---------------------------------------------------------------------------

    def _searched(self, number: int, generation: int) -> Cycle:
        """The fast phase of a cycle, under the weights as they are."""
        self.clock.lap(RECORDS)
        problems = problems_of(self.task, self.config, number)
        scored_on = spread(problems, self.config.pareto_size)
        adapter = self._adapter(number, generation, problems)
        try:
            pool = search(
                adapter,
                problems,
                scored_on,
                self.config.metric_calls,
                digest_int("prompt search", self.config.strategy.seed, number),
                lambda calls: self._doing(number, calls),
            )
        finally:  # one that Ctrl-C ends was no keeping of records either
            seconds = self.clock.lap(PROMPT_SEARCH)
        return Cycle(
            cycle=number,
            generation=generation,
            problems=len(problems),
            scored_on=len(scored_on),
            metric_calls=adapter.asker.calls,
            reflections=adapter.reflections,
            failed=tuple({"reason": r, "count": n} for r, n in adapter.failed.most_common()),
            tokens=adapter.asker.tokens,
            seconds=seconds,
            candidates=tuple(keep(pool, self.config.kept_prompts)),
            gepa=version("gepa"),
        )

    def _adapter(
        self, number: int, generation: int, problems: Sequence[Example]
    ) -> InstructionAdapter:
        asker = Asker(
            self.engine,
            self.task,
            self.rollout.sampling(generation),
            self.failures,
            room_for=[*problems, *self._held_out],
        )
        earlier = self.cycles[-1].prompts if self.cycles else ()
        seeds = [self.task.instruction, *earlier]
        key = self.config.strategy.seed, number
        return InstructionAdapter(asker, self._reflection, seeds, key)

    def _keep(self, cycle: Cycle) -> None:
        """Writes the cycle down, with what its best prompt is worth before the weights move."""
        known = self._after or self._before
        if known is not None and known.generation != cycle.generation:
            known = None
        before = replace(self.account.evaluation)
        held_out = self._evaluate_under(cycle.generation, cycle.prompts[0], known)
        if cycle.prompts[0] == self.task.instruction:  # counted when the cycle before ended
            self.account.evaluation = before
        spent = self.account.evaluation
        took = Tokens(spent.prompt - before.prompt, spent.generated - before.generated)
        cycle = replace(cycle, held_out=held_out.record(), held_out_tokens=took)
        self.folder.write_lines(PROMPTS, [one.record() for one in (*self.cycles, cycle)])
        self.cycles.append(cycle)
        self._count_search()
        for line in told(cycle, self.config):
            self.progress.note(line)
        self.progress.note(f"held-out under its best prompt: {held_out.text()}")
        self.clock.lap(RECORDS)

    def _count_search(self) -> None:
        spent = [cycle.tokens for cycle in self.cycles]
        self.account.search = Tokens(
            sum(tokens.prompt for tokens in spent), sum(tokens.generated for tokens in spent)
        )

    def _doing(self, number: int, calls: int) -> None:
        self.progress.doing(
            f"cycle {number + 1}/{self.config.cycles}: prompts, metric call {calls}/"
            f"{self.config.metric_calls}"
        )


def spread(problems: Sequence[Example], size: int | None) -> list[Example]:
    """`size` of the problems, evenly over their order; all of them where there are no more."""
    size = min(len(problems), size or len(problems))
    return [problems[at * len(problems) // size] for at in range(size)]


def told(cycle: Cycle, config: FastSlowConfig) -> list[str]:
    """What a search came to, for the console."""
    kept, wanted = len(cycle.prompts), config.kept_prompts
    fewer = f" ({wanted} asked for, the Pareto front has no more)" if kept < wanted else ""
    first, best = cycle.candidates[0], max(c.score for c in cycle.candidates if c.kept)
    lines = [
        f"cycle {cycle.cycle + 1}/{config.cycles}: {kept} of {len(cycle.candidates)} prompts kept"
        f"{fewer}; best {best:.3f}, first instruction "
        f"{first.score:.3f} on {cycle.scored_on} problems; {cycle.metric_calls} metric calls, "
        f"{cycle.reflections} reflections, {cycle.seconds:.0f} s"
    ]
    shown = cycle.failed[:REASONS_SHOWN]
    lines += [f"  {failed['count']} times no proposal: {failed['reason']}" for failed in shown]
    return lines

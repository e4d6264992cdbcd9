"""Evolution strategies over a live model: a population in, one exact update out.

    es = EvolutionStrategy(model, sigma=1e-3, alpha=5e-4, population_size=30, seed=0)
    for generation in range(100):
        rewards = [evaluate(model) for member in es.population()]
        es.step(rewards)

Inside the loop the model is that member; a loop that is left early restores the weights. The
settings are StrategyConfig's. Seeds derive from (seed, generation, member), so that a run is
repeated by its settings and its rewards alone. With a journal (esfast.replay.keep_journal) every
generation is on disk before the weights move.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from esfast.anchor import Anchor
from esfast.errors import ConfigError, DataError, LostError, StateError
from esfast.interrupts import Interrupts
from esfast.journal import JournalWriter
from esfast.journal_format import GenerationRecord, merged
from esfast.live_weights import LiveWeights
from esfast.member_loop import MemberLoop, Steps, forget_iterated
from esfast.members import Member, whole
from esfast.parameters import ParameterTable
from esfast.shaping import as_rewards
from esfast.strategy import Strategy, StrategyConfig
from esfast.update import Update, UpdateReport
from esfast.weights import Weights


@dataclass(frozen=True, eq=False)  # by identity: arrays have no one truth
class StepReport:
    """One update: its generation, members and fp64 coefficients, and how many weights saturated."""

    generation: int
    members: tuple[Member, ...]
    coefficients: np.ndarray
    saturated: int


class EvolutionStrategy:
    """Drives `Strategy` over `Weights`.

    model: a torch module, or a ParameterTable; memory: "lean", "shadow", "master" (the last two
    start from their copy: `es.weights.rebase()` takes what an optimizer or load_state_dict did to
    the model); anchor: for decay, by default a copy of the weights as they are now; settings:
    StrategyConfig's fields (a schedule sets `es.strategy.config = replace(es.config, sigma=...)`
    between generations; within a journal sigma, alpha, shaping and decay may change). In a model's
    place an engine's `live_weights` may stand, made with a memory, anchor and threads.
    """

    def __init__(
        self,
        model: torch.nn.Module | ParameterTable | LiveWeights,
        config: StrategyConfig | None = None,
        *,
        memory: str = "lean",
        anchor: Anchor | None = None,
        threads: int | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise TypeError(f"give a config or settings, not both (got {', '.join(settings)})")
        if not isinstance(config, (StrategyConfig, type(None))):
            raise ConfigError(
                f"config is {config!r}; give a StrategyConfig, or its fields by name, such as "
                "sigma=1e-3."
            )
        self.strategy = Strategy(config or StrategyConfig(**settings))
        self.weights = self._live(model, memory, anchor, threads)
        self.generation = 0
        self.journal: JournalWriter | None = None
        self._loop = object()

    def _live(
        self,
        model: torch.nn.Module | ParameterTable | LiveWeights,
        memory: str,
        anchor: Anchor | None,
        threads: int | None,
    ) -> LiveWeights:
        if isinstance(model, LiveWeights):
            if (memory, anchor, threads) != ("lean", None, None):
                raise TypeError("memory, anchor and threads are settings of the live weights given")
            return model
        if not isinstance(model, (torch.nn.Module, ParameterTable)):
            raise ConfigError(
                f"EvolutionStrategy got a {type(model).__name__}; give a torch module, or "
                "ParameterTable.from_tensors({name: tensor})."
            )
        table = model if isinstance(model, ParameterTable) else ParameterTable.from_module(model)
        if self.config.decay is not None and anchor is None:
            anchor = Anchor.in_memory(table)
        return Weights(table, memory, anchor, threads)

    @property
    def config(self) -> StrategyConfig:
        """The settings that the result depends on."""
        return self.strategy.config

    def population(self, dealt: Iterable[int] | None = None) -> MemberLoop:
        """The members of this generation; while one is yielded, the weights are that member's.

        dealt: the numbers of those to take, one at a time, where workers share a population.
        Leaving the loop (break, exception, Ctrl-C) restores the weights; so does `step`.
        StateError where the loop goes on after a `step` or another loop began inside it.
        """
        return MemberLoop(self._members(dealt))

    def _members(self, dealt: Iterable[int] | None) -> Steps:
        forget_iterated(sys._getframe(1))
        self._require_anchor()  # before a generation is evaluated for nothing
        self._loop = loop = object()  # a loop that is collected late must leave a newer one alone
        generation = self.generation
        try:
            members = self.strategy.members(generation)
            for number in range(len(members)) if dealt is None else dealt:
                member = _member_of(members, number)
                self._require_alone(loop, generation)
                self.weights.perturb(member, self.config.sigma)
                yield member
        finally:
            try:
                self._leave(loop)
            except BaseException:  # a Ctrl-C that falls between this block and its restore
                self._leave(loop)
                raise

    def _require_alone(self, loop: object, generation: int) -> None:
        if self.generation == generation and self._loop is loop:
            return
        met = "a step was made" if self.generation != generation else "another one was begun"
        raise StateError(
            f"{met} inside a loop over population(), so its next member would not be what was "
            "asked for. Finish one loop, then step."
        )

    def _leave(self, loop: object) -> None:
        if self._loop is loop:
            with suppress(LostError):  # weights that are gone are told of where they are asked for
                self.weights.restore()

    def step(self, rewards: ArrayLike, nan: str = "raise", failed: int = 0) -> StepReport:
        """Moves the weights along the noise that scored well, and goes to the next generation.

        rewards: one a member in the order of population(), or [population, prompts] with
        group_centered shaping; nan: "worst" gives NaN the lowest finite one, "raise" refuses
        them; failed: how many of them stand in for rewards that failed, for the journal. Errors
        leave weights and generation as they were (DataError, for one, of rewards); a journal,
        where there is one, has the generation before the weights move. A Ctrl-C that comes while
        they move is raised after all of it is done.
        """
        record = self.decide(rewards, nan, failed)
        members = tuple(self.strategy.members(self.generation))
        coefficients = self.strategy.coefficients(rewards, nan)
        with Interrupts(moving=True) as interrupts:
            if self.journal is not None:
                self.journal.append(record)
            report = self.apply(record)
            interrupts.rest()
        return StepReport(record.generation, members, coefficients, report.saturated)

    def decide(self, rewards: ArrayLike, nan: str = "raise", failed: int = 0) -> GenerationRecord:
        """What `step` would do with these rewards, as scalars; changes nothing."""
        count = whole(failed)
        if count is None or not 0 <= count < 2**32:
            raise DataError(f"failed is {failed!r}; expected how many rewards failed, 0 or more.")
        coefficients = self.strategy.coefficients(rewards, nan)
        _, terms = merged(self.strategy.members(self.generation), coefficients)
        record = GenerationRecord(
            generation=self.generation,
            sigma=self.config.sigma,
            alpha=self.config.alpha,
            decay=self.config.decay,
            coefficients=terms,
            rewards=as_rewards(rewards),
            failed=count,
            checksum=self._due_checksum(),
        )
        self._require_applicable(record)
        return record

    def _require_applicable(self, record: GenerationRecord) -> None:
        """What `apply` or a replay would refuse must not get into a journal."""
        terms = record.terms(self.config)
        Update(terms, record.coefficients, record.decay, record.alpha, self.config.rounding)
        self._require_anchor()
        if isinstance(self.weights, Weights):
            self.weights.require_ready()
        if self.journal is not None:
            _require_header(self.journal.header.config, self.config)

    def _require_anchor(self) -> None:
        weights = self.weights
        if self.config.decay is not None and isinstance(weights, Weights):
            weights.require_anchor()

    def _due_checksum(self) -> str | None:
        every = self.journal.header.checksum_every if self.journal is not None else 0
        due = every and self.generation and self.generation % every == 0
        if not due:
            return None
        self.weights.restore()
        return self.weights.checksum()

    def apply(self, record: GenerationRecord) -> UpdateReport:
        """Moves the weights by a record of this generation: `decide`'s, a journal's, or another
        worker's. StateError for one of another generation. A Ctrl-C waits for the end of it."""
        if record.generation != self.generation:
            raise StateError(
                f"a record of generation {record.generation} was given to a run at generation "
                f"{self.generation}; apply a journal's records in order, each once."
            )
        with Interrupts(moving=True) as interrupts:
            report = self.weights.update(
                record.terms(self.config),
                record.coefficients,
                decay=record.decay,
                alpha=record.alpha,
                rounding=self.config.rounding,
                seed=self.strategy.generation_seed(self.generation),
            )
            self.generation += 1
            interrupts.rest()
        return report


def _require_header(header: StrategyConfig, now: StrategyConfig) -> None:
    """StateError where the settings that a record leaves to its journal's header are others now."""
    for name in ("population_size", "seed", "noise", "antithetic", "rounding"):
        was, given = getattr(header, name), getattr(now, name)
        if was != given:
            raise StateError(
                f"{name} is {given!r}, and the journal was begun with {was!r}: a replay would make "
                "other weights. Only sigma, alpha, shaping and decay can change within a journal."
            )
    if header.decay is None and now.decay is not None:
        raise StateError(
            f"decay is {now.decay!r}, and the journal was begun without, so it names no anchor for "
            "a replay. Begin it with decay, if of weight 0."
        )


def _member_of(members: list[Member], number: int) -> Member:
    place = whole(number)
    if place is None or not 0 <= place < len(members):
        raise ConfigError(
            f"member {number!r} was dealt of a population of {len(members)}; numbers are whole, "
            f"from 0 to {len(members) - 1}."
        )
    return members[place]

"""Evolution strategies over a live model: a population in, one exact update out.

    es = EvolutionStrategy(model, sigma=1e-3, alpha=5e-4, population_size=30, seed=0)
    for generation in range(100):
        rewards = [evaluate(model) for member in es.population()]
        es.step(rewards)

Inside the loop the model is that member; a loop that is left early restores the weights. The
settings are StrategyConfig's. Seeds derive from (seed, generation, member), so that a run is
repeated by its settings and its rewards alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from esfast.anchor import Anchor
from esfast.members import Member
from esfast.parameters import ParameterTable
from esfast.strategy import Strategy, StrategyConfig
from esfast.weights import Weights


@dataclass(frozen=True)
class StepReport:
    """One update: its generation, members and fp64 coefficients, and how many weights saturated."""

    generation: int
    members: tuple[Member, ...]
    coefficients: np.ndarray
    saturated: int


class EvolutionStrategy:
    """Drives `Strategy` over `Weights`.

    model: a torch module, or a ParameterTable; memory: "lean", "shadow", "master"; anchor: for
    decay, by default a copy of the weights as they are now; settings: StrategyConfig's fields.
    """

    def __init__(
        self,
        model: torch.nn.Module | ParameterTable,
        config: StrategyConfig | None = None,
        *,
        memory: str = "lean",
        anchor: Anchor | None = None,
        threads: int | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise TypeError(f"give a config or settings, not both (got {', '.join(settings)})")
        self.strategy = Strategy(config or StrategyConfig(**settings))
        table = model if isinstance(model, ParameterTable) else ParameterTable.from_module(model)
        if self.config.decay is not None and anchor is None:
            anchor = Anchor.in_memory(table)
        self.weights = Weights(table, memory, anchor, threads)
        self.generation = 0
        self._loop = object()

    @property
    def config(self) -> StrategyConfig:
        """The settings that the result depends on."""
        return self.strategy.config

    def population(self) -> Iterator[Member]:
        """The members of this generation; while one is yielded, the weights are that member's.

        Leaving the loop (break, exception, Ctrl-C) restores the weights; so does `step`.
        """
        self._loop = loop = object()  # a loop that is collected late must leave a newer one alone
        try:
            for member in self.strategy.members(self.generation):
                self.weights.perturb(member, self.config.sigma)
                yield member
        finally:
            if self._loop is loop:
                self.weights.restore()

    def step(self, rewards: ArrayLike, nan: str = "raise") -> StepReport:
        """Moves the weights along the noise that scored well, and goes to the next generation.

        rewards: one a member in the order of population(), or [population, prompts] with
        group_centered shaping. Errors (DataError) leave weights and generation as they were.
        """
        coefficients = self.strategy.coefficients(rewards, nan)
        members = self.strategy.members(self.generation)
        report = self.weights.update(
            members,
            coefficients,
            decay=self.config.decay,
            alpha=self.config.alpha,
            rounding=self.config.rounding,
            seed=self.strategy.generation_seed(self.generation),
        )
        self.generation += 1
        return StepReport(self.generation - 1, tuple(members), coefficients, report.saturated)

"""The strategy in numbers alone: members of a generation out, coefficients of its update out.

    theta <- theta + (alpha / N) * sum_n F_n * eps_n          (Qiu et al., arXiv 2509.24372)

There is no 1 / sigma: it is in alpha. Nothing here knows a model; `EvolutionStrategy` drives one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from esfast.errors import ConfigError, DataError, require_one_of
from esfast.members import MOST_MEMBERS, NOISES, Member, generation_seed, member_seed, whole
from esfast.shaping import METHODS, as_rewards, shape

ROUNDINGS = ("stochastic", "nearest")
DECAYS = ("l1", "l2")
SMALLEST, LARGEST = 2.0**-149, 1e30  # of sigma and alpha: fp32's subnormals, and far from its end


PAPER_L2 = 10.0 * 5e-4
"""alpha * lambda of l2 decay in arXiv 2605.30148."""
PAPER_L1 = 0.01 * math.sqrt(30)
"""lambda * sqrt(population size) of its l1 decay."""


def real(value: object) -> float | None:
    """A finite number of any library as a float; None for anything else (True is no number)."""
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class AnchoredDecay:
    """Anchored weight decay (arXiv 2605.30148), applied to delta = w - anchor after the ES step.

    l2: delta <- (1 - alpha * weight) * delta;  l1: delta <- sign(delta) * max(|delta| - alpha *
    weight, 0). `weight` is the paper's lambda (at alpha 5e-4: l2 10, l1 0.01).
    """

    kind: str
    weight: float

    def __post_init__(self) -> None:
        require_one_of("decay", self.kind, DECAYS)
        weight = real(self.weight)
        if weight is None or not 0 <= weight < LARGEST:
            raise ConfigError(
                f"the decay's weight (lambda) is {self.weight!r}; it is 0 or more, and below "
                f"{LARGEST:g}."
            )
        object.__setattr__(self, "weight", weight)

    @classmethod
    def automatic(cls, kind: str, alpha: float, population_size: int) -> AnchoredDecay:
        """The lambda that holds noise as strongly as the paper's (alpha 5e-4, population 30).

        For l2 alpha * lambda decides, 5e-3: the time constant is 1 / (alpha * lambda) generations.
        For l1 it is the pull over a step of the walk, lambda * sqrt(N), 0.055, whatever alpha is:
        the time constant is 2 / (lambda^2 * N) generations (docs/forgetting.md derives both).
        ConfigError as of the constructor, and of StrategyConfig for the other two.
        """
        StrategyConfig(alpha=alpha, population_size=population_size)
        weight = PAPER_L1 / math.sqrt(population_size) if kind == "l1" else PAPER_L2 / alpha
        return cls(kind, weight)

    def strength(self, alpha: float) -> float:
        """1 - alpha * lambda for l2 (ConfigError where not positive), alpha * lambda for l1
        (ConfigError where fp32 is left). The core rounds it to fp32.
        """
        product = alpha * self.weight
        if self.kind == "l2" and not product < 1:
            raise ConfigError(
                f"alpha * lambda is {alpha:g} * {self.weight:g} = {product:g}; l2 decay needs it "
                "below 1, or the weights would jump past their anchor. Lower lambda or alpha."
            )
        if not product < LARGEST:
            raise ConfigError(
                f"alpha * lambda is {alpha:g} * {self.weight:g} = {product:g}; expected below "
                f"{LARGEST:g}, or fp32 could not hold it. Lower lambda or alpha."
            )
        return 1 - product if self.kind == "l2" else product


@dataclass(frozen=True)
class StrategyConfig:
    """Settings of a run that its result depends on, to the bit.

    sigma: noise scale, in units of the weights; alpha: step size; population_size: members a
    generation; seed: run seed, 64 bits; noise, shaping, rounding: by name; antithetic: members 2k
    and 2k + 1 share their noise with opposite signs; decay: towards the anchor, or None.
    """

    sigma: float = 1e-3
    alpha: float = 5e-4
    population_size: int = 30
    seed: int = 0
    noise: str = "gaussian"
    antithetic: bool = False
    shaping: str = "rank"
    decay: AnchoredDecay | None = None
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        self._check_numbers()
        for setting, choices in (("noise", NOISES), ("shaping", METHODS), ("rounding", ROUNDINGS)):
            require_one_of(setting, getattr(self, setting), choices)
        if self.decay is not None and not isinstance(self.decay, AnchoredDecay):
            raise ConfigError(
                f"decay is {self.decay!r}; it is None, or such as AnchoredDecay('l2', 10.0)."
            )
        if self.decay is not None:
            self.decay.strength(self.alpha)

    def _check_numbers(self) -> None:
        for setting in ("sigma", "alpha"):
            value = real(getattr(self, setting))
            if value is None or not SMALLEST <= value < LARGEST:
                raise ConfigError(
                    f"{setting} is {getattr(self, setting)!r}; it is a positive number below "
                    f"{LARGEST:g} that fp32 can hold."
                )
            object.__setattr__(self, setting, value)
        size, seed = whole(self.population_size), whole(self.seed)
        if size is None or not 2 <= size <= MOST_MEMBERS:
            raise ConfigError(
                f"population_size is {self.population_size!r}; it is 2 to {MOST_MEMBERS}: one "
                "member alone has nothing to be compared with."
            )
        if not isinstance(self.antithetic, (bool, np.bool_)):
            raise ConfigError(f"antithetic is {self.antithetic!r}; it is True or False.")
        if self.antithetic and size % 2:
            raise ConfigError(
                f"population_size is {self.population_size} with antithetic pairs; make it even."
            )
        if seed is None or not 0 <= seed < 2**64:
            raise ConfigError(f"seed is {self.seed!r}; it is an integer from 0 to 2**64 - 1.")
        object.__setattr__(self, "population_size", size)
        object.__setattr__(self, "antithetic", bool(self.antithetic))
        object.__setattr__(self, "seed", seed)


class Strategy:
    """Asks for members, is told rewards: the scalar half of evolution strategies."""

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config

    def members(self, generation: int) -> list[Member]:
        """The population of a generation, in order. Errors if two derived seeds collide."""
        c = self.config
        draws = c.population_size // 2 if c.antithetic else c.population_size
        if c.noise == "hadamard":
            shared = self.generation_seed(generation)
            pairs = [(shared, index) for index in range(draws)]
        else:
            pairs = [(member_seed(c.seed, generation, n), 0) for n in range(draws)]
        if len(set(pairs)) != draws:
            raise ConfigError(
                f"two members of generation {generation} share a derived seed (run seed {c.seed}); "
                "choose another run seed."
            )
        signs = (1, -1) if c.antithetic else (1,)
        return [Member(seed, sign, c.noise, index) for seed, index in pairs for sign in signs]

    def generation_seed(self, generation: int) -> int:
        """Key of the generation's stochastic rounding (and of its Hadamard noise)."""
        return generation_seed(self.config.seed, generation)

    def coefficients(self, rewards: ArrayLike, nan: str = "raise") -> np.ndarray:
        """(alpha / N) * F_n, float64 [population], before the members' signs.

        rewards: [population], or [population, prompts] with group_centered shaping; nan: "worst"
        gives NaN the lowest finite reward, "raise" refuses them (DataError).
        """
        values = as_rewards(rewards)
        count = values.shape[0] if values.ndim else 0
        if count != self.config.population_size:
            raise DataError(
                f"{count} rewards were given for a population of {self.config.population_size}; "
                "give one a member, in the order of population()."
            )
        fitness = shape(values, self.config.shaping, nan)
        return self.config.alpha / self.config.population_size * fitness

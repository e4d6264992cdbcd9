"""How far noise alone moves weights: the laws that every run's drift is compared with.

With fitness F of unit variance, a generation adds to each element an independent normal of spread
q = alpha / sqrt(N) (one draw for each direction: whether rewards mean anything hardly matters in
d >> T N dimensions). After T generations of d elements the norm of the change is

    no decay      alpha sqrt(T d / N)                         a random walk
    l2 decay      sqrt(alpha d / (2 lambda N)), reached with time constant 1 / (alpha lambda)
    l2, exactly   q k sqrt(d (1 - k^2T) / (1 - k^2)), k = 1 - alpha lambda
    l1 decay      sqrt(d / 2) alpha / (lambda N), reached with time constant 2 / (lambda^2 N)
    l1, exactly   solved numerically, by esfast.forgetting.l1_walk

Weights of 16 bits under stochastic rounding walk further: a step x leaves an element between two
neighbours, u apart, and the draw adds variance u^2 f (1 - f), f = frac(|x| / u). docs/forgetting.md
derives the rest. Sources: walk and l2 norms arXiv 2605.30148; rounding noise and l1 derived there.
What this does not promise: laws of nearest rounding (it has none: small steps are lost); elements
whose last place changes on the way count with the one that they started with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esfast.errors import ConfigError, ParameterError
from esfast.forgetting import l1_walk
from esfast.forgetting.change import ulp
from esfast.journal_format import GenerationRecord
from esfast.strategy import AnchoredDecay

_NOISY = (torch.bfloat16, torch.float16)
_FEW_STATES = 200  # up to here the stationary chain is solved: 401 states take 10 ms
_REACH = 8.0  # standard deviations that the chain's states span
_DIRECT = 0.15  # below it (in last places) a normal step stays below one in all but 1e-10 of cases


def random_walk_norm(
    alpha: float, population_size: int, elements: int, generations: float
) -> float:
    """alpha sqrt(T d / N): the norm of the change without decay, in units of the weights."""
    return alpha * math.sqrt(generations * elements / population_size)


def l2_plateau_norm(alpha: float, weight: float, population_size: int, elements: int) -> float:
    """sqrt(alpha d / (2 lambda N)), for alpha * lambda << 1 (1.5 alpha lambda too high in norm^2).

    weight: lambda, positive.
    """
    kept(alpha, weight)
    return math.sqrt(alpha * elements / (2 * weight * population_size))


def l2_norm(
    alpha: float, weight: float, population_size: int, elements: int, generations: float = math.inf
) -> float:
    """The exact norm after T generations of l2 decay; without `generations` the plateau.

    weight: lambda; 0 gives the random walk.
    """
    if weight == 0:
        return random_walk_norm(alpha, population_size, elements, generations)
    k = kept(alpha, weight)
    variance = alpha**2 / population_size * k**2 / (1 - k**2) * _approach(k, generations)
    return math.sqrt(elements * variance)


def l1_plateau_norm(alpha: float, weight: float, population_size: int, elements: int) -> float:
    """sqrt(d / 2) alpha / (lambda N), for lambda^2 N << 1 (lambda^2 N too high in norm^2).

    weight: lambda, positive. Each change has a Laplace density of scale q^2 / (2 alpha lambda).
    """
    _l1_pull(alpha, weight)
    return math.sqrt(elements / 2) * alpha / (weight * population_size)


def l1_norm(
    alpha: float, weight: float, population_size: int, elements: int, generations: float = math.inf
) -> float:
    """The norm after T generations of l1 decay, for any lambda; without `generations` the plateau.

    weight: lambda; 0 gives the random walk. Within 1e-3 of a walk of independent normals.
    """
    if weight == 0:
        return random_walk_norm(alpha, population_size, elements, generations)
    step, pull = alpha / math.sqrt(population_size), _l1_pull(alpha, weight)
    return math.sqrt(elements * l1_walk.variance(step, pull, generations))


def l1_time_constant(weight: float, population_size: int) -> float:
    """2 / (lambda^2 N), in generations, whatever alpha: the slowest part of l1's way to rest.

    1 over the spectral gap tau^2 / (2 q^2), above which the spectrum is continuous: what is left
    of a change fades as exp(-t / constant) times t^-1.5, at first much faster than that. For
    lambda^2 N << 1; ConfigError for a lambda that is not positive.
    """
    return 2 / (_l1_pull(1.0, weight) ** 2 * population_size)


def l1_unchanged_share(weight: float, population_size: int) -> float:
    """The share of fp32 weights that l1 decay keeps exactly at their anchor, at rest.

    2 lambda^2 N for lambda^2 N << 1, whatever alpha; solved for larger ones.
    """
    return l1_walk.zero_share(1 / math.sqrt(population_size), _l1_pull(1.0, weight))


def _l1_pull(alpha: float, weight: float) -> float:
    """tau = alpha lambda, positive and finite."""
    if not (weight > 0 and 0 < alpha * weight < math.inf):
        raise ConfigError(
            f"alpha * lambda is {alpha:g} * {weight:g} = {alpha * weight:g}; the l1 laws need it "
            "positive and finite. Without decay the law is random_walk_norm."
        )
    return AnchoredDecay("l1", weight).strength(alpha)


def time_constant(alpha: float, weight: float) -> float:
    """1 / (alpha lambda), in generations: how long a direction is remembered.

    A change shrinks by k a generation, k^t = exp(-t / constant) for small alpha lambda; norm^2
    approaches its plateau twice as fast.
    """
    kept(alpha, weight)
    return 1 / (alpha * weight)


def kept(alpha: float, weight: float) -> float:
    """k = 1 - alpha lambda, in (0, 1). ConfigError for a lambda that leaves it."""
    if not 0 < alpha * weight < 1:
        raise ConfigError(
            f"alpha * lambda is {alpha:g} * {weight:g} = {alpha * weight:g}; the l2 laws need it "
            "above 0 and below 1. Without decay the law is random_walk_norm."
        )
    return AnchoredDecay("l2", weight).strength(alpha)


def norms_of_coefficients(generations: Sequence[GenerationRecord], elements: int) -> np.ndarray:
    """The norm of the change that a journal's coefficients imply, float64 [T + 1], from 0 on.

    V <- k^2 (V + sum_n c_n^2), norm = sqrt(d V): as l2_norm, but with each generation's own
    coefficients, so that ties, unusual shaping and generations without a step count as they were.
    l1 likewise (`l1_walk.variances`). ConfigError for a journal that has both.
    """
    steps = [
        float(np.square(np.asarray(record.coefficients, dtype=np.float64)).sum())
        for record in generations
    ]
    kinds = {record.decay.kind for record in generations if record.decay is not None}
    if kinds == {"l1", "l2"}:
        raise ConfigError("the norm of a run with l1 decay and l2 decay in turn has no law.")
    if kinds == {"l1"}:
        pulls = [r.decay.strength(r.alpha) if r.decay else 0.0 for r in generations]
        return np.append(
            0.0, np.sqrt(elements * l1_walk.variances([math.sqrt(step) for step in steps], pulls))
        )
    variance, norms = 0.0, [0.0]
    for record, step in zip(generations, steps, strict=True):
        k = 1.0 if record.decay is None else record.decay.strength(record.alpha)
        variance = k * k * (variance + step)
        norms.append(math.sqrt(elements * variance))
    return np.array(norms)


@dataclass(frozen=True)
class LastPlaces:
    """The units in the last place of some weights: the distinct ones, and how many have each.

    units: float64 [kinds], ascending, in units of the weights; counts: int64 [kinds].
    """

    units: np.ndarray
    counts: np.ndarray

    @property
    def elements(self) -> int:
        """How many weights were counted."""
        return int(self.counts.sum())


def last_place(tensor: torch.Tensor) -> torch.Tensor:
    """The distance of each weight to its neighbour away from zero: float64, the tensor's shape.

    bf16: 2^(floor(log2 |w|) - 7); fp16: 2^(floor(log2 |w|) - 10). Raises ParameterError for others.
    """
    if tensor.dtype not in _NOISY:
        raise ParameterError(
            f"the last place of {tensor.dtype} is not what rounding is noisy in; give bfloat16 or "
            "float16 weights."
        )
    return torch.from_numpy(ulp(tensor))


def last_places(tensors: Iterable[torch.Tensor]) -> LastPlaces:
    """The last places of all the tensors' elements, counted. ParameterError as `last_place`."""
    totals: dict[float, int] = {}
    for tensor in tensors:
        units, counts = torch.unique(last_place(tensor), return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            totals[unit] = totals.get(unit, 0) + count
    units = sorted(totals)
    return LastPlaces(np.array(units), np.array([totals[unit] for unit in units]))


def rounding_variance(spread: float) -> float:
    """E[f (1 - f)], f = frac(|x|), x ~ N(0, spread^2), all in last places.

    What stochastic rounding adds to an element that lies on the grid and is moved by x: the outcome
    is floor or ceil with mean x, a Bernoulli draw of variance f (1 - f). Small steps: E|x| - E x^2,
    proportional to the step itself; large ones: 1/6. In between its Fourier series.
    """
    if spread < _DIRECT:
        return math.sqrt(2 / math.pi) * spread - spread**2
    n = np.arange(1, 12)
    return 1 / 6 - float((np.exp(-2 * (math.pi * n * spread) ** 2) / n**2).sum()) / math.pi**2


def stochastic_rounding_norm(
    alpha: float,
    population_size: int,
    places: LastPlaces,
    weight: float = 0.0,
    generations: float = math.inf,
    kind: str = "l2",
) -> float:
    """The norm of the change of 16-bit weights under stochastic rounding, rounding noise included.

    places: of the base weights; weight: lambda; generations: without it the plateau; kind: "l2" or
    "l1".
    """
    step = alpha / math.sqrt(population_size)
    if weight == 0:
        each = [_walk(step / u) * generations * u**2 for u in places.units]
    elif kind == "l1":
        pull = _l1_pull(alpha, weight)
        each = [
            l1_walk.rounded_variance(step / u, pull / u, rounding_variance, generations) * u**2
            for u in places.units
        ]
    else:
        k = kept(alpha, weight)
        approach = _approach(k, generations)
        each = [_plateau(step / u, k) * approach * u**2 for u in places.units]
    return math.sqrt(float(np.dot(each, places.counts)))


def _approach(k: float, generations: float) -> float:
    """1 - k^2T: how much of the plateau's norm^2 is there."""
    return 1.0 if math.isinf(generations) else 1 - k ** (2 * generations)


def _walk(step: float) -> float:
    """Variance a generation without decay, in last places squared."""
    return step**2 + rounding_variance(step)


def _plateau(step: float, k: float) -> float:
    """Stationary variance with l2 decay, in last places squared; step: q in last places."""
    variance = (k * k * step**2 + rounding_variance(k * step)) / (1 - k * k)
    states = math.ceil(_REACH * math.sqrt(2 * variance)) + 2
    if states <= _FEW_STATES:
        return _chain_variance(step, k, states)
    for _ in range(8):  # the pull's own spread (1 - k) sqrt(V) adds to the step: a contraction
        spread = math.hypot(k * step, (1 - k) * math.sqrt(variance))
        variance = (k * k * step**2 + rounding_variance(spread)) / (1 - k * k)
    return variance


def _chain_variance(step: float, k: float, states: int) -> float:
    """The same from the Markov chain of an element on the grid, j = -states .. states last places.

    From j the unrounded weight is N(k j, (k step)^2), and stochastic rounding takes it to i with
    probability max(0, 1 - |x - i|), whose mean is half a second difference of E|x - i|.
    """
    j = np.array(sorted(range(-states, states + 1), key=abs))  # 0 first, all lead back to it
    away = k * j[None, :] - j[:, None]  # mean of x - i, row i, column j
    mean = [_folded_mean(away + shift, k * step) for shift in (-1, 0, 1)]
    chances = np.maximum(0.0, (mean[0] - 2 * mean[1] + mean[2]) / 2)
    chances /= chances.sum(axis=0)
    return float(l1_walk.state_after(chances, math.inf) @ j.astype(np.float64) ** 2)


def _folded_mean(mean: np.ndarray, spread: float) -> np.ndarray:
    """E|x| for x ~ N(mean, spread^2)."""
    z = mean / spread
    erf = torch.erf(torch.from_numpy(z / math.sqrt(2))).numpy()
    return spread * math.sqrt(2 / math.pi) * np.exp(-(z**2) / 2) + mean * erf

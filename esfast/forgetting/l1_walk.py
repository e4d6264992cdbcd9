"""A random walk that l1 decay pulls back: one weight's change under noise and soft thresholding.

    x <- S(x + z),  z ~ N(0, q^2),  S(y) = sign(y) max(|y| - tau, 0),  tau = alpha lambda

The numbers behind the l1 laws of `esfast.forgetting.laws`; docs/forgetting.md derives them. Small
pulls (tau < 0.2 q) are a Brownian motion with drift -tau sign(x), whose |x| is reflected: its
moments at any time are known (Abate and Whitt 1987, regulated Brownian motion started at 0), and
the first corrections for steps that are not infinitely small are added. Stronger pulls are solved:
the density of |x| at Gauss-Legendre nodes, with a mass of its own at 0, stepped or at rest. On the
grid of 16-bit weights |x| is a Markov chain.

Not promised: laws for weights whose noise is not normal; steps whose size varies by more than a
factor of about ten within one run, where the pull is strong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

WEAK = 0.2  # tau / q up to which the closed form is used: within 3e-4 of the solved variance there
OVERSHOOT = 0.5825971579  # -zeta(1/2) / sqrt(2 pi): a normal walk's mean overshoot (Siegmund 1979)
_FIRST_SUM = 0.3317  # -2 sqrt(2 / pi) zeta(-1/2): a sum of square roots against its integral
_LATER_SUM = math.sqrt(2 / math.pi) / 12  # the next term of the same, which fades as 1 / sqrt(T)
_TAIL, _REACH = 25.0, 8.0  # lengths of the Laplace density, spreads of a step: e^-25, e^-32 beyond
_WIDTH, _POINTS = 2.0, 8  # a panel in steps, and its nodes
_FEW_STATES = 200  # of the chain on a grid: solved in 5 ms
_MOST_PANELS = 200


def variance(step: float, pull: float, generations: float = math.inf) -> float:
    """E x^2 after T generations from 0, or at rest; step: q, pull: tau > 0, in one unit."""
    if pull < WEAK * step:
        return _weak_variance(step, pull, generations)
    return _solved(pull / step, generations).variance * step**2


def zero_share(step: float, pull: float) -> float:
    """P(x = 0) at rest, exactly zero: 2 (tau / q)^2 for small pulls."""
    ratio = pull / step
    if ratio < WEAK:
        return 2 * ratio**2 * math.exp(-2 * OVERSHOOT * ratio)
    return float(_solved(ratio, math.inf).masses[0])


def variances(steps: Sequence[float], pulls: Sequence[float]) -> np.ndarray:
    """E x^2 after each generation, float64 [T], of steps and pulls that may differ; 0: none.

    Weak pulls (on the mean) take the means so far for every generation's; stronger ones step the
    density with each generation's own.
    """
    squares, own = np.square(np.asarray(steps, np.float64)), np.asarray(pulls, np.float64)
    counts = np.arange(1, len(squares) + 1)
    if not squares.any():
        return np.zeros(len(squares))
    if own.mean() < WEAK * math.sqrt(squares.mean()):
        means = zip(np.cumsum(squares) / counts, np.cumsum(own) / counts, counts, strict=True)
        return np.array([_weak_variance(math.sqrt(q), tau, float(t)) for q, tau, t in means])
    grid = _grid(np.sqrt(squares[squares > 0]), float(own.mean()))
    state = _Density.at_zero()
    out = []
    for square, pull in zip(squares, own, strict=True):
        state = state.after(math.sqrt(square), float(pull), grid)
        out.append(state.variance)
    return np.array(out)


def rounded_variance(
    step: float, pull: float, rounding: Callable[[float], float], generations: float = math.inf
) -> float:
    """The same on a grid of spacing 1 with stochastic rounding; step and pull in last places.

    rounding: the variance that rounding adds to a step of that spread.
    """
    noisy = math.sqrt(step**2 + rounding(step))
    spread = min(_TAIL * noisy**2 / (2 * pull), _REACH * noisy * math.sqrt(generations))
    states = math.ceil(spread + _REACH * step) + 2
    if states > _FEW_STATES:
        return variance(noisy, pull, generations)
    chances = _grid_chances(step, pull, states)
    return float(state_after(chances, generations) @ np.arange(states + 1.0) ** 2)


def _weak_variance(step: float, pull: float, generations: float) -> float:
    """(q^2 / tau)^2 M2(s) - q^2 M1(s) + c tau q, s = T tau^2 / q^2: M the moments of reflected
    Brownian motion of drift -1 and variance 1, started at 0; at rest q^4 / (2 tau^2) - q^2 / 2."""
    if pull == 0 or step == 0:
        return generations * step**2 if step else 0.0
    first, second, constant = 0.5, 0.5, _FIRST_SUM
    if not math.isinf(generations):
        s = generations * (pull / step) ** 2
        root, below, density = math.sqrt(s), _normal(-math.sqrt(s)), _bell(math.sqrt(s))
        first = 0.5 - (1 + s) * below + root * density
        second = 0.5 + (s * s + 2 * s - 1) * below - root * (1 + s) * density
        constant -= _LATER_SUM / math.sqrt(generations)
    return (step**2 / pull) ** 2 * second - step**2 * first + constant * pull * step


def _bell(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _normal(z: float) -> float:
    """P(Z < z), to a relative 1e-15 far below 0 too."""
    return math.erfc(-z / math.sqrt(2)) / 2


def _bells(z: np.ndarray) -> np.ndarray:
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _normals(z: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(z)).numpy()


@dataclass(frozen=True)
class _Density:
    """|x|: masses at positions, both float64 [states], the first of which is 0."""

    positions: np.ndarray
    masses: np.ndarray

    @classmethod
    def at_zero(cls) -> _Density:
        return cls(np.zeros(1), np.ones(1))

    @property
    def variance(self) -> float:
        return float(self.masses @ self.positions**2)

    def after(self, step: float, pull: float, grid: _Grid) -> _Density:
        """One generation on; without a step every position moves by the pull alone."""
        if step == 0:
            return _Density(np.maximum(self.positions - pull, 0.0), self.masses)
        chances = _chances(self.positions, step, pull, grid)
        return _Density(np.append(0.0, grid.nodes), chances @ self.masses)


@dataclass(frozen=True)
class _Grid:
    """Gauss-Legendre nodes above 0 in panels of equal width, with their weights."""

    nodes: np.ndarray
    weights: np.ndarray


def _grid(steps: np.ndarray, pull: float) -> _Grid:
    """Fine enough for the smallest of the steps, as wide as the largest needs."""
    largest = float(steps.max())
    walked = _REACH * math.sqrt(float(np.square(steps).sum())) if len(steps) > 1 else math.inf
    end = min(_TAIL * largest**2 / (2 * pull), walked) + _REACH * largest
    panels = min(math.ceil(end / (_WIDTH * float(steps.min()))), _MOST_PANELS)
    places, weights = np.polynomial.legendre.leggauss(_POINTS)
    half = end / panels / 2
    middles = half * (2 * np.arange(panels) + 1)
    nodes = (middles[:, None] + half * places).ravel()
    return _Grid(nodes, np.tile(half * weights, panels))


def _chances(positions: np.ndarray, step: float, pull: float, grid: _Grid) -> np.ndarray:
    """[1 + nodes, positions]: mass that goes from each position to 0 and to each node."""
    to = (grid.nodes[:, None] + pull) / step
    start = positions[None, :] / step
    moved = grid.weights[:, None] / step * (_bells(to - start) + _bells(to + start))
    edge = pull / step
    rest = _normals(edge - start) - _normals(-edge - start)
    chances = np.concatenate([rest, moved])
    return np.asarray(chances / chances.sum(axis=0))


def _solved(pull: float, generations: float) -> _Density:
    """The density after T generations of steps of 1, or at rest."""
    grid = _grid(np.ones(1), pull)
    positions = np.append(0.0, grid.nodes)
    chances = _chances(positions, 1.0, pull, grid)
    return _Density(positions, state_after(chances, generations))


def state_after(chances: np.ndarray, generations: float) -> np.ndarray:
    """Masses after T generations from the first state, or at rest; chances: columns of sum 1.

    At rest every state has to lead back to an earlier one.
    """
    if not math.isinf(generations):
        return np.asarray(np.linalg.matrix_power(chances, round(generations))[:, 0])
    return _at_rest(chances)


def _at_rest(chances: np.ndarray) -> np.ndarray:
    """States are taken out one by one, last first, and their flows led past them (Grassmann, Taksar
    and Heyman 1985): nothing is subtracted, so that masses of 1e-80 are right and never negative.
    """
    flows = chances.T.copy()
    for last in range(len(flows) - 1, 0, -1):
        flows[:last, last] /= flows[last, :last].sum()
        flows[:last, :last] += np.outer(flows[:last, last], flows[last, :last])
    masses = np.ones(len(flows))
    for state in range(1, len(flows)):
        masses[state] = masses[:state] @ flows[:state, state]
    return np.asarray(masses / masses.sum())


def _grid_chances(step: float, pull: float, states: int) -> np.ndarray:
    """[1 + states, 1 + states]: from |x| = j to i on the integers, thresholded and then rounded.

    Rounding goes to i > 0 with chance E max(0, 1 - |s - i|), the second difference of E (s - i)_+;
    as s = y - tau wherever s > 0, that is E (y - tau - i)_+, of a normal y. To 0: what is left.
    """
    i, j = np.arange(states + 2.0)[:, None], np.arange(states + 1.0)[None, :]
    beyond = _mean_beyond(i + pull - j, step) + _mean_beyond(i + pull + j, step)
    up = np.maximum(0.0, beyond[:-2] - 2 * beyond[1:-1] + beyond[2:])
    chances = np.concatenate([1 - (beyond[0] - beyond[1])[None, :], up])
    return np.asarray(chances / chances.sum(axis=0))


def _mean_beyond(edge: np.ndarray, spread: float) -> np.ndarray:
    """E (z - edge)_+ for z ~ N(0, spread^2)."""
    z = edge / spread
    return np.asarray(spread * (_bells(z) - z * _normals(-z)))

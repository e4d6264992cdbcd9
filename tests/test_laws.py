"""The laws of drift, on random tables and rewards that are pure noise (docs/forgetting.md).

Every figure is within 10 % of its law, most within 2 %: the spread of a norm over d elements is
1 / sqrt(2 d), 0.4 % for the smallest table here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from esfast import Anchor, AnchoredDecay, EvolutionStrategy, ParameterTable, noise
from esfast.errors import ConfigError, ParameterError
from esfast.forgetting.laws import (
    _chain_variance,
    _plateau,
    kept,
    l2_norm,
    l2_plateau_norm,
    last_place,
    last_places,
    norms_of_coefficients,
    random_walk_norm,
    rounding_variance,
    stochastic_rounding_norm,
    time_constant,
)
from esfast.journal import read_journal
from esfast.replay import keep_journal, replay, strategy_of

ALPHA, LAMBDA, MEMBERS = 5e-4, 40.0, 8  # time constant 50 generations
LONG = 250  # five of them: norm^2 is at 1 - e^-10 of its plateau
WIDE = 60_000


class Table(torch.nn.Module):
    """Two matrices and a vector: the tensors have noise of their own."""

    def __init__(self, scale: float, dtype: torch.dtype = torch.float32, size: int = WIDE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, part in (("up", size // 2), ("down", size // 3), ("norm", size // 6)):
            values = (torch.randn(part, generator=generator) * scale).to(dtype)
            self.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))

    def flat(self) -> torch.Tensor:
        """float64 [size]."""
        return torch.cat([p.detach().double() for p in self.parameters()])


def strategy(
    model: Table, weight: float = 0.0, memory: str = "lean", **more: object
) -> EvolutionStrategy:
    settings = {"alpha": ALPHA, "population_size": MEMBERS, **more}
    decay = AnchoredDecay("l2", weight) if weight else None
    return EvolutionStrategy(model, memory=memory, decay=decay, threads=1, **settings)


def walk(es: EvolutionStrategy, generations: int, seed: int = 0) -> EvolutionStrategy:
    """Generations of rewards that mean nothing."""
    rng = np.random.default_rng(seed)
    for _ in range(generations):
        es.step(rng.normal(size=es.config.population_size))
    return es


def moved(es: EvolutionStrategy, base: torch.Tensor) -> torch.Tensor:
    """The change, from the fp32 bases where there are any; float64."""
    return torch.cat([t.double() for t in es.weights.state()]) - base


@cache
def drift(
    scale: float,
    dtype: torch.dtype,
    weight: float,
    memory: str = "lean",
    rounding: str = "stochastic",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(change of the weights, of what updates start from) after LONG generations of noise."""
    model = Table(scale, dtype)
    base = model.flat()
    es = walk(strategy(model, weight, memory, rounding=rounding), LONG)
    es.weights.restore()
    return model.flat() - base, moved(es, base)


def near(seen: float, law: float, share: float = 0.1) -> bool:
    return abs(seen / law - 1) < share


@pytest.mark.parametrize("noise_kind", ["gaussian", "rademacher", "hadamard"])
@pytest.mark.parametrize("shaping", ["rank", "z_score"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_a_random_walk(noise_kind: str, shaping: str, antithetic: bool) -> None:
    model = Table(0.02)
    base = model.flat()
    es = strategy(model, noise=noise_kind, shaping=shaping, antithetic=antithetic)
    seen = float(moved(walk(es, 40), base).norm())
    assert near(seen, random_walk_norm(ALPHA, MEMBERS, WIDE, 40), 0.04 + 0.04 * antithetic)


def slope(sizes: list[int], norms: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(norms), 1)[0])


def test_its_slopes_in_generations_and_members() -> None:
    """+1/2 in T, -1/2 in N; the fits of independent runs scatter by 0.002."""
    model = Table(0.02, size=30_000)
    base = model.flat()
    es, steps, norms = strategy(model), [1, 4, 16, 64, 256], []
    for last in steps:
        walk(es, last - es.generation, seed=last)
        norms.append(float(moved(es, base).norm()))
    assert abs(slope(steps, norms) - 0.5) < 0.02
    populations, ends = [4, 8, 16, 32, 64, 128], []
    for members in populations:
        model = Table(0.02, size=30_000)
        es = walk(strategy(model, population_size=members, seed=members), 16)
        ends.append(float(moved(es, base).norm()))
    assert abs(slope(populations, ends) + 0.5) < 0.02


def test_the_l2_plateau() -> None:
    seen = float(drift(0.02, torch.float32, LAMBDA)[1].norm())
    assert near(seen, l2_plateau_norm(ALPHA, LAMBDA, MEMBERS, WIDE))
    assert near(seen, l2_norm(ALPHA, LAMBDA, MEMBERS, WIDE, LONG), 0.02)
    free = float(drift(0.02, torch.float32, 0.0)[1].norm())
    assert near(free, random_walk_norm(ALPHA, MEMBERS, WIDE, LONG), 0.02) and free > 2 * seen


def test_the_norm_on_its_way_to_the_plateau() -> None:
    model = Table(0.02)
    base, es = model.flat(), strategy(model, LAMBDA)
    for generations in (5, 20, 50, 100):
        walk(es, generations - es.generation, seed=generations)
        law = l2_norm(ALPHA, LAMBDA, MEMBERS, WIDE, generations)
        assert near(float(moved(es, base).norm()), law, 0.02)
    assert law < l2_norm(ALPHA, LAMBDA, MEMBERS, WIDE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_time_constant(dtype: torch.dtype) -> None:
    """What is left of a change along itself: 1/e after 1 / (alpha lambda) generations of noise."""
    model = Table(0.02, dtype)
    base, es = model.flat(), strategy(model, LAMBDA)
    constant = round(time_constant(ALPHA, LAMBDA))
    assert constant == 50
    early = moved(walk(es, LONG), base)
    late = moved(walk(es, constant, seed=1), base)
    left = float(early @ late / early.square().sum())
    assert abs(left - math.exp(-1)) < 0.03


@pytest.mark.parametrize("factor", [8, 0.25])
def test_alpha_only_scales_where_alpha_lambda_is_held(factor: float) -> None:
    """The change over alpha, generation by generation, is the same: to the bit from a base of zeros
    and for powers of two."""
    models = Table(0.0), Table(0.0)
    for model, by in zip(models, (1, factor), strict=True):
        walk(strategy(model, LAMBDA / by, alpha=ALPHA * by), 60)
    assert torch.equal(models[1].flat(), factor * models[0].flat())
    assert models[0].flat().norm() > 0


def test_alpha_only_scales_for_other_factors_too() -> None:
    models = Table(0.02), Table(0.02)
    base = models[0].flat()
    for model, by in zip(models, (1, 3), strict=True):
        walk(strategy(model, LAMBDA / by, alpha=ALPHA * by), LONG)
    one, three = (model.flat() - base for model in models)
    assert float((three - 3 * one).norm() / three.norm()) < 1e-4


def test_bf16_with_an_fp32_master_has_the_plateau() -> None:
    live, master = drift(0.02, torch.bfloat16, LAMBDA, "master")
    law = l2_plateau_norm(ALPHA, LAMBDA, MEMBERS, WIDE)
    assert near(float(live.norm()), law) and near(float(master.norm()), law, 0.03)


@pytest.mark.parametrize("scale", [0.02, 1.0, 100.0], ids=["0.02", "1", "100"])
@pytest.mark.parametrize("weight", [0.0, LAMBDA], ids=["walk", "l2"])
def test_stochastic_rounding_adds_what_its_law_says(scale: float, weight: float) -> None:
    """Last places of 0.5, 20 and 2000 steps: in the last a weight rarely moves at all."""
    change, _ = drift(scale, torch.bfloat16, weight)
    places = last_places(Table(scale, torch.bfloat16).parameters())
    assert places.elements == WIDE
    law = stochastic_rounding_norm(ALPHA, MEMBERS, places, weight, LONG)
    assert near(float(change.norm()), law, 0.05)
    strategy_alone = l2_norm(ALPHA, weight, MEMBERS, WIDE, LONG)
    assert scale < 1 or law > 1.5 * strategy_alone  # rounding is not a detail there


def three_rounded_operations(weights: torch.Tensor, anchor: torch.Tensor, strength: float) -> None:
    """Anchored decay as bf16 torch loops have it: difference, product and sum, each to nearest."""
    delta = weights - anchor
    weights -= strength * delta


def test_three_rounded_operations_miss_the_decay() -> None:
    """The pull alone at the paper's strength (alpha lambda = 0.005), on a change of its plateau's
    size: after a time constant 1/e should be left. For most weights the product is a fraction of
    half a last place and is rounded away."""
    model = Table(0.02, torch.bfloat16)
    base, weight = model.flat(), 10.0
    anchor = Anchor.in_memory(ParameterTable.from_module(model))
    walk(strategy(model), 100)
    theirs, start = model.flat().bfloat16(), model.flat() - base
    assert near(float(start.norm()), l2_plateau_norm(ALPHA, weight, MEMBERS, WIDE))
    es = strategy(model, weight, anchor=anchor)
    for generation in range(round(time_constant(ALPHA, weight))):
        es.weights.update([], [], decay=es.config.decay, alpha=ALPHA, seed=generation)
        three_rounded_operations(theirs, base.bfloat16(), ALPHA * weight)

    def left(weights: torch.Tensor) -> float:
        return float((weights.double() - base) @ start / start.square().sum())

    assert abs(left(model.flat()) - math.exp(-1)) < 0.02
    assert left(theirs) > 0.8


def run_with_journal(path: Path, model: Table, weight: float, generations: int) -> None:
    es = strategy(model, weight, seed=5)
    with keep_journal(es, path):
        walk(es, generations)


@pytest.mark.parametrize("weight", [LAMBDA, 0.0], ids=["l2", "none"])
def test_l2_decay_is_discounting_of_the_journal(tmp_path: Path, weight: float) -> None:
    """A replay in fp32 against sum_t k^(T - t) sum_n c eps in fp64. Each generation rounds the
    weight (half of 2^-23 of it) and the change once or twice more."""
    generations = 40
    run_with_journal(tmp_path / "journal.esj", Table(0.02, size=6000), weight, generations)
    journal = read_journal(tmp_path / "journal.esj")
    model = Table(0.02, size=6000)
    base = model.flat()
    es = strategy_of(journal, model)
    replay(es, journal, verify=True)
    k = kept(ALPHA, weight) if weight else 1.0
    factors = k ** np.arange(generations, 0, -1.0)  # the decay follows the step, its own too
    pieces = []
    for name, parameter in model.named_parameters():
        total = np.zeros(parameter.numel())
        for record, factor in zip(journal.generations, factors, strict=True):
            for member, coefficient in zip(
                record.terms(es.config), record.coefficients, strict=True
            ):
                shape = tuple(parameter.shape)
                total += factor * float(coefficient) * noise(member, name, shape).astype(np.float64)
        pieces.append(total)
    expected, seen = torch.from_numpy(np.concatenate(pieces)), model.flat() - base
    bound = generations * 2.0**-23 * (base.abs() + expected.abs() + 3 * ALPHA)
    assert bool(((seen - expected).abs() <= bound).all())
    assert float((seen - expected).norm() / expected.norm()) < 2e-5


def test_a_journal_tells_its_norm(tmp_path: Path) -> None:
    """Also where a generation's rewards are all equal and it takes no step."""
    model = Table(0.02)
    base, es = model.flat(), strategy(model, LAMBDA)
    seen = [0.0]
    with keep_journal(es, tmp_path / "journal.esj"):
        for generation in range(12):
            if generation % 3 == 2:
                es.step(np.ones(MEMBERS))
            else:
                walk(es, 1, seed=generation)
            seen.append(float(moved(es, base).norm()))
    law = norms_of_coefficients(read_journal(tmp_path / "journal.esj").generations, WIDE)
    assert law.shape == (13,) and law[0] == 0.0
    assert np.allclose(law[1:], seen[1:], rtol=0.02)
    assert law[3] < law[2] < law[4]


def test_a_journal_of_both_decays_has_no_law(tmp_path: Path) -> None:
    es = EvolutionStrategy(Table(0.02, size=60), population_size=4, decay=AnchoredDecay("l1", 0.01))
    with keep_journal(es, tmp_path / "journal.esj"):
        walk(es, 1)
    (record,) = read_journal(tmp_path / "journal.esj").generations
    both = [record, replace(record, decay=AnchoredDecay("l2", 0.01))]
    with pytest.raises(ConfigError, match="l1"):
        norms_of_coefficients(both, 60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_last_places_are_the_distance_to_the_neighbour(dtype: torch.dtype) -> None:
    """Every finite pattern but the largest, whose neighbour is infinite; both signs."""
    bits = torch.arange(0x7C00 - 1 if dtype is torch.float16 else 0x7F80 - 1, dtype=torch.int16)
    here, there = bits.view(dtype), (bits + 1).view(dtype)
    assert torch.equal(last_place(here), there.double() - here.double())
    assert torch.equal(last_place(-here), last_place(here))
    places = last_places([here[:300], here[:300]])
    assert places.elements == 600 and bool(np.all(np.diff(places.units) > 0))


def test_last_places_of_fp32_are_refused() -> None:
    with pytest.raises(ParameterError, match="bfloat16"):
        last_place(torch.zeros(2))


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.149, 0.151, 0.3, 1.0, 5.0])
def test_rounding_variance_against_draws(spread: float) -> None:
    x = np.abs(np.random.default_rng(0).normal(size=400_000) * spread)
    share = x - np.floor(x)
    assert near(rounding_variance(spread), float((share * (1 - share)).mean()), 0.02)


@pytest.mark.parametrize(("step", "pull"), [(0.3, 2e-4), (1.0, 1e-3)])
def test_the_chain_and_the_closed_form_agree(step: float, pull: float) -> None:
    """Where a weight visits hundreds of neighbours the closed form is used; there they meet."""
    variance = _plateau(step, 1 - pull)
    assert 8 * math.sqrt(2 * variance) > 200
    assert near(_chain_variance(step, 1 - pull, 300), variance, 0.01)


@pytest.mark.parametrize("weight", [0.0, -1.0, 2000.0, 1e9])
def test_laws_of_l2_refuse_a_lambda_without_a_plateau(weight: float) -> None:
    with pytest.raises(ConfigError, match="alpha \\* lambda"):
        l2_plateau_norm(ALPHA, weight, MEMBERS, WIDE)

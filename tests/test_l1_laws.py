"""The laws of l1 decay, on random tables and rewards that are pure noise (docs/forgetting.md).

A norm over 30,000 weights scatters by 0.4 %, and somewhat more where the density has a long tail.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_laws import near, walk

from esfast import AnchoredDecay, EvolutionStrategy, ParameterTable
from esfast.errors import ConfigError
from esfast.forgetting import l1_walk
from esfast.forgetting.laws import (
    l1_norm,
    l1_plateau_norm,
    l1_time_constant,
    l1_unchanged_share,
    last_places,
    norms_of_coefficients,
    random_walk_norm,
    rounding_variance,
    stochastic_rounding_norm,
)
from esfast.journal import read_journal
from esfast.replay import keep_journal

ALPHA, MEMBERS, WIDE = 5e-4, 8, 30_000


def table(scale: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"w": (torch.randn(WIDE, generator=generator) * scale).to(dtype)}


def strategy(weights: dict[str, torch.Tensor], weight: float) -> EvolutionStrategy:
    decay = AnchoredDecay("l1", weight)
    return EvolutionStrategy(
        ParameterTable.from_tensors(weights),
        alpha=ALPHA,
        population_size=MEMBERS,
        decay=decay,
        threads=1,
    )


def change(
    scale: float, dtype: torch.dtype, weight: float, generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(base, change), fp64; the base of fp32 is 0, so that weights at their anchor are exact."""
    weights = table(scale, dtype)
    base = weights["w"].double()
    walk(strategy(weights, weight), generations)
    return base, weights["w"].double() - base


@pytest.mark.parametrize("ratio", [0.15, 0.4, 1.2], ids=["weak", "strong", "stronger"])
def test_the_l1_plateau(ratio: float) -> None:
    """Pulls of 0.15, 0.4 and 1.2 steps, after four time constants or 50 generations: the norm, and
    how many weights are where they began."""
    weight = ratio / math.sqrt(MEMBERS)
    constant = l1_time_constant(weight, MEMBERS)
    assert math.isclose(constant, 2 / ratio**2)
    generations = max(50, round(4 * constant))
    _, moved = change(0.0, torch.float32, weight, generations)
    law = l1_norm(ALPHA, weight, MEMBERS, WIDE)
    assert near(float(moved.norm()), law, 0.03)
    assert near(l1_norm(ALPHA, weight, MEMBERS, WIDE, generations), law, 0.01)
    share = l1_unchanged_share(weight, MEMBERS)
    assert abs(float((moved == 0).double().mean()) - share) < 0.01
    assert ratio > 0.15 or near(share, 2 * ratio**2, 0.2)
    assert near(law, l1_plateau_norm(ALPHA, weight, MEMBERS, WIDE), 0.02) == (ratio < 0.2)


def test_the_norm_on_its_way_to_the_l1_plateau() -> None:
    weights, weight = table(0.02), 0.1 / math.sqrt(MEMBERS)
    base, es = weights["w"].double(), strategy(weights, weight)
    for generations in (1, 5, 20, 80, 250):
        walk(es, generations - es.generation, seed=generations)
        law = l1_norm(ALPHA, weight, MEMBERS, WIDE, generations)
        assert near(float((weights["w"].double() - base).norm()), law, 0.03)
    assert law < l1_norm(ALPHA, weight, MEMBERS, WIDE)
    assert law < 0.5 * random_walk_norm(ALPHA, MEMBERS, WIDE, generations)


@pytest.mark.parametrize("ratio", [0.1, 0.6], ids=["weak", "strong"])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0], ids=["0.02", "1", "30"])
def test_l1_under_stochastic_rounding(scale: float, ratio: float) -> None:
    """Last places of 0.5, 20 and 700 steps."""
    weight, generations = ratio / math.sqrt(MEMBERS), 120
    base, moved = change(scale, torch.bfloat16, weight, generations)
    places = last_places([base.bfloat16()])
    law = stochastic_rounding_norm(ALPHA, MEMBERS, places, weight, generations, "l1")
    assert near(float(moved.norm()), law, 0.05)
    alone = l1_norm(ALPHA, weight, MEMBERS, WIDE, generations)
    assert scale < 1 or law > 1.5 * alone  # rounding is not a detail there


def test_alpha_is_only_the_unit_of_l1() -> None:
    """Everything is decided by lambda sqrt(N); the time constant and the share at rest are the
    same for every alpha, and the norm is proportional to it."""
    for weight in (0.02, 0.3):
        norms = [l1_norm(alpha, weight, MEMBERS, WIDE, 40) / alpha for alpha in (1e-4, 3e-2)]
        assert math.isclose(*norms, rel_tol=1e-9)
    many = l1_plateau_norm(ALPHA, 0.01, 4 * MEMBERS, WIDE)
    assert math.isclose(many, l1_plateau_norm(ALPHA, 0.01, MEMBERS, WIDE) / 4)


@pytest.mark.parametrize("generations", [1, 2, 5, 30, 300, math.inf])
def test_the_closed_form_meets_the_solved_density(generations: float) -> None:
    below, above = (l1_walk.variance(1.0, l1_walk.WEAK * by, generations) for by in (1 - 1e-6, 1))
    assert near(below, above, 4e-4)
    shares = [l1_walk.zero_share(1.0, l1_walk.WEAK * by) for by in (1 - 1e-6, 1)]
    assert near(shares[0], shares[1], 1e-3)


@pytest.mark.parametrize("pull", [1, 7, 9, 20])
def test_strong_pulls_leave_little_and_never_less_than_nothing(pull: float) -> None:
    """From 1e-1 to 1e-91 of a step squared, where differences of masses would be rounding alone."""
    there, soon = (l1_walk.variance(1.0, pull, generations) for generations in (math.inf, 200))
    assert there > 0 and near(there, soon, 1e-9)
    chains = [
        l1_walk.rounded_variance(0.01, 0.01 * pull, rounding_variance, t) for t in (math.inf, 5000)
    ]
    assert chains[0] > 0 and near(*chains, 1e-9)
    assert l1_norm(ALPHA, pull / math.sqrt(MEMBERS), MEMBERS, WIDE) > 0


@pytest.mark.parametrize("pull", [0.02, 0.3])
def test_the_chain_meets_the_closed_form_on_a_fine_grid(pull: float) -> None:
    """A step of three last places: rounding adds 1/6 of a place squared to its 9."""
    chain = l1_walk.rounded_variance(3.0, pull * 3, rounding_variance, 20)
    noisy = math.sqrt(9 + rounding_variance(3.0))
    assert near(chain, l1_walk.variance(noisy, pull * 3, 20), 0.003)


def test_the_solved_density_is_laplace_for_weak_pulls() -> None:
    """E x^2 = q^4 / (2 tau^2) - q^2 / 2 + 0.33 tau q, solved."""
    found = l1_walk._solved(0.05, math.inf)
    assert abs(found.variance - (200 - 0.5 + 0.3317 * 0.05)) < 1e-3
    assert near(float(found.masses[0]), l1_walk.zero_share(1.0, 0.05), 1e-3)


def test_a_journal_of_l1_decay_tells_its_norm(tmp_path: Path) -> None:
    """Also where a generation's rewards are all equal and it takes no step; strong and weak."""
    for ratio in (0.5, 0.1):
        weights = table(0.02)
        base, es = weights["w"].double(), strategy(weights, ratio / math.sqrt(MEMBERS))
        seen = [0.0]
        with keep_journal(es, tmp_path / f"{ratio}.esj"):
            for generation in range(12):
                if generation % 3 == 2:
                    es.step(np.ones(MEMBERS))
                else:
                    walk(es, 1, seed=generation)
                seen.append(float((weights["w"].double() - base).norm()))
        law = norms_of_coefficients(read_journal(tmp_path / f"{ratio}.esj").generations, WIDE)
        assert law.shape == (13,) and law[0] == 0.0
        assert np.allclose(law[1:], seen[1:], rtol=0.02 if ratio == 0.5 else 0.08)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf])
def test_laws_of_l1_refuse_a_lambda_without_a_plateau(weight: float) -> None:
    with pytest.raises(ConfigError, match="alpha \\* lambda"):
        l1_plateau_norm(ALPHA, weight, MEMBERS, WIDE)
    with pytest.raises(ConfigError, match="alpha \\* lambda"):
        l1_time_constant(weight, MEMBERS)
    with pytest.raises(ConfigError, match="alpha \\* lambda"):
        l1_unchanged_share(weight, MEMBERS)

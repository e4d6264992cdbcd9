"""The strategy: the members that it hands out and the coefficients it makes; that loops train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch

import esfast
from esfast import AnchoredDecay, EsfastError, EvolutionStrategy
from esfast.shaping import shape
from esfast.strategy import Strategy, StrategyConfig


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_members_have_derived_seeds(noise: str) -> None:
    strategy = Strategy(StrategyConfig(population_size=7, seed=1 << 63 | 5, noise=noise))
    for generation in (0, 3, 2**33 + 1):
        members = strategy.members(generation)
        want = [reference.member_seed(1 << 63 | 5, generation, n) for n in range(7)]
        assert [m.seed for m in members] == want
        assert {(m.sign, m.noise, m.index) for m in members} == {(1, noise, 0)}
        assert strategy.generation_seed(generation) == reference.generation_seed(
            1 << 63 | 5, generation
        )


def test_antithetic_pairs_share_a_seed() -> None:
    members = Strategy(StrategyConfig(population_size=8, antithetic=True)).members(2)
    assert [m.seed for m in members] == [reference.member_seed(0, 2, n // 2) for n in range(8)]
    assert [m.sign for m in members] == [1, -1] * 4


@pytest.mark.parametrize("antithetic", [False, True])
def test_hadamard_members_share_the_generations_seed(antithetic: bool) -> None:
    config = StrategyConfig(population_size=70, noise="hadamard", antithetic=antithetic)
    members = Strategy(config).members(4)
    assert {m.seed for m in members} == {reference.generation_seed(0, 4)}
    assert [m.index for m in members] == [n // 2 if antithetic else n for n in range(70)]


@pytest.mark.parametrize("method", ["rank", "z_score", "centered_rank", "raw"])
def test_coefficients_are_alpha_over_n_times_fitness(method: str) -> None:
    strategy = Strategy(StrategyConfig(alpha=0.3, population_size=5, shaping=method))
    rewards = np.array([1.0, 4.0, 2.0, 8.0, 3.0])
    want = 0.3 / 5 * shape(rewards, method)
    np.testing.assert_allclose(strategy.coefficients(rewards), want, rtol=1e-15)


def test_per_prompt_rewards() -> None:
    strategy = Strategy(StrategyConfig(population_size=4, shaping="group_centered"))
    assert strategy.coefficients(np.random.default_rng(0).random((4, 9))).shape == (4,)


BAD_CONFIG: list[dict[str, Any]] = [
    {"sigma": 0.0}, {"sigma": -1e-3}, {"sigma": float("nan")}, {"sigma": float("inf")},
    {"alpha": float("nan")}, {"alpha": float("inf")}, {"population_size": 0},
    {"population_size": -3}, {"population_size": 7, "antithetic": True}, {"seed": -1},
    {"seed": 1 << 64}, {"noise": "cauchy"}, {"shaping": "best"}, {"rounding": "up"},
    {"antithetic": "no"}, {"antithetic": 2},
    {"alpha": 0.1, "decay": AnchoredDecay("l2", 10.0)},
    {"alpha": 1e10, "decay": AnchoredDecay("l1", 1e25)},
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD_CONFIG, ids=str)
def test_bad_configurations_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(EsfastError, match=f"{next(iter(fields))} "):
        Strategy(StrategyConfig(**fields))


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("fields", [{"alpha": 0.0}, {"population_size": 0}], ids=str)
def test_automatic_decay_of_bad_settings_is_refused(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(esfast.ConfigError, match=f"{next(iter(fields))} is 0"):
        AnchoredDecay.automatic(kind, **{"alpha": 0.1, "population_size": 4, **fields})


# ---- the user's loop ---------------------------------------------------------------------------


def train(
    model: torch.nn.Module, reward: Callable[[], float], generations: int, **options: Any
) -> None:
    """The ten-line loop that the design promises, unmodified."""
    es = EvolutionStrategy(model, **options)
    for _ in range(generations):
        rewards = [reward() for member in es.population()]
        es.step(rewards)


LOOPS: dict[str, dict[str, Any]] = {
    "gaussian, lean": {},
    "rademacher, shadow": {"noise": "rademacher", "memory": "shadow"},
    "hadamard, antithetic": {"noise": "hadamard", "antithetic": True},
    "antithetic, master, z-scores": {
        "antithetic": True, "memory": "master", "shaping": "z_score"
    },
}  # fmt: skip


class Quadratic(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.x = torch.nn.Parameter(torch.randn(24, generator=generator).to(dtype))

    def loss(self) -> float:
        scale = torch.linspace(0.5, 2, 24)
        return float((scale * (self.x.detach().float() - 0.7) ** 2).sum())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_quadratic_converges(loop: str) -> None:
    model = Quadratic(torch.float32)
    start = model.loss()
    options = {"sigma": 0.02, "population_size": 32, "seed": 5, **LOOPS[loop]}
    train(model, lambda: -model.loss(), 150, alpha=0.12, **options)
    train(model, lambda: -model.loss(), 100, alpha=0.01, **options)
    assert model.loss() < 2e-3 * start


def test_a_quadratic_converges_in_bfloat16() -> None:
    """Steps far below half an ulp (0.002 at 0.7): only stochastic rounding gets anywhere."""
    model = Quadratic(torch.bfloat16)
    start = model.loss()
    options = {"sigma": 0.02, "population_size": 32, "seed": 5}
    train(model, lambda: -model.loss(), 150, alpha=0.12, **options)
    train(model, lambda: -model.loss(), 100, alpha=0.01, **options)
    assert model.loss() < 5e-3 * start


@pytest.mark.parametrize("loop", LOOPS)
def test_a_small_regression_converges(loop: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=generator)
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0]) + 0.3
    model = torch.nn.Linear(6, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()

    @torch.inference_mode()
    def reward() -> float:
        return -float(((model(inputs)[:, 0] - targets) ** 2).mean())

    start = reward()
    options = {"sigma": 0.02, "population_size": 32, "seed": 2, **LOOPS[loop]}
    train(model, reward, 70, alpha=0.15, **options)
    train(model, reward, 40, alpha=0.02, **options)
    assert reward() > start * 1e-3
    assert abs(float(model.bias.detach()[0]) - 0.3) < 0.1


def test_decay_pulls_towards_the_start() -> None:
    """With no signal, l2 decay is exactly (1 - alpha * lambda) a generation in fp32."""
    model = torch.nn.Linear(5, 3)
    es = EvolutionStrategy(
        model, sigma=0.01, alpha=0.1, population_size=4, decay=AnchoredDecay("l2", 2.0)
    )
    start = model.weight.detach().clone()
    for _ in es.population():
        pass
    es.step([1.0, 2.0, 3.0, 4.0])
    delta = model.weight.detach() - start
    for _ in range(3):
        for _ in es.population():
            pass
        es.step([1.0] * 4)
    after = model.weight.detach() - start
    torch.testing.assert_close(after, delta * 0.8**3, rtol=1e-3, atol=1e-7)


def test_the_public_surface() -> None:
    for name in ("EvolutionStrategy", "ParameterTable", "Weights", "Member", "AnchoredDecay"):
        assert hasattr(esfast, name)
    for name in ("noise", "Anchor", "__version__"):
        assert hasattr(esfast, name)

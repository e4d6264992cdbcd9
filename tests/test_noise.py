"""The noise: known answers and the reference bit for bit on every target, then its statistics.

Statistics use fixed seeds, so they cannot flake; the bounds are 4.5 standard errors or the 1e-6
point of the distribution named, at the sample sizes given.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import NOISES, population
from test_reference import rows

import esfast
from esfast.bench.measure import CACHED_POPULATION
from esfast.bench.roofline import COLOURS
from esfast.members import Member, generation_seed, member_seed, noise, tensor_id

BIG = 1_048_576
NAME = "model.layers.0.mlp.up_proj.weight"


def at(member: Member, name: str, i: int) -> float:
    return float(noise(member, name, (1,), first=i)[0])


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_known_answers(target: str, kind: str) -> None:
    for seed, name, i, answer in rows(kind):
        got = at(Member(seed=int(seed, 16), noise=kind), name, int(i))
        assert got.hex() == float.fromhex(answer).hex(), (seed, name, i)


def test_known_answers_of_hadamard(target: str) -> None:
    for seed, name, index, i, answer in rows("hadamard"):
        member = Member(seed=int(seed, 16), noise="hadamard", index=int(index))
        assert at(member, name, int(i)).hex() == float.fromhex(answer).hex(), (name, index, i)


def test_known_answers_of_seeds() -> None:
    for run, generation, member, answer in rows("seed"):
        if int(member) == reference.GENERATION:
            got = generation_seed(int(run), int(generation))
        else:
            got = member_seed(int(run), int(generation), int(member))
        assert f"{got:016x}" == answer


def test_tensor_id() -> None:
    for name in (NAME, "", "größe.weight"):
        assert tensor_id(name) == reference.tensor_id(name)


STARTS = [0, 1, 2, 3, 5, 127, 2**20 - 3, 2**32 - 77, 2**32 + 1, 2**34 - 131, 2**40 + 7]


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("sign", [1, -1])
def test_noise_is_the_reference(target: str, kind: str, sign: int) -> None:
    """Odd starts and lengths, block and 2^32 crossings, indices beyond 2^34 (a Philox block)."""
    for k, first in enumerate(STARTS):
        index = (0, 5, 31, 32, 70)[k % 5] if kind == "hadamard" else 0
        member = Member(seed=0xFEDCBA9876543210 ^ k, sign=sign, noise=kind, index=index)
        i = np.uint64(first) + np.arange(1009, dtype=np.uint64)
        want = np.float32(sign) * reference.epsilon(member, NAME, i)
        got = noise(member, NAME, (1009,), first=first)
        assert got.dtype == np.float32
        wrong = np.flatnonzero(got.view(np.uint32) != want.view(np.uint32))
        assert not wrong.size, (first, int(wrong[0]), got[wrong[0]], want[wrong[0]])


def test_a_name_that_the_core_does_not_know_makes_no_noise(monkeypatch) -> None:
    """Its number would leave the buffer as it was: weights of 1e32, without a word."""
    monkeypatch.setattr("esfast.members.NOISES", (*NOISES, "pink"))
    weights = esfast.Weights(esfast.ParameterTable.from_tensors({NAME: torch.zeros(8)}))
    with pytest.raises(ValueError, match=r"core has 3 noises .* number 3; .* csrc/segments.hpp"):
        weights.perturb(Member(seed=1, noise="pink"), 0.1)
    with pytest.raises(ValueError, match="number 3"):
        noise(Member(seed=1, noise="pink"), NAME, (8,))


def test_every_noise_can_be_measured_and_drawn() -> None:
    assert set(NOISES) == set(COLOURS) == set(CACHED_POPULATION)


@cache
def many_gaussians() -> np.ndarray:
    return reference.gaussian(12, NAME, np.uint64(2**33) + np.arange(1 << 20, dtype=np.uint64))


def test_a_million_gaussians(target: str) -> None:
    """Consecutive values against the reference: both signs, all binades that occur."""
    got = noise(Member(seed=12), NAME, (1 << 20,), first=2**33)
    assert np.array_equal(got.view(np.uint32), many_gaussians().view(np.uint32))


@pytest.mark.parametrize("first", [9890544, 48932898, 49527806, 85521354, 90139184])
def test_radii_where_the_logarithm_is_split(target: str, first: int) -> None:
    """|f| = 1.5 * 2^k, where m turns from 0.5 to -0.25: one word in 8 million, found by search."""
    i = np.arange(first, first + 2, dtype=np.uint64)
    x = reference.words(12, "w", i[:1] >> np.uint64(2), 0)
    bits = np.abs(reference.signed(x[first % 4] | np.uint64(1)).astype(np.float32)).view(np.uint32)
    assert bits & 0x007FFFFF == 0x00400000
    got = noise(Member(seed=12), "w", (2,), first=first)
    assert np.array_equal(got.view(np.uint32), reference.gaussian(12, "w", i).view(np.uint32))


def test_shape_and_offset_do_not_matter() -> None:
    member = Member(seed=3)
    whole = noise(member, NAME, (5, 7, 11))
    assert whole.shape == (5, 7, 11)
    assert np.array_equal(whole.reshape(-1)[13:], noise(member, NAME, (5 * 77 - 13,), first=13))
    assert noise(member, NAME, (0, 3)).shape == (0, 3)
    assert noise(member, NAME, ()).shape == ()


def test_the_public_name() -> None:
    assert esfast.noise is noise and esfast.Member is Member


# ---- statistics --------------------------------------------------------------------------------


def samples(kind: str, seed: int = 1, name: str = NAME, index: int = 0, n: int = BIG) -> np.ndarray:
    member = Member(seed=seed, noise=kind, index=index)
    return noise(member, name, (n,)).astype(np.float64)


MOMENTS = {  # mean, variance, skewness, kurtosis
    "gaussian": (0, 1, 0, 3),
    "rademacher": (0, 1, 0, 1),
    "hadamard": (0, 1, 0, 3 - 2 / 32),
}


@pytest.mark.parametrize("kind", NOISES)
def test_moments(kind: str) -> None:
    x = samples(kind)
    for power, want in zip((1, 2, 3, 4), MOMENTS[kind], strict=True):
        values = x**power
        error = values.std() / math.sqrt(x.size)
        assert abs(values.mean() - want) <= 4.5 * error + 1e-6, (kind, power)


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def test_gaussian_kolmogorov_smirnov() -> None:
    x = np.sort(samples("gaussian", n=262_144))
    cdf = normal_cdf(x)
    steps = np.arange(x.size + 1) / x.size
    distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert distance < math.sqrt(math.log(2 / 1e-6) / 2 / x.size)


def test_gaussian_chi_squared() -> None:
    """256 cells of equal probability; the 1e-6 point of chi2(255) is 373."""
    edges = _normal_quantiles(256)
    counts = np.bincount(np.searchsorted(edges, samples("gaussian")), minlength=256)
    expected = BIG / 256
    assert ((counts - expected) ** 2 / expected).sum() < 373


def _normal_quantiles(cells: int) -> np.ndarray:
    grid = np.linspace(-6, 6, 60001)
    return np.interp(np.arange(1, cells) / cells, normal_cdf(grid), grid)


def test_gaussian_tails() -> None:
    """Counts beyond 3, 4 and 5 sigma are Poisson about their expectations."""
    x = np.abs(np.concatenate([samples("gaussian", seed=s) for s in range(4)]))
    for bound in (3, 4, 5):
        expected = x.size * math.erfc(bound / math.sqrt(2))
        assert abs((x > bound).sum() - expected) < 4.5 * math.sqrt(expected) + 1, bound
    assert x.max() < 6.56


def test_hadamard_is_binomial() -> None:
    x = samples("hadamard", index=9)
    ones = np.rint(16 - x * math.sqrt(32) / 2).astype(int)
    counts = np.bincount(ones, minlength=33)
    expected = np.array([math.comb(32, k) for k in range(33)]) / 2**32 * BIG
    usual = expected > 10
    chi2 = ((counts - expected)[usual] ** 2 / expected[usual]).sum()
    assert usual.sum() > 20 and chi2 < 75  # the 1e-6 point of chi2(22) is 70


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors."""
    return float((a * b).mean() / math.sqrt((a * a).mean() * (b * b).mean()) * math.sqrt(a.size))


@pytest.mark.parametrize("kind", NOISES)
def test_tensors_seeds_and_neighbours_do_not_correlate(kind: str) -> None:
    x = samples(kind)
    others = [samples(kind, name=NAME.replace("0", "1")), samples(kind, seed=2)]
    others += [samples(kind, seed=1 << 32 | 1), samples(kind, name="lm_head.weight")]
    if kind == "hadamard":
        others.append(samples(kind, index=32))
    for other in others:
        for lag in (0, 1, 4):
            a, b = x[: x.size - lag], other[lag:]
            assert abs(correlation(a, b)) < 4.5, (kind, lag)
            if kind != "rademacher":
                assert abs(correlation(a**2 - 1, b**2 - 1)) < 4.5, (kind, lag)
    for lag in (1, 2, 3, 4, 5, 8, 31, 32, 64, 127, 128, 1024):
        assert abs(correlation(x[:-lag], x[lag:])) < 4.5, (kind, lag)
        if kind != "rademacher":
            assert abs(correlation(x[:-lag] ** 2 - 1, x[lag:] ** 2 - 1)) < 4.5, (kind, lag)


def test_hadamard_members_are_exactly_uncorrelated() -> None:
    """The mean over all 2^32 words of a product of two members is 0, by orthogonality; on a
    population of samples the correlation is statistical and the row products are exact."""
    group = [samples("hadamard", index=n, n=65_536) for n in range(32)]
    spins = np.stack(group)  # [32, n]
    energy = (spins**2).sum(axis=0)  # orthogonal rows: sum of squares is exactly 32 (Parseval)
    assert np.allclose(energy, 32, rtol=1e-6)
    matrix = np.stack(
        [[1 - 2 * (reference.hadamard_row(n) >> k & 1) for k in range(32)] for n in range(32)]
    )
    signs = matrix.T @ spins / math.sqrt(32)  # recovers the word's 32 bits as +-1
    assert np.allclose(np.abs(signs), 1, atol=1e-5)
    assert np.array_equal(matrix @ matrix.T, 32 * np.eye(32))


def test_population_of_the_reference_matches_a_strategy() -> None:
    """cases.population, which the other tests use, is what Strategy hands out."""
    from esfast.strategy import Strategy, StrategyConfig

    for kind in NOISES:
        for antithetic in (False, True):
            config = StrategyConfig(population_size=8, seed=77, noise=kind, antithetic=antithetic)
            assert Strategy(config).members(3) == population(kind, 8, antithetic, seed=77)


# ---- choosing a target -------------------------------------------------------------------------


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(core.target())
"""


def run_with(target: str) -> subprocess.CompletedProcess[str]:
    """The core alone, without torch, in a process of its own."""
    from esfast import _core

    environment = {**os.environ, "ESFAST_TARGET": target}
    command = [sys.executable, "-c", LOAD, str(_core.__file__)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_the_environment_forces_a_target() -> None:
    from esfast import _core

    for name in _core.targets():
        assert run_with(name).stdout.strip() == name


def test_an_unknown_target_is_an_error_that_lists_what_there_is() -> None:
    from esfast import _core

    done = run_with("sse9")
    assert done.returncode != 0
    assert "sse9" in done.stderr
    assert all(name in done.stderr for name in _core.targets())


def test_a_refused_target_changes_nothing() -> None:
    from esfast import _core

    before = _core.target()
    with pytest.raises(esfast.ConfigError, match="sse9"):
        _core.set_target("sse9")
    assert _core.target() == before


def test_bad_members_are_refused() -> None:
    for bad in (
        {"seed": -1}, {"seed": 1 << 64}, {"seed": 1, "sign": 0}, {"seed": 1, "noise": "cauchy"},
        {"seed": 1, "noise": "hadamard", "index": -1},
        {"seed": 1, "noise": "hadamard", "index": 32 << 24},
    ):  # fmt: skip
        with pytest.raises(esfast.ConfigError, match=list(bad)[-1]):
            noise(Member(**bad), NAME, (4,))


@pytest.mark.parametrize("shape", [(2.5,), 2.5, (-1,), "3", None])
def test_bad_shapes_of_noise_are_refused(shape: Any) -> None:
    with pytest.raises(esfast.ConfigError, match="noise was asked for shape"):
        noise(Member(1), NAME, shape)
    assert noise(Member(1), NAME, np.int64(3)).shape == (3,)  # type: ignore[arg-type]


def test_noise_ends_where_indices_do() -> None:
    assert noise(Member(1), NAME, 2, first=2**64 - 2).shape == (2,)
    with pytest.raises(esfast.ConfigError, match="indices end"):
        noise(Member(1), NAME, 3, first=2**64 - 2)
    with pytest.raises(esfast.ConfigError, match="indices end"):
        noise(Member(1), NAME, 10**30)


@pytest.mark.parametrize("shape", [2**62, 2**63, (0, 2**63), (1,) * 65])
def test_a_shape_that_numpy_has_no_array_of_is_refused(shape: Any) -> None:
    with pytest.raises(esfast.ConfigError, match="which no numpy array has"):
        noise(Member(1), NAME, shape)


@pytest.mark.parametrize(
    "numbers", [(-1, 0, 0), (0, 2**64, 0), (0, 0, 2**32), (0.5, 0, 0), (0, "1", 0)]
)
def test_bad_numbers_of_a_seed_are_refused(numbers: Any) -> None:
    with pytest.raises(esfast.ConfigError, match=r"the (run seed|generation|member) is "):
        member_seed(*numbers)

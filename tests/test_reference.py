"""The reference against the known answers, and against itself where exactness can be proved."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import reference
from reference import Bits

VECTORS = Path(__file__).parent / "vectors" / "noise_v1.txt"


def rows(kind: str) -> list[list[str]]:
    lines = (line.split() for line in VECTORS.read_text().splitlines() if line[:1] != "#")
    found = [fields[1:] for fields in lines if fields and fields[0] == kind]
    assert found, f"no {kind} rows in {VECTORS.name}"
    return found


def one(i: str) -> np.ndarray:
    return np.array([int(i)], dtype=np.uint64)


def test_every_row_of_the_vectors_is_read() -> None:
    kinds = ("philox", "seed", "gaussian", "rademacher", "hadamard")
    lines = [line for line in VECTORS.read_text().splitlines() if line and line[0] != "#"]
    assert sum(len(rows(kind)) for kind in kinds) == len(lines)


def test_philox() -> None:
    for key, *fields in rows("philox"):
        counter, answer = fields[:4], fields[4:]
        words = reference.philox(int(key, 16), [int(c, 16) for c in counter])
        assert [f"{int(w):08x}" for w in words] == answer


def test_seeds() -> None:
    for run, generation, member, answer in rows("seed"):
        seed = reference.member_seed(int(run), int(generation), int(member))
        assert f"{seed:016x}" == answer


def test_gaussian() -> None:
    for seed, name, i, answer in rows("gaussian"):
        got = reference.gaussian(int(seed, 16), name, one(i))[0]
        assert float(got).hex() == float.fromhex(answer).hex(), (seed, name, i)


def test_rademacher() -> None:
    for seed, name, i, answer in rows("rademacher"):
        assert reference.rademacher(int(seed, 16), name, one(i))[0] == float.fromhex(answer)


def test_hadamard() -> None:
    for seed, name, member, i, answer in rows("hadamard"):
        got = reference.hadamard(int(seed, 16), name, int(member), one(i))[0]
        assert float(got).hex() == float.fromhex(answer).hex(), (name, member, i)


def random_floats(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(np.float32)


def exactly_rounded(exact: Fraction) -> np.float32:
    """The fp32 nearest to a rational, ties to even, by search from the float64 neighbourhood."""
    guess = np.float32(float(exact))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess]
    candidates.append(np.nextafter(guess, np.float32(np.inf)))
    finite = [c for c in candidates if np.isfinite(c)]
    distance = [abs(Fraction(float(c)) - exact) for c in finite]
    best = [c for c, d in zip(finite, distance, strict=True) if d == min(distance)]
    return min(best, key=lambda c: int(np.float32(c).view(np.uint32)) & 1)


def test_fma_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=4000).astype(np.float32) for _ in range(2))
    # c near -a*b and at the scale where a halfway case of fp32 meets a float64 rounding
    c = (-a * b * (1 + rng.integers(-3, 4, 4000) * 2.0**-24)).astype(np.float32)
    c[::4] = (a[::4] * b[::4]) * np.float32(2.0) ** rng.integers(-60, 60, 1000)
    with np.errstate(all="ignore"):
        got = reference.fma(a, b, c)
    for x, y, z, answer in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert float(answer) == float(exactly_rounded(exact)), (x, y, z)


def test_fma_where_rounding_twice_would_differ() -> None:
    a, b = np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12)
    # a*b = 1 + 2^-11 + 2^-24: exactly halfway in fp32; a speck below must pull it down or up
    for c, answer in ((2.0**-80, 1 + 2.0**-11 + 2.0**-23), (-(2.0**-80), 1 + 2.0**-11)):
        assert float(reference.fma(a, b, np.float32(c))) == answer


def test_fma_of_zeros_and_infinities() -> None:
    for a, b, c in ((-1.0, 0.0, -0.0), (1.0, 0.0, -0.0), (1.0, 1.0, -1.0)):
        got = reference.fma(a, b, c)
        assert np.signbit(got) == np.signbit(a * b + c) and got == 0
    assert reference.fma(np.inf, 1, 2) == np.inf
    assert np.isnan(reference.fma(np.inf, 1, -np.inf))
    assert reference.fma(3e38, 1, 3e38) == np.inf
    tiny = np.float32(1e-30)
    assert reference.fma(tiny, tiny, np.float32(1e-45)) == np.float32(1e-45)


def test_bfloat16_nearest_against_exact_distance() -> None:
    rng = np.random.default_rng(1)
    value = random_floats(rng, 20000)
    value = value[np.isfinite(value) & (np.abs(value) < 3.38e38)]
    got = reference.nearest(value, "bfloat16")
    error = np.abs(reference.widen(got, "bfloat16").astype(np.float64) - value)
    for step in (-1, 1):
        other = reference.widen((got.astype(np.int64) + step).astype(np.uint16), "bfloat16")
        with np.errstate(invalid="ignore"):
            assert not (np.abs(other.astype(np.float64) - value) < error).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_is_unbiased_and_neighbouring(dtype: str) -> None:
    """Over all 65,536 values of the bits the mean is the value, to the last bit that r sees."""
    r = np.arange(65536, dtype=np.uint64)
    for t in (1.00390625 + 2**-11, -3.14159, 0.1, 2e-5, -3e-7, 6e-8 * 0.3, 65503.99):
        value = np.full(r.shape, t, np.float32)
        bits, saturated = reference.stochastic(value, r, dtype)
        rounded = reference.widen(bits, dtype).astype(np.float64)
        assert saturated == 0
        assert len(np.unique(bits)) <= 2
        gap = float(np.ptp(rounded)) or 1.0
        assert abs(rounded.mean() - float(np.float32(t))) <= gap * 2**-12, t


def every(dtype: str) -> Bits:
    return np.arange(65536, dtype=np.uint64).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("r", [0, 1, 7, 65535])
def test_representable_values_are_left_alone(dtype: str, r: int) -> None:
    bits = every(dtype)
    value = reference.widen(bits, dtype)
    number = ~np.isnan(value)
    got, saturated = reference.stochastic(value, np.full(bits.shape, r, np.uint64), dtype)
    assert (got[number] == bits[number]).all() and saturated == 0
    assert (reference.nearest(value, dtype)[number] == bits[number]).all()
    assert (got[~number] == reference.NAN[dtype]).all()


def test_saturation_is_counted_and_infinity_passes() -> None:
    big = np.array([3.4e38, -3.4e38, np.inf, -np.inf, 1.0], np.float32)
    bits, saturated = reference.stochastic(big, np.full(5, 65535, np.uint64), "bfloat16")
    assert list(bits[:4]) == [0x7F7F, 0xFF7F, 0x7F80, 0xFF80] and saturated == 2
    big = np.array([65519.0, -7e4, np.inf, -np.inf, 65504.0], np.float32)
    bits, saturated = reference.stochastic(big, np.full(5, 65535, np.uint64), "float16")
    assert list(bits) == [0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7BFF] and saturated == 2


def test_hadamard_rows_are_orthogonal() -> None:
    matrix = [[1 - 2 * (reference.hadamard_row(n) >> k & 1) for k in range(32)] for n in range(32)]
    product = np.array(matrix) @ np.array(matrix).T
    assert (product == 32 * np.eye(32)).all()

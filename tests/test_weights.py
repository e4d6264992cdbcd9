"""Perturb and restore against the reference, bit for bit, everywhere; and what is refused.

Each case runs on every target, on a small model of five odd tensors whose weights are special
values, raw bit patterns, norm gains and plain weights.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import reference
import torch
from cases import (
    DTYPES,
    MODES,
    NOISES,
    assert_bits,
    assert_tensors,
    bits_of,
    clones,
    expected_perturb,
    expected_update,
    made,
    member,
    nasty_bits,
    plain_bits,
    population,
    tensor_of,
    tensors,
)

from esfast import EsfastError, ParameterTable, Weights
from esfast.members import Member

SIGMAS = (1e-3, 0.02, 30.0, 1e30, 1e-44)


@cache
def perturbed(dtype: str, noise: str, sigma: float, sign: int) -> dict[str, reference.Bits]:
    return expected_perturb(tensors(dtype), member(noise, sign), sigma)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_and_restore(target: str, dtype: str, noise: str, memory: str) -> None:
    model = tensors(dtype)
    weights = made(model, memory)
    for sigma in SIGMAS:
        for sign in (1, -1):
            weights.perturb(member(noise, sign), sigma)
            assert_tensors(model, perturbed(dtype, noise, sigma, sign), f"sigma {sigma}")
            weights.restore()
            assert_tensors(model, tensors(dtype), f"restored after sigma {sigma}")


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_member_already_applied_is_restored_first(target: str, dtype: str, memory: str) -> None:
    model = tensors(dtype)
    weights = made(model, memory)
    for sigma in SIGMAS:
        weights.perturb(member("gaussian"), sigma)
    weights.perturb(member("rademacher"), 0.02)
    assert_tensors(model, perturbed(dtype, "rademacher", 0.02, 1))
    weights.restore()
    weights.restore()
    assert_tensors(model, tensors(dtype))


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_a_member_to_its_mirror(target: str, dtype: str, noise: str, memory: str) -> None:
    model = tensors(dtype)
    weights = made(model, memory)
    for sign, sigma in ((1, 0.02), (-1, 0.02), (1, 30.0), (-1, 1e-3), (-1, 1e30)):
        weights.perturb(member(noise, sign), sigma)
        assert_tensors(model, perturbed(dtype, noise, sigma, sign), f"{sign} * {sigma}")
    weights.restore()
    assert_tensors(model, tensors(dtype))


def test_members_of_one_seed_that_do_not_mirror_each_other(target: str) -> None:
    """Another group, another row of its matrix, another noise: a draw of its own each."""
    model = tensors("bfloat16")
    weights = made(model, "lean")
    kinds = [
        ("hadamard", 0),
        ("hadamard", 32),
        ("hadamard", 33),
        ("gaussian", 0),
        ("rademacher", 0),
    ]
    for noise, index in kinds:
        one = Member(seed=5, sign=1 - 2 * (index == 32), noise=noise, index=index)
        weights.perturb(one, 0.02)
        assert_tensors(model, expected_perturb(tensors("bfloat16"), one, 0.02), f"{noise} {index}")
    weights.restore()
    assert_tensors(model, tensors("bfloat16"))


class NoMemory:
    """A core that finds none for another member."""

    def __init__(self, core: object) -> None:
        self.core = core

    def perturb_recorded(self, *_: object) -> None:
        raise MemoryError

    def __getattr__(self, name: str) -> object:
        return getattr(self.core, name)


def test_no_memory_for_the_next_member_leaves_the_weights_restored() -> None:
    model = tensors("bfloat16")
    weights = made(model, "lean")
    weights.perturb(member("gaussian"), 0.02)
    weights._core = NoMemory(weights._core)
    with pytest.raises(MemoryError):
        weights.perturb(member("rademacher"), 0.02)
    assert not weights.perturbed
    assert_tensors(model, tensors("bfloat16"))


@pytest.mark.parametrize("memory", [*MODES, "master"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(target: str, dtype: str, memory: str) -> None:
    results = []
    for threads in (1, 2, 3):
        big = {"w": tensor_of(nasty_bits(dtype, 150_001), dtype), **tensors(dtype)}
        weights = made(big, memory, threads=threads)
        weights.perturb(member("gaussian"), 0.01)
        live, trail = clones(big), [weights.checksum()]
        weights.restore()
        trail.append(weights.checksum())
        report = weights.update(population("gaussian", 3), [0.1, -0.2, 0.3], seed=1)
        results.append(([*trail, weights.checksum(), report.saturated], live, clones(big)))
    for other in results[1:]:
        assert other[0] == results[0][0]
        assert_tensors(other[1], results[0][1], "perturbed")
        assert_tensors(other[2], results[0][2], "updated")


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0, 1e10, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_an_exception(target: str, dtype: str, sigma: float) -> None:
    """Weights so small against sigma that no subtraction finds them back; buffers must grow."""
    n = 70_001
    rng = np.random.default_rng(2)
    kind = reference.BITS[dtype]
    raw = rng.integers(0, np.iinfo(kind).max, n, dtype=kind, endpoint=True)
    for bits in (raw, (raw % kind(0x60)).astype(kind)):
        model = {"w": tensor_of(bits, dtype)}
        weights = made(model, "lean")
        weights.perturb(member("gaussian"), sigma)
        weights.restore()
        assert_bits(model["w"], bits, f"sigma {sigma}")


def all_bits(dtype: str) -> reference.Bits:
    """All 65,536 patterns of a 16-bit dtype; for fp32 each with a random low half."""
    bits = np.arange(65536, dtype=np.uint32)
    if dtype == "float32":
        bits = bits << 16 | np.random.default_rng(1).integers(0, 65536, 65536, dtype=np.uint32)
    return bits.astype(reference.BITS[dtype])


def assert_cycles(bits: reference.Bits, dtype: str, memory: str) -> None:
    model = {"w": tensor_of(bits, dtype)}
    weights = made(model, memory)
    steps = [("gaussian", sigma) for sigma in (1e-8, 1e-3, 0.3, 1e4)]
    steps += [("rademacher", odd * 2.0**-12) for odd in (1, 3, 5)]  # halfway between two weights
    for noise, sigma in steps:
        weights.perturb(member(noise), sigma)
        weights.restore()
        assert_bits(model["w"], bits, f"{noise}, sigma {sigma}")


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bit_patterns_survive_a_member(target: str, dtype: str, memory: str) -> None:
    assert_cycles(all_bits(dtype), dtype, memory)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_numbers_survive_a_member_on_a_master(target: str, dtype: str) -> None:
    bits = all_bits(dtype)
    assert_cycles(bits[~np.isnan(reference.widen(bits, dtype))], dtype, "master")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_masters_nans_keep_their_payloads(target: str, dtype: str) -> None:
    """Restoring gives back the bits that were there, also of a weight that is not a number."""
    bits = all_bits(dtype)
    assert_cycles(bits[np.isnan(reference.widen(bits, dtype))], dtype, "master")


def test_dtypes_may_be_mixed_in_one_table(target: str) -> None:
    model = {f"{dtype}.{name}": w for dtype in DTYPES for name, w in tensors(dtype).items()}
    before = clones(model)
    weights = made(model, "lean")
    weights.perturb(member("gaussian"), 0.02)
    assert_tensors(model, expected_perturb(before, member("gaussian"), 0.02))
    weights.restore()
    assert_tensors(model, before)
    weights.update(population("gaussian", 2), [0.1, 0.2], seed=6)
    want = reference.Update(population("gaussian", 2), [0.1, 0.2], seed=6)
    assert_tensors(model, expected_update(before, want)[0])


def test_the_callers_rounding_mode_is_given_back() -> None:
    """The core must leave flush-to-zero as the caller had it."""
    weights = made({"w": torch.ones(9)}, "lean")
    tiny = torch.tensor(1e-40)
    torch.set_flush_denormal(True)
    try:
        weights.perturb(member("gaussian"), 1e-3)
        assert float(tiny * 1) == 0.0
    finally:
        torch.set_flush_denormal(False)
    weights.restore()
    assert float(tiny * 1) != 0.0


# ---- checksum ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_sees_every_bit_and_every_swap(target: str, dtype: str) -> None:
    bits = plain_bits(dtype, 41)
    seen = {made({"w": tensor_of(bits, dtype)}, "lean").checksum()}
    width = 8 * bits.itemsize
    for k in range(41):
        for bit in range(width):
            flipped = bits.copy()
            flipped[k] ^= bits.dtype.type(1 << bit)
            seen.add(made({"w": tensor_of(flipped, dtype)}, "lean").checksum())
    assert len(seen) == 1 + 41 * width
    swapped = bits.copy()
    swapped[[3, 29]] = swapped[[29, 3]]
    assert made({"w": tensor_of(swapped, dtype)}, "lean").checksum() not in seen
    assert made({"v": tensor_of(bits, dtype)}, "lean").checksum() not in seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_is_the_reference(target: str, dtype: str) -> None:
    """Journals name it: another hash would refuse every run that was ever written."""
    model = tensors(dtype)
    parts = [
        reference.checksum(bits_of(w), name, np.arange(w.numel(), dtype=np.uint64))
        for name, w in model.items()
    ]
    assert made(model, "lean").checksum() == f"{sum(parts) % 2**64:016x}"


def test_checksum_is_one_value_on_every_target() -> None:
    from esfast import _core

    weights, before = made(tensors("bfloat16"), "lean"), _core.target()
    seen = set()
    for name in _core.targets():
        _core.set_target(name)
        seen.add(weights.checksum())
    _core.set_target(before)
    assert len(seen) == 1
    assert len(value := seen.pop()) == 16 and int(value, 16) >= 0


# ---- memory ------------------------------------------------------------------------------------


def test_lean_takes_what_it_said(target: str) -> None:
    n = 2_000_000
    model = {"w": tensor_of(plain_bits("bfloat16", n), "bfloat16")}
    weights = made(model, "lean")
    expected = weights.expected_bytes(1e-3)
    weights.perturb(member("gaussian"), 1e-3)
    use = weights.memory_use()
    weights.restore()
    assert use.weights_bytes == 2 * n
    assert 0 < use.extra_bytes <= 0.2 * use.weights_bytes
    assert expected <= 0.2 * use.weights_bytes
    assert abs(use.extra_bytes - expected) <= 0.5 * expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_asking_for_the_memory_leaves_the_weights(target: str, dtype: str) -> None:
    """Lean measures on a sample of the live weights, in place; a member that is on comes off."""
    model = {"w": tensor_of(nasty_bits(dtype, 150_001), dtype), **tensors(dtype)}
    before = clones(model)
    weights = made(model, "lean")
    assert weights.expected_bytes(0.01) > 0
    assert_tensors(model, before)
    weights.perturb(member("gaussian"), 0.01)
    weights.expected_bytes(0.01)
    weights.restore()
    assert_tensors(model, before)


def test_shadow_and_master_say_their_copy() -> None:
    for memory, copies in (("shadow", 1), ("master", 2)):
        weights = made({"w": torch.zeros(1000, dtype=torch.bfloat16)}, memory)
        assert weights.expected_bytes(1e-3) == 2000 * copies
        assert weights.memory_use().extra_bytes == 2000 * copies


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cycles_do_not_drift(dtype: str, memory: str) -> None:
    """Twenty cycles over two million trained-looking weights; test_model.py does a thousand."""
    model = {"w": tensor_of(plain_bits(dtype, 2_000_000), dtype)}
    weights = made(model, memory)
    before = weights.checksum()
    for k in range(20):
        weights.perturb(Member(seed=k, sign=1 - 2 * (k % 2)), 1e-3)
        assert weights.checksum() != before
        weights.restore()
        assert weights.checksum() == before


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [float("nan"), float("inf"), -1.0, 1e39])
def test_bad_sigmas_change_nothing(sigma: float) -> None:
    model = tensors("bfloat16")
    weights = made(model, "lean")
    with pytest.raises(EsfastError, match="sigma is"):
        weights.perturb(member("gaussian"), sigma)
    assert_tensors(model, tensors("bfloat16"))


def test_bad_memory_and_threads() -> None:
    for options, said in (
        ({"memory": "fat"}, "memory 'fat' is unknown"),
        ({"memory": "lean", "threads": 0}, "threads is 0"),
    ):
        with pytest.raises(EsfastError, match=said):
            Weights(ParameterTable.from_tensors(tensors("bfloat16")), **options)

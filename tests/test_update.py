"""The update against the reference, bit for bit: noise, population, pairs, decay and rounding.

Each case runs on every target and both exact memory modes; the fp32 master has its own trajectory.
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
    SHAPES,
    assert_bits,
    assert_tensors,
    bits_of,
    clones,
    coefficients,
    expected_perturb,
    expected_update,
    made,
    member,
    nasty_bits,
    plain_bits,
    population,
    special_bits,
    tensor_of,
    tensors,
)

from esfast import Anchor, AnchoredDecay, EsfastError, ParameterTable, Weights
from esfast.members import Member

DECAYS = {None: None, "l1": ("l1", 0.0021), "l2": ("l2", 0.37)}
ALPHA = 0.01


@cache
def updated(
    dtype: str, noise: str, rounding: str, decay: str | None, antithetic: bool = False
) -> tuple[dict[str, reference.Bits], int]:
    members = population(noise, 70 if noise == "hadamard" else 6, antithetic)
    update = reference.Update(
        members, coefficients(len(members)), DECAYS[decay], rounding, seed=0xABCDEF0123456789
    )
    return expected_update(tensors(dtype), update, tensors(dtype, seed=9))


def run_update(
    weights: Weights, noise: str, rounding: str, decay: str | None, antithetic: bool = False
) -> int:
    members = population(noise, 70 if noise == "hadamard" else 6, antithetic)
    kind = DECAYS[decay]
    report = weights.update(
        members,
        coefficients(len(members)),
        decay=AnchoredDecay(kind[0], kind[1] / ALPHA) if kind else None,
        alpha=ALPHA if kind else None,
        rounding=rounding,
        seed=0xABCDEF0123456789,
    )
    return report.saturated


def anchor_for(dtype: str) -> Anchor:
    return Anchor.in_memory(ParameterTable.from_tensors(tensors(dtype, seed=9)))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(target: str, dtype: str, noise: str, rounding: str, decay: str | None) -> None:
    want, saturated = updated(dtype, noise, rounding, decay)
    for memory in MODES:
        model = tensors(dtype)
        weights = made(model, memory, anchor=anchor_for(dtype))
        assert run_update(weights, noise, rounding, decay) == saturated
        assert_tensors(model, want, memory)
        weights.perturb(member(noise), 0.02)  # the new base is what the next member starts from
        weights.restore()
        assert_tensors(model, want, f"{memory}, a cycle later")


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_antithetic_update(target: str, dtype: str, noise: str, memory: str) -> None:
    model = tensors(dtype)
    run_update(made(model, memory), noise, "stochastic", None, antithetic=True)
    assert_tensors(model, updated(dtype, noise, "stochastic", None, antithetic=True)[0])


def test_antithetic_pairs_are_merged_in_double(target: str) -> None:
    """0.3 - (0.3 - 1e-12) is 1e-12 in double and 0 (or 3e-8) from two fp32 coefficients."""
    names = list(SHAPES)[:1]
    model = {names[0]: torch.zeros(64)}
    pair = population("gaussian", 2, antithetic=True)
    made(model, "lean").update(pair, [0.3, 0.3 - 1e-12])
    want = reference.Update(pair, [0.3, 0.3 - 1e-12])
    zero = {names[0]: torch.zeros(64)}
    assert_tensors(model, expected_update(zero, want)[0])
    assert 0 < model[names[0]].abs().max() < 1e-11


def test_neighbours_of_one_seed_are_one_term(target: str) -> None:
    """Also three of them, and a seed that returns later, which is a term of its own."""
    a, b = population("gaussian", 2)
    for members in ([a, a, a], [a, a, b, a], [a, b, b, a, a]):
        scalars = coefficients(len(members), 0.1)
        model = {"w": torch.zeros(65)}
        made(model, "lean").update(members, scalars)
        want = expected_update({"w": torch.zeros(65)}, reference.Update(members, scalars))[0]
        assert_tensors(model, want, str(len(members)))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_sign_of_a_zero_coefficient_counts(target: str, zero: float) -> None:
    """Where the sum is -0 by underflow: -0 + -0 is -0, and -0 + 0 is 0."""
    members = [Member(seed=1), Member(seed=2, sign=-1)]
    model = {"w": torch.full((64,), -0.0)}
    made(model, "lean").update(members, [1e-45, zero])
    want = reference.Update(members, [1e-45, zero])
    assert_tensors(model, expected_update({"w": torch.full((64,), -0.0)}, want)[0])


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("noise", NOISES)
def test_a_step_of_zero_is_positive(target: str, noise: str, size: int) -> None:
    """-0 + 0 is 0, also of no member at all."""
    for dtype in DTYPES:
        model = {"w": tensor_of(special_bits(dtype), dtype)}
        update = reference.Update(population(noise, size), [0.0] * size, seed=3)
        want = expected_update(clones(model), update)[0]
        made(model, "lean").update(population(noise, size), [0.0] * size, seed=3)
        assert_tensors(model, want, dtype)


LARGE = 200_003  # past the chunks and blocks that small tensors never fill


@cache
def large(noise: str) -> tuple[reference.Bits, reference.Bits, int]:
    bits, i = nasty_bits("bfloat16", LARGE), np.arange(LARGE, dtype=np.uint64)
    live = reference.perturb(bits, "bfloat16", "w", i, member(noise), 0.02)
    update = reference.Update(population(noise, 2), [0.1, -0.2], seed=3)
    return live, *update.apply(bits, "bfloat16", "w", i)


@pytest.mark.parametrize("noise", NOISES)
def test_large_tensors(target: str, noise: str) -> None:
    live, stepped, saturated = large(noise)
    for memory in MODES:
        model = {"w": tensor_of(nasty_bits("bfloat16", LARGE), "bfloat16")}
        weights = made(model, memory, threads=2)
        weights.perturb(member(noise), 0.02)
        assert_bits(model["w"], live, f"{memory}, perturbed")
        weights.restore()
        report = weights.update(population(noise, 2), [0.1, -0.2], seed=3)
        assert_bits(model["w"], stepped, f"{memory}, updated")
        assert report.saturated == saturated


@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("noise", NOISES)
def test_population_sizes(target: str, noise: str, size: int) -> None:
    model = {"model.norm.weight": tensor_of(plain_bits("bfloat16", 83), "bfloat16")}
    before = clones(model)
    members, scalars = population(noise, size), coefficients(size, 0.01)
    made(model, "lean").update(members, scalars, seed=4)
    want = expected_update(before, reference.Update(members, scalars, seed=4))[0]
    assert_tensors(model, want)


def test_hadamard_coefficients_halfway_between_integers(target: str) -> None:
    """Sums of 1, 3, .. 61 where the largest is 256: 63.5 times as many levels, as double has it."""
    sums = np.array([256.0, *range(1, 63, 2)]) * (-1.0) ** np.arange(32)
    rows = [[1 - 2 * (reference.hadamard_row(n) >> k & 1) for k in range(32)] for n in range(32)]
    scalars = [float(c) for c in np.array(rows) @ sums / 32]
    model = {"w": torch.zeros(257)}
    made(model, "lean").update(population("hadamard", 32), scalars)
    update = reference.Update(population("hadamard", 32), scalars)
    assert_tensors(model, expected_update({"w": torch.zeros(257)}, update)[0])


def test_an_empty_population_only_decays(target: str) -> None:
    model, anchor = tensors("bfloat16", plain_bits), tensors("bfloat16", plain_bits, seed=3)
    want = expected_update(clones(model), reference.Update([], [], ("l2", 0.25), seed=8), anchor)
    held = Anchor.in_memory(ParameterTable.from_tensors(anchor))
    weights = made(model, "lean", anchor=held)
    weights.update([], [], decay=AnchoredDecay("l2", 25.0), alpha=0.01, seed=8)
    assert_tensors(model, want[0])


@pytest.mark.parametrize("noise", NOISES)
def test_zero_coefficients_leave_the_bits(target: str, noise: str) -> None:
    """Apart from -0, which -0 + 0 turns into +0, and NaN, which becomes the canonical one."""
    for dtype in DTYPES:
        model = tensors(dtype, plain_bits)
        made(model, "lean").update(population(noise, 4), [0.0] * 4, seed=3)
        assert_tensors(model, tensors(dtype, plain_bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lean_is_shadow_through_generations(target: str, dtype: str) -> None:
    runs = {}
    for memory in MODES:
        model = tensors(dtype)
        weights, trail = made(model, memory, threads=1 + (memory == "lean")), []
        for generation in range(3):
            members = population("gaussian", 4, seed=generation)
            for one in members:
                weights.perturb(one, 0.01)
                trail.append(weights.checksum())
            weights.restore()
            weights.update(members, coefficients(4), seed=generation)
            trail.append(weights.checksum())
        runs[memory] = (trail, model)
    assert runs["lean"][0] == runs["shadow"][0]
    assert_tensors(runs["lean"][1], runs["shadow"][1])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_master_keeps_what_rounding_would_lose(target: str, dtype: str, decay: str | None) -> None:
    model, anchors = tensors(dtype), tensors(dtype, seed=9)
    weights = made(model, "master", anchor=anchor_for(dtype))
    wide = {name: reference.widen(bits_of(w), dtype) for name, w in model.items()}
    weights.perturb(member("gaussian"), 0.02)
    assert_tensors(model, expected_perturb(tensors(dtype), member("gaussian"), 0.02))
    weights.restore()
    for generation in range(3):
        members, scalars = population("gaussian", 3, seed=generation), coefficients(3, 1e-4)
        update = reference.Update(members, scalars, DECAYS[decay], "nearest")
        for name in wide:
            i = np.arange(wide[name].size, dtype=np.uint64)
            anchor = reference.widen(bits_of(anchors[name]), dtype)
            value = update.wide(wide[name], name, i, anchor)
            wide[name] = reference.nearest(value, "float32").view(np.float32)
        strength = DECAYS[decay]
        weights.update(
            members,
            scalars,
            decay=AnchoredDecay(strength[0], strength[1] / ALPHA) if strength else None,
            alpha=ALPHA if strength else None,
            rounding="nearest",
        )
        want = {name: reference.nearest(value, dtype) for name, value in wide.items()}
        assert_tensors(model, want, f"generation {generation}")
    one = member("gaussian")
    weights.perturb(one, 1e-3)
    for name, value in wide.items():
        i = np.arange(value.size, dtype=np.uint64)
        moved = reference.fma(reference.gaussian(one.seed, name, i), np.float32(1e-3), value)
        assert_bits(model[name], reference.nearest(moved, dtype), f"a member on the master {name}")


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_bit_patterns_update(target: str, dtype: str, noise: str) -> None:
    """Steps of about an ulp, stochastically rounded: fp16 subnormals and the largest included."""
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    for scale in (1e-7, 1e-3, 3e4):
        model = {"w": tensor_of(bits, dtype)}
        members, scalars = population(noise, 2), [scale, -0.4 * scale]
        report = made(model, "lean").update(members, scalars, seed=99)
        update = reference.Update(members, scalars, seed=99)
        i = np.arange(65536, dtype=np.uint64)
        want, saturated = update.apply(bits, dtype, "w", i)
        assert_bits(model["w"], want, f"scale {scale}")
        assert report.saturated == saturated


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_saturation_is_counted_over_tensors_and_threads(target: str, dtype: str) -> None:
    step = {"float16": 100.0, "bfloat16": 1.3e36}[dtype]  # bf16's: not beyond fp32
    top = np.full(5000, reference.INFINITY[dtype] - 1, np.uint16)
    model = {"a": tensor_of(top, dtype), "b": tensor_of(top | 0x8000, dtype)}
    before = clones(model)
    members = population("rademacher", 1)
    report = made(model, "lean", threads=2).update(members, [step], seed=5)
    want, saturated = expected_update(before, reference.Update(members, [step], seed=5))
    assert_tensors(model, want)
    assert report.saturated == saturated > 4000


def test_only_weights_saturate(target: str) -> None:
    """Not what lies beside them in a unit, a vector or a block: here every weight does."""
    model = {"w": torch.zeros(20, dtype=torch.float16)[3:16], "v": torch.zeros(67).half()}
    assert made(model, "lean").update(population("rademacher", 1), [1e5], seed=5).saturated == 80


SMALL_STEPS = {"normal": [1.3e-38, -2e-38], "subnormal": [1e-41, 2e-40]}
SMALL_SIGMAS = {"normal": 1.2e-38, "subnormal": 3e-41}


@pytest.mark.parametrize("steps", SMALL_STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_denormals_outside_changes_nothing(target: str, dtype: str, steps: str) -> None:
    """Weights, anchor, members and coefficients at the bottom of fp32's range."""
    scalars, sigma = SMALL_STEPS[steps], SMALL_SIGMAS[steps]
    small = np.concatenate([special_bits(dtype), nasty_bits(dtype, 400)])
    anchor = np.roll(small, 7)
    one, members = member("gaussian"), population("gaussian", 2)
    wanted = reference.perturb(small, dtype, "w", np.arange(small.size), one, sigma)
    update = reference.Update(members, scalars, ("l2", 0.5), seed=1)
    i = np.arange(small.size, dtype=np.uint64)
    stepped, _ = update.apply(small, dtype, "w", i, reference.widen(anchor, dtype))
    model = {"w": tensor_of(small, dtype)}
    held = Anchor.in_memory(ParameterTable.from_tensors({"w": tensor_of(anchor, dtype)}))
    weights = made(model, "lean", anchor=held, threads=2)
    checksum = weights.checksum()
    assert torch.set_flush_denormal(True)
    try:
        weights.perturb(one, sigma)
        live = bits_of(model["w"])
        weights.restore()
        restored, same = bits_of(model["w"]), weights.checksum() == checksum
        weights.update(members, scalars, decay=AnchoredDecay("l2", 50.0), alpha=0.01, seed=1)
    finally:
        torch.set_flush_denormal(False)
    assert same
    assert_bits(live, wanted, "perturbed")
    assert_bits(restored, small, "restored")
    assert_bits(model["w"], stepped, "updated")


@pytest.mark.parametrize("memory", MODES)
def test_updating_a_perturbed_model_is_refused_or_exact(memory: str) -> None:
    model = tensors("bfloat16")
    weights = made(model, memory)
    weights.perturb(member("gaussian"), 0.02)
    try:
        run_update(weights, "gaussian", "stochastic", None)
    except EsfastError:
        weights.restore()
        assert_tensors(model, tensors("bfloat16"))
    else:
        assert_tensors(model, updated("bfloat16", "gaussian", "stochastic", None)[0])

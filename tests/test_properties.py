"""Property tests: any bits, shapes, dtypes, segment splits, sigmas and populations.

Every example compares bits with the reference, so a failure prints the smallest table that breaks.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import reference
import torch
from cases import DTYPES, NOISES, assert_bits, tensor_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Bits

from esfast import Anchor, AnchoredDecay, ParameterTable, Weights
from esfast.members import Member, noise
from esfast.segments import Segment

NAME = "model.layers.1.mlp.down_proj.weight"
MODERATE = settings(max_examples=120)
SEEDS = st.integers(0, 2**64 - 1)
STEPS = st.floats(-1e3, 1e3, allow_nan=False, width=64)


@st.composite
def members(draw: st.DrawFn) -> Member:
    kind = draw(st.sampled_from(NOISES))
    index = draw(st.integers(0, 100)) if kind == "hadamard" else 0
    return Member(draw(SEEDS), draw(st.sampled_from([1, -1])), kind, index)


@st.composite
def populations(draw: st.DrawFn) -> tuple[list[Member], list[float]]:
    """Up to 40 members of one noise, with pairs that share a draw, and their coefficients."""
    kind, size = draw(st.sampled_from(NOISES)), draw(st.integers(1, 40))
    pairs = draw(st.booleans())
    shared = draw(SEEDS)
    out = []
    for n in range(size):
        k = n // 2 if pairs else n
        sign = 1 - 2 * (n % 2) if pairs else 1
        if kind == "hadamard":
            out.append(Member(shared, sign, kind, k))
        else:
            out.append(Member(reference.member_seed(shared, 0, k), sign, kind))
    return out, draw(st.lists(STEPS, min_size=size, max_size=size))


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[slice]:
    inner = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=3)) if length > 1 else set()
    return [slice(a, b) for a, b in pairwise([0, *sorted(inner), length])]


@st.composite
def weights_bits(draw: st.DrawFn, dtype: str, count: int) -> Bits:
    """Raw bits half the time, plain weights otherwise: both matter and shrink differently."""
    kind = reference.BITS[dtype]
    top = int(np.iinfo(kind).max)
    if draw(st.booleans()):
        values = draw(st.lists(st.integers(0, top), min_size=count, max_size=count))
        return np.array(values, dtype=kind)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = 10.0 ** draw(st.integers(-8, 4))
    return reference.nearest(rng.normal(0, scale, count).astype(np.float32), dtype)


def anchored(segments: list[Segment], anchor: torch.Tensor) -> Anchor:
    """The anchor of a table that is cut as these segments are."""
    cut = []
    for piece in segments:
        where = zip(piece.start, piece.tensor.shape, strict=True)
        part = anchor[tuple(slice(a, a + n) for a, n in where)]
        cut.append(Segment(piece.name, piece.shape, part, piece.start))
    return Anchor.in_memory(ParameterTable(cut))


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, tuple[int, ...], Bits, list[Segment]]:
    """A canonical tensor of one to three dimensions and segments that tile it, some strided."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
    bits = draw(weights_bits(dtype, int(np.prod(shape))))
    whole = tensor_of(bits, dtype, shape)
    parts: list[tuple[slice, ...]] = [()]
    for length in shape:
        ways = draw(cuts(length))
        parts = [(*p, s) for p in parts for s in ways]
    segments = []
    for part in parts:
        view = whole[part]
        if draw(st.booleans()):
            view = view.transpose(0, -1).contiguous().transpose(0, -1)
        segments.append(Segment(NAME, shape, view, tuple(s.start for s in part)))
    return dtype, shape, bits, segments


def assert_segments(segments: list[Segment], want: Bits, shape: tuple[int, ...], what: str) -> None:
    canonical = want.reshape(shape)
    for piece in segments:
        where = zip(piece.start, piece.tensor.shape, strict=True)
        part = canonical[tuple(slice(a, a + n) for a, n in where)]
        assert_bits(piece.tensor, np.ascontiguousarray(part).reshape(-1), f"{what} {piece.start}")


@MODERATE
@given(tables(), members(), st.floats(1e-42, 1e6), st.sampled_from(["lean", "shadow", "master"]))
def test_perturb_and_restore(table: tuple, member: Member, sigma: float, memory: str) -> None:
    dtype, shape, bits, segments = table
    assume(memory != "master" or not np.isnan(reference.widen(bits, dtype)).any())
    weights = Weights(ParameterTable(segments), memory=memory)
    i = np.arange(bits.size, dtype=np.uint64)
    weights.perturb(member, sigma)
    want = reference.perturb(bits, dtype, NAME, i, member, sigma)
    assert_segments(segments, want, shape, "perturbed")
    weights.restore()
    assert_segments(segments, bits, shape, "restored")


@MODERATE
@given(
    tables(),
    populations(),
    st.sampled_from(["stochastic", "nearest"]),
    st.sampled_from([None, "l1", "l2"]),
    st.floats(0.0, 0.99),
    SEEDS,
)
def test_update(
    table: tuple, people: tuple, rounding: str, decay: str | None, strength: float, seed: int
) -> None:
    dtype, shape, bits, segments = table
    kind = (decay, 1.0 * strength) if decay else None
    update = reference.Update(people[0], people[1], kind, rounding, seed)
    i = np.arange(bits.size, dtype=np.uint64)
    anchor = np.roll(bits, 1)
    want, saturated = update.apply(bits, dtype, NAME, i, reference.widen(anchor, dtype))
    held = anchored(segments, tensor_of(anchor, dtype, shape))
    weights = Weights(ParameterTable(segments), anchor=held)
    report = weights.update(
        *people,
        decay=AnchoredDecay(decay, strength) if decay else None,
        alpha=1.0 if decay else None,
        rounding=rounding,
        seed=seed,
    )
    assert_segments(segments, want, shape, "updated")
    assert report.saturated == saturated


@MODERATE
@given(members(), st.text(max_size=30), st.integers(0, 2**62), st.integers(0, 300))
def test_noise(member: Member, name: str, first: int, count: int) -> None:
    i = np.uint64(first) + np.arange(count, dtype=np.uint64)
    want = np.float32(member.sign) * reference.epsilon(member, name, i)
    got = noise(member, name, (count,), first=first)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@MODERATE
@given(tables(), st.integers(1, 4))
def test_checksums_add_up(table: tuple, threads: int) -> None:
    dtype, shape, bits, segments = table
    whole = {NAME: tensor_of(bits, dtype, shape)}
    want = Weights(ParameterTable.from_tensors(whole)).checksum()
    assert Weights(ParameterTable(segments), threads=threads).checksum() == want
    parts = [Weights(ParameterTable([piece])).checksum() for piece in segments]
    assert f"{sum(int(p, 16) for p in parts) % 2**64:016x}" == want


@MODERATE
@given(tables(), st.lists(members(), min_size=1, max_size=6), st.floats(1e-6, 1e3))
def test_any_number_of_members(table: tuple, people: list[Member], sigma: float) -> None:
    """Members on top of each other, without restores between: the last one, then the base."""
    dtype, shape, bits, segments = table
    lean = Weights(ParameterTable(segments), memory="lean")
    i = np.arange(bits.size, dtype=np.uint64)
    for member in people:
        lean.perturb(member, sigma)
    want = reference.perturb(bits, dtype, NAME, i, people[-1], sigma)
    assert_segments(segments, want, shape, "perturbed")
    lean.restore()
    assert_segments(segments, bits, shape, "restored")


def test_tensor_of_keeps_signalling_nans() -> None:
    """The properties above would be weaker if building a tensor quieted its NaNs."""
    bits = np.array([0x7F81, 0xFF81, 0x7FC1], np.uint16)
    assert_bits(tensor_of(bits, "bfloat16"), bits)
    assert torch.isnan(tensor_of(bits, "bfloat16")).all()

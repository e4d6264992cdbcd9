"""Shards, fused tensors and views give the bits of the whole, and their checksums add up to its.

Each layout cuts one canonical tensor into segments. Perturb, restore and update (stochastic, with
anchored decay) run on the segments; what they hold is put together again and compared with the
same steps on the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from cases import (
    DTYPES,
    NOISES,
    assert_bits,
    bits_of,
    clones,
    coefficients,
    nasty_bits,
    population,
    tensor_of,
)

from esfast import Anchor, AnchoredDecay, ParameterTable, Weights
from esfast.members import Member
from esfast.segments import Segment

NAME = "model.layers.0.self_attn.q_proj.weight"
MEMORIES = ("lean", "shadow", "master")


def pieces(length: int, cuts: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([0, *cuts, length])]


def even(length: int, ways: int) -> list[int]:
    return [length * k // ways for k in range(1, ways)]


def segment(whole: torch.Tensor, part: tuple[slice, ...], view: torch.Tensor) -> Segment:
    return Segment(NAME, tuple(whole.shape), view, tuple(s.start or 0 for s in part))


def own_copies(whole: torch.Tensor, parts: list[tuple[slice, ...]]) -> list[Segment]:
    """What tensor parallelism holds: each shard contiguous, in storage of its own."""
    return [segment(whole, part, whole[part].clone().contiguous()) for part in parts]


def views(whole: torch.Tensor, parts: list[tuple[slice, ...]]) -> list[Segment]:
    """Strided views of one storage."""
    return [segment(whole, part, whole[part]) for part in parts]


def transposed(whole: torch.Tensor, parts: list[tuple[slice, ...]]) -> list[Segment]:
    """Shards stored column by column."""
    return [segment(whole, part, whole[part].mT.contiguous().mT) for part in parts]


def padded(whole: torch.Tensor, parts: list[tuple[slice, ...]]) -> list[Segment]:
    """Shards inside rows that are longer and start at odd addresses."""
    out = []
    for part in parts:
        shard = whole[part]
        room = torch.zeros(*shard.shape[:-1], shard.shape[-1] + 5, dtype=whole.dtype)
        view = room[..., 3 : 3 + shard.shape[-1]]
        view.copy_(shard)
        assert bool((view.contiguous() == shard).all() | shard.isnan().any())
        out.append(segment(whole, part, view))
    return out


def every_other(whole: torch.Tensor, parts: list[tuple[slice, ...]]) -> list[Segment]:
    """No unit stride in any dimension."""
    out = []
    for part in parts:
        shard = whole[part]
        room = torch.zeros([2 * n for n in shard.shape], dtype=whole.dtype)
        view = room[tuple(slice(None, None, 2) for _ in shard.shape)]
        view.copy_(shard)
        out.append(segment(whole, part, view))
    return out


LAYOUTS: dict[str, Callable[..., list[Segment]]] = {
    "copies": own_copies,
    "views": views,
    "transposed": transposed,
    "padded": padded,
    "every other": every_other,
}

ROWS, COLUMNS = 44, 60
CUTS: dict[str, tuple[list[int], list[int]]] = {
    "whole": ([], []),
    "rows 2": (even(ROWS, 2), []),
    "rows 4": (even(ROWS, 4), []),
    "columns 2": ([], even(COLUMNS, 2)),
    "columns 4": ([], even(COLUMNS, 4)),
    "both": (even(ROWS, 2), even(COLUMNS, 2)),
    "odd": ([1, 8, 21], [3, 5, 58]),
    "single elements": ([1, 2], [1, 2]),
    "single columns": ([], list(range(1, COLUMNS))),
}


def cut(name: str) -> list[tuple[slice, ...]]:
    rows, columns = CUTS[name]
    return [(r, c) for r in pieces(ROWS, rows) for c in pieces(COLUMNS, columns)]


def whole_tensor(dtype: str) -> torch.Tensor:
    return tensor_of(nasty_bits(dtype, ROWS * COLUMNS), dtype, (ROWS, COLUMNS))


def joined(whole: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """The canonical tensor from its segments, bit by bit."""
    store = torch.int16 if whole.element_size() == 2 else torch.int32
    out = torch.zeros(whole.shape, dtype=store)
    for piece in segments:
        start = piece.start or (0,) * whole.ndim
        where = tuple(slice(a, a + n) for a, n in zip(start, piece.tensor.shape, strict=True))
        out[where] = piece.tensor.contiguous().view(store)
    return out.view(whole.dtype)


def walk(
    segments: list[Segment], noise: str, memory: str, join: Callable[[], torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    """A member, its restore, and a generation's update; the weights and checksum after each."""
    table = ParameterTable(segments)
    weights = Weights(table, memory=memory, anchor=Anchor.in_memory(table), threads=2)
    trail = [(weights.checksum(), join())]
    weights.perturb(Member(seed=8, sign=-1, noise=noise, index=(noise[0] == "h") * 40), 0.02)
    trail.append((weights.checksum(), join()))
    weights.restore()
    trail.append((weights.checksum(), join()))
    members, decay = population(noise, 40), AnchoredDecay("l2", 3.0)
    for seed in (1, 2):
        weights.update(members, coefficients(40, 1e-2), decay=decay, alpha=0.1, seed=seed)
        trail.append((weights.checksum(), join()))
    return trail


def assert_walks(got: list[tuple[str, torch.Tensor]], want: list[tuple[str, torch.Tensor]]) -> None:
    for k, ((seen, w), (expected, v)) in enumerate(zip(got, want, strict=True)):
        assert_bits(w, v, f"step {k}")
        assert seen == expected, f"checksum at step {k}"


def check(whole: torch.Tensor, segments: list[Segment], noise: str, memory: str) -> None:
    entire = [Segment(NAME, tuple(whole.shape), whole.clone(), (0,) * whole.ndim)]
    want = walk(entire, noise, memory, lambda: joined(whole, entire).clone())
    got = walk(segments, noise, memory, lambda: joined(whole, segments).clone())
    assert_walks(got, want)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_the_whole(target: str, layout: str, cuts: str) -> None:
    for k, (dtype, noise) in enumerate(zip(DTYPES, NOISES, strict=True)):
        whole = whole_tensor(dtype)
        check(whole, LAYOUTS[layout](whole.clone(), cut(cuts)), noise, MEMORIES[k])


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_odd_shards_of_every_dtype_noise_and_memory(
    target: str, noise: str, dtype: str, memory: str
) -> None:
    whole = whole_tensor(dtype)
    check(whole, own_copies(whole, cut("odd")), noise, memory)


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_ranks_of_tensor_parallelism_add_up(target: str, axis: int, ways: int) -> None:
    """Each rank has a table of its own; only checksums are exchanged."""
    whole = whole_tensor("bfloat16")
    length = whole.shape[axis]
    reference_weights = Weights(ParameterTable.from_tensors({NAME: whole.clone()}))
    parts = pieces(length, even(length, ways))
    shards = [
        own_copies(whole, [(part, slice(None)) if axis == 0 else (slice(None), part)])[0]
        for part in parts
    ]
    ranks = [Weights(ParameterTable([shard])) for shard in shards]
    every = [*ranks, reference_weights]
    for step in range(3):
        for w in every:
            if step == 1:
                w.perturb(Member(seed=4), 0.01)
            if step == 2:
                w.restore()
                w.update(population("gaussian", 3), [0.1, 0.2, 0.3], seed=1)
        total = sum(int(rank.checksum(), 16) for rank in ranks) % 2**64
        assert f"{total:016x}" == reference_weights.checksum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stacked", [0, 1])
def test_fused_qkv(target: str, dtype: str, stacked: int) -> None:
    """q, k and v as views of one fused tensor equal three tensors of their own."""
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    heads = [(36, 20), (12, 20), (12, 20)]
    if stacked:
        heads = [(20, 36), (20, 12), (20, 12)]
    alone = {
        name: tensor_of(nasty_bits(dtype, h * d, seed=k), dtype, (h, d))
        for k, (name, (h, d)) in enumerate(zip(names, heads, strict=True))
    }
    fused = torch.cat(list(alone.values()), dim=stacked)
    cuts = pieces(fused.shape[stacked], [36, 48])
    segments = [
        Segment(name, shape, fused[part] if stacked == 0 else fused[:, part], (0, 0))
        for name, shape, part in zip(names, heads, cuts, strict=True)
    ]
    one, two = Weights(ParameterTable.from_tensors(alone)), Weights(ParameterTable(segments))
    for w in (one, two):
        w.perturb(Member(seed=6), 0.05)
    assert one.checksum() == two.checksum()
    assert_bits(fused, torch.cat(list(alone.values()), dim=stacked), "perturbed")
    for w in (one, two):
        w.restore()
        w.update(population("gaussian", 3), [0.1, -0.2, 0.3], seed=3)
    assert_bits(fused, torch.cat(list(alone.values()), dim=stacked), "updated")


@pytest.mark.parametrize("shape", [(), (4, 6, 10), (2, 3, 4, 5), (7, 1, 9), (1, 1, 1), (33,)])
@pytest.mark.parametrize("layout", ["copies", "views", "every other"])
def test_other_ranks(target: str, layout: str, shape: tuple[int, ...]) -> None:
    count = int(torch.Size(shape).numel())
    whole = tensor_of(nasty_bits("bfloat16", count), "bfloat16", shape)
    parts: list[tuple[slice, ...]] = [()]
    for length in shape:
        cuts = [length // 3] if length > 2 else []
        parts = [(*p, s) for p in parts for s in pieces(length, cuts)]
    check(whole, LAYOUTS[layout](whole.clone(), parts), "gaussian", "lean")


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_permuted_storage(target: str, order: tuple[int, ...]) -> None:
    whole = tensor_of(nasty_bits("float16", 6 * 10 * 7), "float16", (6, 10, 7))
    back = [order.index(k) for k in range(3)]
    stored = whole.permute(order).contiguous().permute(back)
    assert not stored.is_contiguous() and stored.shape == whole.shape
    check(whole, [Segment(NAME, (6, 10, 7), stored, (0, 0, 0))], "gaussian", "lean")


def test_transposed_view_moves_only_its_own_elements(target: str) -> None:
    """The gaps of a strided view belong to somebody else."""
    room = tensor_of(nasty_bits("bfloat16", 40 * 50), "bfloat16", (40, 50))
    before = room.clone()
    view = room[3:33:3, 1:41:2].t()
    weights = Weights(ParameterTable.from_tensors({NAME: view}))
    weights.perturb(Member(seed=1), 0.5)
    inside = torch.zeros(40, 50, dtype=torch.bool)
    inside[3:33:3, 1:41:2] = True
    bits = bits_of(room).reshape(40, 50)
    old = bits_of(before).reshape(40, 50)
    assert (bits == old)[~inside.numpy()].all()
    assert (bits != old)[inside.numpy()].mean() > 0.5
    weights.restore()
    assert_bits(room, before)


@pytest.mark.parametrize("offset", range(9))
def test_any_alignment(target: str, offset: int) -> None:
    """A segment may start at any element, in memory and in the canonical tensor alike."""
    whole = tensor_of(nasty_bits("bfloat16", 200), "bfloat16")
    room = torch.zeros(220, dtype=torch.bfloat16)
    parts = pieces(200, [offset + 1, 63 + offset, 64 + offset])
    segments, at = [], offset
    for part in parts:
        view = room[at : at + part.stop - part.start]
        view.view(torch.int16).copy_(whole[part].view(torch.int16))
        segments.append(segment(whole, (part,), view))
        at += view.numel() + 1
        if at > room.numel():
            break
    check(whole, segments, "gaussian", "lean")


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("power", [32, 34, 35, 39])
def test_rows_across_a_carry(target: str, power: int, noise: str) -> None:
    """Where an index, a block of 4, of 8 (rounding) and of 128 (signs) carries into its upper word:
    inside the first of two rows of a shard of a tensor that nobody could hold."""
    columns = 70_001
    row, column = divmod(2**power, columns)
    shape, start = (row + 2, columns), (row, column - 6)
    bits = nasty_bits("bfloat16", 14)
    held = tensor_of(bits, "bfloat16", (2, 7))
    weights = Weights(ParameterTable([Segment(NAME, shape, held, start)]))
    i = np.array([2**power - 6 + r * columns + c for r in range(2) for c in range(7)], np.uint64)
    assert weights.checksum() == f"{reference.checksum(bits, NAME, i):016x}"
    members = population(noise, 2)
    weights.perturb(members[0], 0.1)
    assert_bits(held, reference.perturb(bits, "bfloat16", NAME, i, members[0], 0.1))
    weights.restore()
    weights.update(members, [0.1, 0.2], seed=3)
    update = reference.Update(members, [0.1, 0.2], seed=3)
    assert_bits(held, update.apply(bits, "bfloat16", NAME, i)[0])


def test_clones_are_independent() -> None:
    """The comparison above would be empty if walk() shared storage with the whole."""
    whole = {NAME: whole_tensor("bfloat16")}
    copy = clones(whole)
    copy[NAME].zero_()
    assert bits_of(whole[NAME]).any()

"""What an anchor in a mapped file holds resident, and that only such pages are ever given back.

Giving back is MADV_DONTNEED: of a file's read-only pages it drops a copy, of any other memory it
drops what was written there. So the bytes of every other kind of anchor are compared afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import assert_tensors, coefficients, population
from safetensors.torch import save_file

from esfast import Anchor, AnchoredDecay, ParameterTable, Weights, measure
from esfast.segments import Segment

Stored = dict[str, torch.Tensor]

MB = 1 << 20
FILE = 32 * MB  # of the anchors whose residence is measured
MOST = 16 * MB  # resident at once: 6 measured on one thread


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def plain() -> tuple[Stored, list[Segment]]:
    stored = {"w": normal(FILE // 2).bfloat16()}
    return stored, [Segment("w", (FILE // 2,), torch.zeros(FILE // 2, dtype=torch.bfloat16))]


def fp32() -> tuple[Stored, list[Segment]]:
    shape = (100, FILE // 400)
    return {"w": normal(*shape)}, [Segment("w", shape, torch.zeros(shape, dtype=torch.float16))]


def column_shard() -> tuple[Stored, list[Segment]]:
    held = torch.zeros(2048, 4001, dtype=torch.bfloat16)
    return {"w": normal(2048, 8192).bfloat16()}, [Segment("w", (2048, 8192), held, (0, 77))]


def many_small() -> tuple[Stored, list[Segment]]:
    stored = {f"layer.{n:04}": normal(16_000 + n).bfloat16() for n in range(1000)}
    return stored, [Segment(k, tuple(t.shape), torch.zeros_like(t)) for k, t in stored.items()]


def updated(weights: Weights) -> list[torch.Tensor]:
    """Copies of the live weights after an update with decay."""
    members = population("gaussian", 1)
    decay = AnchoredDecay("l2", 20.0)
    weights.update(members, coefficients(1, 1e-2), decay=decay, alpha=0.01, seed=2)
    return [segment.tensor.clone() for segment in weights.table.segments]


def rise(call: Callable[[], object]) -> int:
    """By how many bytes the peak of the resident set during `call` is above what it was before."""
    if not measure.reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    before = measure.peak_bytes()
    call()
    return measure.peak_bytes() - before


def from_memory(stored: Stored, segments: list[Segment]) -> list[torch.Tensor]:
    """What an update makes of the segments' weights with the anchor in memory."""
    boxes = [
        stored[s.name][
            tuple(slice(i, i + n) for i, n in zip(s.origin, s.tensor.shape, strict=True))
        ]
        for s in segments
    ]
    anchors = [Segment(s.name, s.shape, b, s.start) for s, b in zip(segments, boxes, strict=True)]
    copies = [Segment(s.name, s.shape, s.tensor.clone(), s.start) for s in segments]
    anchor = Anchor.in_memory(ParameterTable(anchors))
    return updated(Weights(ParameterTable(copies), anchor=anchor, threads=2))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "layout", [plain, fp32, column_shard, many_small], ids=lambda f: f.__name__
)
def test_a_pass_over_a_mapped_anchor_holds_little_of_it(
    tmp_path: Path, layout: Callable[[], tuple[Stored, list[Segment]]], threads: int
) -> None:
    """And the bits are those of the anchor in memory: pages that are dropped are read again."""
    stored, segments = layout()
    save_file(stored, tmp_path / "model.safetensors")
    table = ParameterTable(segments)
    weights = Weights(table, anchor=Anchor.from_safetensors(tmp_path, table), threads=threads)
    want = from_memory(stored, segments)
    checksum = weights.anchor_checksum()
    assert rise(weights.anchor_checksum) < MOST
    members, decay = population("gaussian", 1), AnchoredDecay("l2", 20.0)
    scalars = coefficients(1, 1e-2)
    assert rise(lambda: weights.update(members, scalars, decay=decay, alpha=0.01, seed=2)) < MOST
    for segment, expected in zip(segments, want, strict=True):
        assert torch.equal(segment.tensor, expected), segment.name
    assert weights.anchor_checksum() == checksum


def flagged(anchor: Anchor, table: ParameterTable) -> bool:
    """Whether the core may give back pages of this anchor."""
    rows = table.rows()
    anchor.fill(rows, table)
    return bool(rows["anchor_map"].any() or rows["anchor_map_end"].any())


def test_only_a_mapped_file_is_given_back(tmp_path: Path) -> None:
    """The range that the core gets is the file's mapping: the anchor in it, no live weight."""
    stored = {"v": normal(70_000), "w": normal(300, 1000).bfloat16()}
    save_file(stored, tmp_path / "model.safetensors")
    table = ParameterTable.from_tensors({k: t.clone() for k, t in stored.items()})
    assert not flagged(Anchor.in_memory(table), table)
    rows = table.rows()
    Anchor.from_safetensors(tmp_path, table).fill(rows, table)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert (rows["anchor_map_end"] - rows["anchor_map"] == size).all()
    assert (rows["anchor"] > rows["anchor_map"]).all()
    assert (rows["anchor"] < rows["anchor_map_end"]).all()
    assert ((rows["live"] < rows["anchor_map"]) | (rows["live"] >= rows["anchor_map_end"])).all()


def test_an_anchor_in_memory_keeps_its_bytes() -> None:
    """6 MB of anonymous memory, which would read as zeros had its pages been given back."""
    model = {"w": normal(3_000_000).bfloat16()}
    start = model["w"].clone()
    anchor = Anchor.in_memory(ParameterTable.from_tensors(model))
    for _ in range(2):
        weights = Weights(ParameterTable.from_tensors(model), anchor=anchor, threads=2)
        checksum = weights.anchor_checksum()
        updated(weights)
        assert weights.anchor_checksum() == checksum
    assert torch.equal(anchor._owners[0], start)


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_a_users_own_mapping_is_never_given_back(tmp_path: Path, mode: str) -> None:
    """Weights in a np.memmap, written to, with their anchor copied from them, or the file itself:
    what was written stays, and the file has what its mode says."""
    shape = (3_000_000,)
    path, raw = tmp_path / "model.safetensors", tmp_path / "weights.bin"
    save_file({"w": normal(*shape)}, path)
    normal(*shape).numpy().tofile(raw)
    held = np.memmap(raw, dtype=np.float32, mode=mode, shape=shape)
    held += 1.0  # "c": on pages of this process's own, which are nowhere else
    mapped = ParameterTable.from_tensors({"w": torch.from_numpy(held)})
    copy = ParameterTable.from_tensors({"w": normal(*shape) + 1.0})
    for make in (Anchor.in_memory, lambda table: Anchor.from_safetensors(path, table)):
        anchor, other = make(mapped), make(copy)
        got = updated(Weights(mapped, anchor=anchor, threads=2))
        want = updated(Weights(copy, anchor=other, threads=2))
        assert_tensors({"w": got[0]}, {"w": want[0]}, mode)
    held.flush()
    kept = want[0] if mode == "r+" else normal(*shape)
    assert torch.equal(torch.from_numpy(np.fromfile(raw, np.float32)), kept)


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_a_copy_of_a_users_own_mapping_is_not_flagged(tmp_path: Path, mode: str) -> None:
    raw = tmp_path / "weights.bin"
    normal(200_000).numpy().tofile(raw)
    held = np.memmap(raw, dtype=np.float32, mode=mode, shape=(200_000,))
    table = ParameterTable.from_tensors({"w": torch.from_numpy(held)})
    assert not flagged(Anchor.in_memory(table), table)

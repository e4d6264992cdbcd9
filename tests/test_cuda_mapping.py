"""The CUDA half where there is no GPU: its mapping, and its kernels on the CPU.

`emulated` puts the emulator in the place of a device's kernels and every table on it, and the tests
of the weights, updates and shards then run a second time, unchanged, over csrc/cuda.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import test_sharding
import test_update
import test_weights
import torch
from cases import DTYPES, TORCH, assert_bits, made, member, plain_bits, population, tensor_of

from esfast import Anchor, ParameterTable, Weights, _core, anchor_stream, device_table
from esfast.segments import Segment

# ---- the mapping covers every element once -----------------------------------------------------


def visited(emulator: Any, segments: list[Segment], blocks: int, threads: int) -> None:
    """Every element's word becomes 1 + 256 * its logical index, if it is visited exactly once."""
    rows = ParameterTable(segments).rows()
    spans, tiles = emulator.cuda.plan(rows)
    count = len(spans) // emulator.cuda.span_bytes
    place = emulator.cuda.Place(spans.ctypes.data, count, tiles, 0, 0)
    emulator.cover(place, blocks, threads)


def expected_words(segment: Segment) -> np.ndarray:
    index = np.zeros(segment.tensor.shape, dtype=np.uint64)
    for axis, (n, first) in enumerate(zip(segment.tensor.shape, segment.origin, strict=True)):
        at = np.arange(first, first + n, dtype=np.uint64)
        step = np.uint64(math.prod(segment.shape[axis + 1 :]))
        index = index + (at * step).reshape(-1, *[1] * (index.ndim - axis - 1))
    return ((index << np.uint64(8)) + np.uint64(1)).astype(np.uint32)


def assert_visited(segments: list[Segment]) -> None:
    for segment in segments:
        words = segment.tensor.contiguous().view(torch.int32).numpy().view(np.uint32)
        np.testing.assert_array_equal(words, expected_words(segment), segment.name)


GRIDS = [(1, 32), (3, 96), (132, 256)]


def awkward() -> list[Segment]:
    """Odd extents at every address modulo 16 bytes, single elements, empty pieces."""
    out = []
    for offset in range(4):
        for n in (0, 1, 2, 7, 8, 9, 511, 512, 513, 1025):
            view = torch.zeros(n + offset)[offset:]
            out.append(Segment(f"t{offset}.{n}", (n,), view))
    for start in range(9):
        view = torch.zeros(37)
        out.append(Segment(f"s{start}", (100,), view, (start,)))
    for first, cols in ((0, 1), (3, 5), (5, 8), (1, 19), (16, 16)):
        out.append(Segment(f"c{first}", (33, 41), torch.zeros(33, cols), (0, first)))
        view = torch.zeros(33, 48)[:, first : first + cols]
        out.append(Segment(f"v{first}", (33, 48), view, (0, first)))
    out.append(Segment("strided", (20, 30), torch.zeros(40, 60)[::2, ::2]))
    out.append(Segment("transposed", (20, 30), torch.zeros(30, 20).t()))
    return out


@pytest.mark.parametrize(("blocks", "threads"), GRIDS)
def test_awkward_tables_are_covered_once(emulator: Any, blocks: int, threads: int) -> None:
    segments = awkward()
    visited(emulator, segments, blocks, threads)
    assert_visited(segments)


def test_thousands_of_tiny_tensors_and_a_huge_one(emulator: Any) -> None:
    segments = [Segment(f"n{k}", (k % 9,), torch.zeros(k % 9)) for k in range(5000)]
    segments.insert(2500, Segment("huge", (3_000_001,), torch.zeros(3_000_001)))
    visited(emulator, segments, 132, 256)
    assert_visited(segments)


def test_gaps_stay_untouched(emulator: Any) -> None:
    room = torch.zeros(64, 50)
    segments = [Segment("v", (30, 20), room[3:33, 7:47:2])]
    visited(emulator, segments, 3, 96)
    assert_visited(segments)
    segments[0].tensor.zero_()
    assert not room.any()


def spans_of(
    emulator: Any, shape: tuple[int, ...], extent: tuple[int, int], start: tuple[int, int]
) -> np.ndarray:
    """The plan of a segment that nobody could hold: its addresses are never followed."""
    rows = np.zeros(1, dtype=_core.segment_dtype)
    rows["live"] = rows["base"] = 1 << 40
    rows["rows"], rows["cols"] = extent
    rows["live_row_stride"], rows["live_column_stride"] = extent[1], 1
    rows["origin"], rows["canonical_row_stride"] = start[0] * shape[1] + start[1], shape[1]
    spans, tiles = emulator.cuda.plan(rows)
    table = spans.view(np.uint64).reshape(-1, emulator.cuda.span_bytes // 8)
    assert tiles > 0
    return table


@pytest.mark.parametrize(
    ("shape", "extent", "start"),
    [
        ((1, 1 << 36), (1, 1 << 36), (0, 0)),
        ((1, 1 << 36), (1, (1 << 35) + 3), (0, 12345)),
        ((1 << 18, 1 << 17), (1 << 18, 5), (0, 77)),
        ((3, (1 << 34) + 11), (3, (1 << 33) + 5), (0, 1 << 33)),
        ((1 << 31, 4), (1 << 31, 3), (0, 1)),
    ],
)
def test_no_counter_carries_inside_a_span(
    emulator: Any, shape: tuple[int, ...], extent: tuple[int, int], start: tuple[int, int]
) -> None:
    """Spans of a giant cover all its elements, and none crosses a multiple of 2^33."""
    table = spans_of(emulator, shape, extent, start)
    cols, origin, stride = (table[:, k].astype(object) for k in (7, 8, 9))
    rows = (table[:, 10] & 0xFFFFFFFF).astype(object)
    per_row = (table[:, 10] >> 32).astype(object)
    last = origin + (rows - 1) * stride + cols - 1
    assert ((origin >> 33) == (last >> 33)).all()
    assert (rows * per_row < 2**31).all()
    assert int((rows * cols).sum()) == extent[0] * extent[1]
    assert int(origin.min()) == start[0] * shape[1] + start[1]
    assert int(last.max()) == (start[0] + extent[0] - 1) * shape[1] + start[1] + extent[1] - 1


def test_the_square_root_is_asked_for_what_it_can_answer(emulator: Any) -> None:
    """The branch-free root is right for -0, 0 and from 2^-60 up; all 2^30 words are looked at."""
    least, most, wrong = emulator.radius_arguments()
    assert wrong == 0 and least >= 2.0**-24 and most < 64


# ---- the suite again, over the kernels ----------------------------------------------------------

Case = Callable[..., None]
# What would only repeat.
LEFT_OUT = {"test_threads_do_not_matter"}


def cases_of(module: ModuleType) -> Iterator[Any]:
    """The tests of a module that run on a target, with every combination of their parameters."""
    for name, function in vars(module).items():
        if not name.startswith("test_") or name in LEFT_OUT:
            continue
        if "target" not in inspect.signature(function).parameters:
            continue
        marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
        names = [m.args[0] for m in marks]
        for values in itertools.product(*(m.args[1] for m in marks)):
            given = dict(zip(names, values, strict=True))
            yield pytest.param(function, given, id="-".join([name[5:], *map(str, values)]))


AGAIN = [case for module in (test_weights, test_update, test_sharding) for case in cases_of(module)]


@pytest.mark.parametrize(("case", "given"), AGAIN)
def test_again(emulated: None, case: Case, given: dict[str, Any]) -> None:
    case(target="emulated", **given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_grow_until_they_hold_everything(emulated: None, dtype: str) -> None:
    """Lists sized for a small sigma: tiles without room stay as they are, and nothing is lost."""
    bits = plain_bits(dtype, 300_001)
    model, other = {"w": tensor_of(bits, dtype)}, {"w": tensor_of(bits, dtype)}
    lean, shadow = made(model, "lean"), made(other, "shadow")
    held = []
    for sigma in (1e-6, 0.1, 1e4):
        for w in (lean, shadow):
            w.perturb(member("gaussian"), sigma)
        assert_bits(model["w"], other["w"], "perturbed")
        held.append(lean.memory_use().extra_bytes)
        lean.restore()
        assert_bits(model["w"], bits, "restored")
    assert held[0] < held[-1] and bits.nbytes < held[-1] < 2 * bits.nbytes


def test_lists_beyond_their_offsets_are_refused(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of more words than 32 bits can name: the weights as they were, and an error."""
    bits = plain_bits("bfloat16", 50_001)
    model = {"w": tensor_of(bits, "bfloat16")}
    lean = made(model, "lean")
    lean.perturb(member("gaussian"), 1e-6)
    monkeypatch.setattr(device_table, "_MOST_WORDS", 6000)  # all 50,001 would take 25,001
    with pytest.raises(MemoryError, match="shadow"):
        lean.perturb(member("gaussian"), 1e4)
    assert not lean.perturbed
    assert_bits(model["w"], bits, "restored")
    lean.perturb(member("gaussian"), 1e-6)
    lean.restore()
    assert_bits(model["w"], bits, "restored")


def test_a_table_of_nothing(emulated: None) -> None:
    w = Weights(ParameterTable.from_tensors({"empty": torch.zeros(0, 4)}))
    w.perturb(member("gaussian"), 0.1)
    w.restore()
    assert w.checksum() == "0" * 16 and w.expected_bytes(0.1) == 0


# ---- anchors in host memory, streamed ----------------------------------------------------------


def anchored_rows(segments: list[Segment]) -> np.ndarray:
    table = ParameterTable(segments)
    rows = table.rows()
    anchor = Anchor.in_memory(table)
    anchor.fill(rows, table)
    KEPT.append(anchor)
    return rows


KEPT: list[Anchor] = []
STREAMED: dict[str, Callable[[torch.dtype], list[Segment]]] = {
    "plain": lambda d: [Segment("w", (5003,), torch.linspace(-1, 1, 5003).to(d))],
    "sharded": lambda d: [Segment("w", (90, 60), torch.randn(60, 25).to(d), (11, 30))],
    "strided": lambda d: [Segment("w", (60, 40), torch.randn(120, 80).to(d)[::2, 1::2])],
    "many": lambda d: [Segment(f"w{n}", (n,), torch.randn(n).to(d)) for n in range(0, 900, 13)],
    "wide rows": lambda d: [Segment("w", (4, 9000), torch.randn(4, 3000).to(d), (0, 1))],
}


def aligned(count: int, offset: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """`count` numbers from `offset` elements after a 16-byte boundary on."""
    room = torch.zeros(count + offset + 16, dtype=dtype)
    first = -room.data_ptr() % 16 // room.element_size() + offset
    return room[first : first + count]


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        (lambda: Segment("w", (5120,), aligned(5120)), 10),
        (lambda: Segment("w", (5119,), aligned(5119)), 9),
        (lambda: Segment("w", (100, 64), aligned(6400).view(100, 64)), 12),
        (lambda: Segment("w", (9000,), aligned(5120), (8,)), 10),
        (lambda: Segment("w", (2**36,), aligned(1024), (2**35,)), 2),
        (lambda: Segment("w", (9000,), aligned(5120), (4,)), 0),  # no multiple of 8
        (lambda: Segment("w", (5120,), aligned(5120, offset=1)), 0),
        (lambda: Segment("w", (511,), aligned(511)), 0),
        (lambda: Segment("w", (60, 40), aligned(9600).view(120, 80)[::2, ::2]), 0),
        (lambda: Segment("w", (100, 128), aligned(6400).view(100, 64), (0, 64)), 0),  # rows apart
        (lambda: Segment("w", (5120,), aligned(5120, dtype=torch.float16)), 0),
        (lambda: Segment("w", (5120,), aligned(5120, dtype=torch.float32)), 0),
    ],
)
def test_dense_tiles_are_what_the_general_mapping_makes_them(
    emulator: Any, segment: Callable[[], Segment], expected: int
) -> None:
    rows = ParameterTable([segment()]).rows()
    spans, tiles = emulator.cuda.plan(rows)
    count = len(spans) // emulator.cuda.span_bytes
    place = emulator.cuda.Place(spans.ctypes.data, count, tiles, 0, 0)
    assert emulator.dense_tiles(place) == expected


def test_dense_tiles_are_dense_in_the_base_too(emulator: Any) -> None:
    live = aligned(5120)
    rows = ParameterTable.from_tensors({"w": live}).rows()
    for offset, dtype, expected in ((0, 1, 10), (1, 1, 0), (4, 1, 0), (8, 1, 10), (0, 0, 0)):
        base = aligned(5120, offset, torch.float32 if dtype == 0 else torch.bfloat16)
        rows["base"], rows["base_dtype"] = base.data_ptr(), dtype
        spans, tiles = emulator.cuda.plan(rows)
        place = emulator.cuda.Place(spans.ctypes.data, 1, tiles, 0, 0)
        assert emulator.dense_tiles(place) == expected, (offset, dtype)


@pytest.mark.parametrize("first", [0, 0x7F7F7000, 0x7F800000, 0x80007FF0, 0x3F800000, 0xFFFFF000])
def test_roundings_to_bfloat16(emulator: Any, first: int) -> None:
    """The stand-in for the conversion instruction, which tests/test_gpu_arithmetic.py looks at."""
    out = np.zeros(4096, dtype=np.uint16)
    emulator.cuda.roundings(0, 0, first, out.size, out.ctypes.data)
    bits = np.arange(first, first + out.size, dtype=np.uint64).astype(np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    want = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).copy()
    want[values.isnan().numpy()] = 0x7FC0
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("chunk", [64, 4096, 1 << 20])
@pytest.mark.parametrize("layout", STREAMED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_streamed_anchors(emulated: None, dtype: str, layout: str, chunk: int) -> None:
    """Windows of any size cover every element once: the bits of the update in one piece."""
    torch.manual_seed(1)
    segments = STREAMED[layout](TORCH[dtype])
    other = [Segment(s.name, s.shape, s.tensor.clone(), s.start) for s in segments]
    one = device_table.DeviceTable(anchored_rows(segments), torch.device("cpu"))
    with torch.device("meta"):  # a default of others, which is not asked
        cut = anchor_stream.AnchorStream(anchored_rows(other), torch.device("cpu"), chunk)
    members = [m.spec for m in population("gaussian", 3)]
    for seed in (1, 2):
        for core in (one, cut):
            core.update(0, members, [0.01, -0.02, 0.03], 2, 0.7, True, seed, 1)
    for a, b in zip(segments, other, strict=True):
        assert_bits(b.tensor, a.tensor, a.name)
    if chunk == 4096 and layout == "plain":
        assert len(anchor_stream.windows_of(anchored_rows(segments), chunk)) > 2


def test_a_pinned_buffer_waits_for_its_copies(emulated: None) -> None:
    """The first window of an update too: one that was interrupted may have left a copy queued."""
    waited = []

    class Copied:
        def synchronize(self) -> None:
            waited.append(self)

    rows = anchored_rows(STREAMED["plain"](torch.float32))
    stream = anchor_stream.AnchorStream(rows, torch.device("cpu"), 4096)
    stream._side, stream._copied = Copied(), [Copied(), Copied()]
    for number in range(3):
        stream._gather(stream._windows[number], number)
    assert waited == [stream._copied[0], stream._copied[1], stream._copied[0]]

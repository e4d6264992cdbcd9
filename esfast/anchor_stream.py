"""Decay towards an anchor that lies in host memory, on a CUDA device: streamed in chunks.

The update's table is cut into windows whose parts of the anchor fit a chunk. While a kernel
updates one window, the next one's anchor is copied from the file's pages to pinned memory, and from
there to the device on a stream of its own; two buffers take turns. Cutting changes no bits. Costs
two chunks of pinned and two of device memory, whatever the model's size. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from esfast.anchor import Anchor
from esfast.device_table import DeviceTable, DeviceUpdates, Rule, UpdateCall
from esfast.errors import StateError

CHUNK = 64 << 20  # bytes: 1.2 ms of PCIe 5 each, against 0.1 ms of latencies
_ALIGNMENT = 16
_CUT = 512  # columns are cut at multiples of a tile


@dataclass(frozen=True)
class Window:
    """A part of the table: its rows, and what to copy where: (host address, bytes, offset)."""

    rows: np.ndarray
    copies: tuple[tuple[int, int, int], ...]
    size: int


def _sizes(row: np.ndarray) -> tuple[int, int, int]:
    live, base, anchor = (4 if row[name] == 0 else 2 for name in _DTYPE_FIELDS)
    return live, base, anchor


_DTYPE_FIELDS = ("live_dtype", "base_dtype", "anchor_dtype")


def _part(row: np.ndarray, at: tuple[int, int], extent: tuple[int, int]) -> np.ndarray:
    """rows x cols `extent` of a row of the table, from (row, column) `at`."""
    part = row.copy()
    live, base, anchor = _sizes(row)
    r, c = at
    steps = int(row["live_row_stride"]), int(row["live_column_stride"])
    shift = (r * steps[0] + c * steps[1]) * live
    part["live"] = int(row["live"]) + shift
    own = row["base"] != row["live"]
    part["base"] = int(row["base"]) + (
        (r * int(row["base_row_stride"]) + c) * base if own else shift
    )
    part["anchor"] = int(row["anchor"]) + (r * int(row["anchor_row_stride"]) + c) * anchor
    part["origin"] = int(row["origin"]) + r * int(row["canonical_row_stride"]) + c
    part["rows"], part["cols"] = extent
    return part


def anchor_bytes(row: np.ndarray) -> int:
    """From the first to past the last element of the row's part of the anchor."""
    elements = (int(row["rows"]) - 1) * int(row["anchor_row_stride"]) + int(row["cols"])
    return elements * _sizes(row)[2]


def _cut(row: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """The row of the table in parts whose anchors span at most `limit` bytes."""
    rows, cols = int(row["rows"]), int(row["cols"])
    if anchor_bytes(row) <= limit:
        yield row
        return
    room = limit // _sizes(row)[2]
    if rows == 1:
        step = max(_CUT, room // _CUT * _CUT)
        first = -int(row["origin"]) % _CUT or step  # the first part ends at a canonical multiple
        edges = [0, *range(min(first, step), cols, step), cols]
        for a, b in pairwise(edges):
            yield _part(row, (0, a), (1, b - a))
        return
    step = max(1, (room - cols) // max(1, int(row["anchor_row_stride"])) + 1 if room > cols else 1)
    for r in range(0, rows, step):
        count = min(step, rows - r)
        block = _part(row, (r, 0), (count, cols))
        yield from _cut(block, limit) if count == 1 else (block,)


def windows_of(rows: np.ndarray, chunk: int) -> list[Window]:
    """The table in windows whose anchors, packed, take at most about `chunk` bytes."""
    windows: list[Window] = []
    parts: list[np.ndarray] = []
    copies: list[tuple[int, int, int]] = []
    size = 0

    def close() -> None:
        nonlocal parts, copies, size
        if parts:
            windows.append(Window(np.array(parts, dtype=rows.dtype), tuple(copies), size))
        parts, copies, size = [], [], 0

    for row in rows:
        for part in _cut(row, chunk):
            needed = anchor_bytes(part)
            if size and size + needed > chunk:
                close()
            parts.append(part)
            copies.append((int(part["anchor"]), needed, size))
            size += -(-needed // _ALIGNMENT) * _ALIGNMENT
    close()
    return windows


def _events(on_gpu: bool) -> list[torch.cuda.Event]:
    """One a buffer."""
    return [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # type: ignore[no-untyped-call]


class AnchorStream(DeviceUpdates):
    """Updates with decay, for a table of device rows whose anchors are host addresses."""

    def __init__(self, rows: np.ndarray, device: torch.device, chunk: int = CHUNK) -> None:
        super().__init__(device)
        self._windows = windows_of(rows, chunk)
        size = max((window.size for window in self._windows), default=0)
        on_gpu = device.type == "cuda"
        self._pinned = [
            torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=on_gpu) for _ in range(2)
        ]
        self._held = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._side = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._copied, self._used = _events(on_gpu), _events(on_gpu)
        self._tables = [self._table(window, k % 2) for k, window in enumerate(self._windows)]

    def _table(self, window: Window, buffer: int) -> DeviceTable:
        rows = window.rows.copy()
        rows["anchor"] = [self._held[buffer].data_ptr() + offset for _, _, offset in window.copies]
        rows["anchor_map"] = rows["anchor_map_end"] = 0  # no longer the file's pages
        return DeviceTable(rows, self.device)

    @property
    def bytes(self) -> int:
        """Pinned and device memory held, besides the tables of windows (112 bytes a part)."""
        return sum(tensor.nbytes for tensor in (*self._pinned, *self._held))

    def launch(self, call: UpdateCall, rule: Rule) -> None:
        """Window by window."""
        if self.capturing():
            raise StateError(
                "an anchor in a file cannot be read inside a CUDA graph's capture; use "
                "Anchor.in_memory."
            )
        for k, (window, table) in enumerate(zip(self._windows, self._tables, strict=True)):
            self._gather(window, k)
            self._send(window, k)
            table.launch(call, rule)
            if self._side is not None:
                self._used[k % 2].record(torch.cuda.current_stream(self.device))

    def _gather(self, window: Window, number: int) -> None:
        """Host pages to pinned memory; torch's threads copy, and fault the pages in."""
        buffer = number % 2
        if self._side is not None:
            self._copied[buffer].synchronize()  # the pinned buffer is free again: of this update's
            # copies, or of one that was interrupted (an event never recorded does not wait)
        for address, size, offset in window.copies:
            pages = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            self._pinned[buffer][offset : offset + size].copy_(torch.from_numpy(pages))

    def _send(self, window: Window, number: int) -> None:
        """Pinned to device memory, once the kernel of two windows before has read the buffer."""
        buffer = number % 2
        source, target = self._pinned[buffer][: window.size], self._held[buffer][: window.size]
        if self._side is None:
            target.copy_(source)
            return
        main = torch.cuda.current_stream(self.device)
        if number < 2:
            self._side.wait_stream(main)  # the last update may still read the buffer
        else:
            self._side.wait_event(self._used[buffer])
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            self._copied[buffer].record(self._side)
        main.wait_event(self._copied[buffer])


def streamed(anchor: Anchor, rows: np.ndarray, device: torch.device) -> AnchorStream | None:
    """A stream where the device cannot read the anchor itself; `rows` then lose its addresses."""
    if anchor.device == device or anchor.pinned or device.type != "cuda":
        return None
    stream = AnchorStream(rows, device)
    rows["anchor"] = rows["anchor_map"] = rows["anchor_map_end"] = 0
    return stream

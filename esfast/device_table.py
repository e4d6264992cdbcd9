"""The core's table on a CUDA device: the same calls as `_core.Table`, on memory of this side.

Kernels allocate nothing: the span table, lean memory's lists and an update's workspace are tensors
made here, through torch's allocator, and every call goes to torch's current stream of the table's
device. Lean memory's lists have a fixed size while a kernel runs; what does not fit is left
unperturbed and counted, and the counter, read after each member, says how much to grow: then the
member is taken back, the lists grow, and it is applied again. Not yet run on a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from esfast import _core
from esfast.errors import ParameterError, StateError, first_line
from esfast.resources import available_memory

_SAMPLE_STRIDE = 16  # every 16th tile tells the size of the first lists to a few per cent
_SLACK = 1.25  # over the demand seen: the next member's differs, and so does the slabs' order
_LARGEST_SLAB, _SMALLEST_SLAB = 4096, 64  # words of 4 bytes that a warp reserves at once
_MOST_WORDS = 2**32 - 1  # that a list's 32-bit offsets can name: 17 GB of exceptions

Rule: TypeAlias = tuple[int, float, bool, int]
"""Of an update: the decay's number and strength, whether rounding is stochastic, and its key."""


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device can give: the system's, or what CUDA and torch's cache have free."""
    if device.type != "cuda":
        return available_memory()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def driver() -> Any:
    """The kernels, or None where the build has none."""
    return getattr(_core, "cuda", None)


def make_table(rows: np.ndarray, device: torch.device) -> Any:
    """The core's table of these rows, on the CPU or on a CUDA device."""
    return DeviceTable(rows, device) if device.type == "cuda" else _core.Table(rows)


def make_records(device: torch.device) -> Any:
    """What lean memory keeps between a member and its restore."""
    return DeviceRecords() if device.type == "cuda" else _core.Records()


def room(count: int, dtype: torch.dtype, device: torch.device, what: str) -> torch.Tensor:
    """`count` numbers of device memory for `what`; MemoryError where there are not so many."""
    try:
        return torch.empty(count, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"{what} needs {count * dtype.itemsize / 1e9:.2f} GB on {device} "
            f"({first_line(error)}); the weights are restored. Free memory, or lower "
            "sigma or the population."
        ) from None


class DeviceRecords:
    """Lists of what rounding loses, in device memory, and the member that they belong to."""

    def __init__(self) -> None:
        self.active = False
        self.member: tuple[int, _core.MemberSpec, float] | None = None
        self.marks: torch.Tensor | None = None
        self.offsets: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.demand: torch.Tensor | None = None
        self.slab = _SMALLEST_SLAB  # words that a warp reserves at once

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What is held in device memory."""
        held = (self.marks, self.offsets, self.values, self.demand)
        return [tensor for tensor in held if tensor is not None]

    def bytes(self) -> int:
        """Bytes of device memory held."""
        return sum(tensor.nbytes for tensor in self.buffers)


@dataclass(frozen=True)
class UpdateCall:
    """An update's members as the kernels take them, and the device memory of one update."""

    population: Any
    workspace: torch.Tensor
    count: torch.Tensor

    def saturated(self) -> int:
        """How many weights saturated; waits for the device."""
        return int(self.count.item())


class DeviceUpdates(ABC):
    """Updates of weights on one CUDA device: members prepared once, kernels launched, one count.

    ParameterError where the build has no kernels.
    """

    def __init__(self, device: torch.device) -> None:
        kernels = driver()
        if kernels is None:
            raise ParameterError(
                f"the tensors are on {device}, and this build has no CUDA kernels; install esfast "
                "where nvcc is found, or move the model with .to('cpu')."
            )
        self._kernels = kernels
        self.device = device

    def capturing(self) -> bool:
        """Whether this device's current stream is being captured into a graph."""
        if self.device.type != "cuda":
            return False
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def update(
        self,
        noise: int,
        members: Sequence[_core.MemberSpec],
        coefficients: Sequence[float],
        decay: int,
        strength: float,
        stochastic: bool,
        rounding_seed: int,
        threads: int,
    ) -> int:
        """One pass; returns how many weights saturated, or -1 inside a graph's capture."""
        call = self.prepare_update(noise, members, coefficients)
        self.launch(call, (decay, strength, stochastic, rounding_seed))
        return -1 if self.capturing() else call.saturated()

    def prepare_update(
        self, noise: int, members: Sequence[_core.MemberSpec], coefficients: Sequence[float]
    ) -> UpdateCall:
        """The population's terms, and device memory for them."""
        population = self._kernels.Population(noise, list(members), list(coefficients))
        words = -(-population.bytes // 4)
        workspace = room(words, torch.int32, self.device, "an update's members")
        count = torch.zeros(1, dtype=torch.int64, device=self.device)
        return UpdateCall(population, workspace, count)

    @abstractmethod
    def launch(self, call: UpdateCall, rule: Rule) -> None:
        """Queues the kernels."""


class DeviceTable(DeviceUpdates):
    """Perturb, restore, update and checksum on one CUDA device; `threads` is ignored everywhere.

    rows: as `ParameterTable.rows`, with device addresses; device: where they lie. Raises
    ParameterError where the build has no kernels, EsfastError with CUDA's words where a call fails.
    """

    def __init__(self, rows: np.ndarray, device: torch.device) -> None:
        super().__init__(device)
        self._index = (device.index or 0) if device.type == "cuda" else 0
        self._kernels.prepare(self._index)
        spans, self.tiles = self._kernels.plan(rows)
        self._count = len(spans) // self._kernels.span_bytes
        self._spans = torch.from_numpy(spans).to(device)
        self._sum = torch.empty(1, dtype=torch.int64, device=device)

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _place(self, *used: torch.Tensor) -> Any:
        """Where a call goes. The allocator may reuse what it uses only after the stream."""
        if self.device.type == "cuda" and not self.capturing():
            stream = torch.cuda.current_stream(self.device)
            for tensor in (self._spans, self._sum, *used):
                tensor.record_stream(stream)
        return self._kernels.Place(
            self._spans.data_ptr(), self._count, self.tiles, self._index, self._stream()
        )

    # ---- shadow memory

    def perturb(self, noise: int, member: _core.MemberSpec, scale: float, threads: int) -> None:
        """live = round(base + scale * noise)."""
        self._kernels.perturb(self._place(), noise, member, scale)

    def capture(self, threads: int) -> None:
        """base = live."""
        self._kernels.capture(self._place())

    def refresh(self, threads: int) -> None:
        """live = round(base)."""
        self._kernels.refresh(self._place())

    # ---- lean memory

    def perturb_recorded(
        self,
        records: DeviceRecords,
        noise: int,
        member: _core.MemberSpec,
        scale: float,
        threads: int,
    ) -> None:
        """In place, with lists of what rounding loses, after `restore`. Waits for the device: do
        they fit?"""
        if self.capturing():
            raise StateError(
                "lean memory looks at its lists' size after each member, which a CUDA graph's "
                'capture does not allow; make the weights with memory="shadow".'
            )
        self.restore(records, threads)
        self._prepare(records, noise, member, scale)
        records.member = (noise, member, scale)
        while True:
            self._record(records, noise, member, scale)
            assert records.values is not None and records.demand is not None
            needed = int(records.demand.item())
            if needed <= min(records.values.numel(), _MOST_WORDS):
                return
            self.restore(records, threads)
            self._grow(records, needed)

    def _record(
        self, records: DeviceRecords, noise: int, member: _core.MemberSpec, scale: float
    ) -> None:
        place = self._place(*records.buffers)
        assert records.offsets is not None
        records.offsets.fill_(-1)  # not perturbed, wherever an interrupt strikes
        records.active = True
        self._kernels.record(place, noise, member, scale, self._buffers(records), 1)

    def _prepare(
        self, records: DeviceRecords, noise: int, member: _core.MemberSpec, scale: float
    ) -> None:
        if records.values is not None:
            return
        units = self.tiles * self._kernels.tile_units
        what = "lean memory"
        records.marks = room(units, torch.uint8, self.device, what)
        records.offsets = room(self.tiles, torch.int32, self.device, what)
        records.demand = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._grow(records, self._expected_words(noise, member, scale, _SAMPLE_STRIDE))

    def _grow(self, records: DeviceRecords, demand: int) -> None:
        """A list for that many words, and for what each warp's last slab leaves unused."""
        if demand > _MOST_WORDS:
            raise MemoryError(
                f"lean memory's lists hold {4 * _MOST_WORDS / 1e9:.0f} GB a table, and rounding "
                f"loses {4 * demand / 1e9:.0f} GB at this sigma; the weights are restored. Use "
                'memory="shadow", or lower sigma.'
            )
        warps = max(1, int(self._kernels.warps(self._index)))
        records.slab = max(_SMALLEST_SLAB, min(_LARGEST_SLAB, demand // warps // 8))
        words = min(int(demand * _SLACK) + warps * records.slab, _MOST_WORDS)
        records.values = None  # first: the old list may be what leaves no room for the new one
        what = "what lean memory's rounding loses"
        records.values = room(words, torch.int32, self.device, what)

    def _buffers(self, records: DeviceRecords) -> Any:
        marks, offsets, values, demand = records.buffers
        pointers = [tensor.data_ptr() for tensor in (marks, offsets, values, demand)]
        return self._kernels.Buffers(*pointers, values.numel(), records.slab)

    def restore(self, records: DeviceRecords, threads: int) -> None:
        """Puts back the bits from before `perturb_recorded`."""
        if not records.active or records.member is None:
            return
        noise, member, scale = records.member
        place = self._place(*records.buffers)
        self._kernels.restore(place, noise, member, scale, self._buffers(records))
        records.active = False

    def _expected_words(
        self, noise: int, member: _core.MemberSpec, scale: float, stride: int
    ) -> int:
        if self.tiles == 0:
            return 0
        demand = torch.zeros(1, dtype=torch.int64, device=self.device)
        counting = self._kernels.Buffers(0, 0, 0, demand.data_ptr(), 0, 0)
        self._kernels.record(self._place(demand), noise, member, scale, counting, stride)
        return int(demand.item()) * self.tiles // -(-self.tiles // stride)

    def expected_record_bytes(
        self, noise: int, member: _core.MemberSpec, scale: float, stride: int, threads: int
    ) -> int:
        """Bytes that the lists would take, from every stride-th tile; edits nothing."""
        words = self._expected_words(noise, member, scale, stride)
        return self.tiles * (self._kernels.tile_units + 4) + int(4 * words * _SLACK)

    # ---- update, checksum

    def launch(self, call: UpdateCall, rule: Rule) -> None:
        """Queues the update of this table; several tables may share a call."""
        place = self._place(call.workspace, call.count)
        pointers = (call.workspace.data_ptr(), call.count.data_ptr())
        self._kernels.update(place, call.population, *rule, *pointers)

    def checksum(self, threads: int) -> int:
        """Sum of the elements' hashes modulo 2^64; waits for the device."""
        self._kernels.checksum(self._place(), self._sum.data_ptr())
        return int(self._sum.item()) % 2**64

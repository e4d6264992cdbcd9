"""The anchor of weight decay: the model that training started from.

In memory it is a packed copy of the table's elements; from a checkpoint it is the safetensors file
itself, memory-mapped read-only and streamed by the update, which gives its pages back. None are
resident between updates. During one about 32 chunks of 65,536 weights are, and one more a thread:
4 MB in bf16, up to 2 MB a chunk where the page cache has huge pages and small tensors lie scattered
in the file. Elsewhere than on Linux, and for a CUDA device's updates, up to the whole file is, in
clean pages that count in the resident set's peak. The file must stay as it is while the anchor is
in use.
Only the header of a safetensors file is interpreted (8 bytes of length, JSON, data).
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from esfast.checkpoint import weight_files
from esfast.errors import DataError, ParameterError, StateError
from esfast.parameters import ParameterTable
from esfast.segments import DTYPES

_FORMATS = {"F32": (0, 4), "BF16": (1, 2), "F16": (2, 2)}
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors format itself
_NO_HEADER = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class _Stored:
    """One tensor's place: address of its first element, the core's dtype number, element size,
    whether it is laid out as the canonical tensor or as the packed segment, and the addresses of
    the file's read-only mapping that it lies in; zeros for what lies in memory: its pages hold the
    only copy, and giving them back would lose it."""

    address: int
    dtype: int
    size: int
    canonical: bool
    mapping: tuple[int, int] = (0, 0)


class _MappedFile:
    """A safetensors file, mapped read-only; `tensors` gives (format, shape, first byte) by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the anchor's file '{path}' cannot be mapped ({error}); name the safetensors file "
                "or Hugging Face folder that training started from."
            ) from error
        self.bytes = np.frombuffer(self.map, dtype=np.uint8)
        self.tensors = self._read_header()

    @property
    def addresses(self) -> tuple[int, int]:
        """Of the mapping: its first byte, which starts a page, and past its last."""
        first = int(self.bytes.ctypes.data)
        return first, first + self.bytes.size

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"'{self.path}' is not a whole safetensors file: {what}. Copy or download it again."
        )

    def _read_header(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        if self.bytes.size < 8:
            raise self._damaged(f"it has {self.bytes.size} bytes")
        length = int.from_bytes(self.bytes[:8].tobytes(), "little")
        if length > min(self.bytes.size - 8, _LONGEST_HEADER):
            raise self._damaged(f"its header claims {length} bytes of {self.bytes.size}")
        try:
            header = json.loads(self.bytes[8 : 8 + length].tobytes())
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            return {name: self._place(name, entry, 8 + length) for name, entry in entries.items()}
        except _NO_HEADER as error:
            raise self._damaged(f"its header cannot be read ({error})") from error

    def _place(
        self, name: str, entry: dict[str, Any], data: int
    ) -> tuple[str, tuple[int, ...], int]:
        begin, end = (int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(n) for n in entry["shape"])
        kind = str(entry["dtype"])
        size = _FORMATS[kind][1] if kind in _FORMATS else None
        if not 0 <= begin <= end <= self.bytes.size - data or any(n < 0 for n in shape):
            raise self._damaged(f"'{name}' lies at bytes {begin}:{end}, beyond its end")
        if size is not None and math.prod(shape) * size != end - begin:
            raise self._damaged(f"'{name}' of shape {shape} has {end - begin} bytes")
        return kind, shape, data + begin

    def release(self) -> None:
        """Gives the resident pages back; the next read maps them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


class Anchor:
    """Where decay pulls to. Make one with `in_memory` or `from_safetensors`.

    resident_bytes: memory that it holds besides the page cache; device: where that lies; pinned:
    whether CUDA devices can read it where it is.
    """

    def __init__(
        self,
        table: ParameterTable,
        stored: list[_Stored],
        owners: list[Any],
        resident_bytes: int,
        device: torch.device | None = None,
    ) -> None:
        self._layout = table.layout
        self.device = device or torch.device("cpu")
        self.pinned = False
        self._stored = stored  # one a segment of the table
        self._owners = owners
        self.resident_bytes = resident_bytes

    @classmethod
    def in_memory(cls, table: ParameterTable) -> Anchor:
        """A copy of the table's elements as they are now, in their dtypes."""
        copies = [
            s.tensor.detach().clone(memory_format=torch.contiguous_format) for s in table.segments
        ]
        stored = [_Stored(c.data_ptr(), DTYPES[c.dtype], c.element_size(), False) for c in copies]
        return cls(table, stored, list(copies), table.nbytes, table.device)

    @classmethod
    def in_pinned_memory(cls, table: ParameterTable) -> Anchor:
        """A copy in host memory for a table on a CUDA device, whose updates with decay read it over
        the bus: no device memory, at the bus's speed. Not yet run on a GPU."""
        copies = []
        for segment in table.segments:
            source = segment.tensor.detach()
            copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
            copies.append(copy.copy_(source))
        stored = [_Stored(c.data_ptr(), DTYPES[c.dtype], c.element_size(), False) for c in copies]
        anchor = cls(table, stored, list(copies), table.nbytes)
        anchor.pinned = True
        return anchor

    @classmethod
    def from_safetensors(cls, path: str | Path, table: ParameterTable) -> Anchor:
        """The tensors of a safetensors file, or of a Hugging Face folder (sharded or not), mapped.

        They may have another dtype than the live weights, and lack the first part of their names,
        as in checkpoints of the model without its head ("wte.weight" for GPT-2's
        "transformer.wte.weight"), which transformers loads too. Errors (DataError): a missing,
        damaged or truncated file; a tensor of the table that is absent, or of another shape or
        dtype.
        """
        files = [_MappedFile(file) for file in weight_files(path)]
        places = {name: (file, *place) for file in files for name, place in file.tensors.items()}
        stored = []
        for segment in table.segments:
            name = segment.name if segment.name in places else segment.name.partition(".")[2]
            if name not in places:
                raise DataError(
                    f"'{path}' has no tensor '{segment.name}' to anchor to; it has {len(places)}, "
                    f"such as {sorted(places)[:3]}. Use the checkpoint that training started from."
                )
            file, kind, shape, begin = places[name]
            if kind not in _FORMATS or shape != tuple(segment.shape):
                raise DataError(
                    f"'{segment.name}' in '{path}' is {kind} of shape {shape}; expected F32, F16 "
                    f"or BF16 of shape {tuple(segment.shape)}. Use the checkpoint of this model."
                )
            mapping = file.addresses
            stored.append(_Stored(mapping[0] + begin, *_FORMATS[kind], True, mapping))
        return cls(table, stored, list(files), 0)

    def __reduce__(self) -> NoReturn:
        raise StateError(
            "an anchor knows its elements by their addresses, and cannot be copied or pickled; "
            "make another with Anchor.in_memory(table) or Anchor.from_safetensors(path, table)."
        )

    def fill(self, rows: np.ndarray, table: ParameterTable) -> None:
        """Writes the anchor's columns of a core segment table."""
        if self._layout != table.layout:
            raise ParameterError(
                f"the anchor was made for another table ({len(self._layout)} segments; this one "
                f"has {len(table.segments)}, or their names, shapes or starts differ); make the "
                "anchor from this table."
            )
        if self.device.type == "cuda" and self.device != table.device:
            raise ParameterError(
                f"the anchor lies on {self.device} and the table on {table.device}; make the "
                "anchor from this table."
            )
        for row, piece in zip(rows, table.pieces, strict=True):
            stored = self._stored[piece.segment]
            which = 1 if stored.canonical else 2
            row["anchor"] = stored.address + piece.offsets[which] * stored.size
            row["anchor_row_stride"] = piece.strides[which]
            row["anchor_dtype"] = stored.dtype
            row["anchor_map"], row["anchor_map_end"] = stored.mapping

    def release(self) -> None:
        """Drops what a pass over a mapped anchor left resident."""
        for owner in self._owners:
            if isinstance(owner, _MappedFile):
                owner.release()

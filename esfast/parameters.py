"""What may be edited: canonical tensors, and where their elements lie in memory.

A canonical tensor is named and shaped as the Hugging Face checkpoint stores it; noise is a function
of that name and the row-major index in it. A segment says that a view in memory holds a box of a
canonical tensor, so fused, sharded and strided layouts give the bits of the plain one.
The table keeps its tensors alive, copies nothing, and never looks at values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch

from esfast import _core
from esfast.errors import ParameterError
from esfast.held_tensors import HeldTensors
from esfast.journal_format import TensorSpec
from esfast.members import tensor_id
from esfast.stored_names import require_live, stored_tensors

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Segment:
    """A view that holds canonical[start : start + tensor.shape] of the tensor called `name`.

    shape: of the canonical tensor; tensor: a view of float32, float16 or bfloat16, any strides;
    start: first canonical index along each dimension (zeros when left out); counted: whether a
    checksum counts it, False where another worker's segment of the same elements is counted.
    """

    name: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    start: tuple[int, ...] = ()
    counted: bool = True

    @property
    def origin(self) -> tuple[int, ...]:
        """`start`, with zeros where it was left out."""
        return tuple(self.start) or (0,) * len(self.shape)


@dataclass(frozen=True)
class Piece:
    """A rows x cols part of a segment as the core sees it; offsets and strides in elements.

    Memory, canonical tensor and packed copy (the segment's elements, contiguous) each have an
    offset and a row stride; `column` is the memory's column stride, the other two have 1.
    """

    segment: int
    rows: int
    cols: int
    column: int
    offsets: tuple[int, int, int]  # memory, canonical, packed
    strides: tuple[int, int, int]


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _collapsed(segment: Segment) -> list[tuple[int, tuple[int, int, int]]]:
    """Dimensions as (size, strides in memory, canonical, packed), neighbours merged where all three
    allow; sizes of 1 dropped."""
    shape = tuple(segment.tensor.shape)
    strides = zip(
        segment.tensor.stride(), _contiguous(segment.shape), _contiguous(shape), strict=True
    )
    merged: list[tuple[int, tuple[int, int, int]]] = []
    for size, step in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and all(a == b * size for a, b in zip(merged[-1][1], step, strict=True)):
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    return merged


def _pieces(number: int, segment: Segment) -> list[Piece]:
    """Splits a segment into the rows x cols pieces that the core takes."""
    if segment.tensor.numel() == 0:
        return []
    dimensions = _collapsed(segment)
    first = sum(a * b for a, b in zip(segment.origin, _contiguous(segment.shape), strict=True))
    cols, column = 1, 1
    if dimensions and dimensions[-1][1][1] == 1:
        cols, (column, _, _) = dimensions.pop()
    rows, row = dimensions.pop() if dimensions else (1, (0, 0, 0))
    pieces = []
    for index in itertools.product(*(range(size) for size, _ in dimensions)):
        offsets = [0, first, 0]
        for i, (_, steps) in zip(index, dimensions, strict=True):
            offsets = [offset + i * step for offset, step in zip(offsets, steps, strict=True)]
        pieces.append(Piece(number, rows, cols, column, tuple(offsets), row))  # type: ignore[arg-type]
    return pieces


def _check_tensor(segment: Segment) -> None:
    name, tensor = segment.name, segment.tensor
    if not isinstance(name, str):
        raise ParameterError(f"a tensor's name is {name!r}; give the checkpoint's name, a string.")
    if not isinstance(tensor, torch.Tensor):
        raise ParameterError(f"'{name}' is a {type(tensor).__name__}; give torch tensors.")
    if tensor.dtype not in DTYPES:
        raise ParameterError(
            f"'{name}' is {str(tensor.dtype).removeprefix('torch.')}; supported: float32, float16, "
            "bfloat16. Cast it, or exclude it with exclude=[...]."
        )
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise ParameterError(
            f"'{name}' is on the meta device or not strided ({tensor.layout}); its elements have "
            "no addresses to edit. Load its weights first, or exclude it with exclude=[...]."
        )
    _check_device(name, tensor.device)
    if tensor.is_conj() or tensor.is_neg():
        raise ParameterError(f"'{name}' is a lazily negated view; call .resolve_neg() first.")


def _check_device(name: str, device: torch.device) -> None:
    kernels = getattr(_core, "cuda", None) is not None
    if device.type == "cpu" or (device.type == "cuda" and kernels):
        return
    edits = "the CPU and CUDA devices" if kernels else "the CPU only (nvcc was not found)"
    raise ParameterError(
        f"'{name}' is on {device}; this build edits tensors on {edits}. Move the model with "
        ".to('cpu'), or install esfast where it can build its CUDA kernels."
    )


def _check_one_device(segments: Sequence[Segment]) -> None:
    first = segments[0]
    for segment in segments:
        if segment.tensor.device != first.tensor.device:
            raise ParameterError(
                f"'{segment.name}' is on {segment.tensor.device} and '{first.name}' on "
                f"{first.tensor.device}; make a table a device (their checksums add up)."
            )


def _check_box(segment: Segment) -> None:
    shape, start, extent = segment.shape, segment.origin, tuple(segment.tensor.shape)
    if len(shape) == len(start) == len(extent) and all(
        a >= 0 and a + n <= full for a, n, full in zip(start, extent, shape, strict=True)
    ):
        return
    raise ParameterError(
        f"'{segment.name}': a view of shape {extent} at {start} does not lie inside the canonical "
        f"shape {tuple(shape)}. Give `shape` and `start` as the checkpoint's tensor has them."
    )


def _check_names(segments: Sequence[Segment]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    ids: dict[int, str] = {}
    for segment in segments:
        if shapes.setdefault(segment.name, tuple(segment.shape)) != tuple(segment.shape):
            raise ParameterError(
                f"'{segment.name}' has segments of canonical shapes {shapes[segment.name]} and "
                f"{tuple(segment.shape)}; all segments of a tensor share one."
            )
        other = ids.setdefault(tensor_id(segment.name), segment.name)
        if other != segment.name:
            raise ParameterError(
                f"'{segment.name}' and '{other}' have the same 32-bit id and would share their "
                "noise; rename one of them."
            )


def _boxes_meet(a: Segment, b: Segment) -> bool:
    return all(
        i < j + m and j < i + n
        for i, n, j, m in zip(a.origin, a.tensor.shape, b.origin, b.tensor.shape, strict=True)
    )


def _check_canonical_overlap(segments: Sequence[Segment]) -> None:
    by_name: dict[str, list[Segment]] = {}
    for segment in segments:
        for other in by_name.setdefault(segment.name, []):
            if _boxes_meet(segment, other):
                raise ParameterError(
                    f"'{segment.name}' is given twice for the same canonical elements (at "
                    f"{segment.origin} and {other.origin}); give each element once."
                )
        by_name[segment.name].append(segment)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlap_inside(segments: Sequence[Segment]) -> Segment | None:
    """The first segment that shares a byte with an earlier one, or with itself, counted exactly."""
    low = min(_extent(s.tensor)[0] for s in segments)
    high = max(_extent(s.tensor)[1] for s in segments)
    taken = np.zeros(high - low, dtype=bool)
    for segment in segments:
        size = segment.tensor.element_size()
        view = np.lib.stride_tricks.as_strided(
            taken[segment.tensor.data_ptr() - low :],
            shape=(*segment.tensor.shape, size),
            strides=(*(s * size for s in segment.tensor.stride()), 1),
        )
        before = int(np.count_nonzero(taken))
        if view.any():
            return segment
        view[...] = True
        if int(np.count_nonzero(taken)) - before != view.size:
            return segment
    return None


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the strides alone prove that no two elements share memory."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return False
            reach += (size - 1) * step
    return True


def _check_memory_overlap(segments: Sequence[Segment]) -> None:
    """Refuses segments that share memory. Only groups whose address ranges meet are counted out."""
    filled = [s for s in segments if s.tensor.numel()]
    filled.sort(key=lambda s: _extent(s.tensor))
    group: list[Segment] = []
    end = 0
    for segment in [*filled, None]:
        if segment is not None and group and _extent(segment.tensor)[0] < end:
            group.append(segment)
        else:
            dense = len(group) == 1 and _dense(group[0].tensor)
            shared = None if dense or not group else _overlap_inside(group)
            if shared is not None:
                raise ParameterError(
                    f"'{shared.name}' shares memory with itself or another tensor of the table, so "
                    "an element would be edited twice. Give tied weights once, under the name that "
                    "the checkpoint stores, and expanded views as their own storage."
                )
            group, end = ([segment] if segment is not None else []), 0
        if segment is not None:
            end = max(end, _extent(segment.tensor)[1])


def _selected(name: str, include: Iterable[str] | None, exclude: Iterable[str] | None) -> bool:
    wanted = include is None or any(fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude or ())


class ParameterTable:
    """Every segment that an ES run edits, checked once.

    Errors (ParameterError, before anything is edited): a dtype other than float32, float16,
    bfloat16; a device that the build cannot edit; two names of one id; elements given twice;
    segments that share memory. The memory is kept alive; a tensor whose storage is replaced later
    (a module cast or moved) is noticed by `check_in_place`.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = tuple(segments)
        if not self.segments:
            raise ParameterError(
                "the parameter table is empty; give it at least one tensor (do include= and "
                "exclude= leave any?)."
            )
        for segment in self.segments:
            _check_tensor(segment)
            _check_box(segment)
        _check_one_device(self.segments)
        _check_names(self.segments)
        _check_canonical_overlap(self.segments)
        _check_memory_overlap(self.segments)
        self._held = HeldTensors((s.name, s.tensor) for s in self.segments)
        numbered = enumerate(self.segments)
        self.pieces = tuple(piece for i, s in numbered for piece in _pieces(i, s))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> ParameterTable:
        """Whole canonical tensors by name, in the mapping's order."""
        if not isinstance(tensors, Mapping):
            raise ParameterError(
                f"a {type(tensors).__name__} was given; give a dict of tensors by name: the noise "
                "of a tensor is a function of its name."
            )
        return cls(Segment(name, tuple(getattr(t, "shape", ())), t) for name, t in tensors.items())

    @classmethod
    def from_module(
        cls,
        module: torch.nn.Module,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> ParameterTable:
        """A module's parameters (tied ones once), filtered by shell patterns on their names.

        Names and shapes are the checkpoint's (`esfast.stored_names`): the experts that transformers
        holds in one tensor are many here. include=["*.mlp.*"] keeps only what matches;
        exclude=["*.embed_tokens.*"] drops.
        """
        stored = stored_tensors(module).items()
        table = cls.from_tensors(
            require_live({n: t for n, t in stored if _selected(n, include, exclude)})
        )
        table._held.hold_module(module)
        return table

    def __reduce__(self) -> tuple[type[ParameterTable], tuple[tuple[Segment, ...]]]:
        return type(self), (self.segments,)  # a copy's tensors lie elsewhere and are looked at anew

    def check_in_place(self) -> None:
        """StateError where a tensor has another storage, dtype, shape or layout than when it was
        taken, or the module another parameter in its place."""
        self._held.check_in_place()

    def check_memory(self) -> None:
        """StateError where a tensor's memory was given up since it was taken."""
        self._held.check_memory()

    @property
    def layout(self) -> tuple[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]:
        """Name, canonical shape, start and extent of each segment."""
        return tuple(
            (s.name, tuple(s.shape), s.origin, tuple(s.tensor.shape)) for s in self.segments
        )

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Canonical names, shapes and dtypes, sorted by name."""
        kinds = {s.name: (tuple(s.shape), str(s.tensor.dtype)) for s in self.segments}
        return tuple(
            TensorSpec(name, shape, dtype.removeprefix("torch."))
            for name, (shape, dtype) in sorted(kinds.items())
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names, each once, in order of appearance."""
        return tuple(dict.fromkeys(segment.name for segment in self.segments))

    @property
    def numel(self) -> int:
        """Elements in all segments."""
        return sum(segment.tensor.numel() for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments' elements."""
        return sum(s.tensor.numel() * s.tensor.element_size() for s in self.segments)

    @property
    def device(self) -> torch.device:
        """The device that holds the segments."""
        return self.segments[0].tensor.device

    @property
    def counted(self) -> np.ndarray:
        """A bool a piece: whether checksums count its elements."""
        return np.array([self.segments[piece.segment].counted for piece in self.pieces], dtype=bool)

    def rows(self) -> np.ndarray:
        """The core's segment table, base = live, no anchor: a structured array, a row a piece.

        StateError where a tensor's memory was given up.
        """
        self.check_memory()
        table = np.zeros(len(self.pieces), dtype=_core.segment_dtype)
        for row, piece in zip(table, self.pieces, strict=True):
            segment = self.segments[piece.segment]
            size = segment.tensor.element_size()
            row["live"] = row["base"] = segment.tensor.data_ptr() + piece.offsets[0] * size
            row["live_row_stride"], row["live_column_stride"] = piece.strides[0], piece.column
            row["rows"], row["cols"] = piece.rows, piece.cols
            row["origin"], row["canonical_row_stride"] = piece.offsets[1], piece.strides[1]
            row["tensor"] = tensor_id(segment.name)
            row["live_dtype"] = row["base_dtype"] = DTYPES[segment.tensor.dtype]
        return table

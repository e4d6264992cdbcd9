"""What may be edited: canonical tensors, and where their elements lie in memory.

A canonical tensor is named and shaped as the Hugging Face checkpoint stores it; noise is a function
of that name and the row-major index in it. A segment says that a view in memory holds a box of a
canonical tensor, so fused, sharded and strided layouts give the bits of the plain one.
The table keeps its tensors alive, copies nothing, and never looks at values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch

from esfast import _core
from esfast.errors import ParameterError
from esfast.held_tensors import HeldTensors
from esfast.journal_format import TensorSpec
from esfast.members import tensor_id
from esfast.segments import DTYPES, Segment, check_segments
from esfast.stored_names import require_live, stored_tensors


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


def _selected(name: str, include: Collection[str] | None, exclude: Collection[str] | None) -> bool:
    wanted = include is None or any(fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude or ())


def _require_patterns(what: str, given: object) -> None:
    """A text is a sequence of letters too, and its `*` alone would match every name."""
    if given is not None and (isinstance(given, str) or not isinstance(given, Collection)):
        raise ParameterError(
            f"{what}={given!r} is no list of patterns; give such as {what}=['*.mlp.*']."
        )


def _require_matches(what: str, patterns: Collection[str] | None, names: Collection[str]) -> None:
    """A mistyped pattern would leave a tensor out, or in, without a word."""
    for pattern in (patterns or ()) if names else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ParameterError(
                f"{what}={pattern!r} matches none of the {len(names)} tensors, such as "
                f"{sorted(names)[:3]}. Mend it or leave it out: patterns are of whole names, such "
                "as '*.mlp.*', and tied weights have one name."
            )


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
        check_segments(self.segments)
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
        lazy = [name for name, tensor in tensors.items() if torch.nn.parameter.is_lazy(tensor)]
        if lazy:
            raise ParameterError(
                f"'{lazy[0]}' has no shape yet (a lazy module); run the model on an input first."
            )
        return cls(Segment(name, tuple(getattr(t, "shape", ())), t) for name, t in tensors.items())

    @classmethod
    def from_module(
        cls,
        module: torch.nn.Module,
        include: Collection[str] | None = None,
        exclude: Collection[str] | None = None,
    ) -> ParameterTable:
        """A module's parameters (tied ones once), filtered by shell patterns on their names.

        Names and shapes are the checkpoint's (`esfast.stored_names`): the experts that transformers
        holds in one tensor are many here. include=["*.mlp.*"] keeps only what matches;
        exclude=["*.embed_tokens.*"] drops; a pattern that matches nothing is a ParameterError.
        `requires_grad` is not looked at: nothing here has gradients, and inference code clears it
        on every weight.
        """
        if not isinstance(module, torch.nn.Module):
            raise ParameterError(
                f"a {type(module).__name__} was given; give a torch module, or tensors by name to "
                "ParameterTable.from_tensors."
            )
        _require_patterns("include", include)
        _require_patterns("exclude", exclude)
        stored = stored_tensors(module)
        _require_matches("include", include, stored)
        _require_matches("exclude", exclude, stored)
        table = cls.from_tensors(
            require_live({n: t for n, t in stored.items() if _selected(n, include, exclude)})
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

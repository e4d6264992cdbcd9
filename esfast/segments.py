"""Segments: views in memory that hold boxes of canonical tensors, and which of them are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esfast import _core
from esfast.errors import ParameterError
from esfast.members import tensor_id, whole

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, eq=False)  # by identity: arrays have no one truth
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

    def __post_init__(self) -> None:
        for field in ("shape", "start"):
            given = getattr(self, field)
            numbers = tuple(map(whole, given)) if isinstance(given, Sequence) else (None,)
            if None in numbers:
                raise ParameterError(
                    f"'{self.name}' has {field}={given!r}; give whole numbers, one a dimension."
                )
            object.__setattr__(self, field, numbers)

    @property
    def origin(self) -> tuple[int, ...]:
        """`start`, with zeros where it was left out."""
        return self.start or (0,) * len(self.shape)


def check_segments(segments: Sequence[Segment]) -> None:
    """Refuses what a table cannot edit; see ParameterTable. Looks at no value."""
    for segment in segments:
        if not isinstance(segment, Segment):
            raise ParameterError(
                f"a table was given a {type(segment).__name__} for a segment; make "
                "esfast.Segment(name, shape, tensor), or use ParameterTable.from_tensors."
            )
        _check_name(segment.name)
        _check_tensor(segment)
        _check_box(segment)
    _check_one_device(segments)
    _check_names(segments)
    _check_canonical_overlap(segments)
    _check_memory_overlap(segments)


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise ParameterError(f"a tensor's name is {name!r}; give the checkpoint's name, a string.")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ParameterError(
            f"a tensor's name is {name!r}, which is no text that UTF-8 can hold; rename it."
        ) from None


def _check_tensor(segment: Segment) -> None:
    name, tensor = segment.name, segment.tensor
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
    if not _addressable(tensor):
        raise ParameterError(
            f"'{name}' is a {type(tensor).__name__} that wraps other tensors and has no memory of "
            "its own to edit. Give the tensor that holds its elements (of a DTensor, a Segment "
            "with .to_local()), or exclude it with exclude=[...]."
        )
    if tensor.is_conj() or tensor.is_neg():
        raise ParameterError(f"'{name}' is a lazily negated view; call .resolve_neg() first.")


def _addressable(tensor: torch.Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # inside torch.func's transforms
        return False


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
        if math.prod(shape) <= 2**64:
            return
        raise ParameterError(
            f"'{segment.name}' has the canonical shape {shape}; expected at most 2**64 elements, "
            "which is how far noise can be told apart."
        )
    raise ParameterError(
        f"'{segment.name}': a view of shape {extent} at {start} does not lie inside the canonical "
        f"shape {shape}. Give `shape` and `start` as the checkpoint's tensor has them."
    )


def _check_names(segments: Sequence[Segment]) -> None:
    firsts: dict[str, Segment] = {}
    ids: dict[int, str] = {}
    for segment in segments:
        first = firsts.setdefault(segment.name, segment)
        if first.shape != segment.shape:
            raise ParameterError(
                f"'{segment.name}' has segments of canonical shapes {first.shape} and "
                f"{segment.shape}; all segments of a tensor share one."
            )
        if first.tensor.dtype != segment.tensor.dtype:
            raise ParameterError(
                f"'{segment.name}' has segments of {first.tensor.dtype} and "
                f"{segment.tensor.dtype}; all segments of a tensor share one dtype."
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

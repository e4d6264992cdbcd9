"""The live weights of an engine's workers as one safetensors file of whole canonical tensors.

Every worker writes the boxes that it holds into the same mapped file, so that no tensor is gathered
anywhere; elements that several hold are equal. Tensors of the checkpoint that vLLM does not load
are taken from it as they are, but for copies of a tied weight. The workers have to see one disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from esfast.checkpoint import stored_slices, weight_files
from esfast.errors import DataError, EsfastError
from esfast.parameters import ParameterTable
from esfast.resources import require_disk
from esfast.segments import Segment
from esfast.whole_file import sync

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WORDS = {"F32": (torch.int32, "<i4"), "BF16": (torch.int16, "<i2"), "F16": (torch.int16, "<i2")}


@dataclass(frozen=True)
class _Place:
    """One tensor of the file: safetensors' name of its dtype, its shape, its bytes in the data."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write_canonical(
    path: Path,
    segments: Iterable[Segment],
    base: Path,
    rank: int,
    barrier: Callable[[], None],
) -> None:
    """Called by every worker of an engine with its own segments: `path` holds the whole model.

    base: the folder that was loaded; barrier: waits for all workers. The file appears whole, or not
    at all; EsfastError where it cannot be written.
    """
    held = list(segments)
    rest = _rest(base, {s.name for s in held})
    places = _places(held, rest)
    temporary, header = path.with_name(f".{path.name}.tmp"), _header(places)

    def write() -> None:
        for segment in held:
            _write(temporary, len(header), places[segment.name], segment)

    def finish() -> None:
        _write_rest(temporary, len(header), places, rest, base)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)

    leads = rank == 0
    make = lambda: _make(temporary, header, places)  # noqa: E731
    error = _together([make if leads else None, write, finish if leads else None], barrier)
    if error is not None:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise EsfastError(f"the weights could not be written to {path}: {error}") from None


def _together(
    steps: Iterable[Callable[[], None] | None], barrier: Callable[[], None]
) -> Exception | None:
    """Each step, then the barrier, which a worker whose step fails reaches too."""
    failed: Exception | None = None
    for step in steps:
        try:
            if step is not None and failed is None:
                step()
        except (OSError, EsfastError) as error:
            failed = error
        barrier()
    return failed


def _places(
    held: Iterable[Segment], rest: Mapping[str, tuple[str, tuple[int, ...], int]]
) -> dict[str, _Place]:
    kinds = {s.name: (_CODES[s.tensor.dtype], tuple(s.shape), s.tensor.itemsize) for s in held}
    places, at = {}, 0
    for name, (code, shape, size) in sorted({**rest, **kinds}.items(), key=lambda kv: -kv[1][2]):
        places[name] = _Place(code, shape, at, at + prod(shape) * size)
        at = places[name].end
    return places


def _header(places: Mapping[str, _Place]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, place in places.items():
        offsets = [place.begin, place.end]
        entries[name] = {"dtype": place.code, "shape": place.shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _make(path: Path, header: bytes, places: Mapping[str, _Place]) -> None:
    size = len(header) + max(place.end for place in places.values())
    require_disk(path.parent, size, "saving the weights")
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    path.chmod(path.parent.stat().st_mode & 0o666)


def _write(path: Path, data: int, place: _Place, segment: Segment) -> None:
    view, word = _WORDS[place.code]
    mapped = np.memmap(path, dtype=word, mode="r+", offset=data + place.begin, shape=place.shape)
    bounds = zip(segment.origin, segment.tensor.shape, strict=True)
    box = tuple(slice(start, start + n) for start, n in bounds)
    mapped[box] = segment.tensor.detach().cpu().contiguous().view(view).numpy()
    mapped.flush()


def _rest(base: Path, edited: set[str]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensors of the checkpoint that are not edited, but for copies of those that are: name ->
    safetensors' dtype, shape, bytes an element."""
    found = {}
    with _opened(base) as tensors:
        for name, file in tensors.items():
            if name not in edited and not _is_copy(name, edited, tensors):
                code, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
                found[name] = (code, tuple(shape), file.get_tensor(name).itemsize)
    return found


def _is_copy(name: str, edited: set[str], tensors: Mapping[str, Any]) -> bool:
    shape = tensors[name].get_slice(name).get_shape()
    like = [n for n in edited & tensors.keys() if tensors[n].get_slice(n).get_shape() == shape]
    own = tensors[name].get_tensor(name) if like else None
    return any(torch.equal(own, tensors[n].get_tensor(n)) for n in like if own is not None)


def _write_rest(
    path: Path, data: int, places: Mapping[str, _Place], rest: Iterable[str], base: Path
) -> None:
    with _opened(base) as tensors, path.open("r+b") as file:
        for name in rest:
            file.seek(data + places[name].begin)
            tensor = tensors[name].get_tensor(name).contiguous().flatten()
            file.write(tensor.view(torch.uint8).numpy().tobytes())


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Any]]:
    """Name -> the open file of the checkpoint that holds it."""
    files = [safe_open(path, framework="pt") for path in weight_files(folder)]
    yield {name: file for file in files for name in list(file.keys())}  # type: ignore[no-untyped-call]


def read_canonical(path: Path, table: ParameterTable) -> list[torch.Tensor]:
    """A tensor a segment of `table`, from a file of `write_canonical` or a Hugging Face folder.

    Raises DataError for what is no safetensors file, lacks a tensor or has one of another shape or
    dtype; nothing is changed.
    """
    if not path.exists():
        raise DataError(f"there are no weights at {path}; name a file that was saved, or a folder.")
    by_segment = {id(s): stored for s, stored in stored_slices(path, table.segments)}
    found = [by_segment[id(segment)] for segment in table.segments]
    for segment, tensor in zip(table.segments, found, strict=True):
        if tensor.dtype != segment.tensor.dtype:
            raise DataError(
                f"'{segment.name}' in {path} is {_short(tensor.dtype)}, and the engine's "
                f"{_short(segment.tensor.dtype)}; load weights of the dtype that the engine has."
            )
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Snapshots: the weights of a run at one generation, which make its resume shorter.

    snapshots/generation-000120.safetensors     what updates start from, a tensor a segment

A snapshot is never required: one that is missing, damaged or not of this journal is passed over,
and resume replays from the base. It belongs to a journal by the check value of its last record, is
compared with its own checksum before a weight is touched, and appears whole (temporary file, fsync,
rename). Only the newest is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from esfast.errors import EsfastError
from esfast.journal import Journal
from esfast.parameters import ParameterTable
from esfast.resources import require_disk
from esfast.weights import Weights
from esfast.whole_file import sync

SNAPSHOTS = "snapshots"
_PATTERN = "generation-*.safetensors"


def save_snapshot(folder: Path, weights: Weights, generation: int, chain: str) -> Path:
    """Writes `weights` as they are after `generation` generations; removes older ones.

    chain: the journal's check value there. Raises EsfastError with the folder as it was.
    """
    state = weights.state()
    needed = sum(tensor.nbytes for tensor in state)
    require_disk(folder, needed, "a snapshot")
    path = folder / f"generation-{generation:06d}.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {str(number): tensor.contiguous() for number, tensor in enumerate(state)}
    told = {
        "generation": str(generation),
        "chain": chain,
        "checksum": _checksum(weights, state),
    }
    try:
        folder.mkdir(exist_ok=True)
        save_file(tensors, temporary, told)
        temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors makes it the owner's alone
        sync(temporary)
        temporary.replace(path)
        sync(folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise EsfastError(f"no snapshot could be written to {folder}: {error}.") from None
    for old in [*folder.glob(_PATTERN), *folder.glob(f".{_PATTERN}.tmp")]:  # a killed run's, too
        if old != path:
            old.unlink(missing_ok=True)
    return path


def load_snapshot(
    folder: Path, weights: Weights, journal: Journal, note: Callable[[str], None] = print
) -> int:
    """Brings `weights` to the newest usable snapshot; returns its generation, 0 where none is.

    note: told, in words, why one was passed over.
    """
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            generation, state = _read(path, weights, journal)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            note(f"snapshot {path.name} is passed over: {error}")
            continue
        weights.load_state(state)
        return generation
    return 0


def _read(path: Path, weights: Weights, journal: Journal) -> tuple[int, list[torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        told = file.metadata() or {}
        generation = int(told["generation"])
        if not 0 <= generation <= len(journal.generations):
            raise ValueError(f"the journal does not reach its generation {generation}")
        if told["chain"] != journal.chain_at(generation):
            raise ValueError("it belongs to another journal")
        own = weights.state()
        state = [file.get_tensor(str(number)) for number in range(len(own))]
    if [(t.shape, t.dtype) for t in state] != [(t.shape, t.dtype) for t in own]:
        raise ValueError("its tensors are not this model's, or of another memory mode")
    if _checksum(weights, state) != told["checksum"]:
        raise ValueError("its checksum does not fit its weights; it is damaged")
    return generation, state


def _checksum(weights: Weights, state: list[torch.Tensor]) -> str:
    segments = zip(weights.table.segments, state, strict=True)
    table = ParameterTable(replace(segment, tensor=tensor) for segment, tensor in segments)
    return Weights(table, threads=weights.threads).checksum()

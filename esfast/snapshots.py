"""Snapshots: the weights of a run at one generation, which make its resume shorter.

    snapshots/generation-000120.safetensors     what updates start from, a tensor a segment
    snapshots/generation-000120.safetensors.1   the second shard's, where the weights are sharded

A snapshot is never required: one that is missing, damaged or not of this journal is passed over,
and resume replays from the base. It belongs to a journal by the check value of its last record, is
compared with its own checksum before a weight is touched, and appears whole. Only the newest is
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from esfast import state_file
from esfast.journal import Journal
from esfast.live_weights import LiveWeights

SNAPSHOTS = "snapshots"
_PATTERN = "generation-*.safetensors"


def save_snapshot(folder: Path, weights: LiveWeights, generation: int, chain: str) -> Path:
    """Writes `weights` as they are after `generation` generations; removes older ones.

    chain: the journal's check value there. Raises EsfastError with the folder as it was.
    """
    path = folder / f"generation-{generation:06d}.safetensors"
    weights.write_state(path, {"generation": str(generation), "chain": chain})
    for old in [*folder.glob(f"{_PATTERN}*"), *folder.glob(f".{_PATTERN}*.tmp")]:  # killed runs'
        if not old.name.startswith(path.name):
            old.unlink(missing_ok=True)
    return path


def load_snapshot(
    folder: Path, weights: LiveWeights, journal: Journal, note: Callable[[str], None] = print
) -> int:
    """Brings `weights` to the newest usable snapshot; returns its generation, 0 where none is.

    note: told, in words, why one was passed over.
    """
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            generation = _require_own(path, journal)
            weights.read_state(path)
        except state_file.UNREADABLE as error:
            note(f"snapshot {path.name} is passed over: {error}")
            continue
        return generation
    return 0


def _require_own(path: Path, journal: Journal) -> int:
    """The generation of a snapshot of this journal. Raises one of UNREADABLE for another."""
    told = state_file.told(path)
    generation = int(told["generation"])
    if not 0 <= generation <= len(journal.generations):
        raise ValueError(f"the journal does not reach its generation {generation}")
    if told["chain"] != journal.chain_at(generation):
        raise ValueError("it belongs to another journal")
    return generation

"""What a training loop asks of the workers that share a run with it; `Alone` is a run without any.

A generation: members are dealt, one at a time, to whoever is free; what they earned is gathered;
the leader writes the generation down and shares the record; all apply it. The messages' size
depends on the population alone, not on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class Workers(Protocol):
    """The workers of one run, as one of them sees them.

    rank: this one's number, from 0; size: how many there are; bytes_sent: payload that this one
    has sent since the start. Errors (StateError) where another worker is lost.
    """

    rank: int
    size: int
    bytes_sent: int

    def deal(self, generation: int, count: int) -> Iterator[int]:
        """The members of a generation that fall to this worker: each of 0 .. count - 1 to one."""
        ...

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """float64 [population, columns] with everybody's rows, from one with this worker's own and
        zeros elsewhere; bits are kept."""
        ...

    def share(self, data: bytes | None) -> bytes:
        """The leader's bytes (rank 0's), at every worker; the others give None."""
        ...

    def compare(self, checksum: str, generation: int) -> None:
        """StateError, naming the workers, where their weights' checksums are not all the same."""
        ...

    def close(self) -> None:
        """The run is over; twice does no harm."""
        ...


class Alone:
    """One process, no messages."""

    rank = 0
    size = 1
    bytes_sent = 0

    def deal(self, generation: int, count: int) -> Iterator[int]:
        """All of them, in order."""
        return iter(range(count))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows as they are."""
        return rows

    def share(self, data: bytes | None) -> bytes:
        """The data as it is."""
        assert data is not None
        return data

    def compare(self, checksum: str, generation: int) -> None:
        """Nothing to compare with."""

    def close(self) -> None:
        """Nothing to close."""

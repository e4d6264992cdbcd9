"""Draws for making problems and dealing batches: the same on every machine and Python version.

Draw k of a stream named by `key` is SHA-256(key / k) read as an integer. Python's `random` promises
its `random()` for good, but not what `shuffle` or `sample` make of it; a resumed run has to see the
prompts that the first one saw. Weight noise is another matter and does not come from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

SPLIT_SLOTS = 1 << 16


def digest_int(*key: object) -> int:
    """A 64-bit unsigned integer from the words of `key`."""
    text = "\x1f".join(str(word) for word in key)
    return _first_word(hashlib.sha256(text.encode()).digest())


def _first_word(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def is_held_out(text: str, share: float) -> bool:
    """Whether the problem written as `text` belongs to the held-out split of size `share` (0 to 1).

    A function of the text alone, so that a problem made twice, from any seed, lands on one side.
    """
    return digest_int("split", text) % SPLIT_SLOTS < share * SPLIT_SLOTS


def held_out_keys(keys: Iterable[str], share: float) -> set[str]:
    """The `share` (0 to 1) of distinct `keys` to hold out; one at least, where there are two."""
    ordered = sorted(set(keys), key=lambda key: digest_int("split", key))
    return set(ordered[: max(1, round(share * len(ordered)))] if len(ordered) > 1 else [])


class Draws:
    """A stream of random choices named by its key."""

    def __init__(self, *key: object) -> None:
        """Start the stream of `key`."""
        self._begun = hashlib.sha256("".join(f"{word}\x1f" for word in key).encode())
        self._drawn = 0

    def below(self, bound: int) -> int:
        """An integer in [0, bound); the bias of the modulo is under bound / 2^64."""
        self._drawn += 1
        digest = self._begun.copy()  # half the time of digest_int(*key, k)
        digest.update(b"%d" % self._drawn)
        return _first_word(digest.digest()) % bound

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[Item]) -> Item:
        """One of `items`."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """A new list of `items` in a random order (Fisher and Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

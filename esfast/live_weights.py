"""What a run asks of the weights that it moves, wherever they lie.

`Weights` is this interface in the process that holds the tensors. An engine whose weights live in
processes of its own offers the same over messages that carry scalars alone; its checksum is the sum
modulo 2^64 of its shards'. All of them give the same bits for the same calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esfast.journal_format import TensorSpec
from esfast.members import Member
from esfast.strategy import AnchoredDecay
from esfast.update import Update, UpdateReport


@dataclass(frozen=True)
class MemoryUse:
    """Bytes: the live weights; what this memory mode holds now beside them; the anchor's copy."""

    weights_bytes: int
    extra_bytes: int
    anchor_bytes: int


class LiveWeights(ABC):
    """The weights of a run; see `esfast.Weights` for what each call promises.

    memory: "lean", "shadow" or "master".
    """

    memory: str

    @abstractmethod
    def specs(self) -> tuple[TensorSpec, ...]:
        """Canonical names, shapes and dtypes, sorted by name."""

    @abstractmethod
    def perturb(self, member: Member, sigma: float) -> None:
        """Applies a member; an applied one is restored first."""

    @abstractmethod
    def restore(self) -> None:
        """Puts back the bits from before `perturb`."""

    def update(
        self,
        members: Sequence[Member],
        coefficients: Sequence[float] | np.ndarray,
        *,
        decay: AnchoredDecay | None = None,
        alpha: float | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> UpdateReport:
        """w <- round(decay(w + sum_n coefficient_n * sign_n * eps_n)), each weight read once.

        coefficients: one a member, with alpha / N in them (Strategy.coefficients). decay: needs the
        anchor that the weights were made with, and alpha. rounding: "stochastic" (keyed by `seed`,
        the generation's: with the same one every time the same weights are rounded up) or
        "nearest"; fp32 bases are not rounded. Members of one update share one kind of noise;
        neighbours with one seed are drawn once. No members: decay and rounding alone. An applied
        member is restored first.
        """
        return self.apply(Update(members, coefficients, decay, alpha, rounding, seed))

    @abstractmethod
    def apply(self, update: Update) -> UpdateReport:
        """`update` with its arguments as one value."""

    @abstractmethod
    def checksum(self) -> str:
        """16 hex digits of the live bits."""

    @abstractmethod
    def anchor_checksum(self) -> str | None:
        """The same of the anchor's elements; None without an anchor."""

    @abstractmethod
    def require_room(self, sigma: float, noise: str = "gaussian") -> int:
        """Bytes that members of this sigma take beside the weights. EsfastError where the memory
        that is left does not hold them."""

    @abstractmethod
    def memory_use(self) -> MemoryUse:
        """What is held now."""

    @abstractmethod
    def write_state(self, path: Path, told: Mapping[str, str]) -> None:
        """What updates start from, in a safetensors file (or one a shard) with `told` beside."""

    @abstractmethod
    def read_state(self, path: Path) -> None:
        """Takes what `write_state` wrote. ValueError for what is damaged or another model's."""

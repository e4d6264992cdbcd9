"""What a run asks of the weights that it moves, wherever they lie.

`Weights` is this interface in the process that holds the tensors. An engine whose weights live in
processes of its own offers the same over messages that carry scalars alone; its checksum is the sum
modulo 2^64 of its shards'. All of them give the same bits for the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from esfast.anchor import Anchor
from esfast.journal_format import TensorSpec
from esfast.members import Member
from esfast.parameters import ParameterTable
from esfast.strategy import AnchoredDecay
from esfast.weights import MemoryUse, UpdateReport, Weights


@runtime_checkable
class LiveWeights(Protocol):
    """The weights of a run; see `esfast.Weights` for what each call promises."""

    @property
    def memory(self) -> str:
        """ "lean", "shadow" or "master"."""
        ...

    def specs(self) -> tuple[TensorSpec, ...]:
        """Canonical names, shapes and dtypes, sorted by name."""
        ...

    def perturb(self, member: Member, sigma: float) -> None:
        """Applies a member; an applied one is restored first."""
        ...

    def restore(self) -> None:
        """Puts back the bits from before `perturb`."""
        ...

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
        """One pass for the whole population."""
        ...

    def checksum(self) -> str:
        """16 hex digits of the live bits."""
        ...

    def anchor_checksum(self) -> str | None:
        """The same of the anchor's elements; None without an anchor."""
        ...

    def require_room(self, sigma: float, noise: str = "gaussian") -> int:
        """Bytes that members of this sigma take beside the weights. EsfastError where the memory
        that is left does not hold them."""
        ...

    def memory_use(self) -> MemoryUse:
        """What is held now."""
        ...

    def write_state(self, path: Path, told: Mapping[str, str]) -> None:
        """What updates start from, in a safetensors file (or one a shard) with `told` beside."""
        ...

    def read_state(self, path: Path) -> None:
        """Takes what `write_state` wrote. ValueError for what is damaged or another model's."""
        ...


def weights_of(
    table: ParameterTable,
    memory: str = "lean",
    anchor: Path | bool = False,
    threads: int | None = None,
) -> Weights:
    """`Weights` over a table of this process.

    anchor: the safetensors file or Hugging Face folder that decay pulls to (mapped, no resident
    memory), True for a copy of the weights as they are now, False for none.
    """
    if isinstance(anchor, bool):
        made = Anchor.in_memory(table) if anchor else None
    else:
        made = Anchor.from_safetensors(anchor, table)
    return Weights(table, memory, made, threads)

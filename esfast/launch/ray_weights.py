"""The weights that the actors of a run hold, as one: every call goes to all engines, as scalars.

`LiveWeights` over messages. All engines hold the same bits; `checksum` compares them and names the
engine whose bits are others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esfast import state_file
from esfast.errors import EsfastError, StateError
from esfast.journal_format import TensorSpec
from esfast.live_weights import LiveWeights, MemoryUse
from esfast.members import Member
from esfast.update import Update, UpdateReport

if TYPE_CHECKING:
    from esfast.launch.ray import RayFleet


class RayWeights(LiveWeights):
    """See `esfast.live_weights.LiveWeights`."""

    def __init__(self, fleet: RayFleet, memory: str, tensors: Sequence[Mapping[str, Any]]) -> None:
        self.memory = memory
        self._fleet = fleet
        self._specs = tuple(
            TensorSpec(tensor["name"], tuple(tensor["shape"]), tensor["dtype"])
            for tensor in tensors
        )

    def specs(self) -> tuple[TensorSpec, ...]:
        """Canonical names, shapes and dtypes, sorted by name."""
        return self._specs

    def perturb(self, member: Member, sigma: float) -> None:
        """Applies a member at every engine. One that is started again meanwhile is without it:
        `RayFleet.members` is how a generation is evaluated."""
        self._fleet.ask_all("perturb", member=astuple(member), sigma=sigma)

    def restore(self) -> None:
        """At every engine."""
        self._fleet.ask_all("restore")

    def apply(self, update: Update) -> UpdateReport:
        """The same scalars to every engine. One that dies meanwhile has the update from the
        journal, which is written ahead."""
        fleet = self._fleet
        told = fleet.ask_all("update", generation=fleet.done, update=update.record())
        fleet.done += 1
        for seat, reply in told:
            seat.generation = reply["generation"]
        return UpdateReport(max(reply["saturated"] for _, reply in told))

    def checksum(self) -> str:
        """The engines' own, which are the same. StateError, naming the engines, where not."""
        told = [(seat.number, reply["checksum"]) for seat, reply in self._fleet.ask_all("checksum")]
        usual, _ = Counter(checksum for _, checksum in told).most_common(1)[0]
        apart = [number for number, checksum in told if checksum != usual]
        if apart:
            rest = [number for number, checksum in told if checksum == usual]
            raise StateError(
                f"after {self._fleet.done} generations engine {apart[0]} has weights "
                f"{dict(told)[apart[0]]}, and engine {rest[0]} has {usual} ({len(apart)} of "
                f"{len(told)} differ): another version of esfast, or a damaged memory. The run "
                "stops; its journal is whole."
            )
        return usual

    def anchor_checksum(self) -> str | None:
        """One engine's: `join` compares every engine's with the journal."""
        return self._fleet.ask_one("anchor_checksum")["checksum"]

    def require_room(self, sigma: float, noise: str = "gaussian") -> int:
        """Of the engine that takes most. EsfastError of one that has too little."""
        told = self._fleet.ask_all("room", sigma=sigma, noise=noise)
        return max(reply["bytes"] for _, reply in told)

    def memory_use(self) -> MemoryUse:
        """One engine's."""
        return MemoryUse(**self._fleet.ask_one("memory_use"))

    def write_state(self, path: Path, told: Mapping[str, str]) -> None:
        """One engine writes it. EsfastError where that is on another machine's disk."""
        self._fleet.ask_one("write_state", path=str(path.absolute()), told=dict(told))
        if not path.exists():
            raise EsfastError(f"{path} was written to a disk that the driver does not see.")

    def read_state(self, path: Path) -> None:
        """Every engine reads it, or none stays as it is: where one cannot, those that have are
        started again. ValueError then."""
        generation = int(state_file.told(path)["generation"])
        told = self._fleet.ask_all("read_state", path=str(path.absolute()), generation=generation)
        refused = [reply["refused"] for _, reply in told if "refused" in reply]
        if refused:
            for seat, reply in told:
                if "refused" not in reply:
                    self._fleet.restart(seat)
            raise ValueError(refused[0])
        self._fleet.done = generation
        for seat, _ in told:
            seat.generation = generation

"""A run's weights that lie in vLLM's workers, over calls that carry names, numbers and texts.

`Call` reaches every worker of one engine and returns what each answered. Weights, noise and records
never leave the workers; the checksums of their shards add up to the one that the unsharded model
has in any engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from esfast.errors import EsfastError
from esfast.journal_format import TensorSpec
from esfast.live_weights import LiveWeights, MemoryUse
from esfast.members import Member
from esfast.resources import readable
from esfast.update import Update, UpdateReport

Call: TypeAlias = Callable[..., list[Any]]


class RemoteWeights(LiveWeights):
    """`LiveWeights` over an engine's workers; made by `VLLMEngine.live_weights`.

    call(name, *arguments): runs a method of every worker's `Shard`.
    """

    def __init__(self, call: Call, memory: str, anchor: Path | bool, threads: int | None) -> None:
        self._call = call
        self.memory = memory
        where = anchor if isinstance(anchor, bool) else str(anchor.absolute())
        opened = call("open", memory, where, threads)
        specs = {spec["name"]: spec for shard in opened for spec in shard["specs"]}
        self._specs = tuple(
            TensorSpec(name, tuple(spec["shape"]), spec["dtype"])
            for name, spec in sorted(specs.items())
        )

    def specs(self) -> tuple[TensorSpec, ...]:
        """Canonical names, shapes and dtypes, sorted by name."""
        return self._specs

    def perturb(self, member: Member, sigma: float) -> None:
        """One call: restores the applied member, applies this one, makes again what is derived."""
        self._call("perturb", asdict(member), sigma)

    def restore(self) -> None:
        """Puts the bits back; what is derived is made again before anything is generated."""
        self._call("restore")

    def apply(self, update: Update) -> UpdateReport:
        """The same update in every worker; the weights that saturated are counted a shard."""
        saturated = self._call("update", update.record())
        return UpdateReport(-1 if -1 in saturated else sum(saturated))

    def checksum(self) -> str:
        """The sum of the shards', 16 hex digits."""
        return f"{sum(self._call('checksum')) % 2**64:016x}"

    def anchor_checksum(self) -> str | None:
        """The same of the anchor; None without one."""
        shards = self._call("anchor_checksum")
        return None if None in shards else f"{sum(shards) % 2**64:016x}"

    def require_room(self, sigma: float, noise: str = "gaussian") -> int:
        """Bytes of all workers together; EsfastError where one of them has fewer free than its own.

        vLLM takes its share of the device before: what counts is what it leaves.
        """
        rooms = self._call("room", sigma, noise)
        for rank, (needed, free) in enumerate(rooms):
            if self.memory == "lean" and free is not None and free < needed:
                raise EsfastError(
                    f"restoring members exactly needs about {readable(needed)} beside the weights "
                    f"of worker {rank}, and vLLM has left {readable(free)}. Lower "
                    "--gpu-memory-utilization, or sigma."
                )
        return sum(needed for needed, _ in rooms)

    def memory_use(self) -> MemoryUse:
        """Of all workers together."""
        return MemoryUse(*(sum(column) for column in zip(*self._call("memory_use"), strict=True)))

    def write_state(self, path: Path, told: Mapping[str, str]) -> None:
        """A file a worker: `path`, and `path` with the worker's number behind."""
        path.parent.mkdir(exist_ok=True)
        self._call("write_state", str(path.absolute()), dict(told))

    def read_state(self, path: Path) -> None:
        """Where every worker can take its file, all do; ValueError else, with no weight touched."""
        refused = [why for why in self._call("check_state", str(path.absolute())) if why]
        if refused:
            raise ValueError(refused[0])
        self._call("read_state", str(path.absolute()))

    def save(self, path: Path) -> None:
        """The live weights in one safetensors file of canonical tensors."""
        self._call("save", str(path.absolute()))

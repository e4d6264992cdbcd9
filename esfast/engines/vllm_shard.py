"""The part of a run's weights that one vLLM worker holds, edited in that worker's process.

The driver calls these methods by name, with numbers and texts (`esfast.engines.vllm_remote`). After
an edit, what vLLM derived from the weights is made again before the call returns; a restore alone
leaves that to `derive`, since an update mostly follows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esfast import measure, state_file
from esfast.anchor import Anchor
from esfast.device_table import free_bytes
from esfast.engines.vllm_derived import Kept, kept
from esfast.engines.vllm_files import read_canonical, write_canonical
from esfast.engines.vllm_reach import Groups
from esfast.errors import ConfigError, StateError
from esfast.members import Member
from esfast.parameters import ParameterTable
from esfast.update import Update
from esfast.weights import Weights, weights_of

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()  # before vLLM binds


@contextmanager
def all_cores() -> Iterator[None]:
    """The calling thread on every core that the process was started with: esfast's threads inherit
    the binding of the thread that starts them, and vLLM binds its workers' main thread to one."""
    if not CORES:
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


class Shard:
    """A worker's segments and the `Weights` over them."""

    def __init__(self, worker: Any) -> None:
        parallel = worker.vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ConfigError(
                f"pipeline_parallel_size is {parallel.pipeline_parallel_size}; esfast edits models "
                "that are sharded by tensor parallelism. Use tensor_parallel_size alone."
            )
        self.kept: Kept = kept(worker.model_runner.get_model())
        self.rank, self.size = int(worker.rank), int(parallel.world_size)
        self.table = ParameterTable(self.kept.segments)
        self.groups = Groups(self.kept)
        self.stale = False
        self._weights: Weights | None = None

    @property
    def weights(self) -> Weights:
        """StateError before `open`."""
        if self._weights is None:
            raise StateError("the weights of this worker are not opened yet; call live_weights.")
        return self._weights

    def open(self, memory: str, anchor: str | bool, threads: int | None) -> dict[str, Any]:
        """Makes `Weights` anew, restoring what the old ones had applied; says what they are."""
        if self._weights is not None:
            self.restore()
            self._weights = None
        where = anchor if isinstance(anchor, bool) else Path(anchor)
        share = threads or max(1, len(CORES or {0}) // self.size)
        with all_cores():
            self._weights = weights_of(self.table, memory, where, share)
        specs = [asdict(spec) for spec in self.table.specs]
        return {"specs": specs, "derived": self.kept.derived.modules}

    def anchor(self) -> None:
        """Makes the weights as they are now, with the member that is applied, what decay pulls to;
        restores."""
        with all_cores():
            anchor = Anchor.in_memory(self.table)
            self.restore()
            self._weights = Weights(self.table, self.weights.memory, anchor, self.weights.threads)

    def perturb(self, member: Mapping[str, Any], sigma: float) -> None:
        """Restores the member that is applied and applies this one."""
        with self._edit():
            self.weights.perturb(Member(**member), sigma)

    def restore(self) -> None:
        """Puts the bits back; `derive` has to follow before anything is generated."""
        if self.weights.perturbed:
            self.stale = True  # also where it restores and then tells of somebody else's edit
            with all_cores():
                self.weights.restore()

    def derive(self) -> None:
        """Makes again what vLLM derived from the weights, where they changed since."""
        if self.stale:
            self.kept.derived.redo()
            self.stale = False

    def update(self, record: Mapping[str, Any]) -> int:
        """`Weights.apply` of an update's record; returns how many weights saturated here."""
        with self._edit():
            return self.weights.apply(Update.of(record)).saturated

    @contextmanager
    def _edit(self) -> Iterator[None]:
        """Around an edit: also where it fails, what is derived is the weights' again."""
        self.stale = True
        try:
            with all_cores():
                yield
        finally:
            self.derive()

    def checksum(self) -> int:
        """Of this shard's counted elements; the shards' add up modulo 2^64."""
        with all_cores():
            return int(self.weights.checksum(), 16)

    def anchor_checksum(self) -> int | None:
        """The same of the anchor."""
        with all_cores():
            text = self.weights.anchor_checksum()
        return None if text is None else int(text, 16)

    def room(self, sigma: float, noise: str) -> list[int | None]:
        """Bytes that members take here, and that are free; restores first."""
        self.restore()
        with all_cores():
            needed = self.weights.expected_bytes(sigma, noise)
        return [needed, free_bytes(self.table.device)]

    def memory_use(self) -> list[int]:
        """Bytes of the weights, of what the memory mode holds, and of the anchor."""
        use = self.weights.memory_use()
        return [use.weights_bytes, use.extra_bytes, use.anchor_bytes]

    def reset_peak(self) -> bool:
        """`esfast.measure.reset_peak`, in this worker's process."""
        return measure.reset_peak()

    def peak_bytes(self) -> list[int]:
        """This worker's process, and its peak since then."""
        return [os.getpid(), measure.peak_bytes()]

    def write_state(self, path: str, told: Mapping[str, str]) -> None:
        """`Weights.write_state`, in a file for each shard but the first beside it."""
        self.restore()
        self.weights.write_state(self._own(path), {**told, "shards": str(self.size)})

    def check_state(self, path: str) -> str | None:
        """Why a state cannot be taken here, or None; restores, and touches no weight else."""
        self.restore()  # here, not inside `Weights`: what is derived has to follow
        own = self._own(path)
        try:
            shards = state_file.told(own).get("shards", "1")
            if shards != str(self.size):
                return f"it was written by {shards} workers, and there are {self.size}"
            self.weights.check_state(own)
        except state_file.UNREADABLE as error:
            return str(error)
        return None

    def read_state(self, path: str) -> None:
        """Takes a state that `check_state` of every shard has passed."""
        with self._edit():
            self.weights.read_state(self._own(path))

    def _own(self, path: str) -> Path:
        return Path(path + (f".{self.rank}" if self.rank else ""))

    def save(self, path: str) -> None:
        """`write`, without a member that is applied."""
        self.restore()
        self.write(path)

    def write(self, path: str) -> None:
        """The weights as they are now in one safetensors file of canonical tensors, which appears
        whole."""
        wait = _barrier if self.size > 1 else lambda: None
        write_canonical(Path(path), self.kept.segments, self.kept.folder, self.rank, wait)

    def load(self, path: str) -> None:
        """Takes the weights of such a file, or of a Hugging Face folder, to edit from there."""
        state = read_canonical(Path(path), self.table)
        with self._edit():
            self.weights.restore()
            for segment, tensor in zip(self.table.segments, state, strict=True):
                segment.tensor.copy_(tensor)
            self.weights.rebase()

    def group_names(self, all_of_them: bool) -> list[str]:
        """What there is to try; see `esfast.engines.vllm_reach`."""
        return self.groups.names(all_of_them)

    def nudge(self, name: str) -> None:
        """Changes one group's weights by about their own size, until `unnudge`."""
        self.derive()
        self.kept.derived.redo(self.groups.nudge(name))

    def unnudge(self, name: str) -> None:
        """Puts the bits back."""
        self.kept.derived.redo(self.groups.unnudge(name))


def _barrier() -> None:
    from vllm.distributed import parallel_state

    parallel_state.get_world_group().barrier()

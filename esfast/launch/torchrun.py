"""Workers started by torchrun, one process each:

    torchrun --nproc-per-node N --no-python esfast train ...

Members are dealt by a counter in torchrun's store, so that a slow worker takes fewer. Rewards are
summed over gloo as integers (each row is one worker's bits plus zeros), so that no bit is lost; the
messages are scalars, whatever the device of the weights. A worker that dies ends the run: its peers
see the closed connection, or the SIGTERM that torchrun sends them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from esfast.errors import EsfastError, StateError
from esfast.launch.workers import Alone, Workers

LONGEST_WAIT = timedelta(hours=2)  # for a worker whose member takes long; a dead one shows at once


def under_torchrun() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def join_workers() -> Workers:
    """The workers of this process's run; `Alone` where torchrun did not start it."""
    return TorchWorkers() if under_torchrun() else Alone()


class TorchWorkers:
    """The processes of one torchrun; see `Workers`. Raises StateError where they do not meet."""

    def __init__(self) -> None:
        # Torch waits for the others where no handler of Python's runs: until they are there,
        # SIGTERM ends the process.
        self._before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            self._store, self.rank, self.size = next(rendezvous("env://"))
            self._store.set_timeout(LONGEST_WAIT)
            dist.init_process_group(
                "gloo",
                store=PrefixStore("esfast", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=LONGEST_WAIT,
            )
        except (RuntimeError, ValueError) as error:
            signal.signal(signal.SIGTERM, self._before)
            raise EsfastError(
                f"the workers that torchrun started do not meet: {_first_line(error)}. Check "
                "--nnodes, --rdzv-endpoint and the network between the nodes."
            ) from None
        self.bytes_sent = 0
        signal.signal(signal.SIGTERM, self._stopped)

    def _stopped(self, _: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what follows must not be cut short
        raise self._lost("torchrun stopped this worker (SIGTERM)")

    def _lost(self, what: str) -> StateError:
        return StateError(
            f"worker {self.rank} of {self.size} ends: {what}. Another worker died, or the launcher "
            "was stopped; look for its message above. What was recorded is whole: go on with "
            "esfast train --resume RUN, with any number of workers."
        )

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except RuntimeError as error:
            raise self._lost(f"no answer from the others ({_first_line(error)})") from None

    def deal(self, generation: int, count: int) -> Iterator[int]:
        """The next member that nobody has taken, until there are none."""
        key = f"dealt/{generation}"
        while True:
            number = self._call(self._store.add, key, 1) - 1
            self.bytes_sent += len(key) + 8
            if number >= count:
                return
            yield number

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Sums the rows' bits as 64-bit integers."""
        bits = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float64).view(np.int64).copy())
        self._call(dist.all_reduce, bits)
        self.bytes_sent += bits.nbytes
        return bits.numpy().view(np.float64).reshape(rows.shape)

    def share(self, data: bytes | None) -> bytes:
        """Two broadcasts: the length, then the bytes."""
        size = torch.tensor([0 if data is None else len(data)], dtype=torch.int64)
        self._call(dist.broadcast, size, src=0)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._call(dist.broadcast, buffer, src=0)
        self.bytes_sent += (8 + buffer.nbytes) * (self.rank == 0)
        return buffer.numpy().tobytes()

    def compare(self, checksum: str, generation: int) -> None:
        """All-gathers 8 bytes a worker."""
        own = torch.from_numpy(np.array([int(checksum, 16)], dtype=np.uint64).view(np.int64))
        all_of_them = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._call(dist.all_gather, all_of_them, own)
        self.bytes_sent += own.nbytes
        seen = [f"{int(one) % 2**64:016x}" for one in all_of_them]
        apart = [rank for rank, one in enumerate(seen) if one != seen[0]]
        if apart:
            raise StateError(
                f"after {generation} generations worker {apart[0]} has weights {seen[apart[0]]}, "
                f"and worker 0 has {seen[0]} ({len(apart)} of {self.size} differ): another version "
                "of esfast, or a damaged memory. The run stops; its journal is worker 0's."
            )

    def close(self) -> None:
        """Leaves the group and gives SIGTERM back."""
        signal.signal(signal.SIGTERM, self._before)
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    """Without the source lines and advice that torch and gloo put around what happened."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.rpartition("] ")[2].split(". ")[0][:200].rstrip(".")

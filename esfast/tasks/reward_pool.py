"""Somebody's scoring function in processes of its own: several completions at a time, each with a
time limit and a memory limit.

A function that raises, hangs, eats memory, crashes or answers what is no answer costs the
completion that it was given, and nothing else: its process is ended with all that it started, and
the next completion finds a new one. Which process scores what depends on who is idle; a score
belongs to its completion by the number of its request, so the order of completion does not show.

The memory limit is RLIMIT_DATA (man 2 setrlimit): private writable memory of each process, on
Linux. Shared mappings, and limits elsewhere, are not promised; nor is this a sandbox: the function
may do what its user may.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from esfast.bounds import require_whole
from esfast.errors import ConfigError
from esfast.resources import available_memory, readable
from esfast.strategy import real
from esfast.tasks.base import Example, Pending, PoolTask, Score

GIB = 1 << 30
START_SECONDS = 120.0
"""How long importing the user's module may take; a heavy library needs tens of seconds."""
LAST_SECONDS = 1.0
"""Between a process's last reply and its end; one that closed its streams need not end."""
LONGEST = 1e6  # seconds: 11 days; waits and timers end at 9e9
MOST_GIB = 1 << 20
LONGEST_REPLY = 1 << 16  # bytes; a reply has a number and a feedback, and is cut at 500 characters

_SCRIPT = Path(__file__).with_name("reward_process.py")


class RewardFailure(Exception):
    """One completion could not be scored; the message says why."""


@dataclass(frozen=True)
class Limits:
    """timeout: seconds a completion; workers: processes side by side; memory: bytes of each, None
    for a share of what is available now, 0 for no limit. Raises ConfigError."""

    timeout: float = 10.0
    workers: int = 1
    memory: int | None = None

    def __post_init__(self) -> None:
        timeout = real(self.timeout)
        if timeout is None or not 0 < timeout <= LONGEST:
            raise ConfigError(
                f"reward timeout is {self.timeout!r} s; expected more than 0 and at most "
                f"{LONGEST:g}."
            )
        require_whole(self, 1, "workers", what="reward ")
        if self.memory is not None and not 0 <= self.memory <= MOST_GIB * GIB:
            raise ConfigError(
                f"reward memory is {self.memory!r} bytes; expected 0 (no limit) to "
                f"{MOST_GIB * GIB}, or None."
            )

    @staticmethod
    def bytes_of(gib: float | None) -> int | None:
        """The field `memory` from GiB. Raises ConfigError."""
        if gib is None:
            return None
        value = real(gib)
        if value is None or not 0 <= value <= MOST_GIB:
            raise ConfigError(
                f"reward memory is {gib!r} GiB; expected 0 (no limit) to {MOST_GIB}, or None."
            )
        return int(value * GIB)

    def bytes_each(self) -> int:
        """Of one process: without a limit given, all together take a quarter of what is available,
        and each at least 1 GiB."""
        if self.memory is not None:
            return self.memory
        room = available_memory()
        return 4 * GIB if room is None else max(room // 4 // self.workers, GIB)


class RewardProcess:
    """One process that runs the function, started at the first call; a new one after an end."""

    def __init__(self, target: str, timeout: float, memory: int) -> None:
        """target: as `reward_process` takes it; seconds a call; bytes, 0 for no limit."""
        self._arguments = [target, repr(timeout), str(memory)]
        self._timeout = timeout
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._asked = 0

    def start(self) -> None:
        """Starts the process where none runs. Raises RewardFailure for a function that cannot be
        loaded."""
        if self._process is not None:
            return
        if self._closed:
            raise RewardFailure("the run is over")
        try:
            process = subprocess.Popen(
                [sys.executable, str(_SCRIPT), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the run's business; one kill takes all of it
            )
        except OSError as error:  # a container's limit of processes, or of open files
            raise RewardFailure(f"no process can be started for it ({error})") from None
        self._process = process
        if self._closed:  # meanwhile, by another thread, which found no process to end
            raise self._ended("the run is over")
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        reader = threading.Thread(
            target=_forward, args=(process.stdout, self._replies), daemon=True
        )
        reader.start()
        ready = self._reply(START_SECONDS)
        if "error" in ready:
            self._end()
            raise RewardFailure(str(ready["error"]))

    def require_loads(self, kind: str) -> None:
        """`start`; ConfigError where the function, a `kind` function, cannot be loaded."""
        try:
            self.start()
        except RewardFailure as failure:
            raise ConfigError(
                f"cannot load the {kind} function {self._arguments[0]!r}: {failure}. Expected "
                "module:function (importable from the current folder) or path/to/file.py:function."
            ) from None

    def call(self, row: Mapping[str, Any], completion: str) -> Score:
        """The score of one completion. Raises RewardFailure."""
        reply = self.ask({"example": row, "completion": completion})
        return Score(float(reply["value"]), str(reply["feedback"]))

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request, as `reward_process` states them. Raises RewardFailure."""
        self.start()
        process = self._process
        if process is None:
            raise RewardFailure("the run is over")
        self._asked += 1
        request = {"id": self._asked, **question}
        with suppress(OSError, ValueError):  # a dead process ends its replies
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        reply = self._reply(self._timeout)
        if reply.get("id") != self._asked:
            raise self._ended(f"the reward process wrote {json.dumps(reply)[:200]}, no reply")
        if reply.get("spent"):
            self._end()
        if "error" in reply:
            raise RewardFailure(str(reply["error"]))
        return reply

    def close(self) -> None:
        """Kills the process and whatever it started, for good; a call in flight fails."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()

    def _ended(self, why: str) -> RewardFailure:
        self._end()
        return RewardFailure(why)

    def _reply(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            raise self._ended(f"no answer within {seconds:g} s; the process was ended") from None
        if line is None:
            raise self._ended(self._how(seconds))
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise self._ended(f"the reward process wrote {line[:100]!r}, which is no reply")
        return reply

    def _how(self, seconds: float) -> str:
        process = self._process
        if process is None:
            return "the run is over"
        try:
            code = process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return "the reward process ended its replies, and goes on"
        if code >= 0:
            return f"the reward process ended with code {code}"
        ended = f"the reward process ended by {signal.Signals(-code).name}"
        if code == -signal.SIGALRM:  # where this side was kept from its own clock
            return f"no answer within {seconds:g} s; {ended}"
        limit = f" (its limit is {readable(self._memory)}, --reward-memory)" if self._memory else ""
        return f"{ended}; with its memory at an end?{limit}"


def _forward(stream: IO[bytes], replies: queue.SimpleQueue[bytes | None]) -> None:
    """Ends where nobody has the pipe any more: a fork that left the group may, for long, and
    closing the stream anywhere else would wait for it."""
    with stream, suppress(OSError, ValueError):
        while line := stream.readline(LONGEST_REPLY):
            replies.put(line)
    replies.put(None)


class RewardPool:
    """Processes that score side by side; threads that wait for them."""

    def __init__(self, target: str, limits: Limits) -> None:
        """Starts nothing; see `require_loads`."""
        memory = limits.bytes_each()
        self._processes = [
            RewardProcess(target, limits.timeout, memory) for _ in range(limits.workers)
        ]
        self._idle: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self.threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="esfast-reward")

    def require_loads(self) -> None:
        """Starts a process now. Raises ConfigError where the function cannot be loaded."""
        try:
            self._processes[0].require_loads("reward")
        except ConfigError:
            self.close()
            raise

    def call(self, row: Mapping[str, Any], completion: str) -> Score:
        """The score of one completion, once a process is idle. Raises RewardFailure."""
        process = self._idle.get()
        try:
            return process.call(row, completion)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Ends every process; what was not scored yet fails."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.close()


class PooledTask(PoolTask):
    """A task over a fixed list of examples whose `score` calls its pool of processes."""

    pool: RewardPool

    def score_later(self, examples: Sequence[Example], completions: Sequence[str]) -> Pending:
        """Queued for the pool; as many at a time as it has processes."""
        pairs = zip(examples, completions, strict=True)
        submit = self.pool.threads.submit
        futures = [submit(self.safe_score, example, text) for example, text in pairs]
        return lambda: [future.result() for future in futures]

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Score]:
        """`score_later`, waited for."""
        return self.score_later(examples, completions)()

    def close(self) -> None:
        """Ends the processes."""
        self.pool.close()

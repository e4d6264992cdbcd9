"""A user's own task: prompts from a JSONL file, a reward function from a Python module.

    esfast train --reward my_rewards:score --data prompts.jsonl

Each row has a "prompt" (a string, or chat messages) and whatever else the function wants:

    def score(example: dict, completion: str) -> float | tuple[float, str]

`example` is the row; the optional string is feedback in words. The function runs in a process of
its own (see `reward_process`): when it raises, crashes, returns no finite number or takes longer
than the time limit, that completion gets the failure reward and is counted, and the run goes on.
It is the user's code and is not sandboxed; what the model wrote is only ever handed to it as text.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError, DataError
from esfast.tasks.base import Example, PoolTask, Score
from esfast.tasks.draws import digest_int, held_out_keys
from esfast.tasks.json_lines import prompt_of, read_rows

HELD_OUT_SHARE = 0.2
START_SECONDS = 120.0
"""How long importing the user's module may take; a heavy library needs tens of seconds."""

_SCRIPT = Path(__file__).with_name("reward_process.py")


class RewardFailure(Exception):
    """One completion could not be scored; the message says why."""


class RewardProcess:
    """One process that runs the reward function; killed and started anew when it hangs or dies."""

    def __init__(self, target: str, timeout: float) -> None:
        """Starts the process. Raises ConfigError where the function cannot be loaded."""
        self._target = target
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except RewardFailure as failure:
            raise ConfigError(
                f"cannot load the reward function {target!r}: {failure}. Expected module:function "
                "(importable from the current folder) or path/to/file.py:function."
            ) from None

    def call(self, row: dict[str, Any], completion: str) -> Score:
        """The score of one completion. Raises RewardFailure."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        line = json.dumps({"example": row, "completion": completion}) + "\n"
        with suppress(OSError):  # a dead process shows as the end of its replies
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        reply = self._reply(self._timeout)
        if "error" in reply:
            raise RewardFailure(reply["error"])
        return Score(float(reply["value"]), str(reply["feedback"]))

    def close(self) -> None:
        """Kill the process and whatever it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), self._target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the run's business; and one kill takes all of it
        )
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        reader = threading.Thread(
            target=_forward, args=(self._process.stdout, self._replies), daemon=True
        )
        reader.start()
        ready = self._reply(START_SECONDS)
        if "error" in ready:
            self.close()
            raise RewardFailure(ready["error"])

    def _reply(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise RewardFailure(f"no answer within {seconds:g} s; the process was ended") from None
        if line is None:
            code = self._process.wait() if self._process is not None else None
            self.close()
            raise RewardFailure(f"the reward process ended with code {code}")
        return json.loads(line)


def _forward(stream: Any, replies: queue.SimpleQueue[bytes | None]) -> None:
    with suppress(OSError, ValueError):
        for line in stream:
            replies.put(line)
    replies.put(None)


class Custom(PoolTask):
    """Prompts of the user's, scored by a function of the user's."""

    name = "custom"

    def __init__(
        self,
        reward: str | None = None,
        data: str | Path | None = None,
        eval_data: str | Path | None = None,
        timeout: float = 10.0,
        workers: int = 1,
        failure_reward: float = 0.0,
    ) -> None:
        """Without `eval_data`, a fifth of the prompts is held out (at least one).

        `timeout`: seconds a completion; `workers`: processes that score side by side.
        Raises ConfigError for a function that cannot be loaded, DataError for bad rows.
        """
        if not reward or data is None:
            raise ConfigError("a task of your own needs both --reward module:function and --data.")
        if not timeout > 0 or workers < 1:
            raise ConfigError(
                f"reward timeout {timeout} s and {workers} workers; expected more than 0 s and at "
                "least 1 worker."
            )
        train = _examples(Path(data))
        if eval_data is None:
            train, held_out = _split(Path(data), train)
        else:
            held_out = _examples(Path(eval_data))
        super().__init__(train, held_out)
        self.failure_reward = failure_reward
        self._reward = reward
        self._workers = [RewardProcess(reward, timeout) for _ in range(workers)]
        self._idle: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def score(self, example: Example, completion: str) -> Score:
        """What the user's function says. Raises RewardFailure."""
        worker = self._idle.get()
        try:
            return worker.call(example.data["row"], completion)
        finally:
            self._idle.put(worker)

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Score]:
        """As many at a time as there are processes."""
        if len(self._workers) == 1:
            return super().score_all(examples, completions)
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(self.safe_score, examples, completions))

    def describe(self) -> dict[str, Any]:
        """Adds the function's name."""
        return {**super().describe(), "reward": self._reward}

    def close(self) -> None:
        """End the reward processes."""
        for worker in self._workers:
            worker.close()


def _examples(path: Path) -> list[Example]:
    examples = {}
    for line, row in read_rows(path, required=("prompt",)):
        prompt = prompt_of(path, line, row)
        key = f"{digest_int(json.dumps(row, sort_keys=True)):016x}"
        examples[key] = Example(key, prompt, {"row": row})
    return list(examples.values())


def _split(path: Path, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Splits by prompt, so that two rows with one prompt stay together."""
    held = held_out_keys((json.dumps(example.prompt) for example in examples), HELD_OUT_SHARE)
    if not held:
        raise DataError(
            f"{path} has one prompt; at least two are needed, one to train on and one to hold out. "
            "Add prompts, or give held-out ones with --eval-data."
        )
    held_out = [example for example in examples if json.dumps(example.prompt) in held]
    train = [example for example in examples if json.dumps(example.prompt) not in held]
    return train, held_out

"""vLLM's own processes, and an error where one of them is gone: vLLM's client waits for ever for an
engine core that was killed (vLLM 0.32), and for a worker's answer to a call. Linux alone."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esfast.errors import LostError

TITLE = "VLLM::"  # how vLLM names its processes
EVERY = 2.0  # seconds
LONGEST_END = 5.0  # of one that refuses calls because it was told to end
MISTAKES = (ValueError, TypeError)  # in a call, raised before it is sent


def engine_processes(parent: int) -> dict[int, str]:
    """The living processes under `parent` that vLLM has named, by number."""
    found: dict[int, str] = {}
    for child in _children(parent):
        title = _read(child, "cmdline").partition("\0")[0].strip()
        if title.startswith(TITLE):
            found[child] = title
        found |= engine_processes(child)
    return found


class Processes:
    """Those of one engine, which has just started.

    core: vLLM's client of its engine core; before: numbers of other engines' processes.
    """

    def __init__(self, core: Any, before: Collection[int] = (), every: float = EVERY) -> None:
        now = engine_processes(os.getpid())
        self._there = {number: title for number, title in now.items() if number not in before}
        self._closed = threading.Event()
        if self._there:
            watched = (self, weakref.ref(core), every)
            threading.Thread(target=Processes._watch, args=watched, daemon=True).start()

    def gone(self) -> str | None:
        """The first that has ended, in words."""
        for number, title in self._there.items():
            if _read(number, "stat").rpartition(")")[2].split()[:1] in ([], ["Z"]):
                return f"{title} (process {number})"
        return None

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Around a call of vLLM's: LostError where it failed since a process has ended."""
        try:
            yield
        except Exception as error:
            waits = 0.0 if isinstance(error, MISTAKES) else LONGEST_END
            until = time.monotonic() + waits
            while (gone := self.gone()) is None:
                if not self._there or time.monotonic() > until:
                    raise
                time.sleep(0.05)
            raise LostError(
                f"{gone} has ended: killed from outside, for want of memory, or by an error that "
                "it told of above. Start the engine again; a run goes on from its journal "
                "(--resume RUN)."
            ) from error

    def close(self) -> None:
        """They may end from now on."""
        self._closed.set()

    def _watch(self, core: weakref.ref[Any], every: float) -> None:
        while not self._closed.wait(every):
            if self.gone() is not None:
                if not self._closed.is_set():
                    _end_waits(core())
                return


def _end_waits(core: Any) -> None:
    """Who waits for the client's outputs, or for the answer to a call, is told that none comes."""
    if core is None or not hasattr(core, "resources"):  # no client: the core is in this process
        return
    ended = RuntimeError("a process of vLLM's has ended")
    core.resources.engine_dead = True  # first: later calls are refused
    for answer in list(core.utility_results.values()):
        if not answer.done():
            answer.set_exception(ended)
    core.outputs_queue.put_nowait(ended)


def _children(parent: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{parent}/task").iterdir())
    except OSError:  # no /proc, or it has ended
        return []
    return [int(n) for thread in threads for n in _text(thread / "children").split()]


def _read(process: int, what: str) -> str:
    return _text(Path(f"/proc/{process}/{what}"))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

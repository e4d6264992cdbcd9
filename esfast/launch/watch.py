"""An actor that ends when a process of its engine has: vLLM's client waits for ever in one for an
engine core that was killed (vLLM 0.32), and the driver with it. Linux alone."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

TITLE = "VLLM::"  # how vLLM names its processes
EVERY = 2.0  # seconds


def engine_processes(parent: int) -> dict[int, str]:
    """The living processes under `parent` that vLLM has named, by number."""
    found: dict[int, str] = {}
    for child in _children(parent):
        title = _read(child, "cmdline").partition("\0")[0].strip()
        if title.startswith(TITLE):
            found[child] = title
        found |= engine_processes(child)
    return found


def watch(
    every: float = EVERY, end: Callable[[str], object] | None = None
) -> threading.Thread | None:
    """Ends this process when one of those that its engine has now is gone; None where it has none.

    end: what is done instead, for a test; told which one it was.
    """
    there = engine_processes(os.getpid())
    if not there:
        return None
    thread = threading.Thread(target=_wait, args=(there, every, end or _end), daemon=True)
    thread.start()
    return thread


def _wait(there: dict[int, str], every: float, end: Callable[[str], object]) -> None:
    while True:
        for process, title in there.items():
            if _read(process, "stat").rpartition(")")[2].split()[:1] in ([], ["Z"]):
                end(f"{title} (process {process}) is gone")
                return
        time.sleep(every)


def _end(why: str) -> None:
    print(f"esfast: {why}; this engine ends and is started again", file=sys.stderr, flush=True)
    os._exit(1)


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

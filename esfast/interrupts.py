"""Ctrl-C that does not come between two halves of one change, and SIGTERM that does what it does.

Not promised: anything about other signals, or outside the main thread, where Python delivers none.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C or SIGTERM ended."""


@dataclass
class Interrupts:
    """Ctrl-C at once, or where the weights are being moved once they rest; a context manager. A
    second Ctrl-C does not wait: `moving` then says that the weights are not whole. What it does is
    what the handler from before does: by default it raises KeyboardInterrupt."""

    moving: bool = False
    asked: bool = False
    _before: Any = field(default=None, repr=False)

    def __enter__(self) -> Interrupts:
        before = signal.getsignal(signal.SIGINT)  # not callable where Ctrl-C is ignored, or kills
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or not self.moving:
            self._before(number, frame)

    def rest(self) -> None:
        """The weights are whole from here on. Does now what a Ctrl-C meanwhile asked for."""
        self.moving = False
        asked, self.asked = self.asked, False
        if asked:
            self._before(signal.SIGINT, None)


class _Unnamed(BaseException):
    """A KeyboardInterrupt that nobody catches who catches those."""


@contextmanager
def not_swallowed() -> Iterator[None]:
    """Around a library's code that catches a KeyboardInterrupt and goes on (vLLM's, where it waits
    for its processes to start): it passes through under another name, and leaves as what it was;
    one that was swallowed even so (by a destructor) is raised at the end."""
    before: Any = signal.getsignal(signal.SIGINT)
    asked = False

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        try:
            before(number, frame)
        except KeyboardInterrupt:
            asked = True
            raise _Unnamed from None

    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, take)
    try:
        yield
    except _Unnamed:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


@contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """SIGTERM, which batch systems send before they kill, does once what Ctrl-C does: a run is put
    away whole, and an engine's processes end with it. A second one, or one where Ctrl-C is ignored,
    ends the process at once, as SIGTERM does without this."""

    def take(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if callable(signal.getsignal(signal.SIGINT)):
            signal.raise_signal(signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

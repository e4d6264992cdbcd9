"""A loop over members that ends where it is left, however it is written.

A `for` statement drops its iterator when an exception leaves it, and a generator that is dropped
runs its `finally`. Two things keep it alive, and with it the member on the weights, into the very
handler that may save them: a variable (`members = es.population()`), and the frame of a
comprehension or generator expression, which the exception's traceback holds. So every loop gets an
iterator of its own, and a comprehension's frame forgets its argument, `.0`, which it read once
before the first member (CPython 3.10 to 3.13).

Not promised: an iterator that the caller made and keeps (`loop = iter(es.population())`), or took
steps of with `next`, is left when it is closed, or with the exception.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from types import FrameType

from esfast.members import Member

Steps = Generator[Member, None, None]


class MemberLoop(Iterator[Member]):
    """What `population()` gives: an iterator over its members; every loop over it closes it."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __iter__(self) -> Steps:
        yield from self._steps

    def __next__(self) -> Member:
        return next(self._steps)

    def close(self) -> None:
        """Leaves the loop."""
        self._steps.close()


def forget_iterated(frame: FrameType | None) -> None:
    """Lets the nearest comprehension from `frame` outwards hold its iterator by its loop alone."""
    while frame is not None and ".0" not in frame.f_code.co_varnames:
        frame = frame.f_back
    if frame is None:
        return
    with suppress(AttributeError, KeyError, TypeError):  # another interpreter, another frame
        frame.f_locals[".0"] = None
        if sys.version_info < (3, 13):  # f_locals is a copy, and has to be written back
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))

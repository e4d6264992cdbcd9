"""Standard output that may go away (`| head -1`, a full disk, a terminal that was closed) without
taking a run of hours with it.

What is written after that goes nowhere; the run's folder has all of it. A broken pipe is silent, as
is usual; anything else that went wrong is told at the end.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class LastingOutput:
    """A text stream that drops what can no longer be written.

    lost: why, None while all was written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Writes the text where that can be done; its length."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """As of a stream; never raises OSError."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """From here on into the void, with what is still in the stream's buffer."""
        self.lost = self.lost or error
        with suppress(OSError, ValueError):
            void = os.open(os.devnull, os.O_WRONLY)
            os.dup2(void, self._stream.fileno())
            os.close(void)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_stdout() -> Iterator[LastingOutput | None]:
    """Puts one in the place of sys.stdout; None where that is closed."""
    before: Any = sys.stdout
    if before is None:
        yield None
        return
    lasting = LastingOutput(before)
    sys.stdout = lasting
    try:
        yield lasting
    finally:
        lasting.flush()
        sys.stdout = before


def is_worth_telling(lost: OSError | None) -> bool:
    """Whether a reader who left on purpose (`| head -1`) would want to know."""
    return lost is not None and lost.errno != errno.EPIPE

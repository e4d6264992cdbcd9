"""Standard output and error that may go away (`| head -1`, a full disk, a terminal that was closed)
or that cannot hold a character, without taking a run of hours with them.

What is written after that goes nowhere; the run's folder has all of it. A broken pipe is silent, as
is usual; anything else that went wrong with the output is told at the end. Libraries write to both
streams too: a progress bar of transformers that fails would otherwise be a model not saved.
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
        """Writes the text where that can be done, ? for what the encoding lacks; its length."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "replace").decode(encoding))
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
def lasting_output() -> Iterator[LastingOutput | None]:
    """Puts one each in the place of sys.stdout and sys.stderr; gives the first, None where that is
    closed."""
    before: list[Any] = [sys.stdout, sys.stderr]
    lasting = [None if stream is None else LastingOutput(stream) for stream in before]
    sys.stdout, sys.stderr = lasting
    try:
        yield lasting[0]
    finally:
        for stream in lasting:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def is_worth_telling(lost: OSError | None) -> bool:
    """Whether a reader who left on purpose (`| head -1`) would want to know."""
    return lost is not None and lost.errno != errno.EPIPE

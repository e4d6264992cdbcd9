"""A file that appears at once or not at all: a temporary one beside it, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from esfast.errors import EsfastError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """`path`, open for writing; replaced when the block ends, left as it was where it raises.

    Raises EsfastError where the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EsfastError(
            f"cannot write {path}: {error.strerror or error}. Free some space, or name another "
            f"file in a folder that is there."
        ) from None

"""Makes the problems of a reasoning-gym data set: a script of its own, without esfast and torch.

    PYTHONHASHSEED=0 python gym_rows.py

Some data sets walk over sets, whose order follows the hashes of the process, or draw from Python's
shared generator: the workers of a run would deal different problems. Here hashes and generator are
fixed, and end with the process. Pickles, since not all problems are JSON: in (data set's name,
options), out (problems, None) or (None, what went wrong).
"""

from __future__ import annotations

import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any


def rows_of(name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """All problems of the data set. Raises whatever making them raises."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, **options)
    random.seed(0)
    return [dataset[index] for index in range(len(dataset))]


def reply(request: bytes) -> bytes:
    """The pickled answer to a pickled request."""
    try:
        return pickle.dumps((rows_of(*pickle.loads(request)), None))
    except Exception as error:
        return pickle.dumps((None, f"{type(error).__name__}: {error}"[:500]))


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())  # not the folder of this file, which would shadow modules
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # what a data set prints is no reply
        replies.write(reply(sys.stdin.buffer.read()))

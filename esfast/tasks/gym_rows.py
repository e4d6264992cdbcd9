"""Makes the problems of a reasoning-gym data set: a script of its own, without esfast and torch.

    PYTHONHASHSEED=0 python gym_rows.py

Some data sets walk over sets, whose order follows the hashes of the process, or draw from Python's
shared generator: the workers of a run would deal different problems. Here hashes and generator are
fixed, and end with the process. JSON: in [data set's name, options], out {"rows": problems as
`gym_scorer.to_json` marks them} or {"error": what went wrong}.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from runpy import run_path
from typing import Any


def marked(rows: Any) -> Any:
    """As `to_json` of gym_scorer.py has them, which lies beside this file."""
    return run_path(str(Path(__file__).with_name("gym_scorer.py")))["to_json"](rows)


def rows_of(name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """All problems of the data set. Raises whatever making them raises."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, **options)
    random.seed(0)
    return [dataset[index] for index in range(len(dataset))]


def reply(request: bytes) -> str:
    """The answer to a request, both JSON."""
    try:
        return json.dumps({"rows": marked(rows_of(*json.loads(request)))})
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})


if __name__ == "__main__":
    here = str(Path(__file__).parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]  # it would shadow modules
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # what a data set prints is no reply
        replies.write(reply(sys.stdin.buffer.read()))

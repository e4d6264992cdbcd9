"""The process that a user's function runs in: a script of its own, standard library only.

    python reward_process.py module:function SECONDS BYTES

Requests and replies are JSON objects, one a line, on what were standard input and output when it
started; the function finds an empty standard input, and what it prints goes to standard error.
First line out: {"ready": true} or {"error": ...}. Then for each
{"id": 1, "example": {...}, "completion": "..."}: {"id": 1, "value": 0.5, "feedback": "..."} or
{"id": 1, "error": ...}; with "spent": true the process has ended itself. A request with a "prompt"
is for a function of text to text (`esfast fast-slow --reflection`): {"id": 1, "text": "..."}.

Being a process, it can be killed when the function hangs, and its crash is not the run's. It is
started by path, so that it loads no torch: 10 MB and 30 ms rather than 200 MB and seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

LARGEST_REWARD = 1e30  # as in esfast.tasks.base, which this process does not load
LONGEST_TEXT = 5000  # characters; as JSON 60 KB at most, a reply's limit in reward_pool is 64 KiB
ORPHAN_SECONDS = 2.0  # after the time limit; by then whoever started the process has ended it


def load(target: str) -> Callable[..., Any]:
    """The function named `module:function` or `path/to/file.py:function`.

    Raises ValueError, ImportError or AttributeError; and whatever importing the module raises.
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(f"{target!r} is not of the form module:function")
    found: Any = load_file(place) if place.endswith(".py") else importlib.import_module(place)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{target!r} is a {type(found).__name__}, not a function")
    return found


def load_file(place: str) -> ModuleType:
    """The module in the file `place`, which finds those beside it after all others."""
    spec = importlib.util.spec_from_file_location("reward_file", place)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {place}")
    folder = Path(place).resolve().parent
    if folder != Path(__file__).resolve().parent:  # whose base.py and others are esfast's own
        sys.path.append(str(folder))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def reply_to(result: Any) -> dict[str, Any]:
    """The reply for what the function returned: a number, or a number and a feedback in words
    (or None). A number in the feedback's place is an error: which is the reward nobody can say."""
    value, feedback = result, None
    if isinstance(result, (tuple, list)) and len(result) == 2:
        value, feedback = result
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    expected = ""
    if not -LARGEST_REWARD <= number <= LARGEST_REWARD:  # nor is NaN
        expected = "a finite number, 1e30 at most"
    elif feedback is not None and not isinstance(feedback, str):
        expected = f"a number and a feedback in words, which a {type(feedback).__name__} is not"
    if expected:
        return {"error": f"the reward function returned {repr(result)[:200]}; expected {expected}"}
    return {"value": number, "feedback": (feedback or "")[:500]}


def text_reply(result: Any) -> dict[str, Any]:
    """The reply for what a function of text to text returned."""
    if isinstance(result, str) and result.strip() and len(result) <= LONGEST_TEXT:
        return {"text": result}
    long = f" of {len(result)} characters" if isinstance(result, str) else ""
    expected = f"a text of 1 to {LONGEST_TEXT} characters"
    return {
        "error": f"the reflection function returned {repr(result)[:200]}{long}; expected {expected}"
    }


def answer(function: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """Calls the function; an exception becomes an error reply."""
    which = "reflection" if "prompt" in request else "reward"
    try:
        if "prompt" in request:
            return text_reply(function(request["prompt"]))
        return reply_to(function(request["example"], request["completion"]))
    except MemoryError:
        pass  # what its frames hold is free once this block is left
    except BaseException as error:
        return {"error": f"the {which} function raised {type(error).__name__}: {error}"[:500]}
    limit = lift_memory_limit()
    return {"error": f"the {which} function ran out of memory ({limit})", "spent": True}


def limit_memory(size: int) -> None:
    """At most `size` bytes of private writable memory, 0 for no limit; and should the machine's
    memory end, this process is the first to go (man 5 proc, oom_score_adj)."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900")
    if size:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (size, _hard()))


def lift_memory_limit() -> str:
    """Gives the last words room; returns what the limit was, in words."""
    size, _ = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_hard(), _hard()))
    if size == resource.RLIM_INFINITY:
        return "it has no limit of its own"
    return f"its limit is {size / 1e9:.3g} GB, --reward-memory"


def _hard() -> int:
    return resource.getrlimit(resource.RLIMIT_DATA)[1]


def own_streams() -> tuple[IO[bytes], IO[str]]:
    """The requests and the replies, out of reach of `input` and `print`."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def main(target: str, seconds: float, size: int) -> None:
    """Serves requests until they end, or until a call has taken all memory."""
    sys.path[0] = str(Path.cwd())  # not the folder of this file, which would shadow modules
    requests, replies = own_streams()

    def send(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    limit_memory(size)
    try:
        function = load(target)
    except BaseException as error:
        lift_memory_limit()
        send({"error": f"{type(error).__name__}: {error}"[:500]})
        return
    send({"ready": True})
    for line in requests:
        request = json.loads(line)
        # Where the run was killed nobody else ends a call that hangs: SIGALRM does.
        signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_SECONDS)
        reply = answer(function, request)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        send({"id": request["id"], **reply})
        if reply.get("spent"):
            os._exit(0)  # whatever the function keeps goes with it


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))

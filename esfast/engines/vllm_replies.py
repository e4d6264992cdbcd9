"""Errors of vLLM's workers as values, raised again by who called them all.

vLLM's executor of several workers raises at the first error and leaves the other workers' replies
in their queues, where the next calls would find them. So a worker that fails replies with what
failed, and it is raised once the replies of all are in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from esfast.errors import ConfigError, DataError, EsfastError, ParameterError, StateError

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ParameterError, ConfigError, DataError, StateError, EsfastError),
        *(OSError, MemoryError, ValueError, RuntimeError),
    )
}


def failure(error: Exception) -> dict[str, str]:
    """{"error": the class that is raised again, "text": what it says}, both as texts."""
    for kind in type(error).__mro__:
        if _KINDS.get(kind.__name__) is kind:
            return {"error": kind.__name__, "text": str(error) or repr(error)}
    logging.getLogger(__name__).error("a worker of vLLM failed", exc_info=error)  # a defect
    return {"error": "RuntimeError", "text": repr(error)}


def answered(replies: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the workers' calls returned; their error raised again where one failed.

    StateError where some failed and some did not, since their weights may be apart now.
    """
    failed = [reply for reply in replies if "error" in reply]
    if not failed:
        return [reply["value"] for reply in replies]
    if len(failed) < len(replies):
        raise StateError(
            f"{len(failed)} of {len(replies)} workers failed ({failed[0]['text']}), so their "
            "weights may be apart. Start the engine again; a run resumes from its journal, and a "
            "script from what it saved."
        )
    raise _KINDS[failed[0]["error"]](failed[0]["text"])

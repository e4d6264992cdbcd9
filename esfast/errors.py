"""The exceptions that esfast raises at its boundaries.

Each message says what was seen, what was expected and how to mend it, and is raised before anything
is changed. The command line prints them as one paragraph and exits with 2.
"""

from __future__ import annotations

from collections.abc import Sequence

MENDABLE = 2
"""The exit code."""


class EsfastError(Exception):
    """Base of every error that a user can mend."""


class ParameterError(EsfastError, ValueError):
    """A weight, segment or tensor that the core cannot edit exactly."""


class ConfigError(EsfastError, ValueError):
    """A setting outside its range, or settings that contradict each other."""


class DataError(EsfastError, ValueError):
    """A file, data set or checkpoint whose content is not what its format promises."""


class StateError(EsfastError, RuntimeError):
    """A call that the present state does not allow."""


class LostError(StateError):
    """A process of an engine's has ended; one that is started anew can go on from the journal."""


def require_one_of(what: str, value: object, choices: Sequence[str]) -> None:
    """ConfigError for a name that is not among those that `what` has."""
    if value not in choices:
        raise ConfigError(f"{what} {value!r} is unknown; choose one of {', '.join(choices)}.")


def first_line(error: BaseException) -> str:
    """What another library's error says, for the middle of a sentence: the first of its lines that
    says anything, 300 letters at most; its class where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:300]

"""Bounds of settings, told by name: what was seen, what is expected.

The dataclasses of settings call these where they are made, so that a script and the command line
are refused alike and before anything is done.
"""

from __future__ import annotations

from esfast.errors import ConfigError
from esfast.members import whole
from esfast.strategy import real

MOST = 2**31 - 1  # of anything counted: no run gets there, and range() and numpy do


def require_whole(settings: object, least: int, *names: str, what: str = "") -> None:
    """Each field a whole number of `least` or more, kept as an int.

    what: said before the name. Raises ConfigError.
    """
    for name in names:
        seen = getattr(settings, name)
        value = whole(seen)
        if value is None or not least <= value <= MOST:
            most = f" (and at most {MOST})" if value is not None and value > MOST else ""
            raise ConfigError(
                f"{what}{name} is {seen!r}; expected a whole number, {least} or more{most}."
            )
        object.__setattr__(settings, name, value)


def require_between(
    settings: object, name: str, low: float, high: float, expected: str, what: str = ""
) -> None:
    """The field a number from `low` to `high`, kept as a float.

    expected: the end of the message; what: its beginning. Raises ConfigError.
    """
    value = real(getattr(settings, name))
    if value is None or not low <= value <= high:
        seen = getattr(settings, name)
        raise ConfigError(f"{what}{name} is {seen!r}; expected {expected}.")
    object.__setattr__(settings, name, value)

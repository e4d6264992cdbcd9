"""Why completions could not be scored: counted by reason, each reason told when it is first met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from esfast.tasks.base import Score

TOLD = 5  # reasons; a run of thousands of completions would drown in the rest
KEPT = 20
OTHERS = "other reasons"
ELSEWHERE = "told by the workers that met them, on their standard error"


def visible(text: str) -> str:
    """On one line, with what would move a terminal's cursor, or colour it, written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip())


class Failures:
    """The failed scores of a run; `tell` gets a line for each of the first reasons."""

    def __init__(self, tell: Callable[[str], object] = lambda text: None) -> None:
        self.tell = tell
        self._reasons: Counter[str] = Counter()

    def add(self, scores: Iterable[Score], where: str) -> None:
        """Takes up those that failed. where: such as "a held-out answer"."""
        for score in scores:
            if score.failed:
                self._take(
                    visible(" ".join(score.feedback.split())) or "no reason was given", where
                )

    def elsewhere(self, count: int) -> None:
        """Takes up those of other workers, of which only the number comes here."""
        if count:
            self._reasons[ELSEWHERE] += count

    def _take(self, reason: str, where: str) -> None:
        if reason not in self._reasons and len(self._reasons) >= KEPT:
            reason = OTHERS
        if reason not in self._reasons and len(self._reasons) < TOLD:
            self.tell(f"{where} could not be scored and got the failure reward: {reason}")
        self._reasons[reason] += 1

    def record(self) -> list[dict[str, Any]]:
        """The reasons, most frequent first; plain JSON values."""
        return [{"reason": reason, "count": n} for reason, n in self._reasons.most_common()]

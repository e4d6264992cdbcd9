"""Whether an edit of each weight reaches what vLLM answers; what does not is refused by name.

A weight may be read from a copy that nobody makes again, or not at all. So the weights of one group
are changed by noise of their own size, and the probabilities of a short prompt and of two tokens
after it are compared with those before. A group: the canonical tensors of one kind (the name
without its numbers) in one of vLLM's parameters, so that a layer's experts are tried together, of
which a prompt uses a few. Tensors of one kind, module class and derived attributes share the code
that reads them; unless all are asked for, one group of each is tried, in different layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from esfast.errors import ParameterError, StateError
from esfast.members import Member
from esfast.parameters import ParameterTable
from esfast.segments import Segment
from esfast.weights import Weights

if TYPE_CHECKING:
    from esfast.engines.vllm_derived import Kept

_SMALLEST = 1e-2  # of a group of zeros, which noise of its own size would not change
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Groups:
    """One worker's groups of weights; `names` is the same at every worker of an engine."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._members: dict[str, list[Segment]] = {}
        self._kinds: dict[str, Hashable] = {}
        self._applied: dict[str, Weights] = {}
        for segment in kept.segments:
            owner = kept.owner(segment)
            name = f"{_NUMBER.sub('*', segment.name)} in {owner.module}"
            self._members.setdefault(name, []).append(segment)
            self._kinds[name] = (_NUMBER.sub("*", segment.name), owner.kind, owner.derived)

    def names(self, all_of_them: bool = False) -> list[str]:
        """What there is to try."""
        if all_of_them:
            return list(self._members)
        by_kind: dict[Hashable, list[str]] = {}
        for name, kind in self._kinds.items():
            by_kind.setdefault(kind, []).append(name)
        return [names[at % len(names)] for at, names in enumerate(by_kind.values())]

    def nudge(self, name: str) -> str:
        """Changes a group by about its own size, until `unnudge`; returns its owner's name."""
        segments = self._members[name]
        size = max(float(s.tensor.float().square().mean().sqrt()) for s in segments)
        weights = Weights(ParameterTable(segments), "lean", threads=1)
        self._applied[name] = weights
        weights.perturb(Member(1), max(size, _SMALLEST))
        return self._kept.owner(segments[0]).module

    def unnudge(self, name: str) -> str:
        """Puts the bits back; returns the owner's name."""
        self._applied.pop(name).restore()
        return self._kept.owner(self._members[name][0]).module


def require_reach(
    names: Sequence[str],
    change: Callable[[str, str], object],
    answers: Callable[[], Any],
) -> int:
    """ParameterError, by name, where a group's change leaves the answers as they are.

    change: called with "nudge" or "unnudge" and the group; answers: what the engine says to a fixed
    prompt, to be compared. Returns how many groups were tried; the weights are as they were.
    """
    before = answers()
    lost = []
    for name in names:
        change("nudge", name)
        try:
            reached = answers() != before
        finally:
            change("unnudge", name)
        if not reached:
            lost.append(name)
    if lost:
        raise ParameterError(
            f"an edit of {_listed(lost)} does not reach what vLLM answers ({len(lost)} of "
            f"{len(names)} kinds of weights tried): this backend reads them from a copy that "
            "esfast cannot make again. Train with the transformers engine (--engine transformers), "
            "or try another backend of vLLM's."
        )
    if answers() != before:
        raise StateError(
            "vLLM answers otherwise after its weights were changed and put back to the bit, so "
            "what it derives from them is not made again. Train with --engine transformers."
        )
    return len(names)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")

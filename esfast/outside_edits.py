"""Whether somebody else edited tensors that this process edits by address.

torch counts the edits of a tensor, for its own backward passes. The core's are told to it, and a
count that went on without them is an optimizer's, a load_state_dict's, or other `Weights`'. Not
seen: what torch does not count (fused optimizers, collectives, edits through `.data` and numpy),
edits of tensors made in inference mode, which have no count, and of parts of a larger tensor, which
share one with what lies beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import increment_version

from esfast.errors import StateError
from esfast.segments import Segment

_BITS = {2: torch.int16, 4: torch.int32}


class OutsideEdits:
    """The counts of the segments' tensors as they were left; half a microsecond each and call."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        counted = [s for s in segments if not s.tensor.is_inference()]
        self._told = [s.tensor for s in counted]
        self._watched = [(s.name, s.tensor) for s in counted if _is_whole(s.tensor)]
        self.accept()

    def accept(self) -> None:
        """The tensors are as they should be."""
        self.untold: str | None = None  # what was kept
        self._count()

    def _count(self) -> None:
        self._counts: list[int] | None = [tensor._version for _, tensor in self._watched]

    def keep(self) -> None:
        """What is found now is found until it has been told: a Ctrl-C may come in between."""
        self.untold = self.found()

    def tell(self) -> None:
        """Of an edit of one's own: autocast drops its casts of fp32 weights, and a backward pass
        over weights that have changed since is an error instead of wrong."""
        torch.clear_autocast_cache()
        self._counts = None  # unknown, should a Ctrl-C fall in here
        for tensor in self._told:
            increment_version(tensor)
        self._count()

    def found(self) -> str | None:
        """The name of a tensor that somebody else edited, if any."""
        if self.untold is not None or self._counts is None:
            return self.untold
        for (name, tensor), count in zip(self._watched, self._counts, strict=True):
            if tensor._version != count:
                return name
        return None

    def require_known(self, bases: Sequence[torch.Tensor], memory: str) -> None:
        """StateError where base copies, one a segment, do not have what somebody else edited."""
        edited = self.found()
        if edited is None:
            return
        if bases and not self._are_of(bases):
            raise StateError(
                f"'{edited}' was edited by something else (an optimizer, load_state_dict, a member "
                f'of other Weights); memory="{memory}" starts from its own copy, which would undo '
                "that. Restore such a member; rebase() then takes the weights as they are."
            )
        self.accept()

    def _are_of(self, bases: Sequence[torch.Tensor]) -> bool:
        pairs = zip(self._segments, bases, strict=True)
        return all(_same_bits(s.tensor, base.to(s.tensor.dtype)) for s, base in pairs)

    def require_not_under_member(self, memory: str) -> None:
        """StateError where what was kept was edited under the member that has been restored."""
        edited, self.untold = self.untold, None
        if edited is None:
            return
        gone = "that edit is gone. Edit between members"
        lost = "what was restored may not be the bits from before. Load the weights again"
        raise StateError(
            f"'{edited}' was edited by something else while a member was applied (an optimizer, "
            f"load_state_dict, other Weights of the model); {lost if memory == 'lean' else gone}."
        )


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.nbytes == tensor.untyped_storage().nbytes()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = _BITS[a.element_size()]  # as numbers, a NaN would be another than itself
    return torch.equal(a.view(kind), b.view(kind))

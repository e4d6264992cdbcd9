"""Whether somebody else edited tensors that this process edits by address.

torch counts the edits of a tensor, for its own backward passes. The core's are told to it, and a
count that went on without them is an optimizer's, a load_state_dict's, or other `Weights`'. Not
seen: edits through `.data`, and of tensors made in inference mode, which have no count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import increment_version

from esfast.errors import StateError
from esfast.segments import Segment


class OutsideEdits:
    """The counts of the segments' tensors as they were left; a quarter of a microsecond each."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._counted = [(s.name, s.tensor) for s in segments if not s.tensor.is_inference()]
        self.accept()

    def accept(self) -> None:
        """The tensors are as they should be."""
        self._counts: list[int] | None = [tensor._version for _, tensor in self._counted]

    def tell(self) -> None:
        """Of an edit of one's own: autocast drops its casts of fp32 weights, and a backward pass
        over weights that have changed since is an error instead of wrong."""
        torch.clear_autocast_cache()
        self._counts = None  # unknown, should a Ctrl-C fall in here
        for _, tensor in self._counted:
            increment_version(tensor)
        self.accept()

    def found(self) -> str | None:
        """The name of a tensor that somebody else edited, if any."""
        if self._counts is None:
            return None
        for (name, tensor), count in zip(self._counted, self._counts, strict=True):
            if tensor._version != count:
                return name
        return None

    def require_known(self, bases: Sequence[torch.Tensor], memory: str) -> None:
        """StateError where base copies, one a segment, do not have what somebody else edited."""
        edited = self.found()
        if edited is not None and bases and not self._are_of(bases):
            raise StateError(
                f"'{edited}' was edited by something else (an optimizer, load_state_dict, a member "
                f'of other Weights); memory="{memory}" starts from its own copy, which would undo '
                "that. Restore such a member; rebase() then takes the weights as they are."
            )
        self.accept()

    def _are_of(self, bases: Sequence[torch.Tensor]) -> bool:
        pairs = zip(self._segments, bases, strict=True)
        return all(torch.equal(s.tensor, base.to(s.tensor.dtype)) for s, base in pairs)

    @staticmethod
    def require_not_under_member(edited: str | None, memory: str) -> None:
        """StateError where `edited` was edited under the member that has been restored."""
        if edited is None:
            return
        gone = "that edit is gone. Edit between members"
        lost = "what was restored may not be the bits from before. Load the weights again"
        raise StateError(
            f"'{edited}' was edited by something else while a member was applied (an optimizer, "
            f"load_state_dict, other Weights of the model); {lost if memory == 'lean' else gone}."
        )

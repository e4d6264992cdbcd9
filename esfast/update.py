"""An update of the weights as one value: checked where it is made, and all that crosses to workers.

    w <- round(decay(w + sum_n coefficient_n * sign_n * eps_n))

What is wrong with it is said before anything is sent or edited; what only the weights know (their
anchor, their tensors) is checked where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from esfast.errors import ConfigError, require_one_of
from esfast.members import Member, require_member, whole
from esfast.strategy import ROUNDINGS, AnchoredDecay, real

_LARGEST = float(np.finfo(np.float32).max)
_DECAY_NUMBERS = {"l1": 1, "l2": 2}


@dataclass(frozen=True)
class UpdateReport:
    """saturated: weights whose rounded value left the dtype's range and became its largest.

    -1 where it cannot be read: inside the capture of a CUDA graph.
    """

    saturated: int


@dataclass(frozen=True)
class Update:
    """The arguments of `LiveWeights.update`, which says what they mean; ConfigError for bad ones.

    members and coefficients are tuples afterwards, so that updates compare as values.
    """

    members: Sequence[Member]
    coefficients: Sequence[float] | np.ndarray
    decay: AnchoredDecay | None = None
    alpha: float | None = None
    rounding: str = "stochastic"
    seed: int = 0

    def __post_init__(self) -> None:
        members = tuple(map(require_member, self.members))
        values = _as_coefficients(self.coefficients)
        _check_coefficients(values, len(members))
        _check_kinds(members)
        require_one_of("rounding", self.rounding, ROUNDINGS)
        seed = whole(self.seed)
        if seed is None or not 0 <= seed < 2**64:
            raise ConfigError(
                f"the rounding seed is {self.seed!r}; it is an integer from 0 to 2**64 - 1."
            )
        self.pull()
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "coefficients", tuple(values.tolist()))

    def pull(self) -> tuple[int, float]:
        """The core's number of the decay, 0 for none, and its strength."""
        if self.decay is None:
            return 0, 0.0
        if not isinstance(self.decay, AnchoredDecay):
            raise ConfigError(f"decay is {self.decay!r}; give such as AnchoredDecay('l2', 10.0).")
        alpha = real(self.alpha)
        if alpha is None or not alpha > 0:
            raise ConfigError(
                f"decay acts with alpha * lambda, and alpha is {self.alpha!r}; pass alpha=."
            )
        return _DECAY_NUMBERS[self.decay.kind], self.decay.strength(alpha)

    def record(self) -> dict[str, Any]:
        """Numbers and texts alone, as JSON holds them."""
        decay = None if self.decay is None else astuple(self.decay)
        members = [astuple(member) for member in self.members]
        return {**vars(self), "members": members, "decay": decay, "seed": int(self.seed)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Update:
        """The update of `record`."""
        members = [Member(*member) for member in record["members"]]
        decay = None if record["decay"] is None else AnchoredDecay(*record["decay"])
        return cls(**{**record, "members": members, "decay": decay})


def _as_coefficients(given: Sequence[float] | np.ndarray) -> np.ndarray:
    try:
        values = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's bfloat16, ragged, with a graph
        raise ConfigError(f"the coefficients are no numbers ({error}).") from None
    if values.dtype.kind not in "biuf":
        raise ConfigError(f"the coefficients are no numbers (numpy calls them {values.dtype}).")
    return values.astype(np.float64)


def _check_coefficients(values: np.ndarray, members: int) -> None:
    if values.shape != (members,):
        raise ConfigError(
            f"{members} members and coefficients of shape {values.shape} were given; give "
            "one coefficient a member."
        )
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32))
    if not finite.all():
        raise ConfigError(
            f"coefficient {int(np.argmin(finite))} is not a finite fp32 number; check the rewards "
            "before shaping them."
        )
    total = float(np.abs(values).sum())  # no sum of some of them, a pair's for one, is larger
    if not total <= _LARGEST:
        raise ConfigError(
            f"the magnitudes of the coefficients add up to {total:g}; expected at most "
            f"{_LARGEST:g}, since fp32 holds sums of them. Lower alpha, or scale the rewards."
        )


def _check_kinds(members: Sequence[Member]) -> None:
    kinds = sorted({member.noise for member in members})
    if len(kinds) > 1:
        raise ConfigError(f"one update got members of {' and '.join(kinds)} noise; use one kind.")
    if kinds == ["hadamard"] and len({member.seed for member in members}) > 1:
        raise ConfigError(
            "the Hadamard members of one update have different seeds; they share their "
            "generation's seed and differ in index. Update once a generation."
        )

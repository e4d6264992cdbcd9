"""What can be said of a set of changed weights from sums over its elements.

    norm ||d||_2, relative ||d|| / ||w||, rms ||d|| / sqrt(n), mean |d|, max |d|,   d = tuned - base
    sparsity: share with |d| < 1e-6 (arXiv 2601.20861), and with |d| <= n units in the last place

Sums are exact functions of the two models but for fp64 rounding of the additions; sets add up, so
groups, layers and the whole come from one pass. ulp(w), the spacing of w's dtype at |w|:

    2^(max(e, e_min) - p + 1), 2^e <= |w| < 2^(e + 1)      p = 24, 8, 11; e_min = -126, -126, -14
                                                           for float32, bfloat16, float16

so zeros and subnormal weights have the smallest spacing that there is. Below a power of two numbers
lie half as far apart: a step down from 1.0 is half an ulp(1.0).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch

THRESHOLDS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
ULPS = (0.5, 1, 2, 4, 8, 16)
# Precision with the hidden bit, and the smallest normal exponent (IEEE 754; bfloat16 is float32
# with 16 bits less).
_FORMATS = {torch.float32: (24, -126), torch.bfloat16: (8, -126), torch.float16: (11, -14)}


@dataclass(frozen=True)
class Change:
    """Sums over elements; `below` and `within_ulps` count those under each of THRESHOLDS, ULPS."""

    elements: int = 0
    squares: float = 0.0
    base_squares: float = 0.0
    total: float = 0.0
    absolute: float = 0.0
    largest: float = 0.0
    unchanged: int = 0
    below: tuple[int, ...] = (0,) * len(THRESHOLDS)
    within_ulps: tuple[int, ...] = (0,) * len(ULPS)

    def __add__(self, other: Change) -> Change:
        sums = {f.name: _added(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Change(**{**sums, "largest": max(self.largest, other.largest)})

    @property
    def norm(self) -> float:
        """L2 norm of the change."""
        return math.sqrt(self.squares)

    @property
    def relative_norm(self) -> float | None:
        """`norm` over the norm of the base; None where that is 0."""
        return math.sqrt(self.squares / self.base_squares) if self.base_squares else None

    def sparsity(self, threshold: float = 1e-6) -> float | None:
        """Share of elements with |delta| < `threshold`, one of THRESHOLDS; None of no elements."""
        return _share(self.below[THRESHOLDS.index(threshold)], self.elements)

    def record(self) -> dict[str, Any]:
        """Plain JSON values, as the head of this package lists them (CHANGE)."""
        count = self.elements
        return {
            "elements": count,
            "norm": self.norm,
            "relative_norm": self.relative_norm,
            "rms": math.sqrt(self.squares / count) if count else None,
            "mean": _share(self.total, count),
            "mean_abs": _share(self.absolute, count),
            "max_abs": self.largest,
            "unchanged": _share(self.unchanged, count),
            "below": [_share(n, count) for n in self.below],
            "within_ulps": [_share(n, count) for n in self.within_ulps],
        }


def added(changes: Iterable[Change]) -> Change:
    """The change of all elements together."""
    return reduce(add, changes, Change())


def change_of(base: torch.Tensor, delta: np.ndarray) -> Change:
    """The sums of one piece: `base` as it is stored, whose dtype gives the ulp, `delta` float64,
    both of one dimension."""
    size = np.abs(delta)
    plain = base.double().numpy()
    units = size * (1.0 / ulp(base))  # exact: a power of two
    return Change(
        elements=delta.size,
        squares=float(delta @ delta),
        base_squares=float(plain @ plain),
        total=float(delta.sum()),
        absolute=float(size.sum()),
        largest=float(size.max(initial=0.0)),
        unchanged=delta.size - int(np.count_nonzero(delta)),
        below=tuple(int(np.count_nonzero(size < limit)) for limit in THRESHOLDS),
        within_ulps=tuple(int(np.count_nonzero(units <= n)) for n in ULPS),
    )


def ulp(weights: torch.Tensor) -> np.ndarray:
    """The spacing of numbers of the dtype at each weight's magnitude; float64 of the same shape.

    Takes float32, bfloat16 and float16. Read from the exponent bits: frexp takes ten times as long.
    """
    precision, smallest = _FORMATS[weights.dtype]
    bits = weights.detach().cpu().float().numpy().view(np.uint32)  # float32 holds all three
    exponents = ((bits >> 23) & 0xFF).astype(np.int64) - 127  # of zeros and subnormals -127
    last_place = np.maximum(exponents, smallest) - (precision - 1)
    return ((last_place + 1023) << 52).view(np.float64)


def _added(a: Any, b: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(x + y for x, y in zip(a, b, strict=True))
    return a + b


def _share(count: float, elements: int) -> float | None:
    return count / elements if elements else None

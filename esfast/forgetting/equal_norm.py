"""The base moved by a given length along some direction: is it the length of a change that makes a
model forget, or where it points?

    tuned' = base + s d,   s such that ||tuned' - base|| = norm, in all or tensor by tensor

d is the change of a fine-tune (`Difference`), or Gaussian noise (`RandomDirection`, the noise of a
member, docs/noise.md). Directions are read tensor by tensor; what is held is the model that is
moved and one tensor in fp32. Give an fp32 model: in it the length is met to 1e-6; rounding to
16 bits adds a length of its own, which is measured and made up for as far as that goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from esfast.errors import ConfigError
from esfast.forgetting.drift import Tensors, tensors_of
from esfast.members import Member, noise

# The length after rounding differs from the one asked for; a correction brings fp32 to 1e-7.
_CORRECTIONS = 4
_CLOSE = 1e-7


class Difference(Mapping[str, torch.Tensor]):
    """tuned - base in fp32, tensor by tensor when it is asked for."""

    def __init__(self, base: Tensors, tuned: Tensors) -> None:
        self._base, self._tuned = base, tuned

    def __getitem__(self, name: str) -> torch.Tensor:
        before = self._base[name].detach().float().cpu()
        return self._tuned[name].detach().float().cpu() - before

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._base if name in self._tuned)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class RandomDirection(Mapping[str, torch.Tensor]):
    """Standard normal noise of the shapes of `base`, the same for a seed on every machine."""

    def __init__(self, base: Tensors, seed: int) -> None:
        self._base, self._member = base, Member(seed)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(noise(self._member, name, tuple(self._base[name].shape)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


@dataclass(frozen=True)
class Moved:
    """What `move` did: the measured length of the change, and the factor on the direction (None
    where every tensor has its own)."""

    norm: float
    scale: float | None


def put(module: torch.nn.Module, tensors: Tensors) -> None:
    """Copies tensors into a module's parameters of the same canonical names, rounded to nearest."""
    for name, parameter in tensors_of(module).items():
        parameter.detach().copy_(tensors[name].detach())


def move(
    module: torch.nn.Module, base: Tensors, direction: Tensors, norm: float | Mapping[str, float]
) -> Moved:
    """Makes `module` the base moved by `norm` along `direction`.

    norm: of the whole change, or of each tensor's by name. Raises ConfigError for a direction of
    no length; the module is then as it was.
    """
    live = tensors_of(module)
    lengths = {name: _length(direction[name]) for name in live}
    total = math.sqrt(sum(length * length for length in lengths.values()))
    if not (total > 0.0 and math.isfinite(total)):
        raise ConfigError(
            f"a change of length {total} has no direction to move along; compare runs and "
            "generations that changed the weights."
        )
    by_tensor = isinstance(norm, Mapping)
    wanted = norm if isinstance(norm, Mapping) else {"": norm}
    scales = {
        name: (_over(wanted[name], lengths[name]) if by_tensor else _over(wanted[""], total))
        for name in live
    }
    for _ in range(_CORRECTIONS):
        measured = {
            name: _place(live[name], base[name], direction[name], scales[name]) for name in live
        }
        whole = math.sqrt(sum(length * length for length in measured.values()))
        seen = measured if by_tensor else {"": whole}
        factors = {part: _over(wanted[part], seen[part]) for part in seen if seen[part] > 0.0}
        if all(abs(factor - 1.0) < _CLOSE for factor in factors.values()):
            break
        scales = {n: s * factors.get(n if by_tensor else "", 1.0) for n, s in scales.items()}
    return Moved(whole, None if by_tensor else next(iter(scales.values())))


def _place(
    parameter: torch.Tensor, base: torch.Tensor, direction: torch.Tensor, scale: float
) -> float:
    """Writes base + scale * direction; returns the length of what it moved by, after rounding."""
    before = base.detach().float().cpu()
    parameter.detach().copy_(torch.add(before, direction.float().cpu(), alpha=scale))
    return _length(parameter.detach().float().cpu() - before)


def _length(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().cpu(), dtype=torch.float64))


def _over(wanted: float, seen: float) -> float:
    return wanted / seen if seen > 0.0 else 0.0

"""drift(base, tuned): norms, sparsity and energy of a change, by layer and module group.

Both models are read tensor by tensor in pieces of a few megabytes and summed in fp64; neither is
copied. `CheckpointTensors` maps a Hugging Face folder's safetensors, so a base on disk takes no
memory of its own but the page cache's.

Tied weights count once. Weights that only one of the models has are an error, but for an output
matrix that the other ties to its embeddings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from esfast.checkpoint import weight_files
from esfast.errors import DataError
from esfast.forgetting.change import Change, added, change_of
from esfast.forgetting.energy import Energy
from esfast.forgetting.groups import GROUPS, group_of, layer_of
from esfast.parameters import ParameterTable

# 2^18 elements are 2 MB in fp64, so that the passes over a piece stay in the second-level cache.
PIECE = 1 << 18
TIED = ("lm_head.weight",)
Tensors = Mapping[str, torch.Tensor]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class TensorDrift:
    """The change of one tensor. layer: None outside the layers; group: one of GROUPS."""

    name: str
    layer: int | None
    group: str
    change: Change


@dataclass(frozen=True)
class DriftReport:
    """The change of a model; dtype: of most of its weights, whose spacing is the ulp."""

    dtype: str
    tensors: tuple[TensorDrift, ...]
    energies: Mapping[str, Energy]  # a group

    @property
    def whole(self) -> Change:
        """All weights together."""
        return added(tensor.change for tensor in self.tensors)

    @property
    def groups(self) -> dict[str, Change]:
        """By module group, in the order of GROUPS; only those that the model has."""
        sums = self._by(lambda tensor: tensor.group)
        return {group: sums[group] for group in GROUPS if group in sums}

    @property
    def layers(self) -> dict[int, Change]:
        """By layer, rising; what lies outside the layers is left out."""
        sums = self._by(lambda tensor: tensor.layer)
        return {layer: sums[layer] for layer in sorted(n for n in sums if n is not None)}

    @property
    def cells(self) -> dict[tuple[int | None, str], Change]:
        """By layer and group; layer None holds embeddings and the last norm."""
        return self._by(lambda tensor: (tensor.layer, tensor.group))

    @property
    def energy(self) -> Energy:
        """Of the whole change."""
        whole = Energy()
        for part in self.energies.values():
            whole.merge(part)
        return whole

    def _by(self, key: Callable[[TensorDrift], Key]) -> dict[Key, Change]:
        parts: defaultdict[Key, list[Change]] = defaultdict(list)
        for tensor in self.tensors:
            parts[key(tensor)].append(tensor.change)
        return {name: added(changes) for name, changes in parts.items()}

    def record(self) -> dict[str, Any]:
        """Plain JSON values: DRIFT of the package's head, without generation and checksum."""
        return {
            "whole": self.whole.record(),
            "groups": {group: change.record() for group, change in self.groups.items()},
            "layers": {str(layer): change.record() for layer, change in self.layers.items()},
            "cells": [
                {"layer": layer, "group": group, **change.record()}
                for (layer, group), change in self.cells.items()
            ],
            "energy": {
                "whole": self.energy.record(),
                "groups": {group: part.record() for group, part in self.energies.items()},
            },
        }


def drift(
    base: Tensors | torch.nn.Module | ParameterTable,
    tuned: Tensors | torch.nn.Module | ParameterTable,
    *,
    dtype: torch.dtype | None = None,
    after: Callable[[int], None] = lambda elements: None,
) -> DriftReport:
    """What `tuned` changed of `base`: modules, whole-tensor tables, or tensors by canonical name.

    dtype: both are rounded to it first (nearest even), as if they were stored in it; None compares
    the values as they are. The ulp is the (rounded) base's. after: called with the elements done.
    Raises DataError for weights that are not in both, differ in shape, or are not finite.
    """
    ours, theirs = tensors_of(base), tensors_of(tuned)
    found: list[TensorDrift] = []
    energies: dict[str, Energy] = {}
    elements = 0
    for name in _shared_names(ours, theirs):
        before, now = ours[name], theirs[name]
        energy = energies.setdefault(group_of(name), Energy())
        change = _tensor_change(name, before, now, dtype, energy)
        found.append(TensorDrift(name, layer_of(name), group_of(name), change))
        elements += change.elements
        after(elements)
    stored = dtype or _usual_dtype(found, ours)
    ordered = {group: energies[group] for group in GROUPS if group in energies}
    return DriftReport(str(stored).removeprefix("torch."), tuple(found), ordered)


def tensors_of(model: Tensors | torch.nn.Module | ParameterTable) -> Tensors:
    """Whole canonical tensors by name, not copied; a module's parameters, tied ones once."""
    if isinstance(model, torch.nn.Module):
        model = ParameterTable.from_module(model)
    if not isinstance(model, ParameterTable):
        return model
    for segment in model.segments:
        if tuple(segment.tensor.shape) != tuple(segment.shape):
            raise DataError(
                f"'{segment.name}' is a part of a tensor (a shard or a fused one); drift takes "
                "whole tensors: give the tensors of a checkpoint, or the model itself."
            )
    return {segment.name: segment.tensor for segment in model.segments}


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """The tensors of safetensors files, each mapped when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        """A file, or a Hugging Face folder (sharded or not). DataError for a damaged one."""
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        for file in weight_files(self.path):
            try:
                opened: Any = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"'{file}' cannot be read as safetensors ({error}); save or copy it again."
                ) from None
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _shared_names(base: Tensors, tuned: Tensors) -> list[str]:
    names = sorted(set(base) & set(tuned))  # one order of sums for a model and its files
    apart = sorted((set(base) ^ set(tuned)) - set(TIED))
    if not names or apart:
        example = f"'{apart[0]}'" if apart else "everything"
        side = "the base" if apart and apart[0] in base else "the tuned model"
        raise DataError(
            f"the two models do not have the same weights: {example} is in {side} alone "
            f"({len(apart)} of {len(set(base) | set(tuned))} names are). Give the model that the "
            "fine-tune started from; merge an adapter into its base first."
        )
    return names


def _tensor_change(
    name: str, base: torch.Tensor, tuned: torch.Tensor, dtype: torch.dtype | None, energy: Energy
) -> Change:
    if base.shape != tuned.shape:
        raise DataError(
            f"'{name}' has shape {tuple(base.shape)} in the base and {tuple(tuned.shape)} in the "
            "tuned model; give the model that the fine-tune started from."
        )
    before, now = base.detach().reshape(-1), tuned.detach().reshape(-1)
    parts = []
    for start in range(0, max(before.numel(), 1), PIECE):
        part, moved = (_rounded(t[start : start + PIECE], dtype) for t in (before, now))
        delta = moved.double().numpy() - part.double().numpy()
        if not np.isfinite(delta @ delta):
            raise DataError(
                f"'{name}' holds values that are not finite in one of the two models; nothing can "
                "be said of their difference. Train again with a smaller step, or in float32."
            )
        energy.add(delta)
        parts.append(change_of(part, delta))
    return added(parts)


def _rounded(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    plain = tensor.cpu()
    return plain if dtype is None else plain.to(dtype)


def _usual_dtype(found: list[TensorDrift], base: Tensors) -> torch.dtype:
    counts: defaultdict[torch.dtype, int] = defaultdict(int)
    for tensor in found:
        counts[base[tensor.name].dtype] += tensor.change.elements
    return max(counts, key=counts.__getitem__)

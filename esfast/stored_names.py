"""A module's parameters as its checkpoint names, shapes and cuts them.

transformers 5 holds the experts of a layer in one tensor (`mlp.experts.gate_up_proj`) that its
checkpoints store one by one, and renames others; `save_pretrained` turns that back. The same
turning back is run here over stand-ins without memory, so that what comes out as a view of one
tells where in the live parameter a stored tensor lies. Nothing is copied.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esfast.errors import ParameterError

# Operators whose result has the same values in another place or type. In inference mode the first
# two arrive as they are called, elsewhere as the other two.
MOVES = ("aten::contiguous", "aten::to", "aten::clone", "aten::_to_copy")


class _InPlaceOfCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A copy of a stand-in is the stand-in: same elements, and where they come from stays known."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        if func._schema.name in MOVES and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


COMPILED = "_orig_mod."  # in the names of parameters below a part that torch.compile wraps


@dataclass(frozen=True)
class Computed:
    """In the place of a stored tensor that is no part of one live parameter."""

    shape: tuple[int, ...]


def require_live(stored: Mapping[str, torch.Tensor | Computed]) -> dict[str, torch.Tensor]:
    """The tensors, if all are live; ParameterError for one that the model holds only regrouped."""
    live = {name: tensor for name, tensor in stored.items() if not isinstance(tensor, Computed)}
    for name in stored.keys() - live.keys():
        raise ParameterError(
            f"'{name}' of shape {tuple(stored[name].shape)} is how the checkpoint stores weights "
            "that the model holds regrouped, so its elements cannot be found in the live model. "
            "Exclude it with exclude=[...], or give what to edit to ParameterTable.from_tensors."
        )
    return live


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch.compile's, DataParallel's or DistributedDataParallel's."""
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        inner = (
            module.module if isinstance(module, parallel) else getattr(module, "_orig_mod", None)
        )
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def stored_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor | Computed]:
    """Checkpoint name -> the live elements, whole parameters themselves where they are stored so.

    A module that is no model of transformers 5 has the names of `named_parameters`; tied weights
    come once. What torch.compile and DataParallel wrap has the names that it has without them.
    """
    module = unwrapped(module)
    live: dict[str, torch.Tensor] = {
        name.replace(COMPILED, ""): parameter for name, parameter in module.named_parameters()
    }
    revert = _reverting(module)
    if revert is None:
        return dict(live)
    stand_ins = {
        name: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
        for name, p in live.items()
    }
    owners = {storage_of(stand_in): name for name, stand_in in stand_ins.items()}
    with torch.no_grad(), _InPlaceOfCopies():  # type: ignore[no-untyped-call]
        stored = revert(module, dict(stand_ins))
    found = {name: _live(view, owners, live) for name, view in stored.items()}
    as_held = found.keys() == live.keys() and all(found[name] is live[name] for name in live)
    return dict(live) if as_held else found


def _reverting(module: torch.nn.Module) -> Any:
    """What `save_pretrained` turns names back with; None for other modules and older versions."""
    if not any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
        return None
    loading = sys.modules.get("transformers.core_model_loading")
    return getattr(loading, "revert_weight_conversion", None)


def storage_of(tensor: torch.Tensor) -> int:
    """By which a stand-in without memory, and every view of it, is known."""
    return int(tensor.untyped_storage()._cdata)


def _live(
    view: torch.Tensor, owners: dict[int, str], live: dict[str, torch.Tensor]
) -> torch.Tensor | Computed:
    owner = owners.get(storage_of(view))
    if owner is None:
        return Computed(tuple(view.shape))
    parameter = live[owner]
    if view.shape == parameter.shape and view.stride() == parameter.stride():
        return parameter
    offset = parameter.storage_offset() + view.storage_offset()
    return parameter.detach().as_strided(view.shape, view.stride(), offset)

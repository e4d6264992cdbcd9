"""Whether tensors still lie where they lay when a table was made of them.

The core edits addresses. A tensor whose memory was given up since (`resize_`, a storage resized as
sharding libraries do) would be edited where something else lies now; one that a module has replaced
(`load_state_dict(assign=True)`, another Parameter or layer, `.data = ...`) would be edited where
nobody reads. Both are found by comparing addresses, half a microsecond a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from esfast.errors import StateError

Slot = tuple[str, dict[str, torch.nn.Parameter | None], str, torch.nn.Parameter]
"""Name, the module's dict, the key in it, and what was there."""
Link = tuple[dict[str, torch.nn.Module | None], str, torch.nn.Module]
"""A module's dict of its parts, the key in it, and what was there."""


class HeldTensors:
    """Tensors by name, kept alive, with their places as they were."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._held: list[tuple[str, torch.Tensor, torch.Tensor, tuple[object, ...]]] = []
        self._memory: list[tuple[str, torch.Tensor, int, int]] = []
        self._module: torch.nn.Module | None = None
        self._slots: list[Slot] = []
        self._links: list[Link] = []
        for name, tensor in tensors:
            self._hold(name, tensor)

    def _hold(self, name: str, tensor: torch.Tensor) -> None:
        owner = tensor.detach()  # another tensor over the storage: `.data = ...` leaves it alone
        self._held.append((name, tensor, owner, _place(tensor)))
        size = owner.untyped_storage().nbytes()
        self._memory.append((name, owner, owner.data_ptr(), size))

    def hold_module(self, module: torch.nn.Module) -> None:
        """Also the module's parameters that share a storage with what is held, where they hang."""
        self._module = module
        storages = {_storage(owner) for _, _, owner, _ in self._held}
        known = {id(tensor) for _, tensor, _, _ in self._held}
        for prefix, part in module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                continue  # its parameters and parts are TorchScript's
            parts = part._modules.items()
            self._links += [(part._modules, key, p) for key, p in parts if p is not None]
            for key, parameter in part._parameters.items():
                if parameter is None or _storage(parameter) not in storages:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                self._slots.append((name, part._parameters, key, parameter))
                if id(parameter) not in known:
                    known.add(id(parameter))
                    self._hold(name, parameter)

    def check_in_place(self) -> None:
        """StateError where a tensor has another storage, dtype, shape or layout than when it was
        taken, or where the module has another parameter in its place."""
        self.check_memory()
        for name, now, _, place in self._held:
            if _place(now) != place:
                raise _moved(name)
        for name, parameters, key, parameter in self._slots:
            if parameters.get(key) is not parameter:
                raise _moved(name)
        if any(parts.get(key) is not part for parts, key, part in self._links):
            self._check_parts()

    def _check_parts(self) -> None:
        """A part was replaced: fine where the new one has the parameters (an adapter around it)."""
        assert self._module is not None
        live = {id(parameter) for parameter in self._module.parameters()}
        for name, _, _, parameter in self._slots:
            if id(parameter) not in live:
                raise _moved(name)

    def check_memory(self) -> None:
        """StateError where memory was given up, so that an edit would fall on somebody else's."""
        for name, owner, address, size in self._memory:
            if owner.data_ptr() != address or owner.untyped_storage().nbytes() < size:
                raise StateError(
                    f"the memory of '{name}' was given up after its table was made (its tensor or "
                    "storage was resized), and nothing there can be edited or restored. Load the "
                    "weights again, and make the table anew."
                )


def _storage(tensor: torch.Tensor) -> int | None:
    """Its address; None where there is none (sparse, lazy, or a subclass that wraps others)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):
        return None


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _moved(name: str) -> StateError:
    return StateError(
        f"'{name}' was moved or cast after its table was made (or reshaped, or replaced), so that "
        "an edit would not reach the model. Make the table (and what was built on it) after "
        "model.to(...) or load_state_dict(assign=True)."
    )

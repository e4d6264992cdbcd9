"""Keys and values of the tokens seen so far, in buffers that are sized once.

transformers' `DynamicCache` concatenates: every decoded token copies the whole cache of its layer.
Here a layer gets room for the prompt and the new tokens at the first update and writes in place.
Layers that are not plain full attention (sliding windows, recurrent states) stay transformers' own.

`share` lets many rows start from one row's tokens: the common beginning of a set of prompts is
computed once, and copied to every row.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, `[rows, heads, capacity, head_dim]`; `length` are in use.

    A layer that is full grows by half: many new tokens cost memory only once they are there.
    """

    keys: Any
    values: Any

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the rows, heads and sizes of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._refill(key_states[:, :, :0], value_states[:, :, :0], key_states.shape[0])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens; views of all keys and values so far come back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            self.capacity = max(end, self.capacity * 3 // 2)
            self._refill(*self._used(), self.keys.shape[0])
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self._used()

    def get_seq_length(self) -> int:
        """How many tokens a row holds, padding included."""
        return self.length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        keys, values = (states.index_select(0, indices) for states in self._used())
        self._refill(keys, values, indices.numel())

    def spread(self, rows: int, capacity: int) -> RoomyLayer:
        """A new layer of `rows` rows that all start with this layer's only row."""
        wide = RoomyLayer(capacity)
        wide.dtype, wide.device, wide.length = self.dtype, self.device, self.length
        wide._refill(*self._used(), rows)
        wide.is_initialized = True
        return wide

    def _used(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _refill(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> None:
        """New buffers of `rows` rows that begin with these states (of `rows` rows or one)."""
        self.keys = keys.new_empty(rows, keys.shape[1], self.capacity, keys.shape[3])
        self.values = values.new_empty(rows, values.shape[1], self.capacity, values.shape[3])
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : values.shape[2]] = values


def new_cache(config: Any, capacity: int) -> Cache:
    """An empty cache for a model of this `config`, with room for `capacity` tokens a row."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(capacity) if _is_plain(layer) else layer for layer in cache.layers]
    return cache


def can_share(model: Any) -> bool:
    """Whether rows may start from a shared prefix followed by padding.

    Masks hide the padding from attention; a sliding window would count it and a recurrent state
    would take it in, so only models whose every layer is plain full attention share. So would a
    model that is not told its positions (MPT), or has a window that its cache does not show
    (GPT-Neo).
    """
    layers = DynamicCache(config=model.config).layers
    local = "local" in (getattr(model.config, "attention_layers", None) or ())
    told = "position_ids" in signature(model.forward).parameters
    return bool(layers) and all(map(_is_plain, layers)) and told and not local


def keep_rows(cache: Cache, rows: torch.Tensor) -> None:
    """These rows only. Layers with a recurrent state can only be told to reorder: selecting is not
    there, or (Falcon-H1) forgets the state."""
    layers: list[Any] = cache.layers
    for layer in layers:
        plain = isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states")
        (layer.batch_select_indices if plain else layer.reorder_cache)(rows)


def share(prefix: Cache, rows: int, capacity: int) -> Cache:
    """A cache of `rows` rows that each begin with the one row of `prefix`, which stays as it is."""
    layers: list[Any] = prefix.layers
    return Cache(layers=[layer.spread(rows, capacity) for layer in layers])


def _is_plain(layer: Any) -> bool:
    """Exactly the full-attention layer: its subclasses hold more than keys and values."""
    return type(layer) is DynamicLayer

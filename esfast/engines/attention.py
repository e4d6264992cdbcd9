"""Attention for short rows on a CPU.

torch's fused CPU kernel is made for long sequences: at 32 rows, 19 queries and 45 keys in bfloat16
it takes 1.9 ms a layer, two plain matrix products 0.6 ms (one Zen 5 core, SmolLM2-135M's heads),
and the model library repeats the shared key heads before it. Here the query heads of one key head
are folded into the rows of one product:

    out = softmax(scale * Q K^T + mask) V        Q: [rows, key_heads, group * queries, head_dim]

The arithmetic is that of transformers' own "eager" attention: products in the model's dtype,
softmax in fp32; a single query is computed in fp32 throughout. Long sequences are handed to the
fused kernel.
Not promised: the same bits as another implementation. The same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "esfast_short_rows"
# Scores held at once: 2^18 fp32 are 1 MB, which stays in the second-level cache. With all 32 rows
# of 100 queries and 300 keys at once the same work takes 42 ms instead of 13.
SCORES_AT_ONCE = 1 << 18
# Above this many scores a row the fused kernel is as fast (1000 queries and keys: 104 ms, 112).
LONGEST_ROW = 1 << 22
# A single query over more keys than this is as fast in the fused kernel (300 keys: 0.87 ms, 0.88).
MOST_KEYS_OF_ONE_QUERY = 256


@contextmanager
def short_row_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` with this attention where it can; its configuration is as before afterwards."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before != "sdpa" or model.device.type != "cpu" or not model._supports_attention_backend:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    `query` [rows, heads, queries, head_dim], `key` and `value` [rows, key_heads, keys, head_dim],
    `attention_mask` [rows or 1, 1, queries, keys], added to the scores. Returns
    [rows, queries, heads, head_dim].
    """
    if _is_long(query, key) or kwargs.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out, None
    rows, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    scale = head_dim**-0.5 if scaling is None else scaling
    folded = (query * scale).reshape(rows, key.shape[1], group * queries, head_dim)
    if queries == 1:
        out = _weigh(folded.float(), key.float(), value.float(), attention_mask).to(query.dtype)
    else:
        out = _weigh_in_parts(folded, key, value, attention_mask)
    return out.view(rows, heads, queries, value.shape[3]).transpose(1, 2), None


def _is_long(query: torch.Tensor, key: torch.Tensor) -> bool:
    if query.shape[2] == 1:
        return key.shape[2] > MOST_KEYS_OF_ONE_QUERY
    return query.shape[1] * query.shape[2] * key.shape[2] > LONGEST_ROW


def _weigh_in_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`_weigh` for as many rows at a time as keep the scores in the cache."""
    scores_a_row = query.shape[1] * query.shape[2] * key.shape[2]
    step = max(1, SCORES_AT_ONCE // scores_a_row)
    if step >= query.shape[0]:
        return _weigh(query, key, value, mask)
    parts = []
    for at in range(0, query.shape[0], step):
        here = slice(at, at + step)
        here_mask = mask if mask is None or mask.shape[0] == 1 else mask[here]
        parts.append(_weigh(query[here], key[here], value[here], here_mask))
    return torch.cat(parts)


def _weigh(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(query key^T + mask) value; `query` is scaled, its third axis is group * queries."""
    scores = torch.matmul(query, key.transpose(-1, -2))
    if mask is not None:
        rows, key_heads, folded, keys = scores.shape
        queries = mask.shape[2]
        scores.view(rows, key_heads, folded // queries, queries, keys).add_(mask[:, :, None])
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)

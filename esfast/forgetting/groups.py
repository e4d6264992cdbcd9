"""Which layer and which part of a transformer a tensor belongs to, from its name alone.

The six groups are those that papers on forgetting compare (arXiv 2601.20861 draws sparsity by layer
and module group): fused projections (qkv_proj, c_attn, query_key_value) are attention_qkv whole, a
norm inside attention (q_norm) is a norm, experts and their router are mlp, position tables and the
output matrix are embeddings. What no pattern knows (adapters, convolutions of state-space layers,
vision towers) is "other": shown, never dropped.
"""

from __future__ import annotations

import re

GROUPS = ("attention_qkv", "attention_output", "mlp", "norms", "embeddings", "other")

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
# A part of a multimodal model that is no layer of its language model.
_ELSEWHERE = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|image\w*|multi_modal\w*)\.")
# In order: norms sit inside attention and MLP modules, and an output is told from q, k, v by name.
_PATTERNS = (
    ("norms", re.compile(r"norm|(?:^|\.)ln_|layer_?norm", re.IGNORECASE)),
    (
        "embeddings",
        re.compile(r"(?:^|\.)(?:\w*embed\w*|lm_head|wte|wpe|output_projection)(?:\.|$)"),
    ),
    ("mlp", re.compile(r"(?:^|\.)(?:\w*mlp|\w*moe|experts?|feed_forward|ffn|fc1|fc2)(?:\.|$)")),
    (
        "attention_output",
        re.compile(r"att\w*\.(?:o_proj|out_proj|c_proj|dense|wo|out_lin|output)(?:\.|$)"),
    ),
    (
        "attention_qkv",
        re.compile(
            r"att\w*\.(?:[qkv]_\w*|q|k|v|w[qkv]|query|key|value|qkv\w*|kv_\w*|c_attn"
            r"|query_key_value|in_proj\w*|W_pack)(?:\.|$)"
        ),
    ),
)


def group_of(name: str) -> str:
    """One of GROUPS for a canonical tensor name."""
    if _ELSEWHERE.search(name):
        return "other"
    return next((group for group, pattern in _PATTERNS if pattern.search(name)), "other")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor lies in; None outside them (embeddings, last norm)."""
    found = None if _ELSEWHERE.search(name) else _LAYER.search(name)
    return int(found[1]) if found else None

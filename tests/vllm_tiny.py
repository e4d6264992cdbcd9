"""A tiny random Llama for vLLM, engines over it, and what they say.

Heads of 32 are the smallest that vLLM's attention takes on a CPU. A block of its prefix cache there
holds 128 tokens, so prompts that are to share one begin alike for longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import byte_tokenizer, llama

from esfast.engines.base import Sampling

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
OPTIONS = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 27}
LONG = "A beginning that all of the prompts share, longer than two blocks of vLLM's cache. " * 4
PROMPTS = [f"{LONG}And number {n}." for n in range(4)]
SHORT = Sampling(6)


def save_tiny(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    llama(**{**SIZES, **changes}).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def start(folder: Path, **settings: Any) -> Any:
    """A VLLMEngine; `options` are added to those of the tests."""
    from esfast.engines.vllm import VLLMEngine

    options = {**OPTIONS, **settings.pop("options", {})}
    return VLLMEngine(folder, threads=1, options=options, **settings)


def told(engine: Any, prompts: Sequence[str] = PROMPTS, sampling: Sampling = SHORT) -> list[Any]:
    """The tokens that an engine answers with."""
    return [completion.ids for completion in engine.generate(prompts, sampling)]

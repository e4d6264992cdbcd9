"""Tiny random models for vLLM, engines over it, and what they say.

Heads of 32 are the smallest that vLLM's attention takes on a CPU. A block of its prefix cache there
holds 128 tokens, so prompts that are to share one begin alike for longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import save, sharpen

from esfast import ParameterTable, Weights
from esfast.engines.base import Sampling
from esfast.models import load_model

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
OPTIONS = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 27}
LONG = "A beginning that all of the prompts share, longer than two blocks of vLLM's cache. " * 4
PROMPTS = [f"{LONG}And number {n}." for n in range(4)]
SHORT = Sampling(6)


def save_tiny(folder: Path, kind: str = "Llama", **changes: Any) -> Path:
    """A random model of 16-bit weights with large matrices, so that answers depend on prompts."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=259, **{**SIZES, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    save(sharpen(model).to(torch.bfloat16), folder)
    return folder


def start(folder: Path, **settings: Any) -> Any:
    """A VLLMEngine; `options` are added to those of the tests."""
    from esfast.engines.vllm import VLLMEngine

    options = {**OPTIONS, **settings.pop("options", {})}
    return VLLMEngine(folder, threads=1, options=options, **settings)


def told(engine: Any, prompts: Sequence[str] = PROMPTS, sampling: Sampling = SHORT) -> list[Any]:
    """The tokens that an engine answers with."""
    return [completion.ids for completion in engine.generate(prompts, sampling)]


def checksum_of(folder: Path) -> str:
    """Of a saved model's weights, as transformers loads them."""
    return Weights(ParameterTable.from_module(load_model(folder).model)).checksum()

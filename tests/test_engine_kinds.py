"""Models that are not plain full attention: the tokens of transformers' own generate, or a refusal.

Recurrent states and batches that shrink, positions that count a cache's slots, and models that keep
what they have seen elsewhere. Random weights, float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine import PROMPTS, expected
from tiny_models import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from esfast import ConfigError
from esfast.engines import Sampling
from esfast.engines.transformers import TransformersEngine

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 512}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {**SIZES, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
                  "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    "gpt_neo": {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "window_size": 16,
                "attention_types": [[["global", "local"], 2]], "intermediate_size": 96},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512},
}  # fmt: skip


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=259, **special, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)  # so that answers depend on the prompt
    model.generation_config.eos_token_id = [2, *range(3, 259, 9)]  # rows end at different steps
    return model


@pytest.mark.parametrize("share", [True, False], ids=["prefix", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_generate(kind: str, share: bool) -> None:
    model, tokenizer = model_of(kind), byte_tokenizer()
    engine = TransformersEngine(model, tokenizer, share_prefix=share)
    answers = engine.generate(PROMPTS, Sampling(12))
    assert answers == expected(model, tokenizer, PROMPTS, 12)
    assert len({answer.ids for answer in answers}) > 2


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma"])
def test_what_keeps_its_history_elsewhere_is_refused(kind: str) -> None:
    config = AutoConfig.for_model(kind, vocab_size=259, hidden_size=32, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=rf"{type(model).__name__} does not take the tokens"):
        TransformersEngine(model, byte_tokenizer())

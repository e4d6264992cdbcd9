"""Tiny random models of several families, and vLLM's models of them as one rank of many holds them.

One process stands for every rank in turn: vLLM reads its rank and the number of ranks from the
tensor-parallel group, which is told them here. Nothing is generated, so the ranks need not talk.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

# Eight query heads over two key heads: replicated at 4 and 8 ranks. 150 tokens pad to 192.
SIZES = {"vocab_size": 150, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 8, "num_key_value_heads": 2,
         "max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 8}),
    "gemma3": ("Gemma3", {"head_dim": 8}),
    "phi3-stored-fused": ("Phi3", {"pad_token_id": 0}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 8,
                               "num_experts_per_tok": 2}),
}  # fmt: skip


def save_family(family: str, folder: Path) -> Any:
    """A random bfloat16 model of transformers, saved to `folder`; zeros become random too."""
    kind, changes = FAMILIES[family]
    config_kind = "Gemma3Text" if kind == "Gemma3" else kind
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return model


def engine_config(folder: Path) -> Any:
    """vLLM's configuration for a model folder, with its (single-process) groups made."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True
    )
    config = arguments.create_engine_config()
    if not parallel_state.model_parallel_is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        with set_current_vllm_config(config):
            parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
            parallel_state.ensure_model_parallel_initialized(1, 1)
    return config


@contextmanager
def rank_of(config: Any, rank: int, ranks: int) -> Iterator[None]:
    """vLLM's layers made inside believe to be `rank` of `ranks`."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    group = parallel_state.get_tp_group()
    experts, parallel_state._EP = parallel_state._EP, parallel_state._EP or group
    group.world_size, group.rank_in_group = ranks, rank
    config.parallel_config.tensor_parallel_size = ranks
    config.compilation_config.static_forward_context.clear()  # layers register there by name
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config):
            yield
    finally:
        torch.set_default_dtype(before)
        group.world_size, group.rank_in_group = 1, 0
        parallel_state._EP = experts


def loaded_by_vllm(config: Any, folder: Path, rank: int, ranks: int) -> torch.nn.Module:
    """vLLM's model as `rank` of `ranks` holds it, loaded by vLLM."""
    from vllm.model_executor.model_loader.utils import initialize_model

    with rank_of(config, rank, ranks):
        model = initialize_model(config, model_config=config.model_config)
        model.load_weights(load_file(folder / "model.safetensors").items())
    return model

"""Small random language models and a byte tokenizer, made in memory: nothing is downloaded.

Llama with grouped key heads, Mistral with a sliding window and GPT-2 with learned positions; all in
float32, so that greedy tokens do not depend on the order of sums.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, BEGIN, END = "<pad>", "<begin>", "<end>"
TEMPLATE = (
    "{% for m in messages %}{{ '<begin>' + m['role'] + '\n' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<begin>assistant\n' }}{% endif %}"
)
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte and three special ones: 259 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([PAD, BEGIN, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END
    )
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def llama(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random Llama of 259 tokens; `changes` go to its configuration."""
    torch.manual_seed(seed)
    return sharpen(LlamaForCausalLM(LlamaConfig(vocab_size=259, **{**SIZES, **changes})))


def mistral(seed: int = 0, window: int = 16) -> PreTrainedModel:
    """A random Mistral that looks `window` tokens back."""
    torch.manual_seed(seed)
    config = MistralConfig(vocab_size=259, sliding_window=window, **SIZES)
    return sharpen(MistralForCausalLM(config))


def gpt2(seed: int = 0) -> PreTrainedModel:
    """A random GPT-2: learned positions, no grouped heads."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=259, n_embd=48, n_layer=2, n_head=4, n_positions=512,
                        bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return sharpen(GPT2LMHeadModel(config))


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """As a checkpoint lies, with a tokenizer of bytes."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Larger matrices than the usual 0.02, so that answers depend on the prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.eval()

"""SmolLM2's GGUF to a Hugging Face folder in bfloat16: `python -m esfast.conversion FILE FOLDER`.

A process of its own: dequantising takes 0.92 GB for a moment, which should not count as the
caller's peak, and the library talks while it works. Three things are put right on the way: the
quantisation is undone for good (else the model cannot be saved), the end and padding tokens are
set, and digits are split one by one again (the format has no place for that pre-tokenizer).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

END_OF_TURN = 2  # <|im_end|>, which also pads
CONTEXT = 8192


def convert(source: Path, folder: Path) -> None:
    """Read the GGUF file `source`; write configuration, weights and tokenizer into `folder`."""
    tokenizer = _tokenizer(source)
    model = _model(source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model(source: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = END_OF_TURN
    model.generation_config._from_model_config = False
    model.config.rms_norm_eps = 1e-5  # the file's is this number's float32
    model.config.__dict__.pop("_model_name_or_path", None)  # a title that the file carries
    return model


def _tokenizer(source: Path) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    return tokenizer


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

"""What of a model and of vLLM's own arguments is refused by name, before vLLM starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esfast.errors import ConfigError

_QUANTISED = "quantization_config"
_GIVEN = {  # of vLLM's arguments: what says it here, and is written down of a run
    "model": "--model",
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
}
_OWN = {  # and what it has to be, or what goes wrong
    "tokenizer": "it is the model's",
    "trust_remote_code": "code of a model's folder is never run",
    "enable_prefix_caching": "it is on, and emptied whenever the weights change",
    "worker_extension_cls": "edits of the weights go through its own",
    "additional_config": "its own workers are told by it",
    "generation_config": "answers end and are drawn as in the other engine",
    "seed": "sampled tokens are drawn by seeds of the run (--seed)",
    "use_tqdm_on_load": "it is off",
}
_ALONE = ("pipeline_parallel_size", "data_parallel_size")  # what vLLM spreads otherwise


def require_options(options: Mapping[str, Any], batch_size: int | None) -> None:
    """ConfigError for an argument of vLLM's that esfast gives itself, or is given twice."""
    if batch_size is not None and "max_num_seqs" in options:
        raise ConfigError(
            f"batch_size (--batch-size) is {batch_size} and would be overruled by the option "
            f"max_num_seqs, {options['max_num_seqs']}; give one of them."
        )
    for name in options:
        if name in _GIVEN:
            raise ConfigError(
                f"{name} is no engine option: use {_GIVEN[name]}, or VLLMEngine's own argument."
            )
        if name in _OWN:
            raise ConfigError(f"{name} is esfast's to set ({_OWN[name]}): leave the option out.")
    for name in _ALONE:
        if options.get(name, 1) != 1:
            raise ConfigError(
                f"{name} is {options[name]}; esfast edits models that are sharded by tensor "
                "parallelism (--tensor-parallel-size), and runs several engines by --launcher ray "
                "--engines N. Leave the option out."
            )
    if options.get("load_format") == "dummy":
        raise ConfigError(
            "load_format is dummy: vLLM would fill the model with random numbers, and the run "
            "would train those. Leave the option out."
        )


def require_plain(folder: Path, options: Mapping[str, Any]) -> None:
    """ConfigError for a model of quantised weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    asked = options.get("quantization")
    if asked is not None:
        raise ConfigError(
            f"quantization is {asked}; quantised numbers are no weights that noise can be added "
            "to. Leave the option out, and quantise the result."
        )
    if _QUANTISED in config:
        kind = config[_QUANTISED].get("quant_method", "quantised")
        raise ConfigError(
            f"{folder.name} is {kind}-quantised; its stored numbers are no weights that noise can "
            "be added to. Train the 16-bit model that it was made from, and quantise the result."
        )

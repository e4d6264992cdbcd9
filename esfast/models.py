"""Which model a name means, and loading it.

`smollm2-135m` is the default model, made by `esfast.model_cache`; anything else is a folder, or a
model of the Hugging Face hub. Only safetensors weights are read, and no code that comes with a
model is run. What can be refused before the weights are read is.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esfast.checkpoint import LoadedModel, is_model_folder, stored_shapes
from esfast.errors import ConfigError, DataError, EsfastError, first_line
from esfast.home_folders import at_home
from esfast.resources import readable, require_memory

DEFAULT_MODEL = "smollm2-135m"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# Activations, the tokenizer and the libraries beside the weights.
BESIDE_WEIGHTS = 300_000_000


def load_model(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """The model and its tokenizer, for inference, with weights of `dtype` on `device`.

    Raises ConfigError for a name, folder or device that is not there, DataError for a folder that
    is no causal language model or holds NaN or infinity, EsfastError for too little memory or a hub
    out of reach.
    """
    require_transformers()
    target = _device(device)
    folder = model_folder(name_or_path)
    _require_room(folder, dtype, target)
    with _quiet():
        model, tokenizer = _read(folder, dtype)
    _own_weights(model)
    _require_finite(model, folder)
    return LoadedModel(model.to(target).eval(), tokenizer, folder)


def model_folder(name_or_path: str | Path) -> Path:
    """The folder that holds the model of this name; fetches it if need be."""
    name = str(name_or_path)
    if name == DEFAULT_MODEL:
        from esfast.model_cache import cached_smollm2

        return cached_smollm2()
    path = at_home(name)
    if name and path.exists():
        return _local(path)
    is_name = isinstance(name_or_path, str) and HUB_NAME.fullmatch(name)
    if not is_name:
        raise ConfigError(
            f"there is no model folder {name!r}, and it is no name on the hub either. Give "
            f"{DEFAULT_MODEL!r}, a folder that holds config.json and *.safetensors, or a name such "
            f"as 'Qwen/Qwen2.5-0.5B-Instruct'."
        )
    return _from_hub(name)


def _local(path: Path) -> Path:
    if not is_model_folder(path):
        kind = "a file" if path.is_file() else "no folder"
        seen = f"holding {_listing(path)}" if path.is_dir() else kind
        raise ConfigError(
            f"{path} is {seen}; expected a model's folder with config.json and *.safetensors. Save "
            f"one with model.save_pretrained and tokenizer.save_pretrained."
        )
    return path.absolute()


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's own errors, the network's, the disk's
        raise EsfastError(
            f"the model {name!r} is no folder here and could not be had from the Hugging Face hub: "
            f"{first_line(error)}. Check the spelling and the network (a gated model also needs "
            f"`hf auth login`), or give a folder or {DEFAULT_MODEL!r}."
        ) from None


def require_transformers() -> None:
    """EsfastError, which says what to install, where transformers is missing."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise EsfastError(
            f"loading a language model needs the extra 'train' ({error}): "
            f"pip install -c constraints.txt '.[train]'"
        ) from None


def _device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise ConfigError(
            f"device {str(device)!r} cannot be used: {first_line(error)}. This machine has 'cpu' "
            f"and {count} CUDA device{'' if count == 1 else 's'}."
        ) from None
    if target.type == "meta":
        raise ConfigError(
            "device 'meta' cannot be used: its tensors hold no numbers. Choose 'cpu' or 'cuda'."
        )
    return target


def _require_room(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    weights = _elements(folder) * dtype.itemsize
    what = f"the model in {folder} ({readable(weights)} of weights as {dtype})"
    mend = "Choose a smaller model or a narrower dtype."
    if device.type != "cuda":
        require_memory(weights + BESIDE_WEIGHTS, what, mend)
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < weights + BESIDE_WEIGHTS:
        raise EsfastError(
            f"{what} needs about {readable(weights + BESIDE_WEIGHTS)} on {device}, which has "
            f"{readable(free)} free. {mend}"
        )


def _elements(folder: Path) -> int:
    """How many numbers the safetensors files of `folder` hold, from their headers."""
    return sum(torch.Size(shape).numel() for shape in stored_shapes(folder).values())


def _read(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    known: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    strict: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    reads: Any = AutoModelForCausalLM.from_pretrained
    try:
        # What does not fit is counted below rather than listed over many lines.
        model, info = reads(folder, dtype=dtype, ignore_mismatched_sizes=True, **strict, **known)
    except Exception as error:  # a model that its library refuses, in whatever way
        raise DataError(
            f"{folder} ({_kind(folder)}) cannot be loaded as a causal language model: "
            f"{first_line(error)}. Expected what AutoModelForCausalLM of transformers loads."
        ) from None
    wrong = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if wrong:
        raise DataError(
            f"{folder} lacks {len(wrong)} weights that its config.json asks for, or has them "
            f"in another shape: {wrong[0]}. Save or fetch the model again."
        )
    return model, _tokenizer(folder)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder. DataError where there is none."""
    require_transformers()
    with _quiet():
        return _tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"{folder} has no tokenizer that transformers loads: {first_line(error)}. Save one "
            f"there with tokenizer.save_pretrained."
        ) from None


def _kind(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError):
        return "its config.json is no JSON object"
    return f"model_type {kind!r}"


def _own_weights(model: Any) -> None:
    """Move the weights from the mapped file to memory of this process's own.

    What then happens to the file does not matter, and tensors start on 64 bytes (in the file they
    start on 8 past; perturb and restore gain 3 %).
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


def _require_finite(model: torch.nn.Module, folder: Path) -> None:
    """A NaN answers every prompt with nonsense, and every member alike: nothing could be learned.
    Takes 0.13 s for SmolLM2; torch.aminmax takes 1.6 s in bf16."""
    for name, tensor in model.named_parameters():
        weights = tensor.detach()
        ends = [weights.amin(), weights.amax()] if weights.numel() else []
        if not all(torch.isfinite(end) for end in ends):
            raise DataError(
                f"'{name}' of the model in {folder} holds NaN or infinity, so its answers mean "
                "nothing. Load the checkpoint again, or an earlier one."
            )


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would stand among a command's own lines."""
    from transformers.utils import logging as transformers_logging

    library: Any = transformers_logging
    bars = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            library.enable_progress_bar()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and warnings: what matters is raised."""
    from transformers.utils import logging as transformers_logging

    library: Any = transformers_logging

    level = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)
    try:
        with without_bars():
            yield
    finally:
        library.set_verbosity(level)

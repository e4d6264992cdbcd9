"""What `esfast info` says: versions, targets, devices, build."""

from __future__ import annotations

import os
import platform
import sys

import torch

import esfast
from esfast import _core
from esfast.provenance import commit, version
from esfast.resources import usable_cores

OPTIONAL = ("transformers", "gguf", "matplotlib", "reasoning-gym", "tensorboard", "trackio")


def info_lines() -> list[str]:
    """One line a fact, "name: value"."""
    build = _core.build_info()
    targets = [f"{name} (selected)" if name == _core.target() else name for name in _core.targets()]
    facts = {
        "esfast": esfast.__version__ + (f" (commit {commit()})" if commit() else ""),
        "noise version": str(esfast.NOISE_VERSION),
        "targets": ", ".join(targets),
        "cores": f"{usable_cores()} of {os.cpu_count()}",
        "CUDA devices": ", ".join(map(str, _core.cuda_devices())) or "none",
        **{f"build {name}": str(value) for name, value in build.items()},
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        **{name: version(name) or "not installed" for name in OPTIONAL},
    }
    width = max(map(len, facts))
    return [f"{name:{width}}  {value}" for name, value in facts.items()]

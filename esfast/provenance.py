"""How something was made: what every run folder, plot and tuned model says of itself."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import esfast
from esfast import _core

PACKAGES = ("torch", "transformers", "numpy", "safetensors")


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """Versions, target, command line (this process's by default), commit if known, time in UTC."""
    return {
        "esfast": esfast.__version__,
        "noise_version": int(esfast.NOISE_VERSION),
        "target": _core.target(),
        "commit": commit(),
        "command": shlex.join(command or ["esfast", *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree that this package is imported from, "+" if edited; or None."""
    root = Path(esfast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    found = _git(root, "rev-parse", "--short=12", "HEAD")
    if not found:
        return None
    return found + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def device_name(device: str = "cpu") -> str:
    """The processor of this machine and its cores, or a CUDA device's name."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    source = Path("/proc/cpuinfo")
    lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} x{os.cpu_count()}"


def one_line(made: dict[str, Any]) -> str:
    """The short form, for the foot of a plot."""
    source = f" ({made['commit']})" if made["commit"] else ""
    return (
        f"esfast {made['esfast']}{source}, noise {made['noise_version']}, {made['target']}, "
        f"{made['started']}: {made['command']}"
    )


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

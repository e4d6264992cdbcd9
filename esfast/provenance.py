"""How something was made: what every run folder, plot and tuned model says of itself."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import esfast
from esfast import _core

CPU_KIND = {"family": "cpu family", "model": "model"}
"""Of /proc/cpuinfo on x86, where no two microarchitectures share both."""
PACKAGES = ("torch", "transformers", "numpy", "safetensors")


def provenance(command: list[str] | None = None, also: Iterable[str] = ()) -> dict[str, Any]:
    """Versions, target, command line (this process's by default), commit if known, time in UTC.

    also: packages that were used, beside those that every run uses.
    """
    return {
        "esfast": esfast.__version__,
        "noise_version": int(esfast.NOISE_VERSION),
        "target": _core.target(),
        "commit": commit(),
        "command": shlex.join(command or ["esfast", *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in (*PACKAGES, *also)},
    }


def version(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree that this package is imported from, "+" if edited; or None.

    ESFAST_COMMIT tells that of a copy of the tree without its history.
    """
    root = Path(esfast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("ESFAST_COMMIT") or None
    found = _git(root, "rev-parse", "--short=12", "HEAD")
    if not found:
        return None
    return found + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def device_name(device: str = "cpu") -> str:
    """The processor of this machine and its cores, or a CUDA device's name.

    The processor with its family and model: a virtual machine may say no more than "AMD EPYC", on
    Zen 4 and Zen 5 alike.
    """
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    source = Path("/proc/cpuinfo")
    text = source.read_text(encoding="utf-8") if source.exists() else ""
    return f"{processor_name(text) or platform.machine()} x{os.cpu_count()}"


def processor_name(cpuinfo: str) -> str:
    """The first processor of a text in the form of /proc/cpuinfo, "" where it names none."""
    first = cpuinfo.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    found = {name.strip(): value.strip() for name, _, value in pairs}
    kind = [f"{word} {found[field]}" for word, field in CPU_KIND.items() if field in found]
    name = found.get("model name", "")
    return f"{name} ({', '.join(kind)})" if name and kind else name


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

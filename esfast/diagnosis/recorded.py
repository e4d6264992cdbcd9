"""What the config.json beside a journal says of its run: the flags that it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esfast.errors import EsfastError
from esfast.home_folders import at_home
from esfast.models import model_folder
from esfast.run_folder import CONFIG, read_config


def recorded_flags(source: str) -> dict[str, Any] | None:
    """Of a run's folder or its journal; None where no config.json says them."""
    folder = at_home(source)
    if folder.name and not folder.is_dir():
        folder = folder.parent
    flags = read_config(folder).get("arguments") if _is_run(folder) else None
    return flags if isinstance(flags, dict) else None


def recorded_anchor(source: str) -> list[Path]:
    """The folder of the run's --anchor-model; none without one, or where it is no longer there."""
    name = (recorded_flags(source) or {}).get("anchor_model")
    try:
        return [] if name is None else [model_folder(name)]
    except EsfastError:  # replay says by the checksum that it is missed, and which flag names it
        return []


def _is_run(folder: Path) -> bool:
    """A checkpoint's folder has a config.json of another kind."""
    return (folder / CONFIG).is_file() and not any(folder.glob("*.safetensors"))

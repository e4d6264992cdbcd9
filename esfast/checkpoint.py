"""Model folders as Hugging Face lays them out, written whole or not at all.

A folder is written beside its place under another name, synced, and renamed: whoever finds it finds
all of it. Weights go through safetensors, to the bit; nothing is pickled. `esfast.models` loads.

Not promised: that two processes may save to one folder at once. Replacing an existing model takes
two renames; a process killed between them leaves the old model beside, as `.NAME.old-*`, until
the next one is saved. What a killed process had of a new one, `.NAME.new-*`, goes before that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open

from esfast.errors import ConfigError, DataError, EsfastError, first_line
from esfast.home_folders import at_home
from esfast.resources import require_disk
from esfast.segments import Segment
from esfast.whole_file import sync

INDEX = "model.safetensors.index.json"
# What save_model adds to a model's folder: where the weights come from.
ORIGIN = "esfast.json"
# Tokenizer and configuration; SmolLM2's take 3.5 MB.
SMALL_FILES = 32_000_000


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, and the folder whose safetensors hold its weights as
    they were loaded (an anchor can be read from there)."""

    model: Any
    tokenizer: Any
    folder: Path


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` looks like a saved model: a configuration and safetensors weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that hold the model of `folder`: the index's, else model.safetensors,
    else all there are; a file is itself. DataError for an index that cannot be read."""
    where = Path(folder)
    if not where.is_dir():
        return [where]
    if (where / INDEX).is_file():
        return [where / name for name in _indexed(where / INDEX)]
    single = where / "model.safetensors"
    others = [] if single.is_file() else sorted(where.glob("*.safetensors"))
    return others or [single]


def _indexed(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"'{index}' has no readable weight_map ({error}).") from error
    if not names:
        raise DataError(f"'{index}' has an empty weight_map; save or fetch the model again.")
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise DataError(f"'{index}' names files outside its folder; it is not trusted.")
    return sorted(names)


def stored_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of a model's folder, from the files' headers.

    Raises DataError for a file that is missing or not whole.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def stored_slices(
    folder: str | Path, segments: Iterable[Segment]
) -> Iterator[tuple[Segment, torch.Tensor]]:
    """Every segment with the stored elements of its box, in the file's dtype; read one by one.

    Raises DataError for a segment whose tensor is not stored, or in another shape.
    """
    wanted: dict[str, list[Segment]] = {}
    for segment in segments:
        wanted.setdefault(segment.name, []).append(segment)
    for path in weight_files(folder):
        with _opened(path) as file:
            for name in sorted(wanted.keys() & set(file.keys())):
                for segment in wanted.pop(name):
                    yield segment, _box(file, segment, path)
    if wanted:
        raise DataError(
            f"{folder} stores no tensor '{min(wanted)}' ({len(wanted)} of the table's are not "
            "there); name the checkpoint that the model was loaded from."
        )


def _box(file: Any, segment: Segment, path: Path) -> torch.Tensor:
    shape = tuple(file.get_slice(segment.name).get_shape())
    if shape != tuple(segment.shape):
        raise DataError(
            f"'{segment.name}' in {path} has shape {shape}; the model's has "
            f"{tuple(segment.shape)}. Name the checkpoint that the model was loaded from."
        )
    if not shape:
        return file.get_tensor(segment.name)
    box = zip(segment.origin, segment.tensor.shape, strict=True)
    return file.get_slice(segment.name)[tuple(slice(a, a + n) for a, n in box)]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} is no whole safetensors file: {first_line(error)}. Save or fetch the model "
            "again."
        ) from None


def save_model(
    loaded: LoadedModel, folder: str | Path, made: Mapping[str, Any] | None = None
) -> Path:
    """Write the live weights, the configuration and the tokenizer to `folder`; returns its path.

    Plain transformers loads it, bit for bit the same weights. `made` (anything that JSON holds)
    goes to esfast.json beside them. An existing model is replaced. Raises ConfigError for a folder
    that holds something else, EsfastError for a full disk; `folder` is then as it was.
    """
    target = at_home(folder).absolute()
    require_replaceable(target)
    require_disk(target, _weights_bytes(loaded.model) + SMALL_FILES, f"saving a model to {folder}")
    try:
        with new_folder(target) as fresh:
            loaded.model.save_pretrained(fresh)
            loaded.tokenizer.save_pretrained(fresh)
            if made is not None:
                (fresh / ORIGIN).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, SafetensorError) as error:
        raise EsfastError(
            f"the model could not be saved to {target}: {first_line(error)}. Nothing was changed "
            f"there; mend that, or save to another folder."
        ) from error
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which takes its place when the block ends without an error
    and is removed otherwise. What was at `target` is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    fresh = target.with_name(f".{target.name}.new-{uuid4().hex[:12]}")
    fresh.mkdir()
    try:
        yield fresh
        _settle(fresh)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """What processes that were killed while they saved to `target` left beside it. The model that
    one was about to replace is kept where `target` is not there."""
    kinds = ("new", "old") if target.exists() else ("new",)
    for kind in kinds:
        for left in target.parent.glob(f".{escape(target.name)}.{kind}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _swap(fresh: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{uuid4().hex[:12]}")
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise
    sync(target.parent)
    remove_leftovers(target)


def _settle(folder: Path) -> None:
    """Everything in `folder` on the disk, and as readable as the folder itself."""
    mode = folder.stat().st_mode & 0o666  # safetensors makes its files the owner's alone
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode)
        sync(path)


def require_replaceable(target: Path) -> None:
    """ConfigError unless a model may be saved at `target`: nothing, an empty folder or a model."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; expected a folder, or nothing there yet.")
    names = sorted(path.name for path in target.iterdir())
    if names and not is_model_folder(target):
        raise ConfigError(
            f"{target} is no model's folder and is not empty (it holds {', '.join(names[:3])}); "
            f"a model is saved to a new or empty folder, or over another model. Name another one."
        )


def _weights_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())

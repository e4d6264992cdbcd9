"""What the updates of a run start from, in a safetensors file: a tensor a segment, by number.

The file appears whole (temporary name, fsync, rename) and carries the checksum of its tensors,
which is compared before any of them is used. It fits the segments that it was written from, in
their order, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from esfast.errors import EsfastError
from esfast.resources import require_disk
from esfast.whole_file import sync

State = Sequence[torch.Tensor]
Checksum = Callable[[State], str]
UNREADABLE = (OSError, SafetensorError, ValueError, KeyError)


def write(path: Path, state: State, checksum: Checksum, told: Mapping[str, str]) -> None:
    """Replaces `path` with the tensors of `state`. EsfastError leaves what was there."""
    require_disk(path.parent, sum(tensor.nbytes for tensor in state), "a snapshot")
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {str(number): tensor.contiguous() for number, tensor in enumerate(state)}
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, temporary, {**told, "checksum": checksum(state)})
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors: owner only
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise EsfastError(f"no snapshot could be written to {path.parent}: {error}.") from None


def told(path: Path) -> dict[str, str]:
    """What was written beside the tensors. Raises one of UNREADABLE."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read(path: Path, like: State, checksum: Checksum) -> list[torch.Tensor]:
    """The tensors, of the shapes and dtypes of `like`. Raises one of UNREADABLE."""
    with safe_open(path, framework="pt") as file:
        recorded = dict(file.metadata() or {})["checksum"]
        state = [file.get_tensor(str(number)) for number in range(len(like))]
    if [(t.shape, t.dtype) for t in state] != [(t.shape, t.dtype) for t in like]:
        raise ValueError("its tensors are not this model's, or of another memory mode")
    if checksum(state) != recorded:
        raise ValueError("its checksum does not fit its weights; it is damaged")
    return state

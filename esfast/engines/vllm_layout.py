"""Which canonical elements vLLM's live parameters hold, learnt from vLLM's own loader.

vLLM fuses (qkv_proj, gate_up_proj, experts), shards and pads what a checkpoint stores, each model
family in its own `load_weights`. That method is run once more over stand-ins: tensors without
memory, named and shaped as the checkpoint's. Every copy of a part of a stand-in into a part of a
parameter is noted and not carried out, and becomes a Segment; so whatever vLLM can load is mapped,
under any tensor-parallel size, and no weight is touched. What cannot be followed so is refused by
name: computed or quantised weights, and parameters that nothing is copied to.

Not promised: that the values still lie where they were loaded. Backends rearrange them afterwards,
so ask before that (`esfast.engines.vllm_derived` does) and edit the tensors that you were given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esfast.errors import ParameterError
from esfast.segments import Segment
from esfast.stored_names import MOVES, storage_of

_COPY = "aten::copy_"
_FILLS = ("aten::fill_", "aten::zero_")


@dataclass(frozen=True)
class _Copied:
    """A part of a stand-in that vLLM's loader copies to a part of a parameter; in elements."""

    name: str
    parameter: str
    sizes: tuple[int, ...]
    source: tuple[tuple[int, ...], int]  # strides and offset in the canonical tensor
    target: tuple[tuple[int, ...], int]  # the same in the parameter's storage


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes copies from stand-ins to parameters; carries out nothing that writes to real memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copied: dict[_Copied, None] = {}
        self.filled = Counter[str]()
        self._parameters = {
            storage_of(p): name
            for name, p in model.named_parameters()
            if p.numel() and not p.is_meta
        }
        self._names: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []

    def stand_in(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without memory, known by its storage, as are all views of it."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._kept.append(tensor)
        self._names[storage_of(tensor)] = name
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        name = func._schema.name
        if name in MOVES and self._name(args[0]) is not None:
            return args[0]  # the copy to the parameter follows
        written = _written(func, args, kwargs or {})
        if not any(not tensor.is_meta for tensor in written):
            return func(*args, **(kwargs or {}))
        if name == _COPY:
            self._note(args[0], args[1])
        elif (parameter := self._parameters.get(storage_of(written[0]))) is not None:
            if name not in _FILLS:
                raise ParameterError(
                    f"vLLM's loader writes to '{parameter}' by {name}, which cannot be mapped to "
                    f"elements of the checkpoint. {_ELSEWHERE}"
                )
            self.filled[parameter] += written[0].numel()  # padding, where no copy follows
        return written[0]

    def _name(self, tensor: Any) -> str | None:
        known = isinstance(tensor, torch.Tensor) and tensor.is_meta
        return self._names.get(storage_of(tensor)) if known else None

    def _note(self, target: torch.Tensor, source: Any) -> None:
        parameter = self._parameters.get(storage_of(target))
        if parameter is None or target.numel() == 0:  # a buffer, which is not edited
            return
        name = self._name(source)
        sizes = tuple(n for n in target.shape if n != 1)
        if name is None or sizes != tuple(n for n in source.shape if n != 1):
            raise ParameterError(
                f"'{parameter}' is computed from the checkpoint's tensors when vLLM loads it, not "
                "copied, so noise on the checkpoint's elements cannot be given to it. " + _ELSEWHERE
            )
        note = _Copied(name, parameter, sizes, _place(source), _place(target))
        self.copied[note] = None


_ELSEWHERE = "Train this model with the transformers engine (--engine transformers)."


def _place(view: torch.Tensor) -> tuple[tuple[int, ...], int]:
    strides = zip(view.shape, view.stride(), strict=True)
    return tuple(step for n, step in strides if n != 1), int(view.storage_offset())


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operator's arguments that it writes to."""
    values = list(args) + [kwargs.get(a.name) for a in func._schema.arguments[len(args) :]]
    pairs = zip(func._schema.arguments, values, strict=False)
    return [
        value
        for argument, value in pairs
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and isinstance(value, torch.Tensor)
    ]


def segments(
    model: torch.nn.Module,
    tp_rank: int,
    tp_size: int,
    *,
    checkpoint: Mapping[str, Sequence[int]],
) -> list[Segment]:
    """The canonical elements that this rank's parameters hold, sorted by name and start.

    model: a vLLM model whose parameters hold their values (keep what a backend packs); checkpoint:
    name -> shape of every stored tensor (`esfast.checkpoint.stored_shapes`). Elements that several
    ranks hold (norms, biases of row-parallel layers, replicated key heads) get `counted=True` on
    one of them, so that the ranks' checksums add up to the whole's. Padding belongs to no segment.

    Raises ParameterError, naming what it is, for quantised or packed-away weights, expert
    parallelism, weights that vLLM computes while loading, and parameters that nothing is loaded to.
    """
    _refuse(model)
    watch = _trace(model, checkpoint)
    copied = list(watch.copied)
    _check_coverage(model, copied, watch.filled)
    parameters = dict(model.named_parameters())
    held = Counter[str]()
    for note in copied:
        held[note.name] += math.prod(note.sizes)
    found = []
    for note in copied:
        shape = tuple(checkpoint[note.name])
        segment = _segment(note, shape, parameters[note.parameter])
        everywhere = held[note.name] == math.prod(shape)
        copies = tp_size if everywhere else _replicas(model, note)
        found.append(replace(segment, counted=tp_rank % copies == 0))
    return sorted(found, key=lambda segment: (segment.name, segment.origin))


def _refuse(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        if method != "NoneType" and not method.startswith("Unquantized"):
            raise ParameterError(
                f"'{name}' is quantised ({method}); its stored numbers are no weights that noise "
                "can be added to. Train the unquantised model (name its 16-bit checkpoint, and no "
                "quantization), and quantise the result."
            )
        if getattr(module, "use_ep", False):
            raise ParameterError(
                f"'{name}' spreads its experts over the workers; esfast edits experts that are "
                "sharded inside. Start vLLM without enable_expert_parallel."
            )
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or parameter.is_meta:
            raise ParameterError(
                f"'{name}' of shape {tuple(parameter.shape)} no longer holds its values: this "
                "backend packed them elsewhere after loading. Start the engine with "
                "worker_extension_cls='esfast.engines.vllm_worker.WorkerExtension', which keeps "
                "them, or train with the transformers engine."
            )


def _trace(model: Any, checkpoint: Mapping[str, Sequence[int]]) -> _Watch:
    before = [(name, p.data_ptr()) for name, p in model.named_parameters()]
    dtype = next(model.parameters()).dtype
    watch = _Watch(model)

    def stand_ins() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in checkpoint.items():
            yield name, watch.stand_in(name, shape, dtype)

    try:
        with torch.inference_mode(), watch:
            model.load_weights(stand_ins())
    except ParameterError:
        raise
    except Exception as error:  # whatever a model's own loader stumbles over
        reason = str(error).strip().splitlines()
        raise ParameterError(
            f"the loader of vLLM's {type(model).__name__} cannot be followed: "
            f"{type(error).__name__}: {(reason or [''])[0][:300]}. {_ELSEWHERE}"
        ) from error
    if before != [(name, p.data_ptr()) for name, p in model.named_parameters()]:
        raise ParameterError(
            f"vLLM's {type(model).__name__} replaced parameters while its loader was followed, so "
            f"this engine cannot go on. {_ELSEWHERE}"
        )
    return watch


def _replicas(model: torch.nn.Module, note: _Copied) -> int:
    """How many consecutive ranks hold these elements, of a tensor that no rank holds whole."""
    module, _, own = note.parameter.rpartition(".")
    layer: Any = model.get_submodule(module)
    replicas = int(getattr(layer, "num_kv_head_replicas", 1))
    if replicas == 1:
        return 1
    parameter = getattr(layer, own)
    row = (note.target[1] - parameter.storage_offset()) // parameter.stride(0)
    return replicas if row >= layer.num_heads * layer.head_size else 1  # queries come first


def _check_coverage(model: torch.nn.Module, copied: Iterable[_Copied], padded: Counter) -> None:
    filled = Counter(padded)
    for note in copied:
        filled[note.parameter] += math.prod(note.sizes)
    bare = [
        f"'{name}' ({p.numel() - filled[name]} of {p.numel()} elements)"
        for name, p in model.named_parameters()
        if filled[name] < p.numel()
    ]
    if bare:
        raise ParameterError(
            f"{len(bare)} parameters of vLLM's {type(model).__name__} have elements that come "
            f"from no tensor of the checkpoint: {', '.join(bare[:3])}. An edit would miss them; "
            f"name the checkpoint that the engine loaded. {_ELSEWHERE}"
        )


def _segment(note: _Copied, shape: tuple[int, ...], parameter: torch.Tensor) -> Segment:
    """The noted copy as a box of the canonical tensor; ParameterError where it is none."""
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    extent, strides = [1] * len(shape), [1] * len(shape)
    for size, source, target in zip(note.sizes, note.source[0], note.target[0], strict=True):
        dimension = next(
            (d for d, n in enumerate(shape) if steps[d] == source and n >= size > 1), None
        )
        if dimension is None or extent[dimension] != 1:
            raise ParameterError(
                f"'{note.name}' of shape {shape} is regrouped when vLLM loads it into "
                f"'{note.parameter}', not cut into boxes. {_ELSEWHERE}"
            )
        extent[dimension], strides[dimension] = size, target
    start, rest = [], note.source[1]
    for step in steps:
        start.append(rest // step)
        rest %= step
    view = parameter.detach().as_strided(extent, strides, note.target[1])
    return Segment(note.name, shape, view, tuple(start))

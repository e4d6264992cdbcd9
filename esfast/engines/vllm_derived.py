"""What vLLM makes out of the weights after it has loaded them, and making it again after an edit.

Some backends pack weights (oneDNN's and AMX's linears on a CPU drop the parameter itself, fused
experts are rearranged), or compute new tensors from them (MLA's). `keep_weights` wraps the function
that vLLM's loaders call for that: before it runs, the elements of the checkpoint are mapped to the
parameters that hold them, and these tensors are kept; afterwards every module is compared with what
it was. Where something changed, `Derived.redo` gives the module its parameters back, runs vLLM's
own processing again, and copies what comes out to where the first result lies, so that CUDA graphs
see it; what is no tensor (a closure over a packed handle) takes the place of the old.

Not promised: that generation reads what was derived again; `esfast.engines.vllm_reach` tries it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from esfast.checkpoint import stored_shapes
from esfast.engines.vllm_layout import segments
from esfast.errors import EsfastError, ParameterError, StateError
from esfast.models import model_folder
from esfast.segments import Segment

_LOADERS = "vllm.model_executor.model_loader"
_PROCESS = "process_weights_after_loading"
_RETIE = "maybe_retie_word_embeddings"
_OF_MODULES = frozenset(("_parameters", "_buffers", "_modules"))
REFUSE_LATER = "esfast_refuse_later"  # in vLLM's additional_config: tell at the first call
_KEPT: WeakKeyDictionary[torch.nn.Module, Kept | EsfastError] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Held:
    """A parameter or buffer: the object, and the tensor that was its data."""

    owner: torch.Tensor
    data: torch.Tensor
    version: int

    @staticmethod
    def of(tensor: torch.Tensor) -> _Held:
        return _Held(tensor, tensor.data, -1 if tensor.is_inference() else tensor._version)

    def same(self, other: object) -> bool:
        """Whether `other` is the same object over the same memory."""
        return (
            isinstance(other, _Held)
            and other.owner is self.owner
            and other.data.data_ptr() == self.data.data_ptr()
            and other.data.shape == self.data.shape
        )


_State = dict[str, Any]  # attribute -> _Held for tensors, else the value itself


def _state(part: Any) -> _State:
    """Everything that a module holds itself, but its submodules; or what another object holds."""
    plain = {name: value for name, value in vars(part).items() if name not in _OF_MODULES}
    if isinstance(part, torch.nn.Module):
        plain |= {**part._buffers, **part._parameters}
    return {n: _Held.of(v) if isinstance(v, torch.Tensor) else v for n, v in plain.items()}


def _changed(before: _State, after: _State) -> tuple[str, ...]:
    def same(name: str) -> bool:
        if name not in before or name not in after:
            return False
        one, other = before[name], after[name]
        return one.same(other) if isinstance(one, _Held) else one is other

    return tuple(name for name in {**before, **after} if not same(name))


@dataclass
class _Part:
    """A module, or what processes it: what it held before, what came out of it, and which of its
    attributes that changed (others change later on, such as its key-value cache)."""

    whole: Any
    given: _State
    made: _State
    changed: tuple[str, ...]

    @staticmethod
    def of(whole: Any, given: _State) -> _Part:
        """As processing has left it."""
        made = _state(whole)
        return _Part(whole, given, made, _changed(given, made))

    def settle(self) -> None:
        """Copies the tensors that were made again to where the first ones lie."""
        fresh = _state(self.whole)
        for name in self.changed:
            old, new = self.made.get(name), fresh.get(name)
            if isinstance(old, _Held) and isinstance(new, _Held) and _fits(old.data, new.data):
                old.data.copy_(new.data)
                _put(self.whole, name, self.made)
        self.made = _state(self.whole)


@dataclass(frozen=True)
class _Step:
    """One module whose processing changes it, or the object that does it (which remembers, say,
    that it was here before, and would then write over the weights themselves)."""

    name: str
    parts: tuple[_Part, ...]
    process: Callable[[], None]

    @property
    def owns(self) -> bool:
        """Whether the module was given weights of its own to process."""
        held = self.parts[0].given.values()
        return any(isinstance(h, _Held) and isinstance(h.owner, torch.nn.Parameter) for h in held)

    @property
    def changed(self) -> tuple[str, ...]:
        """The attributes that change, in order of name."""
        return tuple(sorted(name for part in self.parts for name in part.changed))

    def redo(self) -> None:
        """Processes the module again from the tensors that it was given."""
        for part in self.parts:
            for name in part.changed:
                _put(part.whole, name, part.given)
        self.process()
        for part in self.parts:
            part.settle()


def _fits(old: torch.Tensor, new: torch.Tensor) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype and old.stride() == new.stride()


def _put(whole: Any, name: str, state: _State) -> None:
    """Sets an attribute to what it was in `state`; removes it where it was not there."""
    places = [vars(whole)]
    if isinstance(whole, torch.nn.Module):
        places = [whole._parameters, whole._buffers, vars(whole)]
    was = next((place for place in places if name in place), None)
    for place in places:
        place.pop(name, None)
    if name not in state:
        return
    value = state[name]
    if isinstance(value, _Held):
        value.owner.data = value.data
        value = value.owner
    if isinstance(whole, torch.nn.Module) and isinstance(value, torch.nn.Parameter):
        whole._parameters[name] = value
    else:
        (was if was is not None else vars(whole))[name] = value


class Derived:
    """What has to be made again after an edit of the weights."""

    def __init__(self, steps: list[_Step], around: Callable[[], Any]) -> None:
        self._steps = steps
        self._around = around

    @property
    def modules(self) -> list[str]:
        """Names of the modules that hold something derived."""
        return [step.name for step in self._steps]

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Module name -> the attributes that its processing changes."""
        return {step.name: step.changed for step in self._steps}

    def redo(self, edited: str | None = None) -> None:
        """Makes it again from the weights as they are; edited: the only module whose weights were
        (what layers without weights derive, such as attention, is made again in any case)."""
        steps = [s for s in self._steps if edited in (None, s.name) or not s.owns]
        if steps:
            with torch.no_grad(), self._around():
                for step in steps:
                    step.redo()


@dataclass(frozen=True)
class Owner:
    """A module that holds weights: its name, its class, the attributes that processing changes."""

    module: str
    kind: str
    derived: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """A loaded model's canonical segments, over the tensors that edits go to, and what is derived.

    folder: of the checkpoint; owners: by the storage of their parameters.
    """

    segments: list[Segment]
    derived: Derived
    folder: Path
    owners: dict[int, tuple[str, str]]

    def owner(self, segment: Segment) -> Owner:
        """The module whose parameter holds a segment."""
        name, kind = self.owners[segment.tensor.untyped_storage().data_ptr()]
        return Owner(name, kind, self.derived.kinds().get(name, ()))


def kept(model: torch.nn.Module) -> Kept:
    """What was kept of a model while it was loaded. StateError where `keep_weights` came later;
    what made the model be refused, where that was put off."""
    found = _KEPT.get(model)
    if isinstance(found, EsfastError):
        raise found
    if found is None:
        raise StateError(
            f"{type(model).__name__} was loaded before esfast could keep its weights; start the "
            "engine with worker_extension_cls='esfast.engines.vllm_worker.WorkerExtension'."
        )
    return found


def keep_weights() -> None:
    """Wraps the loaders' processing in this process, once; models loaded later are kept."""
    utils = import_module(f"{_LOADERS}.utils")
    import_module(f"{_LOADERS}.base_loader")
    original = getattr(utils, _PROCESS)
    if getattr(original, "keeps", False):
        return

    def process(model: Any, model_config: Any, target_device: torch.device) -> None:
        from vllm.config import get_current_vllm_config

        try:
            _KEPT[model] = _process(original, model, model_config, target_device)
        except EsfastError as error:
            if not _refuses_later(get_current_vllm_config()):
                raise
            _KEPT[model] = error

    process.keeps = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith(_LOADERS) and getattr(module, _PROCESS, None) is original:
            setattr(module, _PROCESS, process)


def _refuses_later(config: Any) -> bool:
    """Whether the driver asks for the reason: the error of a worker process would not reach it."""
    told = config.additional_config
    return isinstance(told, dict) and bool(told.get(REFUSE_LATER))


def _process(
    original: Callable[..., None], model: Any, model_config: Any, device: torch.device
) -> Kept:
    from vllm.config import get_current_vllm_config, set_current_vllm_config
    from vllm.distributed import parallel_state

    folder = model_folder(model_config.model)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    found = segments(model, rank, size, checkpoint=stored_shapes(folder))
    owners = dict(_owners(model))
    before = {
        id(part): _state(part) for _, module in model.named_modules() for part in _parts(module)
    }
    with _untied():
        original(model, model_config, device)
    steps = list(_steps(model, before, model_config.dtype))
    config = get_current_vllm_config()
    derived = Derived(steps, lambda: set_current_vllm_config(config))
    return Kept(found, derived, folder, owners)


def _owners(model: torch.nn.Module) -> Iterator[tuple[int, tuple[str, str]]]:
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            yield parameter.untyped_storage().data_ptr(), (name, type(module).__name__)


@contextmanager
def _untied() -> Iterator[None]:
    """Without vLLM's tying of an output matrix that happens to equal the embeddings: they are two
    tensors of the checkpoint, with noise of their own."""
    utils: Any = import_module(f"{_LOADERS}.utils")
    tie = getattr(utils, _RETIE, None)
    if tie is not None:
        setattr(utils, _RETIE, lambda *arguments: None)
    try:
        yield
    finally:
        if tie is not None:
            setattr(utils, _RETIE, tie)


def _parts(module: Any) -> list[Any]:
    """A module and what processes its weights."""
    method = getattr(module, "quant_method", None)
    return [module] if method is None else [module, method]


def _steps(model: Any, before: dict[int, _State], dtype: torch.dtype) -> Iterator[_Step]:
    modules = dict(model.named_modules())
    methods = {id(getattr(module, "quant_method", None)) for module in modules.values()}
    for name, module in modules.items():
        if id(module) in methods:  # a part of the module that it processes
            continue
        parts = tuple(_Part.of(p, before.get(id(p), {})) for p in _parts(module))
        _require_values(name, parts[0].given, parts[0].made)
        if any(part.changed for part in parts):
            yield _Step(name, parts, _processing(name, module, dtype))


def _require_values(name: str, before: _State, after: _State) -> None:
    """Refuses a weight whose kept values were overwritten in their place."""
    for attribute, held in before.items():
        now = after.get(attribute)
        if isinstance(held, _Held) and isinstance(held.owner, torch.nn.Parameter):
            same = isinstance(now, _Held) and held.same(now)
            if same and isinstance(now, _Held) and now.version != held.version:
                raise ParameterError(
                    f"'{name}.{attribute}' was changed in its place after vLLM had loaded it, so "
                    "it is no weight of the checkpoint any more. Train this model with the "
                    "transformers engine (--engine transformers)."
                )


def _processing(name: str, module: Any, dtype: torch.dtype) -> Callable[[], None]:
    """What vLLM did to a module after loading, to be done again."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        return lambda: method.process_weights_after_loading(module)
    if callable(getattr(module, _PROCESS, None)):
        return lambda: module.process_weights_after_loading(dtype)
    raise ParameterError(
        f"vLLM changed the module '{name}' ({type(module).__name__}) after loading in a way that "
        "esfast cannot repeat, so edits may not reach it. Train this model with the transformers "
        "engine (--engine transformers)."
    )

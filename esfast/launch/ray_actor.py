"""One engine in an actor of its own: the model, its weights, and what the driver asks of them.

A request is a name and JSON bytes, a reply JSON bytes: scalars, prompts, texts, and the journal as
it lies on the driver's disk; no tensor fits through. The actor applies members and updates itself.
What joins late, or was started again, needs nothing but base and journal to be where the run is.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from esfast.engines.base import Bounded, Completion, Engine, Sampling
from esfast.errors import StateError
from esfast.evolution import EvolutionStrategy
from esfast.journal import parse
from esfast.measure import GENERATION, PERTURB, Clock, peak_bytes, reset_peak
from esfast.members import Member
from esfast.replay import replay, require_base, require_settings
from esfast.strategy import StrategyConfig
from esfast.update import Update


@dataclass(frozen=True)
class Hosted:
    """What an actor holds: an engine, the settings of its run, the folder that decay pulls to (None
    for a copy of the base), and what saves the live model with an account of how it was made."""

    engine: Engine
    strategy: StrategyConfig
    folder: Path | None
    save: Callable[[Path, Mapping[str, Any]], object]


def packed(message: Mapping[str, Any]) -> bytes:
    """A message as it crosses."""
    return json.dumps(message).encode()


def completion_record(completion: Completion) -> list[Any]:
    """A completion as JSON holds it."""
    return list(asdict(completion).values())


def completion_of(record: Sequence[Any]) -> Completion:
    """The completion of `completion_record`."""
    text, tokens, finished, ids, prompt_tokens = record
    return Completion(text, tokens, finished, tuple(ids), prompt_tokens)


def sampling_of(record: Mapping[str, Any]) -> Sampling:
    """The sampling of `asdict`."""
    return Sampling(**{**record, "stop": tuple(record["stop"])})


class EngineActor:
    """Answers requests, one at a time; see the module."""

    def __init__(self) -> None:
        self._held: Hosted | None = None
        self._es: EvolutionStrategy | None = None
        self._applied = False

    def answer(self, name: str, message: bytes) -> bytes:
        """Calls the method `name`; what it raises goes to the driver."""
        return packed(getattr(self, name)(**json.loads(message)) or {})

    @property
    def _engine(self) -> Engine:
        if self._held is None:
            raise StateError("this actor has no engine yet; the driver asks it to enter first.")
        return self._held.engine

    @property
    def _run(self) -> EvolutionStrategy:
        if self._es is None:
            raise StateError("this actor has no run yet; the driver asks for live weights first.")
        return self._es

    def enter(self, make: str, arguments: dict[str, Any], environment: dict[str, str]) -> dict:
        """Loads the engine. make: module:function of the arguments, which returns a Hosted."""
        if self._held is None:
            os.environ.update(environment)
            place, _, name = make.partition(":")
            self._held = getattr(import_module(place), name)(arguments)
        return {"generation": 0, "pid": os.getpid()}

    def live(self, memory: str, anchored: bool, threads: int | None) -> dict[str, Any]:
        """Makes the run over the base weights, at generation 0."""
        engine, held = self._engine, self._held
        assert held is not None
        pull = anchored and (held.folder or True)
        weights = engine.live_weights(memory, pull, threads)
        self._es = EvolutionStrategy(weights, held.strategy)
        self._applied = False
        return {"tensors": [asdict(spec) for spec in weights.specs()]}

    def join(self, journal: str | None, until: int) -> dict[str, Any]:
        """Applies a journal (base64) up to generation `until`, comparing checksums."""
        es = self._run
        if journal is not None:
            told = parse(base64.b64decode(journal), "the driver's journal")
            if not es.generation:
                require_settings(told.header, es)
                require_base(told.header, es)
            replay(es, told, until, verify=True)
            self._engine.weights_changed()
        return {"generation": es.generation, "pid": os.getpid()}

    def member(
        self, generation: int, number: int, prompts: list[Any], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        """Answers the prompts as a member; the member stays applied until the next request."""
        es, clock = self._run, Clock()
        if generation != es.generation:
            raise StateError(f"asked for generation {generation} at generation {es.generation}.")
        self._applied = True
        es.weights.perturb(es.strategy.members(generation)[number], es.config.sigma)
        self._engine.weights_changed()
        clock.lap(PERTURB)
        completions = self._engine.generate(prompts, sampling_of(sampling))
        clock.lap(GENERATION)
        rows = [completion_record(replace(completion, ids=())) for completion in completions]
        return {"completions": rows, "seconds": dict(clock.seconds)}

    def generate(self, prompts: list[Any], sampling: dict[str, Any]) -> dict[str, Any]:
        """Answers the prompts under the run's own weights."""
        self.restore()
        completions = self._engine.generate(prompts, sampling_of(sampling))
        return {"completions": [completion_record(completion) for completion in completions]}

    def context(self, prompts: list[Any], max_new_tokens: int, kind: str) -> dict[str, int | None]:
        """Tokens that the prompts leave of the model's context."""
        engine = self._engine
        if not isinstance(engine, Bounded):
            return {"left": None}
        return {"left": engine.require_room(prompts, max_new_tokens, kind)}

    def perturb(self, member: list[Any], sigma: float) -> None:
        """Applies any member."""
        self._applied = True
        self._run.weights.perturb(Member(*member), sigma)
        self._engine.weights_changed()

    def restore(self) -> None:
        """Takes back the member that is applied."""
        if self._applied:
            self._run.weights.restore()
            self._engine.weights_changed()
            self._applied = False

    def update(self, generation: int, update: dict[str, Any]) -> dict[str, Any]:
        """Update number `generation` of the run, counted from 0."""
        es = self._run
        if generation != es.generation:
            raise StateError(f"update {generation} came to an actor at {es.generation}.")
        report = es.weights.apply(Update.of(update))
        self._applied = False
        es.generation += 1
        self._engine.weights_changed()
        return {"saturated": report.saturated, "generation": es.generation}

    def checksum(self) -> dict[str, str]:
        """Of the live weights, a member's where one is applied."""
        return {"checksum": self._run.weights.checksum()}

    def anchor_checksum(self) -> dict[str, str | None]:
        """As `Weights.anchor_checksum`."""
        return {"checksum": self._run.weights.anchor_checksum()}

    def room(self, sigma: float, noise: str) -> dict[str, int]:
        """As `Weights.require_room`, in this actor's memory."""
        return {"bytes": self._run.weights.require_room(sigma, noise)}

    def memory_use(self) -> dict[str, int]:
        """As `Weights.memory_use`."""
        return asdict(self._run.weights.memory_use())

    def write_state(self, path: str, told: dict[str, str]) -> None:
        """As `Weights.write_state`, where this actor's machine has that path."""
        self.restore()
        self._run.weights.write_state(Path(path), told)

    def read_state(self, path: str, generation: int) -> dict[str, Any]:
        """As `Weights.read_state`; what came of it, in words where it failed."""
        try:
            self._run.weights.read_state(Path(path))
        except ValueError as error:
            return {"refused": str(error)}
        self._run.generation, self._applied = generation, False
        self._engine.weights_changed()
        return {}

    def save(self, path: str, made: dict[str, Any]) -> None:
        """Saves the live model to a folder of this machine."""
        self.restore()
        assert self._held is not None
        self._held.save(Path(path), made)

    def reset_peak(self) -> dict[str, bool]:
        """As `esfast.measure.reset_peak`."""
        return {"reset": reset_peak()}

    def peak_bytes(self) -> dict[str, int]:
        """As `esfast.measure.peak_bytes`."""
        return {"bytes": peak_bytes()}

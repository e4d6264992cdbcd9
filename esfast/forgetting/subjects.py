"""What a diagnosis looks at: runs, replayed from their journals, and checkpoints of any method.

    for moment in subject.moments(base, at):       a run: the generations of `at`, rising
        drift(moment.base, moment.tuned)

A run's base is what it started from: the base model's file, mapped, in the dtype of the run. (Where
a model holds its weights otherwise than its file does, a copy is made instead.) A moment's tensors
are live: read them before the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from esfast.checkpoint import is_model_folder
from esfast.errors import ConfigError, DataError
from esfast.forgetting.drift import CheckpointTensors, Tensors, tensors_of
from esfast.forgetting.laws import norms_of_coefficients
from esfast.home_folders import at_home
from esfast.journal import Journal, journal_path, read_journal
from esfast.models import load_model, model_folder
from esfast.replay import replay, strategy_of, usual_dtype

LEFT = "model"  # where a run's folder has the tuned model
Steps = Callable[[int, int], None]
"""Told, while a run is replayed: generations done, and the generation that is wanted next."""


@dataclass(frozen=True)
class Base:
    """The model that fine-tunes start from; `tensors` are those of its files, mapped."""

    name: str
    folder: Path
    tensors: CheckpointTensors

    @classmethod
    def of(cls, name: str) -> Base:
        """A model by name or folder, as `esfast train --model` takes it."""
        folder = model_folder(name)
        return cls(name, folder, CheckpointTensors(folder))

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            sizes[kind] = sizes.get(kind, 0) + tensor.numel()
        usual = max(sizes, key=sizes.__getitem__)
        return {"model": self.name, "dtype": usual, "elements": sum(sizes.values())}


@dataclass(frozen=True)
class Moment:
    """A model at one generation (None for a checkpoint), and what it started from."""

    generation: int | None
    checksum: str | None
    base: Tensors
    tuned: Tensors


class Subject(Protocol):
    """A run or a checkpoint."""

    name: str
    source: str

    def generations(self, at: Sequence[str], every: int | None) -> list[int | None]:
        """The moments meant by `at` (numbers and "last") and `every`; ConfigError for others."""
        ...

    def moments(
        self,
        base: Base,
        at: Sequence[int | None],
        after: Steps = ...,
        threads: int | None = None,
        device: str = "cpu",
    ) -> Iterator[Moment]:
        """The moments of `at`, which rise. DataError where `base` is not what it started from.

        after, threads, device: of a run's replay.
        """
        ...

    def record(self) -> dict[str, Any]:
        """Plain JSON values: SUBJECT of the package's head, without its measurements."""
        ...

    def notes(self) -> list[str]:
        """What has to be known to read `record`, in plain words."""
        ...


class Run:
    """A run, from its journal alone.

    anchors: folders of models that its decay may have pulled to, if not to its base.
    """

    def __init__(
        self, name: str, source: str, journal: Journal, anchors: Sequence[Path] = ()
    ) -> None:
        self.name, self.source, self.journal, self.anchors = name, source, journal, anchors

    def generations(self, at: Sequence[str], every: int | None) -> list[int | None]:
        """Rising, each once; ConfigError for one that the journal does not hold."""
        done = len(self.journal.generations)
        chosen = {done if word == "last" else _number(word) for word in at}
        chosen |= set(range(0, done + 1, every)) if every else set()
        beyond = [g for g in sorted(chosen) if not 0 <= g <= done]
        if beyond:
            raise ConfigError(
                f"--at names generation {beyond[0]}, and the journal of {self.source} holds "
                f"generations 0 to {done}."
            )
        return [*sorted(chosen)]

    def moments(
        self,
        base: Base,
        at: Sequence[int | None],
        after: Steps = lambda done, wanted: None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> Iterator[Moment]:
        """Replays, comparing every recorded checksum on the way."""
        loaded = load_model(base.name, dtype=usual_dtype(self.journal.header), device=device)
        es = strategy_of(
            self.journal, loaded.model, base.folder, threads=threads, elsewhere=self.anchors
        )
        live = tensors_of(loaded.model)
        before = _as_started(base.tensors, live)
        for generation in at:
            assert generation is not None
            replay(es, self.journal, generation, True, partial(_told, after, generation))
            yield Moment(generation, es.weights.checksum(), before, live)

    def record(self) -> dict[str, Any]:
        """With the settings that decide the run's result."""
        header = self.journal.header
        done = len(self.journal.generations)
        settings = {**asdict(header.config), "memory": "master" if header.master else "lean"}
        return {
            "name": self.name,
            "kind": "run",
            "source": self.source,
            "generations": done,
            "chain": self.journal.chain_at(done),
            "settings": settings,
            "noise_norms": self._noise_norms(),
            "dtype": str(usual_dtype(header)).removeprefix("torch."),
        }

    def notes(self) -> list[str]:
        """Why there is no law, where its decay pulls to another model."""
        if not self._pulled_away:
            return []
        return [
            f"{self.name}: the law of the norm is left out, which is of decay to the model that a "
            "run started from, and this run's pulls to another."
        ]

    @property
    def _pulled_away(self) -> bool:
        """Whether decay pulls to another model. The base's own file can have another checksum than
        the weights loaded from it: an anchor is elsewhere only where one was named."""
        header = self.journal.header
        return bool(self.anchors) and header.anchor_checksum not in (None, header.base_checksum)

    def _noise_norms(self) -> list[float] | None:
        """What the coefficients alone make of independent noise; None where no law is known."""
        if self._pulled_away:
            return None
        elements = sum(tensor.elements for tensor in self.journal.header.tensors)
        try:
            norms = norms_of_coefficients(self.journal.generations, elements)
        except ConfigError:  # l1 and l2 decay in turn
            return None
        return [float(norm) for norm in norms]


class Checkpoint:
    """A model's folder, by whatever method it was tuned."""

    def __init__(self, name: str, source: str, tensors: CheckpointTensors) -> None:
        self.name, self.source, self.tensors = name, source, tensors

    def generations(self, at: Sequence[str], every: int | None) -> list[int | None]:
        """It has one moment, and no number for it."""
        return [None]

    def moments(
        self,
        base: Base,
        at: Sequence[int | None],
        after: Steps = lambda done, wanted: None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> Iterator[Moment]:
        """The files' weights as they are."""
        yield Moment(None, None, base.tensors, self.tensors)

    def notes(self) -> list[str]:
        """None."""
        return []

    def record(self) -> dict[str, Any]:
        """Without what only a journal tells."""
        usual = max(self.tensors.values(), key=torch.Tensor.numel).dtype
        return {
            "name": self.name,
            "kind": "checkpoint",
            "source": self.source,
            "generations": None,
            "chain": None,
            "settings": None,
            "noise_norms": None,
            "dtype": str(usual).removeprefix("torch."),
        }


def open_subject(source: str, name: str, anchors: Sequence[Path] = ()) -> Subject:
    """A run's folder, its journal or an exported one, or a model's folder; DataError for another
    thing. Of a run without a journal (GRPO's) it is the model that it left. anchors: of `Run`."""
    path = at_home(source)
    if path.is_dir() and not journal_path(path).exists():
        for folder in (path, path / LEFT):
            if folder.is_dir() and is_model_folder(folder):
                return Checkpoint(name, source, CheckpointTensors(folder))
    if not path.exists() or (path.is_dir() and not journal_path(path).exists()):
        seen = "has neither a journal nor safetensors" if path.exists() else "is not there"
        raise DataError(
            f"'{source}' {seen}; give a run's folder (with its journal.esj), an exported journal, "
            "or a model's folder with config.json and *.safetensors."
        )
    return Run(name, source, read_journal(path), anchors)


def names_of(sources: Sequence[str]) -> list[str]:
    """Short names to tell sources apart by: their last parts, with as much before as it takes.

    A run's own model is named as the run. ConfigError where a source is given twice.
    """
    whole = [at_home(source).absolute().parts for source in sources]
    parts = [p[:-1] if p[-1:] == (LEFT,) else p for p in whole]
    if len(set(parts)) < len(parts):  # a run and its model
        parts = whole
    names = told_apart(parts)
    if names is None:
        raise ConfigError("one run or checkpoint is given twice; give each once.")
    return names


def told_apart(paths: Sequence[tuple[str, ...]]) -> list[str] | None:
    """The last parts of each path, as many as tell all apart; None where two are one."""
    for depth in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return None


class _InDtypes(Mapping[str, torch.Tensor]):
    """Tensors of a file in the dtypes that a model holds them in, cast when they are asked for."""

    def __init__(self, tensors: Tensors, dtypes: Mapping[str, torch.dtype]) -> None:
        self._tensors, self._dtypes = tensors, dtypes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)


def _as_started(stored: Tensors, live: Tensors) -> Tensors:
    """The weights of `live` as they are now, from the file where it holds them, else copied."""
    if all(name in stored and stored[name].shape == t.shape for name, t in live.items()):
        cast = _InDtypes(stored, {name: t.dtype for name, t in live.items()})
        if all(torch.equal(cast[name], t.detach().cpu()) for name, t in live.items()):
            return cast
    return {name: t.detach().cpu().clone() for name, t in live.items()}


def _told(after: Steps, wanted: int, done: int) -> None:
    after(done, wanted)


def _number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ConfigError(
            f"--at has {word!r}; expected generations and 'last', such as 0,10,last."
        ) from None

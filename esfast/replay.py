"""Base weights + journal -> the weights of the run, to the bit.

Replay drives the same `EvolutionStrategy.apply` as the run did, so it holds for every target,
thread count and memory mode that gives the same bits (master memory is a run's own: its updates are
not rounded, and the header says so). It makes one pass over the weights a generation. A pass over
several, each rounded in registers, would have the same bits, but of the 7.5 ns a parameter of a
Gaussian update (population 30, one core) memory takes 0.06: there is nothing to save.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from esfast.anchor import Anchor
from esfast.errors import ConfigError, DataError, StateError
from esfast.evolution import EvolutionStrategy
from esfast.journal import Journal, JournalWriter, journal_path
from esfast.journal_format import GenerationRecord, JournalHeader, SegmentRecord, TensorSpec
from esfast.members import whole
from esfast.parameters import ParameterTable
from esfast.snapshots import load_snapshot
from esfast.stored_names import require_live, stored_tensors
from esfast.weights import Weights


def header_of(
    es: EvolutionStrategy, run: Mapping[str, Any] | None = None, checksum_every: int = 10
) -> JournalHeader:
    """The header of a journal that starts from `es` as it is now, at generation 0.

    run: JSON of the run's own, for its readers; checksum_every: generations. ConfigError where they
    are not.
    """
    every = whole(checksum_every)
    if every is None or every < 1:
        raise ConfigError(
            f"checksum_every is {checksum_every!r}; it is a whole number of generations, 1 or more."
        )
    _require_json(run)
    if es.generation:
        raise StateError(
            f"a journal starts at generation 0, and this run is at {es.generation}; keep the "
            "journal from the start."
        )
    es.weights.restore()
    return JournalHeader(
        base_checksum=es.weights.checksum(),
        tensors=es.weights.specs(),
        config=es.config,
        master=es.weights.memory == "master",
        anchor_checksum=es.weights.anchor_checksum() if es.config.decay is not None else None,
        checksum_every=every,
        run=run or {},
    )


def _require_json(run: Mapping[str, Any] | None) -> None:
    try:
        json.dumps(dict(run or {}), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"what a journal should hold of the run is no JSON ({error}); give a dict of texts, "
            "numbers, lists and dicts."
        ) from None


def usual_dtype(header: JournalHeader) -> torch.dtype:
    """Of most of the weights; a tensor that the model keeps in another is kept in it again."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.dtype] += tensor.elements
    return getattr(torch, counts.most_common(1)[0][0]) if counts else torch.bfloat16


def table_for(header: JournalHeader, module: torch.nn.Module) -> ParameterTable:
    """The tensors of a model that a journal edits. DataError where they are not the journal's."""
    parameters = stored_tensors(module)
    missing = [t.name for t in header.tensors if t.name not in parameters]
    if missing:
        raise DataError(
            f"the base model has no tensor '{missing[0]}' ({len(missing)} of the journal's "
            f"{len(header.tensors)} are not there); give the model that the run started from."
        )
    edited = {t.name: parameters[t.name] for t in header.tensors}
    table = ParameterTable.from_tensors(require_live(edited))
    _require_tensors(header, table.specs)
    return table


def _require_tensors(header: JournalHeader, seen: Iterable[TensorSpec]) -> None:
    recorded = {tensor.name: tensor for tensor in header.tensors}
    given = {tensor.name: tensor for tensor in seen}
    for name in sorted(recorded.keys() | given.keys()):
        was, now = recorded.get(name), given.get(name)
        if was != now:
            raise DataError(
                f"the base model's '{name}' is {_shown(now)}, and in the journal {_shown(was)}; "
                "give the model that the run started from, in the dtype that it had."
            )


def _shown(tensor: TensorSpec | None) -> str:
    return "not there" if tensor is None else f"{tensor.dtype} of shape {tensor.shape}"


def require_base(header: JournalHeader, es: EvolutionStrategy) -> None:
    """DataError where `es` does not hold the weights and anchor that the journal starts from."""
    _require_tensors(header, es.weights.specs())
    es.weights.restore()
    base = es.weights.checksum()
    anchor = None if header.anchor_checksum is None else es.weights.anchor_checksum()
    if base != header.base_checksum:
        raise DataError(
            f"the base weights have checksum {base}, and the journal starts from "
            f"{header.base_checksum}: another model or another revision of it. Give the model that "
            "the run started from."
        )
    if anchor != header.anchor_checksum:
        raise DataError(
            f"the base is the run's, but the anchor has checksum {anchor}, and the run's decay "
            f"pulled to {header.anchor_checksum}: another model or another revision of it. Name it "
            "with --anchor-model; a later stage of esfast continual pulls to the model that the "
            "sequence started from."
        )


def strategy_of(
    journal: Journal,
    module: torch.nn.Module,
    folder: Path | None = None,
    memory: str = "lean",
    threads: int | None = None,
    elsewhere: Sequence[Path] = (),
) -> EvolutionStrategy:
    """A run at generation 0 over the base model of a journal, ready for `replay`.

    folder: the base's safetensors, whose mapped file is decay's anchor where the run's was; else
    the weights as they are now. elsewhere: folders of other models, whose file is the anchor where
    it has the recorded bits. Raises DataError where the model is not the journal's base, or no
    anchor is the journal's.
    """
    header = journal.header
    table = table_for(header, module)
    mode = "master" if header.master else memory
    anchor = _anchor(header, table, [*([] if folder is None else [folder]), *elsewhere])
    es = EvolutionStrategy(table, header.config, memory=mode, anchor=anchor, threads=threads)
    require_base(header, es)
    return es


def _anchor(header: JournalHeader, table: ParameterTable, folders: Sequence[Path]) -> Anchor | None:
    """The first folder's tensors whose bits are the recorded ones (they may be wider than the live
    weights), else None: a copy of the live weights."""
    for folder in folders if header.anchor_checksum is not None else ():
        anchor = Anchor.from_safetensors(folder, table)
        if Weights(table, anchor=anchor).anchor_checksum() == header.anchor_checksum:
            return anchor
    return None


def replay(
    es: EvolutionStrategy,
    journal: Journal,
    until: int | None = None,
    verify: bool = False,
    after: Callable[[int], None] = lambda generation: None,
) -> int:
    """Applies a journal's generations to `es`, from where it is up to `until` (all, by default).

    verify: compares every recorded checksum on the way (a reading pass each). after: called with
    the generations done. Returns how many checksums were compared. Raises ConfigError for an
    `until` that the journal does not reach or settings that are not its own, StateError for a
    checksum that differs.
    """
    require_settings(journal.header, es)
    done = len(journal.generations)
    last = done if until is None else until
    if not es.generation <= last <= done:
        raise ConfigError(
            f"generation {last} is not there: the journal holds {done}, and the weights are at "
            f"{es.generation}."
        )
    first, compared = es.generation, 0
    for record in (r for r in journal.records if first <= r.generation <= last):
        if verify and not isinstance(record, SegmentRecord) and record.checksum is not None:
            _require_checksum(es, record.checksum)
            compared += 1
        if isinstance(record, GenerationRecord) and record.generation < last:
            es.apply(record)
            after(es.generation)
    return compared


def _require_checksum(es: EvolutionStrategy, recorded: str) -> None:
    seen = es.weights.checksum()
    if seen != recorded:
        raise StateError(
            f"after {es.generation} generations the weights have checksum {seen}, and the journal "
            f"recorded {recorded}: the run and its replay are apart. Was the run's model edited by "
            "something else, or is this another version of esfast?"
        )


def catch_up(
    es: EvolutionStrategy,
    journal: Journal,
    snapshots: Path | None = None,
    note: Callable[[str], None] = warnings.warn,
    after: Callable[[int], None] = lambda generation: None,
) -> None:
    """Brings `es`, made over the base, to the end of a journal, comparing every checksum.

    snapshots: a folder whose newest usable snapshot replay may start from; note: told what was
    passed over or dropped; after: called with the generations done. Errors as of `require_base` and
    `replay`, before the weights change where the base is another.
    """
    if journal.torn is not None:
        note(journal.torn)
    require_base(journal.header, es)
    if snapshots is not None:
        es.generation = load_snapshot(snapshots, es.weights, journal, note)
    replay(es, journal, verify=True, after=after)


def keep_journal(
    es: EvolutionStrategy,
    path: str | Path,
    run: Mapping[str, Any] | None = None,
    checksum_every: int = 10,
) -> JournalWriter:
    """From now on every `es.step` is on disk before the weights move.

    Where `path` holds a journal, the run goes on from its end: `es` must be as it was made at the
    start (same model, same settings), and is brought there to the bit; the journal's own
    checksum_every stays. Raises ConfigError for settings that differ, DataError for another model
    or a damaged journal, StateError where another process writes it.
    """
    _require_json(run)
    if not journal_path(path).exists():
        es.journal = JournalWriter.create(journal_path(path), header_of(es, run, checksum_every))
        return es.journal
    writer = JournalWriter.resume(path)
    try:
        require_settings(writer.header, es)
        catch_up(es, writer.journal)
        writer.append(SegmentRecord(es.generation, dict(run or {})))
    except BaseException:
        writer.close()
        raise
    es.journal = writer
    return writer


def require_settings(header: JournalHeader, es: EvolutionStrategy) -> None:
    """ConfigError, by name, where settings that decide the result are not the journal's."""
    recorded, given = asdict(header.config), asdict(es.config)
    recorded["memory"] = "master" if header.master else "lean or shadow"
    given["memory"] = "master" if es.weights.memory == "master" else "lean or shadow"
    changed = [
        f"{name} {given[name]!r} (the journal has {recorded[name]!r})"
        for name in recorded
        if given[name] != recorded[name]
    ]
    if changed:
        raise ConfigError(
            f"the journal cannot be followed with {', '.join(changed)}: its result would be "
            "another. Give the settings that it started with, or start a new run."
        )

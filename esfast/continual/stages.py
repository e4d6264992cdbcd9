"""The stages of a sequence: each an ordinary run folder, chained by the weights' checksums.

    DIR/stage-1-NAME/    base: the model given
    DIR/stage-2-NAME/    base: stage-1-NAME/model
    DIR/continual.json   what was asked and what came of it

A stage's journal starts with the checksum of its base, and ends with a mark that has the checksum
of what it trained; the next must start from that one. So the original model and the journals, one
after another, replay to the last stage's bits (`esfast replay`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esfast.errors import StateError
from esfast.journal import JOURNAL, Journal, read_journal
from esfast.journal_format import MarkRecord
from esfast.prior.evaluation import PRIOR, label, read_scores
from esfast.prior.scores import PriorScore
from esfast.run_folder import MODEL, SUMMARY, read_json

CONTINUAL = "continual.json"
SEEDS_A_STAGE = 1_000_000
"""Stage k draws from seed + 1,000,000 (k - 1): no stage repeats another's noise or prompts."""


@dataclass(frozen=True)
class Stage:
    """One task of the sequence.

    number: from 1; source: what names the task; folder: the run's; begins: generations of the
    stages before.
    """

    number: int
    source: str
    generations: int
    folder: Path
    begins: int

    @property
    def model(self) -> Path:
        """Where the tuned model is, once the stage is finished."""
        return self.folder / MODEL

    @property
    def finished(self) -> bool:
        """Whether its run is over and all there."""
        if not (self.folder / SUMMARY).exists() or not self.model.is_dir():
            return False
        summary = read_json(self.folder / SUMMARY)
        done = (summary.get("status"), summary.get("generations"))
        return done == ("finished", self.generations)


def plan(folder: Path, sources: Sequence[str], generations: Sequence[int]) -> list[Stage]:
    """The stages of a sequence, in folders of their own."""
    stages, begins = [], 0
    for number, (source, count) in enumerate(zip(sources, generations, strict=True), start=1):
        name = "".join(c if c.isalnum() else "-" for c in label(source))
        stages.append(Stage(number, source, count, folder / f"stage-{number}-{name}", begins))
        begins += count
    return stages


def chain_of(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Base and end of finished stages, from their journals.

    Raises StateError where a stage does not start from the weights that the one before ended with.
    """
    links: list[dict[str, Any]] = []
    for stage in stages:
        journal = read_journal(stage.folder)
        base = journal.header.base_checksum
        if links and links[-1]["end_checksum"] != base:
            raise StateError(
                f"{stage.folder} starts from weights with checksum {base}, and the stage before "
                f"ended with {links[-1]['end_checksum']}: the chain is broken. Move {stage.folder} "
                "and what follows it away, and go on with --resume."
            )
        links.append(
            {
                "stage": stage.number,
                "task": label(stage.source),
                "source": stage.source,
                "generations": stage.generations,
                "journal": f"{stage.folder.name}/{JOURNAL}",
                "base_checksum": base,
                "anchor_checksum": journal.header.anchor_checksum,
                "end_checksum": _end(stage, journal),
                "chain": journal.chain_at(len(journal.generations)),
            }
        )
    return links


def _end(stage: Stage, journal: Journal) -> str:
    """The checksum of the mark that a whole run ends with."""
    marks = [record for record in journal.records if isinstance(record, MarkRecord)]
    if not marks or marks[-1].generation != stage.generations:
        raise StateError(
            f"{stage.folder} has a summary of {stage.generations} generations, and its journal "
            f"holds {len(journal.generations)} and no mark at their end: files of two runs are "
            "mixed there. Move it away, and go on with --resume."
        )
    return marks[-1].checksum


def scores_of(stage: Stage) -> list[PriorScore]:
    """What was evaluated in a stage, by generation; nothing where it has not begun.

    Raises DataError for a file that is damaged.
    """
    return sorted(read_scores(stage.folder / PRIOR), key=lambda score: score.generation)


def handed_on(stage: Stage) -> list[PriorScore]:
    """The scores at a stage's end as generation 0 of the next, which starts from those weights."""
    last = [score for score in scores_of(stage) if score.generation == stage.generations]
    return [replace(score, generation=0, seconds=0.0) for score in last]

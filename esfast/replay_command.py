"""A fine-tune from its journal alone: `esfast replay`, `esfast apply`, `esfast export-adapter`.

    esfast replay RUN --base MODEL --output DIR         base + journal -> a Hugging Face folder
    esfast export-adapter RUN -o tuned.esj              the journal, compressed: to send around
    esfast apply tuned.esj --base MODEL --output DIR    replay, with every checksum compared

The base has to be the run's to the bit, in the dtype that it was trained in (both are checked).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from esfast.checkpoint import save_model
from esfast.errors import ConfigError
from esfast.evolution import EvolutionStrategy
from esfast.failures import visible
from esfast.home_folders import model_place, place
from esfast.journal import JOURNAL, Journal, export_journal, journal_path, read_journal
from esfast.models import load_model, model_folder, without_bars
from esfast.provenance import provenance
from esfast.replay import replay, strategy_of, usual_dtype
from esfast.run_folder import CONFIG, require_free
from esfast.train_flags import thread_count
from esfast.weights import MEMORIES, Weights


def add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast replay`."""
    parser.add_argument("journal", type=place, metavar="RUN", help="run folder, or its journal.esj")
    _add_target_flags(parser)
    parser.add_argument("--until", type=int, default=None, help="generations; all if not given")
    parser.add_argument("--verify", action="store_true", help="compare every recorded checksum")


def add_apply_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast apply`."""
    parser.add_argument(
        "journal", type=place, metavar="ADAPTER", help="file of esfast export-adapter"
    )
    _add_target_flags(parser)
    parser.set_defaults(until=None, verify=True)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `esfast export-adapter`."""
    parser.add_argument("journal", type=place, metavar="RUN", help="run folder, or its journal.esj")
    parser.add_argument(
        "-o", "--output", required=True, type=place, metavar="FILE", help="such as tuned.esj"
    )


def _add_target_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="MODEL", help="the run's --model")
    parser.add_argument(
        "--anchor-model", default=None, metavar="MODEL", help="the run's --anchor-model"
    )
    parser.add_argument(
        "--output", required=True, type=model_place, metavar="DIR", help="new or empty folder"
    )
    parser.add_argument("--threads", type=thread_count, default=None, help="all cores if not given")
    parser.add_argument("--memory", choices=MEMORIES[:2], default="lean", help="same bits in both")


def run_replay(args: argparse.Namespace) -> int:
    """Writes the tuned model; also `esfast apply`. Refuses what it can before loading."""
    console = Console()
    journal = read_journal(args.journal)
    done = len(journal.generations)
    until = done if args.until is None else args.until
    if not 0 <= until <= done:
        raise ConfigError(f"--until is {until}, and the journal holds generations 0 to {done}.")
    if args.anchor_model is not None and journal.header.config.decay is None:
        raise ConfigError(
            f"the run of {args.journal} has no weight decay, so nothing pulls to --anchor-model "
            f"{args.anchor_model}; leave it out."
        )
    require_free(Path(args.output))  # replacing a model could replace the base itself
    if journal.torn is not None:
        _say(console, journal.torn)
    loaded = load_model(args.base, dtype=usual_dtype(journal.header))
    anchor = loaded.folder if args.anchor_model is None else model_folder(args.anchor_model)
    es = strategy_of(journal, loaded.model, anchor, args.memory, args.threads)
    if args.anchor_model is not None:
        _tell_unread_anchor(console, es, args.anchor_model)
    compared = _with_bar(console, es, journal, until, args.verify)
    checksum = es.weights.checksum()
    with without_bars():
        folder = save_model(loaded, args.output, _made(args, journal, until, checksum))
    checked = f", {compared} recorded checksums compared" if args.verify else ""
    _say(console, f"{until} generations replayed{checked}; weights {checksum} in {folder}")
    return 0


def _tell_unread_anchor(console: Console, es: EvolutionStrategy, named: str) -> None:
    """Says so where the anchor is a copy of the base's weights as they were loaded: the file named
    lacks the recorded checksum."""
    anchor = es.weights.anchor if isinstance(es.weights, Weights) else None
    if anchor is not None and anchor.resident_bytes > 0:
        _say(
            console,
            f"--anchor-model {named} is not what the run's decay pulled to and is not read: the "
            "base is.",
        )


def _is_of_a_run(path: Path) -> bool:
    return path.name == JOURNAL and path.exists() and (path.parent / CONFIG).exists()


def run_export(args: argparse.Namespace) -> int:
    """Writes the compressed journal."""
    journal, target = read_journal(args.journal), Path(args.output)
    if _is_of_a_run(target) or (target.exists() and target.samefile(journal_path(args.journal))):
        raise ConfigError(
            f"{target} is a run's own journal, which holds more than what is exported (rewards, "
            "settings, where it went on); name another file with -o."
        )
    if journal.torn is not None:
        _say(Console(), journal.torn)
    model = str(journal.header.run.get("model", "not recorded"))
    name = Path(model).name if Path(model).is_absolute() else model
    size = export_journal(journal, args.output, {"model": name})
    weights = sum(tensor.nbytes for tensor in journal.header.tensors)
    _say(
        Console(),
        f"{len(journal.generations)} generations in {args.output}: {size:,} bytes, against "
        f"{weights:,} of weights. It names its base model ({name}) and the "
        "base's checksum; esfast apply needs both files.",
    )
    return 0


def _with_bar(
    console: Console, es: EvolutionStrategy, journal: Journal, until: int, verify: bool
) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("replaying generations", total=until)
        return replay(es, journal, until, verify, lambda n: bar.update(task, completed=n))


def _made(args: argparse.Namespace, journal: Journal, until: int, checksum: str) -> dict[str, Any]:
    return {
        "made": provenance(args.command_line),
        "base": str(args.base),
        "base_checksum": journal.header.base_checksum,
        "chain": journal.chain_at(until),
        "generations": until,
        "checksum": checksum,
    }


def _say(console: Console, text: str) -> None:
    console.print(visible(text), highlight=False, markup=False, soft_wrap=True)

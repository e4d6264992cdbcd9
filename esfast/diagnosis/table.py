"""What `esfast forgetting` shows when it is done: runs and checkpoints side by side.

80 columns hold it where names are short; forgetting.json and the CSV files have every digit, and
the means over prompts that are left out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from esfast.diagnosis.records import OWN, Row, models, scored, sparsity, within_one_ulp

PIPED = 200  # columns, where no terminal says how many it has
NARROWEST = 80  # below, a terminal breaks the lines, which keeps the numbers whole


def print_tables(console: Console, found: Row) -> None:
    """Drift, groups, KL, scores, and the notes."""
    wide = console
    if not console.is_terminal or console.width < NARROWEST:
        width = NARROWEST if console.is_terminal else PIPED
        wide = Console(file=console.file, width=width, markup=False, emoji=False)
    for title, table in (
        ("change of the weights", _drift(found)),
        ("norm, and share |Δ|<1e-6, by module group after the last generation", _groups(found)),
        ("KL in nats a token, exact at sampled prefixes", _kl(found)),
        ("score of greedy answers", _scores(found)),
    ):
        if table.row_count:
            wide.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)
            wide.print(table)
    for note in found["notes"]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        justify: JustifyMethod = "right" if number else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=number > 0)
    return table


def _drift(found: Row) -> Table:
    columns = ("norm", "relative", "mean |Δ|", "max |Δ|", "|Δ|<1e-6", "Δ=0", "≤1 ulp", "90 % in")
    table = _table("model", "at", *columns)
    for subject in found["subjects"]:
        for record in subject["drift"]:
            whole = record["whole"]
            table.add_row(
                subject["name"],
                _number(record["generation"]),
                *(_short(whole[n]) for n in ("norm", "relative_norm", "mean_abs", "max_abs")),
                _share(sparsity(found, whole)),
                _share(whole["unchanged"]),
                _share(within_one_ulp(found, whole)),
                _share(record["energy"]["whole"]["elements_for"]["0.9"]),
            )
    return table


def _groups(found: Row) -> Table:
    last = {s["name"]: s["drift"][-1]["groups"] for s in found["subjects"] if s["drift"]}
    table = _table("group", *last)
    for group in found["groups"]:
        if any(group in groups for groups in last.values()):
            table.add_row(group, *(_group(found, groups.get(group)) for groups in last.values()))
    return table


def _group(found: Row, change: Row | None) -> str:
    return f"{_short(change['norm'])}  {_share(sparsity(found, change))}" if change else "-"


def _kl(found: Row) -> Table:
    """A block a set of prompts and norm, a row a model and generation, a column a direction."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for norm, name, model in models(found):
        for record in model["kl"]:
            row = rows.setdefault((_asked(norm, record), _named(name, record)), {})
            row[record["direction"]] = _estimate(record["exact"]["token_weighted"])
    directions = list(dict.fromkeys(direction for row in rows.values() for direction in row))
    return _blocks(
        _table("model", *directions),
        ((*key, *(row.get(d, "-") for d in directions)) for key, row in rows.items()),
    )


def _scores(found: Row) -> Table:
    rows = []
    for norm, name, model in scored(found):
        for record in model["scores"]:
            failed = record["failed_rewards"]
            mark = f", {failed} not scored" if failed else ""
            parts = (_interval(record, "score") + mark, _interval(record, "solved"))
            rows.append((_asked(norm, record), _named(name, record), *parts))
    return _blocks(_table("model", "score", "exactly right"), rows)


def _blocks(table: Table, rows: Iterable[tuple[str, ...]]) -> Table:
    """Adds ROWS of (block, cell, cell ...), a head above each block."""
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for block, *cells in rows:
        blocks.setdefault(block, []).append(tuple(cells))
    for block, inside in blocks.items():
        table.add_row(Text(block, style="bold"))
        for first, *others in inside:
            table.add_row(f"  {first}", *others)
    return table


def _asked(norm: str, record: Row) -> str:
    kept = "" if norm in (OWN, "base") else f", {norm}"
    return f"{record['prompts']} ({record['kind']}){kept}"


def _named(name: str, record: Row) -> str:
    return name if record["generation"] is None else f"{name}, {record['generation']}"


def _interval(record: Row, name: str) -> str:
    if record[name] is None:
        return "-"
    low, high = record[f"{name}_95"]
    return f"{record[name]:.3f} [{low:.3f}, {high:.3f}]"


def _estimate(estimate: Row) -> str:
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"


def _or_dash(show: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else show(value)


_short = _or_dash(lambda value: f"{value:.3g}")
_share = _or_dash(lambda value: f"{100 * value:.1f} %")
_number = _or_dash(lambda value: f"{value:.0f}")

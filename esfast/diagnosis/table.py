"""What `esfast forgetting` shows when it is done: runs and checkpoints side by side."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from esfast.diagnosis.records import Row, models, scored, sparsity, within_one_ulp

PIPED = 200  # columns, where no terminal says how many it has


def print_tables(console: Console, found: Row) -> None:
    """Drift, groups, KL, scores, and the notes."""
    wide = console if console.is_terminal else Console(file=console.file, width=PIPED)
    for table in (_drift(found), _groups(found), _kl(found), _scores(found)):
        if table.row_count:
            wide.print(table)
    for note in found["notes"]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _drift(found: Row) -> Table:
    columns = ("norm", "relative", "mean |Δ|", "max |Δ|", "|Δ|<1e-6", "Δ=0", "≤1 ulp", "90 % in")
    table = _table("change of the weights", "model", "generation", *columns)
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
    table = _table("norm and share |Δ|<1e-6, a module group, last generation", "group", *last)
    for group in found["groups"]:
        if any(group in groups for groups in last.values()):
            table.add_row(group, *(_group(found, groups.get(group)) for groups in last.values()))
    return table


def _group(found: Row, change: Row | None) -> str:
    return f"{_short(change['norm'])}  {_share(sparsity(found, change))}" if change else "-"


def _kl(found: Row) -> Table:
    means = ("nats a token, all tokens alike", "all prompts alike")
    table = _table("KL, exact at sampled prefixes", "model", "at", "prompts", "direction", *means)
    for norm, name, model in models(found):
        for record in model["kl"]:
            at = norm if record["generation"] is None else f"{norm}, {record['generation']}"
            table.add_row(
                name,
                at,
                f"{record['prompts']} ({record['kind']})",
                record["direction"],
                *(
                    _estimate(record["exact"][mean])
                    for mean in ("token_weighted", "prompt_averaged")
                ),
            )
    return table


def _scores(found: Row) -> Table:
    table = _table("score, greedy answers", "model", "at", "prompts", "score", "exactly right")
    for norm, name, model in scored(found):
        for record in model["scores"]:
            at = norm if record["generation"] is None else f"{norm}, {record['generation']}"
            prompts = f"{record['prompts']} ({record['kind']})"
            failed = record["failed_rewards"]
            mark = f", {failed} not scored" if failed else ""
            parts = (_interval(record, "score") + mark, _interval(record, "solved"))
            table.add_row(name, at, prompts, *parts)
    return table


def _interval(record: Row, name: str) -> str:
    if record[name] is None:
        return "-"
    low, high = record[f"{name}_95"]
    return f"{record[name]:.3f} [{low:.3f}, {high:.3f}]"


def _estimate(estimate: Row) -> str:
    return f"{estimate['value']:.4g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"


def _or_dash(show: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else show(value)


_short = _or_dash(lambda value: f"{value:.4g}")
_share = _or_dash(lambda value: f"{100 * value:.2f} %")
_number = _or_dash(lambda value: f"{value:.0f}")

"""The result on the terminal: what the device allows, then the tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esfast.bench.rows import Row, bandwidths, issue_limits
from esfast.bench.workload import BUFFER, CACHE, TORCH, UPDATE

NARROWEST = 80  # columns, where the output is no terminal
HEADINGS = ("", "time", "ns/param", "GB/s", "normals/s", "of its limit", "x torch")


def console() -> Console:
    """The terminal, or a page wide enough for the table."""
    out = Console()
    return out if out.is_terminal else Console(width=max(NARROWEST, out.width))


def show(out: Console, rows: Sequence[Row]) -> None:
    """Rows of one dtype and number of threads."""
    first = rows[0]
    for target in dict.fromkeys(row.target for row in rows if row.target != TORCH):
        shown = [row for row in rows if row.target in (target, TORCH)]
        threads = f"{first.threads} thread{'' if first.threads == 1 else 's'}"
        title = f"{first.table}, {first.dtype}, {target}, {threads}"
        out.print()
        out.print(title, style="bold", highlight=False)
        for line in _limit_lines(shown):
            out.print(line, highlight=False, markup=False)
        out.print(_table(shown))


def quiet_note(load: float | None, cores: int) -> str | None:
    """What a load average before the start means for the figures; None where it is low."""
    if load is None or load < 0.25 * cores:
        return None
    return (
        f"note: the load average was {load:.1f} on {cores} cores before this began, so other work "
        "is running: times come out too long and vary, and torch's threads suffer most, which "
        "flatters x torch; run again on a quiet machine."
    )


def _limit_lines(rows: Sequence[Row]) -> list[str]:
    moved = ", ".join(f"{name} {value:.3g}" for name, value in bandwidths(rows).items())
    lines = [f"bandwidth  {moved} GB/s"]
    made = ", ".join(f"{name} {short(value)}" for name, value in issue_limits(rows).items())
    return [*lines, f"issue      {made} normals/s"] if made else lines


def _table(rows: Sequence[Row]) -> Table:
    """A block a noise and memory mode; 80 columns hold it."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    kernels = [row for row in rows if row.memory not in (BUFFER, CACHE)]
    before, whole = None, max((row.parameters for row in kernels), default=0)
    for row in sorted(kernels, key=lambda row: row.memory == TORCH):
        name = "no noise" if row.noise == "none" else f"{row.noise}, {row.memory}"
        if name != before:
            table.add_row(Text(name, style="bold"))
        before = name
        table.add_row(*_cells(row, whole), style="dim" if row.memory == TORCH else None)
    return table


def _cells(row: Row, whole: int) -> tuple[str, ...]:
    """whole: parameters of the table, of which a row may have run over a part."""
    name = f"{row.kernel} {row.population}" if row.kernel == UPDATE else row.kernel
    if row.parameters < whole:
        name += f", 1/{round(whole / row.parameters)}"
    share = f"{100 * row.share_of_limit:.0f} % {row.limit}" if row.share_of_limit else ""
    return (
        f"  {name}",
        _seconds(row.seconds),
        f"{row.ns_per_parameter:.3g}",
        f"{row.gb_per_s:.3g}" if row.gb_per_s else "",
        short(row.normals_per_s) if row.normals_per_s else "",
        share,
        _times(row.times_peer) if row.times_peer else "",
    )


def short(value: float) -> str:
    """1.23e9 as 1.23 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _times(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"

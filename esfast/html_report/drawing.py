"""Figures for the page: each as SVG, for light and for dark, and as PNG.

Colours: Okabe and Ito's, which are told apart under every common colour blindness; groups beyond
the seventh repeat them with another line and marker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from esfast.errors import ConfigError

WIDTH = 9.6  # inches, at the 66 rem of the page
PIXELS_PER_INCH = 170
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
FONT = 9.0


@dataclass(frozen=True)
class Theme:
    """Colours of one look; `groups` by group of runs."""

    ink: str
    soft: str
    grid: str
    page: str
    groups: tuple[str, ...]

    def colour(self, group: int) -> str:
        """Of a group of runs."""
        return self.groups[group % len(self.groups)]


LIGHT = Theme(
    "#1c2328", "#5b6670", "#e3e7ea", "#ffffff",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d"),
)  # fmt: skip
DARK = Theme(
    "#e4e8ea", "#9aa6ae", "#2c343a", "#14181b",
    ("#4aa8e0", "#f08a3c", "#2fc795", "#e3a0c6", "#f2c14e", "#9bd5f7", "#c4c9cc"),
)  # fmt: skip
Draw = Callable[[Any, Theme], None]


@dataclass(frozen=True)
class Series:
    """A curve: points with intervals (None: without), the group that gives its colour, its name."""

    label: str
    group: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Drawn:
    """One figure: the page's two SVGs, and the PNG for the folder beside it."""

    light: bytes
    dark: bytes
    png: bytes


def drawn(draw: Draw, height: float, made: str) -> Drawn:
    """Calls `draw(figure, theme)`; height: inches. Raises ConfigError without matplotlib.

    made: kept in the PNG's metadata.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"a report needs matplotlib ({error}); pip install matplotlib.") from None
    with rc_context(_settings(LIGHT)):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, height), dpi=PIXELS_PER_INCH, layout="constrained")
        draw(figure, LIGHT)
        figure.draw_without_rendering()  # lays out, for both files at once
        figure.set_layout_engine("none")
        light = _saved(figure, "svg", {"Date": None, "Creator": "esfast"})
        png = _saved(figure, "png", {"Software": "esfast", "Comment": made})
    return Drawn(light, darkened(light), png)


def darkened(svg: bytes) -> bytes:
    """A light drawing in the dark theme's colours: laying out takes a second, this none."""
    pairs = [
        (getattr(LIGHT, name), getattr(DARK, name)) for name in ("ink", "soft", "grid", "page")
    ]
    swapped = {
        old.encode(): new.encode()
        for old, new in (*pairs, *zip(LIGHT.groups, DARK.groups, strict=True))
    }
    return re.sub(b"#[0-9a-f]{6}", lambda found: swapped.get(found[0], found[0]), svg)


def _saved(figure: Any, kind: str, metadata: dict[str, Any]) -> bytes:
    file = BytesIO()
    figure.savefig(file, format=kind, metadata=metadata, transparent=kind == "svg")
    return file.getvalue()


def _settings(theme: Theme) -> dict[str, Any]:
    """Thin axes without a box, a faint grid, letters of one size."""
    inks = dict.fromkeys(("text.color", "axes.titlecolor"), theme.ink)
    softs = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), theme.soft
    )
    sizes = dict.fromkeys(
        ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"), FONT
    )
    return {
        **inks,
        **softs,
        **sizes,
        "xtick.labelsize": FONT - 1,
        "ytick.labelsize": FONT - 1,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.facecolor": theme.page,
        "figure.facecolor": theme.page,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "axes.linewidth": 0.7,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "legend.frameon": False,
        "lines.linewidth": 1.5,
        "lines.markersize": 4,
        "svg.hashsalt": "esfast",
        "text.usetex": False,
        "font.family": "DejaVu Sans",
    }


def plain(label: str) -> str:
    """A label without matplotlib's mathematics, on one line."""
    shown = "".join(c if c.isprintable() else "?" for c in label).replace("$", r"\$")
    shown = shown if len(shown) <= 48 else f"{shown[:45]}..."
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib hides labels with _


def curve(axes: Any, series: Series, theme: Theme) -> None:
    """A line with markers, and a band for its intervals."""
    colour, turn = theme.colour(series.group), series.group // len(theme.groups)
    style = LINES[1] if series.dashed else LINES[turn % len(LINES)]
    marker = MARKERS[series.group % len(MARKERS)]
    if series.low is not None and series.high is not None:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(series.x, series.y, style, color=colour, marker=marker, label=plain(series.label))


def whole_generations(axes: Any) -> None:
    """Ticks at whole numbers, also where there is one generation alone."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend_below(figure: Any, columns: int = 4) -> None:
    """One legend for all panels of a figure; none for a single name."""
    unique: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        unique = {**dict(zip(labels, handles, strict=True)), **unique}
    if len(unique) > 1:
        figure.legend(
            unique.values(), unique.keys(), loc="outside lower center",
            ncols=min(columns, len(unique)),
        )  # fmt: skip


def grid_of(figure: Any, count: int, columns: int, least: int = 1) -> list[Any]:
    """So many axes in rows of `columns`, or of `count` but `least` where that is fewer; what is
    left of the last row is empty."""
    columns = max(least, min(columns, count))
    all_axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for axes in all_axes[count:]:
        axes.set_axis_off()
    return all_axes[:count]

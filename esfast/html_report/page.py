"""HTML from text, numbers and figures. Whatever is not `Html` already is escaped.

Model output, run names and settings come from outside: control characters, lone surrogates and the
marks that reverse a line's direction are written out, so that nothing on the page is hidden.
"""

from __future__ import annotations

import base64
import html
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import TYPE_CHECKING, Any

from esfast.html_report.style import PAGE, STYLE

if TYPE_CHECKING:
    from esfast.html_report.run_data import RunData

DASH = "–"


class Html(str):
    """Text that is markup already."""


@dataclass(frozen=True)
class Missing:
    """What a run does not have, and the command that would add it (None: nothing would)."""

    run: str
    what: str
    command: str | None


@dataclass
class Section:
    """A part of the report: its parts in order, and what is missing of it."""

    key: str
    title: str
    parts: list[Html] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def lacks(
        self,
        what: str,
        runs: Iterable[RunData],
        command: Callable[[RunData], str] | None = None,
    ) -> None:
        """Notes what these runs do not have, and what would add it."""
        self.missing += [Missing(run.name, what, command and command(run)) for run in runs]

    def html(self) -> Html:
        """The section, with a line for each thing that is missing."""
        absent = [_missing_line(what, items) for what, items in _by_what(self.missing)]
        inner = "\n".join([*self.parts, *absent])
        title = text(self.title)
        return Html(f'<section id="{self.key}">\n<h2>{title}</h2>\n{inner}\n</section>')


def text(value: object) -> Html:
    """Escaped, with what cannot be seen written out; `Html` as it is."""
    if isinstance(value, Html):
        return value
    return Html(html.escape("".join(map(_visible, str(value))), quote=True))


def _visible(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co"):
        return character
    return f"\\u{ord(character):04x}"


def paragraph(value: object, kind: str = "") -> Html:
    """A paragraph; `kind` is its class."""
    attribute = f' class="{kind}"' if kind else ""
    return Html(f"<p{attribute}>{text(value)}</p>")


def code(value: object) -> Html:
    """A command or file."""
    return Html(f"<code>{text(value)}</code>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Parts after one another, each escaped where it is text."""
    return Html(text(between).join(text(part) for part in parts))


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    caption: object = "",
    kind: str = "numbers",
) -> Html:
    """A table whose first column names its rows; kind: "numbers" (right-aligned) or "words".

    Columns that hold nothing but dashes are left out of a table of numbers.
    """
    rows = [tuple(row) for row in rows]
    if kind == "numbers":
        kept = [n for n in range(len(head)) if not n or any(row[n] != DASH for row in rows)]
        head, rows = [head[n] for n in kept], [tuple(row[n] for n in kept) for row in rows]
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "\n".join(_row(row) for row in rows)
    said = f'<p class="caption">{text(caption)}</p>\n' if caption else ""
    return Html(
        f'{said}<div class="wide"><table class="{kind}">\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(cells: Sequence[object]) -> str:
    first, *others = cells
    rest = "".join(f"<td>{text(cell)}</td>" for cell in others)
    return f'<tr><th scope="row">{text(first)}</th>{rest}</tr>'


def figure(light: bytes, dark: bytes, caption: object, label: str) -> Html:
    """An SVG in two themes, inlined; `label` is read where it cannot be seen."""
    sources = [base64.b64encode(svg).decode("ascii") for svg in (light, dark)]
    kind = "data:image/svg+xml;base64,"
    return Html(
        f'<figure><picture><source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{kind}{sources[1]}"><img alt="{text(label)}" src="{kind}{sources[0]}">'
        f"</picture><figcaption>{text(caption)}</figcaption></figure>"
    )


def page(title: str, subtitle: object, sections: Sequence[Section], foot: object) -> str:
    """The whole document."""
    links = [Html(f'<a href="#{section.key}">{text(section.title)}</a>') for section in sections]
    return Template(PAGE).substitute(
        title=text(title),
        subtitle=text(subtitle),
        style=STYLE,
        contents="\n".join(links),
        sections="\n".join(section.html() for section in sections),
        foot=text(foot),
    )


def _by_what(missing: Sequence[Missing]) -> Iterable[tuple[str, list[Missing]]]:
    names = list(dict.fromkeys(item.what for item in missing))
    return [(what, [item for item in missing if item.what == what]) for what in names]


def _missing_line(what: str, items: Sequence[Missing]) -> Html:
    """One line for all runs that lack the same; the command is the first one's."""
    runs = list(dict.fromkeys(item.run for item in items))
    several = f"{', '.join(runs[:-1])} and {runs[-1]}" if len(runs) > 1 else runs[0]
    said = f"Not here for {several}: {what}."
    if items[0].command is None:
        return paragraph(said, "absent")
    others = f" (for {runs[0]}; the others likewise)" if len(runs) > 1 else ""
    return paragraph(
        joined([f"{said} It comes with ", code(items[0].command), others, "."]), "absent"
    )


# --- numbers -------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits; a dash for None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{places}f}"
    return f"{value:.{digits - 1}e}"


def score(value: float | None, interval: Sequence[float] | None = None, sign: bool = False) -> Html:
    """ "0.834" over "[0.790, 0.878]"; with `sign`, +0.834."""
    if value is None:
        return Html(DASH)
    form = "+.3f" if sign else ".3f"
    if interval is None:
        return text(f"{value:{form}}")
    return over(f"{value:{form}}", f"[{interval[0]:{form}}, {interval[1]:{form}}]")


def over(first: object, second: object) -> Html:
    """A value, and in small letters below it what goes with it."""
    return Html(f'{text(first)} <span class="below">{text(second)}</span>')


def unscored(shown: Html | str, failed: int) -> Html | str:
    """A score as it is shown, and how many of its answers could not be scored: they count with
    the task's failure reward, of which the interval knows nothing."""
    if not failed:
        return shown
    return joined([shown, Html(' <span class="below changed">'), f"{failed:,} not scored",
                   Html("</span>")])  # fmt: skip


def at_end(shown: Html | str, at: int | None, end: int) -> Html | str:
    """A value, with the generation that it is of where that is not the last one."""
    return shown if at is None or at == end else over(shown, f"at generation {at}")


def at_generations(counts: Mapping[int, int]) -> str:
    """ "12 at generation 3", "40 at 5 generations from 2 to 9": counts by generation, some."""
    total = f"{sum(counts.values()):,}"
    if len(counts) == 1:
        return f"{total} at generation {next(iter(counts))}"
    return f"{total} at {len(counts)} generations from {min(counts)} to {max(counts)}"


def percent(share: float | None) -> str:
    """ "12.3 %"; small and nearly whole shares keep the digits that tell them from 0 and 100."""
    if share is None:
        return DASH
    distance = 100 * min(share, 1 - share)
    digits = 1 if distance >= 1 or distance == 0 else 1 - math.floor(math.log10(distance))
    return f"{100 * share:.{digits}f} %"


def large(count: float | None) -> Html:
    """A large number as 1.23 × 10^15."""
    if count is None:
        return Html(DASH)
    if abs(count) < 1e6:
        return Html(f"{count:,.0f}")
    power = math.floor(math.log10(abs(count)))
    return Html(f"{count / 10**power:.2f} × 10<sup>{power}</sup>")


def seconds(value: float | None) -> str:
    """ "3 min 20 s"."""
    if value is None:
        return DASH
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as "strategy.sigma" -> "0.001"."""
    out: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = "none" if value is None else _plain(value)
    return out


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple, Mapping)):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)

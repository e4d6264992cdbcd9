"""The pictures of a diagnosis, drawn from forgetting.json alone.

norm.png             the norm over the generations, with what its steps make as noise
heat_rms.png         layer x module group: root mean square of the change
heat_sparsity.png    the same: share of elements with |delta| < 1e-6
sparsity.png         the shares a group, absolute and in units in the last place
energy.png           the energy that the largest elements hold
kl.png               KL in both directions on every set of prompts
equal_norm.png       KL of changes of one length, and of noise of that length
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import Any

from esfast.diagnosis.records import EQUAL, OWN, Row, last, models, sparsity, within_one_ulp
from esfast.plots import picture
from esfast.provenance import one_line

COLOURS = ("#27465f", "#c4572e", "#5a8f69", "#8d6cab", "#b8902f", "#4f9fb5", "#7a7a7a")
GREY = "#999999"
LEGEND = 0.28  # of the height, above the bars
FAR_APART = 15  # norms of which a linear axis shows the smaller as 0
DIRECTIONS = ("KL(base || tuned)", "KL(tuned || base)")
Panel = Callable[[Any], None]


def draw(folder: Path, found: Row) -> list[Path]:
    """Draws what there is; returns the pictures. ConfigError without matplotlib."""
    subjects = [s for s in found["subjects"] if s["drift"]]
    pictures: list[tuple[str, list[Panel]]] = [
        ("norm", [partial(_norm, found=found)]),
        ("heat_rms", [partial(_heat, found=found, subject=s, rms=True) for s in subjects]),
        ("heat_sparsity", [partial(_heat, found=found, subject=s, rms=False) for s in subjects]),
        ("sparsity", [partial(_bars, found=found, ulps=ulps) for ulps in (False, True)]),
        ("energy", [partial(_energy, found=found)]),
        ("kl", _kl_panels(found, OWN)),
        ("equal_norm", [*_kl_panels(found, EQUAL), *_score_panels(found)]),
    ]
    made = one_line(found["made"])
    paths = []
    for name, panels in pictures:
        if panels:
            picture(folder / f"{name}.png", panels, made)
            paths.append(folder / f"{name}.png")
    return paths


def _norm(axes: Any, found: Row) -> None:
    ends = [_last(subject)["whole"]["norm"] for subject in found["subjects"]]
    far_apart = 0 < FAR_APART * min(ends) < max(ends)
    for colour, subject in zip(cycle(COLOURS), found["subjects"], strict=False):
        if subject["kind"] == "checkpoint":
            norm = subject["drift"][0]["whole"]["norm"]
            axes.axhline(norm, color=colour, label=f"{subject['name']} (checkpoint)")
            continue
        first = 1 if far_apart else 0  # a logarithmic axis has no 0
        points = [(r["generation"], r["whole"]["norm"]) for r in subject["drift"]]
        shown = [point for point in points if point[0] >= first] or points
        axes.plot(*zip(*shown, strict=True), color=colour, marker="o", label=subject["name"])
        law = (subject["noise_norms"] or [])[: points[-1][0] + 1]
        at = range(first, len(law))
        axes.plot(at, law[first:], color=colour, linestyle=":", linewidth=1.2)
    if any(subject["noise_norms"] for subject in found["subjects"]):
        axes.plot([], [], color=GREY, linestyle=":", label="law: its steps as independent noise")
    axes.set(title="Norm of the change", xlabel="generation", ylabel="‖tuned − base‖₂")
    if far_apart:
        axes.set_yscale("log", nonpositive="mask")  # a law of 0 so far
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _heat(axes: Any, found: Row, subject: Row, rms: bool) -> None:
    """Rows: layers from 0, then what lies outside them. rms: of it, else the share below 1e-6."""
    record = subject["drift"][-1]
    cells = {(cell["layer"], cell["group"]): cell for cell in record["cells"]}
    layers: list[int | None] = [int(layer) for layer in record["layers"]]
    layers += [None] if any(layer is None for layer, _ in cells) else []
    groups = [group for group in found["groups"] if group in record["groups"]]
    shown = itemgetter("rms") if rms else partial(sparsity, found)
    rows = [[_or_nan(cells.get((layer, g)), shown) for g in groups] for layer in layers]
    top = _top(found, subject) if rms else 1.0
    style = {"aspect": "auto", "cmap": "viridis", "interpolation": "nearest"}
    image = axes.imshow(rows, vmin=0.0, vmax=top, **style)
    axes.figure.colorbar(image, ax=axes)
    step = max(1, len(layers) // 10)
    ticks = [n for n, layer in enumerate(layers) if layer is None or n % step == 0]
    if len(ticks) > 1 and ticks[-1] - ticks[-2] < step and layers[ticks[-1]] is None:
        del ticks[-2]
    names = ["outside" if layers[n] is None else str(layers[n]) for n in ticks]
    axes.set_yticks(ticks, names)
    axes.set_xticks(range(len(groups)), [g.replace("attention_", "attn. ") for g in groups])
    axes.tick_params(axis="x", labelsize=8)
    what = "rms of Δ" if rms else "share |Δ| < 1e-6"
    axes.set(title=f"{_short(subject['name'])}: {what}{_at(record)}", ylabel="layer")


def _top(found: Row, subject: Row) -> float:
    """The end of the colour scale: one for all subjects where they are within a factor of ten, so
    that an equal colour is an equal change; else the subject's own."""
    ends = {s["name"]: s["drift"][-1]["cells"] for s in found["subjects"] if s["drift"]}
    tops = {name: max(cell["rms"] or 0.0 for cell in cells) for name, cells in ends.items()}
    highest = max(tops.values())
    return (highest if highest < 10 * min(tops.values()) else tops[subject["name"]]) or 1.0


def _or_nan(cell: Row | None, value: Callable[[Row], float | None]) -> float:
    seen = value(cell) if cell is not None else None
    return math.nan if seen is None else seen


def _bars(axes: Any, found: Row, ulps: bool) -> None:
    """A cluster a module group, a bar a subject."""
    value = within_one_ulp if ulps else sparsity
    groups = [g for g in found["groups"] if any(g in _last(s)["groups"] for s in found["subjects"])]
    series = []
    for subject in found["subjects"]:
        record = _last(subject)
        changes = [record["whole"], *(record["groups"].get(g) for g in groups)]
        series.append([_or_nan(change, partial(value, found)) for change in changes])
    names = [s["name"] for s in found["subjects"]]
    _clusters(axes, ["all", *groups], names, series, COLOURS)
    axes.set_ylim(0, 1.0 + LEGEND)
    axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    title = "Change of at most one unit in the last place" if ulps else "Sparsity, |Δ| < 1e-6"
    axes.set(title=title, ylabel="share of elements")


def _clusters(
    axes: Any,
    ticks: Sequence[str],
    names: Sequence[str],
    series: Sequence[Sequence[float]],
    colours: Sequence[str],
    spans: Sequence[Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Bars, a cluster a tick; spans: (below, above) of each."""
    width = 0.8 / max(len(series), 1)
    for number, values in enumerate(series):
        at = [tick + width * (number - (len(series) - 1) / 2) for tick in range(len(ticks))]
        error = None if spans is None else list(zip(*spans[number], strict=True))
        axes.bar(
            at,
            values,
            width * 0.92,
            yerr=error,
            capsize=3,
            color=colours[number % len(colours)],
            label=_short(names[number]),
            error_kw={"linewidth": 1},
        )
    shown = [tick.replace("attention_", "attn.\n") for tick in ticks]
    axes.set_xticks(range(len(ticks)), shown, fontsize=8)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)


def _energy(axes: Any, found: Row) -> None:
    shares = found["energy_shares"]
    for colour, subject in zip(cycle(COLOURS), found["subjects"], strict=False):
        held = _last(subject)["energy"]["whole"]["held"]
        if held[0] is not None:
            axes.plot(shares, held, color=colour, marker="o", markersize=3, label=subject["name"])
    cuts = [4.6 * i / 200 for i in range(201)]
    dense = [(math.erfc(c / math.sqrt(2)), _gaussian_energy(c)) for c in cuts]
    axes.plot(*zip(*dense, strict=True), color=GREY, linestyle=":", label="Gaussian noise")
    axes.set(
        title="Energy held by the largest elements",
        xlabel="share of the elements",
        ylabel="share of Σ Δ²",
        xscale="log",
    )
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)


def _gaussian_energy(cut: float) -> float:
    """Of a standard normal, the share of the energy beyond `cut` deviations."""
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    return math.erfc(cut / math.sqrt(2)) + 2 * cut * density


def _kl_panels(found: Row, norm: str) -> list[Panel]:
    there = [(name, last(model["kl"])) for at, name, model in models(found) if at == norm]
    there = [(name, records) for name, records in there if records]
    if not there:
        return []
    return [partial(_kl, there=there, direction=d, norm=norm) for d in DIRECTIONS]


def _kl(axes: Any, there: list[tuple[str, list[Row]]], direction: str, norm: str) -> None:
    sets = list(dict.fromkeys((r["prompts"], r["kind"]) for _, records in there for r in records))
    series, spans = [], []
    for _, records in there:
        of = {r["prompts"]: r["exact"]["token_weighted"] for r in records
              if r["direction"] == direction}  # fmt: skip
        series.append([of[name]["value"] if name in of else math.nan for name, _ in sets])
        spans.append([_span(of.get(name)) for name, _ in sets])
    ticks = [f"{name}\n({kind})" for name, kind in sets]
    _clusters(axes, ticks, [name for name, _ in there], series, COLOURS, spans)
    what = "" if norm == OWN else ", changes of one length"
    axes.set(title=f"{direction}{what}", ylabel="nats a token, 95 % over prompts")
    axes.set_ylim(0, _highest(series, spans) * (1 + LEGEND))


def _highest(
    series: Sequence[Sequence[float]], spans: Sequence[Sequence[tuple[float, float]]]
) -> float:
    """The top of the longest bar with its interval; 1 where there is none."""
    tops = [
        value + above
        for values, pairs in zip(series, spans, strict=True)
        for value, (_, above) in zip(values, pairs, strict=True)
        if not math.isnan(value)
    ]
    return max(tops, default=0.0) or 1.0


def _span(estimate: Row | None) -> tuple[float, float]:
    if estimate is None:
        return 0.0, 0.0
    return estimate["value"] - estimate["low"], estimate["high"] - estimate["value"]


def _score_panels(found: Row) -> list[Panel]:
    controls = [(n, m["scores"]) for at, n, m in models(found) if at == EQUAL and m["scores"]]
    if not controls:
        return []
    return [partial(_scores, there=[("base", found["base_scores"]), *controls])]


def _scores(axes: Any, there: list[tuple[str, list[Row]]]) -> None:
    sets = list(dict.fromkeys((r["prompts"], r["kind"]) for _, records in there for r in records))
    series, spans = [], []
    for _, records in there:
        of = {r["prompts"]: r for r in records}
        series.append([of[name]["score"] for name, _ in sets])
        ends = [(of[name]["score"], *of[name]["score_95"]) for name, _ in sets]
        spans.append([(value - low, high - value) for value, low, high in ends])
    ticks = [f"{name}\n({kind})" for name, kind in sets]
    colours = (GREY, *COLOURS)
    _clusters(axes, ticks, [name for name, _ in there], series, colours, spans)
    axes.set(title="Score, changes of one length", ylabel="score, 95 % over prompts")
    axes.set_ylim(0, _highest(series, spans) * (1 + LEGEND))


def _last(subject: Row) -> Row:
    record: Row = subject["drift"][-1]
    return record


def _at(record: Row) -> str:
    return "" if record["generation"] is None else f", generation {record['generation']}"


def _short(name: str) -> str:
    return name if len(name) <= 28 else "…" + name[-27:]

"""The files of a diagnosis: forgetting.json, a CSV file a kind of number, and the pictures.

    drift_by_group.csv   a row a subject, generation and module group, "whole" first
    drift_by_layer.csv   a row a subject, generation, layer and group, "all" first
    energy.csv           a row a subject, generation, group and share of the elements
    kl.csv               a row a model, prompts, direction, estimator and mean
    scores.csv           a row a model and prompts

forgetting.json is written after the tables, and the pictures are drawn from it: where it is, the
tables are whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esfast.diagnosis.plots import draw
from esfast.diagnosis.records import Row, models, scored
from esfast.whole_file import write_table, write_whole

NAME = "forgetting.json"


def write_files(folder: Path, found: dict[str, Any], plots: bool) -> list[Path]:
    """Writes `found` (the head of esfast.forgetting says its keys) to `folder`; returns the files.

    Raises EsfastError where they cannot be written, ConfigError for plots without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "drift_by_group.csv": _by_group(found),
        "drift_by_layer.csv": _by_layer(found),
        "energy.csv": _energy(found),
        "kl.csv": _kl(found),
        "scores.csv": _scores(found),
    }
    written = [_csv(folder / name, list(rows)) for name, rows in tables.items()]
    write_whole(folder / NAME, json.dumps(found, indent=1, allow_nan=False).encode() + b"\n")
    pictures = draw(folder, found) if plots else []
    return [path for path in [*written, folder / NAME, *pictures] if path.exists()]


def _csv(path: Path, rows: list[Row]) -> Path:
    """Nothing where there are no rows."""
    if rows:
        write_table(path, list(rows[0]), rows)
    return path


def _moments(found: dict[str, Any]) -> Iterator[tuple[Row, Row]]:
    """The columns that name a measured generation, and its record."""
    for subject in found["subjects"]:
        for record in subject["drift"]:
            named = {"subject": subject["name"], "kind": subject["kind"]}
            yield {**named, "generation": record["generation"]}, record


def _by_group(found: dict[str, Any]) -> Iterator[Row]:
    for named, record in _moments(found):
        for group, change in {"whole": record["whole"], **record["groups"]}.items():
            yield {**named, "group": group, **_flat(found, change)}


def _by_layer(found: dict[str, Any]) -> Iterator[Row]:
    for named, record in _moments(found):
        for layer, change in record["layers"].items():
            yield {**named, "layer": layer, "group": "all", **_flat(found, change)}
        for cell in record["cells"]:
            place = {"layer": cell["layer"], "group": cell["group"]}
            yield {**named, **place, **_flat(found, cell)}


def _flat(found: dict[str, Any], change: Row) -> Row:
    """A CHANGE in columns."""
    plain = {
        name: value
        for name, value in change.items()
        if name not in ("below", "within_ulps", "layer", "group")
    }
    below = zip(found["thresholds"], change["below"], strict=True)
    within = zip(found["ulps"], change["within_ulps"], strict=True)
    return {
        **plain,
        **{f"below_{limit:g}": share for limit, share in below},
        **{f"within_{n:g}_ulp": share for n, share in within},
    }


def _energy(found: dict[str, Any]) -> Iterator[Row]:
    for named, record in _moments(found):
        curves = {"whole": record["energy"]["whole"], **record["energy"]["groups"]}
        for group, curve in curves.items():
            for share, held in zip(found["energy_shares"], curve["held"], strict=True):
                yield {**named, "group": group, "elements": share, "energy": held}


def _kl(found: dict[str, Any]) -> Iterator[Row]:
    for norm, name, model in models(found):
        for record in model["kl"]:
            plain = {
                key: value for key, value in record.items() if key not in ("exact", "log_ratio")
            }
            for estimator in ("exact", "log_ratio"):
                for mean, estimate in record[estimator].items():
                    chosen = {"estimator": estimator, "mean": mean}
                    yield {"model": name, "at": norm, **plain, **chosen, **estimate}


def _scores(found: dict[str, Any]) -> Iterator[Row]:
    for norm, name, model in scored(found):
        for record in model["scores"]:
            yield {"model": name, "at": norm, **_spread(record)}


def _spread(record: Row) -> Row:
    """Intervals in two columns."""
    columns: Row = {}
    for name, value in record.items():
        if name.endswith("_95"):
            low, high = value or (None, None)
            columns |= {f"{name[:-3]}_low": low, f"{name[:-3]}_high": high}
        else:
            columns[name] = value
    return columns

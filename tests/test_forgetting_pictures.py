"""The pictures of `esfast forgetting`."""

from __future__ import annotations

from typing import Any

import pytest

from esfast.diagnosis import plots


def test_far_apart_norms_are_drawn_from_the_first_generation_on() -> None:
    """A logarithmic axis has no 0: a line from generation 0 would fall to the bottom."""
    figure = pytest.importorskip("matplotlib.figure")

    def subject(name: str, norms: list[float], law: list[float] | None) -> dict[str, Any]:
        drift = [{"generation": n, "whole": {"norm": x}} for n, x in enumerate(norms)]
        return {"name": name, "kind": "run", "drift": drift, "noise_norms": law}

    subjects = [subject("es", [0.0, 20.0, 40.0], [0.0, 19.0, 41.0]), subject("g", [0.0, 0.5], None)]
    axes = figure.Figure().subplots()
    plots._norm(axes, {"subjects": subjects})
    lines = [line for line in axes.get_lines() if len(line.get_ydata())]
    assert axes.get_yscale() == "log" and len(lines) >= 3
    assert all(min(line.get_ydata()) > 0 for line in lines)
    near = figure.Figure().subplots()
    plots._norm(near, {"subjects": subjects[:1]})
    assert near.get_lines()[0].get_ydata()[0] == 0.0

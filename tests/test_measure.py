"""The clock of a run: every second has one name."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

import esfast
from esfast.cli import main
from esfast.measure import GENERATION, INSIDE, LOOP, SCORING, UPDATE, Clock


def test_every_second_has_one_name(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 4.5, 5.0])
    monkeypatch.setattr("esfast.measure.time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = Clock()
    clock.lap(GENERATION)
    clock.lap(SCORING)
    clock.lap(UPDATE)
    clock.lap("setup")
    assert clock.seconds == {GENERATION: 1.0, SCORING: 3.0, UPDATE: 0.5, "setup": 0.5}
    assert clock.outside_share() == pytest.approx(0.5 / 4.5)
    assert set(INSIDE) < set(LOOP)


def test_the_time_before_a_clock_starts_can_be_told(monkeypatch):
    assert Clock(earlier=2.5).seconds == {"setup": 2.5}
    assert 0 < esfast.BEGAN < time.perf_counter()
    seen = []
    monkeypatch.setattr("esfast.BEGAN", time.perf_counter() - 6.5)
    monkeypatch.setattr("esfast.info.run_info", lambda args: seen.append(args.started_before))
    monkeypatch.setattr("sys.argv", ["esfast", "info"])
    main()
    main(["info"])
    assert 6.5 <= seen[0] <= time.perf_counter() - esfast.BEGAN and seen[1] == 0.0

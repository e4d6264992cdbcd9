"""What the runs of both methods have in common: what they leave where they are stopped early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from test_grpo import make_run, same, weights_in

from esfast.run_folder import read_json


def test_ctrl_c_before_the_checkpoint_is_read_keeps_the_model_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are still the base's then, in a run that has two generations."""
    folder = tmp_path / "run"
    make_run(folder, generations=2, checkpoint_every=1).run()
    tuned = weights_in(folder)
    again = make_run(folder, done=2, generations=3, checkpoint_every=1)

    def impatient(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(again.prior, "due", impatient)
    result = again.run()
    assert (result.status, result.generations) == ("interrupted", 0)
    assert same(weights_in(folder), tuned)
    assert read_json(folder / "summary.json")["status"] == "interrupted"

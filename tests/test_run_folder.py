"""Where a run's folder lies."""

from __future__ import annotations

import re
from pathlib import Path

from esfast.run_folder import folder_for


def test_a_run_without_output_gets_a_folder_of_its_name_and_moment() -> None:
    made = folder_for(None, "reasoning_gym:leg_counting")
    assert made.parent == Path("runs")
    assert re.fullmatch(r"reasoning_gym-leg_counting-\d{8}-\d{6}", made.name)
    assert folder_for("there", "arithmetic") == Path("there")

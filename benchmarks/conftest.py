"""How large the benchmarks are: 9M parameters, which a large cache holds, or `--full`: 135M."""

from __future__ import annotations

import pytest
import workload


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="135M parameters instead of 9M")


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return workload.FULL if request.config.getoption("--full") else workload.SIXTEENTH

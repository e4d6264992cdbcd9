"""How large the benchmarks are: 9M parameters, which a large cache holds, or `--full`: 135M."""

from __future__ import annotations

import pytest

from esfast.bench.workload import Shapes, llama_shapes, sixteenth


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="135M parameters instead of 9M")


@pytest.fixture(scope="session")
def shapes(request: pytest.FixtureRequest) -> Shapes:
    whole = llama_shapes(layers=30, rows=49152)
    return whole if request.config.getoption("--full") else sixteenth(whole)

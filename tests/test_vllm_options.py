"""Options of vLLM's that cannot work are refused before it starts; vLLM is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esfast import ConfigError
from esfast.engines.vllm_options import require_options, require_plain


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("pipeline_parallel_size", 2, "2; .*--tensor-parallel-size"),
        ("data_parallel_size", 2, "2; .*--launcher ray --engines N"),
        ("load_format", "dummy", "random numbers"),
    ],
)
def test_what_would_spread_or_lose_the_weights(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is.*{says}"):
        require_options({name: value}, None)
    require_options({"pipeline_parallel_size": 1, "load_format": "safetensors"}, None)


def test_quantising_while_loading_is_the_options_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^quantization is fp8; .*Leave the option out"):
        require_plain(tmp_path, {"quantization": "fp8"})
    require_plain(tmp_path, {"quantization": None})

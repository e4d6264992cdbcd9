"""Scripts (`test_drop_in.py`) over several engines, and over vLLM's own processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from drop_in_scripts import (
    ALPHA,
    SIGMA,
    answers,
    checksum,
    free_port,
    new_llm,
    own_loop,
    rpc,
    script,
)
from vllm_tiny import save_tiny

from esfast import ConfigError, Member, ParameterTable, StateError, Weights, generation_seed
from esfast.models import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_this_process")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def plain(folder: Path) -> Weights:
    """The same weights in transformers, edited by esfast itself."""
    return Weights(ParameterTable.from_module(load_model(folder).model), threads=1)


@pytest.fixture(scope="module")
def shared(folder: Path) -> tuple[Any, Any]:
    return new_llm(folder), new_llm(folder)


@pytest.fixture
def pair(shared: tuple[Any, Any], folder: Path) -> tuple[Any, Any]:
    """Two engines with the weights as they were loaded, their updates counted from 0."""
    port = free_port()
    for rank, one in enumerate(shared):
        rpc(one, "load_weights_from_disk", str(folder))
        rpc(one, "init_inter_engine_group", "127.0.0.1", port, rank, 2)
    return shared


def both(pair: tuple[Any, Any], method: str, *arguments: Any) -> list[Any]:
    """Calls both engines at once, as drivers do; errors are returned."""
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(rpc, one, method, *arguments) for one in pair]
        return [call.exception() or call.result() for call in calls]


def test_an_engine_that_did_not_update_catches_up(pair: tuple[Any, Any], plain: Weights) -> None:
    """Updates and perturbations of engine 0, members of both, two rounds."""
    first, second = pair
    for generation in range(2):
        for seed, one in enumerate(pair):
            rpc(one, "perturb_self_weights", 100 + seed, SIGMA)
            rpc(one, "restore_self_weights", 100 + seed, SIGMA)
        rpc(first, "update_weights_from_seeds", [7, 8], [1.0, -1.0], ALPHA, 2)
        rpc(first, "perturb_self_weights", 9, 0.003)
        assert checksum(first) != checksum(second)
        assert both(pair, "broadcast_all_weights", 0) == [True, True]
        scale = ALPHA / 2
        key = generation_seed(0, 2 * generation)
        plain.update([Member(7), Member(8)], [scale, -scale], seed=key)
        plain.update([Member(9)], [0.003], seed=generation_seed(0, 2 * generation + 1))
        assert checksum(first) == checksum(second) == plain.checksum()


def test_engines_that_all_updated_are_left_alone(pair: tuple[Any, Any]) -> None:
    for one in pair:
        rpc(one, "update_weights_from_seeds", [7, 8], [1.0, -1.0], ALPHA, 2)
    before = checksum(pair[0])
    assert both(pair, "broadcast_all_weights", 1) == [True, True]
    assert checksum(pair[0]) == checksum(pair[1]) == before


def test_engines_that_load_the_same_go_on_alike(pair: tuple[Any, Any], folder: Path) -> None:
    """Whatever each did before."""
    rpc(pair[0], "update_weights_from_seeds", [1], [1.0], ALPHA, 1)
    both(pair, "load_weights_from_disk", str(folder))
    both(pair, "update_weights_from_seeds", [7, 8], [1.0, -1.0], ALPHA, 2)
    assert checksum(pair[0]) == checksum(pair[1])
    assert both(pair, "broadcast_all_weights", 0) == [True, True]


def test_a_broadcast_brings_an_engine_to_the_others_count(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    """One was started anew with the weights of the other."""
    rpc(pair[0], "update_weights_from_seeds", [1], [1.0], ALPHA, 1)
    both(pair, "broadcast_all_weights", 0)
    rpc(pair[0], "save_self_weights_to_disk", str(tmp_path / "model.safetensors"))
    rpc(pair[1], "load_weights_from_disk", str(tmp_path / "model.safetensors"))
    both(pair, "broadcast_all_weights", 0)
    both(pair, "update_weights_from_seeds", [7, 8], [1.0, -1.0], ALPHA, 2)
    assert checksum(pair[0]) == checksum(pair[1])
    assert both(pair, "broadcast_all_weights", 0) == [True, True]


def test_an_engine_that_there_is_none_of_is_no_source(pair: tuple[Any, Any]) -> None:
    for source in (5, -1, 0.5):
        for error in both(pair, "broadcast_all_weights", source):
            assert isinstance(error, ConfigError) and f"engine {source} of 2" in str(error)
    assert both(pair, "broadcast_all_weights", 0) == [True, True]


def test_engines_that_are_apart_say_so(pair: tuple[Any, Any]) -> None:
    rpc(pair[0], "update_weights_from_seeds", [7], [1.0], ALPHA, 1)
    rpc(pair[1], "update_weights_from_seeds", [8], [1.0], ALPHA, 1)
    for error in both(pair, "broadcast_all_weights", 0):
        assert isinstance(error, StateError) and "engine 1 has updates" in str(error)


# --- vLLM's own processes (last: ending them ends the groups of the engines here) ---------------


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip writes down of esfast's entry points, for a source tree that is not installed."""
    told = tmp_path / "path" / "esfast_plugin-0.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: esfast-plugin\nVersion: 0\n")
    written = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    line = next(one for one in written.splitlines() if "vllm_plugin:register" in one)
    entry = line.replace('"', "")
    (told / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")
    monkeypatch.syspath_prepend(told.parent)  # which the processes that are started inherit


def test_the_script_in_vllms_own_processes(
    folder: Path, plain: Weights, plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the prefix cache on: it is emptied there, although the script never does."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    other = new_llm(folder)
    try:
        before = answers(other)
        rpc(other, "perturb_self_weights", 11, 0.05)
        member = answers(other)
        assert member != before
        rpc(other, "restore_self_weights", 11, 0.05)
        assert answers(other) == before
        rewards = script(other, 1)
        assert checksum(other) == own_loop(plain, rewards)
    finally:
        other.llm_engine.engine_core.shutdown()


def test_an_error_of_two_workers_leaves_no_reply_behind(
    folder: Path, plain: Weights, plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's executor stops reading at the first worker that raises; what follows is still right,
    also after arguments that the method does not have."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    two = new_llm(folder, tensor_parallel_size=2)
    try:
        sums = [two.collective_rpc("weights_checksum")]
        for method, arguments, reason in (
            ("load_weights_from_disk", ("/no/such",), "there are no weights at /no/such"),
            ("perturb_self_weights", (None, SIGMA), "a perturbation of seed None"),
            ("restore_self_weights", (), "missing 2 required positional arguments"),
        ):
            with pytest.raises(Exception, match=reason):
                two.collective_rpc(method, args=arguments)
            sums.append(two.collective_rpc("weights_checksum"))
        assert sums == sums[:1] * 4
        assert two.collective_rpc("perturb_self_weights", args=(5, SIGMA)) == [True, True]
        changed = two.collective_rpc("weights_checksum")
        plain.perturb(Member(5), SIGMA)
        assert f"{sum(int(one, 16) for one in changed) % 2**64:016x}" == plain.checksum()
    finally:
        two.llm_engine.engine_core.shutdown()

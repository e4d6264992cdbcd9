"""A script as its users have it, over `collective_rpc` with the names of published ES workers: only
the class path is esfast's. What it ends with is what esfast's own loop ends with, to the bit.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_tiny import OPTIONS, PROMPTS, save_tiny

from esfast import (
    Anchor,
    AnchoredDecay,
    DataError,
    EvolutionStrategy,
    Member,
    ParameterTable,
    StateError,
    Weights,
    generation_seed,
    member_seed,
)
from esfast.engines.vllm_plugin import METHODS
from esfast.models import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_this_process")]

SIGMA, ALPHA, POPULATION = 0.02, 0.01, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def new_llm(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    extension = "esfast.engines.vllm_worker.WorkerExtension"  # the one line of docs/drop_in.md
    return LLM(str(folder), dtype="bfloat16", worker_extension_cls=extension, **OPTIONS, **options)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Any:
    return new_llm(folder)


@pytest.fixture
def llm(shared: Any, folder: Path) -> Any:
    """The engine with its weights as they were loaded, and its updates counted from 0."""
    parts = shared.llm_engine.model_executor.driver_worker.worker.__dict__
    parts.get("esfast_parts", {}).pop("drop_in", None)
    rpc(shared, "load_weights_from_disk", str(folder))
    return shared


@pytest.fixture
def plain(folder: Path) -> Weights:
    """The same weights in transformers, edited by esfast itself."""
    return Weights(ParameterTable.from_module(load_model(folder).model), threads=1)


def rpc(llm: Any, method: str, *arguments: Any) -> Any:
    return llm.collective_rpc(method, args=arguments)[0]


def checksum(llm: Any) -> str:
    return str(rpc(llm, "weights_checksum"))


def answers(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate(PROMPTS, wanted, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def reward(tokens: list[list[int]]) -> float:
    return sum(map(sum, tokens)) / 1000


def script(llm: Any, generations: int) -> list[list[float]]:
    """What people run, but that the seeds are derived, so that another loop has the same."""
    kept = []
    for generation in range(generations):
        seeds = [member_seed(0, generation, n) for n in range(POPULATION)]
        rewards = []
        for seed in seeds:
            llm.collective_rpc("perturb_self_weights", args=(seed, SIGMA, False))
            rewards.append(reward(answers(llm)))
            llm.collective_rpc("restore_self_weights", args=(seed, SIGMA))
        normal = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-8)
        llm.collective_rpc(
            "update_weights_from_seeds", args=(seeds, normal.tolist(), ALPHA, POPULATION)
        )
        llm.collective_rpc("broadcast_all_weights", args=(0,))
        kept.append(rewards)
    return kept


def own_loop(plain: Weights, rewards: list[list[float]]) -> str:
    es = EvolutionStrategy(
        plain.table, sigma=SIGMA, alpha=ALPHA, population_size=POPULATION, shaping="z_score"
    )
    for one in rewards:
        for _ in es.population():
            pass
        es.step(one)
    return es.weights.checksum()


def test_a_script_ends_with_the_weights_of_esfasts_own_loop(llm: Any, plain: Weights) -> None:
    before = answers(llm)
    rewards = script(llm, 3)
    assert len({reward for one in rewards for reward in one}) > POPULATION
    assert checksum(llm) == own_loop(plain, rewards) != plain.table.names
    assert answers(llm) != before


def test_every_method_of_scripts_is_followed() -> None:
    """Its errors are raised where all replies are read; the prefix cache is emptied after it."""
    from esfast.engines.vllm_worker import WorkerExtension

    methods = {name for name in vars(WorkerExtension) if not name.startswith("_")} - {"esfast"}
    assert methods == METHODS
    assert all(hasattr(vars(WorkerExtension)[name], "__wrapped__") for name in methods)


def test_a_scale_that_is_no_number_leaves_the_engine_as_it_was(llm: Any) -> None:
    base = checksum(llm)
    for method, scale in (("perturb", float("nan")), ("restore", float("inf")), ("perturb", 1e39)):
        with pytest.raises(Exception, match="a perturbation of seed 1 and scale"):
            rpc(llm, f"{method}_self_weights", 1, scale)
    assert checksum(llm) == base
    rpc(llm, "restore_self_weights", 1, SIGMA)
    rpc(llm, "perturb_self_weights", 1, SIGMA)
    assert checksum(llm) == base


def test_members_come_back_to_the_bit(llm: Any) -> None:
    """A perturbation, a negative one, one that its opposite undoes, two that nest."""
    before, base = answers(llm), checksum(llm)
    for negate in (False, True):
        rpc(llm, "perturb_self_weights", 5, SIGMA, negate)
        assert answers(llm) != before
        rpc(llm, "restore_self_weights", 5, SIGMA)
        assert checksum(llm) == base and answers(llm) == before
    rpc(llm, "perturb_self_weights", 5, SIGMA)
    changed = checksum(llm)
    rpc(llm, "perturb_self_weights", 5, SIGMA, True)
    assert checksum(llm) == base
    rpc(llm, "perturb_self_weights", 5, SIGMA)
    rpc(llm, "perturb_self_weights", 6, SIGMA)
    rpc(llm, "restore_self_weights", 6, SIGMA)
    assert checksum(llm) == changed
    rpc(llm, "restore_self_weights", 5, SIGMA)
    assert checksum(llm) == base


def test_members_are_those_of_esfast(llm: Any, plain: Weights) -> None:
    rpc(llm, "perturb_self_weights", 2**63 + 7, SIGMA, True)
    plain.perturb(Member(2**63 + 7, sign=-1), SIGMA)
    assert checksum(llm) == plain.checksum()


def test_perturbations_without_a_restore_accumulate(llm: Any, plain: Weights) -> None:
    """Three of them are one update, rounded once; what follows is a member again."""
    for seed, scale, negate in ((1, 0.004, False), (2, 0.003, True), (3, 0.002, False)):
        rpc(llm, "perturb_self_weights", seed, scale, negate)
    rpc(llm, "broadcast_all_weights", 0)
    members = [Member(1), Member(2, sign=-1), Member(3)]
    plain.update(members, [0.004, 0.003, 0.002], seed=generation_seed(0, 0))
    assert checksum(llm) == plain.checksum()
    kept = answers(llm)
    rpc(llm, "perturb_self_weights", 9, SIGMA)
    assert answers(llm) != kept
    rpc(llm, "restore_self_weights", 9, SIGMA)
    assert answers(llm) == kept and checksum(llm) == plain.checksum()


def test_an_update_before_a_member_is_kept_when_the_model_runs(llm: Any, plain: Weights) -> None:
    """Updates by perturbation, an evaluation, then a member, with no call between that says so."""
    rpc(llm, "perturb_self_weights", 1, 0.004)
    rpc(llm, "perturb_self_weights", 2, 0.003)
    rpc(llm, "perturb_self_weights", 3, SIGMA)
    answers(llm)
    rpc(llm, "restore_self_weights", 3, SIGMA)
    plain.update([Member(1), Member(2)], [0.004, 0.003], seed=generation_seed(0, 0))
    assert checksum(llm) == plain.checksum()


def test_decay_pulls_to_the_initial_weights(llm: Any, plain: Weights) -> None:
    rpc(llm, "save_self_initial_weights")
    anchored = Weights(plain.table, anchor=Anchor.in_memory(plain.table), threads=1)
    for number in range(2):
        rpc(llm, "update_weights_from_seeds", [4, 5], [1.0, -0.5], ALPHA, 2, "l2", 10.0)
        anchored.update(
            [Member(4), Member(5)], [ALPHA / 2, -0.5 * (ALPHA / 2)],
            decay=AnchoredDecay("l2", 10.0), alpha=ALPHA, seed=generation_seed(0, number),
        )  # fmt: skip
    assert checksum(llm) == anchored.checksum()


def test_weights_on_disk(llm: Any, folder: Path, tmp_path: Path) -> None:
    base = checksum(llm)
    rpc(llm, "update_weights_from_seeds", [4], [1.0], ALPHA, 1)
    changed = checksum(llm)
    rpc(llm, "save_self_weights_to_disk", str(tmp_path / "kept" / "model.safetensors"))
    rpc(llm, "perturb_self_weights", 9, SIGMA)
    rpc(llm, "load_weights_from_disk", str(folder))
    assert checksum(llm) == base
    rpc(llm, "load_weights_from_disk", str(tmp_path / "kept" / "model.safetensors"))
    assert checksum(llm) == changed
    (tmp_path / "old.pth").write_bytes(b"\x80\x02not weights")
    with pytest.raises(DataError, match="no whole safetensors file"):
        rpc(llm, "load_weights_from_disk", str(tmp_path / "old.pth"))
    assert checksum(llm) == changed


# --- several engines --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(folder: Path) -> Any:
    return new_llm(folder)


@pytest.fixture
def pair(llm: Any, second: Any, folder: Path) -> tuple[Any, Any]:
    parts = second.llm_engine.model_executor.driver_worker.worker.__dict__
    parts.get("esfast_parts", {}).pop("drop_in", None)
    rpc(second, "load_weights_from_disk", str(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank, one in enumerate((llm, second)):
        rpc(one, "init_inter_engine_group", "127.0.0.1", port, rank, 2)
    return llm, second


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

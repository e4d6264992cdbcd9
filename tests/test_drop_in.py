"""A script as its users have it, over `collective_rpc` with the names of published ES workers: only
the class path is esfast's. What it ends with is what esfast's own loop ends with, to the bit.
Several engines and vLLM's own processes: `test_drop_in_engines.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drop_in_scripts import (
    ALPHA,
    POPULATION,
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

from esfast import (
    Anchor,
    AnchoredDecay,
    DataError,
    Member,
    ParameterTable,
    Weights,
    generation_seed,
)
from esfast.engines.vllm_plugin import METHODS
from esfast.models import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_this_process")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Any:
    return new_llm(folder)


@pytest.fixture
def llm(shared: Any, folder: Path) -> Any:
    """The engine with its weights as they were loaded, its updates counted from 0, no anchor."""
    rpc(shared, "load_weights_from_disk", str(folder))
    rpc(shared, "esfast", "open", "lean", False, None)
    return shared


@pytest.fixture
def plain(folder: Path) -> Weights:
    """The same weights in transformers, edited by esfast itself."""
    return Weights(ParameterTable.from_module(load_model(folder).model), threads=1)


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


def test_a_population_a_decay_or_a_source_that_is_none_is_refused_by_name(llm: Any) -> None:
    base = checksum(llm)
    with pytest.raises(Exception, match="population_size is 0; expected 1 or more"):
        rpc(llm, "update_weights_from_seeds", [1], [1.0], ALPHA, 0)
    with pytest.raises(Exception, match=r"weight_decay_lambda is 10\.0 and pulls to nothing"):
        rpc(llm, "update_weights_from_seeds", [1], [1.0], ALPHA, 1, "none", 10.0)
    with pytest.raises(Exception, match="engine 1 of 1 is to be the source; an engine alone"):
        rpc(llm, "broadcast_all_weights", 1)
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


def test_a_member_comes_back_whatever_was_called_between(
    llm: Any, plain: Weights, tmp_path: Path
) -> None:
    """A save and the initial copy hold the member; the answers are still those of the weights."""
    before, base = answers(llm), checksum(llm)
    saved = str(tmp_path / "member.safetensors")
    for call in (
        ("save_self_weights_to_disk", saved),
        ("save_self_initial_weights",),
        ("init_inter_engine_group", "127.0.0.1", free_port(), 0, 1),
    ):
        rpc(llm, "perturb_self_weights", 5, SIGMA)
        member, changed = answers(llm), checksum(llm)
        rpc(llm, *call)
        assert answers(llm) == member != before and checksum(llm) == changed != base
        rpc(llm, "restore_self_weights", 5, SIGMA)
        assert checksum(llm) == base and answers(llm) == before
    rpc(llm, "load_weights_from_disk", saved)
    assert checksum(llm) == changed
    rpc(llm, "update_weights_from_seeds", [4], [0.0], ALPHA, 1, "l1", 1e6)  # all the way
    assert checksum(llm) == changed  # the member was in the initial copy, too
    plain.perturb(Member(5), SIGMA)
    assert plain.checksum() == changed


def test_a_member_comes_back_after_an_update(llm: Any, plain: Weights) -> None:
    rpc(llm, "perturb_self_weights", 5, SIGMA)
    rpc(llm, "update_weights_from_seeds", [7], [1.0], ALPHA, 1)
    plain.update([Member(7)], [ALPHA], seed=generation_seed(0, 0))
    settled = plain.checksum()
    plain.perturb(Member(5), SIGMA)
    assert checksum(llm) == plain.checksum()
    rpc(llm, "restore_self_weights", 5, SIGMA)
    assert checksum(llm) == settled


def test_an_update_that_is_refused_leaves_the_engine_as_it_was(llm: Any) -> None:
    base = checksum(llm)
    for seeds, coefficients, more, reason in (
        ([1], [float("nan")], (), "coefficient nan"),
        ([1], [1e42], (), "not a finite fp32 number"),
        ([1], ["x"], (), "coefficient 'x'"),
        ([1.5, 2.5], [1.0, 2.0], (), r"seed 1\.5; expected a whole number"),
        ([1, 2], [1.0], (), "2 seeds and 1 coefficients"),
        ([1], [1.0], ("l2", 1.0), "decay has no anchor"),
    ):
        rpc(llm, "perturb_self_weights", 5, SIGMA)
        member = checksum(llm)
        with pytest.raises(Exception, match=reason):
            rpc(llm, "update_weights_from_seeds", seeds, coefficients, ALPHA, 1, *more)
        assert checksum(llm) == member != base
        rpc(llm, "restore_self_weights", 5, SIGMA)
        assert checksum(llm) == base


def test_a_perturbation_that_finds_no_memory_is_not_made(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the model's next run would try it again."""
    base = checksum(llm)

    def full(*arguments: Any) -> None:
        raise MemoryError("no memory for the records")

    with monkeypatch.context() as patch:
        patch.setattr("esfast.engines.vllm_shard.Shard.perturb", full)
        with pytest.raises(MemoryError, match="no memory for the records"):
            rpc(llm, "perturb_self_weights", 5, SIGMA)
        assert checksum(llm) == base
    rpc(llm, "perturb_self_weights", 5, 1e-50)  # nothing, to fp32
    assert checksum(llm) == base


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

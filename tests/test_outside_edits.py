"""Edits by somebody else, under a member or past a base copy: said, never lost without a word."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from esfast import EvolutionStrategy, Member, ParameterTable, Weights
from esfast.errors import StateError
from esfast.replay import keep_journal

MEMORIES = ("lean", "shadow", "master")
COPIES = MEMORIES[1:]
SETTINGS: dict[str, Any] = {"sigma": 0.1, "alpha": 0.1, "population_size": 4}


def table_of(tensor: torch.Tensor) -> ParameterTable:
    return ParameterTable.from_tensors({"w": tensor})


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_backward_pass_over_weights_edited_meanwhile_is_refused(memory: str) -> None:
    model = torch.nn.Linear(4, 3)
    weights = Weights(ParameterTable.from_module(model), memory)
    edits: list[Callable[[], object]] = [
        lambda: weights.perturb(Member(1), 0.1),
        weights.restore,
        lambda: weights.update([Member(1)], [0.1]),
    ]
    for edit in edits:
        loss = model(torch.ones(2, 4, requires_grad=True)).sum()
        edit()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    loss = model(torch.ones(2, 4, requires_grad=True)).sum()
    weights.restore()  # no member is applied: nothing is edited
    loss.backward()


def test_weights_made_in_inference_mode_are_edited_too() -> None:
    with torch.inference_mode():
        tensor = torch.randn(64)
    weights = Weights(table_of(tensor))
    before = weights.checksum()
    weights.perturb(Member(1), 0.1)
    weights.restore()
    assert weights.checksum() == before


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_state_that_is_loaded_is_told_to_torch(memory: str) -> None:
    model = torch.nn.Linear(4, 3)
    weights = Weights(ParameterTable.from_module(model), memory)
    other = Weights(ParameterTable.from_module(model), "shadow")
    ones = torch.ones(2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(ones)
        weights.load_state([2 * tensor for tensor in weights.state()])
        assert torch.equal(model(ones), 2 * before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss = model(ones).sum()
        weights.load_state([2 * tensor for tensor in weights.state()])
        loss.backward()
    with pytest.raises(StateError, match="rebase"):
        other.perturb(Member(1), 0.1)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("columns", [False, True])
def test_members_of_two_parts_of_one_tensor_are_nested(memory: str, columns: bool) -> None:
    whole = torch.randn(8, 6).bfloat16()
    before = whole.clone()
    parts = whole.chunk(2, dim=int(columns))
    outer, inner = (Weights(table_of(part), memory) for part in parts)
    outer.perturb(Member(1), 0.1)
    for _ in range(2):
        inner.perturb(Member(2), 0.1)
        inner.restore()
    inner.update([Member(3)], [0.1])
    outer.restore()
    assert torch.equal(parts[0], before.chunk(2, dim=int(columns))[0])


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("meets", ["restore", "next member", "update"])
def test_an_edit_under_a_member_is_said(memory: str, meets: str) -> None:
    tensor = torch.randn(64)
    weights = Weights(table_of(tensor), memory)
    before = tensor.clone()
    weights.perturb(Member(1), 0.1)
    tensor.mul_(2)
    calls: dict[str, Callable[[], object]] = {
        "restore": weights.restore,
        "next member": lambda: weights.perturb(Member(2), 0.1),
        "update": lambda: weights.update([Member(1)], [0.1]),
    }
    with pytest.raises(StateError, match="'w' was edited by something else while a member"):
        calls[meets]()
    assert not weights.perturbed
    assert memory == "lean" or torch.equal(tensor, before)
    weights.perturb(Member(2), 0.1)  # told once; what is there now is what edits start from
    weights.restore()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("meets", ["restore", "next member"])
def test_ctrl_c_in_a_restore_forgets_no_edit(memory: str, after: bool, meets: str) -> None:
    """Before the core's work, and after it."""
    tensor = torch.randn(64)
    weights = Weights(table_of(tensor), memory)
    weights.perturb(Member(1), 0.1)
    tensor.mul_(2)
    owner: Any = weights if after else weights._outside
    step = "_require_not_taken_away" if after else "tell"
    do = getattr(owner, step)

    def interrupted() -> None:
        do()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, step, interrupted)
        weights.restore()
    assert weights.perturbed != after
    with pytest.raises(StateError, match="'w' was edited by something else while a member"):
        weights.restore() if meets == "restore" else weights.perturb(Member(2), 0.1)
    weights.perturb(Member(2), 0.1)  # told once
    weights.restore()


@pytest.mark.parametrize("memory", MEMORIES)
def test_two_strategies_with_interleaved_members_are_told(memory: str) -> None:
    model = torch.nn.Linear(8, 8)
    one, other = (EvolutionStrategy(model, memory=memory, **SETTINGS) for _ in range(2))
    inner: Any = iter(other.population())
    with pytest.raises(StateError, match="edited by something else"):
        for _ in one.population():
            next(inner)
    with suppress(StateError):
        inner.close()


@pytest.mark.parametrize("memory", COPIES)
@pytest.mark.parametrize("meets", ["next member", "update"])
def test_an_edit_that_a_base_copy_does_not_have_is_not_undone(memory: str, meets: str) -> None:
    tensor = torch.randn(64).bfloat16()
    weights = Weights(table_of(tensor), memory)
    weights.perturb(Member(1), 0.1)
    weights.restore()
    tensor.mul_(2)
    edited = tensor.clone()
    calls: dict[str, Callable[[], object]] = {
        "next member": lambda: weights.perturb(Member(2), 0.1),
        "update": lambda: weights.update([Member(1)], [0.1]),
    }
    with pytest.raises(StateError, match=r"'w' .* rebase\(\)"):
        calls[meets]()
    assert torch.equal(tensor, edited)
    weights.rebase()
    weights.perturb(Member(2), 0.1)
    weights.restore()
    assert torch.equal(tensor, edited)


@pytest.mark.parametrize("memory", MEMORIES)
def test_edits_that_leave_the_bits_alone_are_nobodys_business(memory: str) -> None:
    tensor = torch.randn(64).bfloat16()
    tensor[:2] = torch.tensor([math.nan, -0.0])
    one, other = Weights(table_of(tensor), memory), Weights(table_of(tensor), memory)
    for weights in (one, other, one):
        weights.perturb(Member(1), 0.1)
        weights.restore()
    tensor.copy_(tensor.clone())
    before = tensor.view(torch.int16).clone()
    other.perturb(Member(1), 0.1)
    other.restore()
    assert torch.equal(tensor.view(torch.int16), before)
    one.load_state(one.state())
    one.perturb(Member(1), 0.1)
    one.restore()


def test_lean_memory_takes_an_edit_between_members() -> None:
    tensor = torch.randn(64)
    weights = Weights(table_of(tensor))
    tensor.mul_(2)
    edited = tensor.clone()
    weights.perturb(Member(1), 0.1)
    weights.restore()
    assert torch.equal(tensor, edited)


@pytest.mark.parametrize("memory", COPIES)
def test_a_step_that_would_undo_an_edit_is_refused_before_its_record(
    memory: str, tmp_path: Path
) -> None:
    model = torch.nn.Linear(8, 8)
    es = EvolutionStrategy(model, memory=memory, **SETTINGS)
    keep_journal(es, tmp_path / "journal")
    rewards = [float(member.seed % 7) for member in es.population()]
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(StateError, match="rebase"):
        es.step(rewards)
    assert es.generation == 0 and es.journal is not None and es.journal.generation == 0
    assert isinstance(es.weights, Weights)
    es.weights.rebase()
    es.step(rewards)


def test_a_step_is_decided_when_another_thread_has_done_its_edit() -> None:
    es = EvolutionStrategy(torch.nn.Linear(8, 8), **SETTINGS)
    assert isinstance(es.weights, Weights)
    step = threading.Thread(target=es.decide, args=([1.0, 2.0, 3.0, 4.0],))
    with es.weights._turn:  # of a member that is being applied
        step.start()
        step.join(0.2)
        assert step.is_alive()
    step.join()

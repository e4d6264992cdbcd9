"""A loop over a population that is left early restores the weights before any handler runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esfast import EvolutionStrategy, Member
from esfast.errors import ConfigError, LostError, StateError
from esfast.interrupts import Interrupts
from esfast.journal import JournalWriter, read_journal
from esfast.replay import keep_journal

Evaluate = Callable[[Member], float]


def through(members: Iterable[Member]) -> Iterator[Member]:
    """As a progress bar: a generator between the loop and the population."""
    yield from members


def plain(es: EvolutionStrategy, evaluate: Evaluate) -> Any:
    for member in es.population():
        evaluate(member)


def named(es: EvolutionStrategy, evaluate: Evaluate) -> Any:
    members = es.population()
    for member in members:
        evaluate(member)


def helper(es: EvolutionStrategy, evaluate: Evaluate) -> Any:
    def loop(members: Iterable[Member]) -> None:
        for member in members:
            evaluate(member)

    loop(es.population())


LOOPS: dict[str, Callable[[EvolutionStrategy, Evaluate], Any]] = {
    "for": plain,
    "a variable": named,
    "a function": helper,
    "list": lambda es, evaluate: [evaluate(member) for member in es.population()],
    "set": lambda es, evaluate: {evaluate(member) for member in es.population()},
    "dict": lambda es, evaluate: {m.seed: evaluate(m) for m in es.population()},
    "generator": lambda es, evaluate: sum(evaluate(member) for member in es.population()),
    "enumerate": lambda es, evaluate: [n * evaluate(m) for n, m in enumerate(es.population())],
    "a bar": lambda es, evaluate: [evaluate(member) for member in through(es.population())],
    "inner": lambda es, evaluate: [evaluate(m) for _ in range(2) for m in es.population()],
    "map": lambda es, evaluate: list(map(evaluate, es.population())),
}


class Stop(Exception):
    """What an evaluation raises."""


def made(**settings: Any) -> tuple[torch.nn.Linear, EvolutionStrategy]:
    torch.manual_seed(0)
    model = torch.nn.Linear(9, 7).bfloat16()
    return model, EvolutionStrategy(
        model, **{"sigma": 1e-2, "alpha": 1e-2, "population_size": 4, **settings}
    )


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_is_left_before_the_handler(name: str, error: type[BaseException]) -> None:
    """And where the exception is kept, as a notebook keeps it, with its frames."""
    model, es = made()
    base = model.weight.detach().clone()
    seen = []

    def evaluate(member: Member) -> float:
        seen.append(not torch.equal(model.weight, base))
        if len(seen) < 3:
            return 1.0
        raise error

    try:
        LOOPS[name](es, evaluate)
    except error as kept:
        restored = torch.equal(model.weight, base)
        assert kept.__traceback__ is not None
    assert seen == [True] * 3
    assert restored and not es.weights.perturbed


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_sees_every_member(name: str) -> None:
    model, es = made()
    base, seen = model.weight.detach().clone(), []

    def evaluate(member: Member) -> float:
        seen.append(member)
        return 1.0

    LOOPS[name](es, evaluate)
    assert seen[:4] == es.strategy.members(0)
    assert torch.equal(model.weight, base)


def test_a_member_may_be_taken_by_hand() -> None:
    model, es = made()
    base = model.weight.detach().clone()
    members = es.population()
    assert next(members) == es.strategy.members(0)[0]
    assert not torch.equal(model.weight, base)
    assert list(members) == es.strategy.members(0)[1:]
    other = es.population()
    next(other)
    other.close()
    assert torch.equal(model.weight, base)


def test_a_step_or_a_loop_inside_a_loop_is_said() -> None:
    _, es = made()
    with pytest.raises(StateError, match="another one was begun inside a loop"):
        for _ in es.population():
            for _ in es.population():
                pass
    with pytest.raises(StateError, match="a step was made inside a loop"):
        for _ in es.population():
            es.step([1.0, 2.0, 3.0, 4.0])
    assert es.generation == 1 and not es.weights.perturbed


@pytest.mark.parametrize("number", [-1, 4, 1.5, "a", None])
def test_a_member_that_there_is_not_is_no_member(number: Any) -> None:
    _, es = made()
    with pytest.raises(ConfigError, match=r"was dealt of a population of 4; numbers .* 0 to 3"):
        list(es.population([0, number]))
    assert not es.weights.perturbed


def test_weights_that_are_lost_need_no_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's own error is told, and nothing beside it."""
    es = EvolutionStrategy(torch.nn.Linear(4, 2), sigma=0.1, population_size=4)

    def lost() -> None:
        raise LostError("gone.")

    def stop(member: Member) -> float:
        raise Stop

    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    monkeypatch.setattr(es.weights, "restore", lost)
    for loop in (plain, named):
        with pytest.raises(Stop):
            loop(es, stop)
    assert unraisable == []


@pytest.mark.parametrize("memory", ["lean", "shadow"])
@pytest.mark.parametrize("call", ["append", "update", "update alone"])
def test_ctrl_c_in_a_step_comes_after_all_of_it(
    memory: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = [1.0, 3.0, 2.0, 0.0]
    whole_model, whole = made(memory=memory)
    whole.step(rewards)
    model, es = made(memory=memory)
    keep_journal(es, tmp_path / "journal.esj")
    owner: Any = JournalWriter if call == "append" else type(es.weights)
    name = call.split()[0]
    do, record = getattr(owner, name), es.decide(rewards)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        report = do(*arguments, **named)
        signal.raise_signal(signal.SIGINT)  # as if it had come while the core was at work
        return report

    if call == "update alone" and es.journal is not None:  # as `esfast train` does it
        es.journal.append(record)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        es.apply(record) if call == "update alone" else es.step(rewards)
    monkeypatch.undo()
    assert es.generation == 1 == len(read_journal(tmp_path / "journal.esj").generations)
    assert torch.equal(model.weight, whole_model.weight)
    es.step(rewards)
    whole.step(rewards)
    assert torch.equal(model.weight, whole_model.weight)


def test_ctrl_c_does_what_its_handler_does() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with Interrupts(moving=True) as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert not heard
            interrupts.rest()
            assert heard == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Interrupts() as interrupts:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            interrupts.rest()
    finally:
        signal.signal(signal.SIGINT, before)

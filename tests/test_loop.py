"""Inside the loop the model is the member; leaving it early, by any way, restores the weights."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import assert_bits, bits_of

from esfast import EsfastError, EvolutionStrategy, ParameterTable


def linear() -> torch.nn.Linear:
    torch.manual_seed(3)
    return torch.nn.Linear(16, 8).to(torch.bfloat16)


def strategy(model: torch.nn.Module, **options: Any) -> EvolutionStrategy:
    return EvolutionStrategy(model, **{"sigma": 0.05, "population_size": 6, **options})


def test_autocast_around_the_loop_casts_every_member_anew() -> None:
    model = torch.nn.Linear(16, 8)
    es = strategy(model)

    def total() -> float:
        return model(torch.ones(1, 16)).sum().item()

    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base = total()
            around = [total() for _ in es.population()]
            after = total()
        inside = []
        for _ in es.population():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside.append(total())
    assert around == inside
    assert after == base
    assert len({base, *around}) == 7


@pytest.mark.parametrize("memory", ["lean", "shadow", "master"])
def test_inside_the_loop_the_model_is_the_member(memory: str) -> None:
    model = linear()
    before = bits_of(model.weight)
    es = strategy(model, memory=memory, antithetic=True)
    members = es.strategy.members(0)
    for member, want in zip(es.population(), members, strict=True):
        assert member == want
        i = np.arange(before.size, dtype=np.uint64)
        live = reference.perturb(before, "bfloat16", "weight", i, member, 0.05)
        assert_bits(model.weight, live)
    assert_bits(model.weight, before, "after the loop")


def test_a_step_is_the_update_of_the_reference() -> None:
    model = linear()
    before = bits_of(model.weight)
    es = strategy(model, alpha=0.3, seed=9)
    rewards = [float(n * n % 5) for n, _ in enumerate(es.population())]
    es.step(rewards)
    assert es.generation == 1
    update = reference.Update(
        es.strategy.members(0),
        list(es.strategy.coefficients(rewards)),
        seed=reference.generation_seed(9, 0),
    )
    i = np.arange(before.size, dtype=np.uint64)
    assert_bits(model.weight, update.apply(before, "bfloat16", "weight", i)[0])


class Stop(Exception):
    pass


def leave_by_break(es: EvolutionStrategy, error: type[BaseException]) -> None:
    for k, _ in enumerate(es.population()):
        if k == 2:
            break


def leave_by_exception(es: EvolutionStrategy, error: type[BaseException]) -> None:
    for k, _ in enumerate(es.population()):
        if k == 2:
            raise error


def leave_a_comprehension(es: EvolutionStrategy, error: type[BaseException]) -> None:
    def evaluate(k: int) -> float:
        if k == 2:
            raise error
        return 0.0

    [evaluate(k) for k, _ in enumerate(es.population())]


@pytest.mark.parametrize("memory", ["lean", "shadow", "master"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_exception, leave_a_comprehension], ids=lambda f: f.__name__
)
def test_leaving_early_restores(
    leave: Callable[..., None], error: type[BaseException], memory: str
) -> None:
    model = linear()
    es = strategy(model, memory=memory)
    before, checksum = bits_of(model.weight), es.weights.checksum()
    with contextlib.suppress(error):
        leave(es, error)
    assert es.weights.checksum() == checksum
    assert_bits(model.weight, before)
    assert es.generation == 0


def test_a_population_left_open_is_restored_by_the_next() -> None:
    model = linear()
    es = strategy(model)
    before = bits_of(model.weight)
    held = es.population()
    next(iter(held))
    again = iter(es.population())
    next(again)
    live = reference.perturb(
        before, "bfloat16", "weight", np.arange(128), es.strategy.members(0)[0], 0.05
    )
    assert_bits(model.weight, live)
    del again, held
    assert_bits(model.weight, before)


def test_a_loop_that_dies_late_leaves_the_next_one_alone() -> None:
    """A traceback can hold an abandoned loop until the garbage collector comes, which may be while
    a member of the next loop is being evaluated: that member must stay applied."""
    model = linear()
    es = strategy(model)
    before = bits_of(model.weight)
    held = iter(es.population())
    next(held)
    again = iter(es.population())
    next(again), next(again)
    live = bits_of(model.weight)
    del held
    assert_bits(model.weight, live)
    del again
    assert_bits(model.weight, before)


BAD_REWARDS: dict[str, tuple[Any, str]] = {
    "short": ([1.0] * 5, "5 rewards were given for a population of 6"),
    "long": ([1.0] * 7, "7 rewards were given for a population of 6"),
    "empty": ([], "0 rewards were given for a population of 6"),
    "nan": ([1.0, 2.0, float("nan"), 1.0, 1.0, 1.0], r"the first is nan at \[2\]"),
    "words": (["a"] * 6, "are not numbers"),
    "matrix": (np.zeros((6, 2)), r"rewards of shape \(6, 2\)"),
}


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_bad_rewards_change_nothing(case: str) -> None:
    model = linear()
    es = strategy(model)
    before = bits_of(model.weight)
    for _ in es.population():
        pass
    rewards, said = BAD_REWARDS[case]
    with pytest.raises(EsfastError, match=said):
        es.step(rewards)
    assert_bits(model.weight, before)
    assert es.generation == 0
    es.step([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert es.generation == 1


def test_nan_may_be_declared_the_worst() -> None:
    model, same = linear(), linear()
    one, two = strategy(model, alpha=0.2), strategy(same, alpha=0.2)
    one.step([1.0, 2.0, float("nan"), 4.0, 5.0, 6.0], nan="worst")
    two.step([1.0, 2.0, 1.0, 4.0, 5.0, 6.0])
    assert_bits(model.weight, same.weight)


def test_rewards_may_be_a_matrix_of_prompts() -> None:
    model = linear()
    es = strategy(model, shaping="group_centered", alpha=0.2)
    before = es.weights.checksum()
    hard = np.array([0.0, 5.0, -2.0])
    report = es.step(np.arange(6.0)[:, None] ** 2 + hard)
    assert (np.diff(report.coefficients) > 0).all()
    assert es.weights.checksum() != before


@pytest.mark.parametrize("method", ["rank", "z_score", "centered_rank", "raw"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_equal_rewards_are_a_zero_step(method: str, value: float) -> None:
    model = linear()
    es = strategy(model, shaping=method, alpha=1.0)
    before = bits_of(model.weight)
    for _ in es.population():
        pass
    es.step([value] * 6)
    assert_bits(model.weight, before)
    assert es.generation == 1


def test_tensors_and_tables_are_taken_too() -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(3, 2)}
    es = EvolutionStrategy(ParameterTable.from_tensors(tensors), population_size=2)
    es.step([0.0 * k for k, _ in enumerate(es.population())])
    assert es.config.population_size == 2


def test_two_runs_are_one_run() -> None:
    trails = []
    for memory in ("lean", "shadow"):
        model = linear()
        es = strategy(model, memory=memory, alpha=0.2, seed=4)
        trail = []
        for _ in range(5):
            es.step([float(model.weight.detach().float().sum()) for _ in es.population()])
            trail.append(es.weights.checksum())
        trails.append(trail)
    assert trails[0] == trails[1] and len(set(trails[0])) == 5


SCRIPT = """
    import sys, time, torch, esfast
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300).to(torch.bfloat16)
    es = esfast.EvolutionStrategy(model, sigma=0.05, population_size=4, memory=sys.argv[1])
    print(es.weights.checksum(), flush=True)
    try:
        for k, member in enumerate(es.population()):
            if k == 1:
                print(es.weights.checksum(), flush=True)
                time.sleep(600)
    except KeyboardInterrupt:
        print("interrupted", es.weights.checksum(), flush=True)
"""


def interrupting(event_number: int) -> Callable[..., None]:
    """A profile function that raises KeyboardInterrupt at the n-th call or return inside esfast:
    the places where Python delivers a signal. Resumed generators are left out, since a profile
    function's error skips their `finally`, which a signal's does not."""
    seen = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal seen
        inside = "esfast" in Path(frame.f_code.co_filename).parts
        generator = event in ("call", "return") and frame.f_code.co_flags & inspect.CO_GENERATOR
        if inside and event != "c_call" and not generator:
            seen += 1
            if seen == event_number:
                raise KeyboardInterrupt

    return profile


def interrupted(es: EvolutionStrategy, event_number: int) -> bool:
    """Runs a loop with one interrupt; False where the loop has fewer events than that."""
    sys.setprofile(interrupting(event_number))
    try:
        for _ in es.population():
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("memory", ["lean", "shadow", "master"])
def test_an_interrupt_at_any_call_restores(memory: str) -> None:
    model = linear()
    es = strategy(model, memory=memory, population_size=2)
    before, number = bits_of(model.weight), 1
    while interrupted(es, number):
        assert_bits(model.weight, before, f"event {number}")
        number += 1
    assert number > 20
    assert_bits(model.weight, before)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("memory", ["lean", "shadow"])
def test_kill_int_in_a_member_restores(memory: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), memory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        base = process.stdout.readline().strip()
        live = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=600)
    assert len(base) == len(live) == 16 and base != live
    assert output.strip() == f"interrupted {base}"


CYCLES = """
    import torch, esfast
    torch.manual_seed(0)
    model = torch.nn.Linear(1500, 1500).to(torch.bfloat16)
    for memory in ("lean", "shadow") * 3:
        es = esfast.EvolutionStrategy(model, sigma=0.05, population_size=5000, memory=memory)
        try:
            print(es.weights.checksum(), flush=True)  # inside: from here on the signal may come
            for member in es.population():
                pass
        except KeyboardInterrupt:
            pass
        print(es.weights.checksum(), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_kill_int_anywhere_restores() -> None:
    """The signal falls in the core, between members, or in the iterator itself."""
    command = [sys.executable, "-c", textwrap.dedent(CYCLES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for delay in (0.05, 0.05, 0.11, 0.11, 0.17, 0.17):  # in lean and in shadow memory
            base = process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == base != ""
    assert process.returncode == 0

"""What a caller may do wrong with tensors, members and settings: said, and nothing changed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import esfast
from esfast import Anchor, AnchoredDecay, EvolutionStrategy, Member, ParameterTable, Weights
from esfast.errors import ConfigError, DataError, ParameterError, StateError
from esfast.replay import header_of
from esfast.strategy import StrategyConfig


def table_of(tensor: torch.Tensor) -> ParameterTable:
    return ParameterTable.from_tensors({"w": tensor})


def grow(tensor: torch.Tensor) -> None:
    tensor.resize_(1_000_000)


def free(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def regrow(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(40_000_000)


def shrink(tensor: torch.Tensor) -> None:
    tensor.resize_(8)


def transpose(tensor: torch.Tensor) -> None:
    tensor.t_()


@pytest.mark.parametrize("change", [grow, free, regrow, shrink, transpose])
def test_a_tensor_resized_after_its_table_was_made_is_never_edited(
    change: Callable[[torch.Tensor], None],
) -> None:
    tensor = torch.randn(100, 10)
    weights = Weights(table_of(tensor))
    change(tensor)
    with pytest.raises(StateError, match="'w'"):
        weights.perturb(Member(1), 0.1)
    with pytest.raises(StateError, match="'w'"):
        weights.update([Member(1)], [0.1])


@pytest.mark.parametrize("change", [grow, free, regrow])
def test_memory_that_was_given_up_is_not_looked_at(change: Callable[[torch.Tensor], None]) -> None:
    tensor = torch.randn(100, 10)
    table = table_of(tensor)
    change(tensor)
    with pytest.raises(StateError, match="given up"):
        Weights(table)


def test_a_parameter_that_the_module_replaced_is_noticed() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[1].weight = module[0].weight
    weights = Weights(ParameterTable.from_module(module))
    weights.perturb(Member(1), 0.1)
    weights.restore()
    module[1].weight = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(StateError, match=r"'1\.weight'"):
        weights.perturb(Member(1), 0.1)


def test_a_layer_that_the_module_replaced_is_noticed() -> None:
    module = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.nn.ReLU())
    weights = Weights(ParameterTable.from_module(module))
    module[1] = torch.nn.GELU()
    module[0] = torch.nn.Sequential(module[0][0], torch.nn.Linear(4, 4))  # as adapters wrap layers
    weights.perturb(Member(1), 0.1)
    weights.restore()
    module[0][0] = torch.nn.Linear(4, 4)
    with pytest.raises(StateError, match=r"'0\.0\.weight' was moved"):
        weights.perturb(Member(1), 0.1)


def test_load_state_dict_that_assigns_is_noticed() -> None:
    module = torch.nn.Linear(4, 4)
    weights = Weights(ParameterTable.from_module(module))
    other = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(other, assign=True)
    with pytest.raises(StateError, match="assign=True"):
        weights.perturb(Member(1), 0.1)


MOVES: dict[str, Callable[[torch.nn.Linear], object]] = {
    "cast": lambda model: model.half().float(),
    "assigned": lambda model: model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    ),
    "data": lambda model: setattr(model.weight, "data", model.weight.data.clone()),
}


@pytest.mark.parametrize("memory", ["lean", "shadow"])
@pytest.mark.parametrize("move", MOVES)
def test_a_model_moved_under_a_member_is_said_to_keep_it(move: str, memory: str) -> None:
    def moved(weights: Weights) -> None:
        weights.perturb(Member(1), 0.1)
        MOVES[move](model)

    for call in (
        Weights.restore,
        Weights.state,
        lambda weights: weights.perturb(Member(2), 0.1),
        lambda weights: weights.update([Member(2)], [0.1]),
    ):
        model = torch.nn.Linear(4, 4)
        weights = Weights(ParameterTable.from_module(model), memory)
        moved(weights)
        with pytest.raises(StateError, match="holds the member's weights"):
            call(weights)
        weights.restore()  # there is nothing left to restore
    model = torch.nn.Linear(4, 4)
    es = EvolutionStrategy(model, population_size=2)
    with pytest.raises(StateError, match="holds the member's weights"):
        for number, _ in enumerate(es.population()):
            if number == 1:
                MOVES[move](model)


@pytest.mark.parametrize("move", MOVES)
def test_weights_that_nobody_reads_have_no_checksum_or_state(move: str) -> None:
    model = torch.nn.Linear(4, 4)
    weights = Weights(ParameterTable.from_module(model))
    MOVES[move](model)
    for call in (weights.checksum, weights.state):
        with pytest.raises(StateError, match="moved or cast"):
            call()


def test_a_copied_table_is_of_the_copied_tensors() -> None:
    tensor = torch.randn(6, 4)
    table = table_of(tensor.t())
    twin = copy.deepcopy(table)  # by __reduce__, as pickle would
    Weights(twin).perturb(Member(1), 0.1)
    assert Weights(table).checksum() == Weights(table_of(tensor.t().clone())).checksum()
    Weights(table).perturb(Member(1), 0.1)
    assert torch.equal(twin.segments[0].tensor, tensor.t())


def test_a_table_wants_tensors_by_name() -> None:
    with pytest.raises(ParameterError, match="a list was given"):
        ParameterTable.from_tensors([torch.zeros(3)])  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="name is 3"):
        ParameterTable.from_tensors({3: torch.zeros(3)})  # type: ignore[dict-item]


def test_memory_given_up_under_a_member_is_not_restored_into() -> None:
    tensor = torch.randn(100, 10)
    weights = Weights(table_of(tensor))
    weights.perturb(Member(1), 0.1)
    tensor.resize_(1_000_000)
    with pytest.raises(StateError, match="given up"):
        weights.restore()
    assert weights.perturbed  # nothing was written where something else lies now
    with pytest.raises(StateError, match="given up"):
        weights.checksum()


@pytest.mark.parametrize("memory", ["lean", "shadow"])
def test_weights_and_anchors_know_addresses_and_are_not_copied(memory: str) -> None:
    table = table_of(torch.randn(3))
    for made in (Weights(table, memory), Anchor.in_memory(table), EvolutionStrategy(table)):
        for copied in (copy.deepcopy, copy.copy, pickle.dumps):
            if made.__class__ is EvolutionStrategy and copied is copy.copy:
                continue  # shares its Weights
            with pytest.raises(StateError, match="copied or pickled"):
                copied(made)


def test_threads_take_turns_at_one_set_of_weights() -> None:
    tensor = torch.randn(200_000)
    before = tensor.clone()
    weights = Weights(table_of(tensor), threads=1)

    def work(first: int) -> None:
        for seed in range(first, first + 10):
            weights.perturb(Member(seed), 0.1)
            weights.restore()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(0, 40, 10)))
    weights.restore()
    assert torch.equal(tensor, before)


def test_a_look_at_the_memory_waits_for_its_turn() -> None:
    """It perturbs and restores a sample in place, beside a member it would leave other weights."""
    tensor = torch.randn(60_000)
    before = tensor.clone()
    weights = Weights(table_of(tensor), threads=1)

    def work(call: Callable[[int], object]) -> None:
        for seed in range(300):
            call(seed)
            weights.restore()

    with ThreadPoolExecutor(2) as pool:
        calls = (lambda _: weights.expected_bytes(1e-2), lambda n: weights.perturb(Member(n), 0.1))
        list(pool.map(work, calls))
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("threads", [0, -1, 1.5, 10**9, "2", True])
def test_a_number_of_threads_is_checked(threads: object) -> None:
    with pytest.raises(ConfigError, match="threads is"):
        Weights(table_of(torch.zeros(3)), threads=threads)  # type: ignore[arg-type]


def test_a_config_is_one() -> None:
    for config in (1e-3, {}, {"sigma": 1e-3}):
        with pytest.raises(ConfigError, match="give a StrategyConfig"):
            EvolutionStrategy(table_of(torch.zeros(3)), config)  # type: ignore[arg-type]


def test_decay_wants_an_anchor_before_anything_is_evaluated() -> None:
    es = EvolutionStrategy(Weights(table_of(torch.zeros(3))), decay=AnchoredDecay("l2", 10.0))
    with pytest.raises(StateError, match="no anchor"):
        list(es.population())


def test_an_anchor_is_one() -> None:
    with pytest.raises(ConfigError, match="in_memory"):
        Weights(table_of(torch.zeros(3)), anchor="folder")  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["seed", "sign", "index"])
@pytest.mark.parametrize("value", [1.5, 1.0, "1", None, math.nan, True, 2**64, -2, [1]])
def test_a_member_is_of_whole_numbers(field: str, value: object) -> None:
    fields: dict[str, Any] = {"seed": 1, field: value}
    with pytest.raises(ConfigError, match=field):
        Member(**fields)


def test_numbers_of_numpy_are_numbers() -> None:
    member = Member(np.uint64(5), np.int8(-1), "gaussian", np.int64(3))  # type: ignore[arg-type]
    assert json.dumps(dataclasses.asdict(member)) == json.dumps(
        dataclasses.asdict(Member(5, -1, "gaussian", 3))
    )
    assert type(AnchoredDecay("l2", np.float32(2)).weight) is float  # type: ignore[arg-type]
    assert Weights(table_of(torch.zeros(3)), threads=np.int64(2)).threads == 2  # type: ignore[arg-type]
    config = StrategyConfig(np.float32(0.5), np.float64(0.25), np.int64(4), np.uint64(9))  # type: ignore[arg-type]
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(
        dataclasses.asdict(StrategyConfig(0.5, 0.25, 4, 9))
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [(name, value) for name in ("sigma", "alpha") for value in
     ("x", "1e-3", None, True, 10**400, 1e60, 1e-60, 0, -1, math.nan, math.inf)]
    + [(name, value) for name in ("population_size", "seed") for value in (2.5, "8", None, True)]
    + [("decay", "l2"), ("decay", 5)],
)  # fmt: skip
def test_a_setting_of_the_wrong_kind_is_told_by_name(setting: str, value: object) -> None:
    settings: dict[str, Any] = {setting: value}
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=setting):
        warnings.simplefilter("error")
        StrategyConfig(**settings)


@pytest.mark.parametrize("weight", ["x", None, True, 10**400, 1e308, -1.0, math.nan])
def test_a_decay_of_no_number_is_told(weight: object) -> None:
    with pytest.raises(ConfigError, match="lambda"):
        AnchoredDecay("l2", weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rewards",
    [
        ["1", "2"],
        np.array(["1", "2"]),
        [10**400, 1],
        torch.ones(2, requires_grad=True),
        [1, "2"],
        [torch.tensor(1, dtype=torch.bfloat16)] * 2,
    ],
)
def test_rewards_that_are_no_numbers_change_nothing(rewards: object) -> None:
    es = EvolutionStrategy(table_of(torch.randn(5)), population_size=2)
    before = es.weights.checksum()
    with pytest.raises(DataError, match=r"are not numbers .*reward\.item\(\)"):
        es.step(rewards)  # type: ignore[arg-type]
    assert (es.weights.checksum(), es.generation) == (before, 0)


def test_a_masked_reward_is_none() -> None:
    es = EvolutionStrategy(table_of(torch.randn(5)), population_size=3)
    masked = np.ma.array([3, 1, 2], mask=[True, False, False])
    with pytest.raises(DataError, match=r"1 of 3 rewards .* is nan at \[0\]"):
        es.step(masked)
    decided, want = es.decide(masked, nan="worst"), es.decide([1.0, 1.0, 2.0])
    assert decided.coefficients.tolist() == want.coefficients.tolist()
    assert decided.rewards is not None and np.isnan(decided.rewards[0])  # as the journal has it


@pytest.mark.parametrize("failed", [-1, 1.5, 2**32, "1"])
def test_a_count_of_failures_is_one(failed: object) -> None:
    es = EvolutionStrategy(table_of(torch.randn(5)), population_size=2)
    with pytest.raises(DataError, match="failed is"):
        es.step([1.0, 2.0], failed=failed)  # type: ignore[arg-type]
    assert es.generation == 0


@pytest.mark.parametrize("memory", ["lean", "shadow", "master"])
def test_a_state_and_a_journal_are_of_the_weights_and_not_of_a_member(memory: str) -> None:
    tensor = torch.randn(5)
    es = EvolutionStrategy(table_of(tensor), memory=memory, population_size=2)
    before, base = tensor.clone(), es.weights.checksum()
    for _ in es.population():
        assert header_of(es).base_checksum == base
    for _ in es.population():
        assert isinstance(es.weights, Weights) and torch.equal(es.weights.state()[0], before)


def test_a_state_is_tensors_in_a_list() -> None:
    weights = Weights(table_of(torch.randn(5)))
    with pytest.raises(ParameterError, match=r"is a dict .*in the table's order"):
        weights.load_state({"w": torch.zeros(5)})  # type: ignore[arg-type]


def test_noise_is_of_a_name() -> None:
    with pytest.raises(ConfigError, match="tensor 5; give its canonical name"):
        esfast.noise(Member(1), 5, (2,))  # type: ignore[arg-type]

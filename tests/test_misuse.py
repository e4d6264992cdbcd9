"""What a caller may do wrong with tensors, members and settings: said, and nothing changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from esfast import Member, ParameterTable, Weights
from esfast.errors import ParameterError, StateError


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


def test_load_state_dict_that_assigns_is_noticed() -> None:
    module = torch.nn.Linear(4, 4)
    weights = Weights(ParameterTable.from_module(module))
    other = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(other, assign=True)
    with pytest.raises(StateError, match="assign=True"):
        weights.perturb(Member(1), 0.1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copied_table_is_of_the_copied_tensors(
    copied: Callable[[ParameterTable], ParameterTable],
) -> None:
    tensor = torch.randn(6, 4)
    table = table_of(tensor.t())
    twin = copied(table)
    Weights(twin).perturb(Member(1), 0.1)
    assert Weights(table).checksum() == Weights(table_of(tensor.t().clone())).checksum()
    Weights(table).perturb(Member(1), 0.1)
    assert torch.equal(twin.segments[0].tensor, tensor.t())


def test_a_table_wants_tensors_by_name() -> None:
    with pytest.raises(ParameterError, match="a list was given"):
        ParameterTable.from_tensors([torch.zeros(3)])  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="name is 3"):
        ParameterTable.from_tensors({3: torch.zeros(3)})  # type: ignore[dict-item]

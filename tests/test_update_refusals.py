"""Updates that are refused before anything is changed, and how one is told to weights elsewhere."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_tensors, made, population, tensors
from test_update import anchor_for

from esfast import AnchoredDecay, EsfastError, ParameterTable, Weights
from esfast.live_weights import LiveWeights
from esfast.members import Member
from esfast.update import Update


def mixed() -> list[Member]:
    return [Member(seed=1), Member(seed=2, noise="rademacher")]


def two_generations() -> list[Member]:
    return [Member(seed=1, noise="hadamard"), Member(seed=2, noise="hadamard", index=1)]


BAD_UPDATES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "lengths": ((population("gaussian", 3), [1.0]), {}, "3 members and coefficients of shape"),
    "nan": ((population("gaussian", 1), [float("nan")]), {}, "coefficient 0 is not a finite"),
    "infinite": ((population("gaussian", 1), [float("inf")]), {}, "coefficient 0 is not a finite"),
    "rounding": ((population("gaussian", 1), [1.0]), {"rounding": "up"}, "rounding 'up'"),
    "no alpha": (
        (population("gaussian", 1), [1.0]), {"decay": AnchoredDecay("l2", 1.0)}, "alpha is None"
    ),
    "no anchor": (
        (population("gaussian", 1), [1.0]), {"decay": AnchoredDecay("l2", 1.0), "alpha": 0.1},
        "no anchor",
    ),
    "noises": ((mixed(), [1.0, 1.0]), {}, "gaussian and rademacher"),
    "hadamard seeds": ((two_generations(), [1.0, 1.0]), {}, "have different seeds"),
    "seed": ((population("gaussian", 1), [1.0]), {"seed": -1}, "rounding seed is -1"),
    "no seed": ((population("gaussian", 1), [1.0]), {"seed": 1.5}, "rounding seed is 1.5"),
    "pair": (
        (population("gaussian", 2, antithetic=True), [3e38, -3e38]), {}, r"add up to 6e\+38; exp"
    ),
    "text": ((population("gaussian", 1), ["1"]), {}, "coefficients are no numbers"),
    "complex": ((population("gaussian", 1), [1j]), {}, "coefficients are no numbers"),
    "ragged": ((population("gaussian", 1), [[1.0], []]), {}, "coefficients are no numbers"),
    "graph": (
        (population("gaussian", 1), torch.ones(1, requires_grad=True)), {}, "are no numbers .*grad"
    ),
    "no member": (([7], [1.0]), {}, "a member is 7; make it with"),
    "decay": ((population("gaussian", 1), [1.0]), {"decay": "l2", "alpha": 0.1}, "decay is 'l2'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_bad_updates_change_nothing(case: str) -> None:
    arguments, options, said = BAD_UPDATES[case]
    model = tensors("bfloat16")
    weights = made(model, "lean")
    with pytest.raises(EsfastError, match=said):
        weights.update(*arguments, **options)
    assert_tensors(model, tensors("bfloat16"))


@pytest.mark.parametrize("case", sorted(BAD_UPDATES.keys() - {"no anchor"}))
def test_bad_updates_are_refused_where_they_are_made(case: str) -> None:
    """Before they are sent to weights that lie elsewhere, all of which must hold the same."""
    arguments, options, said = BAD_UPDATES[case]
    with pytest.raises(EsfastError, match=said):
        Update(*arguments, **options)


def test_an_update_crosses_whole() -> None:
    """As JSON, to the bit; and what any live weights are asked for is that one value."""
    members = [Member(2**64 - 1, -1), Member(7)]
    update = Update(members, np.float32([0.1, -3e-45]), AnchoredDecay("l1", 0.3), 0.7, "nearest", 9)
    told = json.loads(json.dumps(update.record()))
    assert Update.of(told) == update and update.coefficients[1] == float(np.float32(-3e-45))
    hadamard = Update(population("hadamard", 3), [1.0, 2.0, 3.0], seed=2**64 - 1)
    assert Update.of(json.loads(json.dumps(hadamard.record()))) == hadamard

    class Watched(Weights):
        apply = staticmethod(lambda update: update)  # type: ignore[assignment]

    assert Watched.update is LiveWeights.update
    watched = Watched(ParameterTable.from_tensors(tensors("float32")))
    options: dict[str, Any] = {"alpha": 0.7, "rounding": "nearest", "seed": 9}
    decay = AnchoredDecay("l1", 0.3)
    assert watched.update(members, np.float32([0.1, -3e-45]), decay=decay, **options) == update


def test_as_many_hadamard_groups_as_an_int32_holds() -> None:
    """4128 groups of 32 integers of 16256 stay below 2^31; one more does not."""
    members = [Member(seed=1, noise="hadamard", index=32 * k) for k in range(4128)]
    model = {"w": torch.zeros(8)}
    weights = Weights(ParameterTable.from_tensors(model))
    with pytest.raises(EsfastError, match="index is 132096; it is an integer from 0 to 132095"):
        Member(seed=1, noise="hadamard", index=32 * 4128)
    weights.update(members, [1.0] * 4128)
    assert model["w"].abs().min() > 1e-3


def test_decay_that_overshoots_is_refused() -> None:
    weights = made(tensors("bfloat16"), "lean", anchor=anchor_for("bfloat16"))
    with pytest.raises(EsfastError, match="past their anchor"):
        weights.update(population("gaussian", 1), [0.0], decay=AnchoredDecay("l2", 10.0), alpha=0.1)
    for kind, weight, said in (("l3", 1.0, "'l3'"), ("l2", -1.0, "-1.0"), ("l1", math.nan, "nan")):
        with pytest.raises(EsfastError, match=said):
            AnchoredDecay(kind, weight)

"""Equal-norm controls: exactly the length asked for, along the direction given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import llama

from esfast import ConfigError, Member, noise
from esfast.forgetting.drift import drift
from esfast.forgetting.equal_norm import Difference, RandomDirection, move, put


def base_and_tuned() -> tuple[dict, dict]:
    base = {name: p.detach().clone() for name, p in llama().named_parameters()}
    torch.manual_seed(3)
    return base, {n: t + 1e-2 * torch.randn_like(t) * (i % 3) for i, (n, t) in
                  enumerate(base.items())}  # fmt: skip


def test_a_random_direction_has_the_length_and_is_the_members_noise():
    base, _ = base_and_tuned()
    model = llama()
    done = move(model, base, RandomDirection(base, 7), 0.75)
    report = drift(base, model)
    assert done.norm == pytest.approx(0.75, rel=1e-6)
    assert report.whole.norm == pytest.approx(0.75, rel=1e-6)
    name = "model.layers.1.mlp.up_proj.weight"
    moved = dict(model.named_parameters())[name].detach() - base[name]
    eps = noise(Member(7), name, tuple(base[name].shape))
    assert done.scale is not None
    np.testing.assert_allclose(moved.numpy(), done.scale * eps, atol=2e-7)
    other = llama()
    move(other, base, RandomDirection(base, 8), 0.75)
    between = drift(model, other).whole.norm
    assert between == pytest.approx(0.75 * math.sqrt(2), rel=0.02)  # at right angles


@pytest.mark.parametrize("length", [1e-3, 0.4, 30.0])
def test_a_change_is_scaled_along_itself(length):
    base, tuned = base_and_tuned()
    model = llama()
    done = move(model, base, Difference(base, tuned), length)
    assert drift(base, model).whole.norm == pytest.approx(length, rel=1e-6)
    own = drift(base, tuned).whole.norm
    assert done.scale == pytest.approx(length / own, rel=1e-4)
    expected = {n: t + (length / own) * (tuned[n] - t) for n, t in base.items()}
    assert drift(expected, model).whole.norm < 1e-3 * length


def test_by_tensor_every_tensor_has_the_length_of_the_reference():
    base, tuned = base_and_tuned()
    wanted = {t.name: t.change.norm for t in drift(base, tuned).tensors}
    model = llama()
    done = move(model, base, RandomDirection(base, 1), wanted)
    seen = {t.name: t.change.norm for t in drift(base, model).tensors}
    assert done.scale is None and min(wanted.values()) == 0.0
    assert seen == pytest.approx(wanted, rel=1e-6)


def test_sixteen_bit_weights_tell_the_length_that_they_have():
    base, _ = base_and_tuned()
    base = {n: t.bfloat16() for n, t in base.items()}
    model = llama().bfloat16()
    done = move(model, base, RandomDirection(base, 1), 2.0)
    assert drift(base, model).whole.norm == pytest.approx(done.norm, rel=1e-6)
    assert done.norm == pytest.approx(2.0, rel=0.02)


def test_put_makes_a_model_of_tensors():
    base, tuned = base_and_tuned()
    model = llama()
    put(model, tuned)
    assert drift(tuned, model).whole.unchanged == drift(base, model).whole.elements
    assert drift(base, model).whole.norm > 0


def test_no_change_has_no_direction():
    base, _ = base_and_tuned()
    model = llama()
    with pytest.raises(ConfigError, match="has no direction"):
        move(model, base, Difference(base, base), 1.0)
    assert drift(base, model).whole.norm == 0

"""The parts under the decoding loop against their definitions: attention, cache, drawing, plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esfast.engines import attention, kv_cache
from esfast.engines.choosing import draw, most_probable, uniforms
from esfast.engines.prompts import common_prefix, make_plan


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale q k + mask) v in float64, head by head."""
    rows, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(rows, queries, heads, value.shape[3], dtype=torch.float64)
    for head in range(heads):
        k, v = key[:, head // group].double(), value[:, head // group].double()
        scores = scale * query[:, head].double() @ k.transpose(1, 2) + mask[:, 0].double()
        out[:, :, head] = torch.softmax(scores, -1) @ v
    return out


@settings(max_examples=40)
@given(
    rows=st.integers(1, 5), key_heads=st.integers(1, 3), group=st.integers(1, 4),
    queries=st.integers(1, 7), past=st.integers(0, 9), seed=st.integers(0, 99),
    at_once=st.sampled_from([1, 200, 1 << 18]), keys_of_one=st.sampled_from([4, 256]),
    longest=st.sampled_from([50, 1 << 22]),
)  # fmt: skip
def test_attention_is_softmax(
    rows: int, key_heads: int, group: int, queries: int, past: int, seed: int,
    at_once: int, keys_of_one: int, longest: int,
) -> None:  # fmt: skip
    """In one piece, in parts, and handed on; with padding, from views of a larger buffer."""
    random = torch.Generator().manual_seed(seed)
    keys, heads = past + queries, key_heads * group
    query = torch.randn(rows, queries, heads, 8, generator=random).transpose(1, 2)
    room = torch.randn(2, rows, key_heads, keys + 3, 8, generator=random)
    key, value = room[0][:, :, :keys], room[1][:, :, :keys]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(past).repeat(rows, 1, 1, 1)
    padding = torch.randint(0, past + 1, (rows,), generator=random)
    for row, count in enumerate(padding.tolist()):
        seen[row, :, :, :count] = False
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(seen.shape).masked_fill(~seen, lowest)
    module: Any = SimpleNamespace(num_key_value_groups=group, is_causal=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES_AT_ONCE", at_once)
        patch.setattr(attention, "MOST_KEYS_OF_ONE_QUERY", keys_of_one)
        patch.setattr(attention, "LONGEST_ROW", longest)
        got, _ = attention.attend(module, query, key, value, mask, scaling=0.3)
    want = plain_attention(query, key, value, mask, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


class TestCache:
    def states(self, rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        pair = torch.randn(2, rows, 2, tokens, 4, generator=random)
        return pair[0], pair[1]

    def test_holds_what_concatenation_holds(self) -> None:
        """While it grows, loses rows, and grows again."""
        layer = kv_cache.RoomyLayer(capacity=4)
        keys, values = self.states(6, 3, 0)
        layer.update(keys, values)
        for step in range(20):
            if step in (5, 11):
                keep = torch.arange(0, keys.shape[0], 2)
                layer.batch_select_indices(keep)
                keys, values = keys[keep], values[keep]
            more = self.states(keys.shape[0], 1, step + 1)
            got = layer.update(*more)
            keys, values = torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2)
            assert torch.equal(got[0], keys) and torch.equal(got[1], values)
            assert layer.get_seq_length() == keys.shape[2]

    def test_spreading_copies_the_row(self) -> None:
        layer = kv_cache.RoomyLayer(capacity=3)
        keys, values = self.states(1, 3, 0)
        layer.update(keys, values)
        wide = layer.spread(rows=5, capacity=8)
        more = self.states(5, 2, 1)
        got, _ = wide.update(*more)
        assert torch.equal(got, torch.cat([keys.expand(5, -1, -1, -1), more[0]], 2))
        assert torch.equal(layer.keys, keys) and layer.get_seq_length() == 3


class TestDrawing:
    def test_frequencies_are_the_probabilities(self) -> None:
        """Chi-squared of 20,000 draws over 10 tokens: 9 degrees of freedom, p = 1e-6 at 45."""
        logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.2, -0.7, 0.9]])
        u = torch.from_numpy(np.stack([uniforms(3, at, 4) for at in range(5000)]).reshape(-1))
        for temperature in (0.7, 1.0, 2.0):
            got = draw(logits.expand(len(u), -1), temperature, 1.0, u)
            seen = torch.bincount(got, minlength=10).double()
            want = torch.softmax(logits[0].double() / temperature, -1) * len(u)
            assert float(((seen - want) ** 2 / want).sum()) < 45

    def test_the_nucleus(self) -> None:
        """Probabilities 0.5, 0.3, 0.15, 0.05: top_p 0.6 keeps two, 0.8 + a little keeps three."""
        logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
        u = torch.linspace(0, 1 - 2**-24, 4001)
        for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.81, {1, 3, 0}), (0.999, {0, 1, 2, 3})):
            got = draw(logits.expand(len(u), -1), 1.0, top_p, u)
            assert set(got.tolist()) == kept
        share = (draw(logits.expand(len(u), -1), 1.0, 0.6, u) == 1).double().mean()
        assert abs(float(share) - 0.5 / 0.8) < 1e-3

    def test_a_wide_nucleus_is_ordered_whole(self) -> None:
        """5000 equal tokens: the first 1024 are not enough for top_p 0.9."""
        u = torch.linspace(0, 0.9999, 300)
        got = draw(torch.zeros(300, 5000), 1.0, 0.9, u)
        assert int(got.max()) - int(got.min()) > 4000 and len(set(got.tolist())) == 300
        random = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
        ends = draw(random, 1.0, 0.9, torch.tensor([0.0, 0.5, 1 - 2**-24]))
        ordered = torch.softmax(random, -1).sort(-1, descending=True)
        assert ends[0] == ordered.indices[0, 0]
        last = int((ordered.values[2].cumsum(-1) < 0.9).sum())
        assert abs(int((ordered.indices[2] == ends[2]).nonzero()) - last) <= 1

    def test_uniforms_are_independent_and_nested(self) -> None:
        assert np.array_equal(uniforms(1, 2, 50)[:7], uniforms(1, 2, 7))
        many = np.stack([uniforms(seed, at, 64) for seed in range(8) for at in range(8)])
        assert np.abs(np.corrcoef(many) - np.eye(64)).max() < 0.6
        assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.03
        uniforms(-1, 0, 1), uniforms(2**70, 0, 1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_of_equal_logits_the_first(self, dtype: torch.dtype) -> None:
        logits = torch.zeros(3, 500, dtype=dtype)
        logits[0, [40, 400]] = 2.0
        logits[1, 499] = 1.0
        assert most_probable(logits).tolist() == [40, 499, 0]


@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12),
    head=st.lists(st.integers(4, 9), max_size=200), batch_size=st.integers(1, 14),
    share=st.booleans(),
)  # fmt: skip
def test_a_plan_holds_every_prompt_once(
    rows: list[list[int]], head: list[int], batch_size: int, share: bool
) -> None:
    prompts = [head + row for row in rows]
    plan = make_plan(prompts, batch_size, pad=99, share_prefix=share)
    shared = plan.prefix.shape[1]
    if not share:
        assert shared == 0
    assert sorted(at for batch in plan.batches for at in batch.rows) == list(range(len(prompts)))
    sizes = [len(batch.rows) for batch in plan.batches]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    for batch in plan.batches:
        for at, ids, mask, positions in zip(
            batch.rows, batch.ids, batch.mask, batch.positions, strict=True
        ):
            own = mask[shared:].bool()
            assert plan.prefix[0].tolist() + ids[own].tolist() == prompts[at]
            assert own.any() and bool(own[-1]) and bool((ids[~own] == 99).all())
            assert positions[own].tolist() == list(range(shared, len(prompts[at])))


def test_common_prefix_leaves_a_token() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 4]]) == 1
    assert common_prefix([[1, 2], [1, 2]]) == 1
    assert common_prefix([[7]]) == 0

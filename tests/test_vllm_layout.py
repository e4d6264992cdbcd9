"""vLLM's fused, sharded and padded parameters as canonical elements, against vLLM's own loaders.

Every family is loaded by vLLM as each rank of 1, 2, 4 and 8 holds it. The tests without a marker
need no vLLM: models of a few lines show what is mapped and what is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_models import FAMILIES, engine_config, loaded_by_vllm, save_family

from esfast import Member, ParameterTable, Weights
from esfast.checkpoint import stored_shapes, stored_slices
from esfast.engines.vllm_layout import segments
from esfast.errors import DataError, ParameterError
from esfast.segments import Segment

SIGMA = 0.25


class Family(NamedTuple):
    """A saved model: transformers' own, its stored tensors, and vLLM's configuration for it."""

    folder: Path
    model: Any
    stored: dict[str, torch.Tensor]
    config: Any


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_family(request.param, folder)
    return Family(folder, model, load_file(folder / "model.safetensors"), engine_config(folder))


def box(segment: Segment) -> tuple[slice, ...]:
    pairs = zip(segment.origin, segment.tensor.shape, strict=True)
    return tuple(slice(start, start + size) for start, size in pairs)


def assert_holds(found: Iterable[Segment], whole: dict[str, torch.Tensor]) -> None:
    for segment in found:
        assert segment.shape == tuple(whole[segment.name].shape)
        assert torch.equal(segment.tensor, whole[segment.name][box(segment)]), segment.name


def copies_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def total(checksums: Iterable[str]) -> str:
    return f"{sum(int(checksum, 16) for checksum in checksums) % 2**64:016x}"


@pytest.mark.vllm
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_hold_the_checkpoint_and_move_like_it(family: Family, ranks: int) -> None:
    models = [loaded_by_vllm(family.config, family.folder, r, ranks) for r in range(ranks)]
    before = [copies_of(model) for model in models]
    shapes = stored_shapes(family.folder)
    found = [segments(m, r, ranks, checkpoint=shapes) for r, m in enumerate(models)]
    for model, copies, own in zip(models, before, found, strict=True):
        assert all(torch.equal(copies[n], p) for n, p in model.named_parameters())
        assert_holds(own, family.stored)
    assert_each_counted_once(found, family.stored)
    for model, own in zip(models, found, strict=True):
        assert_the_rest_is_padding(model, own)

    tables = [ParameterTable(own) for own in found]
    assert {name for table in tables for name in table.names} == family.stored.keys()
    shards = [Weights(table, threads=1) for table in tables]
    assert total(shard.checksum() for shard in shards) == reference(family.model).checksum()
    whole = {name: tensor.clone() for name, tensor in family.stored.items()}
    moved = Weights(ParameterTable.from_tensors(whole), threads=1)
    for weights in [moved, *shards]:
        weights.perturb(Member(seed=5, sign=-1), SIGMA)
    for own in found:
        assert_holds(own, whole)
    assert total(shard.checksum() for shard in shards) == moved.checksum()
    for weights in [moved, *shards]:
        weights.update([Member(seed=5), Member(seed=6)], [0.3, -0.2], seed=9)
    for own in found:
        assert_holds(own, whole)
    assert total(shard.checksum() for shard in shards) == moved.checksum()


def reference(model: torch.nn.Module) -> Weights:
    """What the transformers engine edits."""
    return Weights(ParameterTable.from_module(model), threads=1)


def assert_each_counted_once(found: list[list[Segment]], stored: dict[str, torch.Tensor]) -> None:
    counts = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in stored.items()}
    for segment in (segment for own in found for segment in own if segment.counted):
        counts[segment.name][box(segment)] += 1
    for name, count in counts.items():
        assert (count == 1).all(), name


def assert_the_rest_is_padding(model: torch.nn.Module, own: list[Segment]) -> None:
    """Only rows past the vocabulary belong to no segment."""
    held = {id(p): torch.zeros(p.numel(), dtype=torch.bool) for p in model.parameters()}
    for parameter in model.parameters():
        for segment in own:
            view = segment.tensor
            if view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
                held[id(parameter)].as_strided(
                    view.shape, view.stride(), view.storage_offset()
                ).fill_(True)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            rows = held[id(parameter)].view(parameter.shape)
            shard = getattr(module, "shard_indices", None)
            real = len(rows) if shard is None else shard.num_org_elements
            assert rows[:real].all(), name
            assert not rows[real:].any(), name


@pytest.mark.vllm
def test_padding_rows_stay_and_chosen_tensors_alone_are_edited(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    config = engine_config(tmp_path)
    model: Any = loaded_by_vllm(config, tmp_path, 1, 2)
    table = model.model.embed_tokens.weight
    assert (model.model.embed_tokens.shard_indices.num_org_elements, len(table)) == (54, 96)
    table.data[54:] = 7.0
    name = "model.embed_tokens.weight"
    every = segments(model, 1, 2, checkpoint=stored_shapes(tmp_path))
    own = [segment for segment in every if segment.name == name]
    assert [(s.name, s.origin, s.tensor.shape) for s in own] == [(name, (96, 0), (54, 64))]
    before = copies_of(model)
    Weights(ParameterTable(own)).perturb(Member(seed=1), SIGMA)
    assert (table[54:] == 7.0).all()
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == {name}


@pytest.mark.vllm
def test_vllm_models_that_cannot_be_mapped_are_refused_by_name(tmp_path: Path) -> None:
    save_family("mixtral", tmp_path)
    config = engine_config(tmp_path)
    model: Any = loaded_by_vllm(config, tmp_path, 0, 1)
    shapes = stored_shapes(tmp_path)
    layer = model.model.layers[0]
    fewer = {n: s for n, s in shapes.items() if not n.endswith("experts.3.w2.weight")}
    bare = r"2 parameters.*w2_weight' \(6144 of 24576 elements\)"
    with pytest.raises(ParameterError, match=bare):
        segments(model, 0, 1, checkpoint=fewer)
    layer.self_attn.o_proj.quant_method = type("Fp8LinearMethod", (), {})()
    with pytest.raises(ParameterError, match=r"o_proj' is quantised \(Fp8LinearMethod\)"):
        segments(model, 0, 1, checkpoint=shapes)
    del layer.self_attn.o_proj.quant_method
    layer.self_attn.o_proj.weight.data = torch.empty(0)
    with pytest.raises(ParameterError, match=r"o_proj.weight' of shape \(0,\).*packed"):
        segments(model, 0, 1, checkpoint=shapes)


class Loading(torch.nn.Module):
    """One 4 x 6 parameter and a loader of one line."""

    def __init__(self, load: Any, shape: tuple[int, ...] = (4, 6)) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape), requires_grad=False)
        self.load = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.load(self, tensor)


def found_in(load: Any, stored: tuple[int, ...] = (4, 6), **kwargs: Any) -> list[Segment]:
    return segments(Loading(load, **kwargs), 0, 1, checkpoint={"w": stored})


def test_boxes_follow_views_casts_and_transposes() -> None:
    (one,) = found_in(lambda m, w: m.weight.data.copy_(w.t().float().contiguous()), (6, 4))
    assert (one.tensor.shape, one.tensor.stride(), one.origin) == ((6, 4), (1, 6), (0, 0))
    (part,) = found_in(lambda m, w: m.weight.data.copy_(w[2, 4:, 1:7]), (3, 8, 9))
    assert (part.tensor.shape, part.tensor.stride()[1:]) == ((1, 4, 6), (6, 1))
    assert part.origin == (2, 4, 1)
    rows = found_in(lambda m, w: [m.weight.data[i].copy_(w[3 - i]) for i in range(4)])
    assert [(s.origin, s.tensor.storage_offset()) for s in rows] == [
        ((i, 0), 18 - 6 * i) for i in range(4)
    ]


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (lambda m, w: m.weight.data.copy_(w * 2), "'weight' is computed"),
        (lambda m, w: m.weight.data.add_(w), "writes to 'weight' by aten::add_"),
        (lambda m, w: m.weight.data.copy_(w.reshape(6, 4).t()), "'w' of shape.*regrouped"),
        (lambda m, w: m.weight.data[:3].copy_(w[:3]), r"'weight' \(6 of 24 elements\)"),
        (lambda m, w: float(w.sum()), "loader of vLLM's Loading cannot be followed"),
        (lambda m, w: setattr(m.weight, "data", torch.zeros(4, 6)), "Loading replaced"),
        (lambda m, w: m.weight.data.copy_(w[:1]), "'weight' is computed"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(load: Any, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        found_in(load)


def test_experts_spread_over_workers_are_refused() -> None:
    model = Loading(lambda m, w: m.weight.data.copy_(w))
    model.experts = torch.nn.Module()
    model.experts.use_ep = True
    with pytest.raises(ParameterError, match="'experts' spreads its experts over the workers"):
        segments(model, 0, 2, checkpoint={"w": (4, 6)})


def test_filled_rows_are_padding_and_buffers_are_nobodys() -> None:
    def load(module: Any, stored: torch.Tensor) -> None:
        module.weight.data[:3].copy_(stored)
        module.weight.data[3:].fill_(0)
        torch.zeros(3, 6).copy_(stored)

    (one,) = found_in(load, (3, 6))
    assert one.tensor.shape == (3, 6)
    assert one.tensor.abs().min() > 0


def test_stored_slices_are_the_segments_boxes(tmp_path: Path) -> None:
    stored = {"w": torch.randn(4, 6), "s": torch.tensor(3.0), "unused": torch.zeros(2)}
    save_file(stored, tmp_path / "model.safetensors")
    own = [Segment("w", (4, 6), torch.zeros(2, 3), (1, 2)), Segment("s", (), torch.zeros(()))]
    found = {segment.name: tensor for segment, tensor in stored_slices(tmp_path, own)}
    assert torch.equal(found["w"], stored["w"][1:3, 2:5])
    assert torch.equal(found["s"], stored["s"])
    with pytest.raises(DataError, match=r"'w' in .* has shape \(4, 6\); the model's has \(4, 7\)"):
        list(stored_slices(tmp_path, [Segment("w", (4, 7), torch.zeros(2, 3))]))
    with pytest.raises(DataError, match="stores no tensor 'v'"):
        list(stored_slices(tmp_path, [Segment("v", (4, 6), torch.zeros(2, 3))]))


def test_checksums_leave_out_what_others_count() -> None:
    whole = {"a": torch.randn(4, 6), "b": torch.randn(5)}
    both = Weights(ParameterTable.from_tensors(whole), memory="shadow")
    first = [Segment("a", (4, 6), whole["a"][:2].clone()), Segment("b", (5,), whole["b"].clone())]
    second = [Segment("a", (4, 6), whole["a"][2:].clone(), (2, 0)),
              Segment("b", (5,), whole["b"].clone(), counted=False)]  # fmt: skip
    shards = [Weights(ParameterTable(own)) for own in (first, second)]
    assert total(shard.checksum() for shard in shards) == both.checksum()
    for weights in [both, *shards]:
        weights.update([Member(seed=4)], [0.5])
    assert total(shard.checksum() for shard in shards) == both.checksum()
    alone = Weights(ParameterTable([Segment("b", (5,), whole["b"].clone(), counted=False)]))
    assert alone.checksum() == "0" * 16

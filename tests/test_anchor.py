"""The anchor gives the same bits from memory and from the checkpoint's file, and bad files are
refused before anything is changed."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import (
    DTYPES,
    TORCH,
    assert_tensors,
    clones,
    coefficients,
    expected_update,
    plain_bits,
    population,
    tensors,
)
from reference import Update
from safetensors.torch import save_file

from esfast import Anchor, AnchoredDecay, EsfastError, ParameterTable, Weights
from esfast.segments import Segment

Model = dict[str, torch.Tensor]


def stepped(model: Model, anchor: Anchor, kind: str = "l2", memory: str = "lean") -> Model:
    """A copy of the model after one update with decay."""
    weights = Weights(ParameterTable.from_tensors(model), memory=memory, anchor=anchor)
    members, scalars = population("gaussian", 3), coefficients(3, 1e-2)
    weight = 20.0 if kind == "l2" else 0.4
    weights.update(members, scalars, decay=AnchoredDecay(kind, weight), alpha=0.01, seed=2)
    return model


def save_sharded(model: Model, folder: Path) -> None:
    """A Hugging Face folder of two files and their index."""
    names = list(model)
    files = {"model-00001-of-00002.safetensors": names[:2]}
    files["model-00002-of-00002.safetensors"] = names[2:]
    for file, held in files.items():
        save_file({name: model[name] for name in held}, folder / file)
    where = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_and_file_are_one(
    target: str, tmp_path: Path, dtype: str, stored: str, kind: str
) -> None:
    """Also where the file's dtype is not the weights': the anchor is its fp32 value."""
    base = {name: w.to(TORCH[stored]) for name, w in tensors("float32", plain_bits, 4).items()}
    save_file(base, tmp_path / "model.safetensors")
    model = tensors(dtype, plain_bits, 8)
    table = ParameterTable.from_tensors(model)
    memory = Anchor.in_memory(ParameterTable.from_tensors(clones(base)))
    file = Anchor.from_safetensors(tmp_path / "model.safetensors", table)
    strength = ("l2", 20.0 * 0.01) if kind == "l2" else ("l1", 0.4 * 0.01)
    update = Update(population("gaussian", 3), coefficients(3, 1e-2), strength, seed=2)
    want, _ = expected_update(clones(model), update, base)
    assert_tensors(stepped(clones(model), memory, kind), want, "memory")
    assert_tensors(stepped(clones(model), file, kind), want, "file")


def test_folders(tmp_path: Path) -> None:
    base = tensors("bfloat16", plain_bits, 4)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    save_file(base, one / "model.safetensors")
    save_sharded(base, two)
    model = tensors("bfloat16", plain_bits, 8)
    table = ParameterTable.from_tensors(model)
    want = stepped(clones(model), Anchor.in_memory(ParameterTable.from_tensors(base)))
    for folder in (one, two, str(two)):
        anchor = Anchor.from_safetensors(folder, table)
        assert_tensors(stepped(clones(model), anchor), want, str(folder))


def test_the_anchor_is_the_start_not_the_live_weights() -> None:
    """in_memory copies; a file is not followed by the updates."""
    model = tensors("float32", plain_bits)
    start = clones(model)
    anchor = Anchor.in_memory(ParameterTable.from_tensors(model))
    weights = Weights(ParameterTable.from_tensors(model), anchor=anchor)
    one = population("gaussian", 1)
    for _ in range(3):
        weights.update(one, [0.0], decay=AnchoredDecay("l2", 0.5), alpha=1.0)
    assert_tensors(model, start)
    weights.update(one, [1.0], decay=AnchoredDecay("l2", 0.5), alpha=1.0)
    assert not torch.equal(model["model.norm.weight"], start["model.norm.weight"])
    weights.update(one, [0.0], decay=AnchoredDecay("l1", 1e9), alpha=1.0)
    assert_tensors(model, start, "an l1 decay that is larger than every change")


def test_shards_read_their_part_of_the_file(target: str, tmp_path: Path) -> None:
    name, shape = "w", (12, 10)
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    save_file(base, tmp_path / "model.safetensors")
    whole = {name: torch.zeros(shape)}
    full = Anchor.from_safetensors(tmp_path, ParameterTable.from_tensors(whole))
    stepped(whole, full)
    for rows, columns in ((slice(3, 7), slice(0, 10)), (slice(0, 12), slice(1, 4))):
        held = torch.zeros(shape)[rows, columns].clone()
        table = ParameterTable([Segment(name, shape, held, (rows.start, columns.start))])
        anchor = Anchor.from_safetensors(tmp_path, table)
        members, scalars = population("gaussian", 3), coefficients(3, 1e-2)
        decay = AnchoredDecay("l2", 20.0)
        Weights(table, anchor=anchor).update(members, scalars, decay=decay, alpha=0.01, seed=2)
        assert torch.equal(held, whole[name][rows, columns])


def test_a_checkpoint_of_the_model_without_its_head(tmp_path: Path) -> None:
    """GPT-2's on the hub: "wte.weight" is the live "transformer.wte.weight"."""
    live = {"transformer.wte.weight": torch.randn(5, 3), "lm_head.weight": torch.randn(3, 5)}
    stored = {"wte.weight": live["transformer.wte.weight"], "lm_head.weight": torch.zeros(3, 5)}
    save_file(stored, tmp_path / "model.safetensors")
    table = ParameterTable.from_tensors(live)
    anchor = Anchor.from_safetensors(tmp_path / "model.safetensors", table)
    start = live["transformer.wte.weight"].clone()
    decay = AnchoredDecay("l2", 0.5)
    Weights(table, anchor=anchor).update([], [], decay=decay, alpha=1.0, rounding="nearest")
    assert torch.equal(live["transformer.wte.weight"], start)
    live["transformer.wte.weight"].zero_()
    Weights(table, anchor=anchor).update([], [], decay=decay, alpha=1.0, rounding="nearest")
    assert torch.equal(live["transformer.wte.weight"], start / 2)


def test_more_tensors_in_the_file_than_in_the_table(tmp_path: Path) -> None:
    base = tensors("bfloat16", plain_bits)
    save_file(
        {**base, "extra.inv_freq": torch.ones(3, dtype=torch.float64)}, tmp_path / "a.safetensors"
    )
    model, other = (tensors("bfloat16", plain_bits, 8) for _ in range(2))
    table = ParameterTable.from_tensors(model)
    stepped(model, Anchor.from_safetensors(tmp_path / "a.safetensors", table))
    stepped(other, Anchor.in_memory(ParameterTable.from_tensors(base)))
    assert_tensors(model, other)


# ---- attacks on the file -----------------------------------------------------------------------


def good_file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(tensors("bfloat16", plain_bits), path)
    return path


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """The same file with its JSON header changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


EMBED = "model.embed_tokens.weight"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def not_json(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"x" * 20 + data[28:])


def missing_tensor(path: Path) -> None:
    rewrite(path, lambda header: header.pop(EMBED) and None)


def wrong_shape(path: Path) -> None:
    rewrite(path, lambda header: header[EMBED].update(shape=[29, 37]))


def wrong_dtype(path: Path) -> None:
    rewrite(path, lambda header: header[EMBED].update(dtype="I16"))


def offsets_outside(path: Path) -> None:
    def change(header: dict) -> None:
        begin, end = header[EMBED]["data_offsets"]
        header[EMBED]["data_offsets"] = [begin + 10**9, end + 10**9]

    rewrite(path, change)


def offsets_too_short(path: Path) -> None:
    def change(header: dict) -> None:
        begin, end = header[EMBED]["data_offsets"]
        header[EMBED]["data_offsets"] = [begin, end - 2]

    rewrite(path, change)


def deep(path: Path) -> None:
    text = b'{"__metadata__":' + b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def infinite_shape(path: Path) -> None:
    rewrite(path, lambda header: header[EMBED].update(shape=[math.inf, 37]))


ATTACKS = (
    deep, infinite_shape,
    cut_short, cut_header, empty, endless_header, not_json, missing_tensor, wrong_shape,
    wrong_dtype, offsets_outside, offsets_too_short,
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda f: f.__name__)
def test_bad_files_are_refused(tmp_path: Path, attack: Callable[[Path], None]) -> None:
    path = good_file(tmp_path)
    attack(path)
    model = tensors("bfloat16", plain_bits)
    of_a_tensor = attack in (missing_tensor, wrong_shape, wrong_dtype)
    said = EMBED if of_a_tensor else "not a whole safetensors file|cannot mmap an empty file"
    with pytest.raises(EsfastError, match=said) as caught:
        Anchor.from_safetensors(path, ParameterTable.from_tensors(model))
    assert "model.safetensors" in str(caught.value)
    assert_tensors(model, tensors("bfloat16", plain_bits))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    table = ParameterTable.from_tensors(tensors("bfloat16", plain_bits))
    save_sharded(tensors("bfloat16", plain_bits), tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(EsfastError, match="No such file or directory"):
            Anchor.from_safetensors(path, table)
    (tmp_path / "void").mkdir()
    with pytest.raises(EsfastError, match="No such file or directory"):
        Anchor.from_safetensors(tmp_path / "void", table)


def test_an_index_may_not_point_out_of_its_folder(tmp_path: Path) -> None:
    base = tensors("bfloat16", plain_bits)
    save_file(base, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    where = dict.fromkeys(base, "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(EsfastError, match="names files outside its folder"):
        Anchor.from_safetensors(folder, ParameterTable.from_tensors(base))


def test_an_anchor_of_another_model_is_refused() -> None:
    other = ParameterTable.from_tensors({"something.else": torch.ones(3)})
    model = tensors("bfloat16", plain_bits)
    with pytest.raises(EsfastError, match="made for another table"):
        weights = Weights(ParameterTable.from_tensors(model), anchor=Anchor.in_memory(other))
        weights.update(population("gaussian", 1), [0.0], decay=AnchoredDecay("l2", 1.0), alpha=0.1)
    assert_tensors(model, tensors("bfloat16", plain_bits))


def test_an_anchor_of_other_shapes_is_refused() -> None:
    """As many tensors, but smaller ones: reading past their end would be worse than an error."""
    table = ParameterTable.from_tensors({"w": torch.ones(64, 64)})
    for other in (
        {"w": torch.ones(2)}, {"v": torch.ones(64, 64)}, {"w": torch.ones(64 * 64)}
    ):  # fmt: skip
        with pytest.raises(EsfastError, match="made for another table"):
            Weights(table, anchor=Anchor.in_memory(ParameterTable.from_tensors(other)))


def test_one_value_decays_exactly() -> None:
    """By hand: w = 3, a = 1, no noise; l2 with alpha * lambda = 1/4 gives 2.5, l1 with 1/4 2.75."""
    for kind, want in (("l2", 2.5), ("l1", 2.75)):
        model = {"w": torch.full((4,), 3.0)}
        held = Anchor.in_memory(ParameterTable.from_tensors({"w": torch.full((4,), 1.0)}))
        weights = Weights(ParameterTable.from_tensors(model), anchor=held)
        weights.update(population("gaussian", 1), [0.0], decay=AnchoredDecay(kind, 0.5), alpha=0.5)
        assert (model["w"] == want).all(), kind

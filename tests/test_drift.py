"""Drift: norms, sparsity, units in the last place, energy and groups, against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from esfast import DataError, ParameterTable, Segment
from esfast.forgetting.change import THRESHOLDS, ULPS, change_of, ulp
from esfast.forgetting.drift import PIECE, CheckpointTensors, drift
from esfast.forgetting.energy import SHARES, Energy
from esfast.forgetting.groups import GROUPS, group_of, layer_of

SPACINGS = {  # weight -> ulp, by the definition of each format
    torch.float32: {1.0: 2.0**-23, 1.5: 2.0**-23, -2.0: 2.0**-22, 0.75: 2.0**-24, 0.0: 2.0**-149,
                    2.0**-126: 2.0**-149, 2.0**-140: 2.0**-149, 3e38: 2.0**104},
    torch.bfloat16: {1.0: 2.0**-7, 1.9921875: 2.0**-7, -2.0: 2.0**-6, 0.02: 2.0**-13,
                     0.0: 2.0**-133, 2.0**-126: 2.0**-133, 2.0**-130: 2.0**-133, -3e38: 2.0**120},
    torch.float16: {1.0: 2.0**-10, -3.0: 2.0**-9, 0.02: 2.0**-16, 0.0: 2.0**-24,
                    2.0**-14: 2.0**-24, 2.0**-20: 2.0**-24, 65504.0: 2.0**5},
}  # fmt: skip


@pytest.mark.parametrize("dtype", SPACINGS)
def test_ulp_is_the_spacing_of_the_dtype(dtype):
    values, expected = zip(*SPACINGS[dtype].items(), strict=True)
    assert ulp(torch.tensor(values, dtype=dtype)).tolist() == list(expected)


@pytest.mark.parametrize("dtype", SPACINGS)
def test_ulp_is_the_way_to_the_next_number_away_from_zero(dtype):
    """Against the formats' own bits: the next larger magnitude is one bit pattern further."""
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits = torch.randint(0, 0x7F00 if dtype.itemsize == 2 else 0x7F000000, (20_000,))
    if dtype is torch.float16:
        bits %= 0x7BFF
    here = bits.to(integer).view(dtype)
    further = (bits + 1).to(integer).view(dtype)
    step = further.double() - here.double()
    assert np.array_equal(ulp(here), step.numpy())
    assert np.array_equal(ulp(-here), step.numpy())


def test_change_counts_what_numpy_counts():
    draws = np.random.default_rng(0)
    base = torch.tensor(draws.normal(size=5000) * 0.02).bfloat16()
    delta = np.where(draws.random(5000) < 0.3, 0.0, draws.normal(size=5000) * 1e-4)
    delta[:6] = [1e-6, -1e-6, 9.9e-7, -9.9e-7, 1e-5, 0.0]
    change = change_of(base, delta).record()
    assert change["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-13)
    scale = np.linalg.norm(base.double().numpy())
    assert change["relative_norm"] == pytest.approx(np.linalg.norm(delta) / scale, rel=1e-13)
    assert change["rms"] == pytest.approx(math.sqrt(np.mean(delta**2)), rel=1e-13)
    assert change["mean"] == pytest.approx(delta.mean(), rel=1e-10)
    assert change["mean_abs"] == pytest.approx(np.abs(delta).mean(), rel=1e-13)
    assert change["max_abs"] == np.abs(delta).max()
    assert change["unchanged"] == np.mean(delta == 0)
    assert change["below"] == [np.mean(np.abs(delta) < limit) for limit in THRESHOLDS]
    spacing = 2.0 ** (np.floor(np.log2(np.abs(base.double().numpy()))) - 7)
    assert change["within_ulps"] == [np.mean(np.abs(delta) <= n * spacing) for n in ULPS]


def test_a_threshold_is_not_below_itself_and_a_whole_ulp_is_within_one():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)
    change = change_of(base, np.array([1e-6, 9.999e-7, -(2.0**-7), 2.0**-7 + 1e-9])).record()
    assert change["below"][THRESHOLDS.index(1e-6)] == 0.25
    assert change["within_ulps"][ULPS.index(1)] == 0.75
    assert change["within_ulps"][ULPS.index(0.5)] == 0.5


def models(dtype: torch.dtype, seed: int = 0) -> tuple[dict, dict]:
    """A base and a tuned model of two layers; one tensor is larger than a piece."""
    draws = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (700, 500),
        "model.layers.0.self_attn.q_proj.weight": (40, 30),
        "model.layers.0.self_attn.o_proj.weight": (30, 40),
        "model.layers.1.mlp.up_proj.weight": (64, 30),
        "model.layers.1.input_layernorm.weight": (30,),
        "model.norm.weight": (),
    }
    base = {n: torch.randn(s, generator=draws).mul(0.1).to(dtype) for n, s in shapes.items()}
    moved = {n: t + 1e-3 * torch.randn(t.shape, generator=draws) for n, t in base.items()}
    return base, {n: t.to(dtype) for n, t in moved.items()}


def flat(tensors: dict, names: list[str] | None = None) -> np.ndarray:
    chosen = tensors if names is None else {n: tensors[n] for n in names}
    return np.concatenate([t.double().numpy().ravel() for t in chosen.values()])


@pytest.mark.parametrize("dtype", SPACINGS)
def test_drift_of_a_model_is_that_of_its_elements(dtype):
    base, tuned = models(dtype)
    assert base["model.embed_tokens.weight"].numel() > PIECE
    report = drift(base, tuned)
    delta = flat(tuned) - flat(base)
    assert report.whole.elements == delta.size
    assert report.whole.norm == pytest.approx(np.linalg.norm(delta), rel=1e-12)
    assert report.whole.largest == np.abs(delta).max()
    assert report.whole.sparsity(1e-3) == np.mean(np.abs(delta) < 1e-3)
    assert report.dtype == str(dtype).removeprefix("torch.")
    one = ["model.layers.1.mlp.up_proj.weight"]
    part = np.linalg.norm(flat(tuned, one) - flat(base, one))
    assert report.groups["mlp"].norm == pytest.approx(part, rel=1e-12)
    assert report.cells[1, "mlp"] == report.groups["mlp"]
    two = ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
    part = np.linalg.norm(flat(tuned, two) - flat(base, two))
    assert report.layers[1].norm == pytest.approx(part, rel=1e-12)
    assert set(report.cells) == {(None, "embeddings"), (0, "attention_qkv"),
                                 (0, "attention_output"), (1, "mlp"), (1, "norms"),
                                 (None, "norms")}  # fmt: skip


def test_a_model_against_itself_has_not_changed():
    base, _ = models(torch.bfloat16)
    record = drift(base, base).record()
    assert record["whole"]["norm"] == 0 and record["whole"]["unchanged"] == 1
    assert set(record["whole"]["below"] + record["whole"]["within_ulps"]) == {1.0}
    assert set(record["energy"]["whole"]["held"]) == {None}


def test_rounded_to_a_dtype_both_are_compared_as_if_stored_in_it():
    base, tuned = (clone_as(t, torch.float32) for t in models(torch.float32))
    small = {n: t + 1e-7 for n, t in base.items()}
    assert drift(base, small).whole.sparsity(1e-8) < 0.2
    as_bf16 = drift(base, small, dtype=torch.bfloat16)
    expected = flat(clone_as(small, torch.bfloat16)) - flat(clone_as(base, torch.bfloat16))
    assert as_bf16.dtype == "bfloat16"
    assert as_bf16.whole.unchanged == np.count_nonzero(expected == 0) > 0.9 * expected.size
    assert drift(base, tuned, dtype=torch.bfloat16).whole.unchanged < 0.9 * expected.size


def clone_as(tensors: dict, dtype: torch.dtype) -> dict:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def test_checkpoints_tables_and_modules_are_the_same_model(tmp_path):
    base, tuned = models(torch.bfloat16)
    save_file(base, tmp_path / "model.safetensors")
    mapped = CheckpointTensors(tmp_path)
    assert len(mapped) == len(base) and set(mapped) == set(base)
    expected = drift(base, tuned).record()
    assert drift(mapped, ParameterTable.from_tensors(tuned)).record()["whole"] == expected["whole"]
    module = torch.nn.Linear(3, 2)
    other = {name: p.detach() + 1 for name, p in module.named_parameters()}
    assert drift(module, other).whole.norm == pytest.approx(math.sqrt(8), rel=1e-6)


def test_models_that_do_not_belong_together_are_refused():
    base, tuned = models(torch.float32)
    without = {n: t for n, t in tuned.items() if "mlp" not in n}
    with pytest.raises(DataError, match=r"up_proj.weight' is in the base alone"):
        drift(base, without)
    with pytest.raises(DataError, match="in the tuned model alone"):
        drift(without, base)
    with pytest.raises(DataError, match=r"shape \(64, 30\) in the base and \(30,\)"):
        drift(base, {**tuned, "model.layers.1.mlp.up_proj.weight": torch.zeros(30)})
    broken = {**tuned, "model.norm.weight": torch.tensor(float("nan"))}
    with pytest.raises(DataError, match=r"model.norm.weight' holds values that are not finite"):
        drift(base, broken)
    half = Segment("w", (4, 2), torch.zeros(2, 2))
    with pytest.raises(DataError, match="part of a tensor"):
        drift(base, ParameterTable([half]))


def test_an_output_matrix_that_one_of_the_two_ties_is_no_difference():
    base, tuned = models(torch.float32)
    with_head = {**tuned, "lm_head.weight": tuned["model.embed_tokens.weight"]}
    assert drift(base, with_head).whole == drift(base, tuned).whole


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 30)
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        CheckpointTensors(tmp_path)
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        CheckpointTensors(tmp_path / "missing")


def test_energy_of_known_vectors():
    energy = Energy()
    energy.add(np.array([3.0, -4.0]))
    energy.add(np.zeros(8))  # 25 in all: 16, then 9, then nothing
    assert energy.held_by((0.1, 0.2, 1.0)) == pytest.approx([0.64, 1.0, 1.0])
    assert energy.elements_for(0.64) == pytest.approx(0.1)
    assert energy.elements_for(0.99) == pytest.approx(0.1 + 0.1 * 0.35 / 0.36)
    equal = Energy()
    equal.add(np.full(1000, -0.25))
    assert equal.held_by((0.1, 0.5)) == pytest.approx([0.1, 0.5])
    assert Energy().held_by((0.5,)) == [None] and Energy().elements_for(0.5) is None


def test_the_energy_curve_is_that_of_sorted_elements():
    delta = np.random.default_rng(1).normal(size=200_000) ** 3  # heavy tails
    energy = Energy()
    for part in np.array_split(delta, 7):
        energy.add(part)
    ordered = np.cumsum(np.sort(delta**2)[::-1])
    exact = [ordered[max(round(share * delta.size), 1) - 1] / ordered[-1] for share in SHARES[2:]]
    assert energy.held_by()[2:] == pytest.approx(exact, abs=1e-3)
    half = (np.searchsorted(ordered, 0.5 * ordered[-1]) + 1) / delta.size
    assert energy.elements_for(0.5) == pytest.approx(half, rel=0.01)


NAMES = {
    # Llama, Qwen, Mistral
    "model.embed_tokens.weight": ("embeddings", None),
    "lm_head.weight": ("embeddings", None),
    "model.norm.weight": ("norms", None),
    "model.layers.11.self_attn.q_proj.weight": ("attention_qkv", 11),
    "model.layers.11.self_attn.k_proj.bias": ("attention_qkv", 11),
    "model.layers.0.self_attn.v_proj.weight": ("attention_qkv", 0),
    "model.layers.3.self_attn.o_proj.weight": ("attention_output", 3),
    "model.layers.3.mlp.gate_proj.weight": ("mlp", 3),
    "model.layers.3.mlp.down_proj.weight": ("mlp", 3),
    "model.layers.3.input_layernorm.weight": ("norms", 3),
    "model.layers.3.post_attention_layernorm.weight": ("norms", 3),
    "model.layers.3.self_attn.q_norm.weight": ("norms", 3),
    "model.layers.3.mlp.experts.7.up_proj.weight": ("mlp", 3),
    "model.layers.3.mlp.gate.weight": ("mlp", 3),
    "model.layers.3.block_sparse_moe.experts.0.w1.weight": ("mlp", 3),
    # Gemma
    "language_model.model.layers.5.pre_feedforward_layernorm.weight": ("norms", 5),
    "model.layers.5.post_feedforward_layernorm.weight": ("norms", 5),
    # Phi-3, fused
    "model.layers.2.self_attn.qkv_proj.weight": ("attention_qkv", 2),
    "model.layers.2.mlp.gate_up_proj.weight": ("mlp", 2),
    # DeepSeek
    "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": ("attention_qkv", 2),
    "model.layers.2.self_attn.q_a_layernorm.weight": ("norms", 2),
    # GPT-2
    "transformer.wte.weight": ("embeddings", None),
    "transformer.wpe.weight": ("embeddings", None),
    "transformer.h.10.attn.c_attn.weight": ("attention_qkv", 10),
    "transformer.h.10.attn.c_proj.bias": ("attention_output", 10),
    "transformer.h.10.mlp.c_fc.weight": ("mlp", 10),
    "transformer.h.10.mlp.c_proj.weight": ("mlp", 10),
    "transformer.h.10.ln_1.weight": ("norms", 10),
    "transformer.ln_f.weight": ("norms", None),
    # GPT-NeoX, OPT
    "gpt_neox.layers.1.attention.query_key_value.weight": ("attention_qkv", 1),
    "gpt_neox.layers.1.attention.dense.weight": ("attention_output", 1),
    "gpt_neox.layers.1.mlp.dense_h_to_4h.weight": ("mlp", 1),
    "gpt_neox.embed_in.weight": ("embeddings", None),
    "model.decoder.layers.4.self_attn.out_proj.weight": ("attention_output", 4),
    "model.decoder.layers.4.fc1.weight": ("mlp", 4),
    "model.decoder.layers.4.self_attn_layer_norm.weight": ("norms", 4),
    # No part of a transformer's layers that is known
    "visual.blocks.3.attn.qkv.weight": ("other", None),
    "model.layers.2.linear_attn.A_log": ("other", 2),
    "scale": ("other", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_family_falls_into_its_groups(name):
    assert (group_of(name), layer_of(name)) == NAMES[name]
    assert group_of(name) in GROUPS

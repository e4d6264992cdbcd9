"""Names and elements of a live model are those of its saved checkpoint, experts taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SIZES, gpt2, llama
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from esfast import Member, ParameterTable, Weights
from esfast.errors import ParameterError, StateError
from esfast.stored_names import Computed, require_live, stored_tensors


def mixtral() -> PreTrainedModel:
    """A random Mixtral with four experts a layer."""
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=259, num_local_experts=4, **SIZES)
    return MixtralForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("make", [mixtral, gpt2, llama, lambda: llama(tie_word_embeddings=True)])
def test_live_tensors_are_the_saved_ones(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = make()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            live = require_live(stored_tensors(model))
        assert live.keys() == saved.keys()
        for name, tensor in live.items():
            assert torch.equal(tensor, saved[name]), name


def test_an_edit_of_an_expert_reaches_the_fused_parameter(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    live, apart = (Weights(ParameterTable.from_module(model)),
                   Weights(ParameterTable.from_tensors(saved)))  # fmt: skip
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    before = fused.detach().clone()
    for weights in (live, apart):
        weights.perturb(Member(seed=3), 1e-2)
    assert live.checksum() == apart.checksum()
    w1, w3 = (saved[f"model.layers.1.block_sparse_moe.experts.2.{n}.weight"] for n in ("w1", "w3"))
    assert torch.equal(fused[2], torch.cat([w1, w3]))
    live.restore()
    assert torch.equal(fused, before)


def test_a_fused_parameter_that_moves_is_noticed() -> None:
    model = mixtral()
    weights = Weights(ParameterTable.from_module(model, include=["*experts.0.*"]))
    model.lm_head.float()  # not edited
    weights.perturb(Member(seed=3), 1e-2)
    weights.restore()
    model.float()
    with pytest.raises(StateError, match=r"mlp.experts.gate_up_proj.*was moved or cast"):
        weights.perturb(Member(seed=3), 1e-2)


def test_what_is_stored_regrouped_is_refused_by_name() -> None:
    with pytest.raises(ParameterError, match=r"'q.weight' of shape \(4, 2\).*regrouped.*exclude"):
        require_live({"k.weight": torch.zeros(2), "q.weight": Computed((4, 2))})

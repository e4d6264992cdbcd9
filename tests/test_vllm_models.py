"""VLLMEngine on models that it holds in other ways: experts, tied weights, and a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_tiny import checksum_of, save_tiny, start

from esfast import Member, ParameterTable, Weights
from esfast.engines.base import Sampling
from esfast.models import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_this_process")]


def test_experts_are_edited_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM fuses and packs them; a prompt uses few, so they are tried a layer at once. (In a
    process of its own, where vLLM makes the groups that experts need.)"""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = save_tiny(tmp_path / "mixtral", kind="Mixtral", num_local_experts=4)
    engine = start(folder)
    try:
        live = engine.live_weights()
        assert live.checksum() == checksum_of(folder)
        names = {spec.name for spec in live.specs()}
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
        assert engine.reach(all_of_them=True) == 2 + 1 + 2 * (4 + 1 + 3 + 2)
        live.update([Member(1)], [0.05])
        assert checksum_of(engine.save(tmp_path / "saved")) == live.checksum()
    finally:
        engine.close()


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    engine = start(folder)
    try:
        live = engine.live_weights()
        assert live.checksum() == checksum_of(folder)
        assert "lm_head.weight" not in {spec.name for spec in live.specs()}
        before = engine._probe()
        live.update([Member(1)], [0.05])
        assert engine._probe() != before
        assert checksum_of(engine.save(tmp_path / "saved")) == live.checksum()
    finally:
        engine.close()


@pytest.mark.model
def test_smollm2_has_the_other_engines_weights_and_answers() -> None:
    engine = start(Path(load_model("smollm2-135m").folder))
    try:
        live = engine.live_weights()
        theirs = load_model("smollm2-135m")
        others = Weights(ParameterTable.from_module(theirs.model), threads=1)
        assert live.checksum() == others.checksum()
        question = ["What is the capital of France?"]
        before = engine.generate(question, Sampling(8))
        assert "Paris" in before[0].text
        for made in (live, others):
            made.perturb(Member(1), 0.01)
        assert live.checksum() == others.checksum()
        assert engine.generate(question, Sampling(8)) != before
        live.restore()
        assert engine.generate(question, Sampling(8)) == before
        others.restore()
        for made in (live, others):
            made.update([Member(n) for n in range(8)], [1e-4 * n for n in range(8)], seed=2)
        assert live.checksum() == others.checksum()
    finally:
        engine.close()

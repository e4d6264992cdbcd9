"""A thousand members on the real SmolLM2-135M, in every dtype and both memory modes: no bit moves.

Slow (one to three minutes a case) and in need of the model, so it runs with
`pytest -m slow`; test_weights.py does twenty cycles on made-up weights by default.
ESFAST_TEST_MODEL names a Hugging Face folder to use in place of the one `esfast train` fetches.
"""

from __future__ import annotations

import os

import pytest
import torch
from cases import DTYPES, MODES, NOISES, TORCH

from esfast import Member, ParameterTable, Weights

pytestmark = [pytest.mark.model, pytest.mark.slow]
CYCLES = 1000


@pytest.fixture(scope="module")
def smollm2() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    folder = os.environ.get("ESFAST_TEST_MODEL")
    if folder is None:
        from esfast.model_cache import cached_smollm2

        folder = str(cached_smollm2())
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weights_of(model: torch.nn.Module, dtype: str, memory: str) -> Weights:
    """The model's tensors cast to `dtype`, tied ones once."""
    tensors = {name: w.detach().to(TORCH[dtype]).clone() for name, w in model.named_parameters()}
    return Weights(ParameterTable.from_tensors(tensors), memory=memory)


def member(k: int) -> Member:
    """All noises and both signs in turn."""
    noise = NOISES[k % 3]
    index = k % 40 if noise == "hadamard" else 0
    return Member(seed=k // 2, sign=1 - 2 * (k % 2), noise=noise, index=index)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_cycles_move_no_bit(smollm2: torch.nn.Module, dtype: str, memory: str) -> None:
    weights = weights_of(smollm2, dtype, memory)
    before = weights.checksum()
    for k in range(CYCLES):
        weights.perturb(member(k), 1e-3)
        weights.restore()
        if k % 100 == 99:
            assert weights.checksum() == before, f"after {k + 1} cycles"


def test_lean_takes_a_fifth_of_the_bf16_weights_at_most(smollm2: torch.nn.Module) -> None:
    weights = weights_of(smollm2, "bfloat16", "lean")
    expected = weights.expected_bytes(1e-3)
    for k in range(3):
        weights.perturb(member(k), 1e-3)
        use = weights.memory_use()
        assert use.weights_bytes == 2 * sum(w.numel() for w in smollm2.parameters())
        assert use.extra_bytes <= 0.2 * use.weights_bytes
        assert expected <= 0.2 * use.weights_bytes
        weights.restore()

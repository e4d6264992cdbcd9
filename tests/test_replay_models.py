"""Replay into a part of a model, over an anchor in a file, and from shards into the whole."""

from __future__ import annotations

import pytest
import torch
from cases import assert_tensors, plain_bits, tensor_of
from test_replay import DECAYS, run, strategy

from esfast import DataError, EvolutionStrategy, ParameterTable, Segment
from esfast.anchor import Anchor
from esfast.replay import catch_up, replay, strategy_of


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = torch.nn.Linear(9, 13), torch.nn.Linear(13, 4)


def test_a_part_of_a_model_is_replayed_alone(tmp_path):
    model = Two().bfloat16()
    table = ParameterTable.from_module(model, include=["up.*"])
    es = EvolutionStrategy(table, sigma=0.02, alpha=0.02, population_size=6)
    journal = run(es, tmp_path / "j")
    again = Two().bfloat16()
    replayed = strategy_of(journal, again)
    replay(replayed, journal, verify=True)
    assert_tensors(dict(again.named_parameters()), dict(model.named_parameters()))
    with pytest.raises(DataError, match=r"no tensor 'up\.bias' \(2 of the journal's 2"):
        strategy_of(journal, torch.nn.Linear(2, 2))


def test_the_anchor_is_the_files_or_the_weights_as_they_were(tmp_path):
    """A bf16 run over a file in fp32 pulls to the file's fp32; one without a file to its own."""
    from safetensors.torch import save_file

    plain = Two()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    for from_file in (True, False):
        model = Two().bfloat16()
        table = ParameterTable.from_module(model)
        anchor = Anchor.from_safetensors(tmp_path, table) if from_file else None
        es = EvolutionStrategy(table, sigma=0.02, alpha=0.02, population_size=6, decay=DECAYS[2],
                               anchor=anchor)  # fmt: skip
        journal = run(es, tmp_path / f"{from_file}.esj")
        again = Two().bfloat16()
        replay(strategy_of(journal, again, tmp_path), journal, verify=True)
        assert_tensors(dict(again.named_parameters()), dict(model.named_parameters()))


def test_shards_of_a_tensor_are_a_run_of_the_whole(tmp_path):
    """Segments name canonical elements, so a journal of two halves is one of the tensor."""
    full = tensor_of(plain_bits("bfloat16", 60), "bfloat16", (6, 10))
    left, right, again = full[:, :4].clone(), full[:, 4:].clone(), {"w": full.clone()}
    table = ParameterTable(
        [Segment("w", (6, 10), left), Segment("w", (6, 10), right, start=(0, 4))]
    )
    es = EvolutionStrategy(table, sigma=0.02, alpha=0.02, population_size=6, seed=11)
    journal = run(es, tmp_path / "j")
    catch_up(strategy(again), journal)
    assert_tensors(again, {"w": torch.cat([left, right], dim=1)})

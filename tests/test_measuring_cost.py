"""What measuring cost stands apart from training: held-out prompts and prior tasks, in tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from number_engine import SIZE, NumberEngine, Targets, interrupt_at, make_trainer

from esfast.cost import Account
from esfast.engines.base import Completion
from esfast.html_report.account import _measuring_flops, _prior_unknown
from esfast.html_report.page import DASH
from esfast.prior import PriorScore, PriorSettings, PriorTasks
from esfast.prior.evaluation import PRIOR, OwnTask
from esfast.prior.harness import _shared, _TokenCount
from esfast.report import _measuring_line
from esfast.run_folder import read_json, read_lines

READ, WRITTEN = 3, 2  # tokens of every prompt and answer of the engine below
SETTINGS = PriorSettings(every=2, size=4, samples=2)


class Telling(NumberEngine):
    """Says how many tokens a prompt had."""

    def generate(self, prompts: Any, sampling: Any) -> list[Completion]:
        answers = super().generate(prompts, sampling)
        return [replace(a, tokens=WRITTEN, prompt_tokens=READ) for a in answers]


def priors(known: Any = ()) -> PriorTasks:
    return PriorTasks([OwnTask(name, Targets(), SETTINGS) for name in "ab"], SETTINGS, known)


def run(folder: Path, engine: Any, **settings: Any) -> dict[str, Any]:
    trainer = make_trainer(folder, engine, generations=4, **settings)
    trainer.prior = priors()
    trainer.run()
    return read_json(folder / "run" / "summary.json")


def test_prior_tasks_are_on_an_account_of_their_own(tmp_path: Path) -> None:
    """Two tasks at generations 0, 2 and 4: four prompts greedily, and twice sampled."""
    summary = run(tmp_path, Telling())
    answers = 2 * 3 * (4 + 2 * 4)
    prior = summary["cost"]["prior"]
    assert (prior["prompt"], prior["generated"]) == (READ * answers, WRITTEN * answers)
    assert prior["flops"] == 2 * SIZE * (READ + WRITTEN) * answers and prior["backward"] == 0
    lines = list(read_lines(tmp_path / "run" / PRIOR))
    assert sum(line["read_tokens"] for line in lines) == prior["prompt"]
    without = make_trainer(tmp_path / "without", Telling(), generations=4)
    without.run()
    cost = read_json(tmp_path / "without" / "run" / "summary.json")["cost"]
    assert cost["prior"]["flops"] == 0
    for part in ("training", "evaluation"):
        assert cost[part] == summary["cost"][part]
    said = _measuring_line(summary["cost"])
    assert f"prior tasks {READ * answers} prompt and {WRITTEN * answers} generated" in said
    assert "held-out" in said and "prior" not in _measuring_line(cost)


def test_a_resumed_run_counts_every_evaluation_once(tmp_path: Path) -> None:
    import test_resume

    def costs(name: str, engine: Any, goes_on: bool = False) -> dict[str, Any]:
        trainer = test_resume.trainer(tmp_path / name, 4, engine, goes_on)
        trainer.prior = priors()
        trainer.run()
        return read_json(tmp_path / name / "summary.json")["cost"]["prior"]

    whole = costs("whole", Telling())
    # held-out, two tasks greedily and sampled, warm-up; again two tasks after generation 2
    half = costs("run", Telling(interrupt_at(6 + 2 * 16 + 5 + 4)))
    assert 0 < half["prompt"] < whole["prompt"]
    assert costs("run", Telling(), goes_on=True) == whole


def test_what_another_run_measured_is_on_its_account() -> None:
    first = priors()
    first.evaluate(Telling(), 0)
    assert first.tokens() == (READ * 24, WRITTEN * 24)
    second = priors(first.scores)
    assert second.tokens() == (0, 0) and not second.due(0, 4)
    second.evaluate(Telling(), 2)
    assert second.tokens() == (READ * 24, WRITTEN * 24)


def test_an_engine_that_does_not_say_leaves_it_unknown() -> None:
    silent = priors()
    silent.evaluate(NumberEngine(), 0)
    assert silent.tokens() is None
    account = Account(100)
    account.read(account.training, 10, 5)
    account.read(account.evaluation, 4, 1)
    record = account.record(silent.tokens())
    assert record is not None and record["prior"] is None
    assert "prior tasks not known" in _measuring_line(record)
    assert _prior_unknown({"cost": record}) and not _prior_unknown({"cost": None})
    assert f"1,000 + {DASH}" in _measuring_flops(record)
    assert "1,000 + 200" in _measuring_flops(account.record((1, 0)) or {})


def test_files_of_an_earlier_esfast_are_read() -> None:
    """Their scores and summaries have no tokens of prior tasks, nor an account of them."""
    (one, _) = priors().evaluate(Telling(), 0)
    line = one.record()
    del line["read_tokens"], line["generated_tokens"]
    old = PriorScore.from_record(line)
    assert old.read_tokens is None and old.greedy == one.greedy
    kept = priors()
    kept.scores = [old]
    assert kept.tokens() is None
    earlier = {"training": {"flops": 9}, "evaluation": {"flops": 1000}}
    assert _prior_unknown({"cost": earlier}) and "1,000" in _measuring_flops(earlier)
    assert "1,000" not in _measuring_flops({})


def test_tokens_through_a_model_of_lm_eval_are_each_rows_own() -> None:
    """Padding left of a prompt and right of an end is none; nor is a continuation's last token."""

    def generate(context: torch.Tensor, **settings: Any) -> torch.Tensor:
        ends = torch.tensor([[7, 1, 0, 0], [7, 7, 7, 7]])  # 1 ends, 0 pads
        return torch.cat([context, ends], dim=1)

    model = SimpleNamespace(
        max_length=6,
        tokenizer=SimpleNamespace(eos_token_id=1, pad_token_id=0),
        _loglikelihood_tokens=lambda requests, **settings: ["ranked"] * len(requests),
        _model_generate=generate,
    )
    count = _TokenCount(model)
    requests = [(("", ""), [5, 5, 5], [6, 6]), (("", ""), [5] * 9, [6])]
    assert model._loglikelihood_tokens(requests) == ["ranked"] * 2
    assert (count.read, count.generated) == (4 + 6, 0)
    context = torch.tensor([[0, 5, 5], [5, 5, 5]])
    rows = model._model_generate(context=context, attention_mask=(context > 0).long(), stop=[])
    assert rows.shape == (2, 7)
    assert (count.read, count.generated) == (10 + 5, 2 + 4)
    assert _shared(7, 3) == [3, 2, 2]

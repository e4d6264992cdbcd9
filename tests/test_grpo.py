"""GRPO through TRL: the prompts and rewards are the task's, the account adds up, a run goes on."""

from __future__ import annotations

import io
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from esfast import ConfigError, EsfastError, StrategyConfig
from esfast.checkpoint import LoadedModel, save_model
from esfast.cost import Account, Tokens
from esfast.engines.base import Sampling
from esfast.grpo import CHECKPOINTS, GrpoConfig, GrpoRun
from esfast.interrupts import Interrupts
from esfast.progress import RunProgress
from esfast.run_folder import RunFolder, read_json, read_lines
from esfast.tasks import Example, Score, Task
from esfast.train import TrainConfig, Trainer

pytest.importorskip("trl")
pytest.importorskip("transformers")

import tiny_models
from transformers import AutoModelForCausalLM

from esfast.engines.transformers import TransformersEngine
from esfast.grpo_trl import newest_checkpoint

LETTERS = "aeiou"


class Vowels(Task):
    """The share of vowels; `broken` raises for the problems that it holds."""

    name = "vowels"
    max_new_tokens = 6
    failure_reward = -1.0

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken = broken

    def train_batch(self, seed: int, generation: int, count: int) -> list[Example]:
        return [Example(f"{n}", f"Say {seed}, {generation} and {n}.") for n in range(count)]

    def held_out(self, count: int) -> list[Example]:
        return [Example(f"held {n}", f"Tell me {n}.") for n in range(min(count, 4))]

    def score(self, example: Example, completion: str) -> Score:
        if example.id in self.broken:
            raise ValueError("no score today")
        return Score(sum(completion.count(letter) for letter in LETTERS) / 3 + len(completion) / 40)


def make_run(folder: Path, task: Task | None = None, done: int | None = None, **changes: Any):
    """A run of the tiny model; `done`: goes on after that generation."""
    settings: dict[str, Any] = {"generations": 2, "prompts": 3, "group_size": 4, "eval_every": 2,
                                "learning_rate": 1e-3, "seed": 5, "micro_batch": 6}  # fmt: skip
    task = task or Vowels()
    config = GrpoConfig(Sampling(task.max_new_tokens, temperature=1.0), **{**settings, **changes})
    model = tiny_models.llama()
    model.save_pretrained(folder.parent / "base")  # TRL reads the reference of the KL term there
    model.config._name_or_path = str(folder.parent / "base")
    loaded = LoadedModel(model, tiny_models.byte_tokenizer(), folder)
    made = {"made": {"esfast": "0", "commit": None, "noise_version": 1, "target": "t",
                     "started": "now", "command": "test"}}  # fmt: skip
    run = GrpoRun(
        TransformersEngine(loaded.model, loaded.tokenizer),
        task,
        config,
        RunFolder(folder, made, None if done is None else {}, done or 0),
        save_model=lambda path: save_model(loaded, path),
    )
    console = Console(file=io.StringIO(), width=200)
    run.progress = RunProgress(config.generations, 1, console)
    return run


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def seen(monkeypatch) -> dict[str, list[Any]]:
    """What TRL trained on: rows of (prompt ids, completion ids), texts and rewards."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    seen: dict[str, list[Any]] = {"rows": [], "texts": [], "rewards": []}
    loss, rewards = GRPOTrainer._compute_loss, GRPOTrainer._calculate_rewards

    def compute_loss(self, model, inputs):
        for kind in ("prompt", "completion"):
            ids, mask = inputs[f"{kind}_ids"], inputs[f"{kind}_mask"].bool()
            rows = [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
            seen["rows"].append((kind, rows))
        return loss(self, model, inputs)

    def calculate_rewards(self, inputs, prompts, completions, ids):
        values = rewards(self, inputs, prompts, completions, ids)
        seen["texts"].append(completions)
        seen["rewards"].append(values[:, 0].tolist())
        return values

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", calculate_rewards)
    return seen


def test_a_run_trains_on_the_tasks_prompts_and_rewards_and_accounts_for_them(tmp_path, seen):
    run = make_run(tmp_path / "run")
    result = run.run()
    config, task, folder = run.config, run.task, tmp_path / "run"
    batches = [task.train_batch(config.seed, g, config.prompts) for g in range(config.generations)]

    strategy = StrategyConfig(sigma=0.1, alpha=0.1, population_size=2, seed=config.seed)
    es = TrainConfig(strategy, config.sampling, generations=2, prompts=config.prompts)
    other = Trainer(run.engine, task, es, RunFolder(tmp_path / "es", {}), save_model=print)
    assert [run.batch(g) for g in range(2)] == [other.rollout.batch(g) for g in range(2)] == batches

    expected = [run.engine.token_ids([e.prompt for e in batch]) for batch in batches]
    trained = [rows for kind, rows in seen["rows"] if kind == "prompt"]
    by_generation = [trained[0] + trained[1], trained[2] + trained[3]]  # passes of six rows
    for rows, prompts in zip(by_generation, expected, strict=True):
        assert sorted(rows) == sorted(tuple(p) for p in prompts for _ in range(config.group_size))

    for texts, rewards, batch in zip(seen["texts"], seen["rewards"], batches, strict=True):
        repeated = [example for example in batch for _ in range(config.group_size)]
        scores = [task.safe_score(e, t).value for e, t in zip(repeated, texts, strict=True)]
        assert np.allclose(rewards, scores, atol=1e-6) and len(set(scores)) > 3

    rows = list(read_lines(folder / "metrics.jsonl"))
    assert [row["generation"] for row in rows] == [1, 2]
    assert rows[0]["reward_mean"] == pytest.approx(np.mean(seen["rewards"][0]), abs=1e-6)
    groups = np.reshape(seen["rewards"][1], (3, 4))
    assert rows[1]["reward_best"] == pytest.approx(groups.max(axis=1).mean(), abs=1e-6)
    assert rows[1]["reward_spread"] == pytest.approx(groups.std(axis=1).mean(), abs=1e-6)
    assert rows[0]["grpo"].keys() >= {"loss", "gradient_norm", "entropy"}

    read = config.group_size * sum(len(ids) for prompts in expected for ids in prompts)
    generated = sum(len(r) for kind, rows in seen["rows"] if kind == "completion" for r in rows)
    summary = read_json(folder / "summary.json")
    training = summary["cost"]["training"]
    parameters = sum(p.numel() for p in run.engine.model.parameters())
    assert summary["cost"]["parameters"] == parameters
    assert (training["prompt"], training["generated"]) == (read, generated)
    assert training["reread"] == training["backward"] == read + generated
    assert training["forward_flops"] == 2 * parameters * 2 * (read + generated)
    assert training["backward_flops"] == 4 * parameters * (read + generated)
    assert training["flops"] == 8 * parameters * (read + generated)
    assert rows[1]["cost"]["training"]["prompt"] == read
    held = 3 * sum(map(len, run.engine.token_ids([e.prompt for e in task.held_out(9)])))
    assert summary["cost"]["evaluation"]["prompt"] == held

    assert result.status == "finished" and summary["generations"] == 2
    assert summary["held_out_after"]["generation"] == 2 and summary["prior"] == []
    assert {"generation", "scoring", "optimisation", "evaluation"} <= summary["seconds"].keys()
    assert summary["peak_bytes"] >= summary["inference_peak_bytes"] > 0
    assert len(read_json(folder / "samples.json", list)) == 4
    tuned, stored = weights_in(folder), run.engine.model.state_dict()
    assert not same(tuned, tiny_models.llama().state_dict())
    assert same({name: w.bfloat16().float() for name, w in tuned.items()}, stored)
    assert summary["held_out_as_bfloat16"]["generation"] == 2


def test_passes_that_no_default_makes_are_counted():
    tokens = Tokens(prompt=10, generated=5, reread=30, backward=15)
    assert tokens.flops(100) == (2 * 100 * 45, 4 * 100 * 15)
    account = Account(100)
    account.read(account.training, 10, 5)
    line = {"cost": account.counts()}
    other = Account(100)
    other.go_on([{"cost": None}, line])
    assert other.training == account.training and other.record() == account.record()
    other.go_on([line, {"generation": 2}])
    assert other.record() is None and other.counts() is None
    account.read(account.training, 0, 5)  # an engine that does not say what it read
    assert account.record() is None


def test_iterations_and_kl_cost_their_passes(tmp_path):
    run = make_run(tmp_path / "run", generations=1, iterations=2, beta=0.1)
    assert run.run().status == "finished"
    training = read_json(tmp_path / "run" / "summary.json")["cost"]["training"]
    whole = training["prompt"] + training["generated"]
    assert training["backward"] == 2 * whole
    assert training["reread"] == 4 * whole  # two with gradients, old policy, reference
    row = next(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert row["grpo"]["kl_to_start"] >= 0 and row["generation"] == 1


def test_the_reference_of_the_kl_term_is_the_model_at_the_start(tmp_path):
    run = make_run(tmp_path / "run", generations=1, beta=0.1, learning_rate=0.0, iterations=2)
    run.run()
    row = next(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert row["grpo"]["kl_to_start"] == pytest.approx(0, abs=1e-6)


def test_a_learning_rate_of_zero_leaves_every_bit(tmp_path):
    run = make_run(tmp_path / "run", generations=1, learning_rate=0.0)
    run.run()
    assert same(weights_in(tmp_path / "run"), tiny_models.llama().state_dict())


def test_a_run_that_diverges_says_so_and_saves_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    object.__setattr__(run.config, "learning_rate", 1e30)
    with pytest.raises(EsfastError, match="Lower --learning-rate"):
        run.run()
    assert not (tmp_path / "run" / "model").exists()
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "failed"


def test_nothing_is_told_to_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    told: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: told.append("told"))
    monkeypatch.delenv("CI", raising=False)
    make_run(tmp_path / "run", generations=1, learning_rate=0.0).run()
    assert told == [] and constants.HF_HUB_DISABLE_TELEMETRY is False


def test_a_reward_that_raises_costs_its_example_only(tmp_path, seen):
    result = make_run(tmp_path / "run", Vowels(broken=("1",)), generations=1).run()
    assert result.status == "finished" and result.failed_rewards == 4
    rewards = np.reshape(seen["rewards"][0], (3, 4))
    assert (rewards[1] == Vowels.failure_reward).all() and (rewards[[0, 2]] >= 0).all()
    assert next(read_lines(tmp_path / "run" / "metrics.jsonl"))["failed_rewards"] == 4


def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path):
    make_run(tmp_path / "whole", generations=3).run()
    make_run(tmp_path / "run", generations=2, checkpoint_every=1).run()
    checkpoints = tmp_path / "run" / CHECKPOINTS
    (checkpoints / "checkpoint-2" / "esfast.json").unlink()  # killed before all was on the disk
    done, newest = newest_checkpoint(checkpoints)
    assert done == 1 and newest.name == "checkpoint-1"
    (checkpoints / "checkpoint-2" / "esfast.json").write_text('{"generation": 2}')
    assert newest_checkpoint(checkpoints)[0] == 2
    for name in ("model.safetensors", "optimizer.pt"):  # or its end was lost since
        file = checkpoints / "checkpoint-2" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        assert newest_checkpoint(checkpoints)[0] == 1
        file.write_bytes(whole)
    run = make_run(tmp_path / "run", generations=3, checkpoint_every=1, done=done)
    assert run.run(newest).generations == 3
    assert same(weights_in(tmp_path / "run"), weights_in(tmp_path / "whole"))
    rows = [list(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("run", "whole")]
    for there, expected in zip(*rows, strict=True):
        assert there["reward_mean"] == expected["reward_mean"]
        assert there["cost"]["training"] == expected["cost"]["training"]


def test_ctrl_c_leaves_the_last_whole_generation(tmp_path):
    class Impatient(Vowels):
        def score(self, example, completion):
            if "5, 1 and 2" in example.prompt:
                signal.raise_signal(signal.SIGINT)
            return super().score(example, completion)

    handler = signal.getsignal(signal.SIGINT)
    result = make_run(tmp_path / "run", Impatient(), generations=3).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert result.status == "interrupted" and result.generations == 1
    make_run(tmp_path / "one", generations=1).run()
    assert same(weights_in(tmp_path / "run"), weights_in(tmp_path / "one"))
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "interrupted"


def test_ctrl_c_in_the_last_score_keeps_the_summary(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", generations=1)
    monkeypatch.setattr(run, "_as_stored", lambda: signal.raise_signal(signal.SIGINT))
    result = run.run()
    assert (result.status, result.generations) == ("interrupted", 1) and result.after is not None
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["held_out_after"]["generation"] == 1 and summary["held_out_as_bfloat16"] is None
    assert (tmp_path / "run" / "model").exists()


def test_ctrl_c_waits_while_the_weights_are_moved():
    with Interrupts() as interrupts:
        interrupts.moving = True
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.rest()
        assert not interrupts.moving
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with Interrupts(moving=True) as interrupts:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.moving


def test_a_second_ctrl_c_does_not_wait_and_saves_no_torn_model(tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def impatient(self, *arguments, **named):
        if len(self.state):  # from the second step on
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", impatient)
    result = make_run(tmp_path / "run", generations=3).run()
    assert (result.status, result.generations) == ("interrupted", 1)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 1}, "judged by the others"),
        ({"generations": 0}, "generations is 0"),
        ({"sampling": Sampling(4)}, "temperature is 0"),
        ({"generations": 2.5}, "generations is 2.5"),
        ({"generations": 10**9}, "generations \\* prompts is"),
        ({"group_size": 10**9}, "prompts \\* group_size is"),
        ({"eval_size": 0}, "eval_size is 0"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": 1e308}, "learning_rate is 1e[+]308; expected 0 to 1"),
        ({"learning_rate": -1e-5}, "learning_rate is -1e-05"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": "1e-5"}, "learning_rate is '1e-5'"),
        ({"beta": 1e308}, "beta is 1e[+]308"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"epsilon": 2.0}, "epsilon is 2.0; expected more than 0 and less than 1"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'; expected float32 or bfloat16"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        GrpoConfig(**{"sampling": Sampling(4, temperature=1.0), **changes})


def test_rows_of_a_pass_divide_the_completions():
    config = GrpoConfig(Sampling(4, temperature=1.0), prompts=5, group_size=6, micro_batch=16)
    assert config.rows == 15 and config.completions % config.rows == 0
    assert replace(config, micro_batch=2**31 - 1).rows == 30


def test_settings_at_their_ends_are_taken():
    ends = {"learning_rate": 1, "beta": 1000, "epsilon": 0.999, "seed": 2**64 - 1}
    config = GrpoConfig(Sampling(4, temperature=1e3), group_size=np.int64(2), **ends)
    assert (config.learning_rate, config.beta, type(config.group_size)) == (1.0, 1000.0, int)


class Counting(TransformersEngine):
    generated = 0

    def generate(self, prompts, sampling):
        completions = super().generate(prompts, sampling)
        self.generated += sum(len(completion.ids) for completion in completions)
        return completions


def test_es_keeps_the_same_account(tmp_path):
    strategy = StrategyConfig(sigma=0.01, alpha=0.01, population_size=4, seed=5)
    config = TrainConfig(strategy, Sampling(6), generations=2, prompts=3, eval_every=2)
    task = Vowels()
    model = tiny_models.llama()
    engine = Counting(model, tiny_models.byte_tokenizer())
    trainer = Trainer(
        engine, task, config, RunFolder(tmp_path / "run", {}), save_model=lambda path: None
    )
    trainer.progress = RunProgress(2, 4, Console(file=io.StringIO()))
    trainer.run()
    cost = read_json(tmp_path / "run" / "summary.json")["cost"]
    prompts = [example.prompt for g in range(2) for example in task.train_batch(5, g, 3)]
    training = cost["training"]
    assert training["prompt"] == 4 * sum(map(len, engine.token_ids(prompts)))
    assert training["backward"] == training["reread"] == training["backward_flops"] == 0
    tokens = training["prompt"] + training["generated"]
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())
    assert training["flops"] == 2 * cost["parameters"] * tokens
    warm_up = engine.generated - training["generated"] - cost["evaluation"]["generated"]
    assert 0 < warm_up <= 3 * 6
    seconds = read_json(tmp_path / "run" / "summary.json")["seconds"]
    assert seconds["evaluation"] > 0 and math.isfinite(seconds["generation"])

"""A prompt too long for the model is refused by name before a run has a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run

from esfast import ConfigError
from esfast.engines.base import Bounded, Sampling
from esfast.engines.prompts import first_words, require_length
from esfast.prior import PriorSettings, PriorTasks
from esfast.prior.evaluation import OwnTask
from esfast.prompt_room import LOOKED_AT, Dealt, require_prompts_fit
from esfast.rollout import TrainConfig
from esfast.strategy import StrategyConfig
from esfast.tasks import Example
from esfast.tasks.base import PoolTask, Score

CONTEXT, AROUND = 100, 10


class Bytes:
    """Knows lengths alone: a token a byte of the text, and some around it."""

    def __init__(self, context: int | None = CONTEXT) -> None:
        self.context = context
        self.asked: list[str] = []

    def require_room(self, prompts, max_new_tokens, kind="prompt"):
        self.asked.append(kind)
        lengths = [len(prompt) + AROUND for prompt in prompts]
        return require_length(prompts, lengths, max_new_tokens, self.context, kind)


class Says(PoolTask):
    name = "says"

    def __init__(self, train: list[str], held_out: list[str]) -> None:
        super().__init__(*([Example(text, text) for text in part] for part in (train, held_out)))

    def score(self, example: Example, completion: str) -> Score:
        return Score(0.0)


def dealt(**changes: object) -> Dealt:
    settings = {"generations": 4, "prompts": 2, **changes}
    return Dealt(TrainConfig(StrategyConfig(), Sampling(5), **settings), seed=0)


SHORT = [f"say {n}" for n in range(8)]
NO_PRIOR = PriorTasks((), PriorSettings())


def test_every_training_prompt_of_the_run_is_looked_at():
    long = "count to " + "9" * 90
    order = [example.id for n in range(4) for example in Says([*SHORT[1:], long], ["held"])
             .train_batch(0, n, 2)]  # fmt: skip
    generation, place = divmod(order.index(long), 2)
    engine = Bytes()
    said = f"training prompt {place} .'count to 9+[.]+'. has 109 tokens; .* needs 114, .* holds 100"
    with pytest.raises(ConfigError, match=said) as refused:
        require_prompts_fit(engine, Says([*SHORT[1:], long], ["held"]), dealt(), NO_PRIOR)
    assert generation and str(refused.value).startswith(f"generation {generation + 1}: ")
    require_prompts_fit(
        engine, Says([*SHORT[1:], long], ["held"]), dealt(generations=generation), NO_PRIOR
    )
    require_prompts_fit(
        engine, Says([*SHORT[1:], long], ["held"]), dealt(fixed_prompts=True), NO_PRIOR
    )
    longest = "x" * (CONTEXT - AROUND - 5)
    require_prompts_fit(
        engine, Says([*SHORT, longest], ["y" * len(longest)]), dealt(generations=9), NO_PRIOR
    )


def test_a_long_run_is_looked_at_in_part():
    batches = dealt(generations=2**31 - 1, prompts=100).batches(Says(SHORT, ["held"]))
    assert sum(map(len, batches)) == LOOKED_AT
    assert sum(1 for _ in dealt(prompts=2 * LOOKED_AT).batches(Says(SHORT, ["held"]))) == 1


def test_held_out_prompts_and_those_of_prior_tasks_are_looked_at():
    task, long = Says(SHORT, ["held", "out"]), "z" * 95
    with pytest.raises(ConfigError, match=r"^held-out prompt \d .'z{47}[.]+'"):
        require_prompts_fit(Bytes(), Says(SHORT, ["held", long]), dealt(), NO_PRIOR)
    settings = PriorSettings()
    prior = PriorTasks([OwnTask("old", Says(SHORT, [long]), settings, 3)], settings)
    with pytest.raises(ConfigError, match=r"^prompt of prior task old, number 0 .*=3 it needs 108"):
        require_prompts_fit(Bytes(), task, dealt(), prior)
    unbounded = Bytes(None)
    require_prompts_fit(unbounded, task, dealt(), NO_PRIOR)
    assert unbounded.asked == ["held-out prompt", "training prompt"]
    engine = Bytes()
    require_prompts_fit(engine, task, dealt(generations=9), NO_PRIOR)
    assert len(engine.asked) == 2  # what is surely short enough is not counted
    require_prompts_fit(object(), task, dealt(), prior)  # type: ignore[arg-type]


def test_first_words_are_one_short_line():
    assert first_words(" a\nb \t c ") == "a b c"
    assert first_words("x" * 51) == "x" * 47 + "..." and first_words("x" * 50) == "x" * 50
    assert (
        first_words([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "u"
    )


REWARD = "def length(example, completion):\n    return len(completion) / 9\n"


@pytest.fixture
def flags(tmp_path, monkeypatch, tiny_model) -> list[str]:
    """Flags of a task with one prompt of 600 bytes; the model's context holds 512 tokens."""
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARD)
    texts = [*(f"Say {n}." for n in range(20)), "Once upon a time " * 36]
    Path("rows.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    return ["--model", str(tiny_model), "--max-new-tokens", "4", "--prompts", "3",
            "--no-plots", "--output", "run"]  # fmt: skip


TASK = ("--reward", "rewards:length", "--data", "rows.jsonl", "--eval-size", "4")
COMMANDS = {
    "train": ("train", "--generations", "20", *TASK),
    "grpo": ("grpo", "--generations", "20", *TASK),
    "continual": ("continual", "--generations", "20", "--tasks", "rows.jsonl@rewards:length"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_with_a_prompt_too_long_leaves_no_folder(command, flags, capsys):
    if command == "grpo":
        pytest.importorskip("trl")
    before = sorted(Path().iterdir())
    assert run(*COMMANDS[command], *flags) == 2
    err = capsys.readouterr().err
    assert "'Once upon a time Once" in err and "6" in err.split(" tokens")[0]
    assert "context holds 512" in err and "--max-new-tokens" in err and len(err.splitlines()) == 1
    assert sorted(Path().iterdir()) == before


def test_the_engine_can_tell(tiny_model):
    from esfast.engines.transformers import TransformersEngine
    from esfast.models import load_model

    loaded = load_model(tiny_model)
    engine = TransformersEngine(loaded.model, loaded.tokenizer)
    assert isinstance(engine, Bounded)
    tokens = len(engine.token_ids(["abc"])[0])
    assert engine.require_room(["abc", "a"], 12) == 512 - 12 - tokens

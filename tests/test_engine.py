"""TransformersEngine gives the tokens of transformers' own generate, in order, again and again.

All equalities are of token sequences in float32 on tiny random models (tiny_models.py); the `model`
tests repeat the chief ones with SmolLM2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import byte_tokenizer, gpt2, llama, mistral

from esfast.engines import Completion, Engine, Prompt, Sampling
from esfast.engines.transformers import TransformersEngine
from esfast.errors import ConfigError, DataError, EsfastError, StateError

WORDS = ["sun", "a", "the river is", "x" * 40, "12 + 7", "why?", "tell me about ice", "", "end"]
PROMPTS: list[Prompt] = [f"Say something about {word}" for word in WORDS]
MODELS = {"llama": llama, "mistral": mistral, "gpt2": gpt2}


def generated(model: Any, tokenizer: Any, prompt: Prompt, new: int) -> tuple[list[int], int]:
    """The tokens that transformers generates for one prompt, greedily; the prompt's length."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=new, do_sample=False)
    length = ids["input_ids"].shape[1]
    return out[0, length:].tolist(), length


def expected(model: Any, tokenizer: Any, prompts: list[Prompt], new: int) -> list[Completion]:
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    completions = []
    for prompt in prompts:
        tokens, read = generated(model, tokenizer, prompt, new)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        finished = tokens[-1] in ends
        completions.append(Completion(text, len(tokens), finished, tuple(tokens), read))
    return completions


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama for which every ninth token ends an answer: rows end at different steps."""
    made = llama()
    made.generation_config.eos_token_id = [2, *range(3, 259, 9)]
    return made


class TestGreedy:
    @pytest.mark.parametrize("share", [True, False], ids=["prefix", "plain"])
    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    @pytest.mark.parametrize("name", MODELS)
    def test_equals_generate(self, tokenizer: Any, name: str, batch_size: int, share: bool) -> None:
        model = MODELS[name]()
        model.generation_config.eos_token_id = [2, *range(3, 259, 9)]
        engine = TransformersEngine(model, tokenizer, batch_size=batch_size, share_prefix=share)
        got = engine.generate(PROMPTS, Sampling(24))
        assert got == expected(model, tokenizer, PROMPTS, 24)
        lengths = {completion.tokens for completion in got}
        assert len(lengths) > 3, "rows should end at different steps for this test to mean anything"

    def test_the_prefix_is_shared_where_it_may_be(self, tokenizer: Any) -> None:
        for name, make in MODELS.items():
            engine = TransformersEngine(make(), tokenizer)
            shared = engine._plan(PROMPTS).prefix.shape[1]
            common = len(tokenizer("<begin>user\nSay something about ")["input_ids"])
            assert shared == (0 if name == "mistral" else common), name

    def test_long_answers_outgrow_the_first_room(self, tokenizer: Any) -> None:
        never = llama(seed=3)
        never.generation_config.eos_token_id = 2
        engine = TransformersEngine(never, tokenizer)
        got = engine.generate(PROMPTS[:3], Sampling(150))
        assert got == expected(never, tokenizer, PROMPTS[:3], 150)
        assert max(completion.tokens for completion in got) == 150

    def test_conversations_and_a_system_prompt(self, model: Any, tokenizer: Any) -> None:
        chat = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "bye"},
        ]
        system = {"role": "system", "content": "Be brief."}
        own = [{"role": "system", "content": "Be long."}, *chat]
        engine = TransformersEngine(model, tokenizer, system_prompt="Be brief.")
        plain: list[Prompt] = [
            [system, *chat], own, [system, {"role": "user", "content": "hello"}]
        ]  # fmt: skip
        assert engine.generate([chat, own, "hello"], Sampling(9)) == expected(
            model, tokenizer, plain, 9
        )

    def test_the_default_device_of_others_is_not_asked(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer)
        for sampling in (Sampling(12), Sampling(12, temperature=1.0, top_p=0.9)):
            with torch.device("meta"):  # as torch.set_default_device("cuda") beside a CPU's model
                got = engine.generate(PROMPTS, sampling)
            engine._plans.clear()
            assert got == engine.generate(PROMPTS, sampling)

    def test_one_prompt_and_no_prompt(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer)
        assert engine.generate([], Sampling(5)) == []
        assert engine.generate(PROMPTS[:1], Sampling(1))[0].tokens == 1


class TestRepeats:
    def test_nothing_before_a_call_changes_it(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer, batch_size=4)
        first = engine.generate(PROMPTS, Sampling(12))
        for count in range(1, 12):
            engine.generate([f"another {at}" for at in range(count)], Sampling(count))
        assert engine.generate(PROMPTS, Sampling(12)) == first
        assert len(engine._plans) <= 8

    def test_an_edit_in_place_reaches_the_answers(self, tokenizer: Any) -> None:
        """Also the prefix's: it must not come from before the edit."""
        model = llama(seed=5)
        engine = TransformersEngine(model, tokenizer)
        before = engine.generate(PROMPTS, Sampling(12))
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        engine.weights_changed()
        changed = engine.generate(PROMPTS, Sampling(12))
        assert changed != before
        assert changed == expected(model, tokenizer, PROMPTS, 12)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
        assert engine.generate(PROMPTS, Sampling(12)) == before

    def test_the_model_is_left_as_it_was(self, tokenizer: Any) -> None:
        model = gpt2().train()  # drops a tenth of its embeddings, unless told not to
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine = TransformersEngine(model, tokenizer)
        first = engine.generate(PROMPTS, Sampling(6))
        assert engine.generate(PROMPTS, Sampling(6)) == first, "dropout was on"
        assert model.training and model.config._attn_implementation == "sdpa"
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) and parameter.requires_grad
            assert not parameter.is_inference()

    @pytest.mark.parametrize(
        ("said", "told"), [("no room\nfor this", r"\(no room\)"), ("", r"\(OutOfMemoryError\)")]
    )
    def test_the_model_is_left_as_it_was_after_an_error(
        self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, said: str, told: str
    ) -> None:
        model = llama().train()
        engine = TransformersEngine(model, tokenizer)

        def fail(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError(said)

        monkeypatch.setattr(model, "forward", fail)
        with pytest.raises(EsfastError, match=told + ". Lower batch_size"):
            engine.generate(PROMPTS, Sampling(6))
        assert model.training and model.config._attn_implementation == "sdpa"


class TestSampled:
    def test_decided_by_seed_and_place(self, model: Any, tokenizer: Any) -> None:
        """Not by the batch, nor by the prompts beside it."""
        sampling = Sampling(16, temperature=1.0, top_p=0.9, seed=7)
        engine = TransformersEngine(model, tokenizer)
        first = engine.generate(PROMPTS, sampling)
        assert engine.generate(PROMPTS, sampling) == first
        small = TransformersEngine(model, tokenizer, batch_size=2, share_prefix=False)
        assert small.generate(PROMPTS, sampling) == first
        assert engine.generate(PROMPTS[:4], sampling) == first[:4]
        longer = engine.generate(PROMPTS, Sampling(30, temperature=1.0, top_p=0.9, seed=7))
        assert all(a.text.startswith(b.text) for a, b in zip(longer, first, strict=True))

    def test_another_seed_another_answer(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer)
        answers = [
            engine.generate(PROMPTS, Sampling(8, temperature=1.0, seed=seed)) for seed in range(3)
        ]
        assert answers[0] != answers[1] != answers[2] != answers[0]

    def test_equal_prompts_get_different_answers(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer)
        same = engine.generate(["hello"] * 8, Sampling(8, temperature=2.0))
        assert len({completion.text for completion in same}) > 4

    def test_cold_is_greedy(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer)
        cold = engine.generate(PROMPTS, Sampling(12, temperature=1e-4))
        assert cold == engine.generate(PROMPTS, Sampling(12))


class TestStop:
    def test_ends_before_the_text(self, tokenizer: Any) -> None:
        model = llama(seed=3)
        engine = TransformersEngine(model, tokenizer)
        whole = engine.generate(PROMPTS, Sampling(40))
        stop = next(c.text[5:7] for c in whole if len(c.text) > 20 and c.text[5:7].isascii())
        cut = engine.generate(PROMPTS, Sampling(40, stop=(stop, "never there")))
        for short, long in zip(cut, whole, strict=True):
            assert short.text == long.text.split(stop)[0]
            assert short.finished == (stop in long.text or long.finished)
            assert (short.tokens < long.tokens) == (stop in long.text[:-2])
        assert any(short != long for short, long in zip(cut, whole, strict=True))

    def test_a_special_token_ends_an_answer_though_no_text_shows_it(self, tokenizer: Any) -> None:
        model = llama(seed=3)
        ids = TransformersEngine(model, tokenizer).generate(PROMPTS, Sampling(12))[0].ids
        rows = model.get_output_embeddings().weight.data
        rows[[tokenizer.bos_token_id, ids[5]]] = rows[[ids[5], tokenizer.bos_token_id]]
        engine = TransformersEngine(model, tokenizer)
        assert len(engine.generate(PROMPTS, Sampling(12))[0].ids) > ids.index(ids[5]) + 1
        short = engine.generate(PROMPTS, Sampling(12, stop=(tokenizer.bos_token,)))[0]
        assert short.finished and short.ids == (*ids[: ids.index(ids[5])], tokenizer.bos_token_id)


class TestPlainText:
    """A model without a chat template."""

    def text_of(self, engine: TransformersEngine, prompt: Prompt) -> str:
        plan = engine._plan([prompt])
        return engine.tokenizer.decode(plan.batches[0].ids[0])

    def test_formats(self, model: Any) -> None:
        bare = TransformersEngine(model, byte_tokenizer(chat=False))
        system = TransformersEngine(model, byte_tokenizer(chat=False), system_prompt="Be brief.")
        assert self.text_of(bare, "once upon") == "once upon"
        assert self.text_of(bare, [{"role": "user", "content": "hi"}]) == "User: hi\n\nAssistant:"
        assert self.text_of(system, "hi") == "System: Be brief.\n\nUser: hi\n\nAssistant:"

    def test_chat_can_be_turned_off(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer, chat=False)
        assert self.text_of(engine, "once upon") == "once upon"

    def test_chat_cannot_be_turned_on(self, model: Any) -> None:
        with pytest.raises(ConfigError, match="no chat template"):
            TransformersEngine(model, byte_tokenizer(chat=False), chat=True)


class TestErrors:
    def test_too_long(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer)
        with pytest.raises(
            ConfigError, match=r"prompt 1 \('(long)+lon\.\.\.'\) has 6\d\d .*holds 512"
        ):
            engine.generate(["short", "long" * 150], Sampling(5))
        engine.generate(["a" * 400], Sampling(5))
        with pytest.raises(ConfigError, match="max_new_tokens=500"):
            engine.generate(["a" * 400], Sampling(500))

    @pytest.mark.parametrize(
        "bad", [7, [], [{}], [{"role": "user"}], [{"role": "user", "content": None}], None, ["hi"]]
    )
    def test_what_is_no_prompt(self, model: Any, tokenizer: Any, bad: Any) -> None:
        with pytest.raises(DataError, match="prompt 1 is"):
            TransformersEngine(model, tokenizer).generate(["good", bad], Sampling(5))

    def test_a_text_instead_of_a_list(self, model: Any, tokenizer: Any) -> None:
        with pytest.raises(DataError, match="list of prompts"):
            TransformersEngine(model, tokenizer).generate("hello", Sampling(5))

    def test_a_prompt_of_no_tokens(self, model: Any) -> None:
        with pytest.raises(DataError, match="prompt 1 has no tokens"):
            TransformersEngine(model, byte_tokenizer(False)).generate(["a", ""], Sampling(5))

    def test_a_template_that_refuses(self, model: Any) -> None:
        picky = byte_tokenizer()
        picky.chat_template = "{{ raise_exception('System role not supported') }}"
        with pytest.raises(DataError, match="System role not supported"):
            TransformersEngine(model, picky).generate(["a"], Sampling(5))

    def test_closed(self, model: Any, tokenizer: Any) -> None:
        engine = TransformersEngine(model, tokenizer)
        engine.close()
        engine.close()
        with pytest.raises(StateError, match="closed"):
            engine.generate(PROMPTS, Sampling(5))

    def test_what_is_no_language_model(self, tokenizer: Any) -> None:
        with pytest.raises(ConfigError, match="is a Linear"):
            TransformersEngine(torch.nn.Linear(2, 2), tokenizer)
        with pytest.raises(ConfigError, match="tokenizer is a NoneType"):
            TransformersEngine(llama(), None)
        with pytest.raises(ConfigError, match="batch_size is 0"):
            TransformersEngine(llama(), tokenizer, batch_size=0)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -1}, "temperature"),
         ({"temperature": float("nan")}, "temperature"), ({"temperature": "1"}, "temperature"),
         ({"temperature": 1e308}, "temperature is 1e[+]308; expected 0 .greedy., or 1e-06 to 1000"),
         ({"temperature": 1e-45}, "temperature is 1e-45"), ({"max_new_tokens": 2.5}, "2.5"),
         ({"max_new_tokens": 2**31}, "at most 2147483647"), ({"top_p": 0}, "top_p"),
         ({"top_p": 1.5}, "top_p"), ({"stop": "text"}, "tuple"), ({"stop": ("",)}, "non-empty"),
         ({"stop": (3,)}, "non-empty"), ({"stop": None}, "tuple"), ({"seed": 1.5}, "seed is 1.5"),
         ({"seed": None}, "seed is None"), ({"seed": "1"}, "seed is '1'")],
    )  # fmt: skip
    def test_sampling(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            Sampling(**{"max_new_tokens": 5, **changes})

    def test_a_seed_may_be_numpys(self) -> None:
        assert type(Sampling(5, seed=np.int64(3)).seed) is int  # type: ignore[arg-type]


def test_it_is_an_engine(model: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(model, tokenizer)
    assert isinstance(engine, Engine)
    table = engine.table()
    assert table is engine.table()
    assert set(table.names) == set(dict(model.named_parameters()))


def test_the_output_matrix_gets_its_input_in_one_piece(tokenizer: Any, monkeypatch: Any) -> None:
    """Over frozen weights a strided input makes torch repeat the matrix once a row."""
    frozen = llama().requires_grad_(False)
    head = frozen.get_output_embeddings()
    whole, forward = [], head.forward
    monkeypatch.setattr(head, "forward", lambda x: (whole.append(x.is_contiguous()), forward(x))[1])
    TransformersEngine(frozen, tokenizer).generate(PROMPTS, Sampling(3))
    assert whole and all(whole)
    assert not head._forward_pre_hooks


GROWTH = """
import os, sys
from pathlib import Path
import torch
from esfast.resources import proc_bytes

if sys.argv[1:]:
    sys.path.insert(0, sys.argv[1])
    from tiny_models import byte_tokenizer, llama
    from esfast.engines.transformers import TransformersEngine
    TransformersEngine(llama(), byte_tokenizer())
print(os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
status = Path("/proc/self/status")
weight = torch.randn(576, 576).bfloat16()
before = 0
for rows in range(1, 257):
    torch.nn.functional.linear(torch.randn(rows, 576).bfloat16(), weight)
    before = before or proc_bytes(status, "RssAnon")
print(proc_bytes(status, "RssAnon") - before)
"""


def growing(*engine_of: str, **environment: str) -> subprocess.Popen[str]:
    """Prints the caches' capacities, and the bytes that products of 256 shapes leave."""
    kept = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    kept["OMP_NUM_THREADS"] = "1"  # two such processes would spin for each other's cores
    command = [sys.executable, "-c", GROWTH, *engine_of]
    return subprocess.Popen(command, env=kept | environment, stdout=subprocess.PIPE, text=True)


def grown(process: subprocess.Popen[str]) -> tuple[str, int]:
    output, _ = process.communicate(timeout=600)
    capacities, growth = output.splitlines()
    return capacities, int(growth)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_products_of_many_shapes_do_not_pile_up() -> None:
    processes = (
        growing(str(Path(__file__).parent)),
        growing(LRU_CACHE_CAPACITY="1024", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1000"),
    )
    (capacities, growth), (_, piled) = map(grown, processes)
    assert capacities == "32 32"
    if piled < 40e6:
        pytest.skip("torch compiles nothing for these products here")
    assert growth < piled / 3, (growth, piled)


def test_capacities_of_the_users_stay(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1024")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    TransformersEngine(model, tokenizer)
    assert os.environ["LRU_CACHE_CAPACITY"] == "1024"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32"

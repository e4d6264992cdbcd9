"""What `esfast report` says would add what is missing: the commands run, where they are told to."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from report_page import words_of
from report_runs import run_folder, write

from esfast.cli import build_parser, main
from esfast.html_report.change import forgetting_command
from esfast.html_report.run_data import read_run
from esfast.run_folder import require_free

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize("method", ["es", "grpo"])
def test_a_further_diagnosis_goes_beside_the_one_that_is_there(tmp_path: Path, method: str) -> None:
    run = run_folder(tmp_path / "run", method=method)
    file = run / "forgetting" / "forgetting.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    found["subjects"][0]["kl"], found["equal_norm"] = [], None
    write(file, found)
    words = words_of(run)
    quoted = re.escape(shlex.quote(str(run / "forgetting-2")))
    said = re.findall(
        rf"(esfast forgetting .*?) && esfast report \.\.\. --forgetting {quoted}", words
    )
    assert len(said) == 2  # KL, equal norm
    for command in said:
        arguments = shlex.split(command)
        assert arguments[:3] == ["esfast", "forgetting", str(run)]
        folder = Path(arguments[arguments.index("--output") + 1])
        assert folder == run / "forgetting-2"
        require_free(folder)
        build_parser().parse_args(arguments[1:])


def test_a_second_one_goes_beside_both(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    write(run / "forgetting-2" / "forgetting.json", {})
    output = f"--output {shlex.quote(str(run / 'forgetting-3'))} "
    assert output in forgetting_command(read_run(run, "run"))


def test_a_diagnosis_that_another_takes_the_place_of_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run")
    own = run / "forgetting"
    found = json.loads((own / "forgetting.json").read_text(encoding="utf-8"))
    flags = []
    for name in ("forgetting-2", "forgetting-3"):
        found["subjects"][0]["name"] = name
        write(run / name / "forgetting.json", found)
        flags += ["--forgetting", str(run / name)]
    report = ["report", str(run), "-o", str(tmp_path / "report.html")]
    assert main([*report, "--forgetting", str(own)]) == 0
    assert "not in the report" not in capsys.readouterr().out
    assert main([*report, *flags]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "not in the report" in line]
    assert [line.partition(":")[0] for line in told] == [
        str(own / "forgetting.json"), str(run / "forgetting-2")]  # fmt: skip


def test_a_report_replaces_reports_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run")
    config = (run / "config.json").read_bytes()
    assert main(["report", str(run), "-o", str(run / "config.json")]) == 2
    assert "is there already and no report" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == config
    (tmp_path / "report.html").touch()
    for _ in range(2):
        assert main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize("spelled", ["--output compared", "--out=./compared"])
def test_a_grpo_run_is_known_wherever_the_report_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    """Its source is relative to the folder that the diagnosis was made in, as its --output is."""
    run = run_folder(tmp_path / "study" / "runs" / "grpo", method="grpo")
    found = json.loads((run / "forgetting" / "forgetting.json").read_text(encoding="utf-8"))
    shutil.rmtree(run / "forgetting")
    found["subjects"][0]["source"] = "runs/grpo/model"
    found["made"] = {"command": f"esfast forgetting runs/grpo/model --base tiny {spelled} --at 3"}
    write(tmp_path / "study" / "compared" / "forgetting.json", found)
    elsewhere = tmp_path / "elsewhere"
    run_folder(elsewhere / "runs" / "grpo", method="grpo")  # of the same path, and not the one
    monkeypatch.chdir(elsewhere)
    shutil.rmtree(elsewhere / "runs" / "grpo" / "forgetting")
    told = ("--forgetting", "../study/compared")
    assert "measured norms" not in words_of(Path("../study/runs/grpo"), flags=told)
    assert "grpo: measured norms" in words_of(Path("runs/grpo"), flags=told)

"""`esfast report`: what is in the file, what is left out, and that nothing from outside gets in."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from report_page import Page
from report_runs import (
    DONE,
    MEMBERS,
    config,
    diagnosis,
    held_out,
    run_folder,
    weights,
    write,
    write_lines,
)

from esfast import AnchoredDecay, cli
from esfast.continual import plan, results
from esfast.html_report.drawing import DARK, LIGHT
from esfast.html_report.page import flat, large, number, percent, score, seconds, table, text
from esfast.html_report.report_data import student
from esfast.html_report.sequence import _label
from esfast.journal import read_journal
from esfast.prior.scores import Estimate, PriorScore

SECTIONS = ["glance", "run", "target", "prior", "law", "drift", "sparsity", "kl", "equal-norm",
            "cost", "answers", "settings", "provenance"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    """A report of three runs: plain, with l2 decay, and GRPO."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        run_folder(folder / "plain"),
        run_folder(folder / "anchored", decay=AnchoredDecay("l2", 10.0)),
        run_folder(folder / "grpo", method="grpo", seed=3),
    ]
    output = folder / "out.html"
    assert cli.main(["report", *map(str, runs), "-o", str(output)]) == 0
    return Page(output.read_text(encoding="utf-8")), output


def test_the_sections_are_there(made: tuple[Page, Path]) -> None:
    page, _ = made
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    links = [attrs["href"] for attrs in page.all("a")]
    assert links == [f"#{key}" for key in SECTIONS]
    assert page.text.count("Not here") == 2
    assert "Not here for grpo: the law" in page.text
    assert "Not here for grpo: KL divergence" in page.text


def test_nothing_is_loaded_from_outside(made: tuple[Page, Path]) -> None:
    page, output = made
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attrs in page.tags:
        for name in ("src", "srcset"):
            assert attrs.get(name) is None or attrs[name].startswith("data:image/"), tag
        assert (attrs.get("href") or "#").startswith("#")
        assert not [name for name in attrs if name.startswith("on")]
    style = re.search("<style>(.*)</style>", output.read_text(encoding="utf-8"), re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_figures_are_drawings_in_two_themes_and_pngs(made: tuple[Page, Path]) -> None:
    page, output = made
    sources = [str(a["src"]) for a in page.all("img")]
    sources += [str(a["srcset"]) for a in page.all("source")]
    pngs = sorted((output.parent / "out_figures").glob("*.png"))
    assert len(sources) == 2 * len(pngs) and len(set(sources)) == len(sources) >= 18
    for source in sources:
        theme = DARK if source in {a["srcset"] for a in page.all("source")} else LIGHT
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert theme.soft.encode() in base64.b64decode(data)
        for element in ElementTree.fromstring(base64.b64decode(data)).iter():
            assert not str(element.tag).endswith(("script", "foreignObject"))
            links = [v for k, v in element.attrib.items() if k.endswith("href")]
            assert all(link.startswith(("#", "data:image/png")) for link in links)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs)
    assert all(attrs["alt"] for attrs in page.all("img"))


def test_answers_are_text(made: tuple[Page, Path]) -> None:
    """Escaped, and what would reverse the line is written out."""
    page, output = made
    assert '<script>alert("1")</script><img src=http://example.org/x>\\u202egnol' in page.text
    assert "<script" not in output.read_text(encoding="utf-8")
    assert "user: 2 + 2?" in page.text


def test_numbers_are_those_of_the_files(made: tuple[Page, Path]) -> None:
    page, output = made
    journal = read_journal(output.parent / "plain")
    assert journal.chains[-1].hex() in page.text and journal.header.base_checksum in page.text
    record = json.loads((output.parent / "plain/forgetting/forgetting.json").read_text())
    whole = record["subjects"][0]["drift"][0]["whole"]
    for shown in ("0.300 [0.250, 0.350]", "0.600 [0.550, 0.650]", "+0.300 5.2 s.e.", "3.0 GB",
                  "esfast train --seed 0", "abc123", "0.125 [0.100, 0.150]", "3 min 20 s",
                  "A note of the diagnosis.", number(whole["norm"], 4),
                  percent(whole["below"][2])):  # fmt: skip
        assert shown in page.text, shown


def test_a_prior_task_says_its_dip_and_what_came_back(made: tuple[Page, Path]) -> None:
    page, _ = made
    assert "0.400 [0.355, 0.445] at 1" in page.text
    for shown in ("-0.500 [-0.500, -0.500]", "-0.200 [-0.200, -0.200]", "+0.300 [+0.300, +0.300]"):
        assert shown in page.text, shown


def test_settings_that_differ_are_marked(made: tuple[Page, Path]) -> None:
    _, output = made
    marked = re.findall('<span class="changed">(.*?)</span>', output.read_text(encoding="utf-8"))
    assert "l2" in marked and "10.0" in marked and str(MEMBERS) in marked
    assert "5" not in marked  # prompts, the same in all


def test_a_run_of_little_says_what_would_add_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "a b" / "bare"
    write(folder / "config.json", config(0, "es", None))
    output = tmp_path / "bare.html"
    assert cli.main(["report", str(folder), "-o", str(output)]) == 0
    words = Page(output.read_text(encoding="utf-8")).text
    named, output = (shlex.quote(str(path)) for path in (folder, folder / "forgetting"))
    command = f"esfast forgetting {named} --base tiny --output {output}"
    for shown in ("Not here for bare: held-out scores.", "scores of prior tasks", command,
                  f"esfast train --resume {named}", "not finished"):  # fmt: skip
        assert shown in words, shown
    assert "nan" not in words.lower().split()


def test_seeds_of_one_setting_are_one_curve(tmp_path: Path, undrawn: None) -> None:
    runs = [run_folder(tmp_path / f"es-seed{seed}", seed=seed) for seed in (1, 2)]
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["held_out"] = held_out(DONE, 0.8)
    write_lines(runs[1] / "metrics.jsonl", rows)
    summary = json.loads((runs[1] / "summary.json").read_text())
    write(runs[1] / "summary.json", {**summary, "held_out_after": held_out(DONE, 0.8)})
    output = tmp_path / "seeds.html"
    assert cli.main(["report", *map(str, runs), "-o", str(output)]) == 0
    words = Page(output.read_text(encoding="utf-8")).text
    assert "es (2 seeds)" in words
    assert "0.700 [-0.571, 1.971]" in words  # 0.6 and 0.8: 12.706 * 0.1 to each side


def test_a_sequence_is_its_stages_and_what_became_of_each_task(
    tmp_path: Path, undrawn: None
) -> None:
    folder = tmp_path / "chain"
    stages = plan(folder, ["A", "B"], [4, 2])
    for stage in stages:
        run_folder(stage.folder, seed=stage.number)
    levels = {0: {"A": {0: 0.2, 4: 0.8}, "B": {0: 0.5, 4: 0.3}},
              1: {"A": {1: 0.4, 2: 0.6}, "B": {1: 0.4, 2: 0.9}}}  # fmt: skip
    for place, stage in enumerate(stages):
        lines = [
            PriorScore(at, task, task, "score", 10, Estimate.of([level] * 10)).record()
            for task, course in levels[place].items()
            for at, level in course.items()
        ]
        lines[-1]["failed"] = 7 * place
        write_lines(stage.folder / "prior.jsonl", lines)
    write(folder / "continual.json", {"results": results(stages)})
    output = tmp_path / "chain.html"
    assert cli.main(["report", str(folder), "-o", str(output)]) == 0
    page = Page(output.read_text(encoding="utf-8"))
    assert [a["id"] for a in page.all("section")][4] == "sequence"
    for shown in ("stage-1-A", "stage-2-B", "-0.200 [-0.200, -0.200] +0.200 0.750", "before any",
                  "stage 2: B 0.600 [0.600, 0.600] 0.900 [0.900, 0.900]",
                  "chain: answers that could not be scored and count with the failure reward: "
                  "stage-2-B 7."):  # fmt: skip
        assert shown in page.text, shown


def test_a_task_of_two_stages_has_two_names_in_the_legend() -> None:
    tasks = [{"task": name, "own_stage": stage} for name, stage in (("A", 1), ("B", 2), ("A", 3))]
    assert [_label(task, tasks) for task in tasks] == ["A (stage 1)", "B", "A (stage 3)"]


def test_a_checkpoint_of_another_diagnosis_stands_beside_the_runs(
    tmp_path: Path, undrawn: None
) -> None:
    run = run_folder(tmp_path / "plain")
    other = tmp_path / "elsewhere" / "forgetting.json"
    write(other, diagnosis(Path("hub/other"), "checkpoint", weights(5)))
    output = tmp_path / "two.html"
    assert cli.main(["report", str(run), "--forgetting", str(other), "-o", str(output)]) == 0
    assert "other" in Page(output.read_text(encoding="utf-8")).text


def test_one_diagnosis_of_several_runs(tmp_path: Path, undrawn: None) -> None:
    """A run is known by its journal's check value, wherever the diagnosis was made from."""
    run = run_folder(tmp_path / "plain")
    chain = read_journal(run).chains[-1].hex()
    found = json.loads((run / "forgetting/forgetting.json").read_text())
    shutil.rmtree(run / "forgetting")
    (own,) = found["subjects"]
    found["subjects"] = [{**own, "source": "runs/elsewhere", "chain": chain},
                         {**own, "name": "stranger", "source": "b", "chain": "00"}]  # fmt: skip
    write(tmp_path / "compared" / "forgetting.json", found)
    flags = ["--forgetting", str(tmp_path / "compared"), "-o", str(tmp_path / "r.html")]
    assert cli.main(["report", str(run), *flags]) == 0
    words = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "measured norms" not in words and "stranger" in words
    assert "elsewhere" not in words


@pytest.mark.parametrize(
    ("spoil", "flags", "said"),
    [
        (lambda run: shutil.rmtree(run), [], "is no run folder"),
        (lambda run: (run / "metrics.jsonl").write_text("{"), [], "metrics.jsonl line 1"),
        (lambda run: (run / "journal.esj").write_bytes(b"x" * 99), [], "journal"),
        (lambda run: (run / "prior.jsonl").write_text('{"task": 1}\n'), [], "prior.jsonl"),
        (lambda run: write(run / "forgetting/forgetting.json", {"version": 9}), [], "version 9"),
        (lambda run: None, ["--names", "a,b"], "--names"),
        (lambda run: None, ["-o", "."], "is the folder"),
        (lambda run: None, ["-o", "nowhere/at/all.html"], "not there"),
    ],
)
def test_what_cannot_be_is_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, flags: list[str], said: str
) -> None:
    run = run_folder(tmp_path / "run")
    spoil(run)
    output = tmp_path / "report.html"
    assert cli.main(["report", str(run), "-o", str(output), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not output.exists()


def test_a_run_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(run_folder(tmp_path / "run"))
    assert cli.main(["report", run, run, "-o", str(tmp_path / "r.html")]) == 2
    assert "twice" in capsys.readouterr().err


def test_numbers_as_text() -> None:
    assert [number(x) for x in (0.12345, 123.45, 0.0, 1.5e-7, None)] == [
        "0.123", "123", "0", "1.50e-07", "–",
    ]  # fmt: skip
    shown = score(0.5, (0.25, 0.75), sign=True)
    assert Page(f"<p>{shown}</p>").text == "+0.500 [+0.250, +0.750]" and score(0.5) == "0.500"
    assert [percent(x) for x in (0.5, 1.0, 0.99996, 0.00065)] == [
        "50.0 %", "100.0 %", "99.9960 %", "0.065 %",
    ]  # fmt: skip
    assert large(1.234e15) == "1.23 × 10<sup>15</sup>" and large(999) == "999"
    assert [seconds(x) for x in (12.34, 200, 7260)] == ["12.3 s", "3 min 20 s", "2 h 01 min"]
    assert flat({"a": {"b": None, "c": True}, "d": [1, 2]}) == {
        "a.b": "none", "a.c": "yes", "d": "1, 2",
    }  # fmt: skip
    assert student([0.6, 0.8]) == pytest.approx((0.7, -0.5706, 1.9706), abs=1e-4)
    wide = np.tile([0.0, 1.0], 15)  # 30 seeds: 2.0452 standard errors, not those of 11
    assert student(wide)[2] - 0.5 == pytest.approx(2.0452 * wide.std(ddof=1) / 30**0.5, rel=1e-4)


def test_text_is_escaped_and_empty_columns_are_left_out() -> None:
    assert text("<&\"'\x1b\ud800") == "&lt;&amp;&quot;&#x27;\\u001b\\ud800"
    shown = table(("run", "a", "b"), [("<x>", "–", "1"), ("y", "–", "2")])
    assert "&lt;x&gt;" in shown and ">a<" not in shown and ">b<" in shown

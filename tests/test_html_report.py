"""`esfast report`: what is in the file, what is left out, and that nothing from outside gets in."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from esfast import AnchoredDecay, EvolutionStrategy, ParameterTable, cli
from esfast.continual import plan, results
from esfast.forgetting.change import THRESHOLDS, ULPS
from esfast.forgetting.drift import drift
from esfast.forgetting.energy import SHARES
from esfast.forgetting.groups import GROUPS
from esfast.html_report import pictures
from esfast.html_report.drawing import DARK, LIGHT, Drawn
from esfast.html_report.page import flat, large, number, percent, score, seconds, table, text
from esfast.html_report.report_data import student
from esfast.journal import read_journal
from esfast.journal_format import MarkRecord
from esfast.prior.scores import Estimate, PriorScore
from esfast.replay import keep_journal

EVIL = '</pre><script>alert("1")</script><img src=http://example.org/x>\u202egnol'
MEMBERS, DONE = 4, 3
VOID = {"meta", "img", "source", "br"}
SECTIONS = ["glance", "run", "target", "prior", "law", "drift", "sparsity", "kl", "equal-norm",
            "cost", "answers", "settings", "provenance"]  # fmt: skip


class Page(HTMLParser):
    """The text, the tags, and whether they nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """All that is read, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            shapes[f"model.layers.{layer}.{part}.weight"] = (8, 8)
    return {n: (torch.randn(s, generator=generator) / 16).bfloat16() for n, s in shapes.items()}


def held_out(generation: int, mean: float) -> dict[str, Any]:
    interval = [mean - 0.05, mean + 0.05]
    return {"generation": generation, "prompts": 9, "score": mean, "score_95": interval,
            "solved": 0.5, "solved_95": [0.2, 0.8], "failed_rewards": 0}  # fmt: skip


def config(seed: int, method: str, decay: AnchoredDecay | None) -> dict[str, Any]:
    strategy = {"sigma": 1e-3, "alpha": 0.01, "population_size": MEMBERS, "seed": seed,
                "decay": decay and {"kind": decay.kind, "weight": decay.weight}}  # fmt: skip
    settings: dict[str, Any] = {"generations": DONE, "prompts": 5}
    settings |= {"strategy": strategy} if method == "es" else {"learning_rate": 1e-5, "seed": seed}
    made = {"esfast": "0.1.0", "noise_version": 1, "target": "scalar", "commit": "abc123",
            "command": f"esfast train --seed {seed}", "started": "2026-01-01T00:00:00+00:00",
            "python": "3.11", "platform": "Linux", "packages": {"torch": "2.13"}}  # fmt: skip
    return {"made": made, "method": method, "model": "tiny", "dtype": "bfloat16", "device": "cpu",
            "task": {"name": "sums", "digest": "feed"}, "settings": settings}  # fmt: skip


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def trained(folder: Path, seed: int, decay: AnchoredDecay | None) -> dict[str, torch.Tensor]:
    """A journal of random rewards in `folder`; the tuned weights."""
    live = weights()
    es = EvolutionStrategy(ParameterTable.from_tensors(live), alpha=0.01, seed=seed, decay=decay,
                           population_size=MEMBERS, threads=1)  # fmt: skip
    rng = np.random.default_rng(seed)
    with keep_journal(es, folder / "journal.esj") as journal:
        for _ in range(DONE):
            es.step(rng.normal(size=MEMBERS))
        journal.append(MarkRecord(DONE, es.weights.checksum()))
    return live


def prior_scores() -> list[dict[str, Any]]:
    """A task that dips and comes back."""
    courses = {"capitals": (0.9, 0.4, 0.7), "folder/plurals.jsonl": (0.5, 0.5, 0.6)}
    return [
        PriorScore(
            generation=generation, task=task, source=task, metric="score", prompts=20,
            greedy=Estimate.of([mean - 0.1, mean + 0.1] * 10),
            sampled=Estimate.of([mean - 0.2, mean] * 10, 4, 1.0),
        ).record()
        for task, means in courses.items()
        for generation, mean in zip((0, 1, 3), means, strict=True)
    ]  # fmt: skip


def kl_entries() -> list[dict[str, Any]]:
    part = {"value": 0.125, "low": 0.1, "high": 0.15}
    parts = dict.fromkeys(("token_weighted", "prompt_averaged", "sequence"), part)
    return [
        {"generation": at, "prompts": "capitals", "kind": "prior", "direction": direction,
         "samples_from": source, "count": 8, "tokens": 77, "exact": parts, "log_ratio": parts}
        for at in (1, DONE)
        for direction, source in (("KL(base || tuned)", "base"), ("KL(tuned || base)", "tuned"))
    ]  # fmt: skip


def diagnosis(source: Path, kind: str, tuned: dict[str, torch.Tensor]) -> dict[str, Any]:
    """forgetting.json of one subject; the change is measured, KL made up."""
    at = DONE if kind == "run" else None
    measured = {"generation": at, "checksum": None, **drift(weights(), tuned).record()}
    kl = [entry for entry in kl_entries() if kind == "run"]
    subject = {"name": source.name, "kind": kind, "source": str(source), "generations": at,
               "chain": None, "settings": None, "dtype": "bfloat16", "drift": [measured],
               "kl": kl, "scores": []}  # fmt: skip
    control = {"name": "random direction 0", "kind": "random", "generation": None, "norm": 1.25,
               "scale": 2.0, "seed": 0, "kl": kl[:1], "scores": []}  # fmt: skip
    control["scores"] = [{**held_out(0, 0.31), "prompts": "capitals", "kind": "prior"}]
    return {"format": "esfast-forgetting", "version": 1, "made": {}, "groups": list(GROUPS),
            "base": {"model": "tiny", "dtype": "bfloat16", "elements": 1}, "ulps": list(ULPS),
            "thresholds": list(THRESHOLDS), "energy_shares": list(SHARES), "subjects": [subject],
            "samples": None, "notes": ["A note of the diagnosis."],
            "equal_norm": {"norm": 1.25, "reference": source.name, "by": "whole",
                           "controls": [control]}}  # fmt: skip


def run_folder(
    path: Path, seed: int = 0, method: str = "es", decay: AnchoredDecay | None = None
) -> Path:
    """A whole run folder, as esfast train, prior tasks and esfast forgetting leave it."""
    write(path / "config.json", config(seed, method, decay))
    counts = {"prompt": 10, "generated": 20, "reread": 0, "backward": 0}
    write_lines(path / "metrics.jsonl", [
        {"generation": n, "reward_mean": 0.1 * n, "reward_spread": 0.05, "failed_rewards": 0,
         "reward_best": 0.3, "total_seconds": {"generation": 2.0 * n},
         "cost": {"training": counts, "evaluation": counts},
         "held_out": held_out(n, 0.3 + 0.1 * n) if n != 1 else None}
        for n in range(1, DONE + 1)
    ])  # fmt: skip
    flops = {"forward_flops": 60000, "backward_flops": 0, "flops": 60000}
    cost = {"parameters": 1000, "formula": "as esfast counts", "training": {**counts, **flops}}
    write(path / "summary.json", {
        "status": "finished", "generations": DONE, "rise": 0.3, "rise_in_standard_errors": 5.25,
        "held_out_before": held_out(0, 0.3), "held_out_after": held_out(DONE, 0.6),
        "seconds": {"generation": 190.0, "update": 10.0, "prior tasks": 30.0}, "cost": cost,
        "outside_share_of_loop": 0.05, "peak_bytes": 3_000_000_000, "peak_over_inference": 1.5,
    })  # fmt: skip
    answer = {"answer": EVIL, "score": 0.25, "generation": 0}
    asked = [{"role": "user", "content": "2 + 2?"}]
    answers = {"before": answer, "after": {**answer, "generation": DONE}}
    write(path / "samples.json", [{"prompt": asked, **answers}])
    write_lines(path / "prior.jsonl", prior_scores())
    tuned = trained(path, seed, decay) if method == "es" else weights(seed)
    kind, source = ("run", path) if method == "es" else ("checkpoint", path / "model")
    write(path / "forgetting" / "forgetting.json", diagnosis(source, kind, tuned))
    return path


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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words and numbers: drawing takes most of a report's time."""
    monkeypatch.setattr(pictures, "drawn", lambda *_: Drawn(b"<svg/>", b"<svg/>", b""))


def test_a_run_of_little_says_what_would_add_the_rest(tmp_path: Path) -> None:
    write(tmp_path / "bare" / "config.json", config(0, "es", None))
    output = tmp_path / "bare.html"
    assert cli.main(["report", str(tmp_path / "bare"), "-o", str(output)]) == 0
    words = Page(output.read_text(encoding="utf-8")).text
    folder = tmp_path / "bare"
    command = f"esfast forgetting {folder} --base tiny --output {folder / 'forgetting'}"
    for shown in ("Not here for bare: held-out scores.", "scores of prior tasks", command,
                  f"esfast train --resume {folder}", "not finished"):  # fmt: skip
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
        write_lines(stage.folder / "prior.jsonl", lines)
    write(folder / "continual.json", {"results": results(stages)})
    output = tmp_path / "chain.html"
    assert cli.main(["report", str(folder), "-o", str(output)]) == 0
    page = Page(output.read_text(encoding="utf-8"))
    assert [a["id"] for a in page.all("section")][4] == "sequence"
    for shown in ("stage-1-A", "stage-2-B", "-0.200 [-0.200, -0.200] +0.200 0.750", "before any",
                  "stage 2: B 0.600 [0.600, 0.600] 0.900 [0.900, 0.900]"):  # fmt: skip
        assert shown in page.text, shown


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
    assert student([0.6, 0.8]) == pytest.approx((0.7, -0.5706, 1.9706))


def test_text_is_escaped_and_empty_columns_are_left_out() -> None:
    assert text("<&\"'\x1b\ud800") == "&lt;&amp;&quot;&#x27;\\u001b\\ud800"
    shown = table(("run", "a", "b"), [("<x>", "–", "1"), ("y", "–", "2")])
    assert "&lt;x&gt;" in shown and ">a<" not in shown and ">b<" in shown

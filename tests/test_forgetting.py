"""`esfast forgetting`: from a journal and a base alone, what the run's own weights say."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from forgetting_runs import GENERATIONS, command, found, numbers, train
from rich.console import Console
from tiny_models import llama, save

from esfast import AnchoredDecay
from esfast.diagnosis.plots import draw
from esfast.diagnosis.records import EQUAL, models
from esfast.diagnosis.steps import Steps
from esfast.diagnosis.table import print_tables
from esfast.forgetting.drift import CheckpointTensors, drift
from esfast.forgetting.subjects import Base, Checkpoint, Run, names_of, open_subject
from esfast.models import load_model


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A base in fp32, a run in bf16 and one in fp32 with decay, and another base."""
    folder = tmp_path_factory.mktemp("forgetting")
    for name, seed in (("base", 0), ("other", 1)):
        save(llama(seed), folder / name)
    train(folder / "base", folder / "es", "bfloat16", seed=1)
    train(folder / "base", folder / "awd", "float32", seed=2, decay=AnchoredDecay("l2", 5.0))
    return folder


def test_the_journal_gives_what_the_saved_weights_say(here, tmp_path):
    """Norm, mean, maximum, sparsity at every generation, from numpy over the saved checkpoints; the
    base is rounded to the run's dtype first, as the run did."""
    arguments = ["--base", here / "base", "--every", "1", "--no-kl", "--score", "0", "--no-plots"]
    assert command(here / "es", *arguments, "--output", tmp_path / "out") == 0
    subject = found(tmp_path / "out")["subjects"][0]
    base = CheckpointTensors(here / "base")
    start = numbers({name: base[name].bfloat16() for name in base})
    assert [r["generation"] for r in subject["drift"]] == list(range(GENERATIONS + 1))
    assert subject["drift"][0]["whole"]["unchanged"] == 1
    for record in subject["drift"][1:]:
        saved = CheckpointTensors(here / "es" / f"saved-{record['generation']}")
        delta = numbers(saved) - start
        whole = record["whole"]
        assert whole["elements"] == delta.size
        assert whole["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert whole["relative_norm"] == pytest.approx(
            np.linalg.norm(delta) / np.linalg.norm(start), rel=1e-12
        )
        assert whole["mean_abs"] == pytest.approx(np.abs(delta).mean(), rel=1e-12)
        assert whole["max_abs"] == np.abs(delta).max()
        assert whole["below"][2] == np.mean(np.abs(delta) < 1e-6)


def test_a_checkpoint_of_the_same_weights_says_the_same(here, tmp_path, capsys):
    subjects = [here / "awd", here / "awd" / f"saved-{GENERATIONS}"]
    arguments = ["--base", here / "base", "--no-kl", "--score", "0", "--no-plots"]
    assert command(*subjects, *arguments, "--output", tmp_path / "out") == 0
    run, checkpoint = found(tmp_path / "out")["subjects"]
    assert (run["kind"], checkpoint["kind"]) == ("run", "checkpoint")
    assert run["settings"]["decay"] == {"kind": "l2", "weight": 5.0}
    for part in ("whole", "groups", "layers", "energy"):
        assert run["drift"][0][part] == checkpoint["drift"][0][part]
    assert run["drift"][0]["whole"]["norm"] > 0
    shown = capsys.readouterr().out
    assert "awd" in shown and "saved-4" in shown and "mlp" in shown


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory) -> Path:
    """Everything that the command does, once."""
    output = tmp_path_factory.mktemp("whole") / "out"
    answers = ["--kl-prompts", "countdown", "--kl-count", "3", "--kl-tokens", "3"]
    answers += ["--score", "4", "--score-tokens", "4"]
    moments = ["--at", "1,last", "--kl-at", "1,last", "--equal-norm", "whole", "--threads", "1"]
    places = ["--base", here / "base", "--output", output]
    assert command(here / "es", here / "awd", *places, *moments, *answers) == 0
    return output


def test_what_forgetting_json_holds(whole):
    data = found(whole)
    assert data["format"] == "esfast-forgetting" and data["version"] == 1
    assert data["samples"]["dtype"] == "float32" and data["samples"]["max_new_tokens"] == 3
    for subject in data["subjects"]:
        assert [r["generation"] for r in subject["drift"]] == [1, GENERATIONS]
        keys = {(k["generation"], k["prompts"], k["kind"], k["direction"]) for k in subject["kl"]}
        assert keys == {
            (generation, *prompts, f"KL({pair})")
            for generation in (1, GENERATIONS)
            for prompts in (("arithmetic", "target"), ("countdown", "prior"))
            for pair in ("base || tuned", "tuned || base")
        }
        for record in subject["kl"]:
            estimate = record["exact"]["token_weighted"]
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
            assert estimate["value"] > 0 and record["count"] == 3
        assert {s["count"] for s in subject["scores"]} == {4}
    assert [s["prompts"] for s in data["base_scores"]] == ["arithmetic", "countdown"]
    cell = data["subjects"][0]["drift"][0]["cells"][0]
    assert len(cell["below"]) == len(data["thresholds"])
    assert len(cell["within_ulps"]) == len(data["ulps"])
    energy = data["subjects"][0]["drift"][-1]["energy"]["whole"]
    assert len(energy["held"]) == len(data["energy_shares"]) and energy["held"][-1] == 1


def test_controls_have_one_length(whole):
    data = found(whole)
    controls = data["equal_norm"]["controls"]
    length = data["subjects"][0]["drift"][-1]["whole"]["norm"]
    assert data["equal_norm"]["norm"] == length
    assert [c["kind"] for c in controls] == ["subject", "subject", "random"]
    assert [c["norm"] for c in controls] == pytest.approx([length] * 3, rel=1e-6)
    assert controls[0]["scale"] == pytest.approx(1.0, rel=1e-5)
    own = data["subjects"][1]["drift"][-1]["whole"]["norm"]
    assert controls[1]["scale"] == pytest.approx(length / own, rel=1e-5)
    last = [k for k in data["subjects"][0]["kl"] if k["generation"] == GENERATIONS]
    for mine, control in zip(last, controls[0]["kl"], strict=True):
        value = control["exact"]["token_weighted"]["value"]
        assert value == pytest.approx(mine["exact"]["token_weighted"]["value"], rel=0.02)
    assert len({c["kl"][0]["exact"]["token_weighted"]["value"] for c in controls}) == 3
    assert [name for norm, name, _ in models(data) if norm == EQUAL] == [
        "es",
        "awd",
        "random direction 0",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_the_tables_break_no_number_on_a_terminal(whole, width):
    page = io.StringIO()
    console = Console(file=page, width=width, force_terminal=True, no_color=True, _environ={})
    data = found(whole)
    print_tables(console, data)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", page.getvalue())
    assert max(map(len, shown.splitlines())) <= 80
    for _, _, model in models(data):
        for record in model["kl"]:
            part = record["exact"]["token_weighted"]
            assert f"{part['value']:.3g} [{part['low']:.3g}, {part['high']:.3g}]" in shown
    assert f"{data['subjects'][0]['drift'][0]['whole']['max_abs']:.3g} " in shown


def test_the_files_beside_it(whole):
    data = found(whole)
    with (whole / "drift_by_group.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = next(
        r for r in rows if (r["subject"], r["generation"], r["group"]) == ("awd", "4", "mlp")
    )
    recorded = data["subjects"][1]["drift"][-1]["groups"]["mlp"]
    assert float(last["norm"]) == recorded["norm"]
    assert float(last["below_1e-06"]) == recorded["below"][2]
    with (whole / "kl.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * sum(len(m["kl"]) for _, _, m in models(data))
    assert {r["at"] for r in rows} == {"own norm", "equal norm"}
    for name in ("drift_by_layer.csv", "energy.csv", "scores.csv"):
        assert (whole / name).read_text().count("\n") > 4
    pictures = {path.stem for path in whole.glob("*.png")}
    assert pictures == {
        "norm",
        "heat_rms",
        "heat_sparsity",
        "sparsity",
        "energy",
        "kl",
        "equal_norm",
    }
    for path in whole.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_compared_as_stored_in_bf16_a_small_change_is_none(here, tmp_path):
    loaded = load_model(here / "base", dtype=torch.float32)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(1e-7)
    loaded.model.save_pretrained(tmp_path / "small")
    shares = []
    for flags in ((), ("--as-dtype", "bfloat16")):
        output = tmp_path / f"out{len(flags)}"
        rest = ["--no-kl", "--score", "0", "--no-plots", "--output", output, *flags]
        assert command(tmp_path / "small", "--base", here / "base", *rest) == 0
        shares.append(found(output)["subjects"][0]["drift"][0]["whole"]["unchanged"])
    assert shares[0] < 0.6 < 0.99 < shares[1]


REFUSED = {
    "a run that is not there": (["no-run"], "'no-run' is not there"),
    "a folder that is neither": (["empty"], "neither a journal nor safetensors"),
    "another base": (["es", "--base", "other"], "another revision of it"),
    "a base that is not there": (["es", "--base", "no-base"], "the model 'no-base'"),
    "a generation too far": (["es", "--at", "2,9"], "generations 0 to 4"),
    "a KL generation too far": (["es", "--kl-at", "9"], "generation 9"),
    "a generation that is a word": (["es", "--at", "end"], "'end'"),
    "one run twice": (["es", "es"], "given twice"),
    "a folder in use": (["es", "--output", "."], "is there already"),
    "an unknown prior task": (["es", "--kl-prompts", "no_such_task.yaml"], "no_such_task"),
    "a task of lm-eval": (["es", "--kl-prompts", "hellaswag"], "no prompts to answer"),
    "one task twice": (["es", "--kl-prompts", "arithmetic"], "asked for twice"),
    "one prompt": (["es", "--kl-count", "1"], "2 or more: raise --kl-count, or leave KL out"),
    "a task of one prompt": (["es", "--kl-prompts", "one.jsonl"], "more held-out ones (--eval"),
    "answers too long": (["es", "--kl-tokens", "600"], "of esfast forgetting --kl-tokens or"),
    "controls without answers": (["es", "--equal-norm", "whole", "--no-kl", "--score", "0"],
                                 "no prompts to answer"),
    "no base": (["es", "--base"], "--base"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_mended_is_one_paragraph_and_exit_code_2(
    case, here, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(here)
    (here / "empty").mkdir(exist_ok=True)
    (here / "one.jsonl").write_text('{"prompt": "A?", "answer": "a"}\n')
    arguments, expected = REFUSED[case]
    rest = [] if "--base" in arguments else ["--base", "base"]
    rest += [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    assert command(*arguments, *rest) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_names_tell_sources_apart():
    assert names_of(["runs/a", "runs/b"]) == ["a", "b"]
    assert names_of(["one/x", "two/x"]) == ["one/x", "two/x"]
    assert names_of(["runs/es", "runs/grpo/model"]) == ["es", "grpo"]
    assert names_of(["es", "es/model"]) == ["es", "model"]


def test_moments_are_live_and_the_base_stays(here):
    subject = open_subject(str(here / "awd"), "awd")
    assert isinstance(subject, Run)
    base = Base.of(str(here / "base"))
    seen = [
        (moment.generation, drift(moment.base, moment.tuned).whole.norm)
        for moment in subject.moments(base, [0, 2, 4])
    ]
    assert [generation for generation, _ in seen] == [0, 2, 4]
    assert 0 == seen[0][1] < seen[1][1] < seen[2][1]
    assert isinstance(open_subject(str(here / "es" / "saved-1"), "s"), Checkpoint)


def test_a_run_without_a_journal_is_the_model_that_it_left(here, tmp_path):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "model").symlink_to(here / "other")
    (tmp_path / "grpo" / "config.json").write_text("{}")
    subject = open_subject(str(tmp_path / "grpo"), "grpo")
    assert isinstance(subject, Checkpoint) and set(subject.tensors) > {"model.norm.weight"}


def test_an_output_that_is_tied_in_one_of_the_models_is_told(here, tmp_path, capsys):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    arguments = ["--base", here / "base", "--no-kl", "--score", "0", "--no-plots"]
    assert command(tmp_path / "tied", *arguments, "--output", tmp_path / "out") == 0
    note = "tied: 'lm_head.weight' is stored by the base alone and is not compared."
    assert found(tmp_path / "out")["notes"] == [note]
    assert note in " ".join(capsys.readouterr().out.split())


def test_a_journal_alone_has_drift_and_says_why_no_kl(here, tmp_path, capsys):
    (tmp_path / "j.esj").write_bytes((here / "es" / "journal.esj").read_bytes())
    places = ["--base", here / "base", "--output", tmp_path / "out", "--no-plots"]
    assert command(tmp_path / "j.esj", *places) == 0
    data = found(tmp_path / "out")
    assert data["subjects"][0]["drift"][0]["whole"]["norm"] > 0
    assert data["samples"] is None and data["subjects"][0]["kl"] == []
    assert "no task is known" in data["notes"][0]
    assert "no task is known" in capsys.readouterr().out
    law, measured = data["subjects"][0]["noise_norms"], data["subjects"][0]["drift"][0]["whole"]
    assert law[0] == 0 and measured["norm"] == pytest.approx(law[GENERATIONS], rel=0.05)


def copied(run: Path, folder: Path, **flags: object) -> Path:
    """A run's journal with another config.json."""
    folder.mkdir()
    (folder / "journal.esj").write_bytes((run / "journal.esj").read_bytes())
    config = {"arguments": {"task": "arithmetic", "task_option": [], **flags}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_scored_answer_is_as_long_as_the_runs_own(here, tmp_path):
    """The target's; another task's, and a target that is named, as long as the task says."""
    short = copied(here / "es", tmp_path / "short", max_new_tokens=3)
    usual = copied(here / "es", tmp_path / "usual")
    rest = ["--base", here / "base", "--no-kl", "--score", "2", "--no-plots"]
    for number, (subjects, flags, lengths) in enumerate(
        [
            ((short, usual), ("--kl-prompts", "questions:plurals"), (3, 16)),
            ((short,), ("--score-tokens", "2"), (2,)),
            ((short,), ("--task", "arithmetic"), (13,)),
        ]
    ):
        output = tmp_path / f"out-{number}"
        assert command(*subjects, *rest, *flags, "--output", output) == 0
        data = found(output)
        for scores in (data["base_scores"], data["subjects"][0]["scores"]):
            assert tuple(score["max_new_tokens"] for score in scores) == lengths
        told = "answers of different lengths" in " ".join(data["notes"])
        assert told == (len(subjects) == 2)


def test_answers_that_could_not_be_scored_are_counted_beside_the_score(
    here, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {n}.", "fails": n % 3 == 0} for n in range(40)]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("graders.py").write_text(
        "def odd(example, text):\n    assert not example['fails']\n    return 1.0\n"
    )
    flags = ["--no-kl", "--score", "6", "--no-plots", "--equal-norm", "whole"]
    task = ["--data", "rows.jsonl", "--reward", "graders:odd"]
    assert command(here / "es", "--base", here / "base", *flags, *task, "--output", "out") == 0
    data = found(Path("out"))
    (score,) = data["subjects"][0]["scores"]
    failed = score["failed_rewards"]
    assert 0 < failed < 6 and score["score"] == pytest.approx(1 - failed / 6)
    names = (
        "es at generation 4",
        "es, one length at generation 4",
        "random direction 0, one length",
    )
    assert [note.partition(": ")[0] for note in data["notes"]] == [*names, "base"]
    assert all(f"{failed} of 6 answers to custom" in note for note in data["notes"])
    shown = capsys.readouterr().out
    assert shown.count(f"], {failed} not scored") == 4 and data["notes"][0] in shown


def test_heat_maps_keep_their_scales(whole, tmp_path, monkeypatch):
    """Colour bars have numbers; changes far apart get a scale each, near ones share it."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    data = found(whole)
    draw(tmp_path, data)
    near = figures[1]
    assert [axes.axison for axes in near.axes] == [True] * 4
    assert len({axes.images[0].get_clim() for axes in near.axes[:2]}) == 1
    for cell in data["subjects"][1]["drift"][-1]["cells"]:
        cell["rms"] /= 50
    data["subjects"][1]["drift"][-1]["whole"]["norm"] /= 50
    figures.clear()
    draw(tmp_path, data)
    ends = [axes.images[0].get_clim()[1] for axes in figures[1].axes[:2]]
    assert ends[0] > 10 * ends[1] > 0
    assert figures[0].axes[0].get_yscale() == "log"


def test_names_are_no_markup_and_no_mathematics(whole, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    keep = lambda self, *a, **k: (figures.append(self), save(self, *a, **k))  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", keep)
    data = found(whole)
    names = ("seed[1] :warning:", r"lr[/x] $\frac{$")
    for subject, name in zip(data["subjects"], names, strict=True):
        subject["name"] = name
    data["subjects"][1]["drift"][-1]["whole"]["norm"] /= 50
    draw(tmp_path, data)
    labels = figures[0].axes[0].yaxis.get_ticklabels(which="both")
    powers = [label for label in labels if "$" in label.get_text()]
    assert powers and all(label.get_parse_math() for label in powers)
    out = io.StringIO()
    print_tables(Console(file=out), data)
    with Steps(Console(file=out, force_terminal=True, width=200, _environ={})) as steps:
        steps.show(names[1], 1, 2)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert shown.count(names[0]) > 3 and shown.count(names[1]) > 3
    assert re.search(re.escape(names[1]) + " +━", shown)

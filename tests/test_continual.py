"""A sequence of tasks: the chain of checksums, going on after a stop, transfer and forgetting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import run

from esfast import StateError, cli, continual_plots
from esfast.continual import chain_of, handed_on, plan, results
from esfast.continual_command import TaskSequence, result_lines, stage_args
from esfast.continual_plots import draw_continual
from esfast.journal import read_journal
from esfast.prior import Estimate, PriorScore
from esfast.prior.evaluation import PRIOR
from esfast.rollout import Rollout
from esfast.run_folder import read_json, read_lines


def evaluated(stage, task: str, levels: dict[int, float], prompts: int = 4) -> None:
    """Writes down that `task` scored these shares of its prompts at the stage's generations."""
    stage.folder.mkdir(exist_ok=True)
    with (stage.folder / PRIOR).open("a") as file:
        for generation, level in levels.items():
            right = [1.0] * round(level * prompts) + [0.0] * (prompts - round(level * prompts))
            one = PriorScore(generation, task, task, "score", prompts, Estimate.of(right))
            file.write(json.dumps(one.record()) + "\n")


SINCE = ("backward_transfer", "forgetting", "kept_of_peak", "worst_since", "worst_since_at")


# --- results --------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """A learns to 1 and falls to 0.5; B loses half of what it had to A, then learns; C is prior."""
    stages = plan(tmp_path, ["A", "B"], [4, 2])
    evaluated(stages[0], "A", {0: 0.25, 2: 1.0, 4: 0.75})
    evaluated(stages[1], "A", {0: 0.75, 1: 0.25, 2: 0.5})
    evaluated(stages[0], "B", {0: 0.5, 2: 0.5, 4: 0.25})
    evaluated(stages[1], "B", {0: 0.25, 1: 0.5, 2: 0.75})
    evaluated(stages[0], "C", {0: 0.5, 2: 0.25, 4: 0.25})
    evaluated(stages[1], "C", {0: 0.25, 1: 1.0, 2: 0.75})
    return stages


def test_transfer_and_forgetting(two):
    found = results(two)
    assert found["sampled"] is None
    a, b, c = found["greedy"]["tasks"]
    assert (a["own_stage"], a["peak"], a["peak_at"]) == (1, 1.0, 2)
    assert a["learned"]["value"] == 0.5 and a["forward_transfer"] is None  # nothing came before
    assert a["backward_transfer"]["value"] == -0.25 and a["forgetting"] == 0.5
    assert a["kept_of_peak"] == 0.5 and (a["worst_since"], a["worst_since_at"]) == (0.25, 5)
    assert (b["own_stage"], b["peak"]) == (2, 0.75)
    assert b["forward_transfer"]["value"] == -0.25 and b["learned"]["value"] == 0.25
    assert [b[name] for name in SINCE] == [None] * len(SINCE)  # nothing came after
    assert c["own_stage"] is None and "learned" not in c


def test_a_peak_is_of_the_training_and_not_of_what_came_before_it(tmp_path):
    """B stood at 1 when its stage began, and its training took that down."""
    stages = plan(tmp_path, ["A", "B", "A"], [2, 2, 2])
    evaluated(stages[0], "B", {0: 0.25, 2: 1.0})
    evaluated(stages[1], "B", {0: 1.0, 1: 0.75, 2: 0.5})
    evaluated(stages[2], "B", {0: 0.5, 2: 0.25})
    (b,) = results(stages)["greedy"]["tasks"]
    assert (b["peak"], b["peak_at"], b["forgetting"]) == (0.75, 3, 0.5)


def test_a_task_that_is_trained_again_has_a_result_a_training(tmp_path):
    stages = plan(tmp_path, ["A", "B", "A"], [2, 2, 2])
    evaluated(stages[0], "A", {0: 0.0, 2: 1.0})
    evaluated(stages[1], "A", {0: 1.0, 1: 0.25, 2: 0.5})
    first, second = results(stages)["greedy"]["tasks"]
    assert second["own_stage"] == 3 and second["peak"] is None and second["learned"] is None
    evaluated(stages[2], "A", {0: 0.5, 1: 0.75, 2: 0.75})
    found = results(stages)
    first, second = found["greedy"]["tasks"]
    assert (first["own_stage"], first["peak"], first["learned"]["value"]) == (1, 1.0, 1.0)
    assert first["backward_transfer"]["value"] == -0.5 and first["forgetting"] == 0.5
    assert (first["kept_of_peak"], first["worst_since"], first["worst_since_at"]) == (0.5, 0.25, 3)
    assert [point["at"] for point in first["curve"]] == [0, 2, 3, 4]
    assert (second["own_stage"], second["peak"]) == (3, 0.75)
    assert second["learned"]["value"] == 0.25 and second["forward_transfer"] is None
    assert [second[name] for name in SINCE] == [None] * len(SINCE)
    assert [point["at"] for point in second["curve"]] == [4, 5, 6]
    lines = result_lines({"results": found})
    assert any("A (stage 1)" in line and "kept 0.50 of its peak" in line for line in lines)
    assert not any("A (stage 3)" in line and "of its peak" in line for line in lines)


def test_trainings_of_one_task_are_told_apart_and_a_stage_to_come_is_not_drawn(two):
    figure = pytest.importorskip("matplotlib.figure")
    third = plan(two[0].folder.parent, ["A", "B", "A"], [4, 2, 2])
    evaluated(third[2], "A", {0: 0.5, 2: 1.0})
    to_come = plan(two[0].folder / "none", ["A", "B"], [4, 2])[1:]
    for names, stages in (("ABA", third), ("AB", [two[0], *to_come])):
        axes = figure.Figure().subplots()
        tasks = results(stages)["greedy"]["tasks"]
        continual_plots._curves(axes, tasks, names, [4, 6, 8][: len(names)], "greedy")
        shown = axes.get_legend_handles_labels()[1]
        of_a = ["A (stage 1): 1.00", "A (stage 3): 1.00"] if names == "ABA" else ["A: 1.00"]
        of_b = ["B: 0.75"] if names == "ABA" else []
        trained = [label.partition(" at its peak")[0] for label in shown if "peak" in label]
        assert trained == of_a + of_b


def test_curves_are_shares_of_their_own_stages_peak(two):
    a, b, c = results(two)["greedy"]["tasks"]
    assert [point["at"] for point in a["curve"]] == [0, 2, 4, 5, 6]  # a boundary counts once
    assert [point["of_peak"] for point in a["curve"]] == [0.25, 1.0, 0.75, 0.25, 0.5]
    assert [point["of_peak"] for point in b["curve"]] == pytest.approx(
        [2 / 3, 2 / 3, 1 / 3, 2 / 3, 1]
    )
    assert [point["of_peak"] for point in c["curve"]][:2] == [1.0, 0.5]  # over what it was before


def test_the_matrix_has_a_row_a_stage(two):
    rows = results(two)["greedy"]["matrix"]
    assert [row["trained"] for row in rows] == [None, "A", "B"]
    scores = [[row["scores"][name]["score"] for name in "ABC"] for row in rows]
    assert scores == [[0.25, 0.5, 0.5], [0.75, 0.25, 0.25], [0.5, 0.75, 0.75]]


def test_a_sequence_that_is_not_over_has_results_so_far(two):
    shutil.rmtree(two[1].folder)
    found = results(two)["greedy"]
    assert found["matrix"][2]["scores"]["A"] is None
    b = found["tasks"][1]
    assert b["own_stage"] == 2 and b["learned"] is None and b["backward_transfer"] is None


def test_a_task_that_never_scored_has_no_shares(tmp_path):
    stages = plan(tmp_path, ["A"], [2])
    evaluated(stages[0], "A", {0: 0.0, 2: 0.0})
    (task,) = results(stages)["greedy"]["tasks"]
    assert task["kept_of_peak"] is None and task["curve"][0]["of_peak"] is None


def test_a_stages_end_is_the_next_ones_beginning(two):
    handed = handed_on(two[0])
    assert {(s.task, s.generation, s.greedy.score) for s in handed} == {
        ("A", 0, 0.75), ("B", 0, 0.25), ("C", 0, 0.25)
    }  # fmt: skip


# --- runs of a tiny model -------------------------------------------------------------------------

DECAY = ["--weight-decay-type", "l2", "--weight-decay-lambda", "10"]


FLAGS = [
    *("continual", "--model", "model", "--tasks", "one.jsonl@rewards:low,two.jsonl@rewards:high"),
    *("--max-new-tokens", "4", "--population-size", "4", "--prompts", "2", "--eval-size", "2"),
    *("--sigma", "0.05", "--alpha", "0.05", "--threads", "1", "--generations", "3,2"),
    *("--prior-size", "2", "--prior-samples", "1", "--prior-every", "2", "--no-plots"),
]
REWARDS = """
def low(example, text):
    return sum(map(ord, text)) % 64 / 64

def high(example, text):
    return 1 - low(example, text)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, prompts, rewards, and a sequence that is over: "whole"."""
    pytest.importorskip("transformers")
    import tiny_models

    folder = tmp_path_factory.mktemp("continual")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_models.save(tiny_models.llama(num_hidden_layers=1).bfloat16(), "model")
        Path("rewards.py").write_text(REWARDS)
        for name in ("one", "two"):
            rows = [{"prompt": f"Say {name} {n}."} for n in range(12)]
            Path(f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        assert run(*FLAGS, *DECAY, "--output", "whole") == 0
    return folder


def weights(folder: str) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


STAGES = ("stage-1-one", "stage-2-two")


def test_stages_follow_one_another_and_replay_from_their_journals(there, capsys):
    found = read_json(Path("whole/continual.json"))
    first, second = found["stages"]
    assert found["status"] == "finished" and first["end_checksum"] == second["base_checksum"]
    assert first["anchor_checksum"] == second["anchor_checksum"] == first["base_checksum"]
    journals = [read_journal(Path("whole") / stage) for stage in STAGES]
    assert [len(journal.generations) for journal in journals] == [3, 2]
    assert [journal.header.config.seed for journal in journals] == [0, 1_000_000]
    tasks = {r["task"] for stage in STAGES for r in read_lines(Path("whole") / stage / PRIOR)}
    assert tasks == {"one", "two"}
    at = [r["generation"] for r in read_lines(Path("whole") / STAGES[1] / PRIOR)]
    assert at == [0, 0, 2, 2]  # the first two handed on, not measured
    base = "model"
    for stage in STAGES:  # the original and the journals are enough
        again = ["replay", f"whole/{stage}", "--base", base, "--anchor-model", "model"]
        assert run(*again, "--output", f"again-{stage}", "--verify") == 0
        base = f"again-{stage}"
    assert weights(base) == weights(f"whole/{STAGES[1]}/model")
    alone = ["replay", f"whole/{STAGES[1]}", "--base", f"whole/{STAGES[0]}/model"]
    assert run(*alone, "--output", "wrong") == 2
    assert "the anchor has checksum" in capsys.readouterr().err


def test_forgetting_looks_at_a_later_stage(there, tmp_path):
    """Its decay pulls to the model that the sequence started from, as its config.json says."""
    places = ["--base", f"whole/{STAGES[0]}/model", "--output", str(tmp_path / "out")]
    flags = ["--no-kl", "--score", "0", "--no-plots"]
    assert run("forgetting", f"whole/{STAGES[1]}", *places, *flags) == 0
    (subject,) = read_json(tmp_path / "out" / "forgetting.json")["subjects"]
    assert subject["drift"][0]["whole"]["norm"] > 0


def test_the_anchor_is_the_original_or_the_stages_start(there):
    assert run(*FLAGS, *DECAY, "--anchor", "stage", "--output", "stage") == 0
    ends = [weights(f"{name}/{stage}/model") for stage in STAGES for name in ("whole", "stage")]
    assert ends[0] == ends[1] and ends[2] != ends[3]
    anchors = [
        link["anchor_checksum"] for link in read_json(Path("stage/continual.json"))["stages"]
    ]
    bases = [link["base_checksum"] for link in read_json(Path("stage/continual.json"))["stages"]]
    assert anchors == bases and anchors[0] != anchors[1]


def stop_after(monkeypatch, generations: int) -> Callable[[], None]:
    """Ctrl-C in the generation after so many; the returned function takes that back."""
    population, left = Rollout.population, [generations]

    def stopping(self, es, *rest):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return population(self, es, *rest)

    monkeypatch.setattr(Rollout, "population", stopping)
    return lambda: monkeypatch.setattr(Rollout, "population", population)


@pytest.mark.parametrize("before", [1, 3, 4])
def test_a_stopped_sequence_goes_on_to_the_same_bits(there, monkeypatch, before):
    """Stopped inside the first stage, between the two, and inside the second."""
    go_on, name = stop_after(monkeypatch, before), f"stopped-{before}"
    assert run(*FLAGS, *DECAY, "--output", name) == 130
    assert read_json(Path(name, "continual.json"))["status"] == "stopped"
    go_on()
    assert run("continual", "--resume", name) == 0
    assert weights(f"{name}/{STAGES[1]}/model") == weights(f"whole/{STAGES[1]}/model")
    both = [read_json(Path(folder, "continual.json")) for folder in ("whole", name)]
    assert both[0]["results"] == both[1]["results"]


def test_a_model_that_was_changed_between_stages_is_found(there, capsys):
    shutil.copytree("whole", "changed")
    shutil.rmtree(f"changed/{STAGES[1]}")
    shutil.copy("model/model.safetensors", f"changed/{STAGES[0]}/model/model.safetensors")
    assert run("continual", "--resume", "changed") == 2
    assert "it was changed since" in capsys.readouterr().err


def test_a_stage_from_other_weights_breaks_the_chain(there):
    sources = ["one.jsonl@rewards:low", "two.jsonl@rewards:high"]
    shutil.copytree("whole", "mixed")
    stages = plan(Path("mixed"), sources, [3, 2])
    assert len(chain_of(stages)) == 2
    shutil.copy(f"mixed/{STAGES[0]}/journal.esj", f"mixed/{STAGES[1]}/journal.esj")
    with pytest.raises(StateError, match="the chain is broken"):
        chain_of(stages)


def test_a_finished_sequence_is_told_and_drawn_again(there, capsys):
    recorded = read_json(Path("whole/continual.json"))
    lines = result_lines(recorded)
    assert "greedy scores after each stage" in lines and "sampled scores after each stage" in lines
    assert any("backward transfer" in line for line in lines)
    before = {p: p.read_bytes() for p in Path("whole").rglob("*.esj")}
    assert run("continual", "--resume", "whole") == 0  # nothing is left to run
    assert capsys.readouterr().out.count("scores after each stage") == 2
    assert {p: p.read_bytes() for p in Path("whole").rglob("*.esj")} == before
    for path in draw_continual(Path("whole")):
        assert path.read_bytes().startswith(b"\x89PNG")


REFUSED = {
    "no tasks": (["--generations", "2"], "--tasks is not given"),
    "an empty name": (["--tasks", "a,,b"], "write the sequence"),
    "a single task": (["--tasks", "arithmetic", "--task", "countdown"], "--tasks A,B,C"),
    "too many numbers": (["--tasks", "arithmetic", "--generations", "1,2"], "has 2 numbers"),
    "no number": (["--tasks", "arithmetic", "--generations", "1,x"], "not of the form"),
    "an unknown task": (["--tasks", "arithmetic,chess"], "there is no task 'chess'"),
    "a missing file": (["--tasks", "no.jsonl"], "cannot read no.jsonl"),
    "an option of no task": (
        ["--tasks", "arithmetic", "--task-option", "chess:size=8"],
        "with a TASK of --tasks",
    ),
    "two anchors": (
        ["--tasks", "arithmetic", "--anchor", "stage", "--anchor-model", "m", *DECAY],
        "two anchors",
    ),
    "an anchor without decay": (["--tasks", "arithmetic", "--anchor-model", "m"], "without decay"),
    "a stage's anchor without decay": (
        ["--tasks", "arithmetic", "--anchor", "stage"],
        "--anchor stage needs --weight-decay-type l1 or l2",
    ),
    "a later stage's seed": (
        ["--tasks", "arithmetic,arithmetic", "--seed", str(2**64 - 1)],
        "seed is 18446744073710551615",
    ),
    "a folder in use": (["--tasks", "arithmetic", "--output", "used"], "used is there already"),
    "a sequence that is not there": (["--resume", "nowhere"], "cannot read nowhere"),
    "other flags on resuming": (["--resume", "used", "--sigma", "1"], "leave out --sigma"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_said_before_anything_is(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("used").mkdir()
    Path("used/thing").write_text("")
    arguments, words = REFUSED[case]
    assert run("continual", *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_options_go_to_their_own_task():
    options = ["countdown:min_numbers=2", "reasoning_gym:leg_counting:min_animals=2"]
    given = ["--tasks", "countdown,reasoning_gym:leg_counting,countdown", "--generations", "4"]
    for option in options:
        given += ["--task-option", option]
    args = cli.build_parser().parse_args(["continual", *given, *DECAY, "--seed", "7"])
    stages = plan(Path("out"), args.tasks.split(","), [4, 4, 4])
    sequence = TaskSequence(args, Path("out"), stages, {})
    first, second, third = (stage_args(sequence, stage) for stage in stages)
    assert first.task_option == third.task_option == ["min_numbers=2"]
    assert second.task_option == ["min_animals=2"] and second.task == "reasoning_gym:leg_counting"
    assert [a.seed for a in (first, second, third)] == [7, 1_000_007, 2_000_007]
    assert [a.anchor_model for a in (first, second)] == [None, args.model]
    assert second.model == "out/stage-1-countdown/model" and first.model == args.model
    assert len({stage.folder for stage in stages}) == 3


def test_a_stage_that_was_killed_before_it_wrote_anything_starts_anew(there):
    shutil.copytree("whole", "early")
    for path in Path("early", STAGES[1]).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("early", STAGES[1], ".config.json.tmp").write_text("{")
    assert run("continual", "--resume", "early") == 0
    assert weights(f"early/{STAGES[1]}/model") == weights(f"whole/{STAGES[1]}/model")


def test_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("continual", "--tasks", "arithmetic") == 2
    assert "one process" in capsys.readouterr().err


def test_an_interval_of_many_peaks_flattens_no_curve() -> None:
    curve = [{"at": at, "of_peak": share, "of_peak_95": [0.0, 90.0]}
             for at, share in ((0, 0.0), (3, 1.0), (6, 1.2))]  # fmt: skip
    assert continual_plots.top_of([{"curve": curve}]) == pytest.approx(1.62)
    assert continual_plots.top_of([{"curve": []}]) == 1.35

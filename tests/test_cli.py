"""The command line: what a user can mend is one paragraph and exit code 2, whatever it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from esfast import Anchor, ParameterTable, Weights, _core, cli, train_flags
from esfast.journal import read_journal
from esfast.models import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str) -> int:
    """The exit code of `esfast ARGUMENTS`, in this process."""
    try:
        return cli.main(list(arguments))
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = {
    "an unknown command": (["fly"], "invalid choice: 'fly'"),
    "no command": ([], "COMMAND"),
    "an unknown flag": (["train", "--sigmas", "1"], "--sigmas"),
    "a shortened flag": (["train", "--sig", "1"], "--sig"),
    "a word for a number": (["train", "--sigma", "much"], "'much' is not a number above 0"),
    "a negative sigma": (["train", "--sigma=-1"], "'-1' is not a number above 0"),
    "nan": (["train", "--alpha", "nan"], "'nan' is not a number above 0"),
    "no generations": (["train", "--generations", "0"], "'0' is not a whole number of 1 or more"),
    "an odd antithetic population": (["train", "--population-size", "7"], "make it even"),
    "a population of one": (
        ["train", "--population-size", "1", "--no-antithetic"],
        "population_size is 1",
    ),
    "an unknown noise": (["train", "--noise", "pink"], "gaussian"),
    "lambda without a type": (["train", "--weight-decay-lambda", "1"], "--weight-decay-type"),
    "a decay that jumps": (
        ["train", "--weight-decay-type", "l2", "--weight-decay-lambda", "1000"],
        "Lower lambda or alpha",
    ),
    "an unknown task": (["train", "--task", "chess"], "there is no task 'chess'"),
    "an unknown data set": (["train", "--task", "reasoning_gym:nim"], "no data set 'nim'"),
    "a missing file": (["train", "--task", "gsm8k", "--data", "no.jsonl"], "cannot read no.jsonl"),
    "a task without data": (["train", "--task", "gsm8k"], "--data"),
    "data without a reward": (["train", "--data", "no.jsonl"], "--reward module:function"),
    "an unknown option": (["train", "--task-option", "digits=3"], "has no option digits"),
    "an option called name": (["train", "--task-option", "name=x"], "has no option name"),
    "an option called self": (
        ["train", "--task", "reasoning_gym:gcd", "--task-option", "self=1"],
        "refuses its options",
    ),
    "an option of another name": (
        ["train", "--task", "reasoning_gym:gcd", "--task-option", "seed=3"],
        "which it calls problems_seed",
    ),
    "an option that a flag overrules": (
        ["train", "--reward", "json:loads", "--data", "no.jsonl", "--task-option", "timeout=1"],
        "--task-option timeout=1 would be overruled by --reward-timeout",
    ),
    "an option that a given flag overrules": (
        ["train", "--task", "gsm8k", "--data", "no.jsonl", "--task-option", "data=other.jsonl"],
        "--task-option data=other.jsonl would be overruled by --data",
    ),
    "an option without value": (["train", "--task-option", "digits"], "name=value"),
    "a reward without data": (["train", "--reward", "json:loads"], "--data"),
    "a reward for another task": (
        ["train", "--task", "countdown", "--reward", "json:loads"],
        "leave out --task countdown",
    ),
    "a long answer limit of nothing": (["train", "--max-new-tokens", "0"], "whole number"),
    "an unknown logger": (["train", "--log-to", "paper"], "tensorboard"),
    "a folder in use": (["train", "--output", "used"], "used is there already"),
    "an unknown model": (["train", "--model", "no/such/model/here"], "no/such/model/here"),
    "a folder that is no model": (["train", "--model", "used"], "used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_mended_is_one_paragraph_and_exit_code_2(case, here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (here / "used").mkdir()
    (here / "used" / "thing").write_text("")
    arguments, expected = REFUSED[case]
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err and out == ""
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    assert err.startswith("esfast")
    assert sorted(path.name for path in here.iterdir()) == ["used"]


@pytest.mark.parametrize(
    "command", ["train --model {0}", "forgetting {0} --base {0} --kl-prompts questions:capitals"]
)
def test_what_the_extra_train_brings_is_asked_for(command, here, tiny_model):
    code = "import sys; sys.modules['transformers'] = None; from esfast.cli import main; main()"
    words = [*command.format(tiny_model).split(), "--output", "out"]
    ended = subprocess.run([sys.executable, "-c", code, *words], text=True, capture_output=True)
    assert "pip install -c constraints.txt '.[train]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("esfast.train_command.run_train", broken)
    with pytest.raises(ZeroDivisionError):
        run("train")


def test_a_machine_without_a_temporary_folder_is_told_of_it(monkeypatch, capsys):
    def nowhere(args):
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/no/such/folder"])
        tempfile.gettempdir()

    monkeypatch.setattr("esfast.info.run_info", nowhere)
    assert run("info") == 2
    assert re.match(r"esfast: cannot use .*TMPDIR.*/no/such/folder", capsys.readouterr().err)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("5 GB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 GB\nframe 1"),
    ],
)
def test_memory_that_runs_out_is_said(monkeypatch, capsys, error):
    def broken(args):
        raise error

    monkeypatch.setattr("esfast.train_command.run_train", broken)
    assert run("train") == 2
    err = capsys.readouterr().err
    assert "not enough memory (" in err and "5 GB" in err and "frame" not in err


@pytest.mark.parametrize("name", ["train", "grpo", "forgetting", "replay"])
def test_what_takes_less_memory_is_a_flag_of_the_command(name, monkeypatch, capsys):
    def broken(args):
        raise MemoryError

    (place,) = (run for command, _, run, _ in cli.COMMANDS if command == name)
    monkeypatch.setattr(place.replace(":", "."), broken)
    needed = {"forgetting": ["--base", "b", "--output", "o"], "replay": ["--base=b", "--output=o"]}
    rest = [*needed[name], "run"] if name in needed else []
    assert run(name, *rest) == 2
    flags = re.findall(r"--[a-z-]+", capsys.readouterr().err)
    assert run(name, "--help") == 0
    assert flags and set(flags) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_too_little_memory_is_said_before_the_model_is_loaded(vowels, monkeypatch, capsys):
    monkeypatch.setattr("esfast.resources.available_memory", lambda: 1000)
    assert run(*vowels) == 2
    assert "of memory" in capsys.readouterr().err and not Path("run").exists()


def test_info_says_what_is_there(capsys):
    assert run("info") == 0
    out = capsys.readouterr().out
    assert f"{_core.target()} (selected)" in out
    for fact in ("esfast", "noise version", "targets", "CUDA devices", "build compiler", "torch"):
        assert any(line.startswith(fact) for line in out.splitlines()), fact


def test_info_follows_a_forced_target():
    environment = {**os.environ, "ESFAST_TARGET": "scalar"}
    done = subprocess.run(
        [sys.executable, "-m", "esfast", "info"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "scalar (selected)" in done.stdout


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("esfast 0.")


def test_the_flags_carry_the_fields_names(capsys):
    assert run("train", "--help") == 0
    text = capsys.readouterr().out
    for flag in ("sigma", "alpha", "population-size", "weight-decay-type", "weight-decay-lambda"):
        assert f"--{flag} " in text
    assert "--no-antithetic" in text and "--memory {lean,shadow,master}" in text


# --- runs of a tiny model ---------------------------------------------------------------------

REWARD = """
def vowels(example, completion):
    return sum(completion.count(letter) for letter in "aeiou") / 8, "more vowels"
"""


@pytest.fixture
def vowels(here, tiny_model) -> list[str]:
    (here / "rewards.py").write_text(REWARD)
    prompts = [json.dumps({"prompt": f"Say something about {n}."}) for n in range(20)]
    (here / "prompts.jsonl").write_text("\n".join(prompts))
    return [
        *("train", "--model", str(tiny_model), "--reward", "rewards:vowels"),
        *("--data", "prompts.jsonl", "--dtype", "float32", "--max-new-tokens", "8"),
        *("--sigma", "0.02", "--alpha", "0.02", "--population-size", "8", "--prompts", "4"),
        *("--eval-every", "2", "--output", "run"),
    ]


def test_a_run_from_flags_to_a_model_that_transformers_loads(vowels, tiny_model, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run(*vowels, "--generations", "3", "--seed", "3") == 0
    out = capfd.readouterr().out
    assert "held-out score" in out and out.count("  after   ") == 4
    assert {path.name for path in Path("run").iterdir()} == {
        *("config.json", "metrics.jsonl", "journal.esj", "samples.json", "summary.json"),
        *("plots", "model"),
    }
    config = json.loads(Path("run/config.json").read_text())
    assert config["settings"]["strategy"]["seed"] == 3 and config["task"]["name"] == "custom"
    assert config["made"]["noise_version"] == 1 and config["made"]["command"].startswith(
        "esfast train --model"
    )
    tuned = AutoModelForCausalLM.from_pretrained("run/model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert tuned.keys() == base.keys() and any((tuned[n] != base[n]).any() for n in base)
    assert AutoTokenizer.from_pretrained("run/model")("a b") == AutoTokenizer.from_pretrained(
        tiny_model
    )("a b")


def test_the_same_flags_give_the_same_run(vowels, capfd):
    lines = []
    for name in ("one", "two"):
        flags = ("--generations", "2", "--no-plots", "--prior-size", "3")
        assert run(*vowels[:-1], name, *flags) == 0
        assert "--prior-size 3 changes nothing here: it goes with --prior-tasks" in (
            capfd.readouterr().out
        )
        lines.append((Path(name) / "journal.esj").read_bytes())
    assert lines[0] == lines[1] and len(read_journal("one").generations) == 2


def test_decay_reads_its_anchor_from_the_models_file(vowels, tiny_model):
    """In the file's fp32, where the run's weights are bf16."""
    flags = ["--weight-decay-type", "l2", "--weight-decay-lambda", "10", "--dtype", "bfloat16"]
    assert run(*vowels, *flags, "--generations", "1", "--eval-size", "1", "--no-plots") == 0
    settings = json.loads(Path("run/config.json").read_text())["settings"]
    assert settings["strategy"]["decay"] == {"kind": "l2", "weight": 10.0}
    table = ParameterTable.from_module(load_model(tiny_model, dtype=torch.bfloat16).model)
    anchors = (Anchor.from_safetensors(tiny_model, table), Anchor.in_memory(table))
    file, live = (Weights(table, anchor=anchor).anchor_checksum() for anchor in anchors)
    assert read_journal("run").header.anchor_checksum == file != live


def test_ctrl_c_in_the_middle_leaves_a_whole_run(vowels):
    few = ["--eval-size", "2"]
    command = [sys.executable, "-m", "esfast", *vowels, *few, "--generations", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "held-out" in out
    assert "esfast: interrupted; run is complete up to generation" in err
    done = json.loads(Path("run/summary.json").read_text())["generations"]
    written = len(read_journal("run").generations)
    assert written - done in (0, 1) and done >= 1
    assert Path("run/model/model.safetensors").stat().st_size > 1000
    assert (Path("run/plots") / "reward.png").exists()


def test_the_example_reward_scores_its_own_prompts(monkeypatch):
    from esfast.tasks import make_task

    monkeypatch.chdir(EXAMPLES)
    task = make_task("custom", reward="short_answers:score", data="short_answers.jsonl")
    try:
        for example in task.held_out(100):
            name = example.data["row"]["names"][0]
            assert task.score(example, f"It is {name}.").value == 1.0
            assert task.score(example, "I do not know.").value == 0.0
            assert task.score(example, f"It is {name}" + " indeed" * 20).value == pytest.approx(0.1)
    finally:
        task.close()


def test_the_example_loop_learns():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_loop.py")], capture_output=True, text=True, check=True
    )
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 10 and losses[-1] < 0.1 < losses[0]


def test_the_defaults_are_the_default_job():
    args = cli.build_parser().parse_args(["train"])
    assert train_flags.task_of(args).name == "arithmetic"
    assert (args.sigma, args.alpha, args.memory, args.antithetic) == (0.003, 0.006, "lean", True)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_job_learns_its_task(here, seed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = [sys.executable, "-m", "esfast", "train", "--output", "run", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["rise_in_standard_errors"] > 3
    assert summary["held_out_after"]["solved"] > summary["held_out_before"]["solved"] + 0.3
    assert summary["peak_over_inference"] <= 1.2
    model = AutoModelForCausalLM.from_pretrained("run/model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    question = [{"role": "user", "content": "What is 2 + 3? Reply with the bare equation."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=13, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(answer, skip_special_tokens=True).startswith("2 + 3 = 5")


def test_every_flag_says_what_it_is_and_its_default(capsys):
    silent = []
    subparsers = cli.build_parser()._subparsers._group_actions[0]
    for name, command in subparsers.choices.items():
        silent += [f"{name} {a.dest}" for a in command._actions if not a.help]
    assert not silent
    assert run("grpo", "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "completions a prompt (default: 8)" in told
    assert "weight of KL to the start (default: 0.0)" in told
    assert "all cores if not given --batch-size" in told  # no "default: None"


def test_info_names_what_the_commands_may_need(capsys):
    assert run("info") == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts.keys() >= {
        "transformers",
        "vllm",
        "ray",
        "trl",
        "lm-eval",
        "gepa",
        "torch",
        "cores",
    }

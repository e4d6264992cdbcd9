"""What a run says when it is over."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from esfast import plots
from esfast.errors import MENDABLE
from esfast.failures import visible
from esfast.held_out import HeldOut
from esfast.interrupts import INTERRUPTED
from esfast.measure import FINISH, LOOP, SETUP
from esfast.prior.scores import KINDS
from esfast.training_run import SAMPLES_SHOWN, RunSettings, TrainResult

LONGEST_SHOWN = 200
REASONS_SHOWN = 3


def print_result(console: Console, result: TrainResult, folder: Path) -> None:
    """Held-out score before and after, four answers before and after, time, memory, the folder."""
    for line in [*result_lines(result), f"run folder: {folder}"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def result_lines(result: TrainResult) -> list[str]:
    """The same without the folder, a line each."""
    lines = [*_held_out_lines(result), "", *_sample_lines(result)]
    return [*lines, *prior_lines(result.prior.summary()), *_cost_lines(result)]


def _held_out_lines(result: TrainResult) -> list[str]:
    before, after, rise = result.before, result.after, result.rise
    if before is None:
        return ["", "no held-out prompts were answered"]
    if after is None or rise is None:
        return ["", f"held-out score  {before.text()} before; not measured since"]
    lines = [
        "",
        f"held-out score  {before.text()} -> {after.text()}   95 % intervals, "
        f"{len(before.scores)} prompts, generation {before.generation} and {after.generation}",
        f"rise            {rise[0]:+.3f}, {_in_errors(rise[1])}",
    ]
    failed = [(h.failed, when) for h, when in ((before, "before"), (after, "after")) if h.failed]
    for count, when in failed:
        lines.append(f"not scored      {count} of the held-out answers {when}: the failure reward")
    if before.solved is not None and after.solved is not None:
        lines.append(f"exactly right   {_share(before)} -> {_share(after)}")
    return lines


def _in_errors(errors: float) -> str:
    return f"{errors:.1f} standard errors" if math.isfinite(errors) else "the same for every prompt"


def _share(held_out: HeldOut) -> str:
    low, high = held_out.solved_interval or (0.0, 0.0)
    return f"{held_out.solved:.3f} [{low:.3f}, {high:.3f}]"


def _sample_lines(result: TrainResult) -> list[str]:
    if result.before is None or result.after is None:
        return []
    lines = []
    for index, example in enumerate(result.prompts[:SAMPLES_SHOWN]):
        last = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
        lines += [
            _shown(last),
            f"  before  {_shown(result.before.completions[index])}",
            f"  after   {_shown(result.after.completions[index])}",
        ]
    return [*lines, ""]


def prior_lines(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A block a prior task: where it began, its worst, where it ended; greedy and sampled."""
    if not outcomes:
        return []
    lines = ["prior tasks     95 % intervals; recovery is final - worst"]
    for task in outcomes:
        failed = f", {task['failed']} answers not scored" if task["failed"] else ""
        lines.append(f"  {task['task']}  ({task['metric']}, {task['prompts']} prompts{failed})")
        lines += [_outcome_line(kind, task[kind]) for kind in KINDS if task[kind]]
    return [*lines, ""]


def _outcome_line(kind: str, part: Mapping[str, Any]) -> str:
    (low, high), change = part["before_95"], part["change_95"]
    spread = f" [{change[0]:+.3f}, {change[1]:+.3f}]" if change else ""
    return (
        f"    {kind:8}  before {part['before']:.3f} [{low:.3f}, {high:.3f}]  "
        f"worst {part['worst']:.3f} at generation {part['worst_generation']}  "
        f"final {part['final']:.3f}  change {part['change']:+.3f}{spread}  "
        f"recovery {part['recovery']:+.3f}"
    )


def _cost_lines(result: TrainResult) -> list[str]:
    clock, memory = result.clock, result.memory
    loop = 100 * clock.outside_share()
    run = 100 * clock.outside_share((*LOOP, SETUP, FINISH))
    lines = [
        f"time            {sum(clock.seconds.values()):.0f} s; outside generation and scoring: "
        f"{loop:.1f} % of the loop, {run:.1f} % of the run with loading and saving",
    ]
    if memory.ratio is not None and memory.peak_bytes and memory.inference_bytes:
        lines.append(
            f"peak memory     {memory.peak_bytes / 1e6:.0f} MB, {memory.ratio:.3f} times the "
            f"{memory.inference_bytes / 1e6:.0f} MB of generating without training"
        )
    if result.cost is not None:
        lines += [_account_line(result.cost["training"]), _measuring_line(result.cost)]
        lines += [_search_line(part) for name, part in result.cost.items() if name == "search"]
    if result.failed_rewards:
        lines.append(f"failed rewards  {result.failed_rewards} (each got the failure reward)")
    for failure in result.failures[:REASONS_SHOWN]:
        lines.append(f"  {failure['count']} times: {failure['reason'][:LONGEST_SHOWN]}")
    return lines


def _account_line(training: Mapping[str, int]) -> str:
    return (
        f"training cost   {training['prompt']:,} prompt and {training['generated']:,} generated "
        f"tokens, {training['backward']:,} backward; {training['forward_flops'] / 1e12:.3g} TFLOP "
        f"forward, {training['backward_flops'] / 1e12:.3g} backward"
    )


def _search_line(search: Mapping[str, int]) -> str:
    return (
        f"prompt search   {search['prompt']:,} prompt and {search['generated']:,} generated "
        f"tokens, {search['forward_flops'] / 1e12:.3g} TFLOP, beside the training cost"
    )


def _measuring_line(cost: Mapping[str, Any]) -> str:
    """What was spent on scores, and not on training."""
    parts = []
    for name, part in (("held-out", cost["evaluation"]), ("prior tasks", cost["prior"])):
        if part is None:
            parts.append(f"{name} not known")
        elif part["prompt"]:
            parts.append(
                f"{name} {part['prompt']:,} prompt and {part['generated']:,} generated tokens, "
                f"{part['flops'] / 1e12:.3g} TFLOP"
            )
    return f"measuring cost  {'; '.join(parts)}"


def _shown(text: str) -> str:
    line = visible(text)
    return line if len(line) <= LONGEST_SHOWN else line[: LONGEST_SHOWN - 3] + "..."


def exit_code(result: TrainResult, output: Path, config: RunSettings, draw: bool) -> int:
    """Draws the run's pictures; 0, 130 where Ctrl-C ended it before its last generation, or 2 where
    every reward failed: the failure reward is the same for all, and moves nothing."""
    if draw:
        plots.draw_run(output)
    if result.status == "interrupted":
        print(
            f"esfast: interrupted; {output} is complete up to generation {result.generations} of "
            f"{config.generations}.",
            file=sys.stderr,
        )
        return INTERRUPTED
    if 0 < result.failed_rewards == result.generations * config.completions:
        print(
            f"esfast: all {result.failed_rewards} rewards failed, so nothing was learnt. Mend what "
            "the reasons above name, and start a new run.",
            file=sys.stderr,
        )
        return MENDABLE
    return 0

"""A flag without effect is told: one line each, and none for those that act."""

from __future__ import annotations

import pytest

from esfast import cli
from esfast.fast_slow_command import add_fast_slow_arguments
from esfast.grpo_command import add_grpo_arguments
from esfast.idle_flags import GOES_WITH, told_idle
from esfast.train_flags import add_train_arguments

ADDERS = {
    "train": add_train_arguments,
    "grpo": add_grpo_arguments,
    "fast-slow": add_fast_slow_arguments,
}
IDLE = {
    "train": "",
    "train --reward-timeout 10": "",  # its default
    "train --reward-timeout 5": "reward-timeout",
    "train --task countdown --failure-reward -1 --reward-memory 2": "failure-reward reward-memory",
    "train --task reasoning_gym:gcd --failure-reward -1 --reward-timeout 5": "",
    "train --reward a:b --data c --reward-workers 2 --reward-memory 0": "",
    "train --prior-size 3 --prior-temperature 2": "prior-size prior-temperature",
    "train --prior-tasks arithmetic --prior-size 3 --prior-every 1": "",
    "grpo --prior-samples 0 --reward-workers 2": "reward-workers prior-samples",
    "fast-slow --reflection-timeout 5": "reflection-timeout",
    "fast-slow --reflection a:b --reflection-timeout 5 --reward-memory 1": "",
    "fast-slow --reflection a:b --reflection-tokens 64": "reflection-tokens",
    "fast-slow --reflection-temperature 0.5": "",
}


@pytest.mark.parametrize("line", IDLE)
def test_what_changes_nothing_is_told(line):
    args = cli.build_parser().parse_args(line.split())
    told = told_idle(args, ADDERS[args.command])
    assert [text.split()[0] for text in told] == [f"--{name}" for name in IDLE[line].split()]
    assert all("changes nothing here: it goes with" in text for text in told)


def test_the_flags_of_the_table_are_there():
    names = {name for _, flags, _ in GOES_WITH for name in flags}
    assert names <= vars(cli.build_parser().parse_args(["fast-slow"])).keys()

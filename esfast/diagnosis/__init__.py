"""`esfast forgetting`: what it measures with esfast.forgetting, written, drawn and shown.

command.py   flags, and the walk over runs and checkpoints
prompts.py   which prompts are answered
files.py     forgetting.json (its keys: esfast/forgetting/__init__.py) and the CSV files
table.py     what the console shows
plots.py     the PNGs
steps.py     the bar
"""

from __future__ import annotations

from esfast.diagnosis.command import add_forgetting_arguments, run_forgetting

__all__ = ["add_forgetting_arguments", "run_forgetting"]

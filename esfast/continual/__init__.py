"""One task after another from the same weights.

stages.py   a folder of runs, each from the weights that the one before ended with
results.py  scores by task and stage, transfer and forgetting, curves as shares of their peak
"""

from esfast.continual.results import results
from esfast.continual.stages import Stage, chain_of, handed_on, plan

__all__ = ["Stage", "chain_of", "handed_on", "plan", "results"]

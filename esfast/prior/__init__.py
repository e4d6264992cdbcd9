"""Prior tasks: what a model could do before a fine-tune, measured while it is fine-tuned.

settings.py    every how many generations, how many prompts and answers
scores.py      what one task scored at one generation, and what came of it over a run
evaluation.py  PriorTasks: a set of tasks evaluated on whatever weights an engine holds
harness.py     tasks of lm-evaluation-harness on the live model
"""

from esfast.prior.evaluation import PriorTask, PriorTasks, make_own_prior_task, make_prior_task
from esfast.prior.scores import Estimate, PriorScore, outcome
from esfast.prior.settings import PriorSettings

__all__ = [
    "Estimate",
    "PriorScore",
    "PriorSettings",
    "PriorTask",
    "PriorTasks",
    "make_own_prior_task",
    "make_prior_task",
    "outcome",
]

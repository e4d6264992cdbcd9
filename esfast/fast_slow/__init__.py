"""Fast-slow training (arXiv 2605.12484): prompts evolve fast, weights slowly, in cycles.

fast   GEPA evolves the instruction before each problem, on the problems of the cycle's
       batches, under the weights as they are; K prompts are kept from its Pareto front
slow   T generations of evolution strategies, each problem's answers split over the K prompts

instructed.py   a task whose prompts begin with an instruction
split.py        which member sees which prompt; the rollout that asks so
search.py       the fast phase: GEPA over an engine and a task
reflection.py   who writes new instructions: the model itself, or a function of the user's
cycles.py       what a cycle found, as prompts.jsonl keeps it
trainer.py      the loop of `esfast train`, with a fast phase before each cycle
"""

"""How several workers share a run: they exchange scalars, never weights.

    workers.py     what a run asks of its workers, and a run that has none
    torchrun.py    one process each, started by torchrun, over gloo

Every worker holds the model and applies every update itself, from the same record.
"""

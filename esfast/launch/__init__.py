"""How several workers share a run: they exchange scalars, never weights.

    workers.py     what a run asks of its workers, and a run that has none
    torchrun.py    one process each, started by torchrun, over gloo
    ray.py         an engine an actor, on a cluster of Ray's; ray_*.py and watch.py are its parts

Every worker holds the model and applies every update itself, from the same record.
"""

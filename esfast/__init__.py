"""esfast: evolution-strategies fine-tuning of language models, exact to the bit.

Perturb the weights from a seed, run inference, score, and move the weights along the noise that
scored well: no gradients, no optimizer state, no stored noise.
"""

import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

BEGAN = time.perf_counter()  # of this process, as far as it is esfast's

# Torch's threads (libgomp) spin while they wait for each other, with the processor taken: where
# another program needs a core, a two-thread generation of 0.4 s took over a minute, and 2.7 s with
# this. On a quiet machine it changes nothing measurable (0.378 s against 0.374). libgomp reads it
# when torch is loaded, so it has to be set before; a value of the user's stays.
if "torch" not in sys.modules:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

if find_spec("esfast._core") is None:
    raise ImportError(
        f"{Path(__file__).parent} is a source tree without esfast's compiled core, and Python "
        "found it first. Run from another folder to use the installed esfast, or build the core "
        "here with `python setup.py build_ext --inplace`."
    )

from esfast._core import noise_version as NOISE_VERSION
from esfast.errors import ConfigError, DataError, EsfastError, ParameterError, StateError

if TYPE_CHECKING:
    from esfast.anchor import Anchor
    from esfast.evolution import EvolutionStrategy, StepReport
    from esfast.journal import read_journal
    from esfast.live_weights import MemoryUse
    from esfast.members import Member, generation_seed, member_seed, noise
    from esfast.parameters import ParameterTable
    from esfast.replay import keep_journal
    from esfast.segments import Segment
    from esfast.strategy import AnchoredDecay, Strategy, StrategyConfig
    from esfast.update import UpdateReport
    from esfast.weights import Weights

__version__ = "0.1.0"

__all__ = [
    "NOISE_VERSION",
    "Anchor",
    "AnchoredDecay",
    "ConfigError",
    "DataError",
    "EsfastError",
    "EvolutionStrategy",
    "Member",
    "MemoryUse",
    "ParameterError",
    "ParameterTable",
    "Segment",
    "StateError",
    "StepReport",
    "Strategy",
    "StrategyConfig",
    "UpdateReport",
    "Weights",
    "generation_seed",
    "keep_journal",
    "member_seed",
    "noise",
    "read_journal",
]

# The other public names, by where they come from: loaded when they are first used, as most need
# torch, which takes a second that `esfast --help` and a script that reads journals do without.
_ROOMS = {
    "anchor": ("Anchor",),
    "evolution": ("EvolutionStrategy", "StepReport"),
    "journal": ("read_journal",),
    "live_weights": ("MemoryUse",),
    "members": ("Member", "generation_seed", "member_seed", "noise"),
    "parameters": ("ParameterTable",),
    "replay": ("keep_journal",),
    "segments": ("Segment",),
    "strategy": ("AnchoredDecay", "Strategy", "StrategyConfig"),
    "update": ("UpdateReport",),
    "weights": ("Weights",),
}

if not TYPE_CHECKING:  # which takes a module with it to have any name

    def __getattr__(name: str) -> Any:
        for room, names in _ROOMS.items():
            if name in names:
                found = globals()[name] = getattr(import_module(f"esfast.{room}"), name)
                return found
        if name.isidentifier() and find_spec(f"esfast.{name}") is not None:
            return import_module(f"esfast.{name}")  # esfast.journal without an import of its own
        raise AttributeError(f"module 'esfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

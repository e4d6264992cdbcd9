"""esfast: evolution-strategies fine-tuning of language models, exact to the bit.

Perturb the weights from a seed, run inference, score, and move the weights along the noise that
scored well: no gradients, no optimizer state, no stored noise.
"""

from esfast._core import noise_version as NOISE_VERSION
from esfast.anchor import Anchor
from esfast.errors import ConfigError, DataError, EsfastError, ParameterError, StateError
from esfast.evolution import EvolutionStrategy, StepReport
from esfast.journal import read_journal
from esfast.members import Member, generation_seed, member_seed, noise
from esfast.parameters import ParameterTable, Segment
from esfast.replay import keep_journal
from esfast.strategy import AnchoredDecay, Strategy, StrategyConfig
from esfast.weights import MemoryUse, UpdateReport, Weights

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

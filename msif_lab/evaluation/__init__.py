"""Scores against the truth: retraining without examples, and how well predictions agree with it."""

from .comparison import (
    Agreement,
    agreement,
    compare,
    compare_methods,
    detection,
    method_table,
    noise_ceiling,
    row_correlations,
    row_ranks,
)
from .guided import Guidance, guided
from .removals import Effects, EffectsOverSeeds, random_removals, removal_effects

__all__ = [
    "Agreement",
    "Effects",
    "EffectsOverSeeds",
    "Guidance",
    "agreement",
    "compare",
    "compare_methods",
    "detection",
    "guided",
    "method_table",
    "noise_ceiling",
    "random_removals",
    "removal_effects",
    "row_correlations",
    "row_ranks",
]

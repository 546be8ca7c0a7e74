"""Scores against the truth: retraining without examples, and how well predictions agree with it."""

from .comparison import (
    Agreement,
    agreement,
    compare,
    compare_methods,
    method_table,
    noise_ceiling,
    precision_recall,
    row_correlations,
    row_ranks,
)
from .curation import Interventions, intervene
from .guidance import Guidance, guided
from .rankings import (
    Detection,
    bootstrap_scores,
    controls,
    detection,
    out_of_fold,
    predicted_gain,
    stability,
)
from .removals import Effects, EffectsOverSeeds, random_removals, removal_effects

__all__ = [
    "Agreement",
    "Detection",
    "Effects",
    "EffectsOverSeeds",
    "Guidance",
    "Interventions",
    "agreement",
    "bootstrap_scores",
    "compare",
    "compare_methods",
    "controls",
    "detection",
    "guided",
    "intervene",
    "method_table",
    "noise_ceiling",
    "out_of_fold",
    "precision_recall",
    "predicted_gain",
    "random_removals",
    "removal_effects",
    "row_correlations",
    "row_ranks",
    "stability",
]

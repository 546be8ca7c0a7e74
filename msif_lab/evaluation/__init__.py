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
from .guided import Guidance, guided
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
    "Detection",
    "Interventions",
    "bootstrap_scores",
    "controls",
    "detection",
    "intervene",
    "out_of_fold",
    "predicted_gain",
    "stability",
    "Agreement",
    "Effects",
    "EffectsOverSeeds",
    "Guidance",
    "agreement",
    "compare",
    "compare_methods",
    "guided",
    "precision_recall",
    "method_table",
    "noise_ceiling",
    "random_removals",
    "removal_effects",
    "row_correlations",
    "row_ranks",
]

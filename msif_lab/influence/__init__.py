"""Scores of training examples on queries: every method for them, its cost and its result."""

from .baselines import (
    Baseline,
    Entropy,
    GradientDot,
    GradientNorm,
    Loss,
    Margin,
    Random,
    RepresentationSimilarity,
    SingleStage,
    TracIn,
    all_baselines,
)
from .cost import Plan, StagePlan, UnrolledPlan, plan
from .implicit import ImplicitInfluence
from .precision import reduced_precision
from .result import Influence, Ranking, TopInfluence
from .run_check import RunCheck
from .segmented import SegmentedInfluence
from .sweep import AlphaSweep
from .trust import Trust
from .unrolled import UnrolledInfluence

__all__ = [
    "AlphaSweep",
    "Baseline",
    "Entropy",
    "GradientDot",
    "GradientNorm",
    "ImplicitInfluence",
    "Influence",
    "Loss",
    "Margin",
    "Plan",
    "Random",
    "Ranking",
    "RepresentationSimilarity",
    "RunCheck",
    "SingleStage",
    "StagePlan",
    "TopInfluence",
    "TracIn",
    "Trust",
    "UnrolledInfluence",
    "SegmentedInfluence",
    "UnrolledPlan",
    "all_baselines",
    "plan",
    "reduced_precision",
]

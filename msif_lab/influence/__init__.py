"""Scores of training examples on queries: every method for them, its cost and its result."""

from .averaged import AveragedInfluence, InfluenceOverSeeds
from .baselines import (
    Baseline,
    Entropy,
    GradientDot,
    GradientNorm,
    Loss,
    Margin,
    Random,
    RepresentationSimilarity,
    SelfInfluence,
    SingleStage,
    TracIn,
    all_baselines,
)
from .cost import Plan, StagePlan, UnrolledPlan, plan
from .ensembles import trak
from .implicit import ImplicitInfluence
from .precision import reduced_precision
from .result import Influence, Ranking, TopInfluence
from .run_check import RunCheck
from .segmented import SegmentedInfluence
from .subsets import Round, Subset, most_influential
from .sweep import AlphaSweep
from .trust import Trust
from .unrolled import UnrolledInfluence

__all__ = [
    "AlphaSweep",
    "AveragedInfluence",
    "Baseline",
    "Entropy",
    "GradientDot",
    "GradientNorm",
    "ImplicitInfluence",
    "Influence",
    "InfluenceOverSeeds",
    "Loss",
    "Margin",
    "Plan",
    "Random",
    "Ranking",
    "RepresentationSimilarity",
    "SelfInfluence",
    "Round",
    "RunCheck",
    "SingleStage",
    "StagePlan",
    "Subset",
    "TopInfluence",
    "TracIn",
    "Trust",
    "UnrolledInfluence",
    "SegmentedInfluence",
    "UnrolledPlan",
    "all_baselines",
    "most_influential",
    "plan",
    "reduced_precision",
    "trak",
]

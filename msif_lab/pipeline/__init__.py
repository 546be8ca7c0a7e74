"""Stages: how each is trained, what it takes over, and the pipeline that fits and retrains them."""

from .lbfgs import LBFGS
from .pipeline import Pipeline, Retrained
from .recipes import SGD, Adam, AdamW, FitReport, MiniBatch
from .runs import KeptRun, Run
from .seeds import SeedRuns, over_seeds
from .stages import Frozen, Link, Proximal, Stage, WarmStart

__all__ = [
    "LBFGS",
    "SGD",
    "Adam",
    "AdamW",
    "FitReport",
    "Frozen",
    "KeptRun",
    "Link",
    "MiniBatch",
    "Pipeline",
    "Proximal",
    "Retrained",
    "Run",
    "SeedRuns",
    "Stage",
    "WarmStart",
    "over_seeds",
]

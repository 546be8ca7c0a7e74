"""Explorers for JupyterLab: live controls where a kernel runs, a picture everywhere else."""

from .cleaning import CleaningExplorer
from .damping import AlphaDampingExplorer
from .influence import InfluenceExplorer
from .methods import MethodComparison
from .seeds import SeedExplorer
from .slider import FigureSlider

__all__ = [
    "AlphaDampingExplorer",
    "CleaningExplorer",
    "FigureSlider",
    "InfluenceExplorer",
    "MethodComparison",
    "SeedExplorer",
]

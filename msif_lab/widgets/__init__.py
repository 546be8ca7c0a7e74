"""Explorers for JupyterLab: live controls where a kernel runs, a picture everywhere else."""

from .influence import InfluenceExplorer
from .slider import FigureSlider

__all__ = ["FigureSlider", "InfluenceExplorer"]

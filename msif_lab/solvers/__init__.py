"""Solvers of ``H v = a``: exact, iterative, approximate; every solve comes with a report."""

from .conjugate_gradient import ConjugateGradient
from .ekfac import EKFAC
from .exact import Exact, Spectrum, schur_complement
from .lissa import LiSSA
from .lowrank import Jacobi, LowRank
from .minres import MINRES
from .report import SolveReport

__all__ = [
    "EKFAC",
    "MINRES",
    "ConjugateGradient",
    "Exact",
    "Jacobi",
    "LiSSA",
    "LowRank",
    "SolveReport",
    "Spectrum",
    "schur_complement",
]

"""Errors and warnings of msif_lab; every message names what was found and the way out."""

__all__ = [
    "ConvergenceWarning",
    "DataUnavailableError",
    "IndefiniteCurvatureError",
    "MemoryBudgetError",
    "MsifError",
    "NotConvergedError",
    "SavedFileError",
    "SymmetryWarning",
    "UnsmoothTrainingWarning",
    "UnsupportedModelError",
    "UnsupportedModelWarning",
    "WorkerError",
]


class MsifError(Exception):
    """Base of the errors that msif_lab defines.

    Arguments that are wrong in themselves raise a plain ``ValueError`` or ``TypeError``.
    """


class NotConvergedError(MsifError):
    """A fit gave NaN or inf, a series diverged, or a strict solve missed its tolerance."""


class IndefiniteCurvatureError(MsifError):
    """The curvature has a negative eigenvalue where the formula needs a minimum.

    Attributes:
        smallest: the smallest eigenvalue, or the smallest curvature seen, as a float.
    """

    def __init__(self, message: str, smallest: float):
        super().__init__(message)
        self.smallest = smallest


class MemoryBudgetError(MsifError, MemoryError):
    """The work would need more memory than given; raised before it starts, with the estimate."""


class DataUnavailableError(MsifError):
    """No source gave the original bytes of a data set."""


class SavedFileError(MsifError, ValueError):
    """A saved file is damaged, was not written by msif_lab, or holds something else."""


class UnsupportedModelError(MsifError, ValueError):
    """The model is not a deterministic function of each example, or the method cannot treat it.

    The usual cause is dropout or batch statistics left on.
    """


class WorkerError(MsifError, RuntimeError):
    """Worker processes died, and died again when their work was repeated."""


class UnsupportedModelWarning(UserWarning):
    """Some methods will refuse this model; the message says which, and the layer that is why."""


class ConvergenceWarning(UserWarning):
    """Training or a solve stopped short of its tolerance; the message says by how much."""


class SymmetryWarning(UserWarning):
    """The minimum is flat along a symmetry of the model; the message names its parameters."""


class UnsmoothTrainingWarning(UserWarning):
    """A run responds so unevenly to example weights that its derivative predicts no removals."""

"""The error family: every message names what was found and the way out."""

__all__ = [
    "ConvergenceWarning",
    "DataUnavailableError",
    "IndefiniteCurvatureError",
    "MemoryBudgetError",
    "MsifError",
    "NotConvergedError",
    "SavedFileError",
    "UnsmoothTrainingWarning",
    "UnsupportedModelError",
]


class MsifError(Exception):
    """Base of the errors that msif_lab defines; wrong arguments raise ``ValueError`` /
    ``TypeError``.
    """


class NotConvergedError(MsifError):
    """A fit or a solve did not reach its tolerance and was asked to be strict about it."""


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
    """No source of a data set could be reached."""


class SavedFileError(MsifError, ValueError):
    """A saved file is cut off, was changed, or was not written by msif_lab."""


class UnsupportedModelError(MsifError, ValueError):
    """The model is not a deterministic per-example function (dropout or batch statistics are on)."""


class ConvergenceWarning(UserWarning):
    """Training or a solve stopped short of its tolerance; the number is in the message."""


class UnsmoothTrainingWarning(UserWarning):
    """A training run reacts so unevenly to example weights that its derivative will not predict
    removals.
    """

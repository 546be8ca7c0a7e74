"""Exercises of lesson 01, on ridge regression.

Each of the m examples has the loss ½(xᵀθ − y)², the risk is their mean, and λ is the weight decay.
"""

from torch import eye
from torch.linalg import solve

from .marking import Exercise


def _curvature(X, lam):
    return X.T @ X / len(X) + lam * eye(X.shape[1], dtype=X.dtype)


def _leverage(X, lam):
    return (X * solve(_curvature(X, lam), X.T).T).sum(1) / len(X)


def _minimum(X, y, lam):
    return solve(_curvature(X, lam), X.T @ y / len(X))


def _residual(X, y, lam):
    return X @ _minimum(X, y, lam) - y


def _response(X, X_q, lam):
    """How predictions for X_q move with each target, ``(Q, m)``."""
    return X_q @ solve(_curvature(X, lam), X.T) / len(X)


def _pull(X, y, lam, group):
    return X[group].T @ _residual(X, y, lam)[group] / len(X)


def _change(X, y, lam, group):
    """θ without the group minus θ with it, the 1/m as it was."""
    return solve(_curvature(X, lam) - X[group].T @ X[group] / len(X), _pull(X, y, lam, group))


def _singles(X, y, lam, group):
    shares = _residual(X, y, lam) / (1 - _leverage(X, lam)) / len(X)
    return solve(_curvature(X, lam), X[group].T @ shares[group])


def _rescaled(X, y, lam, group):
    keep = [i for i in range(len(X)) if i not in group]
    return _minimum(X[keep], y[keep], lam) - _minimum(X, y, lam)


EXERCISES = {
    "01-1": Exercise(
        expected=_response,
        next="and how do the predictions respond to λ itself (its ∂g/∂λ is shorter still)?",
        mistakes={
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: ∂g/∂y_i is −x_i/m, and line 3 adds a second minus",
            ),
            "no 1/m": (
                lambda right, given: right * len(given["X"]),
                "the 1/m is missing: each target enters the risk through a mean over m patients",
            ),
            "no weight decay": (
                lambda right, given: _response(given["X"], given["X_q"], 0.0),
                "λ is missing from the curvature; H = XᵀX/m + λI",
            ),
            "no inverse": (
                lambda right, given: given["X_q"] @ given["X"].T / len(given["X"]),
                "H is missing: a pull moves the minimum by H⁻¹ times itself",
            ),
        },
    ),
    "01-2": Exercise(
        expected=lambda X, y, lam: _residual(X, y, lam) / (1 - _leverage(X, lam)),
        next=(
            "for whom is it more than 1.5 times the plain residual, and where are they in section "
            "4's figure?"
        ),
        mistakes={
            "not left out": (
                lambda right, given: _residual(**given),
                "those are errors on patients that the model has seen; a fit without patient i is "
                "no longer drawn towards y_i",
            ),
            "times": (
                lambda right, given: _residual(**given) * (1 - _leverage(given["X"], given["lam"])),
                "the error on a patient left out is larger than on one seen; divide by 1 − h",
            ),
            "1 + h": (
                lambda right, given: _residual(**given) / (1 + _leverage(given["X"], given["lam"])),
                "1 + h belongs to a patient added a second time; removal takes the share h away: "
                "1 − h",
            ),
            "change only": (
                lambda right, given: right - _residual(**given),
                "that is the change of the prediction; add the error it starts from",
            ),
            "h without weight decay": (
                lambda right, given: _residual(**given) / (1 - _leverage(given["X"], 0.0)),
                "λ is missing from the curvature in h; H = XᵀX/m + λI",
            ),
        },
    ),
    "01-3": Exercise(
        expected=_change,
        next=(
            "how wrong is the sum of single changes when the two patients are copies of each other?"
        ),
        mistakes={
            "derivative": (
                lambda right, given: solve(_curvature(given["X"], given["lam"]), _pull(**given)),
                "that is the derivative: the curvature still includes the two; take their shares "
                "out of H",
            ),
            "sum of singles": (
                lambda right, given: _singles(**given),
                "that is the sum of two single removals; take both shares out of H at once",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: the change is θ without the two minus θ with them",
            ),
            "mean over the rest": (
                lambda right, given: _rescaled(**given),
                "you took the mean over the patients that stay; removal keeps the 1/m, so that λ "
                "keeps its meaning",
            ),
        },
    ),
}

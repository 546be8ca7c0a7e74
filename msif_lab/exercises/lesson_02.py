"""Exercises of lesson 02."""

from torch import linalg

from .marking import Exercise


def _schur(given):
    """The effective curvature of W when U follows it."""
    return given["H_WW"] - given["H_WU"] @ linalg.solve(given["H_UU"], given["H_WU"].T)


def _pull(given):
    """The example's pull on W, directly and through U."""
    return given["f_W"] - given["H_WU"] @ linalg.solve(given["H_UU"], given["f_U"])


def _embedding_moves(**given):
    return -linalg.solve(_schur(given), _pull(given)) / given["m"]


def _W_alone(b, H_F, theta, **_):
    """The response to λ₁ if U could not move."""
    d = b.shape[1]
    return -b @ linalg.solve(H_F[:d, :d], theta[:d])


EXERCISES = {
    "02-1": Exercise(
        expected=lambda H_WW, H_WU, H_UU, f_W, f_U, m: _embedding_moves(
            H_WW=H_WW, H_WU=H_WU, H_UU=H_UU, f_W=f_W, f_U=f_U, m=m
        ),
        next="for which examples would holding U fixed make no difference?",
        mistakes={
            "U held": (
                lambda right, given: -linalg.solve(given["H_WW"], given["f_W"]) / given["m"],
                "the U block is dropped: that is how W would move if U could not follow",
            ),
            "curvature of W alone": (
                lambda right, given: -linalg.solve(given["H_WW"], _pull(given)) / given["m"],
                "the pull is right, but H_WW is too stiff: U follows, so subtract H_WU H_UU⁻¹ H_UW",
            ),
            "pull on W alone": (
                lambda right, given: -linalg.solve(_schur(given), given["f_W"]) / given["m"],
                "the curvature is right, but the example pulls on U too, and U on W: "
                "f_W − H_WU H_UU⁻¹ f_U",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: more weight on the example moves W down its gradient",
            ),
        },
    ),
    "02-2": Exercise(
        expected=lambda u, G_WT, G_TT: -linalg.solve(G_TT, G_WT.T @ u),
        next="what is missing from this before it is the change of a query?",
        mistakes={
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: G_TW dW + G_TT dT = 0, so dT = −G_TT⁻¹ G_TW dW",
            ),
            "no inverse": (
                lambda right, given: -given["G_WT"].T @ given["u"],
                "G_TT⁻¹ is missing: that is how the pull on the head changes, not how far the "
                "head moves",
            ),
            "not solved": (
                lambda right, given: -given["G_TT"] @ given["G_WT"].T @ given["u"],
                "you multiplied by G_TT, not by its inverse: a stiffer head must move less",
            ),
            "transposed": (
                lambda right, given: right.T,
                "that is the transpose: give one row per parameter of T, one column per example",
            ),
        },
    ),
    "02-3": Exercise(
        expected=lambda b, H_F, theta, m=None: -b @ linalg.solve(H_F, theta)[: b.shape[1]],
        next="and the response to λ₂, which only the second stage knows?",
        mistakes={
            "1/m": (
                lambda right, given: right / given["m"] if given.get("m") else None,
                "you divided by m; but the penalty is not a mean over examples, so it has no 1/m",
            ),
            "U held": (
                lambda right, given: _W_alone(**given),
                "the U block is dropped: the penalty pulls on U as well, and W responds to that",
            ),
            "half": (
                lambda right, given: right / 2,
                "that is half of it: the gradient of λ₁/2 ‖θ‖² is λ₁ θ, without the ½",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: H_F dθ + θ dλ₁ = 0",
            ),
        },
    ),
}

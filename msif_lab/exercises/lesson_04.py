"""Exercises of lesson 04."""

from torch import diag, outer

from .marking import Exercise

EXERCISES = {
    "04-1": Exercise(
        expected=lambda r, p, A_p: float((p @ r) / (p @ A_p)),
        next=(
            "what does the quadratic do along p when p @ A_p is negative, and what should a solver "
            "then say?"
        ),
        mistakes={
            "no curvature": (
                lambda right, given: float((given["p"] @ given["r"]) / (given["p"] @ given["p"])),
                "you divided by p·p, as if the curvature were 1; along p it is p·Hp",
            ),
            "upside down": (
                lambda right, given: 1 / right,
                "upside down: a stronger curvature makes the step shorter",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: r = b − Hx is minus the gradient, so it points downhill",
            ),
        },
    ),
    "04-2": Exercise(
        expected=lambda s, E, a, delta: E @ ((E.T @ a) / (s + delta)),
        next="which δ makes a direction of eigenvalue s count half as much as before?",
        mistakes={
            "no damping": (
                lambda right, given: given["E"] @ ((given["E"].T @ given["a"]) / given["s"]),
                "that is H⁻¹a; add δ to every eigenvalue before you divide",
            ),
            "product": (
                lambda right, given: (
                    given["E"] @ ((given["E"].T @ given["a"]) * (given["s"] + given["delta"]))
                ),
                "that is (H + δI) a, the product; the inverse divides",
            ),
            "eigenvectors as rows": (
                lambda right, given: (
                    given["E"].T @ ((given["E"] @ given["a"]) / (given["s"] + given["delta"]))
                ),
                "eigenvectors are the columns of E, so E.T @ a are the coordinates",
            ),
        },
    ),
    "04-3": Exercise(
        expected=lambda J, prob: J.T @ (diag(prob) - outer(prob, prob)) @ J,
        next=(
            "how large is it for an example predicted with certainty, and what does that do to H⁻¹?"
        ),
        mistakes={
            "diagonal": (
                lambda right, given: given["J"].T @ diag(given["prob"]) @ given["J"],
                "softmax couples the logits: the second derivative has a term −p pᵀ too",
            ),
            "no loss": (
                lambda right, given: given["J"].T @ given["J"],
                "that is JᵀJ, which is right for squared error; the Hessian of this loss by the "
                "logits belongs between them",
            ),
            "plus": (
                lambda right, given: 2 * given["J"].T @ diag(given["prob"]) @ given["J"] - right,
                "the sign of p pᵀ is wrong: softmax's derivative is diag(p) − p pᵀ, a covariance",
            ),
        },
    ),
}

"""Exercises of lesson 03."""

from torch import diag, eye, linalg, zeros

from .marking import Exercise


def _pulled(H_G, W, alpha, everywhere: bool = False):
    """H_G + 2αP with P the identity on W, or on everything."""
    where = zeros(len(H_G), dtype=H_G.dtype)
    where[slice(None) if everywhere else W] = 1
    return H_G + 2 * alpha * diag(where)


def _own_scores(H_G, W, alpha, grad_q, grad_g, everywhere: bool = False):
    return -grad_q.T @ linalg.solve(_pulled(H_G, W, alpha, everywhere), grad_g.T) / len(grad_g)


def _shared_part_only(H_G, W, alpha, grad_q, grad_g):
    block = H_G[W][:, W] + 2 * alpha * eye(len(W), dtype=H_G.dtype)
    return -grad_q[W].T @ linalg.solve(block, grad_g[:, W].T) / len(grad_g)


def _gain(given, factor):
    """The filter of each direction, with this factor before α."""
    pull = factor * given["alpha"]
    return pull / (given["s"] + pull)


def _filtered(given, gain):
    return given["E"] @ (gain * (given["E"].T @ given["c"]))


EXERCISES = {
    "03-1": Exercise(
        expected=lambda G_TT, G_WT, dW: -linalg.solve(G_TT, G_WT.T @ dW),
        next="what is left of it as α goes to 0, and why does the head then forget W*, too?",
        mistakes={
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: G_TW dW′ + G_TT dT = 0, so dT = −G_TT⁻¹ G_TW dW′",
            ),
            "no inverse": (
                lambda right, given: -given["G_WT"].T @ given["dW"],
                "G_TT⁻¹ is missing: a stiff head moves less",
            ),
            "frozen": (
                lambda right, given: -linalg.solve(given["G_TT"], given["G_WT"].T),
                "that is the frozen case, where W′ moves with W* one to one; here it moves by dW′ "
                "only",
            ),
        },
    ),
    "03-2": Exercise(
        expected=lambda s, E, c, alpha: E @ (2 * alpha / (s + 2 * alpha) * (E.T @ c)),
        next=(
            "for which s does the filter let through more than everything, and what does that say "
            "about the minimum?"
        ),
        mistakes={
            "upside down": (
                lambda right, given: _filtered(given, 1 / _gain(given, 2)),
                "upside down: stiff directions must come through least, so s is in the denominator",
            ),
            "no 2": (
                lambda right, given: _filtered(given, _gain(given, 1)),
                "the penalty is α‖W′ − W*‖² without a ½, so its curvature is 2α",
            ),
            "no 2α in front": (
                lambda right, given: right / (2 * given["alpha"]),
                "that is (S + 2αI)⁻¹c; W* enters the gradient as −2αW*, hence the 2α in front",
            ),
            "eigenvectors as rows": (
                lambda right, given: _filtered(given | {"E": given["E"].T}, _gain(given, 2)),
                "eigenvectors are the columns of E, so E.T @ c are the coordinates",
            ),
        },
    ),
    "03-3": Exercise(
        expected=_own_scores,
        next=(
            "as α goes to ∞, which examples can still act through T alone: pretraining's, "
            "finetuning's, or both?"
        ),
        mistakes={
            "2α in front": (
                lambda right, given: 2 * given["alpha"] * right,
                "2α in front is how W* enters; weight j enters with ∇g_j/n and no α",
            ),
            "P everywhere": (
                lambda right, given: _own_scores(**given, everywhere=True),
                "nothing pulls on T: P is the identity on W and zero on T",
            ),
            "no P": (
                lambda right, given: _own_scores(**given | {"alpha": 0.0}),
                "the pull is part of what was minimised, so its 2αP belongs in the Hessian",
            ),
            "shared part only": (
                lambda right, given: _shared_part_only(**given),
                "those are only the rows of W; a finetuning example moves the head as well",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: H d(W′,T) = −∇g_j/n, more weight moves down its gradient",
            ),
            "no mean": (
                lambda right, given: right * len(given["grad_g"]),
                "the 1/n is missing: g_j enters G through a mean over n examples",
            ),
        },
    ),
}

"""Exercises of lesson 09."""

from .marking import Exercise

EXERCISES = {
    "09-1": Exercise(
        expected=lambda gradients, g_bar, m=None: gradients @ g_bar / len(gradients),
        next="an example is in one batch of each epoch; how do its scores of all epochs combine?",
        mistakes={
            "no mean": (
                lambda right, given: given["gradients"] @ given["g_bar"],
                "the step follows the mean over the mini-batch, so each example's share is 1/|B| "
                "of it",
            ),
            "divided by m": (
                lambda right, given: (
                    given["gradients"] @ given["g_bar"] / given["m"] if given.get("m") else None
                ),
                "you divided by m, the size of the data set; this step sees only the |B| examples "
                "of its mini-batch",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped; that the step goes downhill is already in ḡ",
            ),
        },
    ),
    "09-2": Exercise(
        expected=lambda theta_bar, v_bar, hessian, rate: (
            theta_bar + hessian @ (v_bar - rate * theta_bar)
        ),
        next="which v̄ does the next step back receive?",
        mistakes={
            "old v_bar": (
                lambda right, given: given["theta_bar"] + given["hessian"] @ given["v_bar"],
                "that is v̄ as it comes from later steps; first add what v receives through "
                "θ ← θ − ηv",
            ),
            "no Hessian": (
                lambda right, given: given["theta_bar"],
                "you passed θ̄ on unchanged; but θ also determines the gradient of this step",
            ),
            "minus": (
                lambda right, given: 2 * given["theta_bar"] - right,
                "the Hessian term has the wrong sign; the minus of θ ← θ − ηv is already in v̄",
            ),
        },
    ),
    "09-3": Exercise(
        expected=lambda rates, momentum: (1 - momentum) / (2 * float(sum(rates))),
        next=(
            "what happens to α when you finetune twice as long, and does that fit what you know of "
            "early stopping?"
        ),
        mistakes={
            "no 2": (
                lambda right, given: 2 * right,
                "the penalty is α‖W − W*‖² without a ½, so its curvature is 2α",
            ),
            "no momentum": (
                lambda right, given: 1 / (2 * float(sum(given["rates"]))),
                "momentum repeats each gradient, which makes a step 1/(1 − momentum) times as long "
                "in all",
            ),
        },
    ),
}

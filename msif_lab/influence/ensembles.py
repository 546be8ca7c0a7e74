"""Scores that an ensemble of runs gives together, rather than each run on its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..curvature.derivatives import per_example_gradients
from ..data.examples import Examples
from ..objective.checks import ask
from ..pipeline.pipeline import Pipeline
from .baselines import GradientDot

__all__ = ["trak"]

PROJECTION = 256


def trak(
    runs: Sequence[Pipeline],
    queries: Examples,
    seed: int = 0,
    *,
    stage: int | str = 0,
    aggregate=None,
) -> Tensor:
    """TRAK's scores ``(Q, N)`` of one stage's labelled examples on the queries' loss.

    ``mean_s[∇q (ΦᵀΦ)⁻¹ Φᵀ] · mean_s[1 − p]`` with Φ the gradients of the examples' log-odds under
    run s, projected to `PROJECTION` random dimensions; the query's gradient is the one after
    finetuning, in what the stage trains, as in `GradientDot`. Positive: the example raises the
    loss.

    Args:
        runs: trained pipelines of the same stages and data, the ensemble.
        queries: examples of the last stage's task.
        seed: of the projection.
        stage: whose examples are scored.
        aggregate: as in `ImplicitInfluence.score`; then one row.

    Reference: Park et al. (2023, arXiv 2303.14186).
    """
    kernels, doubts = 0.0, 0.0
    for run in runs:
        k = run.index(stage)
        o, full = run.objective(k), run.trained()[k]
        draw = torch.Generator().manual_seed(seed)
        project = torch.randn(o.size, PROJECTION, generator=draw, dtype=o.dtype).to(full)
        project /= math.sqrt(PROJECTION)
        parts = [g @ project for _, g in per_example_gradients(o, full, function=_log_odds)]
        features = torch.cat(parts)
        baseline = GradientDot().fit(run)
        question = ask(run.objective(-1), queries, "loss", aggregate, derivative=True)
        asked = baseline._query_gradients(k, question) @ project
        gram = features.T @ features
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        kernels = kernels + asked @ torch.linalg.solve(gram, features.T) / len(runs)
        with torch.no_grad():
            outputs = torch.cat([o.outputs(full, x) for _, x, _ in o.chunks()])
        right = outputs.softmax(1).gather(1, o.data.y[:, None])[:, 0]
        doubts = doubts + (1 - right) / len(runs)
    return kernels * doubts


def _log_odds(outputs: Tensor, y: Tensor) -> Tensor:
    """``log p_y − log(1 − p_y)``, ``(B,)``."""
    right = torch.nn.functional.one_hot(y, outputs.shape[1]).bool()
    rest = outputs.masked_fill(right, -torch.inf).logsumexp(1)
    return outputs.gather(1, y[:, None])[:, 0] - rest

"""Whether a derivative of the run predicts removals: scores beside reruns under changed weights."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_seed, check_whole, is_number, listed
from ..data.examples import Examples
from ..errors import UnsmoothTrainingWarning
from ..pipeline.pipeline import Pipeline

NONLINEARITY = 0.3  # 0.02 to 0.06 on runs with r > 0.9, above 0.6 on those with r < 0.5 (lesson 09)
# Between derivatives and differences; below 1e-3 on smooth runs, float32 included (test_unrolled).
DISAGREEMENT = 0.05
STEPS = {torch.float64: (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6), torch.float32: (0.3, 0.1, 0.03, 0.01)}


@dataclass(frozen=True)
class RunCheck:
    """What `UnrolledInfluence.check` found for n examples.

    Attributes:
        examples: their positions ``(n,)``.
        steps: changes h in weight that were tried.
        errors: ``(H, n)`` relative distance of central differences from the scores, over queries: a
            V over h, truncation on the right, rounding on the left.
        nonlinearity: ``(n,)`` ``‖q(2) + q(0) − 2 q(1)‖ / ‖q(2) − q(0)‖`` over the weight of the
            example, 0 for a linear response.
        predicted, actual: ``(Q, n)`` change of q on removal.
    """

    examples: Tensor
    steps: tuple[float, ...]
    errors: Tensor
    nonlinearity: Tensor
    predicted: Tensor
    actual: Tensor

    @property
    def error(self) -> float:
        """The worst example's error at its best step."""
        return float(self.errors.amin(0).max())

    def __repr__(self) -> str:
        lines = [
            f"{len(self.examples)} examples: derivative within {self.error:.1e} of central "
            "differences"
        ]
        lines += [
            f"  example {int(i)}: best error {float(e):.1e}, nonlinearity of removal {float(b):.2f}"
            for i, e, b in zip(self.examples, self.errors.amin(0), self.nonlinearity, strict=True)
        ]
        return "\n".join(lines)

    def warn(self, stacklevel: int) -> None:
        """Warn where derivatives miss the differences, or the differences miss the removals."""
        if not self.error <= DISAGREEMENT:
            warnings.warn(
                f"derivatives and central differences of the run are {self.error:.0%} apart for "
                "the worst example at its best step: kinks or rounding spoil one of them. Try "
                "pipeline.double(), smooth activations (tanh, SiLU) and smaller learning rates",
                UnsmoothTrainingWarning,
                stacklevel=stacklevel,
            )
        nonlinearity = float(self.nonlinearity.median())
        if nonlinearity > NONLINEARITY:
            warnings.warn(
                f"removing an example and doubling it differ by {nonlinearity:.0%} of their "
                f"effect (median of {len(self.examples)}): this run is too unsmooth for "
                "derivatives to predict removals. Smaller or decaying learning rates, warm-up, "
                "smooth activations (tanh, SiLU) and larger batches help",
                UnsmoothTrainingWarning,
                stacklevel=stacklevel,
            )


def check_run(
    pipeline: Pipeline,
    derivative: Callable[[], Tensor],
    n: int,
    queries: Examples,
    k: int,
    steps: Sequence[float] | None,
    seed: int,
) -> RunCheck:
    """Derivatives in the weights of n random examples of stage k, beside reruns of all stages.

    Args:
        pipeline: what is rerun.
        derivative: ``∂q/∂w`` of all the stage's examples ``(Q, m)``, computed only after n is
            checked.
        n, queries, steps, seed: as in `UnrolledInfluence.check`.
    """
    m, dtype = len(pipeline.stages[k].data), pipeline.objective(k).dtype
    n = check_whole("n", n, most=m, why="the number of examples")
    check_seed("seed", seed)
    steps = STEPS.get(dtype, STEPS[torch.float32]) if steps is None else steps
    steps = tuple(listed("steps", steps, "changes in weight, such as (0.1, 0.01)"))
    if not steps or not all(is_number(h) and 0 < h < math.inf for h in steps):
        raise ValueError(f"steps={list(steps)} must be positive numbers, such as (0.1, 0.01)")
    examples = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:n]
    scores = derivative()[:, examples]
    up, down = _both_ways(pipeline, queries, k, examples, (*steps, 1.0))  # (Q, H + 1, n)
    widths = 2 * torch.tensor(steps, dtype=up.dtype, device=up.device)[:, None]
    differences = (up - down)[:, :-1] / widths
    size = scores.norm(dim=0).clamp(min=1e-30)
    now, doubled, removed = pipeline.evaluate(queries)[:, None], up[:, -1], down[:, -1]
    bend = (doubled + removed - 2 * now).norm(dim=0) / (doubled - removed).norm(dim=0).clamp(
        min=1e-30
    )
    return RunCheck(
        examples,
        steps,
        errors=((differences - scores[:, None]).norm(dim=0) / size).cpu(),
        nonlinearity=bend.cpu(),
        predicted=-scores.cpu(),
        actual=(removed - now).cpu(),
    )


def _both_ways(
    pipeline: Pipeline, queries: Examples, k: int, examples: Tensor, steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """q after reruns with weight ``1 ± h`` of one example at a time, ``(Q, H, n)`` each."""
    m, n = len(pipeline.stages[k].data), len(examples)
    weights = torch.ones(len(steps), 2, n, m, dtype=torch.float64)
    for row, h in enumerate(steps):
        for column, i in enumerate(examples):
            weights[row, :, column, i] = torch.tensor([1 + h, 1 - h], dtype=torch.float64)
    q = pipeline.retrain({k: weights.reshape(-1, m)}, progress=False).evaluate(queries)
    return q.reshape(len(q), len(steps), 2, n).unbind(2)

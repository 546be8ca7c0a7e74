"""Whether a derivative of the run predicts removals: scores beside reruns under changed weights."""

from dataclasses import dataclass

from torch import Tensor

NONLINEARITY = 0.3  # 0.02 to 0.06 on those runs, above 0.6 where r was below 0.5


@dataclass(frozen=True)
class RunCheck:
    """What `UnrolledInfluence.check` found for n examples.

    Attributes:
        examples: their positions ``(n,)``.
        steps: changes h of weight that were tried.
        errors: ``(H, n)`` relative distance of central differences from the scores, over queries: a V over h,
            truncation on the right, rounding on the left.
        nonlinearity: ``(n,)`` ``‖q(2) + q(0) − 2 q(1)‖ / ‖q(2) − q(0)‖`` over the weight of the example, 0 for a
            linear response.
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
        lines = [f"{len(self.examples)} examples: derivative within {self.error:.1e} of central differences"]
        lines += [
            f"  example {int(i)}: best error {float(e):.1e}, nonlinearity of removal {float(b):.2f}"
            for i, e, b in zip(self.examples, self.errors.amin(0), self.nonlinearity, strict=True)
        ]
        return "\n".join(lines)

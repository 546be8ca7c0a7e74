"""Influence at every α and every damping from one pair of eigendecompositions."""

import torch
from torch import Tensor

from ..curvature.derivatives import per_example_gradients
from ..data.examples import Examples
from ..errors import IndefiniteCurvatureError
from ..objective.checks import ask
from ..objective.losses import target_name
from ..pipeline.pipeline import Pipeline
from ..pipeline.stages import Proximal
from ..solvers.exact import Exact, Spectrum, schur_complement
from .result import Influence

__all__ = ["AlphaSweep"]


class AlphaSweep:
    """Scores of a two-stage `Proximal` pipeline as a function of α and of the damping, the trained
    weights held fixed.

    With ``S = G_WW − G_WT G_TT⁻¹ G_TW`` the Schur complement of the finetuning curvature (without
    the proximal term) and ``c = ∇_W q − G_WT G_TT⁻¹ ∇_T q`` the frozen case's cotangent, the full
    case hands ``2α (S + 2αI)⁻¹ c`` to pretraining: along an eigenvector of S with eigenvalue s, c
    is multiplied by ``2α / (s + 2α)``. Both decompositions, of S and of the pretraining curvature,
    are made once; then `scores` is three products.

    Retraining with another α would also move the finetuned weights; that is not in here, so the
    scores are those of `ImplicitInfluence` at the pipeline's own α and a thought experiment at any
    other.

    Args:
        pipeline: two stages, the second with a `Proximal` link, trained.
        queries: examples of the last stage's task, Q of them.
        target: as in `ImplicitInfluence.score`.
        curvature: ``"hessian"`` or ``"ggn"``.
        memory: budget of each dense matrix.

    Attributes:
        eigenvalues: of S, rising, ``(S,)``.
        pretraining: eigenvalues of the pretraining curvature, rising, ``(P,)``.
        alpha: the pipeline's own.

    Raises:
        ValueError: another kind of pipeline, not trained, unknown curvature.
        IndefiniteCurvatureError: the block of finetuning that adapts, ``G_TT``, is not positive
            definite.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits(dtype=torch.float64)
    >>> nets = msif.mlp(64, hidden=(4,), classes=2).double(), msif.mlp(64, hidden=(4,), classes=2).double()
    >>> first = msif.Stage("first", nets[0], train.select((0, 1), n=60), weight_decay=1e-2)
    >>> last = msif.Stage("last", nets[1], train.select((2, 3), n=40), weight_decay=1e-2, link=msif.Proximal(alpha=1.0))
    >>> pipeline = msif.Pipeline([first, last]).fit(progress=False)
    >>> sweep = AlphaSweep(pipeline, test.select((2, 3), n=5))
    >>> sweep.scores(alpha=2.0, damping=1e-3).values.shape
    torch.Size([5, 60])

    Derived in notebooks/03. Reference: Chen et al. 2020, the case of full finetuning.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        queries: Examples,
        *,
        target="loss",
        curvature: str = "hessian",
        memory: str | int = "2GB",
    ):
        if len(pipeline.stages) != 2 or not isinstance(pipeline.stages[1].link, Proximal):
            links = [type(s.link).__name__ for s in pipeline.stages[1:]]
            raise ValueError(
                f"the pipeline has {len(pipeline.stages)} stage(s) with links {links}: a sweep "
                "over α needs two stages, the second with link=Proximal(alpha=...)"
            )
        if curvature not in ("hessian", "ggn"):
            raise ValueError(f"curvature={curvature!r} must be 'hessian' or 'ggn'")
        first, last = pipeline.objective(0), pipeline.objective(1)
        full, exact = pipeline.trained(), Exact(memory)
        function = ask(last, queries, target)
        self.alpha, self._count = last.alpha, len(first.data)
        self._about = (first.data.ids, queries.ids, pipeline.stages[0].name, target_name(target))

        matrix = exact.dense(pipeline.curvature(1, curvature)).clone()
        keep = last.coupled_positions
        matrix[keep, keep] -= 2 * last.alpha
        rest = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
        rest[keep] = False
        schur = Spectrum(*torch.linalg.eigh(schur_complement(matrix, keep)))
        self.eigenvalues = schur.values

        # ∇q, (Q, P)
        asked = torch.cat([g for _, g in per_example_gradients(last, full[1], queries, function)])
        frozen = asked[:, keep]
        if bool(rest.any()):
            frozen = (
                frozen
                - torch.linalg.solve(matrix[rest][:, rest], asked[:, rest].T).T
                @ matrix[rest][:, keep]
            )
        self._cotangents = frozen @ schur.vectors  # c in S's eigenvectors, (Q, S)

        spectrum = exact.spectrum(pipeline.curvature(0, curvature))
        self.pretraining = spectrum.values
        across = schur.vectors.new_zeros(len(keep), first.layout.size)
        pipeline.functional(1).there["coupled"].put(across, schur.vectors.T)
        self._across = (
            first.trained.take(across) @ spectrum.vectors
        )  # from one set of eigenvectors to the other, (S, P)
        gradients = torch.cat([g for _, g in per_example_gradients(first, full[0])])
        # ∇f_i in the pretraining eigenvectors, (N, P)
        self._examples = gradients @ spectrum.vectors

    @property
    def floor(self) -> float:
        """The α above which the finetuned point is a minimum, ``max(0, −s_min / 2)``."""
        return max(0.0, -float(self.eigenvalues[0]) / 2)

    def filter(self, alpha: float) -> Tensor:
        """``2α / (s + 2α)`` for every eigenvalue s of S, ``(S,)``; 1 for α = ∞, the frozen case.

        Raises:
            IndefiniteCurvatureError: ``S + 2αI`` is not positive definite: α is below its floor.
        """
        if not alpha > 0:
            raise ValueError(f"alpha={alpha!r} must be positive; inf is the frozen case")
        if alpha == float("inf"):
            return torch.ones_like(self.eigenvalues)
        _require_positive(
            self.eigenvalues, 2 * alpha, "the finetuning curvature S + 2αI", "a larger alpha"
        )
        return 2 * alpha / (self.eigenvalues + 2 * alpha)

    def scores(self, alpha: float, damping: float = 0.0) -> Influence:
        """`Influence` ``(Q, N)`` of the pretraining examples with this α, δ added to the
        pretraining curvature.

        Raises:
            IndefiniteCurvatureError: a matrix that is inverted is not positive definite.
        """
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping={damping!r} must be zero or positive")
        _require_positive(
            self.pretraining, damping, "the pretraining curvature H + δI", "more damping"
        )
        solution = (
            (self._cotangents * self.filter(alpha)) @ self._across / (self.pretraining + damping)
        )
        ids, query_ids, stage, target = self._about
        values = -solution @ self._examples.T / self._count
        return Influence(
            values,
            ids,
            query_ids,
            stage,
            target,
            f"AlphaSweep, α = {alpha:g}, damping = {damping:g}",
        )


def _require_positive(values: Tensor, shift: float, what: str, way_out: str) -> None:
    smallest = float(values[0]) + shift
    if not smallest > 0:
        raise IndefiniteCurvatureError(
            f"{what} is not positive definite: its smallest eigenvalue is {smallest:.3e}; choose "
            f"{way_out}",
            smallest,
        )

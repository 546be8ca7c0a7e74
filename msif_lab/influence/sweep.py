"""Influence at every α and every damping from one pair of eigendecompositions."""

import torch
from torch import Tensor

from ..curvature.derivatives import per_example_gradients, query_gradients
from ..data.examples import Examples
from ..errors import IndefiniteCurvatureError
from ..objective.checks import ask
from ..objective.questions import Question
from ..pipeline.pipeline import Pipeline
from ..pipeline.stages import Proximal
from ..solvers.exact import Exact, Spectrum, schur_complement
from .result import Influence

__all__ = ["AlphaSweep"]


class AlphaSweep:
    """Scores of a two-stage `Proximal` pipeline for any α and damping, with the weights held fixed.

    With ``S = G_WW − G_WT G_TT⁻¹ G_TW`` the Schur complement of the finetuning curvature (without
    the proximal term) and ``c = ∇_W q − G_WT G_TT⁻¹ ∇_T q`` the frozen case's cotangent, the full
    case passes ``2α (S + 2αI)⁻¹ c`` to pretraining: along an eigenvector of S with eigenvalue s, c
    is multiplied by ``2α / (s + 2α)``. Both decompositions, of S and of the pretraining curvature,
    are made once; then `scores` is three products.

    Retraining with another α would also move the finetuned weights, which is left out here: at the
    pipeline's own α the scores are those of `ImplicitInfluence`, at any other a thought experiment.

    Args:
        pipeline: two stages, the second with a `Proximal` link, trained.
        queries: examples of the last stage's task, Q of them.
        target, aggregate: as in `ImplicitInfluence.score`.
        curvature: ``"hessian"`` or ``"ggn"``.
        memory: budget of each dense matrix.

    Attributes:
        eigenvalues: of S, ascending, ``(S,)``.
        pretraining: eigenvalues of the pretraining curvature, ascending, ``(P,)``.
        alpha: the pipeline's own.

    Raises:
        ValueError: another kind of pipeline, not trained, unknown curvature.
        IndefiniteCurvatureError: the block of finetuning that adapts, ``G_TT``, is not positive
            definite.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits(dtype=torch.float64)
    >>> data = train.select((0, 1), n=60), train.select((2, 3), n=40)
    >>> nets = [msif.mlp(64, hidden=(4,), classes=2).double() for _ in data]
    >>> first = msif.Stage("first", nets[0], data[0], weight_decay=1e-2)
    >>> link = msif.Proximal(alpha=1.0)
    >>> last = msif.Stage("last", nets[1], data[1], weight_decay=1e-2, link=link)
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
        aggregate=None,
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
        first = pipeline.trained()[0]
        exact = Exact(memory)
        o = pipeline.objective(0)
        self.alpha = pipeline.objective(1).alpha
        question = ask(pipeline.objective(1), queries, target, aggregate, derivative=True)
        schur, self._cotangents = self._finetuning(pipeline, question, curvature, exact)
        self.eigenvalues = schur.values
        self._about = o.data.ids, question.ids, pipeline.stages[0].name, question.target
        self._aggregate, self._origin = question.aggregate, pipeline.origin(question)

        spectrum = exact.spectrum(pipeline.curvature(0, curvature))
        self.pretraining = spectrum.values
        # From S's eigenvectors to those of the pretraining curvature, (S, P).
        across = schur.vectors.new_zeros(len(schur.values), o.layout.size)
        pipeline.functional(1).there["coupled"].put(across, schur.vectors.T)
        self._across = o.trained.take(across) @ spectrum.vectors
        # ∇f_i in the eigenvectors of the pretraining curvature, (N, P).
        gradients = torch.cat([g for _, g in per_example_gradients(o, first)])
        self._examples = gradients @ spectrum.vectors

    @staticmethod
    def _finetuning(
        pipeline: Pipeline, question: Question, curvature: str, exact: Exact
    ) -> tuple[Spectrum, Tensor]:
        """The spectrum of S, and each query's c in its eigenvectors ``(Q, S)``."""
        o, full = pipeline.objective(1), pipeline.trained()[1]
        matrix = exact.dense(pipeline.curvature(1, curvature)).clone()
        keep = o.coupled_positions
        matrix[keep, keep] -= 2 * o.alpha
        rest = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
        rest[keep] = False
        schur = Spectrum(*torch.linalg.eigh(schur_complement(matrix, keep)))

        gradients = query_gradients(o, full, question, every=False)
        cotangents = gradients[:, keep]
        if bool(rest.any()):
            adapted = torch.linalg.solve(matrix[rest][:, rest], gradients[:, rest].T).T
            cotangents = cotangents - adapted @ matrix[rest][:, keep]
        return schur, cotangents @ schur.vectors

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
        """`Influence` ``(Q, N)`` of the pretraining examples at this α and damping δ.

        Raises:
            IndefiniteCurvatureError: a matrix that is inverted is not positive definite.
        """
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping={damping!r} must be zero or positive")
        _require_positive(
            self.pretraining, damping, "the pretraining curvature H + δI", "more damping"
        )
        filtered = (self._cotangents * self.filter(alpha)) @ self._across
        solution = filtered / (self.pretraining + damping)
        values = -solution @ self._examples.T / len(self._examples)
        method = f"AlphaSweep, α = {alpha:g}, damping = {damping:g}"
        return Influence(values, *self._about, method, self._aggregate, self._origin)


def _require_positive(values: Tensor, shift: float, what: str, way_out: str) -> None:
    smallest = float(values[0]) + shift
    if not smallest > 0:
        raise IndefiniteCurvatureError(
            f"{what} is not positive definite: its smallest eigenvalue is {smallest:.3e}; choose "
            f"{way_out}",
            smallest,
        )

"""Segmented influence: a run read as a few stretches of constant curvature.

Within a stretch the loss is taken as quadratic, with the Hessian H halfway between the weights at
its two ends, and the optimiser's own recurrence is kept. Backwards over the steps of a stretch,

    v̄ ← v̄ − η_t θ̄        S ← S + v̄        θ̄ ← θ̄ + H v̄        v̄ ← μ v̄

and ``score_i += S·∇f_i / m``: an example is in one step of an epoch, with weight ``1/|B|``, which
is ``1/m`` per step on average; ∇f_i lies on a straight line between its values at the two ends. θ̄,
v̄ and S are polynomials in H applied to the pair (θ̄, v̄), so a small Krylov space of H from the
pair holds them, and the recurrence runs on its Ritz values.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.derivatives import cross_products, example_products, query_gradients
from ..curvature.matrices import curvature
from ..curvature.operators import Operator
from ..curvature.soundness import require_loss_curvature, require_second_derivative
from ..data.examples import Examples
from ..errors import UnsmoothTrainingWarning
from ..memory import parse_bytes
from ..objective.checks import ask
from ..objective.precision import require_precision
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import LinearStep, MiniBatch, progress_bar
from ..pipeline.runs import KeptRun
from ..pipeline.stages import FunctionalStage
from .adjoint import Backwards
from .replay import kept_runs
from .result import Influence
from .unrolled import warn_of_growth

__all__ = ["SegmentedInfluence"]


@dataclass
class Stretch:
    """A part of a run: where it starts and ends, and its steps.

    Attributes:
        start, end: all parameters ``(D,)``.
        steps: number, and learning rate of each step.
        scale: square root of the optimiser's preconditioner ``(P,)``, or None.
    """

    start: Tensor
    end: Tensor
    steps: list[tuple[int, float]]
    scale: Tensor | None

    @property
    def path(self) -> list[float]:
        """How far from start to end each step begins, as a share of the learning rates' sum."""
        rates = [rate for _, rate in self.steps]
        whole = sum(rates) or 1.0
        return [done / whole for done in itertools.accumulate(rates[:-1], initial=0.0)]

    @property
    def middle(self) -> Tensor:
        """The mean of the weights at which the steps begin ``(D,)``, on a straight path."""
        share = sum(self.path) / len(self.path)
        return self.start + share * (self.end - self.start)


def krylov(operator: Callable[[Tensor], Tensor], pair: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ritz vectors and values of a symmetric matrix on the Krylov space of each query's pair.

    Block Lanczos with full reorthogonalisation, all queries side by side.

    Args:
        operator: ``(Q, P, B)`` → the matrix times each column.
        pair: ``(Q, P, B)``, the vectors that the space starts from.
        size: of the space, rounded up to whole blocks.

    Returns:
        ``(Q, P, K)`` orthonormal vectors, zero where a space is exhausted, and ``(Q, K)`` values.
    """
    blocks, images = [], []
    block = _orthonormal(pair[:, :, :0], pair)
    while bool(block.any()):
        blocks.append(block)
        images.append(operator(block))
        basis = torch.cat(blocks, 2)
        if int(basis.any(1).sum(1).min()) >= min(size, pair.shape[1]):
            break
        block = _orthonormal(basis, images[-1])
    if not blocks:  # no query depends on the stage at all
        return pair, pair.new_zeros(len(pair), pair.shape[2])
    small = basis.mT @ torch.cat(images, 2)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    return basis @ vectors, values


def _orthonormal(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns for what a block adds to a basis; zero where that is only rounding."""
    columns = []
    for z in block.split(1, 2):
        limit = 30 * torch.finfo(z.dtype).eps * z.norm(dim=1, keepdim=True)
        known = torch.cat([basis, *columns], 2)
        for share in (limit, 0.5):
            for _ in range(2):
                z = z - known @ (known.mT @ z)
            left = z.norm(dim=1, keepdim=True)
            z = torch.where(left > share, z / left.clamp(min=torch.finfo(z.dtype).tiny), 0.0)
        columns.append(z)
    return torch.cat(columns, 2)


def backwards(
    values: Tensor,
    theta_bar: Tensor,
    momentum_bar: Tensor,
    steps: Sequence[tuple[LinearStep, float, float]],
    path: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence backwards over a stretch, on coordinates along eigenvectors of H.

    Args:
        values: eigenvalues ``(Q, K)``.
        theta_bar, momentum_bar: ∂q/∂ the parameters and the momentum at the end ``(Q, K)``.
        steps: each step's recurrence, learning rate, and rate of decoupled weight decay.
        path: how far along the stretch each step begins.

    Returns:
        ``S = Σ (1 − τ) ḡ`` and ``Σ τ ḡ`` over the steps, τ along the path, then θ̄ and the
        momentum's at the start, ``(Q, K)`` each.
    """
    early, late = torch.zeros_like(theta_bar), torch.zeros_like(theta_bar)
    for ((a, b, c, d), rate, decay), share in zip(reversed(steps), reversed(path), strict=True):
        momentum_bar = momentum_bar - rate * c * theta_bar
        g_bar = b * momentum_bar - rate * d * theta_bar
        early, late = early + (1 - share) * g_bar, late + share * g_bar
        theta_bar = (1 - rate * decay) * theta_bar + values * g_bar
        momentum_bar = a * momentum_bar
    return early, late, theta_bar, momentum_bar


class SegmentAdjoint(Backwards):
    """The way back through the stretches of a stage's run.

    Args:
        functional, cotangent, onwards: as in `Backwards`.
        recipe: how it was trained.
        make: the curvature at all parameters ``(D,)``, penalty included.
        dimension: of the Krylov spaces.

    Attributes:
        momentum_bar: ∂q/∂ the optimiser's momentum ``(Q, P)``.
        sizes: ``Σ_q ‖θ̄_q‖`` at each checkpoint from the one reached to the end.
    """

    def __init__(
        self,
        functional: FunctionalStage,
        recipe: MiniBatch,
        cotangent: Tensor,
        *,
        make: Callable[[Tensor], Operator],
        dimension: int,
        onwards: bool,
    ):
        super().__init__(functional, cotangent, onwards=onwards)
        self.recipe, self.make, self.dimension = recipe, make, dimension
        self.decay = self.objective.weight_decay if recipe.decoupled else 0.0
        self.momentum_bar = torch.zeros_like(self.theta_bar)
        self.sizes = [self.size()]

    def sweep(self, stretches: Sequence[Stretch], bar) -> None:
        """Backwards through all stretches of the stage."""
        o, later = self.objective, 0.0
        for stretch in reversed(stretches):
            early, late = self._through(stretch)
            # The examples' gradients on a straight line between those at the checkpoints.
            self._add(stretch.end, late + later)
            later = early
            if self.through_frozen:
                total, names = early + late, self.functional.frozen
                self.frozen_bar += cross_products(o, stretch.middle, names, total)
            self.centre_bar -= 2 * o.alpha * o.coupled.take(early + late)
            self.sizes.insert(0, self.size())
            bar.update()
        self.require_finite()
        self._add(stretches[0].start, later)

    def _add(self, full: Tensor, total: Tensor) -> None:
        """``score_i += S·∇f_i / m`` at all parameters ``full`` (D,)."""
        if bool(total.any()):
            self.scores += example_products(self.objective, full, total.T) / self.scores.shape[1]

    def _through(self, stretch: Stretch) -> tuple[Tensor, Tensor]:
        """One stretch backwards: what its two ends have of ``S = Σ ḡ``, ``(Q, P)`` each."""
        operator, scale = self.make(stretch.middle), stretch.scale
        theta_bar, momentum_bar = self.theta_bar, self.momentum_bar
        # Decay that differs between parameters has no eigenvectors in common with H: half of it
        # comes before the stretch and half after.
        by_name = isinstance(self.decay, Tensor)
        half = math.prod(1 - rate * self.decay for _, rate in stretch.steps) ** 0.5
        theta_bar = theta_bar * half if by_name else theta_bar
        if scale is not None:  # the coordinates in which the preconditioner is one
            theta_bar, momentum_bar = theta_bar * scale, momentum_bar / _nonzero(scale)

        def product(block: Tensor) -> Tensor:
            columns = block.permute(1, 0, 2).reshape(block.shape[1], -1)
            columns = columns if scale is None else scale[:, None] * columns
            images = operator @ columns - (self.decay * columns.T).T
            images = images if scale is None else scale[:, None] * images
            return images.view(block.shape[1], block.shape[0], -1).permute(1, 0, 2)

        pair = [theta_bar] if not bool(momentum_bar.any()) else [theta_bar, momentum_bar]
        vectors, values = krylov(product, torch.stack(pair, 2), self.dimension)
        coordinates = ((vectors.mT @ v[:, :, None])[..., 0] for v in (theta_bar, momentum_bar))
        decay = 0.0 if by_name else self.decay
        steps = [(self.recipe.linear_step(t), rate, decay) for t, rate in stretch.steps]
        ended = backwards(values, *coordinates, steps, stretch.path)
        early, late, theta_bar, momentum_bar = ((vectors @ c[:, :, None])[..., 0] for c in ended)
        if scale is not None:
            early, late, momentum_bar = early * scale, late * scale, momentum_bar * scale
            kept = self.theta_bar * (half if by_name else half**2)
            theta_bar = torch.where(scale > 0, theta_bar / _nonzero(scale), kept)
        self.theta_bar = theta_bar * half if by_name else theta_bar
        self.momentum_bar = momentum_bar
        return early, late


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


@dataclass
class SegmentCheck:
    """Scores beside those from half as many stretches.

    Attributes:
        r: correlation of the two over examples, for each query ``(Q,)``.
        change: ``‖difference‖ / ‖scores‖`` of each query ``(Q,)``.
    """

    r: Tensor
    change: Tensor

    def __str__(self) -> str:
        return (
            f"half as many stretches give scores that correlate by r = {float(self.r.median()):.3f}"
            f" and differ by {float(self.change.median()):.0%} (medians of {len(self.r)} queries)"
        )


class SegmentedInfluence:
    """Multi-stage influence from a dozen checkpoints of each run, converged or not.

    `UnrolledInfluence` with every stage's run read as a few stretches of constant curvature: what
    it takes per query is a few Hessian products for each stretch instead of one for each step. For
    `SGD` a dozen stretches come close to it. For `Adam` and `AdamW` the squared gradients count as
    constant within a stretch, and what they pass on is left out: a rougher answer.

    Args:
        segments: how many stretches a stage's run is cut into.
        krylov: dimension of the Krylov space of each stretch and query: 10 is enough for stretches
            of up to about 20 steps, 20 for 40.
        curvature: ``"hessian"``, or ``"ggn"`` where there are no second derivatives.
        curvature_examples: take the curvature from this many of a stage's examples, drawn at
            random; default all.
        memory: for the queries' Krylov spaces, as ``"1GB"``.

    Attributes:
        adjoint_norms_: after `score`, by stage the mean ‖θ̄‖ at each checkpoint.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits(dtype=torch.float64)
    >>> recipe = msif.SGD(lr=0.05, epochs=2, batch_size=100)
    >>> stage = msif.Stage("digits", msif.mlp(64, (8,), classes=10).double(), train, recipe=recipe)
    >>> segmented = msif.SegmentedInfluence(segments=6).fit(msif.Pipeline([stage]).fit())
    >>> segmented.score(test[:3]).values.shape
    torch.Size([3, 1201])

    Reference: the reading as segments is SOURCE (Bae et al. 2024, arXiv 2405.12186), for one stage,
    with the Gauss-Newton matrix and ``exp(−τH)`` instead of the optimiser's recurrence.
    """

    def __init__(
        self,
        segments: int = 12,
        krylov: int = 10,
        *,
        curvature: str = "hessian",
        curvature_examples: int | None = None,
        memory: str | int = "1GB",
    ):
        for name, value in (("segments", segments), ("krylov", krylov)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if curvature not in ("hessian", "ggn"):
            raise ValueError(f"curvature={curvature!r} must be 'hessian' or 'ggn'")
        few = curvature_examples
        if few is not None and (not isinstance(few, int) or isinstance(few, bool) or few < 1):
            raise ValueError(
                f"curvature_examples={few!r} must be a whole number of at least 1, or None for all"
            )
        self.segments, self.krylov = segments, krylov
        self.curvature, self.curvature_examples = curvature, curvature_examples
        self.memory = parse_bytes(memory)

    def __repr__(self) -> str:
        given = f", curvature_examples={self.curvature_examples}" * bool(self.curvature_examples)
        return (
            f"SegmentedInfluence(segments={self.segments}, krylov={self.krylov}, "
            f"curvature={self.curvature!r}{given})"
        )

    def fit(self, pipeline: Pipeline, progress: bool = True) -> "SegmentedInfluence":
        """Replay every stage's run once for its checkpoints, or take those that were adopted.

        Raises:
            ValueError: a stage was trained to an optimum, or adopted without checkpoints.
            UnsupportedModelError: a model without second derivatives, or in half precision.
        """
        if not isinstance(pipeline, Pipeline):
            raise TypeError(f"pipeline must be a msif_lab.Pipeline, not {type(pipeline).__name__}")
        self._full = [full.clone() for full in pipeline.trained()]
        for k in range(len(pipeline.stages)):
            require_precision(pipeline.objective(k), "differentiating its run")
            if self.curvature == "hessian":
                require_second_derivative(pipeline.objective(k), "curvature='hessian'")
            else:
                require_loss_curvature(pipeline.objective(k))
        self._runs = kept_runs(pipeline, self.segments, progress)
        self._pipeline = pipeline
        return self

    def score(
        self,
        queries: Examples,
        stage: int | str = 0,
        target: str | Callable = "loss",
        progress: bool = True,
        *,
        aggregate=None,
    ) -> Influence:
        """Influence of one stage's examples on each query, as `ImplicitInfluence.score`.

        Raises:
            ValueError, TypeError: queries or target do not fit; the pipeline changed since fit.

        Warns:
            UnsmoothTrainingWarning: the run amplifies changes, as for `UnrolledInfluence`.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before score(queries)")
        pipeline, first = self._pipeline, self._pipeline.index(stage)
        pipeline.require_unchanged(self._full)
        o = pipeline.objective(-1)
        question = ask(o, queries, target, aggregate, derivative=True)
        gradients = query_gradients(o, self._full[-1], question)
        values, self.adjoint_norms_ = self._sweep(self._runs, gradients, first, progress)
        warn_of_growth(self.adjoint_norms_)
        about = pipeline.stages[first].name, question.target, repr(self), question.aggregate
        return Influence(values, pipeline.stages[first].data.ids, question.ids, *about)

    def _sweep(
        self, runs: Sequence[KeptRun], gradients: Tensor, first: int, progress: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Backwards through all stages down to ``first``, some of the queries at a time.

        Returns:
            the scores of its examples ``(Q, m)``, and by stage the mean ‖θ̄‖ at each checkpoint.
        """
        pipeline, stretches = self._pipeline, [_stretches(run) for run in runs]
        few = self._side_by_side(first)
        stages = range(len(runs) - 1, first - 1, -1)
        total = sum(len(stretches[k]) for k in stages) * -(-len(gradients) // few)
        values, sizes = [], dict.fromkeys(reversed(stages), 0.0)
        with progress_bar(total, "stretches", progress) as bar:
            for cotangent in gradients.split(few):
                for k in stages:
                    adjoint = SegmentAdjoint(
                        pipeline.functional(k),
                        runs[k].recipe,
                        cotangent,
                        make=self._curvature_of(k),
                        dimension=self.krylov,
                        onwards=k > first,
                    )
                    adjoint.sweep(stretches[k], bar)
                    sizes[k] = sizes[k] + torch.stack(adjoint.sizes) / len(gradients)
                    if k > first:
                        cotangent = adjoint.before(pipeline.objective(k - 1).layout.size)
                values.append(adjoint.scores)
        norms = {pipeline.stages[k].name: size.cpu() for k, size in sizes.items()}
        return torch.cat(values), norms

    def check(
        self, queries: Examples | None = None, stage: int | str = 0, progress: bool = True
    ) -> "SegmentCheck":
        """Compare the scores with those from half as many stretches of the same checkpoints.

        What halving changes is about as much as the stretches leave out: an error from the length
        of the stretches alone, not of Krylov spaces or of what no derivative can tell.

        Args:
            queries: default the first five training examples of the last stage.
            stage: whose examples.
            progress: show a bar if it takes longer than two seconds.

        Warns:
            UnsmoothTrainingWarning: the two correlate by less than 0.9 for the median query.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before check()")
        first = self._pipeline.index(stage)
        queries = self._pipeline.stages[-1].data[:5] if queries is None else queries
        whole = self.score(queries, stage, progress=progress).values
        question = ask(self._pipeline.objective(-1), queries, "loss", derivative=True)
        gradients = query_gradients(self._pipeline.objective(-1), self._full[-1], question)
        coarse = [run.thinned(max(1, (len(run.steps) - 1) // 2)) for run in self._runs]
        half, _ = self._sweep(coarse, gradients, first, progress)
        pairs = zip(whole, half, strict=True)
        r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
        report = SegmentCheck(r.cpu(), ((whole - half).norm(dim=1) / whole.norm(dim=1)).cpu())
        if not float(report.r.median()) >= 0.9:
            warnings.warn(
                f"{report}: the stretches are too long for their curvature to be constant; keep "
                "more checkpoints, or raise segments=",
                UnsmoothTrainingWarning,
                stacklevel=2,
            )
        return report

    def _curvature_of(self, k: int) -> Callable[[Tensor], Operator]:
        """The stage's curvature as a function of where, on all of its examples or on some."""
        o = self._pipeline.objective(k)
        few = self.curvature_examples
        if few is not None and few < len(o.data):
            draw = torch.Generator().manual_seed(0)
            o = o.on(o.data[torch.randperm(len(o.data), generator=draw)[:few].sort().values])
        return lambda full: curvature(self.curvature, o, full)

    def _side_by_side(self, first: int) -> int:
        """How many queries to take at once, from the memory that a Krylov space takes."""
        sizes = [self._pipeline.objective(k).layout.size for k in range(first, len(self._full))]
        row = max(sizes) * self._full[-1].element_size()
        return max(1, self.memory // (row * (3 * (self.krylov + 2) + 6)))


def _stretches(run: KeptRun) -> list[Stretch]:
    """What lies between the checkpoints of a run."""
    stretches = []
    for i, (a, b) in enumerate(itertools.pairwise(run.steps)):
        ends = [(run.states[j], run.steps[j]) for j in (i, i + 1) if run.states[j] is not None]
        found = [run.recipe.preconditioner(state, step) for state, step in ends if step]
        steps = list(zip(range(a, b), run.rates[a:b], strict=True))
        scale = None
        if found and found[-1] is not None:
            # A step uses what comes after it: of a single one that is the end's.
            share = (len(steps) + 1) / (2 * len(steps))
            scale = (share * found[-1] + (1 - share) * found[0])[0].sqrt()
        stretches.append(Stretch(run.fulls[i], run.fulls[i + 1], steps, scale))
    return stretches

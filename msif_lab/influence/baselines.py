"""Baselines: what one would try first, with the interface of `ImplicitInfluence`.

From the pretrained model alone, the same row for every query: `Loss`, `Entropy`, `Margin`,
`GradientNorm`, `SelfInfluence`, `Random`. For each query: `GradientDot`, `TracIn`,
`RepresentationSimilarity`, `SingleStage`. A *signed* baseline says whether an example helps or
harms, like influence: positive harms. An unsigned one says how much an example matters, not how.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..arguments import (
    check_choice,
    check_damping,
    check_flag,
    check_instance,
    check_seed,
    check_whole,
    shown,
)
from ..curvature.derivatives import example_products, per_example_gradients, query_gradients
from ..data.examples import Examples
from ..objective.checks import ask
from ..objective.exclusive import exclusive
from ..objective.last_layer import find_last_layer
from ..objective.objective import Objective
from ..objective.questions import Question
from ..pipeline.pipeline import Pipeline
from ..solvers.exact import as_solver
from .replay import kept_runs
from .result import Influence

__all__ = [
    "Entropy",
    "GradientDot",
    "GradientNorm",
    "Loss",
    "Margin",
    "Random",
    "RepresentationSimilarity",
    "SelfInfluence",
    "SingleStage",
    "TracIn",
    "all_baselines",
]


class Baseline:
    """What all baselines share: settings in the constructor, `fit`, `score`.

    Attributes:
        signed: whether the sign of a score means harm (positive) or help.
    """

    signed: ClassVar[bool] = False

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({settings})"

    def fit(self, pipeline: Pipeline, progress: bool = True) -> "Baseline":
        """Remember the trained pipeline.

        Args:
            pipeline: trained.
            progress: for a bar where there is a run to replay (`TracIn`), as for every method.

        Raises:
            ValueError: it is not trained, or its models were changed since.
        """
        check_instance("pipeline", pipeline, Pipeline)
        self._full = [t.clone() for t in pipeline.trained()]
        self._pipeline = pipeline
        return self

    def score(
        self,
        queries: Examples,
        stage: int | str = 0,
        target: str | Callable = "loss",
        progress: bool = True,
        *,
        aggregate: str | Sequence[float] | Tensor | Callable | None = None,
    ) -> Influence:
        """Scores ``(Q, N)`` of one stage's examples; arguments as in `ImplicitInfluence.score`.

        ``progress`` is taken so that one loop can call every method: a baseline passes over the
        data a few times at most, and shows no bar.

        With ``aggregate`` one row. Where scores are linear in the gradient of q it is computed from
        the gradient of the aggregate, at the price of one query. Where they are not (a cosine, a
        similarity, or no gradient at all), it is by definition ``Σ_q c_q`` times the queries' rows,
        with ``c_q = ∂A/∂q``.
        """
        if not hasattr(self, "_pipeline"):
            raise ValueError("call fit(pipeline) before score(queries)")
        k = self._pipeline.index(stage)
        self._pipeline.require_unchanged(self._full)
        question = ask(self._pipeline.objective(-1), queries, target, aggregate, derivative=True)
        values = self._values(k, question)
        scored = self._pipeline.stages[k]
        about = scored.name, question.target, repr(self), question.aggregate
        origin = self._pipeline.origin(question)
        return Influence(values, scored.data.ids, question.ids, *about, origin)

    def _values(self, k: int, question: Question) -> Tensor:
        """Scores of every row of the question, ``(Q, N)`` or ``(1, N)``."""
        raise TypeError(f"{type(self).__name__} must define _values")

    def _combined(self, rows: Tensor, question: Question) -> Tensor:
        """Each query's row ``(Q, N)``, or one for all queries ``(1, N)``, put together as asked."""
        if question.combine is None:
            return rows.expand(len(question), -1).contiguous()
        c = question.weights(self._pipeline.objective(-1), self._full[-1])
        c = c.reshape(len(c), -1).sum(1).to(rows)
        return c.sum() * rows if len(rows) == 1 else (c @ rows)[None]

    def _query_gradients(self, k: int, question: Question) -> Tensor:
        """∇q in the parameters stage k trains, ``(Q, P)``, as if later stages did not adapt.

        The gradient in what a later stage took over is passed on as it is; its own head is held
        fixed.
        """
        cotangent = query_gradients(self._pipeline.objective(-1), self._full[-1], question)
        for j in range(len(self._full) - 1, k, -1):
            functional, layout = (
                self._pipeline.functional(j),
                self._pipeline.objective(j - 1).layout,
            )
            before = cotangent.new_zeros(len(cotangent), layout.size)
            for how in ("coupled", "frozen"):
                functional.there[how].put(before, functional.here[how].take(cotangent))
            cotangent = before
        return self._pipeline.objective(k).trained.take(cotangent)


class _PerExample(Baseline):
    """A function of each example's output and target in its own stage's trained model."""

    def _values(self, k, question):
        o, full = self._pipeline.objective(k), self._full[k]
        with torch.no_grad():
            parts = [self._of(o, o.outputs(full, x), y) for _, x, y in o.chunks()]
        return self._combined(torch.cat(parts)[None], question)

    def _of(self, objective, outputs: Tensor, targets: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _of")


class Loss(_PerExample):
    """Each example's own loss ``f_i`` after its stage's training, in nats. Unsigned.

    A hard example matters, one way or the other.
    """

    def _of(self, objective, outputs, targets):
        return objective.loss(outputs, targets)


class Entropy(_PerExample):
    """Entropy of the predicted class, ``−Σ_c p_c log p_c`` in nats. Unsigned.

    Large where the model finds an example ambiguous, whatever its label. For sequences of
    predictions ``(B, T, C)`` the mean over the sequence.
    """

    def _of(self, objective, outputs, targets):
        _need_classes(self, outputs)
        log_p = outputs.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).reshape(len(outputs), -1).mean(1)


class Margin(_PerExample):
    """``1 − (p_y − max_{c≠y} p_c)``. Unsigned.

    0 where the model is sure and right, 2 where it is sure and wrong.
    """

    def _of(self, objective, outputs, targets):
        _need_classes(self, outputs)
        if targets.ndim != 1:
            raise ValueError(
                "Margin needs one label per example, the stage's targets are "
                f"{tuple(targets.shape[1:])}"
            )
        p = outputs.softmax(-1)
        correct = torch.arange(p.shape[-1], device=p.device) == targets[:, None]
        return 1 - (p * correct).sum(-1) + p.masked_fill(correct, 0).amax(-1)


def _need_classes(baseline: Baseline, outputs: Tensor) -> None:
    if outputs.ndim < 2 or outputs.shape[-1] < 2:
        raise ValueError(
            f"{baseline} needs class scores; the stage's model gives outputs "
            f"{tuple(outputs.shape[1:])}"
        )


class GradientNorm(Baseline):
    """``‖∇f_i‖`` in what the stage trains: how hard an example still pulls. Unsigned."""

    def _values(self, k, question):
        o = self._pipeline.objective(k)
        norms = self._full[k].new_empty(len(o.data))
        for rows, gradients in per_example_gradients(o, self._full[k]):
            norms[rows] = gradients.norm(dim=1)  # kept apart they would pin the heap between chunks
        return self._combined(norms[None], question)


class Random(Baseline):
    """Normal random numbers: what agreement looks like by chance.

    Args:
        seed: of the numbers.
    """

    def __init__(self, seed: int = 0):
        self.seed = check_seed("seed", seed)

    def _values(self, k, question):
        shape = len(question.queries), len(self._pipeline.stages[k].data)
        draw = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(shape, generator=draw, dtype=torch.float64).to(self._full[k])
        return self._combined(rows, question)


class GradientDot(Baseline):
    """``−(1/m) ∇q · ∇f_i`` over the shared parameters. Signed.

    Influence without curvature, with the heads held fixed. With ``cosine=True`` it is divided by
    both norms, so that examples do not stand out merely for having large gradients; an aggregate's
    row is then ``Σ_q c_q`` times the cosines of the queries, not the cosine with its own gradient.
    """

    signed = True

    def __init__(self, cosine: bool = False):
        self.cosine = check_flag("cosine", cosine)

    def _values(self, k, question):
        o = self._pipeline.objective(k)
        if not self.cosine:
            v = self._query_gradients(k, question)
            return -example_products(o, self._full[k], v.T) / len(o.data)
        v, some = self._directions(k, question)
        values = v.new_empty(len(v), len(o.data))
        for rows, gradients in per_example_gradients(o, self._full[k]):
            values[:, rows] = -v @ nn.functional.normalize(gradients * some, dim=1).T
        return values

    def _directions(self, k: int, question: Question) -> tuple[Tensor, Tensor]:
        """Unit gradients of the queries ``(Q, P)``, or their weighted sum ``(1, P)``, and a mask.

        The mask ``(P,)`` is where any query has a gradient: the cosine is taken in that space.
        """
        c, found, some = None, [], False
        if question.combine is not None:
            c = question.weights(self._pipeline.objective(-1), self._full[-1])
            if c.ndim > 1:
                raise ValueError(
                    f"{self} compares directions, so it takes one number for each query, and the "
                    f"target gives {c.shape[1]}; use GradientDot()"
                )
        for rows in torch.arange(len(question.queries)).split(max(64, len(question))):
            v = self._query_gradients(k, replace(question.each, queries=question.queries[rows]))
            v = nn.functional.normalize(v, dim=1)
            some = some | (v != 0).any(0)
            found.append(v if c is None else c[rows].to(v)[None] @ v)
        return torch.cat(found) if c is None else torch.stack(found).sum(0), some


class _AlongTheRun(Baseline):
    """What a stage's own run gives at checkpoints, at equal distances, the last at its end."""

    def __init__(self, checkpoints: int = 5):
        self.checkpoints = check_whole("checkpoints", checkpoints)

    def fit(self, pipeline: Pipeline, progress: bool = True):
        """Replay every stage's training for its checkpoints, or take those that were adopted.

        Raises:
            ValueError: weights were adopted without checkpoints, or a stage was trained by `LBFGS`:
                there is no run to replay.
        """
        super().fit(pipeline)
        self._states = []
        for run in kept_runs(pipeline, self.checkpoints, progress, by_rates=False):
            pairs = itertools.pairwise(run.steps)
            rates = [sum(run.rates[a:b]) for a, b in pairs]
            shares = run.recipe.shares(pipeline.objective(len(self._states)))
            rates = [rate * shares for rate in rates]
            self._states.append(list(zip(run.fulls[1:], rates, strict=True)))
        return self


class TracIn(_AlongTheRun):
    """``−(1/m) Σ_c η_c ∇q · ∇f_i(θ_c)`` over checkpoints of the stage's own run. Signed.

    η_c sums the learning rates of the steps a checkpoint stands for, each parameter's own where a
    recipe gives them by name. When q belongs to a later stage, its gradient is the one after
    finetuning: at a checkpoint of pretraining there is no head yet to compute q with.

    Args:
        checkpoints: how many, at equal distances, the last at the end of the run.

    Reference: Pruthi et al. (2020).
    """

    signed = True

    def _values(self, k, question):
        o, last = self._pipeline.objective(k), k == len(self._full) - 1
        v = None if last else self._query_gradients(k, question)
        total = 0.0
        for full, rate in self._states[k]:
            if last:  # q belongs to this very stage, so its checkpoints have it too
                v = query_gradients(o, full, question, every=False)
            total = total - example_products(o, full, (rate * v).T) / len(o.data)
        return total


class SelfInfluence(_AlongTheRun):
    """``(1/m) Σ_c η_c ‖∇f_i(θ_c)‖²`` over checkpoints of the stage's own run. Unsigned.

    How much an example's own steps have lowered its own loss: large where it had to be learned by
    heart, as a wrong label is. No query enters, so every query has the same row.

    Args:
        checkpoints: how many, as in `TracIn`.

    Reference: Pruthi et al. (2020), where it finds mislabelled examples.
    """

    def _values(self, k, question):
        o = self._pipeline.objective(k)
        total = self._full[k].new_zeros(len(o.data))
        for full, rate in self._states[k]:
            for rows, gradients in per_example_gradients(o, full):
                total[rows] += (rate * gradients.square()).sum(1) / len(o.data)
        return self._combined(total[None], question)


class RepresentationSimilarity(Baseline):
    """Cosine similarity of example and query in the scored stage's features. Unsigned.

    An example that looks like the query to the model matters to it, for better or worse.

    Args:
        layer: the features are the inputs of the module of this name, by default of the one that
            feeds the loss (all of a top-level ``head`` that holds it).
    """

    def __init__(self, layer: str | None = None):
        if layer is not None and not isinstance(layer, str):
            raise TypeError(f"layer={shown(layer)} must be the name of a module, such as 'head'")
        self.layer = layer

    def _values(self, k, question):
        data, queries = self._pipeline.stages[k].data, question.queries
        if queries.x.shape[1:] != data.x.shape[1:]:
            raise ValueError(
                f"queries {tuple(queries.x.shape[1:])} and examples {tuple(data.x.shape[1:])} "
                "have inputs of different shapes, so one model cannot compare their features"
            )
        # combined before the product, which is then one row's
        features = self._combined(self._features(k, queries), question)
        return features @ self._features(k, data).T

    @exclusive
    def _features(self, k: int, examples: Examples) -> Tensor:
        """Unit-length features ``(N, F)``."""
        o, seen = self._pipeline.objective(k), []
        layer = self._layer(o)

        def keep(module, given, named):
            seen.append((given or tuple(named.values()))[0].detach())

        hook = dict(o.model.named_modules())[layer].register_forward_pre_hook(
            keep, with_kwargs=True
        )
        try:
            with torch.no_grad():
                for _, x, _ in o.chunks(examples):
                    o.outputs(self._full[k], x)
        finally:
            hook.remove()
        if sum(map(len, seen)) != len(examples):
            raise ValueError(f"layer={layer!r} is not called once per example; name another module")
        return nn.functional.normalize(torch.cat(seen).flatten(1), dim=1)

    def _layer(self, o: Objective) -> str:
        """The name of the module whose inputs are the features."""
        known = [name for name, _ in o.model.named_modules() if name]
        shown = ", ".join(known[:10] + [f"... {len(known)} in all"] * (len(known) > 10))
        if self.layer is not None:
            if self.layer not in known:
                raise ValueError(
                    f"layer={self.layer!r} is no module of the model of {o.where}; those are "
                    f"{shown}"
                )
            return self.layer
        last = find_last_layer(o).modules
        if last and all(name.split(".")[0] == "head" for name in last):
            return "head"
        if len(last) != 1:
            raise ValueError(
                f"no single module feeds the loss of {o.where}, but {list(last) or 'none'}; say "
                f"whose inputs the features are, layer=one of {shown}"
            )
        return last[0]


class SingleStage(Baseline):
    """Koh & Liang's influence in the scored stage alone. Signed.

    ``−(1/m) ∇qᵀ (H + damping)⁻¹ ∇f_i``, where later stages pass the query's gradient on unchanged,
    as if they did not adapt: the multi-stage formula without its second stage.

    Args:
        solver, curvature, damping: as in `ImplicitInfluence`.
    """

    signed = True

    def __init__(self, solver=None, *, curvature: str = "ggn", damping: float = 0.0):
        check_choice("curvature", curvature, ("hessian", "ggn"))
        self.solver = as_solver(solver)
        self.curvature, self.damping = curvature, check_damping(damping)

    def _values(self, k, question):
        o, operator = self._pipeline.objective(k), self._pipeline.curvature(k, self.curvature)
        prepared = self.solver.prepare(operator + self.damping if self.damping else operator)
        solution, _ = prepared.solve(self._query_gradients(k, question).T)
        return -example_products(o, self._full[k], solution) / len(o.data)


def all_baselines(solver=None) -> dict[str, Baseline]:
    """The baselines of the studies by name, unsigned ones first; ``solver`` is `SingleStage`'s.

    `SelfInfluence`, which finds wrong labels, is left to `controls`.
    """
    return {
        "random": Random(),
        "loss": Loss(),
        "entropy": Entropy(),
        "margin": Margin(),
        "gradient norm": GradientNorm(),
        "similarity": RepresentationSimilarity(),
        "gradient dot": GradientDot(),
        "gradient cosine": GradientDot(cosine=True),
        "TracIn": TracIn(),
        "single stage": SingleStage(solver),
    }

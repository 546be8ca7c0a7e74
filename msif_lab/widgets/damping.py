"""α and damping under two sliders: the filter, the order of the examples, and the agreement."""

import html

import numpy
import torch

from .. import plots
from ..arguments import check_choice, check_instance, check_whole
from ..data.examples import Examples
from ..evaluation.comparison import agreement, row_correlations, row_ranks
from ..evaluation.removals import Effects
from ..figures import img
from ..influence.result import Influence
from ..influence.sweep import AlphaSweep
from ..pipeline.pipeline import Pipeline
from .frame import Explorer
from .given import one_pipeline, quoted
from .pictures import Gallery, Plot, open_axes, table

__all__ = ["AlphaDampingExplorer"]

INFINITE = float("inf")


class AlphaDampingExplorer(Explorer):
    """Slide α and the damping; see what the filter ``2α / (s + 2α)`` does to the scores.

    It shows the filter, the order of the examples, and how well it agrees. Both
    eigendecompositions are made once (`AlphaSweep`), so a step is three products. The trained
    weights stay those of the pipeline's own α: the sliders change the question, not the model.

    Args:
        pipeline: two stages, the second with a `Proximal` link, trained.
        queries: images ``(Q, 1 or 3, H, W)``, as are the pretraining examples.
        effects: real removals to compare with, of these queries and the first stage.
        k: pictures per row.
        curvature: ``"hessian"`` or ``"ggn"``.

    Raises:
        ValueError, TypeError: another kind of pipeline, effects of other queries, inputs that are
            not images.

    >>> import msif_lab as msif
    >>> from msif_lab import widgets
    >>> train, test = msif.load_digits()
    >>> queries = test.select(range(4, 10), n=12)
    >>> old, new = train.select(range(4), n=80), train.select(range(4, 10), n=60)
    >>> nets = [msif.mlp(64, hidden=(4,), classes=c) for c in (4, 6)]
    >>> pre = msif.Stage("pre", nets[0], old, weight_decay=0.1)
    >>> fine = msif.Stage("fine", nets[1], new, weight_decay=0.1, link=msif.Proximal(0.1))
    >>> pipeline = msif.Pipeline([pre, fine]).fit(progress=False)
    >>> # in a notebook: sliders and pictures
    >>> widgets.AlphaDampingExplorer(pipeline, queries, curvature="ggn")
    AlphaDampingExplorer: 12 queries, 80 examples, 50 α from 0.0001 to ∞, 30 dampings
    """

    kind = "damping-explorer"

    def __init__(
        self,
        pipeline: Pipeline,
        queries: Examples,
        *,
        effects: Effects | None = None,
        k: int = 5,
        curvature: str = "hessian",
    ):
        self.pipeline = one_pipeline(pipeline, queries)
        self.queries = queries
        self.effects = effects
        self.curvature = curvature
        data = pipeline.stages[0].data
        self.gallery = Gallery(queries, "queries")
        self.examples = Gallery(data, "the data of the first stage")
        self.k = check_whole("k", k, most=len(data), why="the examples")
        check_choice("curvature", curvature, ("hessian", "ggn"))
        if effects is not None:
            check_instance("effects", effects, Effects, "as removal_effects gives them")
        self.sweep = AlphaSweep(pipeline, queries, curvature=curvature)
        own = self.sweep.alpha
        floor = 1.05 * self.sweep.floor
        grid = [float(f"{own * 10 ** (i / 8):.3g}") for i in range(-24, 25) if i]
        self.alphas = [*sorted([own, *(alpha for alpha in grid if alpha > floor)]), INFINITE]
        self.dampings = [0.0, *(float(f"{10 ** (i / 4):.3g}") for i in range(-24, 5))]
        self.alpha = own
        self.damping = 0.0
        self.query = 0
        self.own = self.sweep.scores(own)
        self.frozen = self.sweep.scores(INFINITE)
        self._ranks = row_ranks(self.own.values.cpu()), row_ranks(self.frozen.values.cpu())
        if effects is not None:
            # raises unless they are of the same queries, stage and target
            agreement(self.own, effects, resamples=1)
        self._kept: tuple = ()

    @property
    def scores(self) -> Influence:
        """`Influence` at the present α and damping."""
        if self._kept[:2] != (self.alpha, self.damping):
            self._kept = self.alpha, self.damping, self.sweep.scores(self.alpha, self.damping)
        return self._kept[2]

    def agreements(self, scores: Influence) -> dict[str, float]:
        """Means over queries of correlations with other scores, and with the real effects if given.

        Ranks are compared with those at the pipeline's own α and in the frozen limit, by Spearman;
        effects by Pearson r.
        """
        ranks = row_ranks(scores.values.cpu())
        own, frozen = (_mean(row_correlations(ranks, reference)) for reference in self._ranks)
        found = {
            "Spearman with its own α, no damping": own,
            "Spearman with α = ∞ (frozen)": frozen,
        }
        if self.effects is not None:
            predicted = torch.stack(
                [scores.removal_effect(group) for group in self.effects.subsets], 1
            )
            found["Pearson r with real removals"] = _mean(
                row_correlations(predicted, self.effects.values)
            )
        return found

    # --- controls ---------------------------------------------------------------------------------

    def _build(self) -> list:
        import ipywidgets

        alphas = [(self._alpha_text(alpha), alpha) for alpha in self.alphas]
        dampings = [(f"{damping:.2g}", damping) for damping in self.dampings]
        queries = [(str(q), q) for q in range(len(self.queries))]
        self.alpha_control = self._slider("alpha", "Strength α", alphas)
        self.damping_control = self._slider("damping", "Damping δ of pretraining", dampings)
        self.query_control = self._slider("query", "Query", queries)
        self.view = self._html("view")
        self.plot = self._html("plot")
        self.answer = self._html("answer")
        wrap = {"flex_flow": "row wrap"}
        return [
            self.alpha_control,
            self.damping_control,
            self.query_control,
            self.view,
            ipywidgets.HBox([self.answer, self.plot], layout=wrap),
            self._code_box(),
        ]

    def _slider(self, name: str, description: str, options: list):
        def change(value):
            setattr(self, name, value)
            self._show()

        layout = {"width": "min(700px, 98%)"}
        return self._control(
            "SelectionSlider",
            name,
            description,
            change,
            options=options,
            value=getattr(self, name),
            continuous_update=False,
            layout=layout,
        )

    def _alpha_text(self, alpha: float) -> str:
        if alpha == INFINITE:
            return "∞, frozen"
        return f"{alpha:.2g}" + (", its own" if alpha == self.sweep.alpha else "")

    def _show(self) -> None:
        scores = self.scores
        q = self.query
        caption = f"query {q}<br>{html.escape(self.gallery.label(q))}"
        rows = []
        same = 0
        for word, ranking, before in (
            ("helpful", scores.helpful(self.k), self.own.helpful(self.k)),
            ("harmful", scores.harmful(self.k), self.own.harmful(self.k)),
        ):
            places = ranking.positions[q].tolist()
            same += len(set(places) & set(before.positions[q].tolist()))
            cards = [
                self.examples.show_score(place, value, scores)
                for place, value in zip(places, ranking.values[q].tolist(), strict=True)
            ]
            title = f"<b>Most {word}</b> ({scores.signs[word]}), score × 1000"
            rows.append(f"<div>{title}</div><div>{''.join(cards)}</div>")
        query = self.gallery.show(q, "Query", width=112, caption=caption, column=140)
        self.view.value = f'<div style="display:flex">{query}<div>{"".join(rows)}</div></div>'
        about = f"α = {self._alpha_text(self.alpha)}, damping δ = {self.damping:.2g}"
        largest = float(self.sweep.filter(self.alpha).max())
        found = self.agreements(scores) | {
            "mean size of a score, thousandths": 1e3 * float(scores.values.abs().mean()),
            "largest gain of the filter (above 1: s < 0)": largest,
            f"of the {2 * self.k} shown, shown at its own α too": same,
        }
        self.answer.value = table(about, [(name, f"{value:.3g}") for name, value in found.items()])
        self.plot.value = self._draw()
        self._refresh_code()

    def _draw(self) -> str:
        if not hasattr(self, "_figure"):
            self._figure = Plot(self._prepare)
        curve, dots = self._figure.artists
        gains = self.sweep.filter(self.alpha)
        s = torch.logspace(*self._decades, 200, dtype=gains.dtype)
        through = torch.ones_like(s)
        if self.alpha < INFINITE:
            through = 2 * self.alpha / (s + 2 * self.alpha)
        curve.set_data(s.numpy(), through.numpy())
        positive = self.sweep.eigenvalues > 0  # the axis is logarithmic
        dots.set_data(self.sweep.eigenvalues[positive].cpu().numpy(), gains[positive].cpu().numpy())
        half = int((gains < 0.5).sum())
        alt = (
            f"Filter 2α / (s + 2α) over the eigenvalues s, α = {self._alpha_text(self.alpha)}: "
            f"{half} of {len(gains)} directions are let through by less than half"
        )
        return img(self._figure.png(curve, dots), alt)

    @property
    def _decades(self) -> tuple[float, float]:
        """Exponents of 10 for the axis of eigenvalues: six decades up to the largest one."""
        largest = float(self.sweep.eigenvalues[-1])
        top = numpy.ceil(numpy.log10(largest)) if largest > 0 else 0.0
        return float(top - 6), float(top)

    def _prepare(self, figure):
        ax = open_axes(figure, left=0.15, top=0.97, bottom=0.17)
        ax.set(xscale="log", xlim=[10**x for x in self._decades], ylim=(-0.03, 1.08))
        ax.set_xlabel("eigenvalue s of the finetuning curvature S", fontsize=9)
        ax.set_ylabel("share let through, 2α / (s + 2α)", fontsize=9)
        ax.axhline(0.5, color=plots.NEUTRAL, lw=0.8, ls=":")
        (curve,) = ax.plot([], [], color=plots.NEUTRAL, lw=1.5)
        (dots,) = ax.plot([], [], "o", ms=4, color=plots.HELPFUL, alpha=0.7)
        return curve, dots

    # --- without a kernel -------------------------------------------------------------------------

    def static(self, damping: float = 0.0) -> list:
        """One figure: the filter at a few α, and how ranks and agreement change with α.

        Args:
            damping: of pretraining, for the second panel.
        """
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.0))
        s = torch.logspace(*self._decades, 200, dtype=torch.float64)
        finite = self.alphas[:-1]
        spread = [finite[round(i * (len(finite) - 1) / 4)] for i in range(5)]
        few = sorted({*spread, self.sweep.alpha})
        styles = ("-", "--", "-.", ":", (0, (1, 1)), (0, (5, 1)))
        for alpha, style in zip(few, styles, strict=False):
            through = 2 * alpha / (s + 2 * alpha)
            name = f"α = {self._alpha_text(alpha)}"
            left.semilogx(s.numpy(), through.numpy(), ls=style, label=name)
        left.set_xlabel("eigenvalue s")
        left.set_ylabel("2α / (s + 2α)")
        left.legend(frameon=False, fontsize=7)
        some = finite[::3]
        rows = [self.agreements(self.sweep.scores(alpha, damping)) for alpha in some]
        for name, marker in zip(rows[0], "osx", strict=False):
            values = [row[name] for row in rows]
            right.semilogx(some, values, marker=marker, ms=3, lw=1, label=name)
        right.axvline(self.sweep.alpha, color=plots.NEUTRAL, lw=0.8, ls=":")
        right.set_xlabel("α (dotted: its own)")
        right.set_ylabel("mean over queries")
        right.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1))
        return [figure]

    def code(self) -> str:
        """Python for the view: ``view`` holds the scores at this α and damping."""
        pipeline = self._name(self.pipeline, "pipeline")
        queries = self._name(self.queries, "queries")
        alpha = 'float("inf")' if self.alpha == INFINITE else repr(self.alpha)
        kind = "" if self.curvature == "hessian" else f", curvature={quoted(self.curvature)}"
        lines = [
            "from msif_lab import agreement, plots",
            "from msif_lab.influence import AlphaSweep",
            "",
            f"sweep = AlphaSweep({pipeline}, {queries}{kind})",
            f"view = sweep.scores(alpha={alpha}, damping={self.damping!r})",
            f"examples = {pipeline}.stages[0].data",
            f"figure = plots.influence_grid(view, examples, {queries}, query={self.query}, "
            f"k={self.k})",
        ]
        if self.effects is not None:
            lines.append(f"report = agreement(view, {self._name(self.effects, 'effects')})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"AlphaDampingExplorer: {len(self.queries)} queries, {len(self.examples.examples)} "
            f"examples, {len(self.alphas)} α from {self.alphas[0]:.2g} to ∞, {len(self.dampings)} "
            "dampings"
        )


def _mean(values: numpy.ndarray) -> float:
    return float(numpy.nanmean(values)) if not numpy.isnan(values).all() else float("nan")

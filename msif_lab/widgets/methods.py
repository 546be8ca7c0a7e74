"""Two methods side by side: the examples on which they agree and on which not."""

import html
from collections.abc import Mapping

import torch

from .. import plots
from ..arguments import check_whole, shown
from ..data.examples import Examples
from ..evaluation.comparison import row_correlations, row_ranks
from ..figures import img, plain
from ..influence.result import Influence
from ..pipeline.pipeline import Pipeline
from .frame import Explorer
from .given import check_scores, one_pipeline, quoted
from .pictures import Cards, Gallery, Plot, open_axes, signed, table

__all__ = ["MethodComparison"]


class MethodComparison(Explorer):
    """Two methods' scores of one query as a scatter; choose an example, see its place in both.

    Each method has its own scale, so the scatter shows scores divided by the largest size each
    method gives for this query; the table has the scores themselves.

    Args:
        pipeline: trained.
        scores: two or more methods by name, of the same stage and queries.
        queries: images ``(Q, 1 or 3, H, W)``, as are the stage's examples.
        k: pictures per row.

    Raises:
        ValueError, TypeError: fewer than two methods, other queries or examples, inputs that are
            not images.

    >>> import msif_lab as msif
    >>> from msif_lab import experiments, widgets
    >>> experiment = experiments.digits(msif.Frozen(), pretraining=80, finetuning=60, queries=12)
    >>> pipeline, queries = experiment.pipeline.fit(progress=False), experiment.queries
    >>> unrolled = msif.UnrolledInfluence().fit(pipeline, progress=False)
    >>> scores = {"unrolled": unrolled.score(queries, progress=False)}
    >>> scores["loss"] = msif.Loss().fit(pipeline).score(queries)
    >>> widgets.MethodComparison(pipeline, scores, queries)  # in a notebook: scatter and pictures
    MethodComparison: 12 queries, 80 examples, methods ['unrolled', 'loss']
    """

    kind = "methods"

    def __init__(
        self, pipeline: Pipeline, scores: Mapping[str, Influence], queries: Examples, *, k: int = 5
    ):
        self.pipeline = one_pipeline(pipeline, queries)
        self.queries = queries
        if not isinstance(scores, Mapping) or len(scores) < 2:
            raise ValueError(
                f"scores={shown(scores)} must hold two or more methods by name: "
                "{'implicit': ..., 'loss': ...}"
            )
        stages = {
            name: check_scores(one, pipeline, queries, f"scores[{name!r}]")
            for name, one in scores.items()
        }
        if len(set(stages.values())) > 1:
            raise ValueError(f"scores are of different stages, {stages}; compare methods on one")
        self._given = scores
        self.table = dict(scores)
        self.stage = next(iter(stages.values()))
        data = pipeline.stages[self.stage].data
        self.k = check_whole("k", k, most=len(data), why="the examples of the stage")
        self.gallery = Gallery(queries, "queries")
        self.examples = Gallery(data, "the stage's data")
        self.query = 0
        self.a, self.b = list(self.table)[:2]
        self.example = int(self._ranks()[0].argmin())

    def _ranks(self, query: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of each example by either method, ``(N,)`` each; 0 is the most harmful."""
        query = self.query if query is None else query
        places = []
        for name in (self.a, self.b):
            scores = self.table[name]
            harm = scores.harm_sign * scores.values[query].cpu()
            places.append(harm.argsort(descending=True, stable=True).argsort())
        return tuple(places)

    def correlation(self) -> torch.Tensor:
        """Spearman of the two methods' scores, per query ``(Q,)``."""
        a, b = (row_ranks(self.table[name].values.cpu()) for name in (self.a, self.b))
        return torch.from_numpy(row_correlations(a, b))

    # --- controls ---------------------------------------------------------------------------------

    def _build(self) -> list:
        import ipywidgets

        self._controls()
        self.view = self._html("view")
        self.plot = self._html("plot")
        self.answer = self._html("answer")
        self.titles = [self._html("view") for _ in range(3)]
        self.rows = [Cards(self, self.k, "example", self._choose) for _ in range(3)]
        ranked = []
        for title, row in zip(self.titles, self.rows, strict=True):
            ranked += [title, row.box]
        self._quiet = False
        self._correlation = None
        wrap = {"flex_flow": "row wrap"}
        return [
            ipywidgets.HBox([self.a_control, self.b_control], layout=wrap),
            self.query_control,
            self.rank_control,
            ipywidgets.HBox([ipywidgets.VBox([self.view, self.answer]), self.plot], layout=wrap),
            ipywidgets.VBox(ranked),
            self._code_box(),
        ]

    def _controls(self) -> None:
        """The dropdowns and sliders."""
        names = list(self.table)
        for letter in "ab":
            control = self._control(
                "Dropdown",
                f"method-{letter}",
                f"Method {letter.upper()}",
                self._set(letter),
                options=names,
                value=getattr(self, letter),
            )
            setattr(self, f"{letter}_control", control)
        slider = {"continuous_update": False, "layout": {"width": "min(700px, 98%)"}}
        queries = [(str(q), q) for q in range(len(self.queries))]
        self.query_control = self._control(
            "SelectionSlider", "query", "Query", self._set("query"), options=queries, **slider
        )
        self.rank_control = self._control(
            "IntSlider",
            "rank",
            "Example, from most harmful (1) by method A",
            self._choose_rank,
            min=1,
            max=len(self.examples.examples),
            **slider,
        )

    def _set(self, name: str):
        def change(value):
            setattr(self, name, value)
            if name in "ab":
                self._correlation = None  # was of two other methods
            self._show()

        return change

    def _choose(self, example: int) -> None:
        self.example = example
        self._show()

    def _choose_rank(self, rank: int) -> None:
        if not self._quiet:
            self._choose(int((self._ranks()[0] == rank - 1).nonzero()))

    def _show(self) -> None:
        q = self.query
        rank_a, rank_b = self._ranks()
        self._quiet = True
        try:
            self.rank_control.value = int(rank_a[self.example]) + 1
        finally:
            self._quiet = False
        about = f"query {q}<br>{html.escape(self.gallery.label(q))}"
        query = self.gallery.show(q, "Query", width=96, column=150, caption=about)
        about = f"chosen: id {self.examples.number(self.example)}<br>"
        about += html.escape(self.examples.label(self.example))
        chosen = self.examples.show(
            self.example, "Chosen example", width=96, column=150, caption=about
        )
        if self._correlation is None:
            self._correlation = self.correlation()
        here = signed(float(self._correlation[q]), 2)
        average = signed(float(self._correlation.nanmean()), 2)
        found = f"Spearman of A and B: {here} for this query, {average} on average"
        self.view.value = f"<div>{query}{chosen}</div><div>{found}</div>"
        rows = []
        for letter, name, rank in (("A", self.a, rank_a), ("B", self.b, rank_b)):
            value = float(self.table[name].values[q, self.example])
            score = f"{value:+.2e} ({self.table[name].kind(value)})".replace("-", "−")
            place = f"{int(rank[self.example]) + 1} of {len(rank)}"
            rows.append((f"{letter}: {name}", score, place))
        self.answer.value = table("The chosen example", rows, ("score", "place, 1 = most harmful"))
        self._show_rows(rank_a, rank_b)
        self.plot.value = self._draw()
        self._refresh_code()

    def _show_rows(self, rank_a: torch.Tensor, rank_b: torch.Tensor) -> None:
        rows = (
            (f"Most harmful by A: {self.a}", rank_a),
            (f"Most harmful by B: {self.b}", rank_b),
            ("Places that differ most", -(rank_a - rank_b).abs()),
        )
        for title, row, (text, order) in zip(self.titles, self.rows, rows, strict=True):
            title.value = f"<b>{html.escape(text)}</b>; below each its place by A, by B"
            cards = []
            for place in torch.argsort(order, stable=True)[: self.k].tolist():
                by_a = int(rank_a[place]) + 1
                by_b = int(rank_b[place]) + 1
                caption = f"{html.escape(self.examples.label(place))}<br>{by_a}, {by_b}"
                what = f"Example, place {by_a} by A and {by_b} by B"
                picture = self.examples.show(place, what, caption=caption)
                button = f"id {self.examples.number(place)}"
                cards.append((place, picture, button, place == self.example))
            row.show(cards)

    def _scaled(self, query: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores ``(N,)`` by either method, divided by the largest size each gives this query."""
        both = (self.table[name].values[query].detach().cpu() for name in (self.a, self.b))
        return tuple(values / (float(values.abs().max()) or 1.0) for values in both)

    def _draw(self) -> str:
        if not hasattr(self, "_figure"):
            self._figure = Plot(_prepare, 3.6, 3.4)
        cloud, mark = self._figure.artists
        x, y = self._scaled(self.query)
        cloud.set_data(x.numpy(), y.numpy())
        mark.set_data(x[[self.example]].numpy(), y[[self.example]].numpy())
        alt = (
            f"Scores of {len(x)} examples for query {self.query}: {self.a} across, {self.b} "
            f"upwards; the chosen one at {signed(float(x[self.example]), 2)}, "
            f"{signed(float(y[self.example]), 2)}"
        )
        return img(self._figure.png(cloud, mark), alt)

    # --- without a kernel -------------------------------------------------------------------------

    def static(self, queries=None) -> list:
        """One figure per query position: the scatter, and the most harmful examples by both."""
        import matplotlib.pyplot as plt

        figures = []
        for query in [self.query] if queries is None else queries:
            figure = plt.figure(figsize=(2.9 + 0.95 * self.k, 2.9))
            left, right = figure.subfigures(1, 2, width_ratios=(2.9, 0.95 * self.k))
            ax = left.subplots()
            ax.plot(*self._scaled(query), "o", ms=3, alpha=0.7, color=plots.HELPFUL, mew=0)
            ax.set_xlabel(f"{plain(self.a)}, score ÷ largest", fontsize=8)
            ax.set_ylabel(f"{plain(self.b)}, score ÷ largest", fontsize=8)
            ax.set_title(f"query {query}", fontsize=9)
            axes = right.subplots(2, self.k, squeeze=False)
            for row, name, ranks in zip(axes, (self.a, self.b), self._ranks(query), strict=True):
                for ax, place in zip(row, torch.argsort(ranks)[: self.k].tolist(), strict=True):
                    ax.imshow(plots.picture(self.examples.examples.x[place]), cmap="gray_r")
                    ax.set_title(plain(self.examples.label(place)), fontsize=8)
                    ax.set_xlabel(f"id {self.examples.number(place)}", fontsize=8)
                    ax.set(xticks=[], yticks=[])
                    ax.spines[:].set_visible(True)
                row[0].set_ylabel(f"harmful by\n{plain(name)}", fontsize=8)
            figures.append(figure)
        return figures

    def code(self) -> str:
        """Python for the view: scores ``a``, ``b``, the example's ``pair``, and ``correlation``."""
        scores = self._name(self._given, "scores")
        queries = self._name(self.queries, "queries")
        pipeline = self._name(self.pipeline, "pipeline")
        pair = f"{self.query}, {self.example}"
        grid = f"plots.influence_grid(one, examples, {queries}, {self.query}, {self.k})"
        return "\n".join(
            [
                "from msif_lab import plots",
                "from msif_lab.evaluation import row_correlations, row_ranks",
                "",
                f"a, b = {scores}[{quoted(self.a)}], {scores}[{quoted(self.b)}]",
                f"pair = a.values[{pair}], b.values[{pair}]",
                "# Spearman of each query",
                "correlation = row_correlations(row_ranks(a.values), row_ranks(b.values))",
                f"examples = {pipeline}.stages[{self.stage}].data",
                f"figures = [{grid} for one in (a, b)]",
            ]
        )

    def __repr__(self) -> str:
        return (
            f"MethodComparison: {len(self.queries)} queries, {len(self.examples.examples)} "
            f"examples, methods {list(self.table)}"
        )


def _prepare(figure):
    ax = open_axes(figure, left=0.24, top=0.97, bottom=0.15)
    ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    ax.set_xlabel("score by A ÷ its largest", fontsize=9)
    ax.set_ylabel("score by B ÷ its largest", fontsize=9)
    for line in (ax.axhline, ax.axvline):
        line(0, color=plots.NEUTRAL, lw=0.8)
    (cloud,) = ax.plot([], [], "o", ms=4, alpha=0.7, color=plots.HELPFUL, mew=0)
    (mark,) = ax.plot([], [], "s", ms=11, mfc="none", mec="black", mew=2)
    return cloud, mark

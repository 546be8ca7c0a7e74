"""One run or the average run? The scores of one query under more and more seeds."""

import html
from collections.abc import Sequence

import torch

from .. import plots
from ..arguments import check_whole
from ..data.examples import Examples
from ..figures import img, plain
from ..influence.averaged import InfluenceOverSeeds
from ..pipeline.pipeline import Pipeline
from ..pipeline.seeds import SeedRuns
from .frame import Explorer
from .given import check_scores, one_pipeline
from .pictures import Gallery, Plot, open_axes, signed, table

__all__ = ["SeedExplorer"]

LEVEL = 0.95


class SeedExplorer(Explorer):
    """Average one query's scores over the first S seeds: bars, errors, and whose sign is sure.

    It shows the examples that the average of S seeds ranks first, with their pictures, and beside
    each the average of all seeds: what the first few promise too much.

    Args:
        runs: trained under several seeds, by `over_seeds`.
        scores: of these runs, by `AveragedInfluence`.
        queries: images ``(Q, 1 or 3, H, W)``, as are the scored stage's examples.
        k: examples at either end.

    As a cell's last value it shows the live view; `static` draws pictures that need no kernel;
    `code` gives the view as Python.

    Raises:
        ValueError, TypeError: a single run, scores of other runs, queries or examples, or inputs
            that are not images.

    >>> import msif_lab as msif
    >>> from msif_lab import experiments, widgets
    >>> small = {"pretraining": 80, "finetuning": 60, "queries": 12, "epochs": (2, 2)}
    >>> built = lambda seed: experiments.digits(msif.WarmStart(), seed=seed, **small)
    >>> runs = msif.over_seeds(lambda seed: built(seed).pipeline, 3, progress=False)
    >>> queries = built(0).queries
    >>> averaged = msif.AveragedInfluence(msif.UnrolledInfluence()).fit(runs)
    >>> scores = averaged.score(queries, progress=False)
    >>> widgets.SeedExplorer(runs, scores, queries)  # in a notebook: a slider, bars and pictures
    SeedExplorer: 12 queries, 80 examples of 'pretrain', 1 to 3 seeds
    """

    kind = "seeds"

    def __init__(
        self,
        runs: SeedRuns | Sequence[Pipeline],
        scores: InfluenceOverSeeds,
        queries: Examples,
        *,
        k: int = 4,
    ):
        if isinstance(runs, Pipeline):
            raise TypeError("runs is one Pipeline; give those of several: over_seeds(pipeline, 8)")
        self.runs = runs if isinstance(runs, SeedRuns) else SeedRuns(runs)
        if not isinstance(scores, InfluenceOverSeeds):
            raise TypeError(
                f"scores is {type(scores).__name__}, not of several seeds; give what "
                "AveragedInfluence(method).fit(runs).score(queries) returns"
            )
        if len(scores.seeds) < 2 or list(scores.seeds) != list(self.runs.seeds):
            raise ValueError(
                f"scores are of seeds {list(scores.seeds)}, runs of {list(self.runs.seeds)}; give "
                "two or more runs and the scores of all of them"
            )
        first = one_pipeline(self.runs[0], queries)
        self.stage = check_scores(scores, first, queries)
        data = first.stages[self.stage].data
        self.k = check_whole("k", k, most=len(data) // 2, why="half of the stage's examples")
        self.scores, self.queries = scores, queries
        self._given = runs
        self.gallery = Gallery(queries, "queries")
        self.examples = Gallery(data, f"the data of stage {first.stages[self.stage].name!r}")
        self.query, self.seeds = 0, len(scores.seeds)
        self._averages: dict[int, InfluenceOverSeeds] = {}
        self._sure: dict[int, torch.Tensor] = {}

    def average(self, seeds: int | None = None) -> InfluenceOverSeeds:
        """The average of the first ``seeds`` seeds; default those in view."""
        seeds = self.seeds if seeds is None else seeds
        seeds = check_whole("seeds", seeds, most=len(self.scores.seeds), why="the runs")
        if seeds not in self._averages:
            self._averages[seeds] = self.scores.some(range(seeds))
        return self._averages[seeds]

    def sure(self, seeds: int | None = None) -> torch.Tensor:
        """Whose sign the average of so many seeds is sure of, a mask ``(Q, N)``; of one, none."""
        average = self.average(seeds)
        count = len(average.seeds)
        if count not in self._sure:
            nothing = torch.zeros(average.values.shape, dtype=torch.bool)
            self._sure[count] = average.trusted(LEVEL).cpu() if count > 1 else nothing
        return self._sure[count]

    def pick(self, *, query: int | None = None, seeds: int | None = None) -> "SeedExplorer":
        """Choose what the sliders would choose, and return the explorer.

        Raises:
            ValueError: there is no such query, or not so many seeds.
        """
        if query is not None:
            self.query = check_whole("query", query, 0, len(self.queries) - 1, why="its position")
        if seeds is not None:
            self.seeds = len(self.average(seeds).seeds)
        if "widget" in vars(self):
            self._guarded(self._show)()
        return self

    # --- controls ---------------------------------------------------------------------------------

    def _build(self) -> list:
        import ipywidgets

        slider = {"continuous_update": False, "layout": {"width": "min(700px, 98%)"}}
        self.query_control = self._control(
            "SelectionSlider",
            "query",
            "Query",
            self._set("query"),
            options=[(str(q), q) for q in range(len(self.queries))],
            value=self.query,
            **slider,
        )
        self.seeds_control = self._control(
            "IntSlider",
            "seeds",
            "Average of the first seeds",
            self._set("seeds"),
            min=1,
            max=len(self.scores.seeds),
            value=self.seeds,
            **slider,
        )
        self.view, self.plot, self.answer, self.pictures = (
            self._html(name) for name in ("view", "plot", "answer", "pictures")
        )
        self._quiet = False
        wrap = {"flex_flow": "row wrap"}
        beside = ipywidgets.VBox([self.view, self.answer])
        return [
            self.query_control,
            self.seeds_control,
            ipywidgets.HBox([self.plot, beside], layout=wrap),
            self.pictures,
            self._code_box(),
        ]

    def _set(self, name: str):
        def change(value):
            if not self._quiet:
                setattr(self, name, value)
                self._show()

        return change

    # --- the view ---------------------------------------------------------------------------------

    def _show(self) -> None:
        self._quiet = True
        try:
            self.query_control.value, self.seeds_control.value = self.query, self.seeds
        finally:
            self._quiet = False
        q, places = self.query, plots.extremes(self.average(), self.query, self.k)
        about = f"query {q}<br>{html.escape(self.gallery.label(q))}"
        self.view.value = self.gallery.show(q, "Query", width=80, column=150, caption=about)
        self.answer.value = table(self._title(), self._facts(places))
        self.pictures.value = self._cards(places)
        self.plot.value = self._draw(places)
        self._refresh_code()

    def _title(self) -> str:
        count = len(self.average().seeds)
        return "One seed" if count == 1 else f"Average of {count} of {len(self.scores.seeds)} seeds"

    def _facts(self, places: list[int]) -> list[tuple[str, str]]:
        here, average = self.sure()[self.query], self.average()
        needed = self.scores.seeds_needed(0.9)
        same = average.values[self.query].sign() == self.scores.values[self.query].sign()
        return [
            ("sure signs, of those shown", f"{int(here[places].sum())} of {len(places)}"),
            ("sure signs, of this query's examples", f"{int(here.sum())} of {len(here)}"),
            ("signs as in the average of all seeds", f"{int(same.sum())} of {len(same)}"),
            ("expected r with infinitely many seeds", f"{self.scores.expected_r(self.seeds):.2f}"),
            ("seeds needed for r = 0.9", "none will do" if needed == float("inf") else f"{needed}"),
        ]

    def _cards(self, places: list[int]) -> str:
        """The pictures of the ranked examples, in the bars' order."""
        sure, values = self.sure()[self.query], self.average().values[self.query]
        cards = []
        for place in places:
            value = float(values[place])
            kind = self.scores.kind(value)
            mark = "✓ sure" if sure[place] else "not sure"
            label = html.escape(self.examples.label(place))
            caption = f"id {self.examples.number(place)}<br>{label}"
            caption += f"<br>{signed(1e3 * value, 2)}, {mark}"
            cards.append(
                self.examples.show(
                    place,
                    f"{kind.capitalize()} example, {mark}",
                    caption=caption,
                    border=f"3px solid {plots.COLOURS[kind]}",
                    column=104,
                )
            )
        return f'<div style="white-space:nowrap;overflow:auto hidden">{"".join(cards)}</div>'

    def _draw(self, places: list[int]) -> str:
        if not hasattr(self, "_figure"):
            self._figure = Plot(self._prepare, 5.2, 3.2)
        average, q = self.average(), self.query
        values, singles = average.values[q, places], self.average().per_seed[:, q, places]
        low = high = values
        if self.seeds > 1:
            low, high = (end[q, places] for end in average.interval(LEVEL))
        numbers = [1e3 * t.detach().cpu().double() for t in (values, low, high, singles)]
        colours = [plots.COLOURS[average.kind(float(v))] for v in values]
        ax, fills, marks = self._figure.artists
        for fill in fills:
            fill(*numbers, colours)
        last = 1e3 * self.scores.values[q, places].detach().cpu().double()
        marks.set_data(range(len(places)), last.numpy())
        limit = max(1.1 * float(last.abs().max()), ax.get_ylim()[1])
        ax.set_ylim(-limit, limit)
        ids = [str(self.examples.number(place)) for place in places]
        sure = self.sure()[q, places].tolist()
        ax.set_xticks(range(len(ids)), [f"{i}\n{'✓' * s}" for i, s in zip(ids, sure, strict=True)])
        said = ", ".join(
            f"id {i} {signed(float(v), 2)}{' sure' if s else ''}"
            for i, v, s in zip(ids, numbers[0], sure, strict=True)
        )
        alt = f"{self._title()}, query {q}: bars with 95 % intervals, in thousandths: {said}"
        return img(self._figure.png(), alt)

    def _prepare(self, figure):
        ax = open_axes(figure, left=0.14, top=0.9, bottom=0.22)
        fills = plots.bar_artists(ax, 2 * self.k)
        label = f"average of all {len(self.scores.seeds)} seeds"
        (marks,) = ax.plot([], [], "D", ms=7, mfc="none", mec="black", mew=1.2, label=label)
        ax.set_xlabel("id; left most helpful, right most harmful; ✓ sign is sure", fontsize=9)
        unit = "nat" if self.scores.unit == "nats" else self.scores.unit
        ax.set_ylabel(f"change in {plain(self.scores.target)}, {unit} × 1000", fontsize=9)
        ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.98))
        return ax, fills, marks

    # --- without a kernel -------------------------------------------------------------------------

    def static(self, seeds: Sequence[int] | None = None, query: int | None = None) -> list:
        """One figure of bars and pictures for each number of seeds; default the one in view."""
        import matplotlib.pyplot as plt

        query = self.query if query is None else query
        query = check_whole("query", query, 0, len(self.queries) - 1, why="its position")
        figures = []
        for count in [self.seeds] if seeds is None else seeds:
            figure, ax = plt.subplots(figsize=(0.62 * 2 * self.k + 1.4, 3.4))
            average = self.average(count)
            data = self.examples.examples
            plots.score_bars(average, query, self.k, ax, examples=data, level=LEVEL)
            name = plain(self.gallery.label(query))
            of = "one seed" if count == 1 else f"average of {count} seeds"
            ax.set_title(f"query {query} ({name}), {of}", fontsize=10)
            figures.append(figure)
        return figures

    def code(self) -> str:
        """Python for the view: the average, whose signs are ``sure``, and its bars."""
        scores, runs = self._name(self.scores, "scores"), self._name(self._given, "runs")
        sure = "sure = average.trusted()"
        lines = [
            "from msif_lab import plots",
            "",
            f"average = {scores}.some(range({self.seeds}))",
            *([sure] if self.seeds > 1 else []),
            f"expected = {scores}.expected_r({self.seeds})",
            f"examples = {runs}[0].stages[{self.stage}].data",
            f"ax = plots.score_bars(average, {self.query}, {self.k}, examples=examples)",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"SeedExplorer: {len(self.queries)} queries, {len(self.examples.examples)} examples "
            f"of {self.scores.stage!r}, 1 to {len(self.scores.seeds)} seeds"
        )

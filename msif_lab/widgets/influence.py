"""Who helped, who harmed, and is it true? Pick a query and an example, remove it and retrain."""

import html
from collections.abc import Callable, Mapping, Sequence

import torch

from .. import plots
from ..arguments import check_function, check_whole
from ..data.examples import Examples
from ..evaluation.removals import removal_effects
from ..figures import img, plain
from ..influence.result import Influence
from ..pipeline.pipeline import Pipeline
from .frame import Explorer, need_choice
from .given import pipelines, predicted_class, quoted, score_table
from .pictures import Cards, Gallery, Plot, effects_axes, signed, table

__all__ = ["InfluenceExplorer"]

EVERY = "all"
WRONG = "misclassified"


class InfluenceExplorer(Explorer):
    """Pick a query, see its most helpful and most harmful examples, and put one to the test.

    For the chosen example it shows the predicted effect of its removal on all queries, and on
    request removes it for real and retrains every stage.

    Args:
        pipeline: trained; or several by case: ``{"frozen": ..., "full": ...}``.
        scores: one `Influence`; or methods by name, ``{"implicit": ..., "TracIn": ...}``; with
            several pipelines one of these for each case. Any `Influence` may be a list of them
            instead, one for each scored stage.
        queries: of the scores; images ``(Q, 1 or 3, H, W)``, as are the scored stages'
            examples.
        k: pictures per row.
        target: the function q, where the scores are of your own target; ``"loss"``,
            ``"margin"`` and ``"output"`` are known from the scores.

    As a cell's last value it shows the live view; `static` draws pictures that need no kernel;
    `code` gives the view as Python. Retraining works on a copy: the pipeline's models stay as they
    are, also after a stop.

    Raises:
        ValueError, TypeError: scores of other queries, examples or cases; inputs that are not
            images.

    >>> import msif_lab as msif
    >>> from msif_lab import experiments, widgets
    >>> experiment = experiments.digits(msif.Frozen(), pretraining=80, finetuning=60, queries=12)
    >>> pipeline, queries = experiment.pipeline.fit(progress=False), experiment.queries
    >>> unrolled = msif.UnrolledInfluence().fit(pipeline, progress=False)
    >>> scores = unrolled.score(queries, progress=False)
    >>> explorer = widgets.InfluenceExplorer(pipeline, scores, queries)
    >>> explorer  # in a notebook: controls and pictures
    InfluenceExplorer: 12 queries, examples of ['pretrain']
    >>> figure = explorer.pick(query=3).static()[0]
    """

    kind = "influence"

    def __init__(
        self,
        pipeline: Pipeline | Mapping[str, Pipeline],
        scores: Influence | Mapping,
        queries: Examples,
        *,
        k: int = 5,
        target: Callable | None = None,
    ):
        self.pipelines = pipelines(pipeline, queries)
        self.table = score_table(self.pipelines, scores, queries)
        self.queries = queries
        self.target = target
        self._given = pipeline, scores
        smallest = min(len(given.scores.ids) for given in self.table.values())
        self.k = check_whole("k", k, most=smallest, why="the examples of a stage")
        if target is not None:
            check_function("target", target, "(outputs, targets) -> (B,)")
        for given in self.table.values():
            known = ("loss", "margin", "output")
            if target is None and given.scores.target not in known:
                raise ValueError(
                    f"scores{given.path} are of the target {given.scores.target!r}, which is none "
                    f"of {known}; give the function itself: target=..."
                )
        self.gallery = Gallery(queries, "queries")
        self._galleries: dict[tuple[str, int], Gallery] = {}
        self.case, self.method, self.stage = next(iter(self.table))
        for case, _, stage in self.table:
            self._examples(case, stage)
        self.shown = EVERY
        self.query = 0
        self.example: int | None = None
        self._predicted: dict[str, torch.Tensor] = {}
        self._answers: dict[tuple, torch.Tensor] = {}

    # --- what is in view --------------------------------------------------------------------------

    @property
    def scores(self) -> Influence:
        """The scores that are shown."""
        return self.table[self.case, self.method, self.stage].scores

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that is shown."""
        return self.pipelines[self.case]

    @property
    def actual(self) -> torch.Tensor | None:
        """Changes of all queries ``(Q,)`` after removing the chosen example; None until then."""
        return self._answers.get((self.case, self.stage, self.scores.target, self.example))

    def _examples(self, case: str, stage: int) -> Gallery:
        if (case, stage) not in self._galleries:
            scored = self.pipelines[case].stages[stage]
            name = f"the data of stage {scored.name!r}"
            self._galleries[case, stage] = Gallery(scored.data, name)
        return self._galleries[case, stage]

    def _classes(self, case: str) -> torch.Tensor | None:
        """The class that the final model predicts for each query ``(Q,)``; None without classes."""
        if not self.queries.has_labels or not self.pipelines[case].stages[-1].data.has_labels:
            return None
        if case not in self._predicted:
            found = self.pipelines[case].evaluate(self.queries, predicted_class)
            self._predicted[case] = found.cpu().long()
        return self._predicted[case]

    def _groups(self) -> dict[str, list[int]]:
        """Positions of the queries that can be shown together, by name."""
        groups = {EVERY: list(range(len(self.queries)))}
        predicted = self._classes(self.case)
        if predicted is not None:
            y = self.queries.y.cpu()
            groups[WRONG] = (predicted != y).nonzero().flatten().tolist()
            for label, name in enumerate(self.queries.classes):
                groups[f"label {name}"] = (y == label).nonzero().flatten().tolist()
        return {name: members for name, members in groups.items() if members}

    def _describe(self, query: int) -> str:
        predicted = self._classes(self.case)
        text = f"query {query}, {self.gallery.label(query)}"
        if predicted is None:
            return text
        right = int(predicted[query]) == int(self.queries.y[query])
        named = self.pipeline.stages[-1].data.classes
        return f"{text}, predicted {named[int(predicted[query])]} ({'right' if right else 'wrong'})"

    def pick(
        self, *, query: int | None = None, example: int | None = None, case: str | None = None
    ) -> "InfluenceExplorer":
        """Choose by position what a click would choose, and return the explorer.

        Raises:
            ValueError: there is no such query, example or case.
        """
        if case is not None:
            need_choice("case", case, list(self.pipelines))
            self.case = case
            self.example = None
        for name, value, count in (
            ("query", query, len(self.queries)),
            ("example", example, len(self.scores.ids)),
        ):
            if value is not None:
                value = check_whole(name, value, 0, count - 1, why="its position")
                setattr(self, name, value)
        if query is not None:
            self.shown = EVERY
        if "widget" in vars(self):
            self._guarded(self._show)()
        return self

    # --- controls ---------------------------------------------------------------------------------

    def _build(self) -> list:
        import ipywidgets

        choices = self._dropdowns()
        self.query_control = self._control(
            "SelectionSlider",
            "query",
            "Query",
            self._set("query"),
            options=[("0", 0)],
            continuous_update=False,
            layout={"width": "98%"},
        )
        self.film = Cards(self, 8, "query-image", self._pick_query)
        self.view = self._html("view")
        self.titles = self._html("view"), self._html("view")
        self.rows = (
            Cards(self, self.k, "example", self._choose),
            Cards(self, self.k, "example", self._choose),
        )
        self.plot = self._html("plot")
        self.answer = self._html("answer")
        helpful, harmful = self.rows
        ranked = [self.titles[0], helpful.box, self.titles[1], harmful.box]
        wrap = {"flex_flow": "row wrap"}
        return [
            ipywidgets.HBox(choices, layout=wrap),
            self.query_control,
            self.film.box,
            ipywidgets.HBox([self.view, ipywidgets.VBox(ranked)], layout=wrap),
            self._retraining("Remove it and retrain", self._remove),
            ipywidgets.HBox([self.answer, self.plot], layout=wrap),
            self._code_box(),
        ]

    def _dropdowns(self) -> list:
        """The dropdowns; returns those that offer a choice."""
        cases, methods, stages = self._names()
        self._quiet = False

        def dropdown(name: str, label: str, attribute: str, options: list):
            return self._control("Dropdown", name, label, self._set(attribute), options=options)

        self.queries_control = dropdown("queries", "Show queries", "shown", [EVERY])
        self.case_control = dropdown("case", "Case", "case", cases)
        self.method_control = dropdown("method", "Method", "method", methods)
        self.stage_control = dropdown("stage", "Stage", "stage", [("", stages[0])])
        choices = [self.queries_control]
        for control, options in (
            (self.case_control, cases),
            (self.method_control, methods),
            (self.stage_control, stages),
        ):
            if len(options) > 1:
                choices.append(control)
        return choices

    def _names(self) -> tuple[list, list, list]:
        """All cases, methods and positions of stages, in the order given."""
        cases, methods, stages = ([*dict.fromkeys(key[i] for key in self.table)] for i in range(3))
        return cases, methods, stages

    def _set(self, name: str) -> Callable:
        """What a control does with a new value: keep it under this name and show the view."""

        def change(value):
            if not self._quiet and value is not None:
                setattr(self, name, value)
                self._show()

        return change

    def _pick_query(self, query: int) -> None:
        self.query = query
        self._show()

    def _choose(self, example: int) -> None:
        self.example = example
        self._show()

    def _settle(self) -> None:
        """Make the state one that the table has, and set the controls to match."""
        here = [key for key in self.table if key[0] == self.case]
        methods = [*dict.fromkeys(method for _, method, _ in here)]
        self.method = self.method if self.method in methods else methods[0]
        stages = [stage for _, method, stage in here if method == self.method]
        before = self.stage
        self.stage = before if before in stages else stages[0]
        if before != self.stage or (self.example or 0) >= len(self.scores.ids):
            self.example = None
        groups = self._groups()
        self.shown = self.shown if self.shown in groups else EVERY
        members = groups[self.shown]
        self.query = self.query if self.query in members else members[0]
        named = [(self.pipeline.stages[stage].name, stage) for stage in stages]
        counted = [(f"{name} ({len(group)})", name) for name, group in groups.items()]
        self._quiet = True
        try:
            for control, options, value in (
                (self.case_control, None, self.case),
                (self.method_control, methods, self.method),
                (self.stage_control, named, self.stage),
                (self.queries_control, counted, self.shown),
                (self.query_control, [(str(q), q) for q in members], self.query),
            ):
                if options is not None and tuple(control.options) != tuple(options):
                    control.options = options
                if control.value != value:
                    control.value = value
        finally:
            self._quiet = False
        page = members.index(self.query) // len(self.film) * len(self.film)
        self.film.show(
            (q, self.gallery.show(q, "Query", width=40), f"query {q}", q == self.query)
            for q in members[page : page + len(self.film)]
        )

    # --- the view ---------------------------------------------------------------------------------

    def _show(self) -> None:
        self._settle()
        scores = self.scores
        q = self.query
        caption = html.escape(self._describe(q)).replace(", ", "<br>")
        self.view.value = self.gallery.show(q, "Query", width=112, caption=caption, column=140)
        gallery = self._examples(self.case, self.stage)
        does = {"−": "lower", "+": "raise"}
        rankings = (("helpful", scores.helpful(self.k)), ("harmful", scores.harmful(self.k)))
        for title, row, (word, ranking) in zip(self.titles, self.rows, rankings, strict=True):
            sign = scores.signs[word]
            title.value = (
                f"<b>Most {word}</b> ({sign}): they {does[sign]} this query's "
                f"{html.escape(scores.target)}; below each its score × 1000, {scores.unit}"
            )
            cards = []
            ranked = zip(ranking.positions[q].tolist(), ranking.values[q].tolist(), strict=True)
            for place, value in ranked:
                picture = gallery.show_score(place, value, scores)
                cards.append((place, picture, f"id {gallery.number(place)}", place == self.example))
            row.show(cards)
        self._show_example()
        self._refresh_code()

    def _show_example(self) -> None:
        if self.example is None:
            self.answer.value = "Click an example to see what its removal does to every query."
            self.plot.value = ""
            self.retrain.disabled = True
            return
        self.retrain.disabled = self.job is not None and self.job.running
        gallery = self._examples(self.case, self.stage)
        predicted = self._effect()
        actual = self.actual
        name = f"id {gallery.number(self.example)} ({gallery.label(self.example)})"
        rows = ("this query", f"mean of {len(predicted)} queries", "queries that go up / down")
        columns = [self._summary(predicted), ["not retrained yet"] * len(rows)]
        if actual is not None:
            columns[1] = self._summary(actual)
        stage = self.pipeline.stages[self.stage].name
        about = f"Without {name} of stage {stage}: change in {self.scores.target}"
        self.answer.value = table(
            f"{about}, {self.scores.unit}",
            zip(rows, *columns, strict=True),
            ("predicted", "actual"),
        )
        self.plot.value = self._draw(name, predicted, actual)

    def _summary(self, change: torch.Tensor) -> list[str]:
        """Changes of all queries ``(Q,)`` as text: this one, the mean, how many go up and down."""
        up = int((change > 0).sum())
        down = int((change < 0).sum())
        return [
            signed(float(change[self.query])),
            signed(float(change.mean()), 5),
            f"{up} / {down}",
        ]

    def _effect(self) -> torch.Tensor:
        return self.scores.removal_effect([self.example]).detach().cpu()

    def _draw(self, name: str, predicted: torch.Tensor, actual: torch.Tensor | None) -> str:
        if not hasattr(self, "_figure"):
            self._figure = Plot(effects_axes)
            self._figure_of = None
            self._figure_png = b""
        drawn = self.case, self.method, self.stage, self.example, actual is None
        if self._figure_of != drawn:
            self._redraw(predicted, actual)
            self._figure_of = drawn
            self._figure_png = self._figure.png()

        def between(change: torch.Tensor) -> str:
            return f"between {signed(float(change.min()))} and {signed(float(change.max()))}"

        q = self.query
        alt = f"Change of {len(predicted)} queries without {name}: "
        alt += f"predicted {signed(float(predicted[q]))} for query {q}, {between(predicted)}"
        if actual is not None:
            alt += f"; actual {signed(float(actual[q]))}, {between(actual)}"
        ax, *_ = self._figure.artists
        line = self._figure.over(ax, q)
        return f'<div style="position:relative">{img(self._figure_png, alt)}{line}</div>'

    def _redraw(self, predicted: torch.Tensor, actual: torch.Tensor | None) -> None:
        """Put these changes ``(Q,)`` into the kept figure."""
        ax, guess, truth = self._figure.artists
        number = range(len(predicted))
        guess.set_data(number, predicted.numpy())
        if actual is None:
            truth.set_data([], [])
            truth.set_label("actual: not retrained yet")
        else:
            truth.set_data(number, actual.numpy())
            truth.set_label("actual, after retraining")
        shown = [predicted] if actual is None else [predicted, actual]
        highest = max(float(change.abs().max()) for change in shown) or 1.0
        ax.set(xlim=(-1, len(predicted)), ylim=(-1.35 * highest, 1.35 * highest))
        ax.set_ylabel(f"change in {plain(self.scores.target)}, {self.scores.unit}", fontsize=9)
        ax.legend(loc="upper right", fontsize=8, frameon=False, ncols=2)

    # --- removing for real ------------------------------------------------------------------------

    def _remove(self) -> None:
        if self.example is None:
            raise ValueError("choose an example first, by its picture or the button below")
        key = self.case, self.stage, self.scores.target, self.example
        stage = self.stage
        example = self.example
        target = self.target or self.scores.target

        def work(pipeline):
            return removal_effects(
                pipeline, self.queries, [[example]], stage=stage, target=target, progress=False
            )

        def done(effects):
            self._answers[key] = effects.values[:, 0]
            self._show_example()

        self._run(self.pipeline, work, done)

    # --- without a kernel -------------------------------------------------------------------------

    def static(
        self,
        queries: Sequence[int] | None = None,
        case: str | None = None,
        method: str | None = None,
        stage=None,
    ) -> list:
        """One figure per query position, for readers without a kernel.

        Args:
            queries: positions; default the query in view.
            case, method, stage: whose scores; default the ones in view.

        Raises:
            ValueError: unknown case, method or stage.
        """
        case = self.case if case is None else case
        need_choice("case", case, list(self.pipelines))
        methods = [*dict.fromkeys(key[1] for key in self.table if key[0] == case)]
        if method is None:
            method = self.method if self.method in methods else methods[0]
        need_choice("method", method, methods)
        stages = [key[2] for key in self.table if key[:2] == (case, method)]
        if stage is None:
            stage = self.stage if self.stage in stages else stages[0]
        stage = self.pipelines[case].index(stage)
        need_choice("stage", stage, stages)
        scores = self.table[case, method, stage].scores
        examples = self.pipelines[case].stages[stage].data
        places = [self.query] if queries is None else queries
        return [
            plots.influence_grid(scores, examples, self.queries, query, self.k) for query in places
        ]

    def code(self) -> str:
        """Python for the view: its figure; ``predicted`` and ``actual`` for the chosen example."""
        pipeline = self._name(self._given[0], "pipeline")
        if self.case:
            pipeline += f"[{quoted(self.case)}]"
        scores = self._name(self._given[1], "scores")
        scores += self.table[self.case, self.method, self.stage].path
        queries = self._name(self.queries, "queries")
        lines = [
            "import msif_lab as msif",
            "from msif_lab import plots",
            "",
            f"pipe, view = {pipeline}, {scores}",
            f"examples = pipe.stages[{self.stage}].data",
            f"figure = plots.influence_grid(view, examples, {queries}, query={self.query}, "
            f"k={self.k})",
        ]
        if self.example is not None:
            target = quoted(self.scores.target)
            if self.target is not None:
                target = self._name(self.target, "target")
            lines += [
                f"predicted = view.removal_effect([{self.example}])  # without this example",
                f"without = [[{self.example}]]",
                f"effects = msif.removal_effects(pipe, {queries}, without, stage={self.stage}, "
                f"target={target})",
                "actual = effects.values[:, 0]",
            ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        cases, methods, stages = self._names()
        names = [self.pipeline.stages[stage].name for stage in stages]
        about = f", cases {cases}" if cases != [""] else ""
        about += f", methods {methods}" if methods != [""] else ""
        return f"InfluenceExplorer: {len(self.queries)} queries, examples of {names}{about}"

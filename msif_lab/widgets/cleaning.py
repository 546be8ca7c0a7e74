"""Remove what a ranking puts first, retrain: what was promised, and what has really changed?"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import plots
from ..arguments import check_whole, numbers_of, shown
from ..data.examples import Examples
from ..evaluation.comparison import precision_recall
from ..evaluation.curation import intervene
from ..evaluation.rankings import predicted_gain
from ..evaluation.removals import default_protocol, removal_base, require_start
from ..figures import img, plain
from ..influence.averaged import InfluenceOverSeeds
from ..influence.result import Influence
from ..pipeline.pipeline import Pipeline
from ..pipeline.seeds import SeedRuns
from .frame import Explorer, need_choice
from .given import check_scores, one_pipeline, predicted_class, quoted
from .pictures import Cards, Gallery, Plot, open_axes, signed, table

__all__ = ["CleaningExplorer"]

POINTS = 12  # of the predicted curve
MARGINS = {"left": 0.19, "top": 0.8, "bottom": 0.17}


@dataclass
class _Outcome:
    """What one removal has changed.

    Attributes:
        before, after: by measure, of each judge ``(J,)`` in the one run, or the judges' mean in
            each of several runs ``(S,)``.
        flips: share of the judges that are given another class, mean over runs; None for no class.
        runs: how many there are.
    """

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    flips: float | None
    runs: int

    def change(self, measure: str) -> tuple[float, float]:
        """Mean change, and its standard error over runs; NaN of a single one."""
        change = (self.after[measure] - self.before[measure]).double()
        several = self.runs > 1
        return float(change.mean()), float(change.std()) / self.runs**0.5 if several else torch.nan


class CleaningExplorer(Explorer):
    """Slide how many of the first examples of a ranking to remove, then retrain without them.

    It shows the predicted change of the mean loss over the number removed, each real one that was
    tried beside it, and all of these in a table. Given one pipeline, both stages are retrained as
    they were trained; given runs under several seeds, under fresh ones (`intervene`), with error
    bars. Where the corrupted examples are known, precision and recall are shown too.

    Args:
        pipeline: trained; or runs of several seeds, as `over_seeds` makes them.
        scores: an `Influence`, whose most harmful examples on average come first; or rankings by
            name, each an `Influence` or a suspicion ``(N,)``, larger first (a loss, say, or a
            negated confidence).
        queries: of the scores, examples of the target task; the scores may be one row about their
            mean (``aggregate="mean"``).
        judges: examples on which the pipeline is evaluated before and after; by default the
            queries, which then judge a removal that they chose themselves. Runs need others.
        corrupted: which examples are known to be corrupted, a mask ``(N,)`` or positions; without
            it there is no precision and recall, only the number flagged.
        stage: whose examples are ranked, where no `Influence` says so.
        seeds: how many fresh ones retrain runs.
        k: pictures per row.

    Raises:
        ValueError, TypeError: scores or masks of other examples, NaN, inputs that are not images.

    >>> import msif_lab as msif
    >>> from msif_lab import experiments, widgets
    >>> experiment = experiments.digits(msif.Frozen(), pretraining=80, finetuning=60, queries=12)
    >>> pipeline, queries = experiment.pipeline.fit(progress=False), experiment.queries
    >>> unrolled = msif.UnrolledInfluence().fit(pipeline, progress=False)
    >>> scores = unrolled.score(queries, progress=False)
    >>> # in a notebook: a slider and pictures
    >>> widgets.CleaningExplorer(pipeline, scores, queries, corrupted=[3, 17])
    CleaningExplorer: 80 examples, 2 known to be corrupted, rankings ['scores']
    """

    kind = "cleaning"

    def __init__(
        self,
        pipeline: Pipeline | SeedRuns,
        scores: Influence | torch.Tensor | Mapping,
        queries: Examples,
        *,
        corrupted: torch.Tensor | Sequence | None = None,
        judges: Examples | None = None,
        stage: int | str = 0,
        seeds: int = 4,
        k: int = 8,
    ):
        self.runs = pipeline if isinstance(pipeline, SeedRuns) else None
        pipeline = self.pipeline = one_pipeline(self.runs[0] if self.runs else pipeline, queries)
        self.queries = queries
        self.judges = queries if judges is None else judges
        one_pipeline(pipeline, self.judges, "judges")
        if self.runs and judges is None:
            raise ValueError("judges=None: runs are judged by other examples than the queries")
        self._given = scores
        self._truth_given = corrupted
        self.table = dict(scores) if isinstance(scores, Mapping) else {"": scores}
        if not self.table:
            raise ValueError("scores is empty; give an Influence or a suspicion (N,)")
        names = {
            name: f"scores[{name!r}]" if isinstance(scores, Mapping) else "scores"
            for name in self.table
        }
        stages = {
            check_scores(one, pipeline, queries, names[name], mean=True)
            for name, one in self.table.items()
            if isinstance(one, Influence)
        }
        if len(stages) > 1:
            raise ValueError("scores are of different stages; rank the examples of one")
        self.stage = stages.pop() if stages else pipeline.index(stage)
        self.examples = Gallery(pipeline.stages[self.stage].data, "the stage's data")
        self.count = len(self.examples.examples)
        self.orders = {name: self._order(one, names[name]) for name, one in self.table.items()}
        self.corrupted = None if corrupted is None else self._mask(corrupted)
        self.k = k = check_whole("k", k, most=self.count - 1, why="fewer than the examples")
        self.ranking = next(iter(self.table))
        first = k if self.corrupted is None else int(self.corrupted.sum())
        self.flagged = min(first, self.count - 1)
        self.seeds = self._fresh(check_whole("seeds", seeds))
        self._before: dict[str, torch.Tensor] | None = None
        self._outcomes: dict[tuple[int, ...], _Outcome] = {}
        self._tried: dict[tuple[str, int], _Outcome] = {}
        self._promises: dict[tuple[str, int], float] = {}
        self._curves: dict[str, tuple[list[int], list[float], list[float]] | None] = {}
        self._drawn: tuple[tuple[str, int], bytes] | None = None

    def _fresh(self, count: int) -> list[int]:
        """Seeds that neither made the runs nor the scores."""
        seen = set(self.runs.seeds) if self.runs else set()
        for one in self.table.values():
            seen |= set(one.seeds) if isinstance(one, InfluenceOverSeeds) else set()
        start = max(seen, default=-1) + 1
        return list(range(start, start + count))

    def _order(self, given, name: str) -> torch.Tensor:
        """All positions, the most suspicious first."""
        if isinstance(given, Influence):
            values = given.harm_sign * given.mean().values[0].detach().cpu()
        else:
            what = "an Influence, or one number for each example"
            values = numbers_of(name, given, what).cpu()
            if values.shape != (self.count,):
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}: a suspicion must be "
                    f"({self.count},), one number for each example of stage "
                    f"{self.pipeline.stages[self.stage].name!r}"
                )
            if not bool(torch.isfinite(values.double()).all()):
                raise ValueError(
                    f"{name} holds NaN or inf; every example needs a number to be ranked by"
                )
        return values.argsort(descending=True, stable=True)

    def _mask(self, given) -> torch.Tensor:
        """Which examples are corrupted, ``(N,)``, from a mask or from positions."""
        what = f"a mask ({self.count},) of bool, or positions"
        values = numbers_of("corrupted", given, what).cpu()
        whole = values.dtype != torch.bool and not values.is_floating_point()
        if values.dtype == torch.bool and values.shape == (self.count,):
            mask = values
        elif whole and values.ndim == 1 and len(values):
            if int(values.min()) < 0 or int(values.max()) >= self.count:
                raise ValueError(
                    f"corrupted={shown(given)} must hold positions between 0 and {self.count - 1}"
                )
            mask = torch.zeros(self.count, dtype=torch.bool)
            mask[values] = True
        else:
            raise ValueError(
                f"corrupted is {values.dtype} of shape {tuple(values.shape)}: give "
                f"a mask ({self.count},) of bool, or positions"
            )
        if not bool(mask.any()):
            raise ValueError(
                f"corrupted={shown(given)} marks no example; leave it out where the truth is not "
                "known"
            )
        return mask

    # --- what is shown ----------------------------------------------------------------------------

    @property
    def removed(self) -> list[int]:
        """Positions of the examples that are flagged, the most suspicious first."""
        return self.orders[self.ranking][: self.flagged].tolist()

    def precision_recall(self) -> tuple[float, float]:
        """Share of the flagged that are corrupted, and share of the corrupted that are flagged."""
        if self.flagged == 0:
            return float("nan"), 0.0
        precision, recall = precision_recall(self.orders[self.ranking], self.corrupted)
        return float(precision[self.flagged - 1]), float(recall[self.flagged - 1])

    @property
    def before(self) -> dict[str, torch.Tensor] | None:
        """The judges' ``"loss"`` and, for classes, ``"accuracy"``, before any removal.

        Of each judge ``(J,)`` in the one pipeline; of runs the mean under each fresh seed ``(S,)``,
        None until something was tried.
        """
        if self._before is None and not self.runs:
            found = self._judge(self.pipeline)
            self._before = {n: found[n][:, 0] for n in found if n != "class"}
        return self._before

    @property
    def after(self) -> dict[str, torch.Tensor] | None:
        """The same after removing what is flagged and retraining; None until that is done."""
        outcome = self.outcome
        return None if outcome is None else outcome.after

    @property
    def outcome(self) -> _Outcome | None:
        """What removing exactly the flagged examples has changed; None until it was tried."""
        return self._outcomes.get(tuple(sorted(self.removed)))

    @property
    def history(self):
        """All that was tried, in order: a pandas table with predicted and real changes.

        Columns: ranking, removed, predicted (change of the queries' mean loss), change (of the
        judges' mean loss) and its standard_error over fresh seeds, accuracy (its change), flips
        (share of the judges with another predicted class); NaN where one is not known.
        """
        import pandas

        rows = []
        for (ranking, count), outcome in self._tried.items():
            accuracy = outcome.change("accuracy")[0] if "accuracy" in outcome.after else torch.nan
            flips = torch.nan if outcome.flips is None else outcome.flips
            predicted = self._predicted_mean(ranking, count)
            rows.append((ranking, count, predicted, *outcome.change("loss"), accuracy, flips))
        names = ["ranking", "removed", "predicted", "change", "standard_error", "accuracy", "flips"]
        return pandas.DataFrame(rows, columns=names)

    def _judge(self, trained) -> dict[str, torch.Tensor]:
        """Loss, accuracy and class of each judge under each weighting, ``(J, R)``."""
        targets = {"loss": "loss"}
        if self.judges.has_labels and self.pipeline.stages[-1].data.has_labels:
            targets |= {"accuracy": _right, "class": predicted_class}
        count = len(self.judges)
        return {
            name: trained.evaluate(self.judges, target).reshape(count, -1).cpu()
            for name, target in targets.items()
        }

    def _predicts(self, ranking: str) -> bool:
        scores = self.table[ranking]
        return isinstance(scores, Influence) and scores.target == "loss"

    def predicted(self) -> torch.Tensor | None:
        """Predicted change of each query's loss, ``(Q,)``; None if the ranking predicts none.

        Of scores about the mean query, that one change ``(1,)``.
        """
        if not self._predicts(self.ranking) or self.flagged == 0:
            return None
        return self.table[self.ranking].removal_effect(self.removed).detach().cpu()

    def _predicted_mean(self, ranking: str, count: int) -> float:
        """Predicted change of the queries' mean loss; NaN if the ranking predicts none.

        Of several seeds each judges what the others chose, as `predicted_gain` does.
        """
        scores, asked = self.table[ranking], (ranking, count)
        if not self._predicts(ranking) or count == 0:
            return torch.nan
        if asked not in self._promises and len(getattr(scores, "seeds", ())) > 1:
            gain = predicted_gain(scores, count / self.count)["gain"]
            self._promises[asked] = -float(gain.iloc[0])
        elif asked not in self._promises:
            change = scores.removal_effect(self.orders[ranking][:count].tolist())
            self._promises[asked] = float(change.mean())
        return self._promises[asked]

    def curve(self, ranking: str) -> tuple[list[int], list[float], list[float]] | None:
        """Numbers removed, predicted changes of the queries' mean loss, their standard errors.

        None if the ranking predicts none; the errors are NaN of a single run.

        Raises:
            ValueError: there is no such ranking.
        """
        need_choice("ranking", ranking, list(self.table))
        if ranking not in self._curves:
            most, curve = self.count - 1, None
            # Closer together at the start, where the curve bends.
            counts = sorted({round(1 + (most - 1) * (i / POINTS) ** 2) for i in range(POINTS + 1)})
            scores = self.table[ranking]
            if self._predicts(ranking) and len(getattr(scores, "seeds", ())) > 1:
                found = predicted_gain(scores, [count / self.count for count in counts])
                curve = counts, [-gain for gain in found["gain"]], found["standard_error"].tolist()
            elif self._predicts(ranking):
                changes = [self._predicted_mean(ranking, count) for count in counts]
                curve = counts, changes, [torch.nan] * len(counts)
            self._curves[ranking] = curve
        return self._curves[ranking]

    # --- controls ---------------------------------------------------------------------------------

    def _build(self) -> list:
        import ipywidgets

        names = list(self.table)
        self.ranking_control = self._control(
            "Dropdown",
            "ranking",
            "Ranking",
            self._set("ranking"),
            options=names,
            value=self.ranking,
        )
        self.flagged_control = self._control(
            "IntSlider",
            "flagged",
            "Remove the first",
            self._set("flagged"),
            value=self.flagged,
            min=0,
            max=self.count - 1,
            continuous_update=False,
            layout={"width": "min(700px, 98%)"},
        )
        self.view = self._html("view")
        self.plot = self._html("plot")
        self.answer = self._html("answer")
        self.tried = self._html("history")
        self.title = self._html("view")
        self.row = Cards(self, self.k, "example", self._cut_at)
        wrap = {"flex_flow": "row wrap"}
        return [
            *([self.ranking_control] if len(names) > 1 else []),
            self.flagged_control,
            self.view,
            self.title,
            self.row.box,
            self._retraining("Remove them and retrain", self._remove),
            ipywidgets.HBox([self.answer, self.plot], layout=wrap),
            self.tried,
            self._code_box(),
        ]

    def _set(self, name: str):
        def change(value):
            setattr(self, name, value)
            self._show()

        return change

    def _cut_at(self, position: int) -> None:
        """Flag up to and with this example."""
        self.flagged_control.value = int((self.orders[self.ranking] == position).nonzero()) + 1

    def _show(self) -> None:
        self.view.value = f"<div>{html.escape(self._count_text())}.</div>"
        start = max(0, min(self.flagged - self.k // 2, self.count - self.k))
        self.title.value = (
            f"<b>Around the cut</b>: places {start + 1} to {start + self.k} of the ranking; a "
            "button cuts there"
        )
        self.row.show([self._card(place) for place in range(start, start + self.k)])
        self._show_answer()
        self._refresh_code()

    def _count_text(self) -> str:
        """How many are flagged, and how many of them rightly."""
        share = self.flagged / self.count
        text = f"{self.flagged} of {self.count} examples flagged ({share:.0%})"
        if self.corrupted is None:
            return text
        found = int(self.corrupted[self.removed].sum()) if self.flagged else 0
        text += f"; {found} of them are among the {int(self.corrupted.sum())} corrupted ones"
        if not self.flagged:
            return f"{text}: recall 0.00"
        precision, recall = self.precision_recall()
        return f"{text}: precision {precision:.2f}, recall {recall:.2f}"

    def _card(self, place: int) -> tuple:
        """The example at this place of the ranking, as `Cards` shows it."""
        position = int(self.orders[self.ranking][place])
        flagged = place < self.flagged
        words = ["flagged" if flagged else "kept"]
        if self.corrupted is not None:
            words.append("corrupted" if self.corrupted[position] else "clean")
        label = html.escape(self.examples.label(position))
        colour = plots.HARMFUL if flagged else plots.NEUTRAL
        picture = self.examples.show(
            position,
            f"Place {place + 1}, {', '.join(words)}",
            caption="<br>".join([label, *words]),
            border=f"3px solid {colour}",
        )
        return position, picture, f"cut at {place + 1}", place + 1 == self.flagged

    def _show_answer(self) -> None:
        """The change of what is flagged, the picture, and all that was tried."""
        running = self.job is not None and self.job.running
        self.retrain.disabled = running or self.flagged == 0
        before, outcome = self.before, self.outcome
        guess = self._predicted_mean(self.ranking, self.flagged)
        rows = []
        for name, words in (("loss", "mean loss, nats"), ("accuracy", "accuracy")):
            if before is not None and name not in before:
                continue
            was = "not retrained yet" if before is None else f"{float(before[name].mean()):.4f}"
            promise = "no prediction" if name != "loss" or guess != guess else signed(guess)
            truth, change = ["not retrained yet"] * 2
            if outcome is not None:
                truth = f"{float(outcome.after[name].mean()):.4f}"
                change = _with_error(*outcome.change(name))
            rows.append((words, was, truth, promise, change))
        others = "" if self.judges is self.queries else ", other than the queries"
        about = f"First {self.flagged} {_by(self.ranking)} removed; {len(self.judges)} examples of "
        about += f"the target task{others}"
        if others and guess == guess:
            about += "; predicted for the queries"
        if self.runs:
            about += f"; mean of {len(self.seeds)} fresh seeds ± standard error"
        head = ("before", "after retraining", "change, predicted", "change, real")
        self.answer.value = table(about, rows, head)
        self.plot.value = self._draw()
        self.tried.value = self._history_table()

    def _history_table(self) -> str:
        """All that was tried, the view's own row marked."""
        rows = []
        for row in self.history.itertuples(index=False):
            here = (row.ranking, row.removed) == (self.ranking, self.flagged)
            name = f"{row.removed} {_by(row.ranking)}{' (in view)' if here else ''}"
            known = [
                "" if value != value else signed(value) for value in (row.predicted, row.accuracy)
            ]
            flips = "" if row.flips != row.flips else f"{row.flips:.1%}"
            change = _with_error(row.change, row.standard_error)
            rows.append((name, known[0], change, known[1], flips))
        if not rows:
            return ""
        head = ("loss, predicted", "loss, real", "accuracy", "predictions flipped")
        return table("Tried so far: changes", rows, head)

    def _draw(self) -> str:
        """Predicted and real changes over the number removed, with a line at the one in view."""
        state = self.ranking, len(self._tried)
        if self._drawn is None or self._drawn[0] != state:
            # A new figure: it changes with the ranking and the history, not with the slider.
            plot = self._plotted = Plot(
                lambda figure: self._changes(open_axes(figure, **MARGINS), self.ranking)
            )
            self._drawn = state, plot.png()
        alt = f"Change of the mean loss over the number removed, ranking {self.ranking or 'given'}"
        alt += f"; {len(self._tried)} tried so far; the line is at {self.flagged}"
        line = self._plotted.over(self._plotted.artists, self.flagged)
        return f'<div style="position:relative">{img(self._drawn[1], alt)}{line}</div>'

    def _changes(self, ax, ranking: str):
        """The predicted curve of a ranking, and the real change of all that was tried."""
        ax.axhline(0, color=plots.NEUTRAL, lw=0.8)
        if (curve := self.curve(ranking)) is not None:
            counts, changes, errors = curve
            label = f"predicted {_by(ranking)}"
            ax.plot([0, counts[0]], [0, changes[0]], color=plots.HELPFUL, lw=1)
            ax.errorbar(counts, changes, errors, color=plots.HELPFUL, lw=1, label=label)
        marks = dict(zip(self.table, "osxD^v" * len(self.table), strict=False))
        for name, marker in marks.items():
            found = self.history.query("ranking == @name")
            if len(found):
                # What belongs to another ranking stays, but pale.
                colour = plots.HARMFUL if name == ranking else plots.NEUTRAL
                style = {"fmt": marker, "ms": 6, "color": colour, "label": f"real {_by(name)}"}
                ax.errorbar(found.removed, found.change, found.standard_error, **style)
        ax.set(xlim=(0, self.count))
        ax.set_xlabel("examples removed, the first of the ranking", fontsize=9)
        ax.set_ylabel("change of mean loss, nats", fontsize=9)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return ax

    # --- removing for real ------------------------------------------------------------------------

    def _remove(self) -> None:
        if self.flagged == 0:
            raise ValueError("nothing is flagged; move the slider first")
        asked = self.ranking, self.flagged, self.removed

        def done(outcome):
            self._keep(*asked, outcome)
            self._show_answer()

        self._run(self.pipeline, lambda pipeline: self._measure(pipeline, *asked), done)

    def try_out(self, ranking: str, count: int) -> "CleaningExplorer":
        """Remove the first ``count`` of a ranking and retrain, as the button does, and wait for it.

        Returns:
            the explorer, with that in view and in its `history`.

        Raises:
            ValueError: no such ranking, or not so many examples.
        """
        need_choice("ranking", ranking, list(self.table))
        count = check_whole("count", count, most=self.count - 1, why="fewer than the examples")
        self.ranking, self.flagged = ranking, count
        asked = ranking, count, self.removed
        self._keep(*asked, self._measure(self.pipeline, *asked))
        if "widget" in vars(self):
            self.ranking_control.value, self.flagged_control.value = ranking, count
            self._guarded(self._show)()
        return self

    def _keep(self, ranking: str, count: int, removed: list[int], outcome: _Outcome) -> None:
        self._before = outcome.before
        self._outcomes[tuple(sorted(removed))] = outcome
        self._tried[ranking, count] = outcome

    def _measure(self, pipeline: Pipeline, ranking: str, count: int, removed: list) -> _Outcome:
        """Retrain a pipeline without some examples, under fresh seeds where there are runs."""
        if self.runs:
            return self._on_fresh_seeds(pipeline, ranking, count)
        protocol = default_protocol(pipeline)
        require_start(pipeline, protocol)
        warm = protocol == "warm-start"  # then "before" is going on with nobody removed
        if pipeline.adopted:  # refuses weights that are no optimum
            removal_base(pipeline, self.judges, "loss", None, protocol)
        weights = torch.ones(1 + warm, self.count)
        weights[-1, removed] = 0
        again = pipeline.retrain({self.stage: weights}, warm_start=warm, progress=False)
        found = self._judge(again)
        start = found if warm else self._judge(pipeline)
        before, after = ({n: v[:, at] for n, v in f.items()} for f, at in ((start, 0), (found, -1)))
        flips = None
        if "class" in after:
            flips = float((after.pop("class") != before.pop("class")).double().mean())
        return _Outcome(before, after, flips, 1)

    def _on_fresh_seeds(self, pipeline: Pipeline, ranking: str, count: int) -> _Outcome:
        report = intervene(
            pipeline,
            {"ranking": self.table[ranking]},
            test=self.judges,
            fraction=count / self.count,
            seeds=self.seeds,
            stage=self.stage,
            progress=False,
        )
        found = report.table.pivot_table("value", ["ranking", "measure"], "seed")
        before, after = (
            {
                measure: torch.tensor(found.loc[(name, measure)].to_numpy())
                for measure in ("loss", "accuracy", "flips")
                if (name, measure) in found.index
            }
            for name in ("keep all", "ranking")
        )
        before.pop("flips", None)
        flips = float(after.pop("flips").mean()) if "flips" in after else None
        return _Outcome(before, after, flips, len(self.seeds))

    # --- without a kernel -------------------------------------------------------------------------

    def static(self, ranking: str | None = None) -> list:
        """What the rankings find, and, if something was tried, what removing it has changed.

        The first figure has precision and recall of every ranking and the first examples of one,
        the second predicted and real changes.

        Args:
            ranking: whose most suspicious examples and prediction to show; default the one in view.

        Raises:
            ValueError: there is no such ranking.
        """
        import matplotlib.pyplot as plt

        ranking = self.ranking if ranking is None else ranking
        need_choice("ranking", ranking, list(self.table))
        columns = self.k // 2 + self.k % 2
        figure = plt.figure(figsize=(3.6 + 0.95 * columns, 2.9))
        left, right = figure.subfigures(1, 2, width_ratios=(3.6, 0.95 * columns))
        self._compare_rankings(left.subplots())
        axes = right.subplots(2, columns, squeeze=False)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
        for ax in axes.flat[self.k :]:
            ax.axis("off")
        for ax, position in zip(axes.flat, self.orders[ranking][: self.k].tolist(), strict=False):
            ax.imshow(plots.picture(self.examples.examples.x[position]), cmap="gray_r")
            ax.set_title(plain(self.examples.label(position)), fontsize=8)
            if self.corrupted is not None:
                ax.set_xlabel("corrupted" if self.corrupted[position] else "clean", fontsize=8)
        title = f"most suspicious by {plain(ranking)}" if ranking else "most suspicious"
        right.suptitle(title, fontsize=9)
        if not self._tried:
            return [figure]
        second, ax = plt.subplots(figsize=(6.2, 3.4))
        self._changes(ax, ranking)
        return [figure, second]

    def _compare_rankings(self, ax) -> None:
        """Precision against recall of every ranking; a note where the truth is not known."""
        if self.corrupted is None:
            ax.axis("off")
            note = "the truth is not known,\nso no precision and recall"
            ax.text(0.5, 0.5, note, ha="center", fontsize=9)
            return
        style = {"markevery": 0.2, "ms": 4, "lw": 1}
        for name, marker in zip(self.table, "osxD^v" * len(self.table), strict=False):
            precision, recall = precision_recall(self.orders[name], self.corrupted)
            ax.plot(recall, precision, marker=marker, label=plain(name) or "ranking", **style)
        ax.set(xlim=(0, 1.02), ylim=(0, 1.05), xlabel="recall", ylabel="precision")
        ax.legend(frameon=False, fontsize=7)

    def code(self) -> str:
        """Python for the view: ``removed``, ``precision``, ``recall``, ``before`` and ``after``.

        Of runs, ``report`` of `intervene` in place of the last two.
        """
        scores = self._name(self._given, "scores")
        if isinstance(self._given, Mapping):
            scores += f"[{quoted(self.ranking)}]"
        suspicion = f"torch.as_tensor({scores})"
        if isinstance(self.table[self.ranking], Influence):
            suspicion = f"{scores}.harm_sign * {scores}.mean().values[0]"
        lines = [
            "import torch",
            *(["import msif_lab as msif"] if self.runs else []),
            "from msif_lab.evaluation import precision_recall",
            "",
            f"suspicion = {suspicion}",
            "order = suspicion.argsort(descending=True, stable=True)  # the most suspicious first",
            f"removed = order[:{self.flagged}]",
        ]
        if self.corrupted is not None:
            truth = self._name(self._truth_given, "corrupted")
            lines += [
                f"truth = torch.zeros({self.count}, dtype=torch.bool)",
                f"truth[torch.as_tensor({truth})] = True",
            ]
            if self.flagged:
                lines.append(
                    f"precision, recall = (share[{self.flagged - 1}] for share in "
                    "precision_recall(order, truth))"
                )
        return "\n".join(lines + self._retraining_code(scores))

    def _retraining_code(self, scores: str) -> list[str]:
        judges = self._name(self.judges, "queries" if self.judges is self.queries else "judges")
        if self.runs:
            runs = self._name(self.runs, "runs")
            fresh = f"range({self.seeds[0]}, {self.seeds[-1] + 1})"
            lines = [
                f"report = msif.intervene({runs}, {scores}, test={judges},",
                f"    fraction={self.flagged} / {self.count}, seeds={fresh}, stage={self.stage})",
            ]
            return lines if self.flagged else []
        pipeline = self._name(self.pipeline, "pipeline")
        warm = default_protocol(self.pipeline) == "warm-start"
        before = "again.evaluate({0}).T" if warm else "{1}.evaluate({0}), again.evaluate({0})[:, 0]"
        return [
            f"weights = torch.ones({1 + warm}, {self.count})",
            "weights[-1, removed] = 0",
            f"again = {pipeline}.retrain({{{self.stage}: weights}}, warm_start={warm})",
            f"before, after = {before.format(judges, pipeline)}",
        ]

    def __repr__(self) -> str:
        known = ""
        if self.corrupted is not None:
            known = f", {int(self.corrupted.sum())} known to be corrupted"
        names = [name or "scores" for name in self.table]
        return f"CleaningExplorer: {self.count} examples{known}, rankings {names}"


def _right(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(-1) == targets).to(outputs)


def _by(ranking: str) -> str:
    """``by loss``; ``by score`` for a ranking without a name."""
    return f"by {plain(ranking) or 'score'}"


def _with_error(change: float, error: float) -> str:
    """A signed change with its standard error, where that is known."""
    return signed(change) if error != error else f"{signed(change)} ± {error:.4f}"

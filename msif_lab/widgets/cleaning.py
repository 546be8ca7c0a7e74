"""Find corrupted examples by a ranking, remove them, retrain: does the target task gain?"""

import html
from collections.abc import Mapping, Sequence

import torch

from .. import plots
from ..arguments import check_whole, numbers_of, shown
from ..data.examples import Examples
from ..evaluation.comparison import precision_recall
from ..evaluation.removals import default_protocol, removal_base, require_start
from ..figures import img, plain
from ..influence.result import Influence
from ..pipeline.pipeline import Pipeline
from .frame import Explorer
from .given import check_scores, one_pipeline, quoted
from .pictures import Cards, Gallery, Plot, open_axes, signed, table

__all__ = ["CleaningExplorer"]


class CleaningExplorer(Explorer):
    """Slide how many of the most suspicious examples to remove, then retrain without them.

    Where the corrupted examples are known, precision and recall are shown too.

    Args:
        pipeline: trained.
        scores: an `Influence`, whose most harmful examples on average come first; or rankings by
            name, each an `Influence` or a suspicion ``(N,)``, larger first (a loss, say, or a
            negated confidence).
        queries: of the scores, examples of the target task.
        judges: examples on which the pipeline is evaluated before and after; by default the
            queries, which then judge a removal that they chose themselves.
        corrupted: which examples are known to be corrupted, a mask ``(N,)`` or positions; without
            it there is no precision and recall, only the number flagged.
        stage: whose examples are ranked, where no `Influence` says so.
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
        pipeline: Pipeline,
        scores: Influence | torch.Tensor | Mapping,
        queries: Examples,
        *,
        corrupted: torch.Tensor | Sequence | None = None,
        judges: Examples | None = None,
        stage: int | str = 0,
        k: int = 8,
    ):
        self.pipeline = one_pipeline(pipeline, queries)
        self.queries = queries
        self.judges = queries if judges is None else judges
        one_pipeline(pipeline, self.judges, "judges")
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
            check_scores(one, pipeline, queries, names[name])
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
        self._before: dict[str, torch.Tensor] | None = None
        self._after: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        self._pngs: dict[str, bytes] = {}

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
    def before(self) -> dict[str, torch.Tensor]:
        """The judges' ``"loss"`` and, for classes, ``"accuracy"`` ``(J,)``, before any removal."""
        if self._before is None:
            found = self._judge(self.pipeline)
            self._before = {name: values[:, 0] for name, values in found.items()}
        return self._before

    @property
    def after(self) -> dict[str, torch.Tensor] | None:
        """The same after removing what is flagged and retraining; None until that is done."""
        return self._after.get(tuple(sorted(self.removed)))

    def _judge(self, trained) -> dict[str, torch.Tensor]:
        """Loss and accuracy of each judge under each weighting, ``(Q, R)``."""
        targets = {"loss": "loss"}
        if self.judges.has_labels and self.pipeline.stages[-1].data.has_labels:
            targets["accuracy"] = _right
        count = len(self.judges)
        return {
            name: trained.evaluate(self.judges, target).reshape(count, -1).cpu()
            for name, target in targets.items()
        }

    def predicted(self) -> torch.Tensor | None:
        """Predicted change of each query's loss, ``(Q,)``; None if the ranking predicts none."""
        scores = self.table[self.ranking]
        influence = isinstance(scores, Influence) and scores.target == "loss"
        if not influence or self.flagged == 0 or self.judges is not self.queries:
            return None
        return scores.removal_effect(self.removed).detach().cpu()

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
        self.plot.value = "" if self.corrupted is None else self._draw()
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
        running = self.job is not None and self.job.running
        self.retrain.disabled = running or self.flagged == 0
        after = self.after
        predicted = self.predicted()
        rows = []
        for name, words in (("loss", "mean loss, nats"), ("accuracy", "accuracy")):
            if name not in self.before:
                continue
            was = float(self.before[name].mean())
            guess = "no prediction"
            if predicted is not None and name == "loss":
                guess = f"{was + float(predicted.mean()):.4f}"
            truth = "not retrained yet"
            if after is not None:
                now = float(after[name].mean())
                truth = f"{now:.4f} ({signed(now - was)})"
            rows.append((words, f"{was:.4f}", guess, truth))
        others = "" if self.judges is self.queries else ", other than the queries"
        about = f"{len(self.judges)} examples of the target task{others}"
        self.answer.value = table(about, rows, ("before", "predicted", "after retraining"))

    def _draw(self) -> str:
        if not hasattr(self, "_figure"):
            self._figure = Plot(self._prepare)
        precision, recall = self._figure.artists
        if self.ranking not in self._pngs:
            x = range(1, self.count + 1)
            found = precision_recall(self.orders[self.ranking], self.corrupted)
            for line, values in zip((precision, recall), found, strict=True):
                line.set_data(x, values.numpy())
            self._pngs[self.ranking] = self._figure.png()
        ranking = self.ranking or "by score"
        alt = f"Precision and recall over the number removed, ranking {ranking}; "
        at = "at {}: precision {:.2f}, recall {:.2f}"
        alt += at.format(self.flagged, *self.precision_recall())
        line = self._figure.over(precision.axes, self.flagged)
        return f'<div style="position:relative">{img(self._pngs[self.ranking], alt)}{line}</div>'

    def _prepare(self, figure):
        ax = open_axes(figure, left=0.14, top=0.84, bottom=0.17)
        ax.set(xlim=(0, self.count), ylim=(0, 1.05))
        ax.set_xlabel("examples removed, the most suspicious first", fontsize=9)
        ax.set_ylabel("share", fontsize=9)
        return self._curves(ax)

    def _curves(self, ax):
        (precision,) = ax.plot(
            [], [], "-", color=plots.HELPFUL, label="precision: flagged that are corrupted"
        )
        (recall,) = ax.plot(
            [], [], "--", color=plots.HARMFUL, label="recall: corrupted that are flagged"
        )
        ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
        return precision, recall

    # --- removing for real ------------------------------------------------------------------------

    def _remove(self) -> None:
        if self.flagged == 0:
            raise ValueError("nothing is flagged; move the slider first")
        removed = self.removed
        protocol = default_protocol(self.pipeline)
        require_start(self.pipeline, protocol)
        warm = protocol == "warm-start"  # then "before" is going on with nobody removed

        def work(pipeline):
            if pipeline.adopted:  # refuses weights that are no optimum
                removal_base(pipeline, self.judges, "loss", None, protocol)
            weights = torch.ones(1 + warm, self.count)
            weights[-1, removed] = 0
            again = pipeline.retrain({self.stage: weights}, warm_start=warm, progress=False)
            return self._judge(again)

        def done(found):
            if warm:
                self._before = {name: values[:, 0] for name, values in found.items()}
            self._after[tuple(sorted(removed))] = {n: values[:, -1] for n, values in found.items()}
            self._show_answer()

        self._run(self.pipeline, work, done)

    # --- without a kernel -------------------------------------------------------------------------

    def static(self, ranking: str | None = None) -> list:
        """One figure: precision and recall of every ranking, and the first examples of one.

        Args:
            ranking: whose most suspicious examples to show; default the one in view.

        Raises:
            ValueError: there is no such ranking.
        """
        import matplotlib.pyplot as plt

        ranking = self.ranking if ranking is None else ranking
        if ranking not in self.table:
            raise ValueError(f"ranking={ranking!r} is none of {list(self.table)}")
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
        return [figure]

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
        """Python for the view: ``removed``, ``precision``, ``recall``, ``before`` and ``after``."""
        pipeline = self._name(self.pipeline, "pipeline")
        queries = self._name(self.judges, "queries" if self.judges is self.queries else "judges")
        scores = self._name(self._given, "scores")
        if isinstance(self._given, Mapping):
            scores += f"[{quoted(self.ranking)}]"
        warm = default_protocol(self.pipeline) == "warm-start"
        suspicion = f"torch.as_tensor({scores})"
        if isinstance(self.table[self.ranking], Influence):
            suspicion = f"{scores}.harm_sign * {scores}.mean().values[0]"
        lines = [
            "import torch",
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
        before = "again.evaluate({0}).T" if warm else "{1}.evaluate({0}), again.evaluate({0})[:, 0]"
        lines += [
            f"weights = torch.ones({1 + warm}, {self.count})",
            "weights[-1, removed] = 0",
            f"again = {pipeline}.retrain({{{self.stage}: weights}}, warm_start={warm})",
            f"before, after = {before.format(queries, pipeline)}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        known = ""
        if self.corrupted is not None:
            known = f", {int(self.corrupted.sum())} known to be corrupted"
        names = [name or "scores" for name in self.table]
        return f"CleaningExplorer: {self.count} examples{known}, rankings {names}"


def _right(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(-1) == targets).to(outputs)

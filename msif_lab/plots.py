"""Pictures of pipelines, influence and agreement; nothing numerical is computed here."""

import itertools
import math
from collections.abc import Mapping

import torch

from .arguments import check_instance, check_whole, is_number, listed, numbers_of, shown
from .data.examples import Examples
from .evaluation.comparison import CEILING, STATISTICS, Agreement, check_table
from .evaluation.curation import Interventions
from .figures import describe_figures, plain
from .influence.averaged import InfluenceOverSeeds, spearman_brown
from .influence.result import Influence
from .pipeline.pipeline import Pipeline
from .pipeline.stages import Frozen, WarmStart

__all__ = [
    "agreement_scatter",
    "filter_curves",
    "influence_grid",
    "intervention_changes",
    "method_intervals",
    "pipeline_diagram",
    "reliability_curve",
    "score_bars",
    "use_style",
    "v_curve",
]

# Seaborn's colourblind blue; its orange and a grey, both darkened until they can be read as text on
# white (contrast 4.5 : 1).
HELPFUL = "#0173b2"
HARMFUL = "#c05600"
NEUTRAL = "#707070"
COLOURS = {"helpful": HELPFUL, "harmful": HARMFUL, "neutral": NEUTRAL}  # by `Influence.kind`


def use_style() -> None:
    """Set the look of all figures: call it once at the top of a notebook.

    Seaborn's colourblind palette without its pale colours, readable sizes, 100 dpi. In JupyterLab,
    figures also get the alt text from their cell's metadata (``"alt"``), which it does not show
    otherwise.
    """
    import matplotlib.pyplot as plt
    import seaborn

    # Its yellow, pale blue, pink, light orange and tan have a contrast of less than 3 : 1 on white,
    # too little for thin lines.
    palette = [seaborn.color_palette("colorblind")[i] for i in (0, 3, 2, 4, 7)]
    seaborn.set_theme(context="notebook", style="ticks", palette=palette, font_scale=0.9)
    plt.rcParams.update(
        {"figure.dpi": 100, "savefig.dpi": 100, "savefig.bbox": "tight", "axes.spines.top": False,
         "axes.spines.right": False, "figure.facecolor": "white", "savefig.facecolor": "white",
         "savefig.transparent": False, "figure.constrained_layout.use": True}
    )  # fmt: skip
    describe_figures()


def pipeline_diagram(pipeline: Pipeline, ax=None):
    """Stages as boxes from left to right, then the query.

    Each arrow says what is handed over, with its shapes, and how.

    Returns:
        the matplotlib axes.
    """
    import matplotlib.pyplot as plt

    check_instance("pipeline", pipeline, Pipeline)
    width = 2.15
    gap = 1.6
    count = len(pipeline.stages)
    total = count * (width + gap) + 0.9
    if ax is None:
        _, ax = plt.subplots(figsize=(0.88 * total, 1.5))
    ax.set(xlim=(-0.05, total + 0.05), ylim=(0, 1))
    ax.axis("off")
    for k, stage in enumerate(pipeline.stages):
        o = pipeline.objective(k)
        p = pipeline.functional(k)
        lines = [
            _examples(stage.data),
            f"trains {_count(o.size)} of {_count(o.layout.size)}",
            "parameters",
        ]
        left = k * (width + gap)
        _box(ax, left, width, stage.name, lines, HELPFUL)
        if k:
            shared = [name for name in o.layout.shapes if _holds(p.here, o.layout.spans[name])]
            size = sum(places.size for places in p.here.values())
            what = f"W: {_blocks(o.layout, shared)}\n{_count(size)} shared"
            known = {Frozen: "frozen", WarmStart: "start here"}
            how = known.get(type(stage.link), f"held near, α = {o.alpha:g}")
            _arrow(ax, left - gap, left, what, how)
    last = pipeline.objective(count - 1).layout
    _arrow(ax, total - 0.9 - gap, total - 0.9, f"all {_count(last.size)}", "final parameters")
    _box(ax, total - 0.9, 0.9, "query", ["loss q"], HARMFUL)
    return ax


def _holds(places: dict, span: range) -> bool:
    """Whether a parameter's span is among the shared ones."""
    parts = [part for some in places.values() for part in some.spans]
    return any(part.start <= span.start and span.stop <= part.stop for part in parts)


def _blocks(layout, names: list[str]) -> str:
    """``16×64 + 16``, or the number of blocks where that would be long."""
    text = " + ".join("×".join(map(str, layout.shapes[name])) or "1" for name in names)
    return text if len(text) <= 16 else f"{len(names)} blocks"


def _count(n: int) -> str:
    return f"{n:,}" if n < 1_000_000 else f"{n / 1e6:,.1f} M"


def _examples(data: Examples) -> str:
    """``400 examples of 0–3``, or the number of classes if their names are too long for a box."""
    text = f"{len(data):,} examples"
    if not data.has_labels:
        return text
    numbers = [c for c in data.classes if isinstance(c, int)]
    consecutive = len(numbers) == len(data.classes) > 2 and numbers == list(
        range(numbers[0], numbers[-1] + 1)
    )
    names = f"{numbers[0]}–{numbers[-1]}" if consecutive else ", ".join(map(str, data.classes))
    for words in (f"{text} of {names}", f"{text} of {len(data.classes)} classes"):
        if len(words) <= 28:
            return words
    return text


def _box(ax, left: float, width: float, title: str, lines: list[str], colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = {
        "boxstyle": "round,pad=0,rounding_size=0.08",
        "facecolor": "white",
        "edgecolor": colour,
        "linewidth": 1.5,
    }
    ax.add_patch(FancyBboxPatch((left, 0.08), width, 0.84, **style))
    title, text = plain(title), plain("\n".join(lines))
    ax.text(left + width / 2, 0.76, title, ha="center", va="center", fontsize=10, weight="bold")
    ax.text(left + width / 2, 0.38, text, ha="center", va="center", fontsize=8.5)


def _arrow(ax, start: float, end: float, above: str, below: str) -> None:
    arrow = {"arrowstyle": "-|>", "color": "black", "lw": 1.5, "shrinkA": 3, "shrinkB": 3}
    ax.annotate("", xy=(end, 0.5), xytext=(start, 0.5), arrowprops=arrow)
    ax.text((start + end) / 2, 0.56, above, ha="center", va="bottom", fontsize=8)
    ax.text((start + end) / 2, 0.44, below, ha="center", va="top", fontsize=8)


def picture(image: torch.Tensor):
    """An image ``(C, H, W)`` as matplotlib's imshow takes it."""
    image = image.detach().cpu()
    return (image[0] if image.shape[0] == 1 else image.permute(1, 2, 0).clamp(0, 1)).numpy()


def influence_grid(
    scores: Influence, examples: Examples, queries: Examples, query: int = 0, k: int = 5
):
    """One query with its k most helpful and k most harmful examples: picture, label and score.

    Args:
        scores: of ``examples`` on ``queries``.
        examples: images ``(N, C, H, W)`` of the scored stage.
        queries: images of the queries.
        query: position of the query.
        k: pictures per row.

    Returns:
        the matplotlib figure.
    """
    import matplotlib.pyplot as plt

    check_instance("scores", scores, Influence, "as an attributor's score(queries) gives them")
    for name, given in (("examples", examples), ("queries", queries)):
        check_instance(name, given, Examples, "wrap them: Examples(x, y)")
    if examples.x.ndim != 4 or queries.x.ndim != 4:
        raise ValueError(
            f"images (N, C, H, W) are needed; examples are {examples}, queries {queries}; "
            "scores without pictures are in scores.to_frame()"
        )
    if len(examples) != len(scores.ids) or len(queries) != len(scores):
        raise ValueError(
            f"scores are {tuple(scores.values.shape)}, given {len(queries)} queries, "
            f"{len(examples)} examples"
        )
    query = check_whole("query", query, -len(queries), len(queries) - 1, why="of the queries")
    k = check_whole("k", k, most=len(examples), why="the number of examples")
    figure, axes = plt.subplots(2, k + 1, figsize=(1.12 * (k + 1), 3.3))
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color=NEUTRAL)
    axes[1, 0].axis("off")
    axes[0, 0].imshow(picture(queries.x[query]), cmap="gray_r")
    name = plain(queries.classes[int(queries.y[query])])
    axes[0, 0].set_title(f"query: {name}", fontsize=9)
    rankings = {"helpful": scores.helpful(k), "harmful": scores.harmful(k)}
    for row, (word, ranking) in enumerate(rankings.items()):
        for column, position in enumerate(ranking.positions[query].tolist()):
            ax = axes[row, column + 1]
            value = float(ranking.values[query, column])
            ax.imshow(picture(examples.x[position]), cmap="gray_r")
            name = plain(examples.classes[int(examples.y[position])])
            ax.set_title(f"label {name}", fontsize=9)
            sign = "−" if value < 0 else "+"
            ax.set_xlabel(f"{sign}{abs(value) * 1e3:.1f}", fontsize=9, labelpad=3)
            ax.spines[:].set(color=COLOURS[scores.kind(value)], linewidth=2)
        side = f"{word} ({scores.signs[word]})"
        axes[row, 1].set_ylabel(side, color=COLOURS[word], fontsize=9)
    unit = "thousandths of a nat" if scores.unit == "nats" else f"{scores.unit} × 1000"
    below = f"change in query {plain(scores.target)} per unit of weight, {unit}"
    figure.supxlabel(f"score below each image: {below}", fontsize=8)
    return figure


def extremes(scores: Influence, query: int, k: int) -> list[int]:
    """Positions of one query's k most helpful examples, then of its k most harmful ones.

    Both from the largest size on; no example twice where 2k are more than there are.
    """
    helpful = scores.helpful(k).positions[query].tolist()
    harmful = scores.harmful(k).positions[query].tolist()
    return helpful + [place for place in harmful if place not in helpful]


def score_bars(
    scores: InfluenceOverSeeds,
    query: int = 0,
    k: int = 5,
    ax=None,
    *,
    examples: Examples | None = None,
    level: float = 0.95,
):
    """One query's k most helpful and k most harmful examples, and how sure their scores are.

    Bars are the averages over seeds with Student's interval, dots the scores under each seed; a
    tick says which signs are sure (`InfluenceOverSeeds.trusted`). The axis has room for all dots; a
    longer interval leaves the picture.

    Args:
        scores: of two or more seeds; of a single one the bars are bare.
        query: position of the query.
        k: examples at either end.
        ax: matplotlib axes; default new ones.
        examples: images of the scored stage, drawn below their bars.
        level: of the intervals and of the signs.

    Returns:
        the matplotlib axes.

    Raises:
        TypeError, ValueError: scores of one run, no such query, or images of other examples.
    """
    import matplotlib.pyplot as plt

    if not isinstance(scores, InfluenceOverSeeds):
        raise TypeError(
            f"scores is {type(scores).__name__}: bars with errors need several seeds, as "
            "AveragedInfluence(method).fit(runs).score(queries) gives them"
        )
    query = check_whole("query", query, 0, len(scores) - 1, why="its position")
    k = check_whole("k", k, most=len(scores.ids), why="the examples")
    if examples is not None and len(examples) != len(scores.ids):
        raise ValueError(f"examples are {len(examples)}, the scores are of {len(scores.ids)}")
    places = extremes(scores, query, k)
    if ax is None:
        _, ax = plt.subplots(figsize=(0.62 * len(places) + 0.8, 3.4))
    values, singles = scores.values[query, places], scores.per_seed[:, query, places]
    sure = [False] * len(places)
    low = high = values
    if len(scores.seeds) > 1:
        low, high = (end[query, places] for end in scores.interval(level))
        sure = scores.trusted(level)[query, places].tolist()
    thousandths = [1e3 * t.detach().cpu().double() for t in (values, low, high, singles)]
    for fill in bar_artists(ax, len(places)):
        fill(*thousandths, [COLOURS[scores.kind(float(v))] for v in values])
    names = [f"{int(scores.ids[i])}" + "\n✓" * yes for i, yes in zip(places, sure, strict=True)]
    if examples is None:
        ax.set_xticks(range(len(places)), names)
    else:
        _pictures_below(ax, examples, places, names)
    unit = "thousandths of a nat" if scores.unit == "nats" else f"{scores.unit} × 1000"
    ax.set_ylabel(f"score (change in {plain(scores.target)}),\n{unit}", fontsize=9)
    signs = scores.signs
    ax.set_xlabel(
        f"id of the example; left most helpful ({signs['helpful']}), right most harmful "
        f"({signs['harmful']}); ✓ sign is sure",
        fontsize=8,
    )
    return ax


def bar_artists(ax, count: int) -> list:
    """Bars, error bars and dots of ``count`` examples, empty; a function each that fills them.

    Each takes ``values, low, high`` (count,), ``singles`` (seeds, count) and the bars' colours.
    """
    ax.axhline(0, color="black", lw=0.8)
    bars = ax.bar(range(count), [0.0] * count, width=0.7, alpha=0.45, lw=1.5)
    lines = ax.vlines(range(count), 0, 0, color="black", lw=1.5)
    (dots,) = ax.plot([], [], "o", ms=3.5, mfc="white", mec=NEUTRAL, mew=0.8, zorder=3)
    ax.set_xlim(-0.7, count - 0.3)

    def fill_bars(values, low, high, singles, colours):
        for bar, value, colour in zip(bars, values.tolist(), colours, strict=True):
            bar.set_height(value)
            bar.set(facecolor=colour, edgecolor=colour)

    def fill_lines(values, low, high, singles, colours):
        ends = zip(low.tolist(), high.tolist(), strict=True)
        lines.set_segments([[(i, a), (i, b)] for i, (a, b) in enumerate(ends)])

    def fill_dots(values, low, high, singles, colours):
        beside = torch.linspace(-0.22, 0.22, len(singles)) if len(singles) > 1 else torch.zeros(1)
        across = torch.arange(count)[None, :] + beside[:, None]
        dots.set_data(across.reshape(-1).numpy(), singles.reshape(-1).numpy())
        limit = 1.1 * float(singles.abs().max()) or 1.0
        ax.set_ylim(-limit, limit)

    return [fill_bars, fill_lines, fill_dots]


def _pictures_below(ax, examples: Examples, places: list[int], names: list[str]) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    if examples.x.ndim != 4:
        raise ValueError(f"examples are {examples}: images (N, C, H, W) are needed below the bars")
    ax.set_xticks(range(len(places)), names)
    ax.tick_params(axis="x", length=0, pad=34)
    for i, place in enumerate(places):
        image = picture(examples.x[place])
        zoom = 28 / image.shape[0] * 72 / ax.figure.dpi
        inside = OffsetImage(image, zoom=zoom, cmap="gray_r", interpolation="nearest")
        box = AnnotationBbox(
            inside,
            (i, 0),
            xycoords=("data", "axes fraction"),
            xybox=(0, -4),
            boxcoords="offset points",
            box_alignment=(0.5, 1.0),
            pad=0.1,
            bboxprops={"edgecolor": NEUTRAL},
        )
        ax.add_artist(box)


def reliability_curve(
    reliability,
    measured: Mapping[str, Mapping[int, float]] | None = None,
    *,
    held_out: int | None = None,
    seeds: int = 16,
    ax=None,
):
    """What averaging over seeds is worth: r of the mean of S seeds, predicted and measured.

    Args:
        reliability: ρ, correlation of one seed with another; or that of each query ``(Q,)``, whose
            curves are then averaged. What is below 0 by chance counts as 0.
        measured: by name, r by the number S of seeds, with the mean of ``held_out`` other seeds.
        held_out: F, of the means that were measured against: a second curve.
        seeds: where the curves end.
        ax: matplotlib axes; default new ones.

    Returns:
        the matplotlib axes: ``√(Sρ/(1+(S−1)ρ))``, against infinitely many seeds, and that times
        ``√(Fρ/(1+(F−1)ρ))``.
    """
    import matplotlib.pyplot as plt

    what = "a correlation, or one for each query"
    rho = numbers_of("reliability", reliability, what, torch.float64).cpu().reshape(-1)
    if not bool((rho <= 1).all()) or not bool((rho > 0).any()):
        raise ValueError(f"reliability={shown(reliability)} must be {what}, some above 0")
    held_out = check_whole("held_out", held_out, none="no such curve")
    seeds = check_whole("seeds", seeds)
    rho = rho.clamp(min=0)
    if ax is None:
        _, ax = plt.subplots(figsize=(5.6, 3.4))
    counts = torch.arange(1, seeds + 1)
    ideal = spearman_brown(rho, counts[:, None]).sqrt()  # (S, Q)
    ax.plot(counts, ideal.mean(1), "-", color="C0", label="predicted, against all seeds")
    if held_out is not None:
        limited = ideal * spearman_brown(rho, held_out).sqrt()
        name = f"predicted, against {held_out} other seeds"
        ax.plot(counts, limited.mean(1), "--", color="C1", label=name)
    markers = itertools.cycle(("o", "s", "^", "D"))
    for (name, found), marker in zip((measured or {}).items(), markers, strict=False):
        style = {"marker": marker, "ls": "", "ms": 7, "mfc": "none", "mew": 1.5}
        ax.plot(*zip(*sorted(found.items()), strict=True), label=name, **style)
    ax.set(ylim=(0, 1.02), xlabel="S, how many seeds are averaged", ylabel="r, mean over queries")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def agreement_scatter(report: Agreement, ax=None, title: str = ""):
    """Predicted against actual change of every query and removal, with the line where they agree.

    Returns:
        the matplotlib axes.
    """
    import matplotlib.pyplot as plt

    check_instance("report", report, Agreement, "as agreement(scores, effects) gives it")
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 3.8))
    ax.axline((0, 0), slope=1, color=NEUTRAL, lw=1, ls="--", zorder=0)
    ax.scatter(
        report.predicted.ravel(), report.actual.ravel(), s=6, alpha=0.7, color=HELPFUL, linewidths=0
    )
    limit = 1.05 * max(abs(report.predicted).max(), abs(report.actual).max())
    limit = limit if math.isfinite(limit) and limit > 0 else 1.0
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title)
    ax.locator_params(nbins=5)
    ax.set_xlabel(f"predicted change in query {plain(report.target)}, {report.unit}")
    ax.set_ylabel(f"actual change after retraining, {report.unit}")
    text = f"mean per-query r = {report.mean():.3f}\nslope = {report.mean('slope'):.2f}"
    behind = {
        "boxstyle": "square,pad=0.15",
        "facecolor": "white",
        "edgecolor": "none",
        "alpha": 0.8,
    }
    ax.text(0.02, 0.98, text, transform=ax.transAxes, va="top", fontsize=8, bbox=behind)
    return ax


def method_intervals(table, statistics=("r", "magnitude"), removals: str | None = None):
    """Every method's agreement with retraining: dots with 95 % intervals, one panel per statistic.

    Args:
        table: of `compare_methods` (one setting and link); rows of `noise_ceiling` become a grey
            band.
        statistics: panels, of those in the table.
        removals: which kind, default the first in the table.

    Returns:
        the matplotlib figure, methods from best (top) to worst by the first statistic.
    """
    import matplotlib.pyplot as plt

    check_table(table)
    statistics = tuple(listed("statistics", statistics, "names, such as ('r', 'magnitude')"))
    removals = table["removals"].iloc[0] if removals is None else removals
    table = table[table["removals"] == removals].set_index("method")
    if table.empty or not statistics or not set(statistics) <= set(table["statistic"]):
        raise ValueError(
            f"the table has no rows of removals={removals!r} and statistics={statistics}"
        )
    first = table[table["statistic"] == statistics[0]]
    order = first.drop(index=CEILING, errors="ignore").sort_values("mean").index
    size = (3.4 * len(statistics) + 1.2, 0.24 * len(order) + 1.1)
    figure, axes = plt.subplots(1, len(statistics), figsize=size, sharey=True, squeeze=False)
    for ax, statistic in zip(axes[0], statistics, strict=True):
        some = table[table["statistic"] == statistic]
        if CEILING in some.index:
            low, high = some.loc[CEILING, ["low", "high"]]
            ax.axvspan(low, high, color=NEUTRAL, alpha=0.25, lw=0, zorder=0, label="another seed")
        ax.axvline(0.5 if statistic == "sign" else 0.0, color=NEUTRAL, lw=0.8, ls=":", zorder=0)
        some = some.loc[order]
        ours = some.index.str.startswith(("unrolled", "implicit"))
        for mask, colour, marker in ((ours, HELPFUL, "o"), (~ours, HARMFUL, "s")):
            y = [i for i, chosen in enumerate(mask) if chosen]
            part = some[mask]
            error = [part["mean"] - part["low"], part["high"] - part["mean"]]
            ax.errorbar(part["mean"], y, xerr=error, fmt=marker, ms=5, color=colour, lw=1.5)
        ax.set_yticks(range(len(order)), list(map(plain, order)))
        over = "" if statistic == "sign" else ", mean over queries"
        ax.set_xlabel(STATISTICS[statistic] + over)
    if CEILING in table.index:
        axes[0, -1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def intervention_changes(report: Interventions, task: str = "test", measure: str = "loss", ax=None):
    """What acting on each ranking's chosen fraction changed: dots with paired 95 % intervals.

    Args:
        report: of `intervene`.
        task, measure: as in `Interventions.summary`; the prediction is a diamond where it is known.
        ax: where to draw; default a new figure.

    Returns:
        the matplotlib axes, rankings from the largest fall (top) to the largest rise.
    """
    import matplotlib.pyplot as plt

    check_instance("report", report, Interventions, "as intervene gives it")
    frame = report.summary(task, measure)
    frame = frame[frame.chosen & (frame.fraction > 0)].sort_values("change", ascending=False)
    if ax is None:
        _, ax = plt.subplots(figsize=(5.2, 0.3 * len(frame) + 1.1))
    ax.axvline(0, color=NEUTRAL, lw=0.8, ls=":", zorder=0)
    error = [frame.change - frame.low, frame.high - frame.change]
    y = range(len(frame))
    ax.errorbar(frame.change, y, xerr=error, fmt="o", ms=5, color=HELPFUL, lw=1.5, label="real")
    if frame.predicted.notna().any():
        ax.plot(frame.predicted, y, "D", ms=6, mfc="none", color=HARMFUL, label="predicted")
        ax.legend(frameon=False, fontsize=8)
    names = zip(frame.ranking, frame.fraction, strict=True)
    ax.set_yticks(y, [f"{plain(name)}, {share:.0%}" for name, share in names])
    ax.set_xlabel(f"change of {task} {measure}, mean of {len(report.seeds)} fresh seeds")
    return ax


def v_curve(steps, errors, ax=None, labels=None):
    """Relative distance of finite differences from a derivative, against the step, on log axes.

    Args:
        steps: the H steps that were tried.
        errors: ``(H,)`` or ``(H, n)``, one line for each of n examples.
        ax: matplotlib axes; default new ones.
        labels: names of the lines.

    Returns:
        the matplotlib axes. A correct derivative draws a V: with a smaller step truncation
        error falls and rounding error rises.
    """
    import matplotlib.pyplot as plt

    steps = listed("steps", steps, "positive numbers, the changes that were tried")
    if not steps or not all(isinstance(h, torch.Tensor) or is_number(h) for h in steps):
        raise ValueError(f"steps={steps} must be positive numbers, the changes that were tried")
    if not all(h > 0 for h in steps):
        raise ValueError(f"steps={steps} must be positive, for a logarithmic axis")
    what = "numbers, (H,) or (H, n)"
    errors = numbers_of("errors", errors, what).cpu()
    if errors.ndim not in (1, 2):
        raise ValueError(f"errors {tuple(errors.shape)} must be {what}")
    errors = errors[:, None] if errors.ndim == 1 else errors
    if errors.shape[0] != len(steps):
        raise ValueError(
            f"errors {tuple(errors.shape)} must hold one row for each of {len(steps)} steps"
        )
    if labels is not None:
        labels = listed("labels", labels, "names of the lines")
        if labels and len(labels) != errors.shape[1]:
            raise ValueError(f"labels={labels} must name each of {errors.shape[1]} lines")
    if ax is None:
        _, ax = plt.subplots(figsize=(5.2, 3.2))
    x = [float(h) for h in steps]
    styles = itertools.cycle(("o-", "s--", "^:", "D-."))
    for i, (line, style) in enumerate(zip(errors.T, styles, strict=False)):
        name = labels[i] if labels else None
        ax.loglog(x, line.clamp(min=1e-17).numpy(), style, ms=5, label=name)
    ax.minorticks_off()
    ax.set_xlabel("step h in one example weight")
    ax.set_ylabel("relative distance")
    if labels:
        ax.legend(frameon=False, fontsize=8)
    return ax


def filter_curves(eigenvalues, alphas, times=(), ax=None):
    """How much of a direction's pull comes through finetuning, against its curvature s.

    Args:
        eigenvalues: s of the directions, ``(n,)``, drawn as ticks along the bottom; may be
            negative.
        alphas: strengths α > 0, one line ``2α / (s + 2α)`` each, drawn where ``s + 2α`` is
            positive.
        times: τ = ηK of plain gradient descent, one thin line ``exp(−τ s)`` with circles each.
        ax: matplotlib axes; default new ones.

    Returns:
        the matplotlib axes; s on a logarithmic axis, which is linear near 0 if an eigenvalue is not
        positive.
    """
    import matplotlib.pyplot as plt

    ticks = numbers_of("eigenvalues", eigenvalues, "numbers (n,)", torch.float64)
    ticks = ticks.cpu().flatten()
    alphas = listed("alphas", alphas, "a list of positive numbers")
    times = listed("times", times, "a list of positive numbers")
    strengths = [float(v) if isinstance(v, torch.Tensor) else v for v in (*alphas, *times)]
    positive = all(is_number(v) and 0 < v < math.inf for v in strengths)
    finite = len(ticks) > 0 and bool(torch.isfinite(ticks).all())
    if not finite or not positive:
        raise ValueError(
            f"eigenvalues {shown(eigenvalues)} must be finite and at least one, "
            f"alphas={list(alphas)} and times={list(times)} positive"
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(6.2, 3.4))
    low = float(ticks.min())
    high = float(ticks.max())
    near = max(high, -low) / 100 or 1.0  # how far from 0 the axis is linear
    s = _curvatures(low, high, near)
    styles = itertools.cycle(("-", "--", "-.", ":"))
    for i, (alpha, style) in enumerate(zip(alphas, styles, strict=False)):
        part = s[s + 2 * alpha > 0]
        name = f"2α/(s + 2α), α = {alpha:.3g}"
        ax.plot(part, 2 * alpha / (part + 2 * alpha), style, color=f"C{i}", lw=2, label=name)
    for i, tau in enumerate(times):
        dots = {"marker": "o", "mfc": "white", "ms": 4, "markevery": (5 * i, 20)}
        name = f"exp(−τs), τ = {tau:.3g}"
        ax.plot(s, torch.exp(-tau * s), color=f"C{i}", lw=0.9, label=name, **dots)
    heights = [torch.as_tensor(line.get_ydata()) for line in ax.lines]
    drawn = torch.cat([torch.ones(1), *heights])
    at_bottom = {"transform": ax.get_xaxis_transform(), "clip_on": False}
    ax.plot(ticks, torch.zeros_like(ticks), "|", color=NEUTRAL, ms=9, **at_bottom)
    _curvature_axis(ax, low, high, near)
    ax.set_yscale("log")
    ax.set_xlabel("curvature s (ticks: eigenvalues)")
    ax.set_ylabel("share that comes through")
    ax.set_ylim(max(float(drawn.min()) / 1.5, 1e-3), min(float(drawn.max()) * 1.5, 1e2))
    if len(ax.lines) > 1:  # without curves a legend has nothing to name
        ax.legend(frameon=False, fontsize=8)
    return ax


def _curvatures(low: float, high: float, near: float) -> torch.Tensor:
    """Curvatures from low to high, evenly spaced on the axis of `_curvature_axis`."""
    if low > 0:
        return torch.logspace(math.log10(low), math.log10(high), 200, dtype=torch.float64)
    ends = math.asinh(low / near), math.asinh(high / near)
    return near * torch.linspace(*ends, 400, dtype=torch.float64).sinh()


def _curvature_axis(ax, low: float, high: float, near: float) -> None:
    """Make the x axis logarithmic, but linear within ``near`` of 0 if it has to reach 0."""
    if low > 0:
        ax.set_xscale("log")
        return
    ax.set_xscale("asinh", linear_width=near)
    # matplotlib's own ticks crowd around 0
    first = math.ceil(math.log10(near))
    last = math.ceil(math.log10(100 * near))
    tens = [10.0**k for k in range(first, last + 1)]
    below = [-x for x in reversed(tens) if x <= -low]
    above = [x for x in tens if x <= high]
    places = [*below, 0.0, *above]
    ax.set_xticks(places, [f"{x:g}" for x in places])
    ax.minorticks_off()

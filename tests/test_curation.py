"""Acting on scores: interventions against plain retraining by hand, and what is refused."""

from __future__ import annotations

import copy
import functools

import numpy
import pytest
import torch
from torch import nn

import msif_lab as msif
from msif_lab import plots
from msif_lab.evaluation.curation import KEEP, calibration_error
from msif_lab.pipeline.pipeline import Pipeline

SEEDS = (101, 102, 103)


class Scaled:
    """Cross-entropy times m'/m: the mean over m' examples then has the 1/m of all."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, outputs, y):
        return self.factor * nn.functional.cross_entropy(outputs, y, reduction="none")


@functools.cache
def data():
    train, test = msif.load_digits(dtype=torch.float64)
    pre, fine = train.select(range(4), n=48, seed=0), train.select((4, 5, 6), n=30, seed=0)
    other = train.select((7, 8), n=20, seed=0)
    judges = test.select((4, 5, 6), n=60, seed=0)
    held = test.select(range(4), n=40, seed=0)
    return pre, fine, other, judges[:30], judges[30:], held, test.select((7, 8), n=30, seed=0)


def net(classes: int, seed: int):
    return msif.mlp(64, (24,), classes=classes, seed=seed, activation=nn.Tanh).double()


# All of the data in each batch, so that no order of batches stands between the two ways.
RECIPE = msif.SGD(0.2, epochs=15, batch_size=1000)


def stages(seed: int, pre=None, scale: float = 1.0, link=None):
    first = msif.Stage(
        "pretrain",
        net(4, seed),
        data()[0] if pre is None else pre,
        Scaled(scale),
        weight_decay=1e-2,
        recipe=RECIPE,
    )
    second = msif.Stage(
        "finetune",
        net(3, seed + 1000),
        data()[1],
        weight_decay=1e-2,
        recipe=RECIPE,
        link=link or msif.WarmStart(),
    )
    return [first, second]


def build(seed: int) -> msif.Pipeline:
    return msif.Pipeline(stages(seed))


def by_hand(seed: int, positions, labels=None, link=None) -> msif.Pipeline:
    """Trained on these examples of the 48, some of them perhaps several times, nothing else."""
    pre = data()[0]
    y = pre.y if labels is None else labels
    some = msif.Examples(pre.x[positions], y[positions])
    return msif.Pipeline(stages(seed, some, len(positions) / 48, link)).fit(progress=False)


def judged(pipeline, examples, stage: int = -1) -> tuple[float, float, torch.Tensor]:
    """Mean loss, accuracy and probabilities by the stage's own module."""
    model = pipeline.stages[stage].model
    with torch.no_grad():
        z = model(examples.x)
    loss = nn.functional.cross_entropy(z, examples.y)
    return float(loss), float((z.argmax(1) == examples.y).double().mean()), z.softmax(1)


def value(report, ranking, seed, task="test", measure="loss", fraction=None):
    t = report.table
    rows = t[(t.ranking == ranking) & (t.seed == seed) & (t.task == task) & (t.measure == measure)]
    rows = rows if fraction is None else rows[rows.fraction == fraction]
    (found,) = rows["value"]
    return found


def asked(**given):
    usual = {"test": data()[4], "seeds": SEEDS[:2], "progress": False}
    return usual | given


RANDOM = torch.rand(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def rest(k: int) -> list[int]:
    """All positions but the k that `RANDOM` ranks first."""
    order = sorted(range(48), key=lambda i: -float(RANDOM[i]))
    return sorted(order[k:])


# ---- Against plain retraining ----


def test_removal_is_training_without_the_examples():
    fractions = (0.125, 0.5)
    given = asked(fraction=fractions, validation=data()[3], held_out=data()[5], lanes=2)
    report = msif.intervene(build, {"ours": RANDOM, "none": -RANDOM}, **given)
    for seed in SEEDS[:2]:
        keep = by_hand(seed, list(range(48)))
        before = judged(keep, data()[4])[2]
        assert value(report, KEEP, seed) == pytest.approx(judged(keep, data()[4])[0], abs=1e-9)
        for fraction in fractions:
            got = functools.partial(value, report, "ours", seed, fraction=fraction)
            plain = by_hand(seed, rest(round(48 * fraction)))
            loss, accuracy, p = judged(plain, data()[4])
            assert got() == pytest.approx(loss, abs=1e-9)
            assert got(measure="accuracy") == pytest.approx(accuracy)
            assert got(measure="shift") == pytest.approx(float((p - before).abs().mean()), abs=1e-9)
            flips = float((p.argmax(1) != before.argmax(1)).double().mean())
            assert got(measure="flips") == pytest.approx(flips)
            for c, name in enumerate((4, 5, 6)):
                mine = data()[4].y == c
                right = float((p.argmax(1) == c)[mine].double().mean())
                assert got(measure=f"accuracy of {name}") == pytest.approx(right)
            assert got("validation") == pytest.approx(judged(plain, data()[3])[0], abs=1e-9)
            assert got("pretrain") == pytest.approx(judged(plain, data()[5], 0)[0], abs=1e-9)
            other = value(report, "none", seed, fraction=fraction)  # the control
            assert abs(other - loss) > 1e-4


def test_weights_are_copies_of_examples():
    order = sorted(range(48), key=lambda i: -float(RANDOM[i]))[:12]
    seed = SEEDS[0]
    twice = msif.intervene(build, RANDOM, **asked(action="repeat", fraction=0.25, seeds=[seed]))
    loss = judged(by_hand(seed, [*range(48), *order]), data()[4])[0]
    assert value(twice, "ranking", seed) == pytest.approx(loss, abs=1e-9)
    thrice = {"action": "reweight", "weight": 3, "fraction": 0.25, "seeds": [seed]}
    thrice = msif.intervene(build, RANDOM, **asked(**thrice))
    loss = judged(by_hand(seed, [*range(48), *order, *order]), data()[4])[0]
    assert value(thrice, "ranking", seed) == pytest.approx(loss, abs=1e-9)
    assert abs(value(twice, "ranking", seed) - loss) > 1e-4
    each = torch.full((48,), 9.0)  # of which only those acted on count
    each[order] = 3.0
    given = {"action": "reweight", "weight": each, "fraction": 0.25, "seeds": [seed]}
    report = msif.intervene(build, RANDOM, **asked(**given))
    assert value(report, "ranking", seed) == pytest.approx(loss, abs=1e-9)


def test_labels_are_changed_for_those_acted_on():
    order = sorted(range(48), key=lambda i: -float(RANDOM[i]))[:12]
    new = (data()[0].y + 1) % 4
    changed = data()[0].y.clone()
    changed[order] = new[order]
    given = asked(action="relabel", fraction=0.25, labels=new)
    report = msif.intervene(build, RANDOM, **given)
    for seed in SEEDS[:2]:
        loss = judged(by_hand(seed, list(range(48)), changed), data()[4])[0]
        assert value(report, "ranking", seed) == pytest.approx(loss, abs=1e-9)
        assert abs(value(report, KEEP, seed) - loss) > 1e-4
    own = msif.intervene(build, RANDOM, **asked(action="relabel", fraction=1.0, seeds=SEEDS[:1]))
    guess = msif.out_of_fold(build(SEEDS[0])).argmax(1)
    assert not torch.equal(guess, data()[0].y)
    loss = judged(by_hand(SEEDS[0], list(range(48)), guess), data()[4])[0]
    assert value(own, "ranking", SEEDS[0]) == pytest.approx(loss, abs=1e-9)


def other_stage() -> msif.Stage:
    settings = {"weight_decay": 1e-2, "recipe": RECIPE, "link": msif.Frozen()}
    return msif.Stage("other", net(2, 77), data()[2], **settings)


def test_another_task_is_trained_on_the_same_pretraining():
    base = build(0)
    tasks = {"sevens": (other_stage(), data()[6])}
    report = msif.intervene(base, RANDOM, **asked(other_tasks=tasks, fraction=0.5))
    alone = msif.Pipeline([stages(0)[0], other_stage()])
    runs = msif.over_seeds(alone, SEEDS[:2], progress=False)
    for seed, run in zip(runs.seeds, runs, strict=True):
        loss = judged(run, data()[6])[0]
        assert value(report, KEEP, seed, "sevens") == pytest.approx(loss, abs=1e-9)
        weights = torch.zeros(48)
        weights[rest(24)] = 1
        without = run.retrain(weights, progress=False).evaluate(data()[6]).mean()
        assert value(report, "ranking", seed, "sevens") == pytest.approx(float(without), abs=1e-9)
        assert abs(float(without) - loss) > 1e-4


def test_processes_and_lanes_change_nothing():
    given = asked(fraction=(0.25, 0.5), validation=data()[3])
    one = msif.intervene(build, RANDOM, **given, lanes=1).table
    for settings in ({"lanes": 3}, {"lanes": 1, "n_jobs": 2}):
        other = msif.intervene(build, RANDOM, **given, **settings).table
        numpy.testing.assert_allclose(other["value"], one["value"], atol=1e-9)


def test_calibration_error_is_counted_by_hand():
    draw = numpy.random.default_rng(0)
    confidence, right = draw.uniform(0.2, 1, (3, 200)), draw.integers(0, 2, (3, 200)).astype(float)
    found = calibration_error(torch.tensor(confidence), torch.tensor(right))
    for lane in range(3):
        total = 0.0
        for low in numpy.arange(15) / 15:
            inside = (confidence[lane] > low) & (confidence[lane] <= low + 1 / 15)
            if inside.any():
                total += inside.mean() * abs(
                    right[lane][inside].mean() - confidence[lane][inside].mean()
                )
        assert float(found[lane]) == pytest.approx(total)


# ---- The report ----


def test_intervals_are_paired_over_seeds():
    from scipy.stats import ttest_rel

    report = msif.intervene(build, {"a": RANDOM, "b": -RANDOM}, **asked(seeds=SEEDS, fraction=0.5))
    columns = {name: [value(report, name, seed) for seed in SEEDS] for name in (KEEP, "a", "b")}
    for against in (KEEP, "b"):
        row = report.summary(against=against, level=0.9).set_index("ranking").loc["a"]
        test = ttest_rel(columns["a"], columns[against])
        low, high = test.confidence_interval(0.9)
        assert row[["low", "high"]].tolist() == pytest.approx([low, high])
        assert row.change == pytest.approx(numpy.mean(columns["a"]) - numpy.mean(columns[against]))
    keep = [judged(by_hand(seed, list(range(48))), data()[4])[2] for seed in SEEDS]
    apart = [(keep[0] - keep[i]).abs().mean() for i in (1, 2)]
    assert value(report, KEEP, SEEDS[0], measure="shift") == pytest.approx(float(sum(apart) / 2))
    assert "keep all" in str(report) and "<table" in report._repr_html_()


def test_validation_chooses_and_test_has_no_say():
    given = asked(fraction=(0.25, 0.5), validation=data()[3])
    report = msif.intervene(build, {"a": RANDOM, "b": -RANDOM}, **given)
    assert set(report.chosen) == {KEEP, "a", "b"}
    changed = copy.copy(report)
    changed.table = report.table.copy()
    for task, better in (("validation", 0.5), ("test", 0.25)):
        for fraction in (0.25, 0.5):
            t = changed.table
            rows = (t.task == task) & (t.fraction == fraction) & (t.measure == "loss")
            changed.table.loc[rows, "value"] = 0.1 if fraction == better else 0.2
    assert changed.chosen == {KEEP: 0.0, "a": 0.5, "b": 0.5}
    marked = changed.summary().query("chosen")
    assert marked.fraction.tolist() == [0.0, 0.5, 0.5]
    assert changed.best()["loss"].tolist()[1:] == [0.2, 0.2]


@functools.cache
def scored():
    runs = msif.over_seeds(build, seeds=4, progress=False)
    method = msif.AveragedInfluence(msif.UnrolledInfluence()).fit(runs)
    return runs, method.score(data()[3], aggregate="mean", progress=False)


def test_predictions_stand_beside_what_happened():
    runs, scores = scored()
    one = msif.UnrolledInfluence().fit(runs[0], progress=False).score(data()[3], progress=False)
    given = asked(fraction=(0.05, 0.125), validation=data()[3], seeds=range(200, 206))
    report = msif.intervene(build, {"averaged": scores, "one": one, "numbers": RANDOM}, **given)
    frame = report.summary("validation").set_index(["ranking", "fraction"])
    assert (
        frame.loc["numbers"].predicted.isna().all()
        and frame.loc["one"].predicted_error.isna().all()
    )
    chosen = one.mean().harmful(6).positions[0]
    expected = float(one.mean().removal_effect(chosen))
    assert frame.loc["one", 0.125].predicted == pytest.approx(expected)
    gain = msif.predicted_gain(scores, 0.125).iloc[0]
    row = frame.loc["averaged", 0.125]
    assert -row.predicted == pytest.approx(gain.gain)
    assert row.predicted_error == pytest.approx(gain.standard_error)
    assert row.change < 0 and row.predicted < 0, "removing what hurts helps, and was said to"
    assert 0.4 < row.change / row.predicted < 2.5
    assert report.summary("test", "accuracy").predicted.isna().all()
    ax = plots.intervention_changes(report, "validation")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["predicted", "real"]


def test_repeating_takes_the_most_helpful():
    _, scores = scored()
    given = asked(action="repeat", fraction=0.125, seeds=[300])
    report = msif.intervene(build, scores, **given)
    helpful = scores.helpful(6).positions[0].tolist()
    loss = judged(by_hand(300, [*range(48), *helpful]), data()[4])[0]
    assert value(report, "ranking", 300) == pytest.approx(loss, abs=1e-9)
    assert report.predicted.predicted[0] < 0


def test_a_store_is_resumed(tmp_path, monkeypatch):
    given = asked(fraction=0.5, store=tmp_path)
    first = msif.intervene(build, RANDOM, **given | {"seeds": SEEDS[:1]})
    before, calls = Pipeline.retrain, []
    monkeypatch.setattr(Pipeline, "retrain", lambda *a, **k: calls.append(a) or before(*a, **k))
    second = msif.intervene(build, RANDOM, **given)
    assert len(calls) == 1, "only the seed that was not there"
    again = msif.intervene(build, RANDOM, **given)
    assert len(calls) == 1 and again.table.equals(second.table)
    assert value(second, "ranking", SEEDS[0]) == value(first, "ranking", SEEDS[0])
    for change in ({"fraction": 0.25}, {"test": data()[3]}, {"action": "repeat"}):
        with pytest.raises(msif.SavedFileError, match="another call, with other"):
            msif.intervene(build, RANDOM, **given | change)
    with pytest.raises(msif.SavedFileError, match="with other pipeline"):
        msif.intervene(lambda seed: build(seed + 1), RANDOM, **given)
    path = next(tmp_path.glob("seed-101*"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(msif.SavedFileError):
        msif.intervene(build, RANDOM, **given)


def test_a_missed_tolerance_is_warned_of():
    stage = msif.Stage("digits", net(4, 0), data()[0], weight_decay=1e-2)
    stage.recipe = msif.LBFGS(max_iter=2)
    given = asked(test=data()[5], fraction=0.5)
    with pytest.warns(msif.ConvergenceWarning, match="stopped short") as caught:
        msif.intervene(msif.Pipeline([stage]), RANDOM, **given)
    assert caught[0].filename == __file__


def test_regression_has_a_loss_only():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=draw, dtype=torch.float64)
    y = x @ torch.ones(3, 1, dtype=torch.float64)
    stage = msif.Stage(
        "line",
        nn.Linear(3, 1).double(),
        msif.Examples(x[:20], y[:20]),
        msif.mean_squared_error,
        recipe=RECIPE,
    )
    given = {"test": msif.Examples(x[20:], y[20:]), "seeds": 2, "progress": False}
    report = msif.intervene(msif.Pipeline([stage]), torch.arange(20.0), **given)
    assert set(report.table.measure) == {"loss"} and "keep all" in str(report)
    new = {"action": "relabel", "labels": y[:20] + 1}
    assert msif.intervene(msif.Pipeline([stage]), torch.arange(20.0), **given, **new).seeds
    with pytest.raises(ValueError, match="need class labels"):
        msif.intervene(msif.Pipeline([stage]), torch.arange(20.0), **given, action="relabel")


# ---- What is refused, before any work where it can be ----


def test_seeds_that_made_the_scores_are_refused(monkeypatch):
    runs, scores = scored()
    assert msif.intervene(runs, RANDOM, **asked(seeds=1, fraction=0.5)).seeds == [4]
    monkeypatch.setattr(Pipeline, "_run", None)  # nothing may be trained
    for pipeline, ranking in ((build, scores), (runs, RANDOM), (build, {"a": RANDOM, "b": scores})):
        with pytest.raises(ValueError, match=r"seeds \[3\] made the scores"):
            msif.intervene(pipeline, ranking, **asked(seeds=[3, 9]))


def test_the_very_run_that_made_the_scores_is_refused():
    run = build(SEEDS[1]).fit(progress=False)
    scores = msif.GradientDot().fit(run).score(data()[3])
    with pytest.raises(ValueError, match="seed 102 gives the very run"):
        msif.intervene(build, scores, **asked(fraction=0.5))
    assert msif.intervene(build, scores, **asked(fraction=0.5, seeds=[103]))


def test_what_chooses_may_not_judge(monkeypatch):
    run, judge = build(0).fit(progress=False), data()[4]
    dot = msif.GradientDot().fit(run)
    monkeypatch.setattr(Pipeline, "_run", None)
    both = {"fraction": (0.1, 0.2), "validation": data()[3]}
    renamed = msif.Examples(data()[3].x, data()[3].y, judge.ids)
    with pytest.raises(ValueError, match="share 30 ids"):
        msif.intervene(build, RANDOM, **asked(**both | {"validation": renamed}))
    copied = msif.Examples(judge.x, judge.y, judge.ids + 5000)[:4]
    with pytest.raises(ValueError, match="share 4 equal inputs"):
        msif.intervene(build, RANDOM, **asked(**both | {"validation": copied}))
    with pytest.raises(ValueError, match="test data may not choose"):
        msif.intervene(build, RANDOM, **asked(fraction=(0.1, 0.2)))
    for scores in (dot.score(judge), dot.score(judge, aggregate="mean"), dot.score(judge).mean()):
        with pytest.raises(ValueError, match="queries of test"):
            msif.intervene(build, scores, **asked())


def test_other_refusals(monkeypatch):
    _, scores = scored()
    monkeypatch.setattr(Pipeline, "_run", None)
    stage = other_stage()
    short, shifted = copy.copy(scores), torch.arange(48) + 1
    short.ids = shifted
    for given, words in (
        ({"fraction": 0.99}, "fraction"),
        ({"ranking": torch.rand(47)}, r"\(48,\)"),
        ({"ranking": torch.full((48,), torch.nan)}, "nan"),
        ({"ranking": short}, "other ids"),
        ({"ranking": scores, "stage": "finetune"}, "examples of stage 'pretrain'"),
        ({"ranking": {KEEP: RANDOM}}, KEEP),
        ({"action": "reweight"}, "weight"),
        ({"weight": 2}, "no meaning"),
        ({"labels": data()[0].y}, "no meaning"),
        ({"action": "relabel", "labels": data()[0].y + 1}, "below 4"),
        ({"other_tasks": {"a": stage}}, "pair"),
        ({"other_tasks": {"test": (stage, data()[6])}}, "rename"),
        ({"other_tasks": {"a": (stage, data()[6])}, "stage": 1, "ranking": RANDOM[:30]}, "last"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            msif.intervene(build, **asked(**{"ranking": RANDOM} | given))


def test_retrainings_go_on_with_the_stages_they_belong_to():
    again = build(0).retrain(torch.ones(2, 48), progress=False)
    assert again.outputs(data()[5], "pretrain").shape == (2, 40, 4)
    single = msif.Pipeline(stages(0)[:1])
    with pytest.raises(ValueError, match="but for the last"):
        again.with_last(single)
    with pytest.raises(ValueError, match="examples"):
        again.outputs(msif.Examples(torch.ones(2, 3, dtype=torch.float64), [0, 1]))

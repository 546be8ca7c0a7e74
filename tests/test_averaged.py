"""Scores and effects averaged over seeds, and what they say about how sure they are."""

import math
from dataclasses import replace

import numpy
import pytest
import torch
from torch import nn

import msif_lab as msif
from msif_lab import experiments
from msif_lab.curvature import derivatives
from msif_lab.influence.averaged import averages, reliability

SEEDS = 5


def build(seed: int, data_seed: int = 0) -> msif.Pipeline:
    small = {
        "pretraining": 60,
        "finetuning": 40,
        "queries": 6,
        "epochs": (3, 3),
        "batch_size": (20, 20),
    }
    return experiments.digits(msif.WarmStart(), seed=seed, data_seed=data_seed, **small).pipeline


@pytest.fixture(scope="module")
def runs():
    return msif.over_seeds(build, SEEDS, progress=False)


@pytest.fixture(scope="module")
def queries():
    _, test = msif.load_digits(dtype=torch.float64)
    return test.select(range(4, 10), n=6, seed=0)


@pytest.fixture(scope="module")
def scores(runs, queries):
    averaged = msif.AveragedInfluence(msif.UnrolledInfluence()).fit(runs)
    return averaged.score(queries, progress=False)


@pytest.fixture(scope="module")
def effects(runs, queries):
    return msif.removal_effects(runs, queries, list(range(12)), progress=False)


def test_some_of_the_seeds_are_their_own_average(scores, effects):
    some = scores.some([3, 1])
    assert some.seeds == [3, 1] and torch.equal(some.per_seed, scores.per_seed[[3, 1]])
    assert torch.allclose(some.values, scores.per_seed[[1, 3]].mean(0))
    assert some.average == scores.average and len(some.standard_error) == len(scores)
    others = effects.some([0, 2, 4])  # which share no run with them, so that their noise is known
    assert msif.agreement(some, others).noise is not None
    assert msif.agreement(scores.some([0]), others).noise is None


# ---- Runs ----


def test_each_run_is_the_fit_of_its_own_pipeline(runs):
    for seed, run in zip(runs.seeds, runs, strict=True):
        alone = build(seed).fit(progress=False)
        for ours, theirs in zip(run.trained(), alone.trained(), strict=True):
            assert torch.equal(ours, theirs)
    assert all(run.stages[0].data is runs[0].stages[0].data for run in runs)


def test_runs_of_two_processes_have_the_same_bits(runs):
    again = msif.over_seeds(build, 3, n_jobs=2, progress=False)
    for ours, theirs in zip(again, runs, strict=False):
        assert all(map(torch.equal, ours.trained(), theirs.trained()))
        assert ours.reports is not None  # so that it can be rerun


def test_kept_runs_are_not_trained_again(tmp_path, runs, monkeypatch):
    msif.over_seeds(build, 2, store=tmp_path / "runs", progress=False)
    fits = []
    fit = msif.Pipeline.fit
    monkeypatch.setattr(msif.Pipeline, "fit", lambda p, **k: fits.append(1) or fit(p, **k))
    more = msif.over_seeds(build, 3, store=tmp_path / "runs", progress=False)
    assert len(fits) == 1
    assert all(
        torch.equal(a.trained()[-1], b.trained()[-1]) for a, b in zip(more, runs, strict=False)
    )


def test_a_seed_that_changes_nothing_is_refused_before_any_training(monkeypatch):
    monkeypatch.setattr(msif.Pipeline, "fit", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"seeds 0 and 1 .* the seed changes nothing"):
        msif.over_seeds(lambda seed: build(0), 2, progress=False)


def test_a_store_of_other_stages_is_refused(tmp_path):
    msif.over_seeds(build, 1, store=tmp_path, progress=False)
    with pytest.raises(msif.SavedFileError, match="data"):
        msif.over_seeds(lambda seed: build(seed, data_seed=1), 1, store=tmp_path, progress=False)


def test_a_pipeline_is_redrawn(runs):
    given = build(0)
    start = [given.initial(k).clone() for k in range(2)]
    redrawn = msif.over_seeds(given, 2, progress=False)
    assert all(torch.equal(given.initial(k), start[k]) for k in range(2))
    for seed, run in zip(redrawn.seeds, redrawn, strict=True):
        assert not torch.equal(run.initial(0), start[0])
        assert not run.initial(1)[run.initial(1) == 0].numel() < 6 * 16  # the head starts at zero
        assert run.stages[1].recipe.seed == 2 * seed + 1
    again = msif.over_seeds(given, [1], progress=False)
    assert torch.equal(again[0].trained()[-1], redrawn[1].trained()[-1])


def test_batches_alone_are_redrawn():
    given = build(0)
    for run in msif.over_seeds(given, 2, redraw=("batches",), progress=False):
        assert torch.equal(run.initial(0), given.initial(0))


def one_stage(model, **settings) -> msif.Pipeline:
    train, _ = msif.load_digits(dtype=torch.float64)
    recipe = msif.SGD(0.1, epochs=1, batch_size=20)
    return msif.Pipeline(
        [msif.Stage("digits", model.double(), train[:40], recipe=recipe, **settings)]
    )


class Own(nn.Module):
    """A parameter that no reset_parameters draws."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(64))
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(x.flatten(1) * self.scale)


def orthogonal() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    nn.init.orthogonal_(model[1].weight, gain=2.0)
    return model


@pytest.mark.parametrize(("model", "name"), [(Own, "scale"), (orthogonal, "1.weight")])
def test_weights_drawn_otherwise_are_not_redrawn_silently(model, name):
    pipeline = one_stage(model())
    with pytest.raises(ValueError, match=rf"'{name}'.*build\(seed\)"):
        msif.over_seeds(pipeline, 2, progress=False)
    assert len(msif.over_seeds(pipeline, 2, redraw=("batches",), progress=False)) == 2


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.Unflatten(1, (8, 8)), nn.LSTM(8, 4, batch_first=True)),
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten()),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: nn.Embedding(20, 8),
    ],
)
def test_pytorch_layers_are_drawn_as_when_they_are_made(model):
    from msif_lab.pipeline.seeds import _draw

    layers = model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = {n: p.detach().clone() for n, p in model().named_parameters()}
    _draw(layers, 3, "layers")
    for name, p in layers.named_parameters():
        if isinstance(layers, nn.TransformerEncoderLayer):  # whose layers are drawn in other order
            assert (p == p.flatten()[0]).all() == (
                expected[name] == expected[name].flatten()[0]
            ).all()
            wide = p.numel() > 100
            assert not wide or float(p.detach().std() / expected[name].std()) == pytest.approx(
                1, 0.2
            )
        else:
            assert torch.equal(p.detach(), expected[name]), name


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: msif.over_seeds(lambda seed: build(0), 2), ValueError, "the seed changes nothing"),
        (lambda: msif.over_seeds(lambda seed: build(seed, seed), 2), ValueError, "another data"),
        (lambda: msif.over_seeds(lambda seed: seed, 2), TypeError, "gives int, not"),
        (lambda: msif.over_seeds(3, 2), TypeError, "build is int"),
        (lambda: msif.over_seeds(build, []), ValueError, "seeds="),
        (lambda: msif.over_seeds(build, [1, 1]), ValueError, "different whole numbers"),
        (lambda: msif.over_seeds(build, [0.5]), ValueError, "seeds="),
        (lambda: msif.over_seeds(build, "01"), TypeError, "seeds='01'"),
        (lambda: msif.over_seeds(build, 2, redraw="weights"), TypeError, "redraw="),
        (lambda: msif.over_seeds(build, 2, redraw=3), TypeError, "redraw=3"),
        (lambda: msif.over_seeds(build, 2, redraw=[["weights"]]), ValueError, "redraw="),
        (lambda: msif.over_seeds(build, True), ValueError, "seeds=True"),
        (lambda: msif.SeedRuns([]), TypeError, "pipelines must be"),
        (lambda: msif.SeedRuns([build(0)]), ValueError, "not trained"),
        (lambda: msif.AveragedInfluence("unrolled"), TypeError, "method is str"),
        (lambda: msif.AveragedInfluence(msif.Loss(), "average"), ValueError, "average="),
        (lambda: msif.AveragedInfluence(msif.Loss()).fit(build(0)), TypeError, "over_seeds"),
        (lambda: msif.AveragedInfluence(msif.Loss()).score(None), ValueError, "call fit"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- Scores ----


def test_values_are_the_average_of_each_runs_scores(runs, queries, scores):
    each = [msif.UnrolledInfluence().fit(run).score(queries, progress=False).values for run in runs]
    assert torch.equal(scores.per_seed, torch.stack(each))
    assert torch.allclose(scores.values, torch.stack(each).mean(0))
    spread = numpy.std(torch.stack(each).numpy(), axis=0, ddof=1) / math.sqrt(SEEDS)
    assert numpy.allclose(scores.standard_error.numpy(), spread)


def test_every_attributor_is_averaged(runs, queries):
    for name, method in msif.all_baselines().items():
        found = msif.AveragedInfluence(method).fit(runs[:2]).score(queries, progress=False)
        alone = method.fit(runs[1]).score(queries)
        assert torch.equal(found.per_seed[1], alone.values), name


def test_average_in_two_processes(runs, queries, scores):
    averaged = msif.AveragedInfluence(msif.UnrolledInfluence(), n_jobs=2).fit(runs)
    assert torch.allclose(averaged.score(queries, progress=False).values, scores.values, rtol=1e-12)


def test_normalised_rows_count_alike_and_a_median_ignores_one():
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(2, 50, generator=draw, dtype=torch.float64)
    rows = truth + 0.3 * torch.randn(9, 2, 50, generator=draw, dtype=torch.float64)
    wild = rows.clone()
    wild[0] = 1e3 * torch.randn(2, 50, generator=draw, dtype=torch.float64)

    def r(average):
        found = averages(wild, average)[0]
        return float(torch.corrcoef(torch.stack([found[0], truth[0]]))[0, 1])

    assert r("mean") < 0.5 < 0.95 < r("median")
    assert r("normalised") > 0.95
    for average in ("normalised", "median"):
        assert torch.allclose(averages(rows[:1], average)[0], rows[0])
        assert averages(rows[:1], average)[1].isnan().all()


def test_intervals_and_sure_signs_keep_their_promise():
    """Of normal scores: 95 % of intervals hold the truth, and few sure signs are wrong."""
    draw = torch.Generator().manual_seed(1)
    truth = torch.randn(200, 100, generator=draw, dtype=torch.float64)
    per_seed = truth + 2 * torch.randn(6, 200, 100, generator=draw, dtype=torch.float64)
    ids = torch.arange(100), torch.arange(200)
    scores = msif.InfluenceOverSeeds.of(
        per_seed, range(6), "mean", *ids, "pretrain", "loss", "made up", "", origin={}
    )
    low, high = scores.interval(0.95)
    inside = float(((low <= truth) & (truth <= high)).double().mean())
    assert 0.94 < inside < 0.96
    sure = scores.trusted(0.95)
    assert 0.001 < sure.double().mean() < 0.5
    assert (scores.values.sign() != truth.sign())[sure].double().mean() < 0.05
    # A control: signs of nothing are not sure.
    nothing = msif.InfluenceOverSeeds.of(
        per_seed - truth, range(6), "mean", *ids, "pretrain", "loss", "made up", "", origin={}
    )
    assert nothing.trusted(0.95).double().mean() < 1e-3


def test_reliability_predicts_what_more_seeds_bring():
    draw = torch.Generator().manual_seed(2)
    truth = torch.randn(30, 400, generator=draw, dtype=torch.float64)
    per_seed = truth + 2 * torch.randn(200, 30, 400, generator=draw, dtype=torch.float64)
    assert float(reliability(per_seed[:20]).mean()) == pytest.approx(1 / 5, abs=0.02)
    ids = torch.arange(400), torch.arange(30)
    few = msif.InfluenceOverSeeds.of(
        per_seed[:8], range(8), "mean", *ids, "pretrain", "loss", "made up", "", origin={}
    )
    need = few.seeds_needed(0.9)
    reached = [
        float(
            torch.stack(
                [
                    torch.corrcoef(torch.stack(pair))[0, 1]
                    for pair in zip(average, truth, strict=True)
                ]
            ).mean()
        )
        for average in (per_seed[:need].mean(0), per_seed[: need // 2].mean(0))
    ]
    assert reached[0] == pytest.approx(0.9, abs=0.03) and reached[1] < 0.86
    assert few.expected_r(need) == pytest.approx(0.9, abs=0.02)


def test_a_single_example_has_no_reliability():
    one = made_up(torch.tensor([[[1.0]], [[1.5]], [[0.5]]], dtype=torch.float64))
    assert one.standard_error.shape == (1, 1) and one.trusted().shape == (1, 1)
    assert "seed with another" not in repr(one)
    for call in (one.seeds_needed, one.expected_r):
        with pytest.raises(ValueError, match="do not vary over the examples"):
            call()


def test_rows_means_files_and_parts(tmp_path, runs, queries, scores):
    assert torch.equal(scores[[1, 3]].per_seed, scores.per_seed[:, [1, 3]])
    assert scores[2].values.shape == (1, 60)
    mean = scores.mean()
    assert torch.allclose(mean.values, scores.values.mean(0, keepdim=True))
    rows = numpy.std(scores.per_seed.mean(1).numpy(), axis=0, ddof=1) / math.sqrt(SEEDS)
    assert numpy.allclose(mean.standard_error.numpy(), rows)
    scores.save(tmp_path / "scores")
    loaded = msif.InfluenceOverSeeds.load(tmp_path / "scores")
    assert torch.equal(loaded.values, scores.values) and loaded.seeds == list(scores.seeds)
    assert repr(loaded) == repr(scores) and loaded.origin == scores.origin
    with pytest.raises(msif.SavedFileError):
        msif.Influence.load(tmp_path / "scores")
    averaged = msif.AveragedInfluence(msif.UnrolledInfluence()).fit(runs)
    parts = [averaged.score(queries[rows], progress=False) for rows in (slice(0, 2), slice(2, 6))]
    whole = msif.InfluenceOverSeeds.concatenate(parts)
    assert torch.allclose(whole.values, scores.values) and whole.origin == scores.origin
    assert {"standard_error", "score"} <= set(scores.to_frame().columns)
    assert "±" in scores._repr_html_()


def test_a_single_seed_knows_no_error(runs, queries):
    one = msif.AveragedInfluence(msif.GradientDot()).fit(runs[:1]).score(queries, progress=False)
    assert one.standard_error.isnan().all()
    for call in (one.interval, one.trusted, one.seeds_needed):
        with pytest.raises(ValueError, match="two or more seeds"):
            call()


# ---- Several runs at once ----


LINKS = {"frozen": msif.Frozen(), "warm": msif.WarmStart(), "proximal": msif.Proximal(0.05)}
RECIPES = {
    "sgd": msif.SGD(0.1, epochs=2, batch_size=25),  # the last batch is smaller
    "nesterov": msif.SGD(0.05, epochs=2, batch_size=20, schedule="cosine", nesterov=True),
    "adam": msif.Adam(0.01, epochs=2, batch_size=20),
    "adamw": msif.AdamW(0.01, epochs=2, batch_size=20),
}


def two_stages(link, recipe, net=msif.mlp, **settings):
    """A builder whose three stages, but for the first, are tied by the link."""
    train, _ = msif.load_digits(dtype=torch.float64)
    data = [train.select(range(4), n=60), train.select(range(4, 7), n=40)]
    data.append(train.select(range(7, 10), n=40))

    def build(seed):
        stages = []
        for k, examples in enumerate(data):
            model = net(64, hidden=(6,), classes=len(examples.classes), seed=7 * seed + k)
            stage = msif.Stage(
                f"s{k}",
                model.double(),
                examples,
                weight_decay=1e-2,
                link=link if k else None,
                recipe=replace(recipe, seed=3 * seed + k),
            )
            stages.append(stage)
        return msif.Pipeline(stages)

    return build


@pytest.mark.parametrize(
    ("link", "recipe"),
    [("frozen", "sgd"), ("warm", "adam"), ("proximal", "nesterov"), ("warm", "adamw")],
)
def test_lanes_give_each_seeds_own_run_and_scores(link, recipe):
    make = two_stages(LINKS[link], RECIPES[recipe])
    alone = msif.over_seeds(make, 3, progress=False)
    runs = msif.over_seeds(make, 3, lanes=3, progress=False)
    for ours, theirs in zip(runs, alone, strict=True):
        for mine, other in zip(ours.trained(), theirs.trained(), strict=True):
            assert torch.allclose(mine, other, rtol=1e-12, atol=1e-13)
        assert ours.reports[1].recipe == str(ours.stages[1].recipe)
    queries = msif.load_digits(dtype=torch.float64)[1].select(range(7, 10), n=4)
    for stage, asked in ((0, {}), (1, {"aggregate": "mean"}), (2, {"target": "margin"})):
        method = msif.UnrolledInfluence(segments=3)
        together = msif.AveragedInfluence(method, lanes=2).fit(runs)
        each = msif.AveragedInfluence(method).fit(runs)
        ours, theirs = (a.score(queries, stage, progress=False, **asked) for a in (together, each))
        size = theirs.per_seed.abs().max()
        assert torch.allclose(ours.per_seed, theirs.per_seed, rtol=1e-9, atol=1e-12 * size)
        assert ours.origin == theirs.origin
        if stage != 1:  # frozen, nothing that the second stage trains is taken over
            # A control: each seed's scores are its own.
            assert not torch.allclose(ours.per_seed[0], theirs.per_seed[1], rtol=1e-2)


class Recurrent(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.body(x.reshape(-1, 8, 8))[0][:, -1])


class Masked(nn.Module):
    """A transformer that does not see the pixel rows without ink."""

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        rows = x.reshape(-1, 8, 8)
        seen = self.body(rows, src_key_padding_mask=rows.abs().sum(-1) < 0.2)
        return self.head(seen.mean(1))


class Normed(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        return self.head(self.body(x).tanh().flatten(1))


@pytest.mark.parametrize("net", [Recurrent, Masked, Normed])
def test_lanes_of_other_nets_in_float32(net):
    """Side by side where `vmap` can, else one by one, and the same numbers either way."""
    train, test = msif.load_digits(dtype=torch.float32)
    data = train.select(range(3), n=45), train.select(range(3, 6), n=30)

    def build(seed):
        stages = []
        for k, examples in enumerate(data):
            recipe = msif.SGD(0.05, epochs=2, batch_size=15, seed=2 * seed + k)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(2 * seed + k)
                model = net(3).eval()
            link = msif.WarmStart() if k else None
            stages.append(msif.Stage(f"s{k}", model, examples, recipe=recipe, link=link))
        return msif.Pipeline(stages)

    alone, runs = (msif.over_seeds(build, 2, lanes=lanes, progress=False) for lanes in (1, 2))
    for ours, theirs in zip(runs, alone, strict=True):
        assert torch.allclose(ours.trained()[-1], theirs.trained()[-1], atol=1e-5)
    queries = test.select(range(3, 6), n=3)
    each, together = (
        msif.AveragedInfluence(msif.UnrolledInfluence(), lanes=lanes)
        .fit(runs)
        .score(queries, progress=False)
        .per_seed
        for lanes in (1, 2)
    )
    assert torch.allclose(each, together, rtol=1e-3, atol=1e-4 * float(each.abs().max()))
    assert not torch.allclose(each[0], together[1], rtol=1e-1)


def test_lanes_share_a_budget(runs, queries, scores):
    """With little memory the queries are swept in parts and states are recomputed."""
    method = msif.UnrolledInfluence(memory="3MB")
    averaged = msif.AveragedInfluence(method, lanes=5).fit(runs)
    assert torch.allclose(averaged.score(queries, progress=False).values, scores.values, rtol=1e-9)


def test_what_cannot_go_side_by_side_goes_one_by_one(runs, queries):
    from msif_lab.influence.together import suits
    from msif_lab.pipeline.seeds import one_function

    unlike = [runs[0], build(7).fit(progress=False)]
    unlike[1].stages[0].weight_decay = 0.5
    unlike[1].fit(progress=False)
    assert suits(msif.UnrolledInfluence(), runs.pipelines)
    assert one_function(runs.pipelines) is not None and one_function(unlike) is None
    assert not suits(msif.UnrolledInfluence(leave_one_out=True), runs.pipelines)
    assert not suits(msif.GradientDot(), runs.pipelines)
    for method in (msif.UnrolledInfluence(group_fraction=0.5), msif.GradientDot()):
        pair = [
            msif.AveragedInfluence(method, lanes=lanes).fit(runs[:2]).score(queries).per_seed
            for lanes in (1, 2)
        ]
        assert torch.equal(*pair)


# ---- Effects, and both together ----


def test_effects_are_the_mean_of_each_runs(tmp_path, runs, queries, effects):
    each = [
        msif.removal_effects(run, queries, list(range(12)), progress=False).values for run in runs
    ]
    assert torch.equal(effects.per_seed, torch.stack(each))
    assert torch.allclose(effects.values, torch.stack(each).mean(0))
    effects.save(tmp_path / "effects")
    loaded = msif.EffectsOverSeeds.load(tmp_path / "effects")
    assert torch.equal(loaded.per_seed, effects.per_seed) and loaded.subsets == effects.subsets
    assert loaded.origin == effects.origin and loaded.seeds == effects.seeds


def test_effects_of_runs_resume_from_a_folder(tmp_path, runs, queries, effects, monkeypatch):
    asked = {"store": tmp_path / "removals", "progress": False}
    msif.removal_effects(runs[:2], queries, list(range(12)), **asked)
    retrain, count = msif.Pipeline.retrain, []
    monkeypatch.setattr(
        msif.Pipeline, "retrain", lambda *a, **k: count.append(1) or retrain(*a, **k)
    )
    again = msif.removal_effects(runs[:3], queries, list(range(12)), **asked)
    assert len(count) == 1  # of the third run
    assert torch.equal(again.per_seed, effects.per_seed[:3])


def test_agreement_knows_which_runs_are_fresh(runs, queries, scores, effects):
    some = msif.AveragedInfluence(msif.UnrolledInfluence()).fit(runs[:2])
    some = some.score(queries, progress=False)
    rest = msif.removal_effects(runs[2:], queries, list(range(12)), progress=False)
    fresh = msif.agreement(some, rest)
    assert fresh.noise is not None and "score efficiency" in str(fresh)
    assert msif.agreement(scores, effects).noise is None
    one = msif.UnrolledInfluence().fit(runs[0]).score(queries, progress=False)
    assert msif.agreement(one, effects).noise is None  # its run is among them
    assert msif.agreement(one, rest).noise is not None
    assert msif.agreement(scores, effects).mean("r") > 0.98  # the same noise on both sides


def noisy(seeds: int, rho: float, draw, truth):
    """Effects over made-up seeds, each with reliability rho."""
    size = math.sqrt((1 - rho) / rho)
    noise = size * torch.randn(seeds, *truth.shape, generator=draw, dtype=torch.float64)
    subsets = [[i] for i in range(truth.shape[1])]
    base = torch.zeros(len(truth), dtype=torch.float64)
    runs = [
        msif.Effects.from_values(base, each, subsets, stage="pretrain") for each in truth + noise
    ]
    return msif.EffectsOverSeeds.of(runs, range(seeds))


def made_up(per_seed) -> msif.InfluenceOverSeeds:
    ids = torch.arange(per_seed.shape[2]), torch.arange(per_seed.shape[1])
    about = "pretrain", "loss", "made up", ""
    return msif.InfluenceOverSeeds.of(
        per_seed, range(len(per_seed)), "mean", *ids, *about, origin={}
    )


def test_noise_is_taken_out_of_r():
    """Against the truth without noise, which only a made-up case knows."""
    draw = torch.Generator().manual_seed(3)
    truth = torch.randn(20, 400, generator=draw, dtype=torch.float64)
    effects, own = (noisy(n, 0.3, draw, truth) for n in (8, 4))
    exact = made_up(-own.per_seed)  # as good as retraining under its own seeds
    report = msif.agreement(exact, effects, retrained=own)
    assert report.noise.measured and report.noise.efficiency == pytest.approx(1.0, abs=1e-9)
    estimated = msif.agreement(exact, effects).noise
    assert estimated.reliability == pytest.approx(0.3, abs=0.02)
    assert estimated.ceiling == pytest.approx(report.noise.ceiling, abs=0.03)
    means = zip(own.values, truth, strict=True)
    clean = numpy.mean([numpy.corrcoef(a, b)[0, 1] for a, b in means])
    low, high = report.noise.intervals["corrected"]
    assert low < clean < high and report.mean("r") < low
    # A control: scores with as much noise again lose efficiency.
    noise = torch.randn(4, 20, 400, generator=draw, dtype=torch.float64)
    worse = msif.agreement(made_up(-own.per_seed + 3 * noise), effects, retrained=own).noise
    assert worse.intervals["efficiency"][1] < 0.9


def test_without_reliability_nothing_is_promised():
    draw = torch.Generator().manual_seed(4)
    truth = torch.randn(6, 20, generator=draw, dtype=torch.float64)
    effects = noisy(4, 1e-3, draw, truth)
    found = msif.agreement(made_up(-truth[None].expand(2, -1, -1)), effects).noise
    assert all(math.isnan(end) for ends in found.intervals.values() for end in ends)


def test_a_weighted_mean_listens_to_the_runs_that_predict_their_removals():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 2, 50, generator=draw, dtype=torch.float64)
    trust = [0.9, 0.3, -0.5, 0.6]
    w = numpy.array([0.81, 0.09, 0.0, 0.36]) / 1.26  # r², and nothing where r < 0
    middle, error = averages(rows, "weighted", trust)
    numpy.testing.assert_allclose(middle, numpy.average(rows, 0, w), rtol=1e-12)
    apart = ((w[:, None, None] * (rows - middle).numpy()) ** 2).sum(0) / (1 - (w**2).sum())
    numpy.testing.assert_allclose(error, apart**0.5, rtol=1e-12)
    # Runs that are trusted alike make the plain mean.
    for alike in ([0.7] * 4, [-0.2] * 4):
        for found, plain in zip(
            averages(rows, "weighted", alike), averages(rows, "mean"), strict=True
        ):
            torch.testing.assert_close(found, plain)
    assert averages(rows, "weighted", [1.0, 0, 0, -1])[1].isnan().all(), "of one run alone"


def test_intervals_of_a_weighted_mean_keep_their_promise():
    draw = torch.Generator().manual_seed(1)
    truth = torch.randn(200, 100, generator=draw, dtype=torch.float64)
    trust = torch.tensor([0.9, 0.9, 0.8, 0.8, 0.7, 0.5, 0.3, 0.1])
    noise = torch.randn(8, 200, 100, generator=draw, dtype=torch.float64)
    per_seed = truth + noise / trust[:, None, None]  # rough runs' scores are the noisier ones
    about = torch.arange(100), torch.arange(200), "one", "loss", "", ""
    scores, mean = (
        msif.InfluenceOverSeeds.of(per_seed, range(8), how, *about, origin={}, run_trust=r)
        for how, r in (("weighted", trust.tolist()), ("mean", ()))
    )
    low, high = scores.interval()
    assert 0.93 < float(((low <= truth) & (truth <= high)).double().mean()) < 0.98
    assert (scores.values - truth).square().mean() < 0.5 * (mean.values - truth).square().mean()
    sure = scores.trusted()
    assert bool(sure.any())
    assert float((scores.values.sign() != truth.sign())[sure].double().mean()) < 0.05


def test_weighted_scores_take_each_run_s_own_trust(runs, queries, tmp_path):
    found = msif.AveragedInfluence(msif.UnrolledInfluence(), "weighted", lanes=2).fit(runs)
    scores = found.score(queries, progress=False)
    each = [
        msif.UnrolledInfluence(trust=4).fit(run).score(queries, progress=False).trust_.r
        for run in runs
    ]
    assert scores.run_trust == pytest.approx(each)
    w = numpy.clip(each, 0, None) ** 2
    numpy.testing.assert_allclose(
        scores.values, numpy.average(scores.per_seed, 0, w), rtol=1e-6, atol=1e-12
    )
    assert found.method.trust == 4 and "weighted" in repr(scores)
    scores.save(tmp_path / "scores.safetensors")
    again = msif.InfluenceOverSeeds.load(tmp_path / "scores.safetensors")
    assert again.run_trust == scores.run_trust and torch.equal(again.values, scores.values)
    for part in (scores[:2], scores.mean(), again):
        assert part.run_trust == scores.run_trust
    some = scores.some([1, 2])
    assert some.run_trust == scores.run_trust[1:3]
    halves = msif.InfluenceOverSeeds.concatenate([scores[:2], scores[2:]])
    assert torch.equal(halves.values, scores.values)
    assert msif.predicted_gain(scores, 0.1).notna().all().all()
    for method in (msif.UnrolledInfluence(trust=0), msif.TracIn()):
        with pytest.raises(ValueError, match="measures none"):
            msif.AveragedInfluence(method, "weighted")


class Bag(nn.Module):
    """Mean of the embeddings of a text's words."""

    def __init__(self, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(12, 5)
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(self.embedding(x).mean(-2).tanh())


@pytest.mark.parametrize("link", [msif.WarmStart(), msif.Frozen()])
def test_small_nets_go_back_side_by_side(link, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(12, (10, 4), generator=draw)
    pre = msif.Examples(texts, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    fine, queries = msif.Examples(texts.flip(0), [0, 1] * 5), msif.Examples(texts[:4], [0, 1, 0, 1])

    def build(seed):
        torch.manual_seed(seed)
        recipe = msif.SGD(0.3, epochs=2, batch_size=4, seed=seed)
        stages = [
            msif.Stage("pre", Bag(3).double(), pre, recipe=recipe),
            msif.Stage("fine", Bag(2).double(), fine, link=link, recipe=recipe),
        ]
        return msif.Pipeline(stages)

    runs = msif.over_seeds(build, 3, progress=False)
    method = msif.UnrolledInfluence(trust=0)
    alone = msif.AveragedInfluence(method).fit(runs).score(queries, progress=False)
    ways, real = [], derivatives._lanes_way
    monkeypatch.setattr(
        derivatives, "_lanes_way", lambda *args: ways.append(real(*args)) or ways[-1]
    )
    together = msif.AveragedInfluence(method, lanes=3).fit(runs).score(queries, progress=False)
    torch.testing.assert_close(together.per_seed, alone.per_seed, rtol=1e-10, atol=1e-14)
    assert set(ways) == {derivatives._lanes_in_reverse}, "not one after the other"


@pytest.mark.parametrize("link", [msif.WarmStart(), msif.Frozen()])
def test_runs_whose_effects_cannot_vary_count_alike(link):
    """One example has no r over examples: the weighted mean is then the plain one."""
    train, test = msif.load_digits(dtype=torch.float64)

    def build(seed):
        recipe = msif.SGD(0.1, epochs=2, batch_size=4, seed=seed)
        stages = [
            msif.Stage(
                name,
                msif.mlp(64, (4,), classes=10, seed=seed).double(),
                data,
                link=to,
                recipe=recipe,
            )
            for name, data, to in (("pre", train[:1], None), ("fine", train[1:9], link))
        ]
        return msif.Pipeline(stages)

    runs = msif.over_seeds(build, 2, progress=False)
    found = [
        msif.AveragedInfluence(msif.UnrolledInfluence(), how).fit(runs).score(test[:3])
        for how in ("mean", "weighted")
    ]
    assert found[1].run_trust == [1.0, 1.0]
    torch.testing.assert_close(found[1].values, found[0].values)
    torch.testing.assert_close(found[1].standard_error, found[0].standard_error)

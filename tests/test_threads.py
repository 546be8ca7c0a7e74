"""Several threads use one pipeline at once: the numbers of a single one, and modules as before."""

import copy
import os
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import pytest
import torch
from oracles import F64
from torch import nn

import msif_lab as msif
from msif_lab import solvers
from msif_lab.objective.exclusive import MODULES

WORKERS = 4


class Conv(nn.Module):
    """A conv net; with ``bare`` it has weights of its own, which no layer route follows."""

    def __init__(self, classes, seed, bare=False):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(27, classes)
        self.scale = nn.Parameter(torch.ones(27)) if bare else None
        self.double()

    def forward(self, x):
        features = self.embedding(x)
        return self.head(features if self.scale is None else self.scale * features)


def pipeline(bare):
    train, _ = msif.load_digits(dtype=F64)
    stages = []
    for k, (classes, n) in enumerate(((range(4), 60), (range(4, 10), 40))):
        recipe = msif.SGD(0.05, epochs=3, batch_size=20, seed=k)
        net, data = Conv(len(classes), k, bare), train.select(classes=classes, n=n, seed=2)
        link = msif.Proximal(0.1) if k else None
        stages.append(msif.Stage("pf"[k], net, data, weight_decay=0.01, link=link, recipe=recipe))
    return msif.Pipeline(stages).fit(progress=False)


@pytest.fixture(scope="module", params=[False, True], ids=["layers", "bare"])
def fitted(request):
    queries = msif.load_digits(dtype=F64)[1].select(classes=range(4, 10), n=6, seed=3)
    return pipeline(request.param), queries


def implicit(solver, **settings):
    def score(p, q):
        return msif.ImplicitInfluence(solver, damping=0.01, **settings).fit(p).score(q).values

    return score


def removals(p, q):
    groups = [[0], [1], [2, 3], [4]]
    return msif.removal_effects(p, q, groups, lanes=2, progress=False).values


# What users call, each a function of pipeline and queries alone.
CALLS = {
    "evaluate": lambda p, q: p.evaluate(q),
    "retrain": lambda p, q: p.retrain({0: torch.rand(3, 60)[:2] * 0 + 0.5}).evaluate(q),
    "removals": removals,
    "conjugate gradient": implicit(solvers.ConjugateGradient(), curvature="ggn"),
    "low rank": implicit(solvers.LowRank(), curvature="ggn"),
    "exact": implicit(solvers.Exact(), curvature="ggn", leave_one_out=True),
    "unrolled": lambda p, q: msif.UnrolledInfluence().fit(p, False).score(q, progress=False).values,
    "segmented": lambda p, q: msif.SegmentedInfluence(3).fit(p, False).score(q).values,
    "representations": lambda p, q: msif.RepresentationSimilarity().fit(p).score(q).values,
    "gradients": lambda p, q: msif.GradientDot().fit(p).score(q).values,
    "built anew": lambda p, q: msif.Pipeline(p.stages).adopt().evaluate(q),
    "state": lambda p, q: torch.cat(p.trained()),
}


def same(left, right):
    return left.shape == right.shape and bool(
        ((left - right).norm() <= 1e-10 * right.norm()).item()
    )


def snapshot(p):
    """Names, numbers and hooks of all modules."""
    state = []
    for stage in p.stages:
        state.append({n: t.detach().clone() for n, t in stage.model.state_dict().items()})
        for module in stage.model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            kinds = {type(t) for t in module._parameters.values()}
            assert kinds <= {nn.Parameter, type(None)}
    return state


def unchanged(p, before):
    for old, now in zip(before, snapshot(p), strict=True):
        assert old.keys() == now.keys()
        assert all(torch.equal(old[name], now[name]) for name in old)


def trials(p, q, count, seed):
    """The mixed calls of some trials that gave other numbers than alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = {name: call(p, q) for name, call in CALLS.items()}
        before = snapshot(p)
        draw = random.Random(seed)
        with ThreadPoolExecutor(WORKERS) as pool:
            wrong = []
            for trial in range(count):
                names = draw.choices(list(CALLS), k=2 * WORKERS)
                futures = [(n, pool.submit(CALLS[n], p, q)) for n in names]
                wrong += [(trial, n) for n, f in futures if not same(f.result(), truth[n])]
                unchanged(p, before)
    return wrong


def test_mixed_calls_from_threads_give_the_numbers_of_one(fitted):
    assert trials(*fitted, count=4, seed=0) == []


def test_joblibs_threads_give_the_numbers_of_one(fitted):
    p, q = fitted
    groups = [[i] for i in range(16)]
    alone = msif.removal_effects(p, q, groups, lanes=4, progress=False).values
    scores = msif.SegmentedInfluence(3).fit(p, False).score(q, progress=False).values
    before = snapshot(p)
    with joblib.parallel_config(backend="threading"):
        many = msif.removal_effects(p, q, groups, lanes=4, n_jobs=4, progress=False).values
        method = msif.SegmentedInfluence(3, krylov=20, n_jobs=4).fit(p, False)
        shared = method.score(q, progress=False).values
    assert same(many, alone)
    one = msif.SegmentedInfluence(3, krylov=20).fit(p, False).score(q, progress=False).values
    assert float((shared - one).norm() / one.norm()) < 1e-3
    assert same(msif.SegmentedInfluence(3).fit(p, False).score(q, progress=False).values, scores)
    unchanged(p, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_that_is_forked_while_a_thread_is_inside_goes_on():
    def fork():
        child = os.fork()
        if child == 0:
            with MODULES:
                os._exit(7)
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with MODULES:  # held by this thread, forked by another
            thread = threading.Thread(target=fork, daemon=True)
            thread.start()
            thread.join(30)
        fork()
    assert found == [7, 7]


def test_pipelines_that_share_a_module_may_be_used_at_once(fitted):
    """Another pipeline around the same modules, and a copy of them, in other threads."""
    p, q = fitted
    other = msif.Pipeline(p.stages[:1]).adopt()
    apart = msif.Pipeline([copy.deepcopy(stage) for stage in p.stages]).adopt()
    mine = p.stages[0].data[:5]
    calls = [
        lambda: p.evaluate(q),
        lambda: other.evaluate(mine),
        lambda: apart.evaluate(q),
        lambda: msif.GradientDot().fit(other).score(mine).values,
    ] * 10
    truth = [call() for call in calls]
    before = snapshot(p)
    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(lambda call: call(), calls))
    assert all(same(a, b) for a, b in zip(found, truth, strict=True))
    unchanged(p, before)

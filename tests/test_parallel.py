"""Removals on processes and clusters, and stores that several calls and processes share."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import torch
from oracles import F64
from test_persistence import quick, remove

import msif_lab as msif
from msif_lab import storage
from msif_lab.evaluation import removals
from msif_lab.parallel import each_result
from msif_lab.storage import read_tensors

HERE = Path(__file__).parent


def die_once(flag, value):
    """Kills its own process the first time."""
    if flag and not os.path.exists(flag):
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value**2


def die(value):
    os.kill(os.getpid(), signal.SIGKILL)


def wrong(value):
    raise ZeroDivisionError(value)


posix = pytest.mark.skipif(os.name != "posix", reason="kills processes by signals")


@posix
def test_the_work_of_a_worker_that_died_is_done_once_more(tmp_path):
    calls = [(str(tmp_path / "flag") if i == 3 else "", i) for i in range(8)]
    assert list(each_result(die_once, calls, 2)) == [(i, i**2) for i in range(8)]
    assert (tmp_path / "flag").exists()
    with pytest.raises(msif.WorkerError, match=r"died twice.*3 of 8"):
        list(each_result(die, [(1,)] * 4, 2, lambda: "3 of 8 are done"))
    with pytest.raises(ZeroDivisionError):  # an error of the work itself is nobody's death
        list(each_result(wrong, [(1,)], 2))


def dying(pipeline, *rest):
    die(0)


@posix
def test_a_removal_study_whose_workers_die_says_what_is_kept(tmp_path, monkeypatch):
    pipeline = quick().fit(progress=False)
    remove(pipeline, range(2), store=tmp_path / "store")
    monkeypatch.setattr(removals, "_retrain_without", dying)
    with pytest.raises(msif.WorkerError, match=r"2 of 6 removals are done and kept in store="):
        remove(pipeline, range(6), store=tmp_path / "store", n_jobs=2)


@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading", "sequential"])
def test_every_backend_gives_the_same_numbers(backend, tmp_path):
    pipeline = quick().fit(progress=False)
    alone = remove(pipeline).values
    with joblib.parallel_config(backend=backend):
        many = remove(pipeline, n_jobs=2, store=tmp_path / "store").values
    assert torch.equal(many, alone)
    assert len(read_tensors(tmp_path / "store", "removals")[0]["groups"]) == 6


def test_ray_gives_the_same_numbers():
    ray = pytest.importorskip("ray")
    register = pytest.importorskip("ray.util.joblib").register_ray
    register()
    ray.init(num_cpus=2, include_dashboard=False)
    pipeline = quick().fit(progress=False)
    with joblib.parallel_config(backend="ray"):
        many = remove(pipeline, n_jobs=2).values
    ray.shutdown()
    assert torch.equal(many, remove(pipeline).values)


@posix
@pytest.mark.slow
def test_dask_recovers_from_a_worker_that_is_killed():
    distributed = pytest.importorskip("distributed")
    pipeline = quick(msif.SGD(0.1, epochs=60)).fit(progress=False)
    alone = remove(pipeline, range(20)).values
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster, distributed.Client(cluster) as client:
        pids = client.run(os.getpid)
        done = []

        def kill_one(*given):
            done.append(1)
            if len(done) == 2:
                os.kill(next(iter(pids.values())), signal.SIGKILL)
            return add(*given)

        add = removals.RemovalStore.add
        with pytest.MonkeyPatch.context() as patch, joblib.parallel_config(backend="dask"):
            patch.setattr(removals.RemovalStore, "add", kill_one)
            many = remove(pipeline, range(20), n_jobs=2).values
    assert torch.equal(many, alone)
    assert len(done) == 10


# ---- Shared stores ----

PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_persistence import quick, remove
import msif_lab as msif
pipeline = quick(msif.SGD(0.1, epochs=int(sys.argv[5]))).fit(progress=False)
groups = range(*map(int, sys.argv[3].split(":")))
print("ready", flush=True)
remove(pipeline, groups, store=sys.argv[2], lanes=int(sys.argv[4]))
"""


def start(store, groups, lanes=1, epochs=4):
    """Another process that removes these groups into a store."""
    command = [sys.executable, "-c", PROCESS, HERE, store, groups, lanes, epochs]
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, text=True)


def debris(folder):
    return [p.name for p in folder.iterdir() if p.name not in ("store", ".store.lock")]


def test_calls_with_other_subsets_add_to_a_store(tmp_path, monkeypatch):
    pipeline = quick().fit(progress=False)
    whole = remove(pipeline, range(8)).values
    remove(pipeline, range(4), store=tmp_path / "store")
    both = remove(pipeline, range(8), store=tmp_path / "store").values
    assert torch.equal(both, whole)
    monkeypatch.setattr(removals, "_retrain_without", None)  # nothing is left to do
    some = remove(pipeline, [6, 1, 6], store=tmp_path / "store")
    assert torch.equal(some.values, whole[:, [6, 1, 6]])
    pair = remove(pipeline, [[3], torch.tensor([2])], store=tmp_path / "store")
    assert torch.equal(pair.values, whole[:, [3, 2]])


def test_two_processes_share_a_store(tmp_path):
    store = tmp_path / "store"
    processes = [start(store, groups) for groups in ("0:14", "8:20")]
    assert [p.wait(300) for p in processes] == [0, 0]
    assert len(read_tensors(store, "removals")[0]["groups"]) == 20
    pipeline = quick(msif.SGD(0.1, epochs=4)).fit(progress=False)
    shared = remove(pipeline, range(20), store=store).values
    assert torch.equal(shared, remove(pipeline, range(20), lanes=1).values)
    assert debris(tmp_path) == []


def killed_at_random(folder, rounds, writers, seed):
    """Kill writers of one store at random moments; what was finished before and after each."""
    draw = torch.Generator().manual_seed(seed)
    store, kept = folder / "store", 0
    for _ in range(rounds):
        groups = ("0:24", "12:24")[:writers]
        processes = [start(store, g, epochs=4) for g in groups]
        for process in processes:
            process.stdout.readline()
        time.sleep(float(torch.rand((), generator=draw)) * 0.4)
        for process in processes:
            process.kill()
            process.wait()
        now = len(read_tensors(store, "removals")[0]["groups"]) if store.exists() else 0
        assert now >= kept, "finished removals were lost"
        kept = now
    return kept


@posix
@pytest.mark.parametrize("writers", [1, 2])
def test_nothing_is_lost_when_writers_are_killed(tmp_path, writers):
    killed_at_random(tmp_path, 3, writers, seed=writers)
    prefix = storage._temporary_prefix(tmp_path / "store", "elsewhere", "1")
    (tmp_path / f"{prefix}x").write_bytes(b"half of it")  # of a writer that was killed just now
    pipeline = quick(msif.SGD(0.1, epochs=4)).fit(progress=False)
    shared = remove(pipeline, range(24), store=tmp_path / "store", lanes=1).values
    assert torch.equal(shared, remove(pipeline, range(24), lanes=1).values)
    assert debris(tmp_path) == []


def test_large_groups_fit_into_a_store_and_into_saved_effects(tmp_path):
    """520 groups of 30,000 positions; as text they made a header that nobody could read."""
    groups = [list(range(i, 30_000 + i)) for i in range(520)]
    values = torch.zeros(2, 520, dtype=F64)
    effects = msif.Effects.from_values(torch.zeros(2), values, groups, stage="pre")
    effects.save(tmp_path / "effects")
    assert msif.Effects.load(tmp_path / "effects").subsets == groups


def test_scores_of_some_queries_each_are_put_together():
    pipeline = quick().fit(progress=False)
    queries = pipeline.stages[-1].data[:6]
    fitted = msif.GradientDot().fit(pipeline)
    whole, parts = fitted.score(queries), [fitted.score(queries[i : i + 2]) for i in (0, 2, 4)]
    together = msif.Influence.concatenate(parts)
    assert torch.allclose(together.values, whole.values, rtol=1e-5)
    assert torch.equal(together.query_ids, whole.query_ids)
    assert together.origin == whole.origin
    for other, words in (
        (fitted.score(queries, target="margin"), "target"),
        (msif.Loss().fit(pipeline).score(queries), "method"),
        (whole.mean(), "aggregate"),
        (fitted.score(queries, stage=1), "stage"),
    ):
        with pytest.raises(ValueError, match=rf"parts\[1\] does not continue.*{words}"):
            msif.Influence.concatenate([whole, other])
    with pytest.raises(ValueError, match="one or more"):
        msif.Influence.concatenate([])
    by_hand = msif.Influence(whole.values, whole.ids, whole.query_ids, *("pretrain", "loss"))
    for mixed in ([by_hand, by_hand], [by_hand, replace(by_hand, origin=whole.origin)]):
        both = msif.Influence.concatenate(mixed)
        assert both.values.shape[0] == 12 and both.origin == {}


def test_what_is_finite_is_kept_when_a_retraining_gives_nan(tmp_path, monkeypatch):
    pipeline = quick().fit(progress=False)
    retrain = removals._retrain_without

    def third_is_nan(*given):
        after, norms, short = retrain(*given)
        for column, group in enumerate(given[2]):
            if group == [3]:
                after[0, column] = torch.nan
        return after, norms, short

    monkeypatch.setattr(removals, "_retrain_without", third_is_nan)
    with pytest.raises(ValueError, match=r"groups \[3\] of subsets gives NaN.*3 of 6 .* kept"):
        remove(pipeline, range(6), store=tmp_path / "store")
    monkeypatch.undo()
    kept = remove(pipeline, range(6), store=tmp_path / "store").values
    assert torch.allclose(kept, remove(pipeline, range(6)).values, atol=1e-6)

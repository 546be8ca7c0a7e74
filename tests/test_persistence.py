"""What is saved comes back bit for bit, is whole or absent, and never needs pickle."""

import ast
import json
import os
import stat
from pathlib import Path

import numpy
import pytest
import torch
from conftest import random_pipeline

import msif_lab as msif
from msif_lab.storage import describe, read_tensors, write_bytes

PACKAGE = Path(msif.__file__).parent


def quick(recipe=None):
    """An untrained proximal pipeline that a short run trains."""
    pipeline = random_pipeline(link=msif.Proximal(0.3), fit=False)
    for stage in pipeline.stages:
        stage.recipe = recipe or msif.SGD(0.1, epochs=2, schedule="cosine")
    return pipeline


def same(left, right):
    """Equal shape, dtype and every bit."""
    return left.dtype == right.dtype and torch.equal(left, right)


def some_influence(dtype=torch.float64):
    values = torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return msif.Influence(
        values, torch.tensor([7, 1, 5, 9]), torch.tensor([2, 0, 4]), "pretrain", "margin", "by hand"
    )


def some_effects():
    values = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norm = torch.tensor([1e-9, 2e-9])
    return msif.Effects(
        values,
        [[3], [5, 9]],
        values[:, 0] * 2,
        torch.tensor([2, 0, 4]),
        norm,
        "pretrain",
        "loss",
        "warm-start",
    )


# --- round trips
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [msif.SGD(0.1, epochs=2, schedule="cosine"), msif.LBFGS(max_iter=5, polish_up_to=0)],
    ids=["SGD", "LBFGS"],
)
def test_a_loaded_pipeline_is_the_saved_one_bit_for_bit(tmp_path, recipe):
    saved = quick(recipe).fit(progress=False)
    saved.save(tmp_path / "p")
    loaded = quick(recipe)
    assert loaded.load(tmp_path / "p") is loaded
    for left, right in zip(saved.stages, loaded.stages, strict=True):
        states = left.model.state_dict(), right.model.state_dict()
        assert states[0].keys() == states[1].keys() and all(
            same(states[0][n], states[1][n]) for n in states[0]
        )
    for left, right in zip(saved.reports, loaded.reports, strict=True):
        assert (left.recipe, left.iterations) == (right.recipe, right.iterations)
        assert all(
            same(getattr(left, n), getattr(right, n))
            for n in ("value", "gradient_norm", "converged")
        )
    weights = torch.ones(2, 24)
    weights[0, 3] = 0
    for warm in (False, True):  # from the initial and from the trained weights
        again = [p.retrain(weights, warm_start=warm, progress=False) for p in (saved, loaded)]
        assert all(map(same, again[0].parameters, again[1].parameters))


def test_a_loaded_pipeline_starts_from_the_saved_initial_weights(tmp_path):
    """The models at hand may start elsewhere; a same-seed rerun must not."""
    saved = quick().fit(progress=False)
    saved.save(tmp_path / "p")
    loaded = random_pipeline(link=msif.Proximal(0.3), fit=False)
    for stage in loaded.stages:
        stage.recipe = saved.stages[0].recipe
        torch.nn.init.ones_(stage.model.head.bias)
    loaded = msif.Pipeline(loaded.stages).load(tmp_path / "p")
    assert all(map(same, saved.trained(), loaded.fit(progress=False).trained()))


def test_an_adopted_pipeline_comes_back_as_adopted(tmp_path):
    quick().fit(progress=False).adopt().save(tmp_path / "p")
    loaded = quick().load(tmp_path / "p")
    assert loaded.reports is None
    with pytest.raises(ValueError, match="adopted"):
        loaded.retrain(torch.ones(24))


def test_a_pipeline_with_a_schedule_function_can_be_loaded_again(tmp_path):
    """The function prints with its address, which differs in every process."""

    def to_zero():
        return lambda step, steps: 1 - step / steps

    saved, loaded = (quick(msif.SGD(0.1, epochs=2, schedule=to_zero())) for _ in range(2))
    saved.fit(progress=False).save(tmp_path / "p")
    assert loaded.load(tmp_path / "p").reports is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("view", ["whole", "some queries", "mean"])
def test_influence_comes_back_bit_for_bit(tmp_path, dtype, view):
    saved = some_influence(dtype)
    saved = {"whole": saved, "some queries": saved[[2, 0]], "mean": saved.mean()}[view]
    saved.save(str(tmp_path / "i"))
    loaded = msif.Influence.load(str(tmp_path / "i"))
    assert all(same(getattr(saved, n), getattr(loaded, n)) for n in ("values", "ids", "query_ids"))
    assert (loaded.stage, loaded.target, loaded.method) == ("pretrain", "margin", "by hand")


def test_influence_of_a_stage_on_its_own_data_can_be_saved(tmp_path):
    ids = torch.arange(3)
    msif.Influence(torch.eye(3), ids, ids).save(tmp_path / "i")
    assert same(msif.Influence.load(tmp_path / "i").query_ids, ids)


def test_effects_come_back_bit_for_bit(tmp_path):
    saved = some_effects()
    saved.save(tmp_path / "e")
    loaded = msif.Effects.load(tmp_path / "e")
    assert all(
        same(getattr(saved, n), getattr(loaded, n))
        for n in ("values", "base", "query_ids", "gradient_norm")
    )
    assert (loaded.subsets, loaded.stage, loaded.target, loaded.protocol) == (
        [[3], [5, 9]],
        "pretrain",
        "loss",
        "warm-start",
    )


# --- the files
# --------------------------------------------------------------------------------------


SAVERS = {
    "pipeline": lambda path: quick().fit(progress=False).save(path),
    "influence": lambda path: some_influence().save(path),
    "effects": lambda path: some_effects().save(path),
    "store": lambda path: remove(quick().fit(progress=False), store=path),
}


def remove(pipeline, subsets=range(6), **settings):
    queries = pipeline.stages[-1].data[:3]
    return msif.removal_effects(
        pipeline, queries, list(subsets), **{"lanes": 2, "progress": False} | settings
    )


def pickled(source):
    """Calls and imports through which a pickle could be written or read."""
    found, tree = [], ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    safe = [
        c
        for c in calls
        if any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in c.keywords)
    ]
    harmless = {id(node) for call in safe for node in ast.walk(call)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [
                n
                for n in names
                if n.split(".")[0] in ("pickle", "cloudpickle", "dill", "shelve", "marshal")
            ]
        names = "load", "save", "dump", "loads", "dumps", "read_pickle", "to_pickle"
        if isinstance(node, ast.Attribute) and node.attr in names and id(node) not in harmless:
            owner = ast.unparse(node.value)
            found += (
                [f"{owner}.{node.attr}"]
                if owner in ("torch", "numpy", "np", "joblib", "pandas", "pickle")
                else []
            )
    return found


def test_no_pickle_in_the_package():
    """But for CIFAR-10's own Python batches, whose MD5 is checked first; tests/test_datasets.py
    tries to trick it.
    """
    assert (
        pickled("import pickle")
        and pickled("import torch\ntorch.load(p)")
        and pickled("import numpy as np\nnp.load(p)")
        and pickled("from joblib import dump\njoblib.dump(x)")
    )
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    assert "storage.py" in files and "widgets/frame.py" in files, "every folder is looked at"
    found = {name: pickled(path.read_text("utf-8")) for name, path in files.items()}
    assert {name: calls for name, calls in found.items() if calls} == {
        "data/formats.py": ["pickle"]
    }


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_files_are_safetensors_whose_header_is_readable_json(tmp_path, save):
    save(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert set(header["__metadata__"]) == {"msif_lab", "sha256"}
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert max(ends) == len(content) - 8 - size  # nothing but the tensors follows


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize(
    "failure", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"]
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, save, step, failure
):
    if save is not SAVERS["store"]:  # a store is opened, so the old one has to be right
        (tmp_path / "file").write_bytes(b"old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)):
        save(tmp_path / "file")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} in ({"file": b"old"}, {})
    save(tmp_path / "again")
    assert (tmp_path / "again").stat().st_size > 100


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_permissions_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file", b"content")
        assert os.umask(umask) == umask, "the umask of the process must stay"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


# --- resuming
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def trained(request):
    return quick().to(request.param).fit(progress=False)


def interrupt_after(monkeypatch, calls, error=KeyboardInterrupt):
    """Let ``calls`` retrainings through, then raise; returns the list of their numbers of lanes."""
    retrain, done = msif.Pipeline.retrain, []

    def counted(self, weights, **settings):
        if len(done) >= calls:
            raise error
        done.append(len(next(iter(weights.values()))))
        return retrain(self, weights, **settings)

    monkeypatch.setattr(msif.Pipeline, "retrain", counted)
    return done


def test_removals_resume_where_an_interrupt_stopped_them(trained, tmp_path, monkeypatch):
    whole = remove(trained)
    interrupt_after(monkeypatch, calls=1)
    with pytest.raises(KeyboardInterrupt):
        remove(trained, store=tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert (
        read_tensors(tmp_path / "store", "removals")[0]["done"].tolist() == [True] * 2 + [False] * 4
    )
    monkeypatch.undo()
    lanes = interrupt_after(monkeypatch, calls=99)
    resumed = remove(trained, store=tmp_path / "store")
    assert lanes == [2, 2], "only the rest is computed"
    assert same(resumed.values, whole.values) and same(resumed.gradient_norm, whole.gradient_norm)


def test_finished_removals_are_read_and_not_computed(trained, tmp_path, monkeypatch):
    first = remove(trained, store=tmp_path / "store")
    content = (tmp_path / "store").read_bytes()
    interrupt_after(monkeypatch, calls=0, error=AssertionError("computed again"))
    assert same(remove(trained, store=tmp_path / "store").values, first.values)
    assert (tmp_path / "store").read_bytes() == content


def test_removals_do_not_depend_on_how_they_are_batched(trained, tmp_path):
    at_once, one_by_one = (
        remove(trained, lanes=6),
        remove(trained, lanes=1, store=tmp_path / "store"),
    )
    tolerance = 1e-5 if trained.trained()[0].dtype == torch.float32 else 1e-12
    assert torch.allclose(at_once.values, one_by_one.values, rtol=0, atol=tolerance)
    assert at_once.values.abs().max() > 100 * tolerance, "the removals must change something"


def test_a_resumed_run_still_says_that_retrainings_stopped_short(tmp_path, monkeypatch):
    pipeline = quick(msif.LBFGS(max_iter=2, polish_up_to=0)).fit(progress=False)
    interrupt_after(monkeypatch, calls=2)
    with pytest.raises(KeyboardInterrupt):
        remove(pipeline, store=tmp_path / "store", subsets=range(3), lanes=1)
    monkeypatch.undo()
    for _ in range(2):  # the rest, then a rerun with nothing left to compute
        with pytest.warns(msif.ConvergenceWarning, match="stopped short"):
            remove(pipeline, store=tmp_path / "store", subsets=range(3), lanes=1)


# --- how settings are told apart
# ----------------------------------------------------------------------


def closure(value):
    return lambda z, y: value


def recursive():
    def f(z, y):
        return f(z, y)

    return f


class Thing:
    """An object whose default repr holds its address."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda z: z + 1, lambda z: z - 1),
        (closure(1), closure(2)),
        pytest.param(closure(torch.zeros(5000)), closure(torch.arange(5000) == 2500), id="tensors"),
        pytest.param(lambda z, *, c=1: c, lambda z, *, c=2: c, id="keyword defaults"),
        pytest.param(lambda z: (lambda q: q + 1)(z), lambda z: (lambda q: q - 1)(z), id="inner"),
        (msif.SGD(0.1, schedule=lambda i, n: 1.0), msif.SGD(0.1, schedule=lambda i, n: 0.5)),
        (
            torch.nn.CrossEntropyLoss(label_smoothing=0.1),
            torch.nn.CrossEntropyLoss(label_smoothing=0.2),
        ),
    ],
)
def test_different_functions_are_described_differently(one, other):
    assert describe(one) != describe(other) and describe(one) == describe(one)


@pytest.mark.parametrize(
    "make",
    [
        lambda: closure(3),
        lambda: msif.SGD(0.1, schedule=closure(1.0)),
        pytest.param(recursive, id="recursive"),
        pytest.param(lambda: closure(Thing()), id="object"),
    ],
)
def test_equal_functions_are_described_equally(make):
    """Made twice, as two processes would; no address, and no end in itself."""
    assert describe(make()) == describe(make())


@pytest.mark.parametrize(
    "function", [msif.cross_entropy, torch.nn.functional.cross_entropy, closure]
)
def test_an_importable_function_is_described_by_its_name(function):
    """Its byte code changes with every Python and every edit, and would make all saved files
    foreign.
    """
    code = function.__code__
    try:
        before = describe(function)
        function.__code__ = code.replace(co_consts=(*code.co_consts, "edited"))
        assert describe(function) == before and function.__name__ in before
    finally:
        function.__code__ = code


def test_a_weight_decay_from_numpy_can_be_saved(tmp_path):
    pipeline = quick()
    pipeline.stages[0].weight_decay = numpy.float32(0.5)
    pipeline.fit(progress=False).save(tmp_path / "p")

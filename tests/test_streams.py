"""Data sets that are read when needed, and the two ends of a ranking that is never held."""

import os

import numpy
import pytest
import torch
from oracles import F64, close, draw, implicit_scores, random_examples, random_model

import msif_lab as msif
from msif_lab import memory
from msif_lab.data.inputs import files_of


class Counting(torch.utils.data.Dataset):
    """Counts how many examples are read."""

    def __init__(self, examples):
        self.examples, self.calls = examples, 0

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        self.calls += 1
        return self.examples.x[i].clone(), int(self.examples.y[i])


def pair(n=40, kind="convnet"):
    """The same trained stage with data in memory and read when needed."""
    data, model = random_examples(n, (1, 4, 4), 3, False, seed=3), random_model(kind, 3, seed=4)
    held = msif.Pipeline([msif.Stage("only", model, data, weight_decay=0.1)]).fit(progress=False)
    dataset = Counting(data)
    stage = msif.Stage("only", model, msif.Examples.from_dataset(dataset), weight_decay=0.1)
    lazy = msif.Pipeline([stage]).adopt()
    return held, lazy, dataset, random_examples(6, (1, 4, 4), 3, False, seed=5)


def test_a_stream_gives_the_numbers_of_memory():
    held, lazy, dataset, queries = pair()
    v = draw(held.objective(0).size, 4)
    for kind in ("hessian", "ggn"):
        close(lazy.curvature(0, kind) @ v, held.curvature(0, kind) @ v, 1e-12, kind)
    assert torch.allclose(held.gradient(0), lazy.gradient(0), rtol=0, atol=1e-12)
    solver, calls = msif.Exact(), dataset.calls
    scores = [implicit_scores(p, queries, solver, curvature="ggn") for p in (held, lazy)]
    assert torch.allclose(*scores, rtol=0, atol=1e-10)
    assert dataset.calls > calls
    assert lazy.facts()["stages"][0]["parameters"] == held.facts()["stages"][0]["parameters"]
    gradient_dot = [msif.GradientDot().fit(p).score(queries).values for p in (held, lazy)]
    assert torch.allclose(*gradient_dot, rtol=0, atol=1e-12)


def test_inputs_are_read_chunk_by_chunk_and_never_kept(monkeypatch):
    held, lazy, dataset, _ = pair()
    o = lazy.objective(0)
    v = torch.zeros(o.size, 2, dtype=F64)
    # looks at the model first, with a few examples
    msif.example_products(o, lazy.trained()[0], v, mode="layers")
    monkeypatch.setattr(memory, "WORKING_BYTES", 1)  # one example a chunk
    before, most, x = dataset.calls, 0, o.data.x
    read = type(x).__getitem__

    def watch(self, index):
        nonlocal most
        found = read(self, index)
        most = max(most, len(found))
        return found

    monkeypatch.setattr(type(x), "__getitem__", watch)
    msif.example_products(o, lazy.trained()[0], v, mode="layers")
    assert most == 1
    assert dataset.calls - before == len(dataset)  # each once
    before = dataset.calls
    part = lazy.stages[0].data[10:20].to(torch.float32)
    assert dataset.calls == before, "a subset or a copy reads nothing"
    assert part.x[[0, 3]].dtype == torch.float32
    assert torch.equal(part.x[3].double(), held.stages[0].data.x[13].float().double())
    assert part.select(classes=part.classes[:2], n=2).x.shape[0] == 2


def test_targets_at_hand_save_the_reading():
    dataset = Counting(random_examples(30, (1, 4, 4), 3, False, seed=3))
    data = msif.Examples.from_dataset(dataset, targets=dataset.examples.y)
    assert dataset.calls == 10  # a few items, twice: are they fixed?
    assert torch.equal(data.y, dataset.examples.y)
    assert "read when needed" in repr(data)
    again = msif.Examples.from_dataset(dataset, targets=dataset.examples.y)
    assert data.digest() == again.digest() != again[:29].digest()


def test_memory_maps_are_tensors(tmp_path):
    held, _, _, queries = pair()
    x = held.stages[0].data.x
    mapped = numpy.memmap(tmp_path / "x.bin", dtype="float64", mode="w+", shape=tuple(x.shape))
    mapped[:] = x.numpy()
    data = msif.Examples(mapped, held.stages[0].data.y)
    assert data.x.data_ptr() == mapped.ctypes.data, "not copied"
    stage = msif.Stage("only", held.stages[0].model, data, weight_decay=0.1)
    mapped = msif.Pipeline([stage]).adopt()
    scores = [implicit_scores(p, queries, curvature="ggn") for p in (held, mapped)]
    assert torch.equal(*scores)


class Items(list):
    """A list of any items as a map-style data set."""


def test_what_is_no_data_set_is_refused():
    zeros = torch.zeros(2)
    for dataset, error, message in [
        (iter([1, 2]), TypeError, "map-style"),
        (Items(), ValueError, "empty"),
        (Items([{"x": 1}]), TypeError, "not a pair"),
        (Items([(zeros, 0), (zeros, 0, 1)]), TypeError, r"dataset\[1\]"),
        (Items([("a.png", 0)]), TypeError, "ToTensor"),
        (Items([(zeros, 0), (torch.zeros(3), 0)]), ValueError, "resize"),
        (Items([(zeros, 0), (zeros.double(), 0)]), ValueError, "convert"),
        (Items([(zeros, 0), (torch.tensor([0, torch.nan]), 0)]), ValueError, "NaN"),
        (Items([(zeros, 0), (zeros, -1)]), ValueError, "negative label"),
    ]:
        with pytest.raises(error, match=message):
            msif.Examples.from_dataset(dataset)


def test_random_augmentation_is_refused():
    class Noisy(Items):
        def __getitem__(self, i):
            return torch.rand(3), 0

    with pytest.raises(ValueError, match="augmentation"):
        msif.Examples.from_dataset(Noisy([0, 0]))


@pytest.mark.parametrize("target", ["loss", "margin"])
def test_top_is_the_ends_of_the_full_ranking(target, monkeypatch):
    held, lazy, _, queries = pair()
    full = msif.ImplicitInfluence(curvature="ggn").fit(held).score(queries, target=target)
    for rows in (1, 7, 10**6):
        monkeypatch.setattr(memory, "WORKING_BYTES", rows * 10**3)
        top = msif.ImplicitInfluence(curvature="ggn").fit(lazy).score(queries, target=target, top=5)
        for which in ("helpful", "harmful"):
            expected, actual = getattr(full, which)(5), getattr(top, which)()
            assert torch.allclose(actual.values, expected.values, rtol=0, atol=1e-10), (rows, which)
            assert torch.equal(actual.ids, expected.ids), (rows, which)
            assert torch.equal(getattr(top, which)(2).positions, expected.positions[:, :2])
        assert len(top) == 6
        assert "5 most helpful" in repr(top)


def test_top_refuses():
    held, _, _, queries = pair()
    with pytest.raises(ValueError, match="leave_one_out"):
        msif.ImplicitInfluence(curvature="ggn", leave_one_out=True).fit(held).score(queries, top=3)
    fitted = msif.ImplicitInfluence(curvature="ggn").fit(held)
    with pytest.raises(ValueError, match="top=0"):
        fitted.score(queries, top=0)
    with pytest.raises(ValueError, match="score with a larger top="):
        fitted.score(queries, top=3).helpful(4)
    assert fitted.score(queries, top=10**6).lowest.values.shape == (6, 40)  # all there are


class Files(torch.utils.data.Dataset):
    """An item for each file, as torchvision's ImageFolder has them: paths and labels."""

    def __init__(self, root, n):
        self.root, self.samples = root, [(f"{i}.npy", i % 2) for i in range(n)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        name, label = self.samples[i]
        return numpy.load(self.root / name), label


class Mapped(torch.utils.data.Dataset):
    """All items in one file that is mapped into memory."""

    def __init__(self, path, n):
        self.items, self.n = numpy.load(path, mmap_mode="r"), n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return numpy.array(self.items[i]), i % 2


@pytest.mark.parametrize("kind", ["files", "mapped", "a part"])
def test_files_that_change_on_disk_after_fit_are_noticed(kind, tmp_path):
    """Also of items that no check looks at."""
    n, values = 200, draw(200, 3, seed=6).numpy()
    for i, row in enumerate(values):
        numpy.save(tmp_path / f"{i}.npy", row)
    numpy.save(tmp_path / "all.npy", values)
    dataset = Mapped(tmp_path / "all.npy", n) if kind == "mapped" else Files(tmp_path, n)
    if kind == "a part":
        dataset = torch.utils.data.Subset(dataset, range(n))
    data = msif.Examples.from_dataset(dataset)
    net = msif.mlp(3, (4,), classes=2).double()
    p = msif.Pipeline([msif.Stage("only", net, data, weight_decay=0.1)]).adopt()
    p.evaluate(data[:2])
    p.evaluate(data[:2])  # what is read only is not changed
    unread = tmp_path / ("all.npy" if kind == "mapped" else "7.npy")
    values[7] += 1
    numpy.save(unread.with_name("new.npy"), values if kind == "mapped" else values[7])
    os.replace(unread.with_name("new.npy"), unread)
    with pytest.raises(ValueError, match=r"stage 'only': data\.x changed since fit"):
        p.evaluate(data[:2])
    p.adopt().evaluate(data[:2])
    unread.unlink()
    with pytest.raises(ValueError, match=r"data\.x changed since fit"):
        p.evaluate(data[:2])


def test_of_what_a_data_set_holds_in_memory_only_the_number_is_known():
    _, lazy, dataset, _ = pair()
    assert files_of(dataset) == []
    assert lazy.objective(0).data.x.stamp() == (40, 0, ())

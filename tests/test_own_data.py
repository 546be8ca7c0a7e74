"""Data as people bring them: dictionaries, pictures, frames, text labels, ragged sequences, slow
data sets. Each is the same data in another form, so it must give the same tensors or scores.
"""

import collections
import time

import joblib
import numpy as np
import pandas
import pytest
import torch
from oracles import F64, close, draw
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import msif_lab as msif
from msif_lab.data import Fields, inputs

X = draw(12, 5, seed=1)
Y = torch.arange(12) % 3
PARTS = {"left": X[:, :2], "right": X[:, 2:]}


class Joined(nn.Module):
    """A small net on one tensor, or on a dictionary whose fields it concatenates."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = msif.mlp(5, hidden=(3,), classes=3, seed=seed).double()
        self.embedding, self.head = self.net.embedding, self.net.head
        del self.net

    def forward(self, x):
        if isinstance(x, dict):
            x = torch.cat([x["left"], x["right"]], 1)
        return self.head(self.embedding(x))


def two_stages(x, link, recipe, y=Y):
    data = msif.Examples(x, y)
    settings = {"weight_decay": 0.1, "recipe": recipe}
    one = msif.Stage("one", Joined(0), data[:8], **settings)
    two = msif.Stage("two", Joined(1), data[4:10], link=link, **settings)
    return msif.Pipeline([one, two]).fit(progress=False), data[10:]


@pytest.fixture(scope="module")
def optima():
    """The same two trained stages and queries, on one tensor and on fields."""
    return [two_stages(x, msif.Proximal(0.3), msif.LBFGS()) for x in (X, PARTS)]


IMPLICIT = {
    "exact": lambda: msif.ImplicitInfluence(msif.Exact()),
    "cg": lambda: msif.ImplicitInfluence(msif.ConjugateGradient(tol=1e-10), curvature="ggn"),
    "minres": lambda: msif.ImplicitInfluence(msif.MINRES(tol=1e-10)),
    "lissa": lambda: msif.ImplicitInfluence(msif.LiSSA(), curvature="ggn", damping=0.1),
    "lowrank": lambda: msif.ImplicitInfluence(msif.LowRank(), curvature="ggn", damping=0.1),
    "ekfac": lambda: msif.ImplicitInfluence(msif.EKFAC(), curvature="ggn", damping=0.1),
}


@pytest.mark.parametrize("name", IMPLICIT)
@pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")
def test_fields_give_the_implicit_scores_of_one_tensor(optima, name):
    scores = [IMPLICIT[name]().fit(p).score(q).values for p, q in optima]
    assert scores[0].any()
    close(scores[1], scores[0], 1e-9, name)


@pytest.mark.parametrize("link", [msif.Frozen(), msif.WarmStart()], ids=["frozen", "warm"])
def test_fields_give_the_unrolled_scores_and_baselines_of_one_tensor(link):
    pairs = [two_stages(x, link, msif.SGD(0.1, epochs=3, batch_size=3)) for x in (X, PARTS)]
    unrolled = [
        msif.UnrolledInfluence().fit(p, progress=False).score(q, progress=False).values
        for p, q in pairs
    ]
    close(unrolled[1], unrolled[0], 1e-10)
    assert unrolled[0].any()
    for name, method in msif.all_baselines().items():
        scores = [method.fit(p).score(q).values for p, q in pairs]
        close(scores[1], scores[0], 1e-9, name)


def test_other_fields_give_other_scores(optima):
    """The control: swapped halves of one field are not the same data."""
    swapped = {"left": X[:, :2], "right": X[:, 2:].flip(1)}
    other = two_stages(swapped, msif.Proximal(0.3), msif.LBFGS())
    scores = [msif.ImplicitInfluence().fit(p).score(q).values for p, q in (optima[0], other)]
    assert float((scores[0] - scores[1]).abs().max()) > 1e-3 * float(scores[0].abs().max())


def test_removals_evaluations_and_files_take_fields(optima, tmp_path):
    effects = []
    for number, (pipeline, queries) in enumerate(optima):
        settings = {"protocol": "warm-start", "progress": False, "store": tmp_path / f"{number}"}
        first = msif.removal_effects(pipeline, queries, [0, [1, 2]], **settings)
        again = msif.removal_effects(pipeline, queries, [0, [1, 2]], **settings)
        assert torch.equal(first.values, again.values)
        effects.append(first.values)
    close(effects[1], effects[0], 1e-7)
    pipeline, queries = optima[1]
    other = msif.Examples({"left": queries.x["left"] + 1, "right": queries.x["right"]}, queries.y)
    with pytest.raises(msif.SavedFileError, match="name another file"):
        msif.removal_effects(pipeline, other, [0, [1, 2]], **settings)
    pipeline.save(tmp_path / "p")
    loaded = two_stages(PARTS, msif.Proximal(0.3), msif.LBFGS())[0].load(tmp_path / "p")
    assert all(map(torch.equal, loaded.trained(), pipeline.trained()))


def test_fields_are_selected_told_apart_and_copied():
    data = msif.Examples(PARTS, Y, ids=range(100, 112))
    part = data.select(classes=(2, 0), n=4)
    at = part.ids - 100
    assert torch.equal(part.x["left"], X[at, :2]) and torch.equal(part.x["right"], X[at, 2:])
    assert data.digest() == msif.Examples(dict(PARTS), Y, ids=data.ids).digest()
    renamed = {"left": PARTS["left"], "wrong": PARTS["right"]}
    changed = PARTS | {"right": PARTS["right"] + 1}
    for other in (renamed, changed, dict(reversed(PARTS.items()))):
        assert data.digest() != msif.Examples(other, Y, ids=data.ids).digest()
    single = data.to(torch.float32)
    assert {values.dtype for values in single.x.values()} == {torch.float32}
    tokens = msif.Examples({"ids": Y[:, None], "x": X}, Y).to(torch.float32)
    assert tokens.x["ids"].dtype == torch.int64 and tokens.x["x"].dtype == torch.float32
    batch, labels = next(iter(DataLoader(data, batch_size=5)))
    assert torch.equal(batch["right"], X[:5, 2:]) and torch.equal(labels, Y[:5])


def sizes(examples):
    return {name: tuple(values.shape) for name, values in examples.x[:].items()}


# ---- Forms of inputs ----


def test_all_forms_of_one_input_give_the_same_tensors():
    expected = {name: values.float() for name, values in PARTS.items()}
    single = {name: values.float() for name, values in PARTS.items()}
    for case, given in {
        "arrays": {name: values.numpy() for name, values in single.items()},
        "lists": {name: values.tolist() for name, values in single.items()},
        "user dictionary": collections.UserDict(single),
        "one dictionary each": [{n: v[i] for n, v in single.items()} for i in range(12)],
        "fields": Fields(single),
    }.items():
        x = msif.Examples(given, Y).x
        assert x.field_names == list(expected), case
        assert all(torch.equal(x[name], expected[name]) for name in expected), case
    whole = X.float()
    for case, given in {
        "list of tensors": list(whole),
        "list of arrays": list(whole.numpy()),
        "negative strides": whole.flip(0).numpy()[::-1],
        "other byte order": whole.numpy().astype(">f4"),
        "frame": pandas.DataFrame(whole.numpy(), index=range(50, 62)),
        "needs a gradient": whole.clone().requires_grad_(),
    }.items():
        data = msif.Examples(given, Y)
        assert torch.equal(data.x, whole) and not data.x.requires_grad, case
        assert data.ids.tolist() == list(range(12)), case


def test_frames_keep_the_order_of_their_columns_and_give_ids_only_when_asked():
    frame = pandas.DataFrame({"z": [1, 2], "a": [0.5, 1.5], "on": [True, False]}, index=[7, 3])
    for given in (frame, frame.convert_dtypes()):
        assert msif.Examples(given, [0, 1]).x.tolist() == [[1.0, 0.5, 1.0], [2.0, 1.5, 0.0]]
    assert msif.Examples(frame, [0, 1], ids=frame.index).ids.tolist() == [7, 3]


def test_sequences_are_padded_with_a_mask():
    for rows in ([[7, 8], [9], [1, 2, 3]], [torch.tensor([7, 8]), np.array([9]), [1, 2, 3]]):
        x = msif.Examples(rows, Y[:3]).x
        assert x.field_names == ["input_ids", "attention_mask"]
        assert x["input_ids"].tolist() == [[7, 8, 0], [9, 0, 0], [1, 2, 3]]
        assert x["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    steps = [X[:2], X[2:5], X[5:6]]
    x = msif.Examples(steps, Y[:3]).x
    assert x.field_names == ["inputs", "attention_mask"] and x.dtype == F64
    for i, row in enumerate(steps):
        assert torch.equal(x["inputs"][i, : len(row)], row) and not x["inputs"][i, len(row) :].any()
        assert int(x["attention_mask"][i].sum()) == len(row)
    even = Fields.pad([[1, 2], [3, 4]])  # equally long ones only when asked to
    assert even["attention_mask"].all() and msif.Examples([[1, 2], [3, 4]], [0, 1]).x.ndim == 2


class Sum(nn.Module):
    """Reads as many steps as the mask says."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 3), nn.Linear(3, 2)
        nn.init.normal_(self.embed.weight, generator=torch.Generator().manual_seed(0))
        self.double()

    def forward(self, batch):
        steps = self.embed(batch["input_ids"]) * batch["attention_mask"][..., None]
        return self.head(torch.tanh(steps.sum(1)))


def test_scores_do_not_depend_on_how_far_sequences_are_padded():
    rows, y = [[1, 2], [3], [4, 5, 6], [7, 1]], [0, 1, 1, 0]
    model, scores = Sum(), []
    for wider in (0, 3):
        x = msif.Examples(rows, y).x
        data = msif.Examples({n: nn.functional.pad(v, (0, wider)) for n, v in x.items()}, y)
        pipeline = msif.Pipeline([msif.Stage("only", model, data, weight_decay=0.1)])
        if not wider:
            pipeline.fit(progress=False)
        scores.append(msif.GradientDot().fit(pipeline.adopt()).score(data).values)
    close(scores[1], scores[0], 1e-12)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_are_scaled_as_torchvision_does(mode):
    from torchvision.transforms import ToTensor

    shape = (4, 6) if mode == "L" else (4, 6, 3)
    pixels = np.arange(np.prod((5, *shape)), dtype=np.uint8).reshape(5, *shape)
    images = [Image.fromarray(one) for one in pixels]
    expected = torch.stack([ToTensor()(image) for image in images])
    assert torch.equal(msif.Examples(images, Y[:5]).x, expected)
    lazy = msif.Examples.from_dataset([(image, 0) for image in images])
    assert torch.equal(lazy.x[:], expected)


def test_text_labels_are_numbered_in_order():
    names = ["owl", "cat", "owl", "bee"] * 3
    series = pandas.Series(names, index=range(9, 21))
    given = [names, np.array(names), series, series.astype("string"), series.astype("category")]
    for y in (*given, series.astype(object), tuple(names)):
        data = msif.Examples(X, y)
        assert data.classes == ("bee", "cat", "owl") and data.named, type(y)
        assert data.y.tolist() == [2, 1, 2, 0] * 3, type(y)
    data = msif.Examples(X, names, classes=("owl", "ant", "bee", "cat"))
    assert data.y.tolist() == [0, 3, 0, 2] * 3 and data.counts()["ant"] == 0
    assert data.select(classes=("bee", "owl")).y.tolist() == [1, 1, 0] * 3
    ordered = pandas.Categorical(names, categories=["owl", "cat", "bee"], ordered=True)
    assert msif.Examples(X, ordered).classes == ("owl", "cat", "bee")


# ---- Data sets that are read when needed ----


class Lazy(Dataset):
    """Items that are pairs of a dictionary and a text label, and take a while."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def __len__(self):
        return 12

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return {name: values[i] for name, values in PARTS.items()}, f"class {Y[i]}"


def test_a_data_set_of_dictionaries_and_text_is_that_of_memory():
    held = msif.Examples(PARTS, [f"class {y}" for y in Y], ids=range(50, 62))
    lazy = msif.Examples.from_dataset(Lazy(), ids=range(50, 62))
    assert torch.equal(lazy.y, held.y) and lazy.classes == held.classes
    assert torch.equal(lazy.ids, held.ids) and lazy.digest() == held.digest()
    for at in (slice(2, 7), torch.tensor([5, 1])):
        assert all(torch.equal(lazy.x[at][name], held.x[at][name]) for name in PARTS)
    queries, scores = held[:3], []
    for data in (held, lazy):
        stage = msif.Stage("only", Joined(), data, weight_decay=0.1, recipe=msif.SGD(0.1, epochs=2))
        scores.append(msif.GradientDot().fit(msif.Pipeline([stage]).fit(progress=False)))
    values = [method.score(queries).values for method in scores]
    close(values[1], values[0], 1e-12)


def test_workers_read_the_same_items_in_the_same_order(monkeypatch):
    asked = []

    class Watched(joblib.Parallel):
        def __init__(self, *given, **settings):
            asked.append(given)
            super().__init__(*given, **settings)

    monkeypatch.setattr(joblib, "Parallel", Watched)
    fast = msif.Examples.from_dataset(Lazy(), workers=2)
    assert not asked, "processes for what takes no time"
    monkeypatch.setattr(inputs, "PATIENCE", 0.0)
    order = torch.tensor([7, 0, 11, 3, 3])
    for values, expected in ((fast.x[order], X[order]), (fast.x[:], X)):
        assert torch.equal(torch.cat([values["left"], values["right"]], 1), expected)
    assert asked == [(2,), (2,)]
    held = msif.Examples(PARTS, Y)
    copied = joblib.Parallel(2)(joblib.delayed(sizes)(data) for data in (fast[:4], held))
    assert copied == [{"left": (n, 2), "right": (n, 3)} for n in (4, 12)], "in other processes"


def test_pictures_of_fields_are_refused_in_words(optima):
    from msif_lab import plots, widgets

    pipeline, queries = optima[1]
    scores = msif.GradientDot().fit(pipeline).score(queries)
    for show, says in (
        (lambda: plots.influence_grid(scores, pipeline.stages[0].data, queries), "left (2,)"),
        (lambda: widgets.InfluenceExplorer(pipeline, scores, queries), "'left', 'right'"),
    ):
        with pytest.raises(ValueError) as caught:
            show()
        assert says in str(caught.value) and "scores.to_frame()" in str(caught.value)

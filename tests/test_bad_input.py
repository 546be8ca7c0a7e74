"""Wrong input: the error names the argument, its value and the way out, and models and files stay
as they were.
"""

import collections
import copy
import functools
import math
import warnings
from contextlib import contextmanager

import numpy
import pandas
import pytest
import scipy.sparse
import torch
from oracles import random_pipeline, random_queries
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import msif_lab as msif
from msif_lab.storage import FORMAT, read_tensors, write_bytes, write_tensors

NAN, INF = float("nan"), float("inf")
X, Y = torch.arange(18.0).reshape(6, 3) / 10, torch.tensor([0, 1, 2, 0, 1, 2])


@contextmanager
def refused(error, says, case=""):
    """The block raises ``error``; its message holds all pieces of "argument | value | way out"."""
    try:
        yield
    except error as caught:
        missing = [piece for piece in says.split(" | ") if piece not in str(caught)]
        assert not missing, f"{case} {str(caught)!r} does not say {missing}"
    else:
        pytest.fail(f"{case} raised no error; it should say {says!r}")


def table(*rows):
    """Parametrise by rows of pairs ``(use, says)``; the pairs of one row reach the same check."""
    return pytest.mark.parametrize("pairs", rows, ids=[row[0][1] for row in rows])


def net(classes=3, seed=0, **settings):
    return msif.mlp(3, hidden=(4,), classes=classes, seed=seed, **settings)


def examples(x=X, y=Y, **settings):
    return msif.Examples(x, y, **settings)


def build(model=None, data=None, loss=msif.cross_entropy, **settings):
    """A pipeline of the one float32 stage 'only'."""
    settings = {"weight_decay": 0.1, "recipe": msif.SGD(0.1, epochs=2)} | settings
    model = net() if model is None else model
    data = examples() if data is None else data
    return msif.Pipeline([msif.Stage("only", model, data, loss, **settings)])


def build_two(link, first=None, second=None, fit=False, **settings):
    """A pipeline of the float64 stages 'one' and 'two' on the same data."""
    settings = {"weight_decay": 0.1, "recipe": msif.SGD(0.1, epochs=2)} | settings
    models = (first or net()).double(), (second or net(seed=1)).double()
    one = msif.Stage("one", models[0], examples(X.double()), **settings)
    two = msif.Stage("two", models[1], examples(X.double()), link=link, **settings)
    pipeline = msif.Pipeline([one, two])
    return pipeline.fit(progress=False) if fit else pipeline


def normalised(layer=nn.BatchNorm1d, **settings):
    return nn.Sequential(nn.Linear(3, 4), layer(4, **settings), nn.Linear(4, 3))


def pipeline_with_batch_norm():
    models = [normalised().eval() for _ in range(2)]
    return build_two(msif.Frozen(shared="0."), *models, fit=True)


@contextmanager
def unchanged(*modules):
    """The modules' parameters and buffers are the same after the block."""
    before = [copy.deepcopy(m.state_dict()) for m in modules]
    yield
    for module, state in zip(modules, before, strict=True):
        changed = [
            n for n, value in module.state_dict().items() if not torch.equal(state[n], value)
        ]
        assert not changed, f"{changed} changed"


@pytest.fixture(scope="module")
def fitted():
    """A proximal pipeline at its optimum, for reading only: 83 and 78 parameters, 24 and 20
    examples.
    """
    return random_pipeline(link=msif.Proximal(0.3))


@pytest.fixture(scope="module")
def queries(fitted):
    return random_queries(fitted)


@pytest.fixture(scope="module")
def attributor(fitted):
    return msif.ImplicitInfluence().fit(fitted)


# ---- Data ----


@table(
    [(lambda: examples(y=Y[:2]), "x holds 6 | y holds 2 | equal")],
    [(lambda: examples(X[:0], Y[:0]), "(0, 3) | at least one example")],
    [
        (
            lambda: examples(X.where(X[1, 0] != X, NAN)),
            "x holds NaN or inf | [1] | remove or repair",
        ),
        (
            lambda: examples(y=X.where(X[4, 2] != X, INF)),
            "y holds NaN or inf | [4] | remove or repair",
        ),
    ],
    [(lambda: examples(y=Y - 1), "y holds the negative label -1 | 0 .. classes-1")],
    [(lambda: examples(ids=[1, 2]), "ids | (2,) | (6,)")],
    [(lambda: examples(ids=[1] * 6), "ids must be unique")],
    [(lambda: examples(ids=X[:, 0]), "ids | float32 | integers")],
    [(lambda: examples(classes="ab"), "y holds the label 2 | classes names only 2")],
    [
        (lambda: examples()[[]], "index | (0,) | non-empty list of positions"),
        (lambda: examples()[4:4], "index | (0,) | non-empty list of positions"),
        (lambda: examples()[[0.5]], "index | float32 | list of positions"),
        (lambda: examples()[[True, False]], "index | (2,) | bool"),
    ],
    [
        (lambda: examples()[[6, 0]], "index 6 is out of range | 6 examples"),
        (lambda: examples()[[-7, 0]], "index -7 is out of range | 6 examples"),
    ],
    [
        (lambda: examples().select(classes=(0, 7)), "classes=(0, 7) | (0, 1, 2) | unknown: [7]"),
        (lambda: examples().select(classes=(0, 0)), "classes=(0, 0) | different"),
        (lambda: examples().select(classes=()), "classes=() | (0, 1, 2)"),
    ],
    [
        (lambda: examples().select(classes=1), "classes=1"),
        (lambda: examples(y=Y % 2, classes=("a", "b")).select(classes="ab"), "('ab',)"),
    ],
    [(lambda: examples().select(n=2), "n=2 | class empty | at least 3")],
    [(lambda: examples().select(n=60), "class 0 has 2 examples | 20 are wanted | lower n=60")],
    [(lambda: examples().select(n=3.5), "n=3.5")],
    [(lambda: examples(X[:2], [0, 2]).select(), "class 1 | no examples | classes=")],
    [(lambda: examples(y=X).select(), "select needs class labels | (6, 3) | float32")],
)
def test_data_refuse(pairs):
    for use, says in pairs:
        error = IndexError if "out of range" in says else (ValueError, TypeError)
        with refused(error, says):
            use()


class Forward(nn.Linear):
    """A layer whose output a function changes."""

    def __init__(self, change):
        super().__init__(3, 3)
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, z, y):
        return msif.cross_entropy(z * self.scale, y)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])

    def __len__(self):
        return 3


def pictures(*modes, sizes=((4, 4), (4, 4))):
    return [Image.new(mode, size) for mode, size in zip(modes, sizes, strict=True)]


def frame(**columns):
    return pandas.DataFrame(columns)


def sequences(data):
    """A model of tokens on these inputs."""
    return build(nn.Sequential(nn.Embedding(3, 3), nn.Flatten(), nn.Linear(9, 3)), data)


def tokens(y):
    data = msif.Examples(torch.ones(len(y), 4).long(), y)
    return build(nn.Sequential(nn.Embedding(5, 3)), data, msif.next_token_loss)


def optimiser():
    return torch.optim.SGD(net().parameters(), 0.1)


def linked(link):
    return msif.Pipeline(
        [msif.Stage("one", net(), examples()), msif.Stage("two", net(), examples(), link=link)]
    )


def dataset(*items):
    return msif.Examples.from_dataset(list(items))


LOADER = torch.utils.data.DataLoader([(X[0], 0)])
PAIRS = torch.utils.data.TensorDataset(X, Y)
SCHEDULE = "f(step, steps) must give one number"
BROUGHT = {  # what people bring -> argument, what was found, way out
    "None": (lambda: examples(None), "x is None | give numbers"),
    "no targets": (lambda: examples(y=None), "y is None | give numbers"),
    "text": (lambda: examples(["a", "b"]), "x is a list of str | tokenizer("),
    "text array": (lambda: examples(numpy.array(["a"])), "x is an array of <U1 | tokenizer("),
    "objects": (lambda: examples([object()]), "x is a list of object | give numbers"),
    "generator": (lambda: examples(i for i in (1, 2)), "x is a generator | list(x)"),
    "loader": (lambda: examples(LOADER), "x is a DataLoader | from_dataset(loader.dataset)"),
    "dataset": (lambda: examples(PAIRS), "x is a TensorDataset | from_dataset(dataset)"),
    "iterable": (lambda: examples(Endless()), "x is a Endless | no positions | into tensors"),
    "complex": (lambda: examples(X.to(torch.complex64)), "x is torch.complex64 | view_as_real"),
    "sparse": (lambda: examples(X.to_sparse()), "x is a sparse tensor | x.to_dense()"),
    "SciPy": (lambda: examples(scipy.sparse.csr_matrix(X.numpy())), "csr_matrix | x.toarray()"),
    "float8": (lambda: examples(X.to(torch.float8_e4m3fn)), "x is torch.float8 | torch.float32"),
    "meta": (lambda: examples(X.to("meta")), "x is on meta | real ones"),
    "images of two sizes": (
        lambda: examples([X[None], X[None, :, :2]], Y[:2]),
        "x is a list of Tensor | equal shapes | resize",
    ),
    "widths": (lambda: examples([X[:2], X[:3, :2]], Y[:2]), "x[1] is (3, 2) | (2, 3) | one width"),
    "empty sequence": (lambda: examples([[1], []], Y[:2]), "x[1] is (0,) | at least one step"),
    "ragged field": (
        lambda: examples({"a": [[1], [1, 2]]}, Y[:2]),
        "x['a'] is a list of list | padding=True",
    ),
    "unequal fields": (
        lambda: examples({"a": X, "b": X[:2]}),
        "fields | {'a': 6, 'b': 2} | one row",
    ),
    "frames that are sorted otherwise": (
        lambda: examples(pandas.DataFrame(X.numpy()), pandas.Series(Y.numpy())[::-1]),
        "indices differ | y.loc[x.index] | to_numpy()",
    ),
    "no fields": (lambda: examples({}), "fields | [] | strings"),
    "numbered fields": (lambda: examples({1: X}), "fields | [1] | strings"),
    "unlike rows": (
        lambda: examples([{"a": 1}, {"b": 1}], Y[:2]),
        "x[1] | ['b'] | x[0] has ['a'] | give all examples the same",
    ),
    "text column": (
        lambda: examples(frame(a=[1, 2], b=["x", "y"]), Y[:2]),
        "x has columns ['b'] | x.drop(columns=['b']) | get_dummies",
    ),
    "missing value": (
        lambda: examples(frame(a=[1, None]), Y[:2]),
        "x lacks values | column 'a' at positions [1] | fill them or drop",
    ),
    "sizes of pictures": (
        lambda: examples(pictures("L", "L", sizes=((4, 4), (5, 4))), Y[:2]),
        "x[1] | (5, 4) | resize((4, 4))",
    ),
    "modes of pictures": (
        lambda: examples(pictures("L", "RGB"), Y[:2]),
        "x[1] | RGB | convert('L')",
    ),
    "palette": (lambda: examples(pictures("P", "P"), Y[:2]), "x[0] | mode 'P' | convert(\"RGB\")"),
    "picture and tensor": (
        lambda: examples([*pictures("L", "L"), X[0]], Y[:3]),
        "x[2] is Tensor | give one kind",
    ),
    "mixed labels": (
        lambda: examples(y=["a", None, "b", "a", "b", "a"]),
        "y mixes text with NoneType | positions [1] | drop examples",
    ),
    "unknown label": (
        lambda: examples(y=list("abcabd"), classes="abc"),
        "y holds 'd' at positions [5] | ('a', 'b', 'c') | add it",
    ),
    "bytes": (lambda: examples(y=numpy.array([b"a"] * 6)), "y is an array of |S1 | y.astype(str)"),
    "huge label": (lambda: examples(y=[0, 1, 2, 0, 1, 10**9]), "y | 1000000000 | return_inverse"),
    "too large": (
        lambda: examples(y=numpy.array([2**63] * 6, dtype=numpy.uint64)),
        "y holds numbers of 2**63 | smaller",
    ),
    "-100": (lambda: examples(y=Y.where(Y > 0, -100)), "y | -100 | x[y >= 0] | y.float()"),
    "text ids": (lambda: examples(ids=list("abcdef")), "ids | 'a' | by position: names[i]"),
    "ids of bool": (
        lambda: examples(X[:2], Y[:2], ids=[True, False]),
        "ids are torch.bool | integers",
    ),
    "repeated ids": (
        lambda: examples(ids=[1, 1, 2, 3, 4, 4]),
        "ids must be unique | [1, 4] repeat",
    ),
    "classes": (lambda: examples(classes=3), "classes=3 | one name per label"),
    "equal classes": (lambda: examples(classes="aab"), "classes=('a', 'a', 'b') | must differ"),
    "from loader": (
        lambda: msif.Examples.from_dataset(LOADER),
        "dataset is a DataLoader | loader.dataset",
    ),
    "from iterable": (
        lambda: msif.Examples.from_dataset(Endless()),
        "dataset=Endless | no length or indexing | __getitem__",
    ),
    "from class": (lambda: msif.Examples.from_dataset(list), "dataset=a class | give an instance"),
    "from rows": (lambda: dataset({"x": 1}), "dataset[0] is dict | (input, target) | wrap"),
    "unlike items": (
        lambda: dataset(({"a": X[0]}, 0), ({"a": X}, 0)),
        "dataset[1] | (6, 3) | dataset[0] | (3,) | resize",
    ),
    "workers": (
        lambda: msif.Examples.from_dataset(PAIRS, workers=-1),
        "workers=-1 | 0 for reading here",
    ),
    "open things": (
        lambda: msif.Examples.from_dataset([(X[0], 0), (i for i in ())], workers=2),
        "workers=2 | cannot be copied | open files in __getitem__ | workers=0",
    ),
    "DataLoader as data": (
        lambda: build(data=LOADER),
        "data is DataLoader | from_dataset(loader.dataset)",
    ),
    "data set as data": (
        lambda: build(data=PAIRS),
        "data is TensorDataset | from_dataset(dataset)",
    ),
    "bool inputs": (lambda: build(data=examples(X > 0.5)), "data.x is bool | x.to(torch.float32)"),
    "uint8 images": (
        lambda: build(data=examples((X * 9).byte())),
        "data.x is uint8 | x.to(torch.float32) / 255",
    ),
    "half inputs": (
        lambda: build(data=examples(X.half())),
        "data.x is torch.float16 | .to(torch.float32)",
    ),
    "floating tokens": (lambda: sequences(examples()), "data.x is float32 | tokens | x.long()"),
    "tokens beyond": (
        lambda: sequences(examples(X.long() + 5)),
        "data.x holds 5 .. 6 | rows 0 .. 2",
    ),
    "dictionary for a plain model": (
        lambda: build(data=examples({"a": X})),
        "data.x | 'only' | dictionary of ['a'] | msif.wrap(",
    ),
    "floating labels": (lambda: build(data=examples(y=Y.float())), "data.y | float32 | y.long()"),
    "one-hot": (
        lambda: build(data=examples(y=functional.one_hot(Y))),
        "data.y (6, 3) | y.argmax(1)",
    ),
    "column of labels": (lambda: build(data=examples(y=Y[:, None])), "data.y (6, 1) | y[:, 0]"),
    "labels from 1": (lambda: build(data=examples(y=Y + 1)), "data.y | label 3 | 0 .. 2 | y - 1"),
    "-100 among tokens": (
        lambda: tokens(torch.zeros(99, 4).long().index_fill(0, torch.tensor([50]), -100)),
        "data.y holds tokens -100 .. 0 | a loss of your own",
    ),
    "tuple": (lambda: build(Forward(lambda z: (z, z))), "returns tuple | msif.wrap( | m(...)[0]"),
    "dictionary": (lambda: build(Forward(lambda z: {"a": z})), "returns dict | msif.wrap( | ['a']"),
    "outputs object": (
        lambda: build(Forward(lambda z: collections.OrderedDict(logits=z))),
        "returns OrderedDict | msif.wrap( | ['logits']",
    ),
    "no output": (lambda: build(Forward(lambda z: None)), "'only' | returns NoneType | msif.wrap("),
    "NumPy output": (
        lambda: build(Forward(lambda z: z.detach().numpy())),
        "'only' | returns ndarray | msif.wrap(",
    ),
    "no gradient": (
        lambda: build(Forward(torch.detach)),
        "'only' | no trained parameter | detach()",
    ),
    "classes as output": (
        lambda: build(Forward(lambda z: (z > 0).float())),
        "'only' | no trained parameter | take it out",
    ),
    "NaN outputs": (lambda: build(Forward(lambda z: z * NAN)), "loss | NaN or inf | data | check"),
    "mean loss": (lambda: build(loss=nn.CrossEntropyLoss()), 'loss | () | reduction="none"'),
    "(B, 1) loss": (
        lambda: build(loss=lambda z, y: msif.cross_entropy(z, y)[:, None]),
        "loss | (5, 1) | .reshape(-1)",
    ),
    "(B, T) loss": (lambda: build(loss=lambda z, y: z), "loss | (5, 3) | mean or sum over"),
    "broadcast loss": (
        lambda: build(net(1), examples(y=X[:, 0]), nn.MSELoss(reduction="none")),
        "loss | (5, 5) | broadcast | equal shapes",
    ),
    "number as loss": (lambda: build(loss=lambda z, y: 1.0), "loss | gives float | tensor (B,)"),
    "None as loss": (lambda: build(loss=lambda z, y: None), "loss | NoneType | tensor (B,)"),
    "integer loss": (lambda: build(loss=lambda z, y: y), "loss | torch.int64 | floating"),
    "NaN loss": (lambda: build(loss=lambda z, y: z[:, 0] * NAN), "loss | NaN or inf | nan | check"),
    "detached loss": (lambda: build(loss=lambda z, y: z[:, 0].detach()), "loss | detach()"),
    "failing loss": (
        lambda: build(loss=lambda z, y: 1 / 0),
        "loss | fails on | (5, 3) | ZeroDivisionError",
    ),
    "class of loss": (
        lambda: build(loss=nn.CrossEntropyLoss),
        "loss=CrossEntropyLoss is a class | none",
    ),
    "parameters in a loss": (
        lambda: build(loss=Weighted()),
        "loss=Weighted | ['scale'] | requires_grad_(False)",
    ),
    "list of lr": (lambda: msif.SGD([0.1, 0.2]), "lr=[0.1, 0.2] | one number | schedule="),
    "lr as text": (lambda: msif.SGD("0.1"), "lr='0.1' | one number"),
    "infinite lr": (lambda: msif.SGD(INF), "lr=inf | finite"),
    "lr as tensor": (lambda: msif.Adam(torch.tensor(0.1)), "lr=tensor(0.1000) | one number"),
    "negative momentum": (lambda: msif.SGD(0.1, momentum=-0.1), "momentum=-0.1 | [0, 1)"),
    "momentum as text": (lambda: msif.SGD(0.1, momentum="a"), "momentum='a' | [0, 1)"),
    "true epochs": (lambda: msif.SGD(0.1, epochs=True), "epochs=True | whole number"),
    "no batch size": (lambda: msif.SGD(0.1, batch_size=None), "batch_size=None | at least 1"),
    "no seed": (lambda: msif.SGD(0.1, seed=None), "seed=None | whole number | such as 0"),
    "half a seed": (lambda: msif.SGD(0.1, seed=1.5), "seed=1.5 | whole number"),
    "share as warm-up": (lambda: msif.SGD(0.1, warmup=0.1), "warmup=0.1 | whole number"),
    "scheduler": (
        lambda: msif.SGD(0.1, schedule=torch.optim.lr_scheduler.ConstantLR(optimiser())),
        "schedule=<torch | 'cosine' | f(step, steps)",
    ),
    "class of scheduler": (
        lambda: msif.SGD(0.1, schedule=torch.optim.lr_scheduler.StepLR),
        "schedule=<class | 'cosine' | f(step, steps)",
    ),
    "NaN schedule": (
        lambda: build(recipe=msif.SGD(0.1, schedule=lambda step, steps: NAN)),
        f"schedule=<function | nan | at step 0 of | {SCHEDULE}",
    ),
    "schedule of one argument": (
        lambda: build(recipe=msif.SGD(0.1, schedule=lambda step: 1)),
        f"schedule=<function | TypeError | {SCHEDULE}",
    ),
    "late schedule": (
        lambda: build(recipe=msif.SGD(0.1, schedule=lambda step, steps: 3 - step)),
        f"schedule=<function | [-1, -1] | at step 4 of 10 | {SCHEDULE}",
    ),
    "random schedule": (
        lambda: build(recipe=msif.SGD(0.1, schedule=lambda step, steps: numpy.random.rand())),
        f"schedule=<function | at step 0 | {SCHEDULE} | the same every time",
    ),
    "one beta": (lambda: msif.Adam(betas=0.9), "betas=0.9 | two numbers in [0, 1)"),
    "eps": (lambda: msif.Adam(eps=0), "eps=0 | positive"),
    "tol as text": (lambda: msif.LBFGS(tol="a"), "tol='a' | tol must be positive"),
    "half an iteration": (lambda: msif.LBFGS(max_iter=1.5), "max_iter=1.5 | whole number"),
    "weight decay by name": (
        lambda: build(weight_decay={"head": 0.1}),
        "'only' | key 'head' matches no parameter | 'head.*' | head.bias",
    ),
    "optimizer": (lambda: build(recipe=optimiser()), "recipe=SGD | SGD(lr=0.1) | pipeline.adopt()"),
    "class of link": (lambda: linked(msif.Frozen), "'two' | link=<class | link=Frozen()"),
    "alpha as tensor": (lambda: msif.Proximal(torch.tensor(1.0)), "alpha=tensor(1.) | one number"),
    "shared": (lambda: linked(msif.Frozen(3)), "'two' | shared=3 | a prefix, a list | a mapping"),
    "class of model": (lambda: build(nn.Linear), "model=Linear is a class | make one"),
    "weights as model": (lambda: build({"w": numpy.ones(3)}), "model is dict | load_state_dict()"),
    "traced inside": (
        lambda: build(nn.DataParallel(torch.jit.trace(net(), X))),
        "torch.jit | the module that it was made from",
    ),
    "traced": (
        lambda: build(torch.jit.trace(net(), X)),
        "torch.jit | the module that it was made from",
    ),
    "complex weights": (
        lambda: build(nn.Linear(3, 3).to(torch.complex64)),
        "'only' | 'weight' | complex | two parameters",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", BROUGHT)
def test_what_people_bring_is_refused_before_any_training(case, monkeypatch):
    monkeypatch.setattr(msif.SGD, "run", lambda *_, **__: pytest.fail("trained before it checked"))
    use, says = BROUGHT[case]
    with refused((ValueError, TypeError, msif.UnsupportedModelError), says, case):
        use()


def test_what_is_only_unusual_is_taken():
    assert build(recipe=msif.SGD(0.1, batch_size=99, epochs=1)).fit(progress=False).reports
    assert str(msif.SGD(numpy.float32(0.5), batch_size=numpy.int64(3))) == str(
        msif.SGD(0.5, batch_size=3)
    )
    assert build(weight_decay=numpy.int64(1)).objective(0).weight_decay == 1.0
    scaled = Forward(lambda z: z)
    scaled.register_forward_pre_hook(lambda module, given: (given[0].float() / 255,))
    assert build(scaled, examples((X * 99).byte())).fit(progress=False).reports


def test_labels_of_any_integer_dtype_train_alike():
    """NumPy on Windows, torchvision and CSV readers return other integers than int64."""
    reference = build(data=examples()).fit(progress=False)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        other = build(data=examples(y=Y.to(dtype))).fit(progress=False)
        assert torch.equal(reference.trained()[0], other.trained()[0]), dtype


def test_numbers_may_come_from_numpy():
    assert len(examples().select(n=numpy.int64(3))) == 3
    assert msif.Proximal(numpy.float32(0.5)).alpha == 0.5
    assert build(weight_decay=numpy.float32(0.5)).objective(0).weight_decay == 0.5
    scores = msif.Influence(torch.eye(3), torch.arange(3), torch.arange(3))
    assert len(scores[numpy.int64(1)]) == 1


# ---- One stage ----


def mixes(z, y):
    """The right shape, yet no example has a loss of its own."""
    return functional.cross_entropy(z, y).expand(len(y))


def mse(y, outputs=3):
    return build(net(outputs), examples(y=y), msif.mean_squared_error)


def with_bias(value):
    model = net()
    nn.init.constant_(model.head.bias, value)
    return model


class Picky(nn.Linear):
    def forward(self, x):
        assert x.ndim == 4, "images, please"


@table(
    [
        (
            lambda: build(data=examples(X[:, :2])),
            "data.x of shape (6, 2) | does not fit the model | 'only'",
        ),
        (
            lambda: build(data=examples((X * 9).long())),
            "data.x of shape (6, 3) | does not fit the model | 'only'",
        ),
        (lambda: build(Picky(3, 3)), "data.x of shape (6, 3) | 'only' | images, please"),
    ],
    [(lambda: build(data=examples((X * 9).byte())), "data.x is uint8 | / 255")],
    [
        (
            lambda: build(net(2)),
            "data.y holds the label 2 | 'only' | outputs (2,) | 0 .. 1 | select()",
        )
    ],
    [
        (
            lambda: build(data=examples(y=X)),
            "data.y (6, 3) torch.float32 | cross_entropy needs integer labels",
        ),
        (
            lambda: build(data=examples(y=X[:, 0])),
            "data.y (6,) torch.float32 | cross_entropy needs integer labels",
        ),
    ],
    [
        (
            lambda: build(data=examples(X.double())),
            "data.x is torch.float64 | 'only' is torch.float32 | .to(torch.float32)",
        ),
        (
            lambda: build(net().double()),
            "data.x is torch.float32 | 'only' is torch.float64 | .to(torch.float64)",
        ),
    ],
    [(lambda: mse(X.double()), "data.y is torch.float64 | torch.float32 | .to(")],
    [(lambda: mse(X[:, :2]), "(5, 3) | (5, 2) | equal shapes")],
    [
        (
            lambda: build(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())),
            "only | one dtype | float32 | float64",
        )
    ],
    [
        (
            lambda: build(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))),
            "only | device | on cpu | on meta",
        )
    ],
    [
        (lambda: build(net().to("meta")), "data.x is on cpu | 'only' on meta | .to()"),
        (
            lambda: build(nn.Embedding(3, 3), examples(Y.to("meta"))),
            "x is on meta | no numbers | give real ones",
        ),
    ],
    [(lambda: build(nn.Flatten()), "only | parameters | none at all")],
    [(lambda: build(net().requires_grad_(False)), "'only' | nothing is left to train | unfreeze")],
    [
        (lambda: build(with_bias(NAN)), "'only' | head.bias | NaN or inf"),
        (lambda: build(with_bias(INF)), "'only' | head.bias | NaN or inf"),
    ],
    [
        (
            lambda: build(loss=functional.cross_entropy),
            "'only' | loss(outputs, targets) gives () | one per example (5,)",
        )
    ],
    [(lambda: build(loss=lambda z, y: z @ y), "'only' | loss(outputs, targets) fails on | data")],
    [(lambda: build(loss=mixes), "'only' | loss | one per example")],
    [(lambda: build(loss="mse"), "'only' | loss='mse' | (outputs, targets) -> (B,)")],
    [
        (lambda: build(weight_decay=-0.1), "'only' | weight_decay=-0.1 | zero or positive"),
        (lambda: build(weight_decay=NAN), "'only' | weight_decay=nan | zero or positive"),
    ],
    [
        (lambda: build(recipe="sgd"), "'only' | recipe='sgd' | LBFGS() or SGD"),
        (lambda: build(recipe=msif.LBFGS), "'only' | recipe= | LBFGS()"),
    ],
    [(lambda: build(msif.mlp), "'only' | model is function | torch.nn.Module")],
)
def test_a_stage_refuses(pairs):
    for use, says in pairs:
        with refused((ValueError, TypeError), says):
            use()


def test_a_label_without_an_output_never_gives_a_number():
    """Where the label cannot be checked beforehand, in a user's own loss, NaN or an error must
    come.
    """

    def own_loss():
        pipeline = build(net(2), loss=lambda z, y: 2 * msif.cross_entropy(z, y))
        return pipeline.fit(progress=False).reports[0].value

    for use, case in (
        (lambda: msif.cross_entropy(torch.zeros(1, 2), torch.tensor([2])), "cross-entropy"),
        (
            lambda: msif.next_token_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 2]])),
            "next token",
        ),
        (own_loss, "own loss"),
    ):
        try:
            value = use()
        except (ValueError, IndexError, RuntimeError, msif.NotConvergedError):
            continue
        assert not torch.isfinite(value).any(), case


class Mixes(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Random(nn.Linear):
    def forward(self, x):
        return super().forward(functional.dropout(x, 0.5))  # a function, so that no layer shows it


class Counts(nn.Linear):
    """A function of each example, but every call writes into a buffer."""

    def __init__(self):
        super().__init__(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def running():
    layer = nn.InstanceNorm1d(1, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (1, 3)), layer, nn.Flatten(), nn.Linear(3, 3))


@table(
    [
        (
            normalised(lambda _: nn.Dropout(0.1)),
            "'only' | layer '1' (Dropout) | train mode | model.eval()",
        ),
        (
            normalised(lambda _: nn.AlphaDropout(0.1)),
            "'only' | layer '1' (AlphaDropout) | train mode | model.eval()",
        ),
    ],
    [
        (
            normalised(),
            "'only' | layer '1' (BatchNorm1d) | batch statistics | model.eval() | GroupNorm",
        ),
        (
            normalised(track_running_stats=False).eval(),
            "'only' | layer '1' (BatchNorm1d) | batch statistics | GroupNorm",
        ),
    ],
    [(running(), "'only' | layer '1' (InstanceNorm1d) | model.eval()")],
    [(Mixes(3, 3), "'only' | outputs change | with the batch around an example | deterministic")],
    [(Random(3, 3), "'only' | outputs change from call to call | deterministic | model.eval()")],
    [
        (Counts(), "'only' | buffer | calls"),
        (nn.utils.spectral_norm(nn.Linear(3, 3)), "'only' | weight_u | model.eval()"),
    ],
)
def test_a_model_that_is_no_fixed_function_of_each_example_is_refused_and_left_alone(pairs):
    for model, says in pairs:
        with unchanged(model), refused(msif.UnsupportedModelError, says):
            build(model)


def test_a_model_that_is_a_fixed_function_of_each_example_trains():
    for case, model in (
        ("dropout in eval mode", normalised(lambda _: nn.Dropout(0.5)).eval()),
        ("dropout of nothing", normalised(lambda _: nn.Dropout(0.0))),
        ("batch norm in eval mode", normalised().eval()),
        ("group norm", normalised(lambda width: nn.GroupNorm(2, width))),
    ):
        buffers = copy.deepcopy(dict(model.named_buffers()))
        pipeline = build(model)
        start = copy.deepcopy(model[0].weight)
        assert float(pipeline.fit(progress=False).reports[0].value) < math.inf, case
        assert not torch.equal(model[0].weight, start), case
        same = [torch.equal(buffers[name], value) for name, value in model.named_buffers()]
        assert all(same), case


def test_a_layer_without_forward_derivatives_works_or_is_named():
    """PyTorch 2.14 differentiates weight_norm forwards; where another does not, the error must
    still name the stage.
    """
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    pipeline = build(nn.Sequential(layer)).fit(progress=False)
    method = msif.ImplicitInfluence(curvature="ggn", damping=1.0)
    try:
        with pytest.warns(msif.ConvergenceWarning):
            scores = method.fit(pipeline).score(examples())
        assert scores.values.any()
    except msif.UnsupportedModelError as error:
        assert "'only'" in str(error)


# ---- Stages and links ----


def test_every_problem_of_a_pipeline_is_reported_at_once():
    one = msif.Stage("same", net(), examples(), weight_decay=-1, link=msif.Frozen())
    two = msif.Stage("same", net(), [1], link=None)
    says = "weight_decay=-1 | link=Frozen | first stage | data is list | Examples(x, y)"
    with refused(ValueError, f"{says} | link=None | must differ"):
        msif.Pipeline([one, two])


def with_a_common_part():
    one, two = net(), net(seed=1)
    two.embedding = one.embedding
    return build_two(msif.Frozen(), one, two)


@table(
    [
        (lambda: msif.Pipeline([]), "stages | non-empty list of msif_lab.Stage"),
        (lambda: msif.Pipeline([net()]), "stages | list of msif_lab.Stage"),
        (lambda: msif.Pipeline(msif.Stage("s", net(), examples())), "list of msif_lab.Stage"),
    ],
    [(lambda: build_two(None), "'two' | link=None | Frozen() | Proximal(alpha=...)")],
    [
        (
            lambda: build_two(msif.Frozen(), (m := net()), m),
            "'one' | 'two' | same parameter object | copy.deepcopy",
        ),
        (with_a_common_part, "'one' | 'two' | same parameter object | copy.deepcopy"),
    ],
    [(lambda: build_two(msif.Frozen(""), net()), "'two' | nothing is left to train | share fewer")],
    [
        (
            lambda: build_two(msif.Frozen(), nn.Linear(3, 3)),
            "'two' | no parameter is shared | both models: none",
        )
    ],
    [
        (lambda a=a: msif.Proximal(a), f"alpha={a!r} | positive and finite")
        for a in (0, -1.0, NAN, INF, "1", None)
    ],
)
def test_stages_and_links_refuse(pairs):
    for use, says in pairs:
        with refused((ValueError, TypeError), says):
            use()


@table(
    [
        (
            ["embedding.1.weight", "embeding.1.bias"],
            "['embeding.1.bias'] | both models | 'embedding.1.bias'",
        )
    ],
    [
        (
            "embeding",
            "no parameter is shared | shared='embeding' | embedding.1.weight | "
            "a prefix, a list, or a function",
        ),
        ([], "no parameter is shared | shared=[] | embedding.1.weight"),
        (lambda name: False, "no parameter is shared | shared=<function | embedding.1.weight"),
    ],
    [(["head.bias"], "'head.bias' | (4,) here | (3,) in the previous | leave it out of shared=")],
)
def test_shared_must_name_equal_parameters_of_both_models(pairs):
    for shared, says in pairs:
        for link in (msif.Frozen(shared), msif.Proximal(0.1, shared)):
            with refused(ValueError, f"'two' | {says}", link):
                build_two(link, second=net(4))


def test_buffers_that_differ_between_stages_are_refused():
    models = [normalised().eval() for _ in range(2)]
    models[1][1].running_mean += 1
    with refused(ValueError, "'two' | 1.running_mean | 'one' | get_buffer"):
        build_two(msif.Frozen(shared="0."), *models, fit=True)


# ---- Training ----


@table(
    [
        (lambda: msif.SGD(0.0), "lr=0.0 | lr must be positive"),
        (lambda: msif.SGD(NAN), "lr=nan | lr must be positive"),
    ],
    [(lambda: msif.SGD(0.1, momentum=1.0), "momentum=1.0 | [0, 1)")],
    [
        (lambda: msif.SGD(0.1, epochs=0), "epochs=0 | at least 1"),
        (lambda: msif.SGD(0.1, epochs=1.5), "epochs=1.5"),
        (lambda: msif.SGD(0.1, batch_size=0), "batch_size=0 | at least 1"),
    ],
    [(lambda: msif.SGD(0.1, schedule="step"), "schedule='step' | 'cosine'")],
    [
        (lambda: msif.LBFGS(tol=0.0), "tol=0.0 | tol must be positive"),
        (lambda: msif.LBFGS(tol=NAN), "tol=nan | tol must be positive"),
    ],
    [(lambda: msif.LBFGS(max_iter=0), "max_iter=0 | at least 1")],
)
def test_recipes_refuse(pairs):
    for use, says in pairs:
        with refused(ValueError, says):
            use()


def test_an_absurd_learning_rate_is_named_and_the_models_stay_as_they_were():
    pipeline = build_two(msif.Frozen(), recipe=msif.SGD(1e30, epochs=40))
    says = "NaN or inf at step | the risk is | lower lr=1e+30"
    with unchanged(*(s.model for s in pipeline.stages)), refused(msif.NotConvergedError, says):
        pipeline.fit(progress=False)
    with refused(ValueError, "not trained"):
        pipeline.trained()


def test_exact_influence_of_a_fit_that_stopped_short_warns_with_the_gradient_norm():
    pipeline = random_pipeline(link=msif.Frozen(), fit=False)
    for stage in pipeline.stages:
        stage.recipe = msif.LBFGS(max_iter=3, polish_up_to=0)
    pipeline.fit(progress=False)
    assert not pipeline.reports[0].converged.any()
    with pytest.warns(msif.ConvergenceWarning) as caught:
        msif.ImplicitInfluence(curvature="ggn").fit(pipeline)
    norm = f"‖∇F‖ = {float(pipeline.gradient(0).norm()):.1e}"
    pieces = ("'stage0'", "not at a stationary point", norm, "train with LBFGS()")
    assert all(piece in str(caught[0].message) for piece in pieces), caught[0].message


def test_exact_influence_of_a_converged_fit_does_not_warn(fitted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        msif.ImplicitInfluence().fit(fitted)


def test_indefinite_curvature_names_the_smallest_eigenvalue():
    pipeline = random_pipeline(link=msif.Frozen(), fit=False)
    one, two = (s.model for s in pipeline.stages)
    two.embedding.load_state_dict(one.embedding.state_dict())
    smallest = float(torch.linalg.eigvalsh(pipeline.adopt().curvature(0).dense())[0])
    with (
        pytest.warns(msif.ConvergenceWarning),
        refused(msif.IndefiniteCurvatureError, f"{smallest:.3e} | curvature='ggn'"),
    ):
        msif.ImplicitInfluence().fit(pipeline)
    assert smallest < 0


# ---- The trained state ----


ASKS = {
    "evaluate": lambda p: p.evaluate(p.stages[-1].data),
    "influence": lambda p: msif.ImplicitInfluence(curvature="ggn").fit(p),
    "retrain": lambda p: p.retrain(torch.ones(6), warm_start=True, progress=False),
    "removals": lambda p: msif.removal_effects(
        p, p.stages[-1].data, [0], protocol="warm-start", progress=False
    ),
    "curvature": lambda p: p.curvature(0),
    "gradient": lambda p: p.gradient(0),
    "save": lambda p: p.save("never-written"),
}


def test_an_untrained_pipeline_says_how_to_train_it():
    for name, ask in ASKS.items():
        with refused(ValueError, "not trained | pipeline.fit() | pipeline.adopt()", name):
            ask(build_two(msif.Frozen()))


def test_weights_changed_after_fit_are_noticed():
    for stage in (0, 1):
        pipeline = build_two(msif.Proximal(0.1), fit=True)
        # what was computed before the change must not be returned after it
        pipeline.curvature(0)
        nn.init.zeros_(pipeline.stages[stage].model.head.bias)
        says = f"stage '{('one', 'two')[stage]}' | weights changed since fit() | pipeline.adopt()"
        for name, ask in ASKS.items():
            with refused(ValueError, says, name):
                ask(pipeline)


def test_train_mode_switched_on_after_fit_is_noticed():
    for stage in (0, 1):
        pipeline = pipeline_with_batch_norm()
        model = pipeline.stages[stage].model.train()
        says = f"{('one', 'two')[stage]!r} | layer '1' | model.eval()"
        for name in ("influence", "retrain"):
            with unchanged(model), refused(msif.UnsupportedModelError, says, name):
                ASKS[name](pipeline)


def test_buffers_changed_after_fit_are_noticed():
    pipeline = pipeline_with_batch_norm()
    pipeline.stages[0].model[1].running_mean += 1
    with refused(ValueError, "'one' | 1.running_mean"):
        pipeline.trained()


def test_a_stage_changed_after_construction_takes_effect_or_is_refused():
    for name, value in {
        "weight_decay": 5.0,
        "link": msif.Proximal(50.0),
        "data": examples(X.double() + 1),
    }.items():
        pipeline = build_two(msif.Proximal(0.1), fit=True)
        before = pipeline.trained()[1].clone()
        try:
            setattr(pipeline.stages[1], name, value)
            after = pipeline.fit(progress=False).trained()[1]
        except (ValueError, AttributeError) as error:
            assert name in str(error)
        else:
            assert not torch.equal(after, before), name


def test_an_attributor_of_a_pipeline_moved_since_says_fit_again():
    pipeline = build_two(msif.Proximal(0.1), fit=True)
    with pytest.warns(msif.ConvergenceWarning):
        attributor = msif.ImplicitInfluence(curvature="ggn").fit(pipeline)
    pipeline.to(torch.float32)
    with refused(ValueError, "fit(pipeline) | float32 | float64"):
        attributor.score(pipeline.stages[-1].data)


def test_adopted_weights_have_no_run_to_repeat():
    pipeline = build_two(msif.Proximal(0.1), fit=True).adopt()
    with refused(ValueError, "adopted | warm_start=True | fit()"):
        pipeline.retrain(torch.ones(6))
    with refused(ValueError, "adopted | protocol='warm-start' | fit() | Effects.from_values"):
        msif.removal_effects(pipeline, pipeline.stages[-1].data, [0])


def test_adopt_requires_frozen_parameters_to_agree():
    says = "'two' | embedding.1.weight | 'one' | copy them over | Proximal(alpha=...)"
    with refused(ValueError, says):
        build_two(msif.Frozen()).adopt()


def test_adopt_refuses_weights_that_are_not_finite():
    pipeline = build_two(msif.Proximal(0.1))
    nn.init.constant_(pipeline.stages[1].model.head.bias, NAN)
    with refused(ValueError, "'two' | head.bias | NaN or inf | finite weights"):
        pipeline.adopt()


# ---- Weights, queries, targets ----


@table(
    [
        (torch.ones(2, 3), "weights of stage 'stage0' | (2, 3) | (R, 24) or (24,)"),
        (torch.tensor(1.0), "weights of stage 'stage0' | () | (R, 24) or (24,)"),
        (torch.ones(1, 2, 24), "weights of stage 'stage0' | (1, 2, 24) | (R, 24) or (24,)"),
        (torch.ones(0, 24), "weights of stage 'stage0' | (0, 24) | (R, 24)"),
        ({"stage1": torch.ones(2, 24)}, "weights of stage 'stage1' | (2, 24) | (R, 20) or (20,)"),
    ],
    [
        (torch.full((24,), NAN), "weights of stage 'stage0' | NaN or inf"),
        (torch.full((24,), INF), "weights of stage 'stage0' | NaN or inf"),
    ],
    [
        (
            {0: torch.ones(2, 24), 1: torch.ones(3, 20)},
            "weights | [2, 3] weightings | same number",
        )
    ],
    [
        (
            {0: torch.ones(24), "stage0": torch.ones(24)},
            "weights of stage 'stage0' | given twice | by name and by index",
        )
    ],
    [
        ({"stage7": torch.ones(24)}, "stage='stage7' | ['stage0', 'stage1']"),
        ({5: torch.ones(24)}, "stage=5 | below 2"),
    ],
    [({}, "weights | empty")],
)
def test_retrain_refuses_weights(fitted, pairs):
    for weights, says in pairs:
        with refused(ValueError, says):
            fitted.retrain(weights, progress=False)


@table(
    [(lambda q: (q.x, q.y), "queries | tuple | Examples(x, y)")],
    [
        (
            lambda q: q.to(torch.float32),
            "queries.x is torch.float32 | 'stage1' is torch.float64 | .to(torch.float64)",
        )
    ],
    [
        (
            lambda q: msif.Examples(q.x[..., :2], q.y),
            "queries.x of shape (5, 1, 4, 2) | does not fit | 'stage1'",
        )
    ],
    [(lambda q: msif.Examples(q.x, q.y + 1), "queries.y holds the label 2 | 'stage1' | 0 .. 1")],
    [(lambda q: msif.Examples(q.x, q.x), "queries.y | float64 | integer labels")],
)
def test_queries_that_do_not_fit_are_refused(fitted, attributor, queries, pairs):
    for ask in (
        attributor.score,
        fitted.evaluate,
        lambda q: msif.removal_effects(fitted, q, [0], progress=False),
    ):
        for spoil, says in pairs:
            with refused((ValueError, TypeError), says, ask):
                ask(spoil(queries))


def test_queries_of_other_classes_are_refused():
    """Label 0 is a 3 to the model: 0 in queries of other digits would mean another digit."""
    data = msif.Examples(torch.cat([X, X + 1]), torch.arange(12) % 6)
    pipeline = build(data=data.select(classes=(3, 4, 5))).fit(progress=False)
    assert len(pipeline.evaluate(data.select(classes=(3, 4, 5)))) == 6
    for wanted in ((4, 3, 5), (3, 5), (0, 1, 2)):
        with refused(ValueError, f"queries | classes | {wanted} | (3, 4, 5)"):
            pipeline.evaluate(data.select(classes=wanted))


def test_class_names_matter_only_where_both_have_them():
    named, unnamed = examples(classes=("cat", "dog", "owl")), examples()
    assert torch.isfinite(build(data=named).fit(progress=False).evaluate(unnamed)).all()
    assert len(build(data=named).fit(progress=False).evaluate(named[[0, 1]])) == 2


@table(
    [("los", "target='los' | 'loss', 'margin', 'output'")],
    [("output", "target='output' | (2,) | 'margin'")],
    [
        (lambda z, y: z, "target | (B,)"),
        (lambda z, y: z.sum(), "target | (B,) | ()"),
    ],
    [(lambda z, y: z[:, 0] * NAN, "target | NaN or inf")],
)
def test_targets_that_are_no_number_per_query_are_refused(fitted, attributor, queries, pairs):
    for ask in (
        attributor.score,
        fitted.evaluate,
        lambda q, target: msif.removal_effects(fitted, q, [0], target=target, progress=False),
    ):
        for target, says in pairs:
            with refused(ValueError, says, ask):
                ask(queries, target=target)


def test_the_margin_of_a_regression_is_refused():
    pipeline = mse(X[:, 0], outputs=1).fit(progress=False)
    with refused(ValueError, "target='margin' | labels"):
        pipeline.evaluate(pipeline.stages[0].data, target="margin")


def test_an_unknown_stage_is_named(fitted, attributor, queries):
    for stage in ("other", 2, -3, None, 0.5):
        for ask in (
            fitted.curvature,
            lambda s: attributor.score(queries, s),
            lambda s: msif.removal_effects(fitted, queries, [0], stage=s, progress=False),
        ):
            with refused(ValueError, f"stage={stage!r} | ['stage0', 'stage1']"):
                ask(stage)


# ---- Attributors, operators, solvers, results ----


def doubles(*shape):
    return torch.ones(*shape, dtype=torch.float64)


@table(
    [
        (lambda h: h @ doubles(3), "(83, 83) times (3,) | (P,) or (P, K)"),
        (lambda h: h @ doubles(2, 83), "(83, 83) times (2, 83) | (P,) or (P, K)"),
        (lambda h: h @ doubles(83, 1, 1), "(83, 83) times (83, 1, 1) | (P,) or (P, K)"),
        (lambda h: h @ [1.0], "times list | (P,) or (P, K)"),
    ],
    [
        (
            lambda h: h @ torch.ones(83),
            "torch.float64 on cpu times torch.float32 on cpu | convert",
        ),
        (lambda h: h @ doubles(83).to("meta"), "on cpu times torch.float64 on meta | convert"),
    ],
    [
        (lambda h: h + doubles(3), "(3,) | (83, 83) | a number or (P,)"),
        (lambda h: h + doubles(2, 2), "(2, 2) | (83, 83) | a number or (P,)"),
    ],
    [
        (lambda h: msif.Exact().prepare(h).solve(doubles(83)), "right-hand sides | (83,) | (P, K)"),
        (
            lambda h: msif.Exact().prepare(h).solve(doubles(83, 1) * NAN),
            "right-hand sides | (83, 1) | finite",
        ),
        (lambda h: msif.Exact().prepare(h).solve(doubles(3, 1)), "(3, 1) | (P, K)"),
    ],
    [
        (
            lambda h: msif.ConjugateGradient().solve(h, doubles(83)),
            "right-hand sides | (83,) | (P, K)",
        ),
        (
            lambda h: msif.ConjugateGradient().solve(h, doubles(83, 1) * NAN),
            "right-hand sides | (83, 1) | finite",
        ),
    ],
    [(lambda h: msif.ConjugateGradient().solve(h, doubles(3, 1)), "(83, 83) times (3, 1)")],
    [
        (lambda h: msif.Hessian(h.objective, h.full, doubles(1)), "weights | (1,) | (24,)"),
        (lambda h: msif.Hessian(h.objective, h.full, doubles(99)), "weights | (99,) | (24,)"),
    ],
    [(lambda h: msif.GGN(h.objective, h.full[1:]), "full | (82,) | (83,)")],
    [
        (
            lambda h: msif.example_products(h.objective, h.full, doubles(83)),
            "vectors | (83,) | (P, Q)",
        ),
        (
            lambda h: msif.example_products(h.objective, h.full, doubles(3, 2)),
            "vectors | (3, 2) | 83",
        ),
    ],
    [
        (
            lambda h: msif.example_products(h.objective, h.full, doubles(83, 2), mode="x"),
            "mode='x' | 'forward'",
        )
    ],
)
def test_operators_and_solvers_refuse(fitted, pairs):
    for use, says in pairs:
        with refused(ValueError, says):
            use(fitted.curvature(0))


def test_operators_of_two_stages_cannot_be_added(fitted):
    with refused(ValueError, "(83, 83) | (78, 78)"):
        fitted.curvature(0) + fitted.curvature(1)


def test_memory_is_refused_before_the_work_with_the_estimate():
    calls = []

    def counted(z, y):
        calls.append(len(z))
        return msif.cross_entropy(z, y)

    operator = build(loss=counted).adopt().curvature(0)
    calls.clear()
    says = "31 × 31 | needs about | budget | ConjugateGradient | memory="
    with refused(msif.MemoryBudgetError, says):
        operator.dense(memory="1KB")
    assert not calls, "worked before it checked"
    assert operator.dense().shape == (31, 31) and calls


@table(
    [
        (
            lambda: msif.ImplicitInfluence(curvature="fisher"),
            "curvature='fisher' | 'hessian' or 'ggn'",
        )
    ],
    [
        (lambda: msif.ImplicitInfluence(damping=-1.0), "damping=-1.0 | zero or positive"),
        (lambda: msif.ImplicitInfluence(damping=NAN), "damping=nan | zero or positive"),
    ],
    [
        (lambda: msif.ImplicitInfluence("exact"), "solver='exact' | Exact()"),
        (lambda: msif.ImplicitInfluence(msif.Exact), "solver= | Exact()"),
    ],
    [(lambda: msif.ImplicitInfluence().score(examples()), "fit(pipeline) before score")],
    [(lambda: msif.ImplicitInfluence().fit([1]), "pipeline | list")],
    [(lambda: msif.Exact(memory="much"), "memory='much' | '1GB'")],
    [(lambda: msif.ConjugateGradient(tol=2.0), "tol=2.0 | between 0 and 1")],
)
def test_attributors_refuse(pairs):
    for use, says in pairs:
        with refused((ValueError, TypeError), says):
            use()


@table(
    [
        (lambda s: s.removal_effect([9]), "indices=[9] | positions between 0 and 3"),
        (lambda s: s.removal_effect([-1]), "indices=[-1] | positions between 0 and 3"),
        (lambda s: s.removal_effect([]), "indices=[] | positions between 0 and 3"),
        (lambda s: s.removal_effect(9), "indices=9 | positions between 0 and 3"),
        (lambda s: s.removal_effect([1.7]), "indices=[1.7]"),
    ],
    [(lambda s: s.removal_effect([1, 1]), "indices=[1, 1] | different")],
    [
        (lambda s: s.helpful(0), "k=0 | between 1 and | 4"),
        (lambda s: s.harmful(5), "k=5 | between 1 and | 4"),
    ],
    [
        (
            lambda s: msif.Influence(s.values.T, s.ids, s.query_ids),
            "values (4, 2) | 2 queries | 4 ids",
        )
    ],
    [
        (
            lambda s: msif.Influence(s.values * NAN, s.ids, s.query_ids),
            "query 0 | example 0 | NaN",
        )
    ],
)
def test_influence_refuses(pairs):
    for use, says in pairs:
        with refused(ValueError, says):
            use(msif.Influence(torch.ones(2, 4), torch.arange(4), torch.arange(2)))


@table(
    [({"subsets": []}, "subsets is empty | [[3], [17], [5, 9]]")],
    [
        ({"subsets": [[]]}, "subset [] | positions between 0 and 23"),
        ({"subsets": [[24]]}, "subset [24] | positions between 0 and 23"),
        ({"subsets": [-1]}, "subset [-1] | positions between 0 and 23"),
        ({"subsets": [[1, 1]]}, "subset [1, 1] | different positions"),
    ],
    [
        ({"subsets": [[0.5]]}, "subset [0.5] | positions"),
        ({"subsets": [[True, False]]}, "subset [True, False] | positions"),
    ],
    [({"subsets": 3}, "subsets=3 | [[3], [17], [5, 9]]")],
    [({"subsets": [range(24)]}, "all 24 examples | nothing to train on")],
    [({"protocol": "cold"}, "protocol='cold' | 'same-seed' | 'warm-start'")],
    [({"lanes": 0}, "lanes=0 | positive whole number")],
)
def test_removals_refuse(fitted, queries, pairs):
    for settings, says in pairs:
        with refused((ValueError, TypeError), says):
            msif.removal_effects(fitted, queries, **{"subsets": [0]} | settings, progress=False)


def test_removals_take_positions_as_numpy_and_torch_return_them():
    pipeline = build_two(msif.Frozen(), fit=True)
    two = torch.tensor([2, 4])
    for subsets in (two, two.numpy(), [two[0], [4]]):
        effects = msif.removal_effects(pipeline, pipeline.stages[1].data, subsets, progress=False)
        assert effects.subsets == [[2], [4]], subsets


# ---- Files ----


def remove(
    pipeline, store, queries=slice(0, 2), subsets=(0, 1, 2), protocol="warm-start", **settings
):
    data = pipeline.stages[-1].data[queries]
    return msif.removal_effects(
        pipeline, data, subsets, protocol=protocol, store=store, progress=False, **settings
    )


READERS = {
    "pipeline": lambda path: build_two(msif.Proximal(0.1)).load(path),
    "influence": msif.Influence.load,
    "effects": msif.Effects.load,
    "removals": lambda path: remove(build_two(msif.Proximal(0.1), fit=True), path),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One file of each kind."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline = build_two(msif.Proximal(0.1), fit=True)
    pipeline.save(folder / "pipeline")
    scores = msif.Influence(torch.ones(1, 2), torch.arange(2), torch.arange(1), "one")
    scores.save(folder / "influence")
    remove(pipeline, folder / "removals").save(folder / "effects")
    return {kind: folder / kind for kind in READERS}


@table(
    [
        (lambda c: b"", "cut off"),
        (lambda c: c[:100], "is cut off"),
        (lambda c: c[:-1], "cut off or is not a safetensors file"),
        (lambda c: c + b"\0", "cut off or"),
        (lambda c: b"id,score\n0,1.5\n" * 20, "not a safetensors file"),
    ],
    [
        (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "was changed after it was written"),
        (lambda c: c.replace(b'\\"facts', b'\\"fActs', 1), "checksum differs"),
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(saved, tmp_path, pairs):
    path = tmp_path / "damaged"
    for kind, read in READERS.items():
        whole = saved[kind].read_bytes()
        for damage, says in pairs:
            damaged = damage(whole)
            path.write_bytes(damaged)
            with refused(msif.SavedFileError, f"{path} | {says}", kind):
                read(path)
            assert damaged != whole and path.read_bytes() == damaged, (kind, says)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"values": torch.ones(2)}, tmp_path / "foreign")
    for kind, read in READERS.items():
        with refused(msif.SavedFileError, "foreign | not written by msif_lab", kind):
            read(tmp_path / "foreign")


@pytest.mark.parametrize("kind", READERS)
def test_a_file_of_another_kind_is_refused(saved, kind):
    for other in set(READERS) - {kind}:
        with refused(msif.SavedFileError, f"{saved[other]} | a saved {other} | {kind}", other):
            READERS[kind](saved[other])


def test_a_file_of_a_later_format_asks_for_an_update(tmp_path, monkeypatch):
    monkeypatch.setattr("msif_lab.storage.FORMAT", FORMAT + 1)
    write_tensors(tmp_path / "new", "influence", {"values": torch.ones(1)}, {})
    monkeypatch.undo()
    with refused(msif.SavedFileError, f"format {FORMAT + 1} | up to {FORMAT} | update"):
        read_tensors(tmp_path / "new", "influence")


def test_a_missing_file_is_named(tmp_path):
    for kind in ("pipeline", "influence", "effects"):
        with refused(FileNotFoundError, f"{tmp_path / 'none'} | no such file", kind):
            READERS[kind](tmp_path / "none")


def test_a_missing_folder_is_named_and_nothing_is_written(tmp_path):
    with refused(FileNotFoundError, f"{tmp_path / 'missing'} | create it first"):
        write_bytes(tmp_path / "missing" / "file", b"")
    assert list(tmp_path.iterdir()) == []


@table(
    [
        (
            lambda: build_two(msif.Proximal(0.1), weight_decay=0.2),
            "'one' | weight_decay is 0.1 in the file, 0.2 here",
        ),
        (lambda: build_two(msif.Proximal(0.7)), "'two' | link is | 0.1 | 0.7"),
        (lambda: build_two(msif.Frozen()), "'two' | link is | 'Proximal' | 'Frozen'"),
        (
            lambda: build_two(msif.Proximal(0.1), recipe=msif.SGD(0.2)),
            "'one' | recipe is | lr=0.1 | lr=0.2",
        ),
        (
            lambda: build_two(msif.Proximal(0.1), loss=lambda z, y: z[:, 0]),
            "'one' | loss is | cross_entropy | <lambda>",
        ),
        (lambda: build_two(msif.Proximal(0.1), second=net(4)), "'two' | parameters is | [4, 4]"),
        (lambda: build_two(msif.Proximal(0.1), second=net(activation=nn.SiLU)), "'two' | SiLU"),
    ],
    [
        (
            lambda: build_two(msif.Proximal(0.1)).to(torch.float32),
            "float64 in the file | float32 here | pipeline.to",
        )
    ],
    [(lambda: build(), "2 stages | this pipeline has 1")],
)
def test_a_pipeline_of_other_settings_is_not_loaded(saved, pairs):
    path = saved["pipeline"]
    for here, says in pairs:
        pipeline = here()
        models = [s.model for s in pipeline.stages]
        with unchanged(*models), refused(msif.SavedFileError, f"{path} | {says}"):
            pipeline.load(path)
        with refused(ValueError, "not trained", says):
            pipeline.trained()


def test_settings_changed_since_the_fit_are_not_saved_with_its_weights(tmp_path):
    pipeline = build().fit(progress=False)
    pipeline.stages[0].weight_decay = 7.0
    with refused(ValueError, "weight_decay of stage 'only' | fit()"):
        pipeline.save(tmp_path / "p")


def test_a_pipeline_with_another_loss_object_is_not_loaded(tmp_path):
    def smoothed(amount):
        return build(loss=nn.CrossEntropyLoss(reduction="none", label_smoothing=amount))

    smoothed(0.0).fit(progress=False).save(tmp_path / "p")
    with refused(msif.SavedFileError, "'only' | loss"):
        smoothed(0.5).load(tmp_path / "p")


def test_a_pipeline_of_other_data_is_not_loaded(tmp_path):
    build().fit(progress=False).save(tmp_path / "p")
    assert build().load(tmp_path / "p").reports  # the control
    for case, other in {
        "one input": examples(X.where(X[5, 2] != X, 0.0)),
        "labels": examples(y=(Y + 1) % 3),
        "ids": examples(ids=range(1, 7)),
        "order": examples()[[5, 4, 3, 2, 1, 0]],
    }.items():
        with refused(msif.SavedFileError, "'only' | data is", case):
            build(data=other).load(tmp_path / "p")


def test_a_pipeline_with_other_buffers_is_not_loaded(tmp_path):
    models = [normalised().eval() for _ in range(2)]
    build(models[0]).fit(progress=False).save(tmp_path / "p")
    models[1][1].running_mean += 1
    with refused(msif.SavedFileError, "'only' | buffer"):
        build(models[1]).load(tmp_path / "p")


def test_a_store_of_other_removals_is_refused(tmp_path):
    pipeline, path = build_two(msif.Proximal(0.1), fit=True), tmp_path / "store"
    remove(pipeline, path)
    for other, words in (
        ({"target": "margin"}, "other target: loss in the file, margin here"),
        ({"protocol": "same-seed"}, "other protocol: warm-start in the file, same-seed here"),
        ({"stage": 1}, "other stage"),
        ({"queries": [3, 4]}, "other queries"),
    ):
        content = path.read_bytes()
        with refused(msif.SavedFileError, f"store= | {words} | name another file", other):
            remove(pipeline, path, **other)
        assert path.read_bytes() == content, other


def test_a_store_of_other_settings_is_refused(tmp_path):
    """Adopted weights can be the same under another penalty; the retrained ones are not."""
    usual = {"link": msif.Proximal(0.1), "recipe": msif.LBFGS()}
    pipeline = build_two(**usual, fit=True).adopt()
    remove(pipeline, tmp_path / "store")
    for other in (
        {"weight_decay": 0.5},
        {"weight_decay": {"bias": 0.0, "*": 0.1}},
        {"link": msif.Proximal(0.5)},
    ):
        twin = build_two(**usual | other)
        for stage, trained in zip(twin.stages, pipeline.stages, strict=True):
            stage.model.load_state_dict(trained.model.state_dict())
        with refused(msif.SavedFileError, "store= | name another file", other):
            remove(twin.adopt(), tmp_path / "store")


def column(c, z, y):
    return z[:, c]


def closure(c):
    return lambda z, y: z[:, c]


def test_a_store_of_another_target_function_is_refused(tmp_path):
    """Both functions have one name; the numbers of the other one must not come back."""
    pipeline = build_two(msif.Frozen(), fit=True)
    for case, targets in {
        "lambdas": [lambda z, y: z[:, 0], lambda z, y: z[:, 1]],
        "defaults": [lambda z, y, c=c: z[:, c] for c in (0, 1)],
        "closures": [closure(0), closure(1)],
        "partials": [functools.partial(column, c) for c in (0, 1)],
    }.items():
        remove(pipeline, tmp_path / case, target=targets[0])
        with refused(msif.SavedFileError, "store= | name another file", case):
            remove(pipeline, tmp_path / case, target=targets[1])


def test_a_store_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    pipeline = build_two(msif.Frozen(), fit=True)
    monkeypatch.setattr(
        msif.Pipeline, "retrain", lambda *_, **__: pytest.fail("worked before it checked")
    )
    for where in ("missing/store", "."):
        with refused(OSError, str(tmp_path), where):
            remove(pipeline, tmp_path / where)

"""Stores and saved pipelines are refused once one's own code computes something else.

Each edit is made to the text of a setting, as in a notebook; it changes numbers, and is refused as
a loss, as a target and as a model, with what differs; or it changes none, and is accepted.
"""

import sys
import types

import pytest
import torch
from oracles import draw

import msif_lab as msif

SETTING = """
import abc, contextlib, dataclasses, enum, functools, operator, types
import numpy, torch
from torch import nn
import helpers
from helpers import imported

SCALE = 2.0
TABLE = {"a": 1.0, "b": {"c": [1.0, 2.0]}}
ARRAY = numpy.linspace(0.0, 1.0, 4000)
WEIGHTS = torch.ones(3000).double()
PLACES = frozenset({1, 2})
NAMES = ("low", "high")

def first(z):
    return second(z) + 1

def second(z):
    return z[:, 0] * third()

def third():
    return 0.5

def constant(z, y):
    return z[:, 0] * 1.5

def reads_global(z, y):
    return z[:, 0] * SCALE

def two_deep(z, y):
    return first(z)

def reads_table(z, y):
    return z[:, 0] * TABLE["b"]["c"][1]

def default(z, y, factor=1.25):
    return z[:, 0] * factor

def by_keyword(z, y, *, factor=1.25):
    return z[:, 0] * factor

def nested(z, y):
    def inner(a):
        return a * 0.75
    return inner(z[:, 0])

def comprehension(z, y):
    return sum(z[:, 0] * k for k in range(3))

def listed(z, y):
    return torch.stack([z[:, j] * (j + 1) for j in (0, 1)]).sum(0)

def members(z, y):
    return sum(z[:, j] for j in sorted(PLACES))

def generated(z):
    yield z[:, 0]
    yield z[:, 1] * 0.25

def from_generator(z, y):
    return sum(generated(z))

def matched(z, y):
    match NAMES[0]:
        case "low":
            return z[:, 0]
        case _:
            return z[:, 1]

def formatted(z, y):
    return z[:, 0] * len(f"{SCALE:.3f}")

def walrus(z, y):
    return (a := z[:, 0]) * a.new_tensor(2.0) + a

def caught(z, y):
    try:
        return z[:, 7]
    except IndexError:
        return z[:, 0]

def managed(z, y):
    with contextlib.nullcontext(0.5) as factor:
        return z[:, 0] * factor

def branches(z, y):
    return z[:, 0] if z.shape[1] > 2 else z[:, 1]

def sliced(z, y):
    return z[:, 0:2].sum(1)

def over(value):
    def inside(z, y):
        return z[:, 0] * float(value.mean())
    return inside

def decorated(g):
    @functools.wraps(g)
    def inner(*given):
        return g(*given) * 1.25
    return inner

def with_options(factor):
    def decorate(g):
        @functools.wraps(g)
        def inner(*given):
            return g(*given) * factor
        return inner
    return decorate

@decorated
def wrapped(z, y):
    return z[:, 0] - 1.0

@with_options(1.5)
def optioned(z, y):
    return z[:, 0]

@functools.singledispatch
def dispatched(z, y):
    return z[:, 0]

@dispatched.register
def _(z: torch.Tensor, y):
    return z[:, 1] * 0.5

def tagged(z, y):
    return z[:, 0] * tagged.factor

tagged.factor = 1.5

class Level(enum.Enum):
    ONE = 1.5

def by_level(z, y):
    return z[:, 0] * Level.ONE.value

class Mixin:
    def bend(self, z):
        return z[:, 0] * 0.5

class Base(abc.ABC):
    power = 2
    def __init__(self, scale=1.5):
        self.scale = scale
    def __call__(self, z, y):
        return self.bend(z) ** self.power * self.scale + self.extra + self.kept
    def bend(self, z):
        return z[:, 1]
    def method(self, z, y):
        return z[:, 0] * self.scale
    @staticmethod
    def static(z, y):
        return z[:, 0] * 0.3
    @classmethod
    def of_class(cls, z, y):
        return z[:, 0] * cls.power
    @property
    def extra(self):
        return 0.25
    @functools.cached_property
    def kept(self):
        return 0.125

class Derived(Mixin, Base):
    pass

class Slots:
    __slots__ = ("scale",)
    def __init__(self, scale=1.5):
        self.scale = scale
    def __call__(self, z, y):
        return z[:, 0] * self.scale

class Described:
    def __get__(self, owner, kind):
        return 0.6

class Holder:
    factor = Described()
    def __call__(self, z, y):
        return z[:, 0] * self.factor

@dataclasses.dataclass
class Config:
    scale: float = 1.5
    places: list = dataclasses.field(default_factory=lambda: [0, 1])
    def __call__(self, z, y):
        return z[:, self.places].sum(1) * self.scale

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Softplus(1.0)
        self.register_buffer("weight", torch.ones(3).double())
    def forward(self, z, y):
        return (self.inner(z) * self.weight).sum(1)

class Act:
    def __init__(self, slope=1.5):
        self.slope = slope
    def __call__(self, z):
        return torch.tanh(z * self.slope)

class Body(nn.Module):
    def forward(self, x):
        return bend(x)

def bend(x):
    return x * 1.5

class Net(nn.Module):
    slope = 1.5
    def __init__(self, act, own, config, options, level, array):
        super().__init__()
        self.act, self.own, self.config = act, own, config
        self.options, self.level, self.array = options, level, array
        self.body, self.drop = Body(), nn.Threshold(-9.0, 0.0)
        self.register_buffer("mean", torch.full((2,), 0.5).double())
        self.head = nn.Linear(2, 3).double()
    @property
    def shift(self):
        return 0.1
    def forward(self, x):
        x = self.own(self.act(self.body(self.drop(x - self.mean)))) * self.slope + self.shift
        x = x * self.config.scale * self.level.value + self.options.shift
        return self.head(x) * torch.as_tensor(self.array)

ACT, OWN, CONFIG, LEVEL, ROWS = torch.tanh, Act(), Config(), Level.ONE, numpy.ones(3)
OPTIONS = types.SimpleNamespace(shift=0.5)
"""
NET = "Net(ACT, OWN, CONFIG, OPTIONS, LEVEL, ROWS)"
HELPERS = "FACTOR = 1.5\ndef imported(z, y):\n    return z[:, 0] * FACTOR\n"

# Of functions of outputs and targets: what is asked for, and what is replaced by what.
EDITS = {
    "constant": ("constant", "* 1.5\n\ndef reads", "* 1.75\n\ndef reads"),
    "operator": ("constant", "z[:, 0] * 1.5", "z[:, 0] + 1.5"),
    "index": ("constant", "z[:, 0] * 1.5", "z[:, 1] * 1.5"),
    "global": ("reads_global", "SCALE = 2.0", "SCALE = 2.5"),
    "helper": ("two_deep", "second(z) + 1", "second(z) + 2"),
    "helper two deep": ("two_deep", "z[:, 0] * third()", "z[:, 1] * third()"),
    "helper three deep": ("two_deep", "return 0.5\n", "return 0.6\n"),
    "inside a dictionary": ("reads_table", "[1.0, 2.0]", "[1.0, 3.0]"),
    "default": ("default", "y, factor=1.25", "y, factor=1.5"),
    "keyword default": ("by_keyword", "*, factor=1.25", "*, factor=1.5"),
    "nested function": ("nested", "a * 0.75", "a * 0.5"),
    "range of a comprehension": ("comprehension", "range(3)", "range(4)"),
    "constant in a comprehension": ("listed", "(j + 1)", "(j + 2)"),
    "members of a set": ("members", "frozenset({1, 2})", "frozenset({0, 2})"),
    "generator": ("from_generator", "z[:, 1] * 0.25", "z[:, 1] * 0.5"),
    "pattern": ("matched", 'case "low"', 'case "lower"'),
    "subject of a match": ("matched", '("low", "high")', '("high", "low")'),
    "format": ("formatted", ":.3f", ":.4f"),
    "assignment expression": ("walrus", "new_tensor(2.0)", "new_tensor(3.0)"),
    "handler": ("caught", "except IndexError:\n        return z[:, 0]",
                "except IndexError:\n        return z[:, 1]"),
    "context": ("managed", "nullcontext(0.5)", "nullcontext(0.7)"),
    "comparison": ("branches", "shape[1] > 2", "shape[1] > 3"),
    "slice": ("sliced", "0:2", "1:3"),
    "large array closed over": ("over(ARRAY)", "(0.0, 1.0, 4000)", "(0.0, 1.1, 4000)"),
    "one entry of a large tensor": (
        "over(WEIGHTS)", "(3000).double()", "(3000).double().index_fill(0, torch.tensor([7]), 9)"
    ),
    "inside a closure": ("over(ARRAY)", "value.mean()", "value.max()"),
    "partial": ("functools.partial(default, factor=SCALE)", "SCALE = 2.0", "SCALE = 2.5"),
    "decorator": ("wrapped", "g(*given) * 1.25", "g(*given) * 1.5"),
    "what is decorated": ("wrapped", "z[:, 0] - 1.0", "z[:, 0] - 2.0"),
    "argument of a decorator": ("optioned", "with_options(1.5)", "with_options(1.6)"),
    "one of two lambdas": (
        "(lambda z, y: z[:, 0], lambda z, y: z[:, 1])[int(SCALE) - 1]",
        "SCALE = 2.0",
        "SCALE = 1.0",
    ),
    "implementation for a type": ("dispatched", "z[:, 1] * 0.5", "z[:, 1] * 0.6"),
    "attribute of a function": ("tagged", "factor = 1.5", "factor = 1.6"),
    "value of an enumeration": ("by_level", "ONE = 1.5", "ONE = 1.6"),
    "call of an object": ("Base()", "* self.scale + self.extra", "- self.scale + self.extra"),
    "argument of an object": ("Base(SCALE)", "SCALE = 2.0", "SCALE = 2.5"),
    "class attribute": ("Base()", "power = 2", "power = 3"),
    "bound method": ("Base().method", "z[:, 0] * self.scale\n    @", "z[:, 1] * self.scale\n    @"),
    "owner of a bound method": ("Base(SCALE).method", "SCALE = 2.0", "SCALE = 2.5"),
    "static method": ("Base.static", "* 0.3", "* 0.4"),
    "class method": ("Base.of_class", "power = 2", "power = 3"),
    "property": ("Base()", "return 0.25\n", "return 0.35\n"),
    "cached property": ("Base()", "return 0.125\n", "return 0.5\n"),
    "method of a mixin": ("Derived()", "return z[:, 0] * 0.5\n\nclass Base",
                          "return z[:, 0] * 0.6\n\nclass Base"),
    "order of bases": ("Derived()", "(Mixin, Base)", "(Base, Mixin)"),
    "override": ("Derived()", "class Derived(Mixin, Base):\n    pass",
                 "class Derived(Mixin, Base):\n    def bend(self, z):\n        return z[:, 2]"),
    "slots": ("Slots()", "__slots__ = (\"scale\",)\n    def __init__(self, scale=1.5)",
              "__slots__ = (\"scale\",)\n    def __init__(self, scale=1.6)"),
    "descriptor": ("Holder()", "return 0.6\n\nclass Holder", "return 0.7\n\nclass Holder"),
    "field of a data class": ("Config()", "scale: float = 1.5", "scale: float = 1.6"),
    "factory of a field": ("Config()", "lambda: [0, 1]", "lambda: [0, 2]"),
    "forward of a module": ("Loss()", "self.inner(z) * self.weight", "self.inner(z) - self.weight"),
    "module inside a module": ("Loss()", "nn.Softplus(1.0)", "nn.Softplus(2.0)"),
    "buffer": (
        "Loss()", 'buffer("weight", torch.ones(3)', 'buffer("weight", torch.zeros(3)'
    ),
    "imported function": ("imported", "HELPERS", "z[:, 0] * FACTOR", "z[:, 1] * FACTOR"),
    "global of an imported function": ("imported", "HELPERS", "FACTOR = 1.5", "FACTOR = 1.6"),
    "function of a module": (
        "lambda z, y: helpers.imported(z, y)", "HELPERS", "* FACTOR", "- FACTOR"
    ),
}  # fmt: skip
MODELS = {
    "forward": ("+ self.shift\n", "- self.shift\n"),
    "class attribute": ("slope = 1.5\n    def __init__(s", "slope = 2\n    def __init__(s"),
    "property": ("return 0.1\n    def forward", "return 0.2\n    def forward"),
    "activation": ("ROWS = torch.tanh", "ROWS = torch.sin"),
    "object that is called": ("Act(), Config(), L", "Act(2.5), Config(), L"),
    "code of an object that is called": ("torch.tanh(z * self.slope)", "torch.sin(z * self.slope)"),
    "settings in a data class": ("Act(), Config(), L", "Act(), Config(2.5), L"),
    "settings in a namespace": ("shift=0.5", "shift=0.75"),
    "setting in an enumeration": ("ONE = 1.5", "ONE = 1.6"),
    "array": ("numpy.ones(3)", "2 * numpy.ones(3)"),
    "helper of a module inside": ("return x * 1.5", "return x * 1.6"),
    "module inside": ("nn.Threshold(-9.0, 0.0)", "nn.Threshold(0.0, 0.3)"),
    "buffer": ("torch.full((2,), 0.5)", "torch.full((2,), 0.4)"),
}  # fmt: skip
HARMLESS = {
    "comment": ("constant", "* 1.5\n\ndef reads", "* 1.5  # half as much again\n\ndef reads"),
    "docstring": ("constant", "def constant(z, y):\n", "def constant(z, y):\n    '''Its doc.'''\n"),
    "layout": ("constant", "return z[:, 0] * 1.5", "\n\n    return (z[:, 0]\n        * 1.5)"),
    "lines before": ("two_deep", "SCALE = 2.0", "# one\n\n# two\nSCALE = 2.0"),
    "another function": ("constant", "a * 0.75", "a * 0.5"),
    "an unused global": ("constant", "SCALE = 2.0", "SCALE = 2.5"),
    "docstring of a class": ("Base()", "class Base(abc.ABC):", "class Base(abc.ABC):\n    'Doc.'"),
    "annotations": ("default", "def default(z, y, factor", "def default(z: object, y, factor"),
    "another part of an imported module": ("imported", "HELPERS", "def i", "OTHER = 1\ndef i"),
}  # fmt: skip


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Gives what is asked for, from the setting as it is or edited; helpers are a file."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def made(asked, *edit):
        source, own = SETTING, HELPERS
        if edit[:1] == ("HELPERS",):
            assert edit[1] in own
            own = own.replace(*edit[1:])
        elif edit:
            assert source.count(edit[0]) == 1, f"{edit[0]!r} is not one place of the setting"
            source = source.replace(*edit)
        sys.modules.pop("helpers", None)
        (tmp_path / "helpers.py").write_text(own)
        cells = types.ModuleType("__main__")
        exec(source, vars(cells))
        return eval(asked, vars(cells))

    yield made
    sys.modules.pop("helpers", None)


def as_loss(function):
    """A loss that can be minimised, in which the function plays a part."""

    def loss(z, y):
        return msif.cross_entropy(z, y) + 0.1 * torch.sin(function(z, y))

    return loss


def head_of(model):
    """What of a model has weights."""
    return getattr(model, "head", model)


def pipeline_of(loss=msif.cross_entropy, model=None):
    model = torch.nn.Linear(2, 3).double() if model is None else model
    data = msif.Examples(draw(6, 2, seed=1), torch.arange(6) % 3)
    start = {"weight": draw(3, 2, seed=2), "bias": torch.zeros(3).double()}
    head_of(model).load_state_dict(start)
    return msif.Pipeline([msif.Stage("only", model, data, weight_decay=0.1, loss=loss)])


QUERIES = msif.Examples(draw(2, 2, seed=3), torch.tensor([0, 1]))


def removals(pipeline, path, target="loss"):
    return msif.removal_effects(pipeline, QUERIES, [[0]], target=target, store=path, progress=False)


def require_refusals(folder, before, after, words):
    """A store and a saved pipeline of one pipeline are refused by the other, with what differs."""
    before.fit(progress=False).adopt().save(folder / "pipeline")
    removals(before, folder / "store")
    removals(before, folder / "store")  # the control: to the same it is open
    weights = head_of(before.stages[0].model).state_dict()
    for act in (
        lambda p: p.load(folder / "pipeline"),
        lambda p: removals(p.adopt(), folder / "store"),
    ):
        head_of(after.stages[0].model).load_state_dict(weights)
        with pytest.raises(msif.SavedFileError, match=words):
            act(after)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_function_is_refused(edit, notebook, tmp_path):
    asked, *change = EDITS[edit]
    outputs, labels = 1 + draw(4, 3, seed=9).abs(), torch.zeros(4, dtype=torch.int64)
    before, again = notebook(asked), notebook(asked)
    old = before(outputs, labels)  # what is in a module's globals stays there
    after = notebook(asked, *change)
    assert not torch.allclose(old, after(outputs, labels)), "the edit changes no number"
    require_refusals(tmp_path, pipeline_of(as_loss(before)), pipeline_of(as_loss(after)), "loss")
    plain = pipeline_of().fit(progress=False)
    removals(plain, tmp_path / "target", before)
    removals(plain, tmp_path / "target", again)
    with pytest.raises(msif.SavedFileError, match="target"):
        removals(plain, tmp_path / "target", after)


@pytest.mark.parametrize("edit", MODELS)
def test_an_edited_model_is_refused(edit, notebook, tmp_path):
    before, after = notebook(NET), notebook(NET, *MODELS[edit])
    after.head.load_state_dict(before.head.state_dict())
    x = draw(5, 2, seed=4)
    assert not torch.allclose(before(x), after(x)), "the edit changes no number"
    require_refusals(tmp_path, pipeline_of(model=before), pipeline_of(model=after), "stage 'only'")


@pytest.mark.parametrize("edit", HARMLESS)
def test_an_edit_without_effect_is_accepted(edit, notebook, tmp_path):
    asked, *change = HARMLESS[edit]
    before, after = notebook(asked), notebook(asked, *change)
    first = pipeline_of(as_loss(before)).fit(progress=False).adopt()
    first.save(tmp_path / "pipeline")
    kept = removals(first, tmp_path / "store", before)
    second = pipeline_of(as_loss(after)).load(tmp_path / "pipeline").adopt()
    again = removals(second, tmp_path / "store", after)
    assert torch.equal(again.values, kept.values)


def test_there_are_many_edits():
    assert len(EDITS) + len(MODELS) >= 40 and len(HARMLESS) >= 5

"""Functions are told apart by their code and what it uses: a store answers its own question."""

import subprocess
import sys
import types
from dataclasses import dataclass

import numpy
import pandas
import pytest
import torch

import msif_lab as msif
from msif_lab import fingerprints
from msif_lab.fingerprints import describe, same_by_name

SETTING = """
import functools, math
from math import exp
from dataclasses import dataclass
import numpy
import torch
from torch import nn
import helpers

SCALE = 2.0
TABLE = numpy.arange(5000)
CHOICE = {"a": 1, "b": [1, 2]}
WEIGHTS = torch.arange(3000.0)

def helper(z):
    return 2 * z

def through(z):
    return helper(z)

def closed(value):
    def f(z, y):
        return z[:, 0] * value
    return f

def decorated(g):
    @functools.wraps(g)
    def inner(z, y):
        return g(z, y) + 1
    return inner

class Plain:
    power = 2
    def __init__(self, scale=1.0):
        self.scale = scale
    def __call__(self, z, y):
        return self.inside(z) * self.scale
    def inside(self, z):
        return z[:, 0] ** self.power
    def method(self, z, y):
        return z[:, 0] * self.scale
    @staticmethod
    def static(z, y):
        return z[:, 1]
    @classmethod
    def by_class(cls, z, y):
        return z[:, 0] * cls.power
    @property
    def twice(self):
        return 2 * self.scale

class Derived(Plain):
    pass

class Slots:
    __slots__ = ("scale",)
    def __init__(self, scale):
        self.scale = scale
    def __call__(self, z, y):
        return z[:, 0] * self.scale

@dataclass
class Data:
    scale: float = 1.0
    def __call__(self, z, y):
        return z[:, 0] * self.scale

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(3))
    def forward(self, z, y):
        return (z * self.weight).sum(-1)

def recursive(z, y):
    return recursive(z, y) if len(z) else z

def target(z, y):
    return z[:, 0]
"""

# Each: what is asked, then what is replaced by what in the setting, so that the answer changes.
EDITS = {
    "index": ("target", "return z[:, 0]\n", "return z[:, 1]\n"),
    "operator": ("lambda z, y: through(z)", "return 2 * z", "return 2 + z"),
    "helper of a helper": ("lambda z, y: through(z)", "return 2 * z", "return 3 * z"),
    "other helper": ("lambda z, y: through(z)", "return helper(z)", "return math.exp(z)"),
    "other library function": (
        "lambda z, y: exp(z)",
        "import helpers",
        "from math import tan as exp",
    ),
    "global number": ("lambda z, y: SCALE * z", "SCALE = 2.0", "SCALE = 2.5"),
    "global in an inner function": (
        "lambda z, y: (lambda: SCALE * z)()",
        "SCALE = 2.0",
        "SCALE = 2.5",
    ),
    "one entry of a large array": ("lambda z, y: z * TABLE.sum()", "(5000)", "(5000) + 1 % 7"),
    "last entry of a large array": (
        "lambda z, y: z * TABLE.sum()",
        "TABLE = numpy.arange(5000)",
        "TABLE = numpy.append(numpy.arange(4999), 3)",
    ),
    "one entry of a large tensor": (
        "lambda z, y: z * WEIGHTS.sum()",
        "(3000.0)",
        "(3000.0).index_fill(0, torch.tensor([1500]), 0)",
    ),
    "entry of a dictionary": ("lambda z, y: z * CHOICE['a']", '"a": 1', '"a": 2'),
    "inside a nested list": ("lambda z, y: z * CHOICE['b'][1]", "[1, 2]", "[1, 3]"),
    "closed over value": ("closed(1)", "z[:, 0] * value", "z[:, 0] + value"),
    "closed over number": ("closed(SCALE)", "SCALE = 2.0", "SCALE = 2.5"),
    "closed over array": ("closed(TABLE)", "(5000)", "(5001)"),
    "closed over function": ("closed(helper)", "return 2 * z", "return 3 * z"),
    "closed over object": ("closed(Plain(SCALE))", "SCALE = 2.0", "SCALE = 2.5"),
    "default": ("functools.partial(lambda z, y, c=SCALE: z * c)", "SCALE = 2.0", "SCALE = 2.5"),
    "keyword default": ("lambda z, y, *, c=SCALE: z * c", "SCALE = 2.0", "SCALE = 2.5"),
    "partial": ("functools.partial(target, SCALE)", "SCALE = 2.0", "SCALE = 2.5"),
    "partial of an edited one": ("functools.partial(target)", "z[:, 0]\n", "z[:, 1]\n"),
    "decorator": ("decorated(target)", "g(z, y) + 1", "g(z, y) + 2"),
    "what is decorated": ("decorated(target)", "return z[:, 0]\n", "return z[:, 1]\n"),
    "cached": ("functools.lru_cache(target)", "return z[:, 0]\n", "return z[:, 1]\n"),
    "call of an object": ("Plain()", "self.inside(z) * self", "self.inside(z) + self"),
    "helper method": ("Plain()", "** self.power", "* self.power"),
    "class attribute": ("Plain()", "power = 2", "power = 3"),
    "attribute": ("Plain(SCALE)", "SCALE = 2.0", "SCALE = 2.5"),
    "default attribute": ("Plain()", "scale=1.0", "scale=1.5"),
    "bound method": ("Plain().method", "z[:, 0] * self.scale", "z[:, 1] * self.scale"),
    "self of a bound method": ("Plain(SCALE).method", "SCALE = 2.0", "SCALE = 2.5"),
    "static method": ("Plain.static", "return z[:, 1]", "return z[:, 2]"),
    "class method": ("Plain.by_class", "power = 2", "power = 3"),
    "property": ("Plain()", "2 * self.scale", "3 * self.scale"),
    "base class": ("Derived()", "** self.power", "* self.power"),
    "slots": ("Slots(SCALE)", "SCALE = 2.0", "SCALE = 2.5"),
    "call of an object with slots": ("Slots(1)", "z[:, 0] * self", "z[:, 2] * self"),
    "data class": ("Data()", "scale: float = 1.0", "scale: float = 1.5"),
    "call of a data class": ("Data()", "z[:, 0] * self", "z[:, 2] * self"),
    "forward of a module": ("Loss()", "z * self.weight", "z + self.weight"),
    "buffer of a module": ("Loss()", "torch.ones(3)", "torch.zeros(3)"),
    "recursion": ("recursive", "if len(z)", "if z.sum()"),
    "own module": ("lambda z, y: helpers.scale(z)", "HELPERS", "return z * 3"),
    "value in an own module": ("lambda z, y: z * helpers.FACTOR", "HELPERS", "FACTOR = 2"),
    "list of functions": ("closed([helper, target])", "return 2 * z", "return 3 * z"),
    "set": ("closed(frozenset(CHOICE['b']))", "[1, 2]", "[1, 3]"),
    "named arguments": ("target", "def target(z, y):", "def target(y, z):"),
}
HARMLESS = {
    "comment": ("target", "def target(z, y):\n", "def target(z, y):  # of the first class\n"),
    "layout": ("target", "    return z[:, 0]\n", "\n    return (z[:, 0])\n"),
    "docstring": (
        "target",
        "(z, y):\n    return z[:, 0]\n",
        "(z, y):\n    'd'\n    return z[:, 0]\n",
    ),
    "another function": ("target", "return 2 * z", "return 3 * z"),
    "an unused global": ("target", "SCALE = 2.0", "SCALE = 3.0"),
    "lines before": ("target", "SCALE = 2.0", "\n\n\nSCALE = 2.0"),
    "an attribute of the same name": ("lambda z, y: z.SCALE", "SCALE = 2.0", "SCALE = 3.0"),
    "other parts of an own module": ("lambda z, y: helpers.scale(z)", "HELPERS", "FACTOR = 2"),
    "docstring of a class": ("Plain()", "class Plain:", "class Plain:\n    'A class.'"),
}
HELPERS = "FACTOR = 1\ndef scale(z):\n    return z * 2\n"


def made(asked, before="", after=""):
    """What is asked for, evaluated in a notebook that holds the setting, edited."""
    source, own = SETTING, HELPERS
    if before == "HELPERS":
        own = own.replace(own.split("=")[0].strip() + " = 1", after) if "FACTOR" in after else own
        own = own if "FACTOR" in after else own.replace("return z * 2", after)
        assert own != HELPERS
    elif before:
        assert before in source
        source = source.replace(before, after)
    helpers = types.ModuleType("helpers")
    helpers.__file__ = "/somewhere/helpers.py"
    exec(own, helpers.__dict__)
    sys.modules["helpers"] = helpers
    notebook = {"__name__": "__main__"}
    exec(source, notebook)
    return eval(asked, notebook)


@pytest.fixture(autouse=True)
def no_module_left():
    yield
    sys.modules.pop("helpers", None)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_changes_answers_is_seen(edit):
    asked, before, after = EDITS[edit]
    assert describe(made(asked)) == describe(made(asked))
    assert describe(made(asked)) != describe(made(asked, before, after))


@pytest.mark.parametrize("edit", HARMLESS)
def test_an_edit_that_changes_nothing_is_not_refused(edit):
    asked, before, after = HARMLESS[edit]
    assert describe(made(asked)) == describe(made(asked, before, after))


def test_descriptions_are_the_same_in_another_process(tmp_path):
    """Other addresses, other hashes of strings, and code that was compiled or read from a file."""
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "setting.py").write_text(SETTING)
    asked = sorted({asked for asked, *_ in EDITS.values()})
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import setting\n"
        "from msif_lab.fingerprints import describe\n"
        f"print([describe(eval(a, vars(setting))) for a in {asked!r}])"
    )
    outputs = set()
    for seed in ("1", "2", "3"):  # from the second on the module comes from its .pyc
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert " at 0x" not in outputs.pop()


def test_what_packages_define_is_described_by_name():
    """Byte code changes with every Python and version: no saved file would be accepted again."""
    assert describe(msif.cross_entropy) == "msif_lab.cross_entropy"
    assert describe(torch.nn.functional.cross_entropy) == "torch.nn.functional.cross_entropy"
    code = msif.cross_entropy.__code__
    try:
        msif.cross_entropy.__code__ = code.replace(co_consts=(*code.co_consts, "edited"))
        assert describe(msif.cross_entropy) == "msif_lab.cross_entropy"
    finally:
        msif.cross_entropy.__code__ = code


@dataclass
class Cyclic:
    """An object that holds itself."""

    inside: object = None


def test_values_of_all_kinds_are_told_apart():
    table = pandas.DataFrame({"a": [1, 2]})
    point = types.SimpleNamespace
    different = [
        (table, pandas.DataFrame({"a": [1, 3]})),
        (numpy.float32(0.5), numpy.float64(0.5)),
        (numpy.array([None, 1]), numpy.array([None, 2])),
        (point(x=1), point(x=2)),
        ({1, 2}, {1, 3}),
        (b"a", b"b"),
        (range(3), range(4)),
        (msif.SGD(0.1, schedule=lambda i, n: 1.0), msif.SGD(0.1, schedule=lambda i, n: 0.5)),
        tuple(torch.nn.CrossEntropyLoss(label_smoothing=s) for s in (0.1, 0.2)),
    ]
    for one, other in different:
        assert describe(one) == describe(one)
        assert describe(one) != describe(other)
    ring = Cyclic()
    ring.inside = [ring]
    other = Cyclic()
    other.inside = [other]
    assert describe(ring) == describe(other)


def test_awkward_values_are_described_without_addresses():
    dates = [numpy.array([f"2020-01-0{day}"], "M8[D]") for day in (1, 2)]
    sparse = [(scale * torch.eye(3)).to_sparse() for scale in (1, 2)]
    tables = [{(lambda: 1): 1}, {(lambda: 2): 1}]
    for one, other in (dates, sparse, tables):
        assert describe(one) == describe(one) != describe(other)
        assert " at 0x" not in describe(one)


@pytest.mark.parametrize("place", ["site-packages", "dist-packages"])
def test_packages_are_known_wherever_they_are_installed(place, monkeypatch):
    """As by pip install --user, and where Debian has its own."""
    monkeypatch.setattr(fingerprints, "INSTALLED", ())
    module = types.ModuleType("somewhere")
    module.__file__ = f"/home/me/.local/lib/python3/{place}/somewhere/__init__.py"
    monkeypatch.setitem(sys.modules, "somewhere", module)
    exec("def loss(z, y):\n    return z[:, 0]", vars(module))
    module.loss.__module__ = "somewhere"
    assert describe(module.loss) == "somewhere.loss"
    assert "@" not in describe(torch.nn.CrossEntropyLoss())


def test_contents_of_another_python_or_of_version_010_are_compared_by_name():
    ours = describe(made("target"))
    assert "@311:" in ours or "@3" in ours
    assert not same_by_name(ours, ours.replace(":", ":0", 1)[:-1])
    assert same_by_name(ours, "target@39:0123456789ab")
    assert same_by_name(ours, "target#0123456789ab")
    assert not same_by_name(ours, "other#0123456789ab")
    assert not same_by_name("tensor#0123456789ab", "tensor#0123456789ac")

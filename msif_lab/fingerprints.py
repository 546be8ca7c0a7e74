"""Text that tells settings apart: functions by their code and what it uses, arrays by their bytes.

A file of results answers one question only, and belongs to one pipeline. Both are known by such
texts, which are the same in every process and so hold no addresses.
"""

import dataclasses
import dis
import enum
import functools
import hashlib
import logging
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

import joblib
import numpy
import torch

from .storage import digest

PACKAGE = __name__.partition(".")[0]
PYTHON = "{}{}".format(*sys.version_info)  # byte code differs between Pythons
CONTENT = re.compile(r"@(\d+):[0-9a-f]{12}")
FORMER_CONTENT = re.compile(r"(?<!tensor)#[0-9a-f]{12}")  # of version 0.1.0
INSTALLED = tuple(
    {os.path.realpath(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib")}
    | {os.path.realpath(sysconfig.get_path("platlib"))}
)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(thing) -> str:
    """Text that tells a setting from others; equal for equal ones made twice.

    What an installed package defines is described by its name (msif_lab's own by their public name,
    which stays when code moves). Other functions, in notebooks or modules of one's own, by name and
    content: code, defaults, the values they close over, and the globals that they use, helpers
    included. Objects are described by class, in the same way, and attributes.
    """
    return _Describer().text(thing)


def describe_modules(model: torch.nn.Module) -> str:
    """The code of one's own modules in a model, with their settings and all hooks; hashed.

    Weights and buffers are not in it, nor attributes that are objects of other kinds, as trainers
    and histories: settings are seen as numbers, arrays, functions, objects that are called, data
    classes and namespaces.
    """
    parts = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        parts += [describe([name, "hooks", hooks])] * bool(hooks)
        if not _installed(type(module).__module__):
            own = {k: v for k, v in vars(module).items() if not k.startswith("_") and _plain(v)}
            own.pop("training")
            parts.append(describe([name, type(module), own]))
    return _hashed(" ".join(parts)) if parts else ""


PLAIN = (int, float, complex, str, bytes, type(None), range, enum.Enum, torch.Tensor, torch.dtype)
PLAIN += (numpy.generic, types.FunctionType, types.BuiltinFunctionType, functools.partial)


def _plain(value, within: tuple = ()) -> bool:
    """Whether a value is made of numbers, text, tensors and functions alone.

    So are data classes and namespaces of these; what one's own classes make and can be called
    counts as a function.
    """
    if id(value) in within:
        return True
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, types.SimpleNamespace):
        parts = vars(value).values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    elif isinstance(value, numpy.ndarray):
        return value.dtype != object
    else:
        own = callable(value) and not _installed(type(value).__module__)
        return isinstance(value, PLAIN) or own
    return all(_plain(part, (*within, id(value))) for part in parts)


def _hashed(text: str) -> str:
    return f"@{PYTHON}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def same_by_name(left: str, right: str) -> bool:
    """Whether two descriptions are equal but for contents that cannot be compared.

    Those of another Python are in other byte code, and version 0.1.0 looked at less.
    """
    if {*CONTENT.findall(left)} == {*CONTENT.findall(right)} and not (
        FORMER_CONTENT.search(left) or FORMER_CONTENT.search(right)
    ):
        return left == right
    return _nameless(left) == _nameless(right)


def _nameless(text: str) -> str:
    return FORMER_CONTENT.sub("", CONTENT.sub("", text))


def _installed(module_name: str | None) -> bool:
    """Whether a module belongs to Python, to an installed package or to msif_lab itself."""
    if not module_name or module_name == "__main__":
        return False
    top = module_name.partition(".")[0]
    if top == PACKAGE or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None:  # compiled into Python, or made while it runs
        return getattr(sys.modules.get(module_name), "__spec__", None) is not None
    path = Path(os.path.normcase(os.path.realpath(file)))
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return any(path.is_relative_to(os.path.normcase(folder)) for folder in INSTALLED)


class _Describer:
    """One description; what comes up again is named by when it came up first."""

    def __init__(self):
        self.known: dict[int, int] = {}
        self.held: list = []  # so that no address is used twice

    def text(self, thing) -> str:
        """The description of a value."""
        simple = self._simple(thing)
        if simple is not None:
            return simple
        # Whether equal constants are one object depends on how the code came here.
        if not isinstance(thing, (tuple, frozenset, types.CodeType)):
            if id(thing) in self.known:
                return f"&{self.known[id(thing)]}"
            self.known[id(thing)] = len(self.known)
            self.held.append(thing)
        return self._compound(thing)

    def _simple(self, thing) -> str | None:
        """Of values without parts."""
        if isinstance(thing, torch.Tensor):
            dense = thing.to_dense() if thing.layout != torch.strided else thing
            return f"tensor#{digest(dense)[:12]}"
        if isinstance(thing, numpy.ndarray) and thing.dtype != object:
            sha = hashlib.sha256(f"{thing.dtype}{thing.shape}".encode())
            sha.update(numpy.ascontiguousarray(thing).tobytes())
            return f"array#{sha.hexdigest()[:12]}"
        if isinstance(thing, enum.Enum):
            own = not _installed(type(thing).__module__)
            return f"{thing}={describe(thing.value)}" if own else str(thing)
        if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, Path)):
            return repr(thing)
        if isinstance(thing, (torch.dtype, torch.device, range, torch.Size)):
            return repr(thing)
        if isinstance(thing, numpy.generic):
            return f"{thing.dtype} {thing.item()!r}"
        if isinstance(thing, logging.Logger):
            return f"logger {thing.name}"
        if isinstance(thing, types.ModuleType):
            return f"module {thing.__name__}"
        if isinstance(thing, types.BuiltinFunctionType) and not isinstance(
            thing.__self__, (types.ModuleType, type(None))
        ):
            return None  # a method of an object
        if isinstance(thing, (types.BuiltinFunctionType, types.MethodWrapperType)):
            return thing.__qualname__
        return None

    def _compound(self, thing) -> str:
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, types.CodeType):
            return self._code(thing)
        if isinstance(thing, (types.MethodType, types.BuiltinFunctionType)):
            owner = self.text(thing.__self__)
            function = getattr(thing, "__func__", None)
            name = thing.__name__ if function is None else self.text(function)
            return f"{name} of {owner}"
        if isinstance(thing, functools.partial):
            return f"partial{self.text([thing.func, thing.args, thing.keywords])}"
        if isinstance(thing, (staticmethod, classmethod)):
            return self.text(thing.__func__)
        if isinstance(thing, property):
            return self.text([thing.fget, thing.fset, thing.fdel])
        if isinstance(thing, type):
            return self._class(thing)
        if isinstance(thing, (list, tuple)):
            named = "" if type(thing) in (list, tuple) else type(thing).__qualname__
            return f"{named}[{', '.join(map(self.text, thing))}]"
        if isinstance(thing, (set, frozenset)):
            return f"{{{', '.join(sorted(map(describe, thing)))}}}"
        if isinstance(thing, (dict, types.MappingProxyType)):
            named = [(k if isinstance(k, str) else describe(k), v) for k, v in thing.items()]
            named.sort(key=lambda item: item[0])
            inside = ", ".join(f"{key}: {self.text(value)}" for key, value in named)
            return f"{{{inside}}}"
        return self._object(thing)

    def _object(self, thing) -> str:
        kind = type(thing)
        attributes = dict(getattr(thing, "__dict__", {}))
        for owner in kind.__mro__:
            slots = vars(owner).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                    attributes[name] = getattr(thing, name)
        try:
            inner = getattr(thing, "code", None)  # of what torch.jit has compiled
        except RuntimeError:  # as namespaces of torch say that they have none
            inner = None
        if isinstance(inner, str) and kind.__module__.startswith("torch"):
            attributes["code"] = inner
        if not attributes and _installed(kind.__module__):
            return self._opaque(thing)
        settings = ", ".join(f"{name}={self.text(value)}" for name, value in attributes.items())
        content = "" if _installed(kind.__module__) else _hashed(self.text(kind))
        return f"{kind.__qualname__}{content}({settings})"

    def _opaque(self, thing) -> str:
        """Of an object that a compiled package defines, as a table of pandas has inside."""
        try:
            return f"{type(thing).__qualname__}#{joblib.hash(thing)[:12]}"
        except Exception:  # whatever an object raises that cannot be pickled, as locks
            return ADDRESS.sub("", repr(thing))

    def _class(self, kind: type) -> str:
        """A class by name, or of one's own by name and what it and its bases define."""
        if _installed(kind.__module__):
            return kind.__qualname__
        parts = [base for base in kind.__mro__ if not _installed(base.__module__)]
        ignored = ("__module__", "__doc__", "__dict__", "__weakref__", "__firstlineno__")
        ignored += ("__static_attributes__", "__annotations_cache__")
        described = []
        for part in parts:
            own = {k: v for k, v in vars(part).items() if k not in ignored and k != "_abc_impl"}
            slots = [k for k, v in own.items() if isinstance(v, types.MemberDescriptorType)]
            described += [f"{k}={self.text(v)}" for k, v in own.items() if k not in slots]
        return f"{kind.__qualname__}{_hashed(' '.join(described))}"

    def _function(self, function: types.FunctionType) -> str:
        if _installed(function.__module__) and _found_by_name(function):
            module = function.__module__
            if module.partition(".")[0] == PACKAGE:
                exported = getattr(sys.modules[PACKAGE], function.__qualname__, None)
                module = PACKAGE if exported is function else module
            return f"{module}.{function.__qualname__}"
        parts = [self._code(function.__code__)]
        parts += map(self.text, (function.__defaults__, function.__kwdefaults__))
        parts += [self.text(value) for value in _closed_over(function)]
        parts += [f"{name}={self.text(value)}" for name, value in _globals_of(function)]
        kept = {k: v for k, v in vars(function).items() if k != "__wrapped__"}
        parts += [self.text(kept)] * bool(kept)
        return f"{function.__name__}{_hashed(' '.join(parts))}"

    def _code(self, code: types.CodeType) -> str:
        """Its steps with what they work on; not its docstring, which no step loads."""
        steps = [f"{step.opname} {self.text(step.argval)}" for step in dis.get_instructions(code)]
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        handlers = getattr(code, "co_exceptiontable", b"").hex()
        return f"{arguments} {code.co_flags} {steps} {handlers}"


def _found_by_name(function: types.FunctionType) -> bool:
    found = functools.reduce(
        lambda owner, name: getattr(owner, name, None),
        function.__qualname__.split("."),
        sys.modules.get(function.__module__),
    )
    return found is function


def _closed_over(function: types.FunctionType) -> Iterator:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            yield None


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """The globals that a function and those inside it use, by name.

    Of a module of one's own it is what is taken from it, ``helpers.scale``.
    """
    found: dict[str, object] = {}
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        value, name = None, ""
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                value, name = function.__globals__.get(step.argval), step.argval
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and _own_module(value):
                value, name = getattr(value, step.argval, None), f"{name}.{step.argval}"
            else:
                value, name = None, ""
            if name and name.partition(".")[0] in function.__globals__ and not _own_module(value):
                found[name] = value
    return iter(sorted(found.items()))


def _own_module(value) -> bool:
    return isinstance(value, types.ModuleType) and not _installed(value.__name__)

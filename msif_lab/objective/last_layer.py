"""Which layer feeds the loss, found by the model and not by what the layer is called.

A few examples go through the model, and the graph that autograd keeps of it is walked back from the
outputs to the first layers with a matrix of weights. What lies behind them are the features.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from ..data.examples import unequal
from ..data.randomness import States
from .exclusive import exclusive
from .objective import Objective

__all__ = ["LastLayer", "find_last_layer"]

FEW = 2  # examples that go through the model


@dataclass(frozen=True)
class LastLayer:
    """What turns a model's features into its outputs.

    Attributes:
        modules: names of the modules; several where the outputs are sums or rows of what several
            give, none where a parameter is used outside of a module's own call.
        parameters: names of the parameters.
    """

    modules: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()


@dataclass
class _Call:
    """A call of a module: whether a layer was called inside, its inputs and its outputs."""

    name: str
    inside: bool = False
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)


def find_last_layer(o: Objective) -> LastLayer:
    """The layer that feeds the loss of this stage.

    That is the last module with a matrix of weights that the outputs go through (`Linear`, but also
    a LoRA layer or a recurrent one), with what scales or shifts its results: a temperature, a
    bias, a norm. Of a head of several layers it is the last one only. Where the outputs are made
    by a parameter that no module's own call uses, as in ``F.linear(z, self.weight)``, it is the
    matrix nearest to the outputs, with the vectors beside it.

    A layer on which the features depend too is none, since no features could be had without it: a
    weight tied to the embedding, or a layer called again further down.

    Raises:
        Exception: whatever the model raises on its stage's data.
    """
    return o.once("last layer", lambda: _find(o))


@exclusive
def _find(o: Objective) -> LastLayer:
    few = unequal(o.data, FEW).to(o.data.x.device)
    named = o.layout.named(o.layout.flatten(o.model))
    leaves = {name: part.detach().requires_grad_() for name, part in named.items()}
    start = States(o.model.modules())
    try:
        with torch.enable_grad(), _recorded(o.model) as calls:
            outputs = o.on(o.data).outputs(leaves, o.data.x[few])
    finally:
        start.restore()
    if outputs.grad_fn is None:
        return LastLayer()
    names = {id(leaf): name for name, leaf in leaves.items()}
    made_by = {node: call for call in calls for node in call.outputs}
    depth = _depths([outputs.grad_fn], made_by)
    near = _used(depth, names, made_by)
    feeding = [made_by[node] for node in depth if node in made_by]
    matrices = [name for name in near if leaves[name].ndim > 1]
    if matrices:
        everywhere = _used(_depths([outputs.grad_fn]), names)
        return _outside_modules(matrices, near, everywhere, depth)
    return _of_modules(o.model, feeding, near, names)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[_Call]]:
    """The calls of layers, the innermost modules with a matrix of weights, as they return."""
    calls: list[_Call] = []
    under_way: list[_Call] = []
    hooks = []

    def watch(name: str, module: nn.Module, is_layer: bool) -> None:
        def enter(module, args, kwargs):
            under_way.append(_Call(name, inputs=_nodes((args, kwargs))))

        def leave(module, args, kwargs, results):
            call = under_way.pop()
            call.outputs = _nodes(results)
            if is_layer and not call.inside:
                calls.append(call)
            if under_way and (is_layer or call.inside):
                under_way[-1].inside = True

        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave, with_kwargs=True))

    for name, module in model.named_modules():
        if "parametrizations" not in name.split("."):  # which are called to make a layer's weight
            # A model that holds its parameters itself may be several layers.
            watch(name, module, _has_matrix(module) and bool(name or _is_a_layer(module)))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _is_a_layer(module: nn.Module) -> bool:
    """Whether this is one of PyTorch's layers, or made from one."""
    kinds = {kind.__module__ for kind in type(module).__mro__}
    kinds -= {"torch.nn.modules.module", "torch.nn.modules.container"}
    return any(kind.startswith("torch.nn.") for kind in kinds)


def _has_matrix(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    if "parametrizations" in module._modules:
        own += module.parametrizations.parameters()
    return any(p.ndim > 1 for p in own)


def _nodes(values: object) -> list[Node]:
    """Where in the graph the tensors among these values come from."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]


def _depths(roots: Iterable[Node], stops: Collection[Node] = ()) -> dict[Node, int]:
    """Nodes with their distance from the roots, nearest first; ``stops`` are not passed."""
    depths = dict.fromkeys(roots, 0)
    queue = list(depths)
    for node in queue:
        for before, _ in () if node in stops else node.next_functions:
            if before is not None and before not in depths:
                depths[before] = depths[node] + 1
                queue.append(before)
    return depths


def _used(
    depths: dict[Node, int], names: dict[int, str], stops: Collection[Node] = ()
) -> dict[str, set[Node]]:
    """The parameters among these nodes, nearest first, each with the nodes that use it."""
    used: dict[str, set[Node]] = {}
    for node in depths:
        for before, _ in () if node in stops else node.next_functions:
            name = names.get(id(getattr(before, "variable", None)))
            if name is not None:
                used.setdefault(name, set()).add(node)
    return used


def _outside_modules(
    matrices: list[str],
    near: dict[str, set[Node]],
    everywhere: dict[str, set[Node]],
    depth: dict[Node, int],
) -> LastLayer:
    """The matrices nearest to the outputs, with the same module's vectors after them."""

    def distance(name: str) -> int:
        return min(depth[node] for node in near[name])

    least = min(map(distance, matrices))
    nearest = {name for name in matrices if distance(name) == least}
    nearest = {name for name in nearest if everywhere[name] == near[name]}
    homes = {name.rpartition(".")[0] for name in nearest}
    vectors = [name for name in near if name not in matrices and distance(name) <= least]
    beside = {name for name in vectors if name.rpartition(".")[0] in homes}
    return LastLayer(parameters=frozenset(nearest | beside))


def _of_modules(
    model: nn.Module, feeding: list[_Call], near: Iterable[str], names: dict[int, str]
) -> LastLayer:
    """The modules whose calls the outputs are made of, unless the features depend on them too."""
    homes = {id(p): name for name, p in model.named_parameters()}  # a tied weight has one name
    modules = dict(model.named_modules())
    found: dict[str, set[str]] = {}
    for name in dict.fromkeys(call.name for call in feeding):
        behind = [node for call in feeding if call.name == name for node in call.inputs]
        own = {homes[id(p)] for p in modules[name].parameters()}
        if own.isdisjoint(_used(_depths(behind), names)):
            name = name.removesuffix(".base_layer")  # of peft, with the adapters beside it
            found[name] = {homes[id(p)] for p in modules[name].parameters()}
    if not found:
        return LastLayer()
    return LastLayer(tuple(found), frozenset().union(near, *found.values()))

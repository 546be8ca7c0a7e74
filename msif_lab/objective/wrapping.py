"""`wrap`, for models that take or return more than a tensor; wrappers of PyTorch and peft.

The latter share the weights of the module inside and put segments of their own into its names.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..fingerprints import describe

__all__ = ["Wrapped", "is_compiled", "plain_module", "seen_through", "wrap"]

HOLDERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
# What torch.compile, HOLDERS and peft add: a segment or two, each with the dot behind it.
ADDED = r"_orig_mod|module|base_model\.model|base_layer|modules_to_save\.[^.]+"


def plain_module(model: nn.Module) -> nn.Module:
    """The module inside the wrappers that share its weights, or the model itself.

    These are `torch.compile`, `DataParallel`, `DistributedDataParallel` and `AveragedModel`, one in
    the other as it may be.

    >>> from torch import nn
    >>> net = nn.Linear(3, 2)
    >>> plain_module(nn.DataParallel(net)) is net and plain_module(net) is net
    True
    """
    while isinstance(model, HOLDERS) or "_orig_mod" in model._modules:  # the latter is compiled
        model = model.module if isinstance(model, HOLDERS) else model._modules["_orig_mod"]
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` or ``module.compile()`` compiles some module of the model."""
    return any(m._compiled_call_impl or "_orig_mod" in m._modules for m in model.modules())


def seen_through(name: str) -> str:
    """A parameter's name, or a prefix that ends in a dot, without what wrappers add to it.

    >>> seen_through("base_model.model.body.0.base_layer.weight")
    'body.0.weight'
    >>> seen_through("body._orig_mod.0.bias"), seen_through("module.")
    ('body.0.bias', '')
    """
    return re.sub(rf"(?<![^.])(?:{ADDED})\.", "", name)


class Wrapped(nn.Module):
    """A module seen through ``call``; made by `wrap`.

    It is a view: parameters, buffers and submodules are the model's own, under the model's own
    names, so names in links, layers and saved files are those that the model has alone.
    """

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, object], Tensor]):
        super().__init__()
        # Not registered as a submodule, which would put a prefix before every name.
        self.__dict__["_Wrapped__model"] = model
        self.__call = call
        for members in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[members] = vars(model)[members]
        self.training = model.training

    @property
    def unwrapped(self) -> nn.Module:
        """The model itself."""
        return self.__model

    def forward(self, batch):
        return self.__call(self.__model, batch)

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        """The model's modules under its names, and the model itself under the name of this view."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield prefix, self.__model

    def train(self, mode: bool = True) -> "Wrapped":
        """Set training mode for the model too, which is no submodule."""
        self.__model.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{type(self.__model).__name__}, call={describe(self.__call)}"


def no_tensor(model: nn.Module, outputs) -> str:
    """What is wrong with outputs that are not one tensor (B, ...), and the way out, in words."""
    kind = type(outputs).__name__
    pick = ""
    if isinstance(outputs, Mapping):
        held = [name for name, value in outputs.items() if isinstance(value, Tensor)]
        pick = f" of {held}" + (f", such as m(...)[{held[0]!r}]" if held else "")
    elif isinstance(outputs, (tuple, list)):
        pick = f", one of its {len(outputs)} members such as m(...)[0]"
    elif isinstance(outputs, Tensor) and outputs.is_nested:
        kind = "a nested tensor"
        pick = ", with padding: torch.nested.to_padded_tensor(outputs, 0.0)"
    elif isinstance(outputs, Tensor):
        kind = "a single number"
        pick = ", the logits rather than the mean loss"
    wrapped = isinstance(model, Wrapped)
    called = "call(model, batch) of wrap" if wrapped else "the model"
    way_out = "let call return one" if wrapped else "use msif.wrap(model, call=...) to return one"
    return f"{called} returns {kind}, not a tensor (B, ...); {way_out}{pick}"


def wrap(model: nn.Module, call: Callable[[nn.Module, object], Tensor]) -> Wrapped:
    """A model that takes a dictionary, or returns more than a tensor, as one that a `Stage` takes.

    ``call(model, batch)`` calls it and returns the outputs ``(B, ...)`` that the loss is given.
    ``batch`` is a chunk of the examples' inputs: a dictionary of tensors where these are one, as in
    ``Examples({"input_ids": tokens, "attention_mask": mask}, y)``, else the tensor itself.
    Parameters keep their names, so `link.shared` reads as it would without the wrapper.

    A loss is given outputs and targets only. Where padding shall not count, mark it in the targets
    and leave it out of the loss::

        labels = tokens.masked_fill(mask == 0, -100)

        def language_loss(logits, labels):
            logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            return losses.sum(1) / (labels != -100).sum(1)  # -100 costs nothing by default

        data = msif.Examples({"input_ids": tokens, "attention_mask": mask}, labels)

    Args:
        model: any module; not copied. Call ``model.eval()``, as for every model with dropout.
        call: ``(model, batch) -> (B, ...)``. With a function that can be imported, unlike a lambda,
            the wrapped model can be pickled and its saved files name the function.

    Raises:
        TypeError: ``model`` is no module, or ``call`` no function.

    >>> import torch
    >>> pair = torch.nn.Bilinear(2, 3, 4)
    >>> wrapped = wrap(pair, call=lambda m, batch: m(batch["left"], batch["right"]))
    >>> [name for name, _ in wrapped.named_parameters()]
    ['weight', 'bias']
    >>> wrapped({"left": torch.zeros(5, 2), "right": torch.zeros(5, 3)}).shape
    torch.Size([5, 4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, not a torch.nn.Module")
    if not callable(call):
        raise TypeError(
            f"call={call!r} is no function (model, batch) -> outputs, "
            "such as lambda m, batch: m(**batch).logits"
        )
    return Wrapped(model, call)

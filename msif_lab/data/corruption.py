"""Data spoilt on purpose, with the truth: wrong labels, duplicates, foreign inputs, planted groups.

Every function leaves its arguments as they are. A ``fraction`` of N examples are exactly
``round(fraction * N)``, drawn by ``seed`` alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_instance, check_number, check_seed, check_whole, numbers_of, shown
from .examples import Examples
from .fields import Fields
from .inputs import Inputs

__all__ = ["Corrupted", "duplicate", "flip_labels", "out_of_distribution", "plant"]


class Corrupted(NamedTuple):
    """Spoilt data and the truth about them; unpacks as ``examples, truth = ...``.

    Attributes:
        examples: the data, spoilt.
        truth: mask ``(N,)`` on the CPU of the examples that were spoilt or added.

    >>> Corrupted(Examples([[0.0], [1.0]], [0, 1]), torch.tensor([True, False]))
    Corrupted(1 of 2 examples)
    """

    examples: Examples
    truth: Tensor

    def __repr__(self) -> str:
        return f"Corrupted({int(self.truth.sum())} of {len(self.truth)} examples)"


def flip_labels(
    examples: Examples,
    fraction: float,
    seed: int,
    *,
    transition: Mapping | Sequence[Sequence[float]] | Tensor | None = None,
) -> Corrupted:
    """Give some examples the label of another class.

    Args:
        examples: with class labels.
        fraction: share of *all* examples that get a wrong label, 0 to 1.
        seed: of the draws.
        transition: which label becomes which. None: any other class, each as likely. A dictionary
            from class to class, by name, such as ``{"cat": "dog", "dog": "cat"}``: only examples
            of its keys are flipped. A matrix ``(C, C)`` of the probabilities of the label j where
            the class is i, rows summing to 1: an example is flipped with chances in proportion to
            1 − T_ii, its new label drawn from the rest of its row; the ``fraction`` that T itself
            stands for is the mean of 1 − T_yy over the examples.

    Returns:
        `Corrupted`, with the same inputs and ids; ``truth`` is where the label is another one.

    Raises:
        TypeError, ValueError: no `Examples` with labels of at least two classes, an unknown class,
            a matrix of another shape or whose rows are no probabilities, or fewer examples that
            may be flipped than ``fraction`` asks for.

    >>> pairs = Examples([[0.0], [1.0], [2.0], [3.0]], ["cat", "dog", "cat", "owl"])
    >>> noisy, truth = flip_labels(pairs, 0.5, seed=0, transition={"cat": "dog"})
    >>> [noisy.classes[label] for label in noisy.y], truth.tolist()
    (['dog', 'dog', 'dog', 'owl'], [True, False, True, False])
    """
    count, generator = _drawing(examples, fraction, seed)
    chances = _transition(examples, transition)
    labels = examples.y.cpu()
    chances[range(len(chances)), range(len(chances))] = 0.0
    rates = chances.sum(1)[labels]
    possible = int((rates > 0).sum())
    if count > possible:
        raise ValueError(
            f"fraction={fraction} of {len(examples)} examples are {count}, but transition lets "
            f"only {possible} be flipped; give a fraction of at most {possible / len(examples):.4g}"
        )
    truth = torch.zeros(len(examples), dtype=torch.bool)
    if count:
        at = torch.multinomial(rates, count, generator=generator)
        labels = labels.clone()
        labels[at] = torch.multinomial(chances[labels[at]], 1, generator=generator)[:, 0]
        truth[at] = True
    return Corrupted(examples.with_labels(labels), truth)


def duplicate(examples: Examples, fraction: float, seed: int, *, copies: int = 1) -> Corrupted:
    """Add copies of some examples at the end.

    Args:
        examples: any.
        fraction: share of the examples that get copies, 0 to 1.
        seed: of the draws.
        copies: of each of them.

    Returns:
        `Corrupted` with ``N + copies * round(fraction * N)`` examples, of which ``truth`` marks the
        copies. Copy c of the example with id i has the id ``c * 10**k + i``, where k is the number
        of digits of the largest id: the last k digits say whose copy it is.

    Raises:
        TypeError, ValueError: no `Examples`, ``fraction`` is no share, negative ids, or ids too
            large for this scheme.

    >>> both, truth = duplicate(Examples([[0.0], [1.0], [2.0]], [0, 1, 1]), 0.34, seed=0, copies=2)
    >>> both.ids, truth
    (tensor([ 0,  1,  2, 10, 20]), tensor([False, False, False,  True,  True]))
    """
    count, generator = _drawing(examples, fraction, seed)
    copies = check_whole("copies", copies)
    step = _step(copies, examples)
    of = torch.randperm(len(examples), generator=generator)[:count].sort().values.repeat(copies)
    number = torch.arange(1, copies + 1).repeat_interleave(count)
    at = torch.cat([torch.arange(len(examples)), of]).to(examples.x.device)
    ids = torch.cat([examples.ids, examples.ids[of] + step * number])
    spoilt = examples._with(examples._pick(at), examples.y[at], ids)
    return Corrupted(spoilt, torch.arange(len(at)) >= len(examples))


def out_of_distribution(
    examples: Examples, other: Examples, fraction: float, seed: int
) -> Corrupted:
    """Replace the inputs of some examples by inputs of other data, under the labels they had.

    Args:
        examples: any in memory.
        other: where the new inputs are drawn from, each at most once; of the same shape and dtype.
        fraction: share of ``examples`` that are replaced, 0 to 1.
        seed: of the draws.

    Returns:
        `Corrupted`, with the same targets and ids; ``truth`` is where the input is a foreign one.

    Raises:
        TypeError, ValueError: no `Examples` with inputs in memory, inputs of another shape or
            dtype, or fewer of them in ``other`` than are wanted.

    >>> foreign = Examples([[7.0], [8.0]], [0, 1])
    >>> mixed, truth = out_of_distribution(Examples([[0.0], [1.0]], [0, 1]), foreign, 0.5, seed=1)
    >>> mixed.x[truth] >= 7, mixed.y, mixed.ids
    (tensor([[True]]), tensor([0, 1]), tensor([0, 1]))
    """
    count, generator = _drawing(examples, fraction, seed)
    _check_alike("other", other, examples)
    if count > len(other):
        raise ValueError(
            f"fraction={fraction} of {len(examples)} examples are {count}, but other holds only "
            f"{len(other)}; give more of them or a lower fraction"
        )
    at = torch.randperm(len(examples), generator=generator)[:count]
    chosen = torch.randperm(len(other), generator=generator)[:count]
    x = _replaced(examples.x, at, other.x[chosen.to(other.x.device)]) if count else examples.x
    return Corrupted(examples._with(x, examples.y, examples.ids), _mask(at, len(examples)))


def plant(
    examples: Examples,
    group: Tensor | Sequence | Examples,
    *,
    label=None,
    patch: Tensor | None = None,
) -> Corrupted:
    """Plant a group of examples that are wrong in the same way.

    Args:
        examples: any; for ``label`` with class labels, for ``patch`` images in memory.
        group: which of them, positions or a mask ``(N,)``; or other `Examples` of inputs alike, to
            be added at the end.
        label: the class, one of ``examples.classes``, that the whole group is given; or a
            dictionary from class to class, by name, for those of the group whose class is a key.
            Default: the labels they have, which must then be among ``examples.classes``.
        patch: pixels ``(h, w)`` or ``(C, h, w)`` put over the lower right corner of the images of
            the group: what a net can learn to tell the group by.

    Returns:
        `Corrupted`, whose ``truth`` is the group. Added examples have the ids ``10**k + i``, i
        their own id and k the number of digits of the largest id of both.

    Raises:
        TypeError, ValueError: an empty group, repeated or unknown positions, an unknown class, a
            patch larger than the images, or a group in which some would stay as they were.

    >>> train = Examples(torch.zeros(4, 1, 2, 2), [0, 1, 0, 1])
    >>> planted, truth = plant(train, [0, 2], label=1, patch=torch.ones(1, 1))
    >>> planted.y, planted.x[0, 0]
    (tensor([1, 1, 1, 1]), tensor([[0., 0.],
            [0., 1.]]))
    """
    check_instance("examples", examples, Examples)
    if isinstance(group, Examples):
        return _added(examples, group, label, patch)
    at = _positions(examples, group)
    spoilt, changed = examples, torch.zeros(len(at), dtype=torch.bool)
    if label is not None:
        y = examples.y.cpu().clone()
        y[at] = _relabelled(examples.y.cpu()[at], examples, label)
        changed = y[at] != examples.y.cpu()[at]
        spoilt = examples.with_labels(y)
    if patch is None and not bool(changed.all()):
        raise ValueError(
            f"group and label={shown(label)} leave {int((~changed).sum())} of the {len(at)} "
            "examples of the group as they are; give another label, a patch, or a group without "
            "them"
        )
    if patch is not None:
        x = _replaced(examples.x, at, _patched(examples._pick(at.to(examples.x.device)), patch))
        spoilt = spoilt._with(x, spoilt.y, spoilt.ids)
    return Corrupted(spoilt, _mask(at, len(examples)))


def _added(examples: Examples, group: Examples, label, patch) -> Corrupted:
    """``examples`` and after them ``group``, relabelled and patched."""
    _check_alike("group", group, examples)
    names, ours = group.classes or (), examples.classes or ()
    if not (examples.has_labels and group.has_labels):
        raise ValueError("examples and group need class labels, one integer per example")
    place = torch.tensor([ours.index(name) if name in ours else -1 for name in names])
    y = _relabelled(place[group.y.cpu()], examples, label)
    if bool((y < 0).any()):
        raise ValueError(
            f"group has the classes {group.counts()}, not all among {ours} of examples; name one "
            "of these for all by label="
        )
    more = group.x if patch is None else _patched(group.x, patch)
    ids = torch.cat([examples.ids, group.ids + _step(1, examples, group)])
    y = torch.cat([examples.y, y.to(examples.y.device)])
    spoilt = examples._with(_joined(examples.x, more), y, ids)
    return Corrupted(spoilt, torch.arange(len(ids)) >= len(examples))


def _drawing(examples, fraction, seed) -> tuple[int, torch.Generator]:
    """How many examples are spoilt, and what draws them."""
    check_instance("examples", examples, Examples)
    fraction = check_number("fraction", fraction, lambda f: 0 <= f <= 1, "a share from 0 to 1")
    count = round(fraction * len(examples))
    if fraction and not count:
        raise ValueError(
            f"fraction={fraction} of {len(examples)} examples is less than one; give at least "
            f"{1 / len(examples):.4g}, or 0 for none"
        )
    return count, _own_stream(check_seed("seed", seed))


def _own_stream(seed: int) -> torch.Generator:
    """Random numbers that no other use of the same seed has.

    With the plain generator of seed 0 the spoilt examples would be those to which torch.rand(N)
    under seed 0 gives the smallest numbers, and a random ranking would find all or none of them.
    """
    key = hashlib.sha256(f"msif_lab corruption {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))


def _transition(examples: Examples, transition) -> Tensor:
    """Probabilities ``(C, C)``, in float64, of the label j where the class is i."""
    classes = examples.classes
    if not examples.has_labels or len(classes) < 2:
        raise ValueError(
            f"examples hold {'the one class ' + str(classes) if classes else 'no class labels'}; "
            "labels are flipped among two or more classes: Examples(x, y, classes=(...))"
        )
    size = len(classes)
    if transition is None:
        return (1 - torch.eye(size, dtype=torch.float64)) / (size - 1)
    if isinstance(transition, Mapping):
        chances = torch.eye(size, dtype=torch.float64)
        for old, new in _pairs("transition", transition, classes):
            chances[old, old], chances[old, new] = 0.0, 1.0
        return chances
    what = f"a dictionary from class to class, or a matrix ({size}, {size}) of probabilities"
    chances = numbers_of("transition", transition, what, torch.float64).cpu().clone()
    if chances.shape != (size, size):
        raise ValueError(f"transition={shown(transition)} must be {what}")
    sums = chances.sum(1)
    if not bool((chances >= 0).all()) or not bool(((sums - 1).abs() < 1e-6).all()):
        raise ValueError(
            f"transition={shown(transition)} must hold probabilities, of which each row sums to 1; "
            f"its rows sum to {[round(total, 4) for total in sums.tolist()]}"
        )
    return chances


def _pairs(name: str, mapping: Mapping, classes: tuple) -> list[tuple[int, int]]:
    """Old and new label of a dictionary from class to class."""
    known = all(c in classes for pair in mapping.items() for c in pair)
    if not mapping or not known or any(old == new for old, new in mapping.items()):
        raise ValueError(f"{name}={shown(mapping)} must lead from classes to others of {classes}")
    return [(classes.index(old), classes.index(new)) for old, new in mapping.items()]


def _relabelled(y: Tensor, examples: Examples, label) -> Tensor:
    """Labels as ``label`` of `plant` wants them."""
    if label is None:
        return y
    if not examples.has_labels:
        raise ValueError(f"label={shown(label)} needs class labels, but y is {examples.y.dtype}")
    if isinstance(label, Mapping):
        new = y.clone()
        for old, wanted in _pairs("label", label, examples.classes):
            new[y == old] = wanted
        return new
    if label not in examples.classes:
        raise ValueError(f"label={shown(label)} must be one of {examples.classes}")
    return torch.full_like(y, examples.classes.index(label))


def _positions(examples: Examples, group) -> Tensor:
    """Different positions ``(K,)`` from positions or a mask."""
    what = "positions, a mask with one entry per example, or other Examples to add"
    at = numbers_of("group", group, what).cpu()
    if at.dtype == torch.bool and at.shape == (len(examples),):
        at = at.nonzero()[:, 0]
    whole = at.ndim == 1 and at.dtype in (torch.int64, torch.int32) and len(at) > 0
    if not whole or int(at.min()) < 0 or int(at.max()) >= len(examples):
        raise ValueError(
            f"group={shown(group)} must be {what}: at least one position from 0 to "
            f"{len(examples) - 1}"
        )
    if len(at.unique()) < len(at):
        raise ValueError(f"group={shown(group)} must name each position once")
    return at.long()


def _patched(x, patch) -> Tensor:
    """Images with ``patch`` over their lower right corners."""
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise ValueError("patch needs images (N, C, H, W) in memory; leave it out for other inputs")
    patch = numbers_of("patch", patch, "pixels (h, w) or (C, h, w)", x.dtype).to(x.device)
    channels, height, width = x.shape[1:]
    shape = (channels, *patch.shape)[-3:]
    plane = patch.ndim in (2, 3) and shape[0] == channels and patch.numel() > 0
    if not plane or shape[1] > height or shape[2] > width:
        raise ValueError(
            f"patch={shown(patch)} must be pixels (h, w) or ({channels}, h, w) that fit into "
            f"images of {height} × {width}"
        )
    x = x.clone()
    x[..., height - shape[1] :, width - shape[2] :] = patch
    return x


def _check_alike(name: str, other, examples: Examples) -> None:
    """Refuse inputs that cannot stand among those of ``examples``."""
    check_instance(name, other, Examples)
    if any(isinstance(e.x, Inputs) for e in (examples, other)):
        raise TypeError(
            f"examples and {name} must be in memory, not read when needed: "
            "x, y = zip(*examples); Examples(list(x), list(y), examples.ids)"
        )
    ours, theirs = _form(examples.x), _form(other.x)
    if ours != theirs:
        raise ValueError(
            f"{name} has inputs {shown(theirs)}, examples {shown(ours)}; bring them to one shape "
            f"and dtype: {name}.to(dtype)"
        )


def _form(x: Tensor | Fields):
    """Shape and dtype of one input, by field where there are several."""
    if isinstance(x, Fields):
        return {name: _form(values) for name, values in x.items()}
    return tuple(x.shape[1:]), x.dtype


def _joined(x: Tensor | Fields, more: Tensor | Fields) -> Tensor | Fields:
    """Inputs, and after them those of another data set."""
    if isinstance(x, Fields):
        return Fields({name: _joined(values, more[name]) for name, values in x.items()})
    return torch.cat([x, more.to(x.device)])


def _replaced(x: Tensor | Fields, at: Tensor, new: Tensor | Fields) -> Tensor | Fields:
    """Inputs with ``new`` ones at these positions."""
    rows = torch.arange(len(x))
    rows[at] = len(x) + torch.arange(len(at))
    return _joined(x, new)[rows.to(x.device)]


def _step(copies: int, *parts: Examples) -> int:
    """A power of ten above every id; multiples of it are added to ids of ``copies`` additions."""
    lowest = min(int(part.ids.min()) for part in parts)
    highest = max(int(part.ids.max()) for part in parts)
    step = 10 ** len(str(highest))
    if lowest < 0 or step * (copies + 1) >= 2**63:
        raise ValueError(
            f"ids from {lowest} to {highest} leave no room for those of additions, which are a "
            "power of ten above them; number the examples from 0: Examples(x, y)"
        )
    return step


def _mask(at: Tensor, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[at] = True
    return mask

"""Which parameters a stage takes over from the stage before, by their names in both models."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..objective.checks import check_examples
from ..objective.last_layer import find_last_layer
from ..objective.objective import Objective
from ..objective.wrapping import seen_through

__all__ = ["Shared", "buffer_pairs", "left_out", "shared_parameters", "summary"]

Shared = str | Sequence[str] | Mapping[str, str] | Callable[[str], bool] | None
Names = Mapping[str, object]  # parameters or buffers by name

SHOWN = 4  # names or groups of names that a message lists


def shared_parameters(shared: Shared, before: Objective, after: Objective) -> dict[str, str]:
    """``{name here: name in the stage before}`` of what a stage takes over, in its own order.

    Args:
        shared: see `Frozen`.
        before, after: the two stages.

    Raises:
        ValueError, TypeError: nothing is shared, unknown names, different shapes, or, unless every
            name is given, parameters that look like ones of the stage before under another name.
    """
    ours, theirs = after.layout.shapes, before.layout.shapes
    offered = _partners(theirs, ours)
    if shared is None:
        pairs = _by_default(offered, before, after)
    elif isinstance(shared, Mapping):
        pairs = _by_mapping(shared, before, after)
    else:
        pairs = {n: offered[n] for n in _chosen(shared, list(offered), after.where)}
    if not pairs:
        last = "" if shared is not None else "outside the last layer, which '' takes too, "
        raise ValueError(
            f"{after.where}: no parameter is shared with {before.where} (shared={shared!r}); "
            f"parameters of both models: {list(offered) or 'none'}; give equal names and shapes "
            f"{last}or shared=a prefix, a list, or a function of the name, or a mapping "
            "{name here: name there}"
        )
    for here, there in pairs.items():
        if theirs[there] != ours[here]:
            name = repr(here) if here == there else f"{here!r} (there {there!r})"
            raise ValueError(
                f"{after.where}: shared parameter {name} has shape {tuple(ours[here])} here "
                f"but {tuple(theirs[there])} in the previous stage; leave it out of shared="
            )
    return {name: pairs[name] for name in ours if name in pairs}


def left_out(after: Objective) -> set[str]:
    """The parameters that are not shared by default: the last layer, and all of a ``head``."""
    try:
        last = find_last_layer(after).parameters
    except Exception as error:  # whatever a model raises on data that do not fit it
        check_examples(after, after.data, f"{after.where} data")
        raise ValueError(
            f"{after.where}: which layer feeds the loss cannot be told "
            f"({type(error).__name__}: {error}); say what is taken over: shared=a prefix or a list"
        ) from error
    heads = {n for n in after.layout.shapes if seen_through(n).split(".")[0] == "head"}
    return last | heads


def _partners(theirs: Names, ours: Names) -> dict[str, str]:
    """Each name here with the one there that is the same, if need be seen through wrappers."""
    pairs = {name: name for name in ours if name in theirs}
    here, there = (_plainly(n for n in names if n not in pairs) for names in (ours, theirs))
    pairs |= {here[plain]: there[plain] for plain in here if plain in there}
    return {name: pairs[name] for name in ours if name in pairs}


def _plainly(names: Iterable[str]) -> dict[str, str]:
    """The names by what they are seen through wrappers, where that is a single one's."""
    names = list(names)
    count = Counter(map(seen_through, names))
    return {seen_through(name): name for name in names if count[seen_through(name)] == 1}


def _chosen(shared: Shared, offered: list[str], where: str) -> list[str]:
    """The names that a prefix, a function or a list picks among those of both models."""
    if isinstance(shared, str):
        return list(_behind(shared, offered))
    if callable(shared):
        return [n for n in offered if shared(n)]
    if not isinstance(shared, Iterable):
        raise TypeError(
            f"{where}: shared={shared!r} must be None, a prefix, a list of names, a mapping "
            "{name here: name there}, or a function of the name"
        )
    if unknown := [n for n in shared if n not in offered]:
        raise ValueError(
            f"{where}: shared names {unknown} are not parameters of both models; those are "
            f"{offered}"
        )
    return [n for n in offered if n in set(shared)]


def _by_default(offered: dict[str, str], before: Objective, after: Objective) -> dict[str, str]:
    """Every equal name and shape but the last layer's, if that leaves no doubt."""
    ours, theirs = after.layout.shapes, before.layout.shapes
    apart = left_out(after)
    alike = {here: there for here, there in offered.items() if ours[here] == theirs[there]}
    pairs = {here: there for here, there in alike.items() if here not in apart}
    _refuse_lost_adapters(pairs, before, after)
    free = [n for n in ours if n not in pairs and n not in apart]
    lost = [n for n in theirs if n not in pairs.values()]
    if found := _look_alikes(pairs, free, lost, before, after):
        _ask(found, pairs, before, after)
    return pairs


def _ask(found: dict[str, str], pairs: dict[str, str], before: Objective, after: Objective) -> None:
    """Refuse to guess whether parameters under other names are the same ones."""
    every = {name: (pairs | found)[name] for name in after.layout.shapes if name in pairs | found}
    without = _prefixes(pairs, before, after, found)
    otherwise = f", or all but them by shared={without}" if pairs else ""
    shown = [f"{here!r} (there {there!r})" for here, there in found.items()]
    raise ValueError(
        f"{after.where}: {_some(shown)} of equal shape may be parameters of {before.where} under "
        "other names, and would start afresh; take them over by "
        f"shared={_prefixes(every, before, after)}{otherwise}"
    )


def _look_alikes(
    pairs: dict[str, str],
    free: Sequence[str],
    lost: Sequence[str],
    before: Objective,
    after: Objective,
) -> dict[str, str]:
    """Parameters here without partner, each with one there of the same shape and a similar name.

    Similar are also names that differ beyond a change of prefix which other parameters show. The
    last layer there counts only where all of its name is the end of the other.

    Args:
        pairs: what is known to be the same.
        free, lost: the names here and there that may have a partner.
    """
    found: dict[str, str] = {}
    for _ in range(2):  # what is found first shows how prefixes change
        prefixes = _renamed(pairs | found)
        names = {n: _renaming(n, prefixes) or n for n in free if n not in found}
        found |= _most_similar(names, [n for n in lost if n not in found.values()], before, after)
    return {name: found[name] for name in after.layout.shapes if name in found}


def _most_similar(
    names: Mapping[str, str], lost: Iterable[str], before: Objective, after: Objective
) -> dict[str, str]:
    """Pairs of equal shape, most similar first; ``names`` by what they may be called there."""
    ours, theirs = after.layout.shapes, before.layout.shapes
    by_shape: dict[torch.Size, list[tuple[str, list[str]]]] = {}
    for name in lost:
        by_shape.setdefault(theirs[name], []).append((name, seen_through(name).split(".")))
    scores = []
    for here, name in names.items():
        parts = seen_through(name).split(".")
        for there, others in by_shape.get(ours[here], ()):
            common, wrapped = _likeness(parts, others)
            if common:
                scores.append((wrapped, common, here, there))
    last = left_out(before) if scores else set()
    found: dict[str, str] = {}
    for wrapped, _, here, there in sorted(scores, key=lambda score: score[:2], reverse=True):
        if here not in found and there not in found.values() and (wrapped or there not in last):
            found[here] = there
    return found


def _likeness(left: list[str], right: list[str]) -> tuple[int, bool]:
    """How many segments two names have in common, or 0; whether one is the end of the other."""

    def equal(pairs: Iterable[tuple[str, str]]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    short, long = sorted((len(left), len(right)))
    end = equal(zip(reversed(left), reversed(right), strict=False))
    start = min(equal(zip(left, right, strict=False)), short - end)
    one_differs = start + end > 0 and long - start - end <= 1
    wrapped = end == short
    return (start + end if wrapped or end > 1 or one_differs else 0), wrapped


def _refuse_lost_adapters(pairs: dict[str, str], before: Objective, after: Objective) -> None:
    """Refuse to take over layers without the adapters that the stage before has beside them."""
    lost = []
    for there in pairs.values():
        layer, base, _ = there.rpartition(".base_layer.")
        beside = [n for n in before.layout.shapes if base and n.startswith(f"{layer}.")]
        lost += [n for n in beside if n not in pairs.values() and ".base_layer." not in n]
    if lost := list(dict.fromkeys(lost)):
        raise ValueError(
            f"{after.where}: {_some(map(repr, lost))}, which {before.where} has beside a "
            "base_layer that is taken over, have no place in this model, so what they learned "
            "would be lost; give this stage the same adapters, or take over the rest knowingly by "
            f"shared={_prefixes(pairs, before, after)}"
        )


# ---- Mappings ----


def _by_mapping(shared: Mapping[str, str], before: Objective, after: Objective) -> dict[str, str]:
    """The pairs that a mapping names: exact names first, then the longest prefix."""
    if strange := [item for item in shared.items() if not all(isinstance(n, str) for n in item)]:
        raise ValueError(f"{after.where}: shared= maps names to names, not {_some(strange)}")
    exact = {k: v for k, v in shared.items() if not (_is_prefix(k) and _is_prefix(v))}
    prefixes = sorted(shared.keys() - exact.keys(), key=len, reverse=True)
    pairs = _exact_pairs(exact, before, after)
    for prefix in prefixes:
        reached = _under(prefix, shared[prefix], before, after)
        if not reached:
            raise ValueError(
                f"{after.where}: shared={{{prefix!r}: {shared[prefix]!r}}} reaches no parameter "
                f"of both models; here are {_some(after.layout.shapes)}, in {before.where} "
                f"{_some(before.layout.shapes)}; a prefix ends in a dot on both sides or is ''"
            )
        pairs = reached | pairs
    if twice := [there for there, count in Counter(pairs.values()).items() if count > 1]:
        here = [name for name, there in pairs.items() if there == twice[0]]
        raise ValueError(
            f"{after.where}: shared= maps {' and '.join(map(repr, here))} to one parameter "
            f"{twice[0]!r} of {before.where}; map one of them, and leave the other out"
        )
    free = {n for p in prefixes for n in _behind(p, after.layout.shapes)} - pairs.keys()
    lost = {n for p in prefixes for n in _behind(shared[p], before.layout.shapes)}
    free -= left_out(after) if free else set()
    if found := _look_alikes(pairs, sorted(free), sorted(lost - {*pairs.values()}), before, after):
        raise ValueError(
            f"{after.where}: shared={dict(shared)} leaves out parameters that look the same; add "
            f"{found}, or name what is shared one by one instead of by prefixes"
        )
    return pairs


def _exact_pairs(exact: Mapping[str, str], before: Objective, after: Objective) -> dict[str, str]:
    pairs, unknown = {}, []
    for name, partner in exact.items():
        here, there = _find(name, after.layout.shapes), _find(partner, before.layout.shapes)
        unknown += [f"{name!r} here"] if here is None else []
        unknown += [f"{partner!r} in {before.where}"] if there is None else []
        pairs[here] = there
    if unknown:
        raise ValueError(
            f"{after.where}: shared= names no parameter by {_some(unknown)}; here are "
            f"{list(after.layout.shapes)}, in {before.where} {list(before.layout.shapes)}; a "
            "prefix ends in a dot on both sides or is ''"
        )
    return pairs


def _is_prefix(name: str) -> bool:
    return not name or name.endswith(".")


def _find(name: str, names: Names) -> str | None:
    """The name as it is, or seen through wrappers."""
    return name if name in names else _plainly(names).get(seen_through(name))


def _behind(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """The names with this prefix, each with what follows it; as they are, or seen through."""
    names = list(names)
    found = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
    if found or not seen_through(prefix):  # which would be all names
        return found
    plain, start = {name: seen_through(name) for name in names}, seen_through(prefix)
    return {n: name[len(start) :] for n, name in plain.items() if name.startswith(start)}


def _under(here: str, there: str, before: Objective, after: Objective) -> dict[str, str]:
    """The pairs of names that differ in their prefixes ``here`` and ``there`` only."""
    theirs, plainly = before.layout.shapes, _plainly(before.layout.shapes)
    pairs = {}
    for name, rest in _behind(here, after.layout.shapes).items():
        same = there + rest
        partner = same if same in theirs else plainly.get(seen_through(same))
        if partner is not None:
            pairs[name] = partner
    return pairs


def _prefixes(
    pairs: Mapping[str, str],
    before: Objective,
    after: Objective,
    apart: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """A mapping that gives exactly these pairs, by prefixes that no pair of ``apart`` has."""
    apart = (apart or {}).items()
    mapping: dict[str, str] = {}
    done: set[str] = set()
    for name, partner in pairs.items():
        if name in done:
            continue
        here, there = name.split("."), partner.split(".")
        end = 0
        while end < min(len(here), len(there)) and here[-1 - end] == there[-1 - end]:
            end += 1
        for kept in range(end, 0, -1):  # the longest common end leaves the shortest prefixes
            left, right = ("".join(f"{s}." for s in parts[:-kept]) for parts in (here, there))
            reached = _under(left, right, before, after)
            exactly = name in reached and reached.items() <= pairs.items() and left not in mapping
            if exactly and not any(h.startswith(left) and t.startswith(right) for h, t in apart):
                mapping[left] = right
                done |= reached.keys()
                break
        else:
            mapping[name] = partner
    return mapping


def buffer_pairs(pairs: Mapping[str, str], before: Objective, after: Objective) -> dict[str, str]:
    """The buffers of both models, by the prefixes in which the shared parameters' names differ."""
    prefixes, plainly = _renamed(pairs), _plainly(before.buffers)
    found = {}
    for name in after.buffers:
        same = _renaming(name, prefixes)
        partner = same if same in before.buffers else plainly.get(seen_through(same or ""))
        if same is not None and partner is not None:
            found[name] = partner
    return found


def _renamed(pairs: Mapping[str, str]) -> list[tuple[str, str]]:
    """The prefixes by which the two names of each pair differ, (here, there), longest first."""
    found = set()
    for name, partner in pairs.items():
        if seen_through(name) == seen_through(partner):
            found.add(("", ""))
            continue
        here, there = name.split("."), partner.split(".")
        while here and there and here[-1] == there[-1]:
            here.pop()
            there.pop()
        found.add(tuple("".join(f"{s}." for s in parts) for parts in (here, there)))
    return sorted(found, key=lambda prefixes: len(prefixes[0]), reverse=True)


def _renaming(name: str, prefixes: Sequence[tuple[str, str]]) -> str | None:
    """A name here as it is there, or None where no prefix says how."""
    return next(
        (there + name[len(here) :] for here, there in prefixes if name.startswith(here)), None
    )


# ---- Words ----


def summary(
    pairs: Mapping[str, str], apart: Iterable[str], before: Objective, after: Objective
) -> str:
    """What is shared, and what is ``apart`` as the last layer, in a few words."""
    every = after.layout.shapes
    count = sum(every[name].numel() for name in pairs)
    same = all(seen_through(here) == seen_through(there) for here, there in pairs.items())
    mapping = {} if same else _prefixes(pairs, before, after)
    renamed = [f"{_group(here)} from {_group(there)}" for here, there in mapping.items()]
    names = _some(renamed or _groups(pairs, every))
    apart = _some(_groups(apart, every))
    last = f", not {apart}" if apart else ""
    return f"shares {count} parameters ({names}) with {before.where.removeprefix('stage ')}{last}"


def _group(name: str) -> str:
    return f"{name}*" if _is_prefix(name) else name


def _groups(names: Iterable[str], every: Iterable[str], start: str = "") -> list[str]:
    """Names among ``every``, those that make up all under a prefix as ``prefix.*``."""
    names, every = set(names), list(every)
    if names.issuperset(every):
        return [f"{start}*" if every != [start[:-1]] else start[:-1]]
    found = []
    for part in dict.fromkeys(name[len(start) :].split(".")[0] for name in every):
        deeper = f"{start}{part}."
        inside = [n for n in every if n.startswith(deeper) or n == deeper[:-1]]
        if not names.isdisjoint(inside):
            found += _groups(names.intersection(inside), inside, deeper)
    return found


def _some(items: Iterable[object]) -> str:
    items = [str(item) for item in items]
    more = [f"... {len(items)} in all"] if len(items) > SHOWN else []
    return ", ".join(items[:SHOWN] + more)

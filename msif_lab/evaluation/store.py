"""Finished removals in a file that several calls and processes may share."""

import hashlib
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SavedFileError
from ..storage import check_writable, locked, read_tensors, remove_debris, valid, write_tensors

KIND = "removals"


def group_digests(groups: Sequence[Sequence[int]]) -> Tensor:
    """What each group is known by, whatever the order of its members, uint8 ``(R, 32)``."""
    rows = []
    for group in groups:
        members = torch.tensor(sorted(group), dtype=torch.int64)
        rows.append(list(hashlib.sha256(members.numpy().tobytes()).digest()))
    return torch.tensor(rows, dtype=torch.uint8)


@dataclass
class Results:
    """What retraining without K groups gave.

    Attributes:
        groups: what each is known by ``(K, 32)``.
        after: ``(Q, K)``, q after each removal.
        norms: ``(K,)``, largest ``‖∇F‖`` over the stages.
        short: ``(K,)``, which of them missed a tolerance.
    """

    groups: Tensor
    after: Tensor
    norms: Tensor
    short: Tensor

    def __post_init__(self):
        count = len(self.groups)
        shapes = [tuple(t.shape) for t in (self.groups, self.norms, self.short)]
        if shapes != [(count, 32), (count,), (count,)] or self.after.shape[1:] != (count,):
            raise ValueError("the results have other shapes than the groups")
        if not bool(torch.isfinite(self.after).all()):
            raise ValueError("the results hold NaN or inf")

    def places(self, groups: Tensor) -> Tensor:
        """Where groups (R, 32) are among these, −1 where they are not, ``(R,)``."""
        known = {bytes(row): i for i, row in enumerate(self.groups.tolist())}
        places = [known.get(bytes(row), -1) for row in groups.tolist()]
        return torch.tensor(places, dtype=torch.int64)

    def joined(self, others: "Results") -> "Results":
        """These, and those of the others' groups that are not among them."""
        new = others.places(others.groups)[self.places(others.groups) < 0]
        return Results(
            torch.cat([self.groups, others.groups[new]]),
            torch.cat([self.after, others.after[:, new]], 1),
            torch.cat([self.norms, others.norms[new]]),
            torch.cat([self.short, others.short[new]]),
        )


class RemovalStore:
    """The retrainings of a call that are done, in memory and, if there is a path, in a file.

    The file keeps every group that any call has removed, of one pipeline, stage, target and set of
    queries. Processes that share it add to it, and find what the others have added.

    Args:
        path: of the file, or None.
        about: what the results are of, JSON-able; a file must agree in all of it.
        groups: of the call.
        measure: gives ``base``, unless the file holds it.
        former_key: what 0.1.0 knew the same call by.

    Attributes:
        base: ``(Q,)``, q with nobody removed.

    Raises:
        SavedFileError: the file is of something else, or damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        about: dict,
        groups: Sequence[Sequence[int]],
        measure: Callable[[], Tensor],
        former_key: Callable[[], str],
    ):
        self.path = None if path is None else Path(path)
        self.about, self.wanted = about, group_digests(groups)
        self.former_key = former_key
        self.base: Tensor | None = None
        self.results: Results | None = None
        if self.path is not None:
            check_writable(self.path)
            with locked(self.path):
                remove_debris(self.path, alone=True)
                self._read()
        if self.base is None:
            self.base = measure()
        if self.results is None:
            none = torch.zeros(0, dtype=torch.float64)
            after = none.reshape(1, 0).expand(len(self.base), 0)
            self.results = Results(self.wanted[:0], after, none, torch.zeros(0, dtype=torch.bool))

    def missing(self) -> Tensor:
        """Which groups of the call are still to do, each once."""
        first: dict[bytes, int] = {}
        for i, row in enumerate(self.wanted.tolist()):
            first.setdefault(bytes(row), i)
        left = self.results.places(self.wanted) < 0
        return torch.tensor([i for i in first.values() if left[i]], dtype=torch.int64)

    def add(self, part: Tensor, after: Tensor, norms: Tensor, short: Tensor) -> None:
        """Keep the results of the call's groups ``part``, beside those that others have added."""
        fine = torch.isfinite(after).all(0)
        new = Results(self.wanted[part[fine]], after[:, fine], norms[fine], short[fine])
        self.results = self.results.joined(new)
        if self.path is not None:
            with locked(self.path):
                self._read()
                tensors = {"base": self.base} | vars(self.results)
                write_tensors(self.path, KIND, tensors, {"about": self.about})
        if not bool(fine.all()):
            raise ValueError(
                f"retraining without the groups {part[~fine].tolist()[:8]} of subsets gives NaN or "
                f"inf on some queries; leave these groups out; {self.state()}"
            )

    def state(self) -> str:
        """What is done and where it is kept, in words."""
        count = len(self.wanted)
        done = f"{int((self.results.places(self.wanted) >= 0).sum())} of {count} removals are done"
        if self.path is None:
            return f"{done} and lost; give store= to keep them"
        return f"{done} and kept in store={str(self.path)!r}: call again to go on"

    def all(self) -> Results:
        """The results of the call's groups, in their order."""
        at = self.results.places(self.wanted)
        r = self.results
        return Results(self.wanted, r.after[:, at], r.norms[at], r.short[at])

    def _read(self) -> None:
        """Take over what the file holds, if there is one."""
        try:
            tensors, facts = read_tensors(self.path, KIND)
        except FileNotFoundError:
            return
        if "key" in facts:
            tensors = self._former(tensors, facts["key"])
        elif differ := [k for k in self.about if facts.get("about", {}).get(k) != self.about[k]]:
            raise SavedFileError(
                f"store={str(self.path)!r} holds removals of another call, with other "
                f"{', '.join(differ)}: {self._changes(facts, differ)}; name another file"
            )
        with valid(self.path):
            base = tensors.pop("base", None)
            found = Results(**tensors)
            if base is not None and base.shape != found.after.shape[:1]:
                raise ValueError("base and results are of different queries")
        self.base = base if self.base is None else self.base
        self.results = found if self.results is None else found.joined(self.results)

    def _changes(self, facts: dict, differ: list[str]) -> str:
        """The first of what differs, as it is in the file and here."""
        there, here = facts.get("about", {}).get(differ[0]), self.about[differ[0]]
        if isinstance(here, dict) and isinstance(there, dict):
            first = next(key for key in here if there.get(key) != here[key])
            there, here = f"{first} {there.get(first)}", f"{first} {here[first]}"
        there, here = (textwrap.shorten(str(value), 200) for value in (there, here))
        return f"{there} in the file, {here} here"

    def _former(self, tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
        """A file of version 0.1.0, which held the groups of one call only."""
        if key != self.former_key():
            raise SavedFileError(
                f"store={str(self.path)!r} holds removals of another pipeline, queries or subsets; "
                "name another file"
            )
        with valid(self.path):
            done = tensors.pop("done")
            kept = {name: tensors[name][done] for name in ("norms", "short")}
            kept |= {"groups": self.wanted[done], "after": tensors["after"][:, done]}
            return kept | {name: tensors[name] for name in ("base",) if name in tensors}

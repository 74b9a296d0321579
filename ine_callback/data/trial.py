"""A collated batch, and what the user's function makes of other batches of its items."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ine_callback.data.columns import JOINED, ROWS, Path, all_same, column, layout, leaves, same, sizes
from ine_callback.utilities.restores import Restore

Columns = dict[Path, list[Any]]


class Trial:
    """A collated batch, and what the function makes of other batches of its items."""

    def __init__(self, collate: Callable[[Any], Any], batch: Any, items: list[Any], before: Restore) -> None:
        self.collate, self.batch, self.items, self._before = collate, batch, items, before
        self.leaves = [leaves(item) for item in items]
        self._lengths = self._lengths_of(range(len(items)))
        self._layouts: dict[int, dict[Path, str]] = {}
        self._reading = (True, False)

    def readings(self) -> Iterator[None]:
        """Sizes that agree by chance allow several: lists of parts or rows, rows in the first or second dimension."""
        seen: list[dict[Path, str]] = []
        for self._reading in ((True, False), (False, False), (True, True)):
            self._layouts.clear()
            if self._layout(len(self.items)) not in seen:
                seen.append(self._layout(len(self.items)))
                yield

    @property
    def sizes(self) -> list[int]:
        """Possible numbers of rows, the likeliest first."""
        found, count = sizes(self.batch), len(self.items)
        if count in found:
            return [count]
        whole = [count] if self._layout(count) else []  # time first, or rows joined
        return [*found[:1], *whole]

    def twice(self) -> Trial:
        """The same with every item there twice."""
        items = [*self.items, *self.items]
        return Trial(self.collate, self._make(items), items, self._before)

    def columns(self, rows: int, joined: bool = True) -> Columns:
        """The batch's own columns; ``joined`` ones as if the items were there in their order."""
        kinds = self._layout(rows) if joined else self._without_joined(rows)
        return self._columns(self.batch, kinds, rows, self._lengths)

    def differ(self, given: Columns) -> bool:
        """Whether rows differ somewhere, so that exchanging them shows; or no items do."""
        if any(not same(value, values[0]) for values in given.values() for value in values[1:]):
            return True
        return all(same(item, self.items[0]) for item in self.items[1:])

    def holds(self, values: list[Any], path: Path) -> bool:
        """Whether a column has the items' own values at this path."""
        return all(path in own for own in self.leaves) and all_same(values, [own[path] for own in self.leaves])

    def follows(self, given: Columns, owners: list[int], source: list[int]) -> bool:
        """Whether exchanging items changes their rows, as they do, and no others.

        Args:
            given: The batch's columns.
            owners: The item that each row should be.
            source: For each place, the item that is put there.
        """
        rows = len(owners)
        made = self._make([self.items[k] for k in source])
        now = self._columns(made, {path: self._layout(rows)[path] for path in given}, rows, self._lengths_of(source))
        if not now:
            return False
        views = _views(owners)
        where = {(owner, view): r for r, (owner, view) in enumerate(zip(owners, views, strict=True))}
        origin = [where[source[owner], view] for owner, view in zip(owners, views, strict=True)]
        fixed = [r for r in range(rows) if origin[r] == r]
        for path, values in now.items():
            before = given[path]
            if all_same(values, [before[k] for k in origin]):
                continue  # a function of the item
            if not all_same(
                [values[r] for r in fixed], [before[r] for r in fixed]
            ):  # random at its place, or shared by all rows
                return False
        moved = (r for r in range(rows) if origin[r] != r)
        return not any(self._stayed(given, now, r, origin[r]) for r in moved)

    @staticmethod
    def _stayed(given: Columns, now: Columns, row: int, origin: int) -> bool:
        """Whether a row did not change although another item was put in its place (the function sorts)."""
        if not all(same(now[path][row], given[path][row]) for path in given):
            return False
        return not all(same(given[path][row], given[path][origin]) for path in given)

    def alone(self, k: int, rows: int, given: Columns) -> Columns:
        """What the function makes of an item alone; nothing where it makes nothing of it."""
        try:
            made = self._make([self.items[k]])
        except Exception:  # nothing is left to collate
            return {}
        return self._columns(made, {path: self._layout(rows)[path] for path in given}, 1)

    def joined_fit(self, places: list[int], rows: int) -> bool:
        """Whether parts that hold all rows joined hold them in this order."""
        paths = [path for path, kind in self._layout(rows).items() if kind == JOINED]
        if not paths:
            return True
        whole = [self._make([self.items[k]]) for k in places]
        for path in paths:
            parts = [column(each, path, ROWS) or [] for each in whole]
            values = column(self.batch, path, ROWS) or []
            joined = [value for part in parts for value in part]
            if len(joined) != len(values) or not all(same(a, b) for a, b in zip(values, joined, strict=True)):
                return False
        return True

    def _make(self, items: list[Any]) -> Any:
        self._before()
        return self.collate([copied(item) for item in items])

    def _layout(self, rows: int) -> dict[Path, str]:
        if rows not in self._layouts:
            self._layouts[rows] = layout(self.batch, rows, self._lengths, *self._reading)
        return self._layouts[rows]

    def _without_joined(self, rows: int) -> dict[Path, str]:
        return {path: kind for path, kind in self._layout(rows).items() if kind != JOINED}

    def _columns(self, batch: Any, kinds: dict[Path, str], rows: int, lengths: Sequence[Sequence[int]] = ()) -> Columns:
        """All columns, or none where the batch has another structure."""
        found = {path: column(batch, path, kind, lengths) for path, kind in kinds.items()}
        complete = {path: values for path, values in found.items() if values is not None and len(values) == rows}
        return complete if len(complete) == len(kinds) else {}

    def _lengths_of(self, places: Sequence[int]) -> list[list[int]]:
        """For each value that all items hold: how long it is, item by item."""
        shared = [path for path in self.leaves[0] if all(path in own for own in self.leaves)] if self.leaves else []
        return [
            [len(self.leaves[k][path]) for k in places]
            for path in shared
            if all(hasattr(own[path], "__len__") and getattr(own[path], "ndim", 1) for own in self.leaves)
        ]


def copied(item: Any) -> Any:
    """A copy that a collate function may change; ``copy.deepcopy``, but fast for what items mostly are."""
    if type(item) is Tensor and not item.requires_grad:
        return item.clone()
    if type(item) in (list, tuple):
        return type(item)(copied(part) for part in item)
    if type(item) is dict:
        return {key: copied(part) for key, part in item.items()}
    return item if type(item) in (int, float, str, bool) else copy.deepcopy(item)


def _views(owners: list[int]) -> list[int]:
    """How many rows of the same item are before each row."""
    counts: dict[int, int] = {}
    return [counts[owner] for owner in owners if counts.update({owner: counts.get(owner, -1) + 1}) is None]

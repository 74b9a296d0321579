"""Which items the rows of a collated batch are, for any collate function: it may sort, drop, repeat or mix them.

Three ways; the first that verifies the order for the batch at hand counts:

1. Rows hold the values of the items at their places (no further call), and no two rows could be exchanged.
2. The function is called again, its random numbers drawn anew, with some items in the place of others: what it makes of
   an item must follow, and nothing else may change. That is what keeping the order means, whatever the batch holds.
3. It is called with each item alone: a row is the item that gives the same alone, but for padding (sorted, dropped).

A function that the first way settles is called again at batches 1, 2, 4, 8, ... only, for the parts of a batch that the
items do not hold; one that the second or third settles, for every batch: about twice the work of collating.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate, default_convert

from ine_callback.data.again import Again
from ine_callback.data.columns import Path, mark, same, sizes
from ine_callback.data.trial import Columns, Trial, copied
from ine_callback.utilities.restores import Restore

_MAX_SUFFIXES = 8  # ends of a batch that are exchanged, where random numbers are drawn item by item
_MIN_ITEMS = 4  # items below which the function is called with each item twice
_MAX_BOTH_HALVES = 8  # items up to which both halves are exchanged


@dataclass(frozen=True)
class Fate:
    """What became of a batch's items.

    Attributes:
        places: For each row, the place of its item among those given; None where it is unknown.
        reason: Why not.
        always: Whether the reason is the function's, not this batch's.
    """

    places: list[int] | None
    reason: str = ""
    always: bool = False


class Followed:
    """A collate function that also tells which item each row is.

    Args:
        collate: The user's function.

    Example:
        >>> import torch
        >>> longest_first = lambda items: torch.tensor(sorted(items, reverse=True))
        >>> batch, fate = Followed(longest_first)([3, 5, 4])
        >>> batch, fate.places
        (tensor([5, 4, 3]), [1, 2, 0])
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self._again: Again | None = None  # made in the worker
        self._batches = 0
        self._held: dict[Path, Path] | None = None  # part of a batch -> what the items call it
        self._alone = False  # whether the last batch was settled by items alone

    def __call__(self, items: list[Any]) -> tuple[Any, Fate]:
        """The batch, as the function alone would have made it, and what became of the items."""
        if self.collate is default_collate or self.collate is default_convert:
            return self.collate(items), Fate(list(range(len(items))))
        self._again = self._again or Again(self.collate)
        before = self._again.remember()
        copies, failed = _copied(items)
        before()
        batch = self.collate(items)
        after = self._again.remember()
        try:
            return batch, failed or self._fate(batch, copies, before)
        except Exception as error:  # of this package or of a second call: the training gets its batch all the same
            return batch, Fate(None, f"{self._name} could not be followed ({type(error).__name__}: {error})")
        finally:
            after()

    @property
    def _name(self) -> str:
        name = getattr(self.collate, "__qualname__", type(self.collate).__name__)
        return f"the collate function {name}"

    def _fate(self, batch: Any, items: list[Any], before: Restore) -> Fate:
        self._batches += 1
        trial = Trial(self.collate, batch, items, before)
        alone, order = (self._alone_in, True), (self._in_order, False)
        for _ in trial.readings():
            for rows in trial.sizes:
                for way, is_alone in (alone, order) if self._alone else (order, alone):
                    places = way(trial, rows)
                    if places is not None:
                        self._alone = is_alone
                        return Fate(places)
        return self._untold(trial)

    def _untold(self, trial: Trial) -> Fate:
        rows, count, kind = (trial.sizes or [0])[0], len(trial.items), type(trial.batch).__name__
        if trial.batch is None or not rows:
            why = f"makes a batch of type {kind} in which no part has one value for each of its {count} items"
            return Fate(None, f"{self._name} {why}", trial.batch is not None and bool(sizes(trial.batch) or count > 1))
        if rows > count:
            why = f"makes {rows} rows of {count} items (several views of an item, or items repeated or split)"
        elif rows < count:
            why = f"makes {rows} rows of {count} items (dropped, or joined), and a row is no item as it is alone"
        else:
            why = (
                "gives rows that depend on other items (mixup, cutmix) or whose order depends on what they hold while "
                "they are changed at random"
            )
        return Fate(None, f"{self._name} {why}: which item a row is cannot be told", rows >= count)

    # -- rows in the items' order -------------------------------------------------------------------------------------

    def _in_order(self, trial: Trial, rows: int) -> list[int] | None:
        count = len(trial.items)
        if rows % count:
            return None
        given = trial.columns(rows)
        if not given:
            return None
        due = self._batches & (self._batches - 1) == 0 or self._held is None
        if rows == count and self._held is not None:
            matched = [path for path in self._held if path in given and trial.holds(given[path], self._held[path])]
            due |= len(matched) < len(self._held)  # what always held does not
            told = bool(matched) and len(matched) == len(self._held) and _tell_apart(given, matched)
            if told and (not due or len(matched) == len(given)):
                return list(range(count))
        for owners in _orders(rows, count):
            if self._keeps(trial, given, owners, due):
                if rows == count:
                    self._learn(trial, given)
                return owners
        return None

    def _learn(self, trial: Trial, given: Columns) -> None:
        """In a batch whose order is verified: which parts the items hold themselves."""
        if self._held is not None:
            self._held = {
                part: own for part, own in self._held.items() if part in given and trial.holds(given[part], own)
            }
            return
        paths = list(trial.leaves[0])
        found = {part: next((own for own in paths if trial.holds(values, own)), None) for part, values in given.items()}
        self._held = {part: own for part, own in found.items() if own is not None}

    def _keeps(self, trial: Trial, given: Columns, owners: list[int], due: bool) -> bool:
        """Whether what is made of each item follows it to another's place, and nothing else changes."""
        if not trial.differ(given):
            return False
        dice, count = random.Random(self._batches), len(trial.items)
        if 1 < count < _MIN_ITEMS:  # twice, so that items can change places while the batch holds the same ones
            twice = trial.twice()
            again = twice.columns(2 * len(owners)) if len(owners) == count else {}
            swaps = [_swapped(2 * count, i, j) for j in range(2 * count) for i in range(j)]
            if again and all(twice.follows(again, list(range(2 * count)), source) for source in swaps):
                return True
        halves = list(_halves(count, dice))
        if all(
            trial.follows(given, owners, source)
            for source in (halves if due or count <= _MAX_BOTH_HALVES else halves[:2])
        ):
            return True
        # random numbers drawn item by item, as many as an item needs: only the items before are sure to draw the same
        ends = list(range(1, count))
        dice.shuffle(ends)
        return all(trial.follows(given, owners, _with_end(count, end)) for end in ends[:_MAX_SUFFIXES])

    # -- items alone --------------------------------------------------------------------------------------------------

    def _alone_in(self, trial: Trial, rows: int) -> list[int] | None:
        """The item that each row is, by what is made of every item alone."""
        given = trial.columns(rows, joined=False)
        # a function that sorts may tell the places: they are of no item alone, but what is found must be the same
        told = [path for path, values in given.items() if _is_order(values)]
        alone = {k: made for k in range(len(trial.items)) if (made := trial.alone(k, rows, given))}
        paths = [path for path in given if path not in told]
        if not paths or not alone:
            return None
        paths.sort(key=lambda path: -_extent(given[path][0]))
        marks: dict[Any, list[int]] = {}
        for k, made in alone.items():
            for side in enumerate(mark(made[paths[0]][0])):
                marks.setdefault(side, []).append(k)
        free, places = set(alone), []
        for r in range(rows):
            likely = sorted({k for side in enumerate(mark(given[paths[0]][r])) for k in marks.get(side, ())})
            found = [k for k in likely if all(same(given[path][r], alone[k][path][0]) for path in paths)]
            if not found:
                return None
            # several: the row is any of them, for the batch holds the same of each
            places.append(next((k for k in found if k in free), found[0]))
            free.discard(places[-1])
        inverse = sorted(range(rows), key=places.__getitem__)
        for path in told:
            is_item = all(same(value, alone[k][path][0]) for value, k in zip(given[path], places, strict=True))
            if not is_item and [int(value) for value in given[path]] not in (places, inverse):
                return None
        return places if trial.joined_fit(places, rows) else None


def _copied(items: list[Any]) -> tuple[list[Any], Fate | None]:
    try:
        return [copied(item) for item in items], None
    except Exception as error:
        why = f"items of type {type(items[0]).__name__} cannot be copied ({type(error).__name__}: {error})"
        return [], Fate(None, f"{why}, so what the collate function does with them cannot be told", always=True)


def _tell_apart(given: Columns, matched: list[Path]) -> bool:
    """Whether rows that agree in the matched columns agree in all: then no two could have been exchanged."""
    rows = len(next(iter(given.values())))
    groups: dict[Any, list[int]] = {}
    for r in range(rows):
        groups.setdefault(tuple(_trace(given[path][r]) for path in matched), []).append(r)
    for group in groups.values():
        for r, s in itertools.pairwise(group):
            alike = all(same(given[path][r], given[path][s]) for path in given)
            if not alike:
                return False
    return True


def _trace(value: Any) -> Any:
    """A few of a value's numbers."""
    shape = getattr(value, "shape", None)
    if shape is None:
        return value if isinstance(value, str | int | float) else ()
    flat = value.reshape(-1)
    return tuple(flat[:: max(1, len(flat) // 16)].tolist())


def _extent(value: Any) -> int:
    shape = getattr(value, "shape", None)
    if shape is None:
        return len(value) if hasattr(value, "__len__") else 1
    size = 1
    for each in shape:
        size *= int(each)
    return size


def _is_order(values: list[Any]) -> bool:
    """Whether a column holds the numbers 0 .. b - 1, each once."""
    whole = all(
        isinstance(v, int) or (isinstance(v, Tensor) and not v.dim() and not v.is_floating_point()) for v in values
    )
    return whole and len(values) > 1 and sorted(int(v) for v in values) == list(range(len(values)))


def _orders(rows: int, count: int) -> list[list[int]]:
    """In which orders several rows of an item may come: view by view, or item by item."""
    if rows == count:
        return [list(range(count))]
    times = rows // count
    return [list(range(count)) * times, [k for k in range(count) for _ in range(times)]]


def _halves(count: int, dice: random.Random) -> Iterator[list[int]]:
    """Exchanges about half of the items for one another, so often that any two are once told apart."""
    codes = list(range(count))
    dice.shuffle(codes)
    for bit in range(max(1, (count - 1).bit_length())):
        for side in (0, 1) if count <= _MAX_BOTH_HALVES else (1,):
            chosen = [k for k in range(count) if (codes[k] >> bit & 1) == side]
            if chosen and count > 1:
                yield _rotated(count, chosen, dice)


def _rotated(count: int, chosen: list[int], dice: random.Random) -> list[int]:
    source = list(range(count))
    if len(chosen) == 1:
        source[chosen[0]] = (chosen[0] + 1 + dice.randrange(count - 1)) % count
        return source
    by = 1 + dice.randrange(len(chosen) - 1)
    for k, place in enumerate(chosen):
        source[place] = chosen[(k + by) % len(chosen)]
    return source


def _swapped(count: int, i: int, j: int) -> list[int]:
    return [j if k == i else i if k == j else k for k in range(count)]


def _with_end(count: int, end: int) -> list[int]:
    """The items from ``end`` on exchanged for one another, or the last one for the first."""
    last = list(range(end, count))
    return [*range(end), *([0] if len(last) == 1 else [*last[1:], last[0]])]

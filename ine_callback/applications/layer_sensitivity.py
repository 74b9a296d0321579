"""How much of the rows' help goes through each block of a network: LayerIF's measure of a layer's training quality.

From scores s[i, m] of row i through matrix m alone (:class:`.LayerScores`; > 0: helpful) and the matrices M of a block:

    S_m = sum over rows of max(0, s[i, m])        "positive"
    S_m = sum of the largest quarter of these     "top25"
    S_m = sum over rows of s[i, m]                "all"
    S   = mean of S_m over the block's matrices M

A large S says that the training rows still have much to give through this block: it is sensitive, and trained less than
the others. A small S says that it is mature. Source: LayerIF, arXiv 2505.23811; its I has the opposite sign before it
inverts it, and sums over the validation rows, where a query of ours is their mean. S is compared between blocks only.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ine_callback.errors import InfluenceError
from ine_callback.scores import Attribution, Floats
from ine_callback.stats.ranks import spearman
from ine_callback.utilities.optional import need
from ine_callback.utilities.terminal import as_text
from ine_callback.utilities.words import number, plain, signed

if TYPE_CHECKING:
    from rich.console import Group

Aggregate = Literal["positive", "top25", "all"]
# biases, and what norm layers hold
NO_MATRIX = re.compile(r"bias$|(norm|(^|[._])(ln|bn)(_\w+)?)_?\d*\.\w+$", re.IGNORECASE)
MAX_NAMED = 6  # layers that are listed by name
LEGEND = """\
S: help of the training rows through the block, summed over the rows. Large: sensitive, trained less than the others.
Depth: Spearman's correlation of S with the block's place; near ±1 a plain ramp over the blocks says the same."""


@dataclass(frozen=True)
class LayerSensitivity:
    """Sensitivity S of each block of a network, as ``report.layers()`` returns it; prints itself as a table.

    Attributes:
        method: The method whose scores were summed.
        queries: Names of the Q queries.
        blocks: Names of the B blocks, in their order.
        scores: S [B, Q], in the method's unit times rows; large: sensitive, trained less than the others.
        layers: The layers of each block [B].
        left_out: Layers that belong to no block.
        aggregate: Which rows were summed, and how.
        rows: Number of rows summed for each query [Q].

    Example:
        >>> found = LayerSensitivity(
        ...     "IF", ("val",), ("B.0", "B.1"), np.array([[2.0], [8.0]]), ((), ()), (), "all", (9,)
        ... )
        >>> found.of("val"), len(found)
        (array([2., 8.]), 2)
    """

    method: str
    queries: tuple[str, ...]
    blocks: tuple[str, ...]
    scores: Floats
    layers: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...]
    aggregate: Aggregate
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    def of(self, query: str | None = None) -> Floats:
        """S of all blocks [B] on a query, the first by default.

        Raises:
            KeyError: When there is no such query.
        """
        if query is None:
            return self.scores[:, 0]
        if query not in self.queries:
            choices = ", ".join(map(repr, self.queries))
            raise KeyError(f"LayerSensitivity: no query {query!r}; choose one of {choices}")
        return self.scores[:, self.queries.index(query)]

    def to_pandas(self) -> Any:
        """A DataFrame with one line for every block and a column for every query; needs the extra ``report``."""
        pandas = need("pandas", "LayerSensitivity.to_pandas")
        return pandas.DataFrame(self.scores, index=pandas.Index(self.blocks, name="block"), columns=list(self.queries))

    def __rich__(self) -> Group:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        title = f"Sensitivity of blocks by {plain(self.method)} · S relative to the largest · {self.aggregate}"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("block")
        table.add_column("layers", justify="right")
        for query in self.queries:
            table.add_column(Text(plain(query)), justify="right")
        relative = self.scores / np.maximum(np.abs(self.scores).max(0), np.finfo(float).tiny)
        show = partial(signed, places=3) if self.aggregate == "all" else number
        for block, layers, line in zip(self.blocks, self.layers, relative, strict=True):
            table.add_row(Text(plain(block)), str(len(layers)), *map(show, line))
        depth = [spearman(np.arange(float(len(self))), column) for column in self.scores.T]
        table.add_section()
        table.add_row("depth", "", *(signed(value, 2) for value in depth))
        lines = [Text(LEGEND, "dim")]
        if self.left_out:
            lines.append(Text(f"In no block: {listed(self.left_out)}", "dim"))
        return Group(Text(title, "bold"), table, *lines)

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def layer_sensitivity(
    found: Attribution, query: str | None = None, blocks: str | None = None, aggregate: Aggregate = "positive"
) -> LayerSensitivity:
    """Sensitivity of each block on one or all queries; formula in the module's head.

    Args:
        found: Scores by layer, of any method.
        query: Name of one query; by default all.
        blocks: Regular expression with one group, which is the block's name; searched in each layer's name. By default
            the repeated ``prefix.<number>.``, without biases and norm layers. Layers in no block are named.
        aggregate: Which rows' scores are summed.

    Raises:
        InfluenceError: Without scores by layer, without two blocks, or where scores are not finite. Rows without any
            score on a query are left out.
        KeyError: When there is no such query.

    Example:
        >>> from ine_callback.scores import LayerScores, QueryInfo
        >>> names = ("embed.weight", "B.0.a.weight", "B.0.b.weight", "B.1.a.weight", "B.1.b.weight")
        >>> scores = np.array([[9.0, 1.0, 2.0, -1.0, 0.0], [9.0, 3.0, -2.0, 4.0, 5.0]])[:, :, None]
        >>> query = QueryInfo("val", "loss", "Does it help?")
        >>> by_layer = LayerScores(names, scores)
        >>> found = Attribution("IF", np.arange(2), (query,), scores.sum(1), layers=by_layer)
        >>> quality = layer_sensitivity(found)
        >>> quality.blocks, quality.of("val"), quality.left_out
        (('B.0', 'B.1'), array([3. , 4.5]), ('embed.weight',))
    """
    who = f"layers of {found.method!r}"
    if found.layers is None:
        raise InfluenceError(f"{who}: the method kept no scores by layer; ask it for them, such as IF(per_layer=True)")
    if aggregate not in get_args(Aggregate):
        raise InfluenceError(f"{who}: aggregate={aggregate!r}; choose one of {', '.join(get_args(Aggregate))}")
    members = _repeated(found.layers.names) if blocks is None else _matching(found.layers.names, blocks, who)
    if len(members) < 2:
        raise InfluenceError(
            f"{who}: fewer than two blocks found among {listed(found.layers.names)}; name them by a regular expression "
            r"with one group, such as blocks=r'(layers\.\d+)\.'"
        )
    inside = np.concatenate([np.array(each) for each in members.values()])
    names, scores = found.layers.names, found.layers.scores
    asked = range(scores.shape[2]) if query is None else [found.column(query)]
    sums = [_summed(scores[:, inside, q], [names[k] for k in inside], aggregate, who) for q in asked]
    columns, rows = zip(*sums, strict=True)
    summed = np.zeros((len(names), len(columns)))
    summed[inside] = np.stack(columns, axis=1)
    return LayerSensitivity(
        method=found.method,
        queries=tuple(found.queries[q].name for q in asked),
        blocks=tuple(members),
        scores=np.stack([summed[each].mean(0) for each in members.values()]),
        layers=tuple(tuple(names[k] for k in each) for each in members.values()),
        left_out=tuple(name for k, name in enumerate(names) if k not in set(inside.tolist())),
        aggregate=aggregate,
        rows=rows,
    )


def _summed(scores: Floats, names: Sequence[str], aggregate: Aggregate, who: str) -> tuple[Floats, int]:
    """S of each matrix [M] from its scores [R, M], and the number of rows that have scores."""
    scores = scores[~np.isnan(scores).all(1)]
    if not len(scores):
        raise InfluenceError(f"{who}: no row has a score; see the method's notes")
    if not np.isfinite(scores).all():
        row, column = np.argwhere(~np.isfinite(scores))[0]
        raise InfluenceError(
            f"{who}: a score of layer {names[column]!r} is {scores[row, column]}; raise the method's damping, or leave "
            "the layer out by blocks="
        )
    if aggregate == "all":
        return scores.sum(0), len(scores)
    positive = np.maximum(scores, 0.0)
    if aggregate == "top25":
        rank = np.argsort(np.argsort(-positive, axis=0, kind="stable"), axis=0)
        positive = np.where(rank < np.ceil((positive > 0).sum(0) / 4), positive, 0.0)
    return positive.sum(0), len(scores)


def _matching(names: Sequence[str], blocks: str, who: str) -> dict[str, list[int]]:
    """Positions of the layers of each block, by the expression's group, in the order of the groups' numbers."""
    try:
        expression = re.compile(blocks)
    except re.error as error:
        raise InfluenceError(f"{who}: blocks={blocks!r} is no regular expression: {error}") from error
    if expression.groups != 1:
        raise InfluenceError(
            f"{who}: blocks={blocks!r} has {expression.groups} groups; give one, the block's name: others are (?:...)"
        )
    members: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        if (match := expression.search(name)) and match[1]:
            members[match[1]].append(position)
    return dict(sorted(members.items(), key=lambda item: by_numbers(item[0])))


def _repeated(names: Sequence[str]) -> dict[str, list[int]]:
    """The same for the prefix that numbers most layers: blocks are the numbers that share its commonest layer."""
    inside: dict[str, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for position, name in enumerate(names):
        if NO_MATRIX.search(name):
            continue
        parts = name.split(".")
        for k, part in enumerate(parts[:-1]):
            if part.isdecimal():
                inside[".".join(parts[:k])][int(part)][".".join(parts[k + 1 :])] = position
    best: dict[str, list[int]] = {}
    for prefix, numbered in inside.items():
        counts = Counter(rest for layers in numbered.values() for rest in layers)
        common = max(counts, key=lambda rest: counts[rest])
        chosen = {n: list(numbered[n].values()) for n in sorted(numbered) if common in numbered[n]}
        found = {f"{prefix}.{n}".lstrip("."): layers for n, layers in chosen.items()}
        if len(found) > 1 and sum(map(len, found.values())) > sum(map(len, best.values())):
            best = found
    return best


def by_numbers(name: str) -> list[str | int]:
    """What names are sorted by: their numbers by value, other text by letters.

    Example:
        >>> sorted(["h.10", "h.2", "a.3"], key=by_numbers)
        ['a.3', 'h.2', 'h.10']
    """
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name))]


def listed(names: Sequence[str]) -> str:
    """Some names as text.

    Example:
        >>> listed(["a", "b"])
        'a, b'
    """
    shown = ", ".join(plain(name) for name in names[:MAX_NAMED])
    return shown + (f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else "")

"""What to do with the sensitivity of blocks: how many experts each gets, how far each is pruned. LayerIF's two rules.

A sensitive block (large S) gets more experts and is pruned more; a mature one is preserved. With B blocks and
v = max(0, S) / max(S):

    experts    f = v^β / sum(v^β) · (T - B m),  ⌊f⌋ + m each; those that remain go to the largest fractions of f
    sparsity   u = minmax(savgol(v)),  φ = min(1, η (1 - ε + 2 ε u)),  η such that sum(φ d) = budget · sum(d)

T is the number of experts, m the least number in a block, d the number of weights of a block; the Savitzky-Golay filter
has window 7 and order 3. Source: LayerIF, arXiv 2505.23811. A minmax before the filter, as there, changes nothing: the
filter is linear and keeps constants. Its code clips φ at .99 and then misses the budget; here the rest is spread over
the other blocks (water-filling). Beside each plan stand two controls of the same budget: the rule with the block's
place in the network as S (``ramp``), and with S mirrored, max + min - S (``reversed``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.errors import InfluenceError
from ine_callback.scores import Floats
from ine_callback.utilities.terminal import as_text
from ine_callback.utilities.words import plain

if TYPE_CHECKING:
    from rich.console import Group

WINDOW, ORDER = 7, 3  # of the filter
LEVEL = 1e-9  # relative difference below which two sensitivities are equal
CONSTANT = "The sensitivities do not differ: the plan is uniform."
NOTHING = "No sensitivity is above 0: the plan is uniform."


@dataclass(frozen=True)
class Allocation:
    """One number for each block, and two controls with the same budget; prints itself as a table.

    Attributes:
        blocks: Names of the B blocks.
        values: The plan [B]: experts, or the fraction of the weights to prune.
        ramp: The plan that takes a block's place for its sensitivity [B]: later blocks get more.
        reversed: The plan for mirrored sensitivities [B].
        notes: Sentences for the reader.

    Example:
        >>> plan = LayerPlan(("B.0", "B.1"), np.array([1.0, 2.0])).experts(total=11)
        >>> plan.to_dict(), plan.reversed
        ({'B.0': 2, 'B.1': 9}, array([9, 2]))
    """

    blocks: tuple[str, ...]
    values: NDArray[Any]
    ramp: NDArray[Any]
    reversed: NDArray[Any]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, float]:
        """The plan by block."""
        return dict(zip(self.blocks, self.values.tolist(), strict=True))

    def __rich__(self) -> Group:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("block")
        for name in ("plan", "ramp", "reversed"):
            table.add_column(name, justify="right")
        columns = [self.values.tolist(), self.ramp.tolist(), self.reversed.tolist()]
        for block, *line in zip(self.blocks, *columns, strict=True):
            table.add_row(Text(plain(block)), *(f"{x:.3f}" if isinstance(x, float) else str(x) for x in line))
        return Group(table, *(Text(f"Note: {note}", "dim") for note in self.notes))

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


@dataclass(frozen=True)
class LayerPlan:
    """Plans from the sensitivity of blocks, as ``report.layer_plan()`` returns it.

    Only ratios of sensitivities count; those below 0 are taken for 0.

    Args:
        blocks: Names of the B blocks, from the network's input to its output.
        sensitivity: S [B]; large: sensitive, trained less than the others.

    Raises:
        InfluenceError: Without blocks, or where a sensitivity is not finite or missing.

    Example:
        >>> plan = LayerPlan(("B.0", "B.1", "B.2", "B.3"), np.array([1.0, 2.0, 4.0, 3.0]))
        >>> plan.experts(total=16).values
        array([1, 2, 9, 4])
        >>> pruned = plan.sparsity(0.5)
        >>> pruned.values.round(3), round(float(pruned.values.mean()), 12)
        (array([0.35, 0.45, 0.65, 0.55]), 0.5)
    """

    blocks: tuple[str, ...]
    sensitivity: Floats

    def __post_init__(self) -> None:
        owned = np.array(self.sensitivity, dtype=np.float64)
        if not len(self.blocks) or owned.shape != (len(self.blocks),):
            raise InfluenceError(
                f"LayerPlan: {len(self.blocks)} blocks and sensitivities of shape {owned.shape}; give one for each "
                "block, at least one"
            )
        if not np.isfinite(owned).all():
            at = int(np.flatnonzero(~np.isfinite(owned))[0])
            raise InfluenceError(
                f"LayerPlan: the sensitivity of {self.blocks[at]!r} is {owned[at]}; leave the block out, or raise the "
                "method's damping"
            )
        owned.flags.writeable = False
        object.__setattr__(self, "sensitivity", owned)

    def experts(self, total: int, beta: float = 3.0, minimum: int = 1) -> Allocation:
        """How many of ``total`` experts each block gets; formula in the module's head.

        Blocks of equal fractions get the remaining experts from the first on.

        Args:
            total: Number of experts T.
            beta: Exponent; 0: uniform, larger: more to the most sensitive blocks.
            minimum: Experts of each block at least.

        Raises:
            InfluenceError: When ``total`` experts are too few for the minimum, or an argument makes no sense.

        Example:
            >>> LayerPlan(("a", "b", "c"), np.array([5.0, 5.0, 5.0])).experts(total=5).values
            array([2, 2, 1])
        """
        for name, value in (("total", total), ("minimum", minimum)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
                raise InfluenceError(f"LayerPlan.experts: {name}={value!r}; give a whole number of at least 0")
        if not 0.0 <= beta < np.inf:
            raise InfluenceError(f"LayerPlan.experts: beta={beta}; give a number of at least 0, such as 3")
        free = int(total) - int(minimum) * len(self.blocks)
        if free < 0:
            raise InfluenceError(
                f"LayerPlan.experts: total={total} is less than {minimum} for each of {len(self.blocks)} blocks; raise "
                "total or lower minimum"
            )
        return self._allocation(lambda v: _experts(v, free, beta) + int(minimum))

    def sparsity(
        self, budget: float, epsilon: float = 0.3, sizes: Sequence[float] | None = None, smooth: bool = True
    ) -> Allocation:
        """Which fraction of its weights each block loses; formula in the module's head.

        With fewer than 7 blocks the filter's window is 5, with fewer than 5 nothing is smoothed.

        Args:
            budget: Fraction of all weights to prune, within [0, 1]; it is met exactly.
            epsilon: How far blocks may differ, within [0, 1): before the budget is met, from 1 - ε to 1 + ε.
            sizes: Number of weights of each block [B], in the order of the blocks; by default all are equal.
            smooth: Whether sensitivities are smoothed over neighbouring blocks.

        Raises:
            InfluenceError: When an argument makes no sense.

        Example:
            >>> LayerPlan(("a", "b", "c"), np.array([0.0, 1.0, 2.0])).sparsity(0.9).values.round(3)
            array([0.7, 1. , 1. ])
        """
        if not 0.0 <= budget <= 1.0:
            raise InfluenceError(f"LayerPlan.sparsity: budget={budget}; give a fraction within 0 and 1, such as 0.5")
        if not 0.0 <= epsilon < 1.0:
            raise InfluenceError(f"LayerPlan.sparsity: epsilon={epsilon}; give a number of at least 0 and less than 1")
        d = np.ones(len(self.blocks)) if sizes is None else np.asarray(sizes, dtype=np.float64)
        if d.shape != (len(self.blocks),) or not np.isfinite(d).all() or not (d > 0).all():
            raise InfluenceError(
                f"LayerPlan.sparsity: sizes={sizes}; give the number of weights of each of the {len(self.blocks)} "
                "blocks, above 0"
            )

        def rule(v: Floats) -> Floats:
            wanted = _minmax(_smoothed(v) if smooth else v)
            return _filled(1.0 - epsilon + 2.0 * epsilon * wanted, d, float(budget))

        return self._allocation(rule)

    def _allocation(self, rule: Callable[[Floats], NDArray[Any]]) -> Allocation:
        v, notes = _relative(self.sensitivity)
        place = np.arange(1.0, len(v) + 1) / len(v)
        return Allocation(self.blocks, rule(v), rule(place), rule(v.max() + v.min() - v), notes)


def _relative(sensitivity: Floats) -> tuple[Floats, tuple[str, ...]]:
    """Sensitivities within [0, 1], all 1 where they tell nothing, and what to say about them."""
    largest = float(sensitivity.max())
    if largest <= 0.0:
        return np.ones(len(sensitivity)), (NOTHING,)
    v = np.maximum(sensitivity, 0.0) / largest
    if v.min() >= 1.0 - LEVEL:
        return np.ones(len(v)), (CONSTANT,) if len(v) > 1 else ()
    below = int((sensitivity < 0).sum())
    return v, (f"{below} of {len(v)} sensitivities are below 0 and taken for 0.",) if below else ()


def _experts(v: Floats, free: int, beta: float) -> NDArray[np.int64]:
    """``free`` experts in proportion to v^β, by largest remainders."""
    weights = v**beta
    wanted = weights / weights.sum() * free
    whole: Floats = np.floor(wanted)
    fractions = np.round(wanted - whole, 9)  # equal ones stay equal whatever the unit of S
    counts: NDArray[np.int64] = whole.astype(np.int64)
    first = np.argsort(-fractions, kind="stable")[: free - int(counts.sum())]
    counts[first] += 1
    return counts


def _minmax(values: Floats) -> Floats:
    """Values from 0 to 1; all 1/2 where they do not differ."""
    low, high = float(values.min()), float(values.max())
    if high - low <= LEVEL * max(abs(low), abs(high)):
        return np.full(len(values), 0.5)
    return (values - low) / (high - low)


def _smoothed(values: Floats) -> Floats:
    from scipy.signal import savgol_filter  # slow to import, and only needed here

    window = min(WINDOW, len(values) - 1 + len(values) % 2)  # odd
    if window <= ORDER:
        return values
    out: Floats = savgol_filter(values, window, ORDER)
    return out


def _filled(phi: Floats, sizes: Floats, budget: float) -> Floats:
    """``min(1, η phi)`` with the η for which the mean weighted by sizes is the budget (water-filling)."""
    full = np.zeros(len(phi), dtype=bool)
    while not full.all():
        free = budget * sizes.sum() - sizes[full].sum()
        scaled = free / (phi * sizes)[~full].sum() * phi
        over = ~full & (scaled > 1.0)
        if not over.any():
            return np.where(full, 1.0, scaled)
        full |= over
    return np.ones(len(phi))

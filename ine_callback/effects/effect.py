"""An estimate of an effect with all that belongs to it: error, assumptions, columns, positivity, rows' influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import norm

from ine_callback.effects.formulas import Floats
from ine_callback.effects.positivity import Positivity
from ine_callback.utilities.terminal import as_text
from ine_callback.utilities.words import number, plain, probability, signed

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Effect:
    """An estimate of an effect; ``print`` shows it.

    Attributes:
        estimand: Short name, such as ``"ATE"``.
        treatment: Name of the column.
        outcome: Name of the column; its unit is the estimate's.
        estimate: How much higher the outcome is with the treatment than without.
        influence: φ [N], the derivative of the estimate in the weight of each row; above 0: the row raises the
            estimate. Their mean is 0.
        adjustment: Columns adjusted for; two sets where each half of the rows chose one for the other.
        why: How they were chosen.
        assumptions: What must hold, in words.
        positivity: Weights and effective sample sizes.
        folds: Of cross-fitting.
        nuisances: Name of the regressions and classifiers.
        mediators: Of natural effects: the columns that carry the indirect one.
        edges: Of the graph, from cause to effect.
    """

    estimand: str
    treatment: str
    outcome: str
    estimate: float
    influence: Floats
    adjustment: tuple[tuple[str, ...], ...]
    why: str
    assumptions: tuple[str, ...]
    positivity: Positivity
    folds: int
    nuisances: str
    mediators: tuple[str, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What is asked, such as ``"NIE of A on Y through {M}"``."""
        through = f" through {{{', '.join(self.mediators)}}}" if self.mediators else ""
        return f"{self.estimand} of {self.treatment} on {self.outcome}{through}"

    @property
    def standard_error(self) -> float:
        """Of the estimate: √(Σ φ²) / N."""
        return float(np.sqrt((self.influence**2).sum())) / len(self.influence)

    @property
    def removal(self) -> Floats:
        """What leaving each row out adds to the estimate, to first order: −φ / (N − 1) [N]."""
        return -self.influence / (len(self.influence) - 1)

    @property
    def p(self) -> float:
        """Two-sided p-value of "the effect is 0"."""
        return float(2 * norm.sf(abs(self.estimate) / self.standard_error)) if self.standard_error else 1.0

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval."""
        reach = float(ndtri(0.5 + level / 2)) * self.standard_error
        return self.estimate - reach, self.estimate + reach

    def top(self, k: int = 10) -> NDArray[np.int64]:
        """The k rows that raise the estimate most."""
        return np.argsort(-self.influence, kind="stable")[:k]

    def bottom(self, k: int = 10) -> NDArray[np.int64]:
        """The k rows that lower the estimate most."""
        return np.argsort(self.influence, kind="stable")[:k]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, as plain types for JSON."""
        return {
            "estimand": self.estimand,
            "treatment": self.treatment,
            "outcome": self.outcome,
            "estimate": self.estimate,
            "standard_error": self.standard_error,
            "interval": list(self.interval()),
            "p": self.p,
            "rows": len(self.influence),
            "adjustment": [list(each) for each in self.adjustment],
            "why": self.why,
            "assumptions": list(self.assumptions),
            "largest_weight": self.positivity.largest_weight,
            "imbalance": self.positivity.imbalance,
            "effective_size": self.positivity.effective_size,
            "folds": self.folds,
            "nuisances": self.nuisances,
            "mediators": list(self.mediators),
            "edges": [list(edge) for edge in self.edges],
        }

    @classmethod
    def from_dict(cls, words: dict[str, Any], influence: Floats) -> Effect:
        """What :meth:`to_dict` gave, with the rows' influence; of files of 0.2 without mediators and edges.

        Raises:
            KeyError: Or TypeError, or ValueError, if it is something else.
        """
        texts = {name: str(words[name]) for name in ("estimand", "treatment", "outcome", "why", "nuisances")}
        parts = {each.name: {str(k): float(v) for k, v in words[each.name].items()} for each in fields(Positivity)}
        return cls(
            influence=influence,
            adjustment=tuple(tuple(map(str, each)) for each in words["adjustment"]),
            assumptions=tuple(map(str, words["assumptions"])),
            positivity=Positivity(**parts),
            folds=int(words["folds"]),
            mediators=tuple(map(str, words.get("mediators", ()))),
            edges=tuple((str(u), str(v)) for u, v in words.get("edges", ())),
            estimate=float(words["estimate"]),
            **texts,
        )

    def __rich__(self) -> Group:
        return render([self])

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return f"Effect({self.estimand} {self.estimate:.4g} ± {self.standard_error:.2g}, {len(self.influence)} rows)"


def render(effects: Sequence[Effect], rows: NDArray[np.int64] | None = None) -> Group:
    """Estimates as a table for a terminal, each with what it rests on.

    Args:
        effects: Of the same rows.
        rows: Dataset index of each row; None: 0 to n − 1.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title="effects", title_justify="left")
    for head in ("estimand", "question", "estimate", "± se", "95 % interval", "p", "smallest n_eff"):
        table.add_column(head, justify="left" if head in ("estimand", "question") else "right")
    parts: list[Any] = [table]
    for each in effects:
        low, high = each.interval()
        table.add_row(
            each.estimand,
            plain(each.name.removeprefix(f"{each.estimand} of ")),
            signed(each.estimate, 3),
            number(each.standard_error, 3),
            f"{signed(low, 3)} to {signed(high, 3)}",
            probability(each.p),
            number(each.positivity.smallest, 0),
        )
        parts.append(Text("\n".join(map(plain, words(each, rows)))))
    return Group(*parts)


def words(effect: Effect, index: NDArray[np.int64] | None = None) -> list[str]:
    """What an effect rests on, and the rows that carry it."""
    sets = " and ".join("{" + ", ".join(each) + "}" for each in effect.adjustment)
    most = np.argsort(-np.abs(effect.influence), kind="stable")[:5]
    rows = ", ".join(map(str, (most if index is None else index[most]).tolist()))
    largest, imbalance = max(effect.positivity.largest_weight.values()), max(effect.positivity.imbalance.values())
    return [
        f"{effect.name} holds if",
        *(f"  - {each}" for each in effect.assumptions),
        f"  adjusted for {sets}: {effect.why}",
        f"  {len(effect.influence)} rows, {effect.folds} folds, {effect.nuisances}; largest weight {largest:.3g}, "
        f"imbalance {imbalance:.2f} sd",
        f"  carried most by rows {rows}; without the first of them {signed(_without(effect), 5)}",
        "",
    ]


def _without(effect: Effect) -> float:
    return effect.estimate + float(effect.removal[np.argmax(np.abs(effect.influence))])

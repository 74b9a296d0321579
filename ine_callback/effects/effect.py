"""An estimate of an effect with all that belongs to it: error, assumptions, columns, positivity, rows' influence."""

from __future__ import annotations

from dataclasses import dataclass
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
        }

    def __rich__(self) -> Group:
        return render([self])

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return f"Effect({self.estimand} {self.estimate:.4g} ± {self.standard_error:.2g}, {len(self.influence)} rows)"


def render(effects: list[Effect]) -> Group:
    """Estimates as a table for a terminal, each with what it rests on."""
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
            plain(f"{each.treatment} on {each.outcome}"),
            signed(each.estimate, 3),
            number(each.standard_error, 3),
            f"{signed(low, 3)} to {signed(high, 3)}",
            probability(each.p),
            number(each.positivity.smallest, 0),
        )
        parts.append(Text("\n".join(map(plain, _words(each)))))
    return Group(*parts)


def _words(effect: Effect) -> list[str]:
    sets = " and ".join("{" + ", ".join(each) + "}" for each in effect.adjustment)
    rows = ", ".join(map(str, np.argsort(-np.abs(effect.influence), kind="stable")[:5].tolist()))
    largest, imbalance = max(effect.positivity.largest_weight.values()), max(effect.positivity.imbalance.values())
    return [
        f"{effect.estimand} holds if",
        *(f"  - {each}" for each in effect.assumptions),
        f"  adjusted for {sets}: {effect.why}",
        f"  {len(effect.influence)} rows, {effect.folds} folds, {effect.nuisances}; largest weight {largest:.3g}, "
        f"imbalance {imbalance:.2f} sd",
        f"  carried most by rows {rows}; without the first of them {signed(_without(effect), 5)}",
        "",
    ]


def _without(effect: Effect) -> float:
    return effect.estimate + float(effect.removal[np.argmax(np.abs(effect.influence))])

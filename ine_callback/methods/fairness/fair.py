"""Fair subspaces as a method in a fit. What it computes is in :mod:`ine_callback.methods.fairness.subspaces`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ine_callback.applications.fairness import NAME
from ine_callback.data.attribute import Attribute, attribute_of
from ine_callback.errors import InfluenceError
from ine_callback.methods.fairness.settings import WHO, FairSettings
from ine_callback.methods.fit_end import FitEndMethod
from ine_callback.methods.row_features import Reader, Rows, check_name
from ine_callback.scores import Attribution, Stage

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext


@dataclass(frozen=True)
class FairSubspaces(FairSettings, FitEndMethod):
    """Directions of the features that tell about a sensitive attribute, and what leaving them out costs.

    Needs one pass over the training rows in evaluation mode. The path, its projections and heads are in
    ``report.subspaces``; scores say which rows raise the parity gap and the loss of a linear head on the features.

    Args:
        sdr: ``"sir"``, ``"save"`` or ``"dr"``: how directions are found.
        slices: Quantile slices of a target or attribute that is a number.
        target_rank: Directions of the target; None: as many as permutation tests find.
        sensitive_rank: Directions of the sensitive attribute, likewise.
        permutations: Of each test.
        shrinkage: Of the features' covariance; None: Ledoit and Wolf's where there are fewer than 10 rows a feature.
        seed: Of the permutations, and of the rows for the distance covariance.
        sensitive: Where the attribute is: key or position in a training batch, a function of the batch, or a list with
            one value for each training row. Below 0 or NaN: not known, and the row is left out.
        features: ``"penultimate"``: what the network's last layer with parameters gets; ``"input"``: the first tensor
            of a batch; a dotted name: what that layer gets; or a function of module and batch that returns [b, p].
        target: What is predicted: None for the labels of the loss, else named like ``sensitive``.
        at: When it runs: numbers of finished epochs, or the ``"end"`` of training.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> FairSubspaces()
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: FairSubspaces: sensitive=None names no attribute; give a batch's key or
        position, a function of the batch, or one value for each training row.
    """

    sensitive: int | str | Sequence[float] | Callable[[Any], Any] | None = None
    features: str | Callable[[Any, Any], Any] = "penultimate"
    target: int | str | Sequence[float] | Callable[[Any], Any] | None = None
    at: Sequence[Stage] = ("end",)

    name = NAME  # without a type, so no setting of the dataclass
    needs = ("whole_weights", "training_rows")  # no query: gap and risk are the questions

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sensitive is None:
            raise InfluenceError(
                f"{WHO}: sensitive=None names no attribute; give a batch's key or position, a function of the batch, "
                "or one value for each training row."
            )
        check_name(self.features, WHO)

    def run(self, context: FitContext) -> Attribution:
        """Finds the subspaces of the features of the present weights."""
        from ine_callback.methods.fairness.subspaces import fair_subspaces  # at first use, as is scipy's

        reader = Reader(WHO, context, self.features, labels=self.target is None)
        found, sensitive, target = Rows(), [], []
        for part, batch in context.batches(what="features"):
            reader.read(found, context.loss, batch, len(part))
            sensitive.append(_values(self.sensitive, part, batch, "sensitive"))
            if self.target is not None:
                target.append(_values(self.target, part, batch, "target"))
        labels = torch.cat(target) if target else found.known_labels()
        if labels is None:
            raise InfluenceError(f"{WHO}: the loss has no labels to be read; name the target, such as target=1.")
        x = found.joined(WHO, "training")
        subspaces = fair_subspaces(x, labels, torch.cat(sensitive), self, context.progress)
        notes = (f"{WHO}: features are the input of layer {reader.layer!r}",) if reader.layer else ()
        made = subspaces.attribution
        return replace(made, notes=(*notes, *made.notes), settings={**made.settings, "features": _word(self.features)})


def _values(named: Any, rows: Tensor, batch: Any, option: str) -> Tensor:
    """One value for each row of a batch."""
    if isinstance(named, int | str) or callable(named):
        attribute: Attribute = named
        return attribute_of(batch, attribute, len(rows), f"{WHO}: {option}").cpu()
    every = torch.as_tensor(np.asarray(named))
    if every.dim() != 1 or len(every) <= int(rows.max()):
        raise InfluenceError(
            f"{WHO}: {option} has {len(every) if every.dim() else 0} values, and there is a row {int(rows.max())}; "
            "give one for each training row."
        )
    return every[rows]


def _word(features: Any) -> str:
    return features if isinstance(features, str) else getattr(features, "__name__", "function")

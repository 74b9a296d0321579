"""KAIROS as a method in a fit (arXiv 2506.23799). What it computes is in :mod:`ine_callback.methods.kairos.values`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ine_callback.errors import InfluenceError
from ine_callback.methods.fit_end import FitEndMethod
from ine_callback.methods.kairos.settings import NAME, KAIROSSettings
from ine_callback.methods.row_features import check_name
from ine_callback.scores import Attribution, Stage

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext


@dataclass(frozen=True)
class KAIROS(KAIROSSettings, FitEndMethod):
    """Values of the training rows: how much each brings the training set closer to a clean reference.

    Needs one pass over the training rows and the reference in evaluation mode, and no gradient.

    Args:
        sigma: Bandwidth of the Gaussian kernel in the features' unit; ``"median"``: the median distance of two
            reference rows.
        lam: λ, weight of the features; 1 − λ is that of the labels. With 1 no labels are needed.
        loo: Exact leave-one-out values; else first-order ones, as published. They cost the same.
        random_features: Frequencies that approximate the kernel, in time linear in the rows; None: exact.
        seed: Of the split of the reference, of the rows for the median and of the frequencies.
        reference: Clean rows, named as queries name their data: ``"val"``, a loader or a batch.
        features: ``"penultimate"``: what the network's last layer with parameters gets; ``"input"``: the first tensor
            of a batch; a dotted name: what that layer gets; or a function of module and batch that returns [b, d].
        at: When it runs: numbers of finished epochs, or the ``"end"`` of training.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> KAIROS(reference=[3, 4])
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: KAIROS: reference=[3, 4] are rows of the training set, ...
    """

    reference: Any = "val"
    features: str | Callable[[Any, Any], Any] = "penultimate"
    at: Sequence[Stage] = ("end",)

    name = NAME  # without a type, so no setting of the dataclass
    needs = ("whole_weights", "training_rows")  # no query: the reference is the question

    @property
    def data(self) -> Sequence[Any]:  # type: ignore[override]
        """The reference."""
        return (self.reference,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reference, list) and self.reference and all(isinstance(k, int) for k in self.reference):
            raise InfluenceError(
                f"{NAME}: reference={self.reference[:5]} are rows of the training set, and would vouch for themselves; "
                "pass 'val', a loader or a batch of other rows."
            )
        check_name(self.features, NAME)

    def run(self, context: FitContext) -> Attribution:
        """Values the training rows with the features of the present weights."""
        from ine_callback.methods.kairos.inputs import refuse_shared  # at first use, as is torch's
        from ine_callback.methods.kairos.values import DataValues
        from ine_callback.methods.row_features import Reader

        reader = Reader(NAME, context, self.features, labels=self.lam < 1)
        clean = reader.reference(self.reference)
        values = DataValues(clean.joined(NAME, "reference"), clean.known_labels(), self)
        rows = reader.training()
        refuse_shared(rows.digests, clean.digests)
        values.add(rows.joined(NAME, "training"), rows.known_labels(), context.progress)
        notes = (f"{NAME}: features are the input of layer {reader.layer!r}",) if reader.layer else ()
        found = values.attribution(self.reference if isinstance(self.reference, str) else "reference", notes)
        features = self.features if isinstance(self.features, str) else getattr(self.features, "__name__", "function")
        return replace(found, settings={**found.settings, "features": features})

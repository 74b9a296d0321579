"""Token influence: which tokens of the training rows teach a model an unwanted kind of text (IF-Guide, 2506.01790).

    v = (F + D)^-1 (gradient of the mean loss on unwanted texts - that on wanted ones)
    score of token j of row i = c_ij <v, gradient of -log p(token j | those before it)>

c_ij is the token's coefficient in the mean training loss. A positive score: training on the token lowers the loss on
unwanted texts by more than on wanted ones, so it promotes them. :func:`ine_callback.applications.token_mask.token_mask`
chooses tokens by it, and :mod:`ine_callback.applications.suppression` trains without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ine_callback.errors import InfluenceError
from ine_callback.methods.fit_end import FitEndMethod, Steps, check_stages
from ine_callback.methods.influence.settings import Damping, IFSettings, SolverName, TokenParts
from ine_callback.queries import BoundQuery, LossQuery
from ine_callback.scores import QueryInfo, Stage

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext

NAME = "token influence"
LEGEND = (
    "score: to first order, by how much the loss on the positive texts, less that on the negative ones, rises when the "
    "model is trained without the row or token; above 0: training on it promotes the positive texts."
)


@dataclass(frozen=True)
class TokenInfluence(FitEndMethod):
    """How much every token of the training rows promotes one kind of text, and not another.

    Args:
        positive: Texts of the kind that tokens are searched for, such as toxic completions: ``"val"``, a loader or a
            batch, as the module's step takes them.
        negative: Texts of the other kind, whose gradient is subtracted: else tokens that are frequent in both rank
            high. None: none.
        curvature: How ``(F + D) v = g`` is solved, as :class:`.IF` has it.
        damping: D, as :class:`.IF` has it.
        parts: ``"label"``: by each token's own loss; ``"position"``: by where the gradient arises.
        layers: Patterns of module names to which scores are restricted; None: all.
        at: When it runs: numbers of finished epochs, or the ``"end"`` of training.
        seed: Of drawn labels.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> TokenInfluence(positive="val", parts="word")
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: TokenInfluence: parts='word' is neither 'label' nor 'position'.
    """

    positive: Any = "val"
    negative: Any = None
    curvature: SolverName = "ekfac"
    damping: Damping | float = "auto"
    parts: TokenParts = "label"
    layers: Sequence[str] | None = None
    at: Sequence[Stage] = ("end",)
    seed: int = 0

    name = NAME  # without a type, so no setting of the dataclass
    needs = ("whole_weights", "training_rows")  # no query: the texts are the question

    @property
    def data(self) -> Sequence[Any]:  # type: ignore[override]
        """The texts."""
        return (self.positive,) if self.negative is None else (self.positive, self.negative)

    def __post_init__(self) -> None:
        if self.parts not in ("label", "position"):
            raise InfluenceError(f"TokenInfluence: parts={self.parts!r} is neither 'label' nor 'position'.")
        if self.positive is None:
            raise InfluenceError("TokenInfluence: positive=None names no texts; pass 'val', a loader or a batch.")
        check_stages("TokenInfluence", self.at)
        self._influence()

    def settings(self) -> dict[str, Any]:
        """The settings as plain types."""
        texts = {name: _named(getattr(self, name)) for name in ("positive", "negative")}
        return self._influence().settings() | texts

    def run(self, context: FitContext) -> Steps:
        """Scores tokens at the present weights."""
        from ine_callback.methods.influence.run import scored  # at first use: reading saved scores needs no passes

        found = yield from scored(self._influence(), context, [self._query(context)])
        return replace(
            found,
            method=NAME,
            settings={**found.settings, **self.settings()},
            title=f"Token influence, {found.title[0].lower()}{found.title[1:]}",
            legend=LEGEND,
        )

    def _influence(self) -> IFSettings:
        try:
            return IFSettings(
                self.curvature,
                damping=self.damping,
                per_token=self.parts,
                layers=self.layers,
                at=self.at,
                seed=self.seed,
            )
        except InfluenceError as error:
            words = str(error).removeprefix("IF: ").replace("solver=", "curvature=")
            raise InfluenceError(f"TokenInfluence: {words}") from None

    def _query(self, context: FitContext) -> BoundQuery:
        """The mean loss on the positive texts less that on the negative ones."""
        batches: list[tuple[float, Any]] = []
        for sign, data in zip((1.0, -1.0), self.data, strict=False):
            (bound,) = LossQuery(data).bind(NAME, context.source)
            batches += [(sign * weight, batch) for weight, batch in bound.batches]
        name = "positive" if self.negative is None else "positive - negative"
        question = "Does training on this row promote the positive texts more than the negative ones?"
        question = question if self.negative is not None else "Does training on this row promote the positive texts?"
        return BoundQuery(QueryInfo(name, "custom", question), context.source.loss, tuple(batches))


def _named(data: Any) -> str | None:
    return data if data is None or isinstance(data, str) else type(data).__name__

"""The curvature of a trained model for IF: passes over the rows, damping, and the linear system that solvers get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from ine_callback.capture import Block
from ine_callback.curvature.ekfac import EKFAC
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import SpectralOperator, identity, resolvent
from ine_callback.errors import InfluenceError
from ine_callback.methods.context import FitContext
from ine_callback.methods.fit_end import Take
from ine_callback.methods.influence.fisher import LABELS, Fisher, FisherRows, fisher_rows
from ine_callback.methods.influence.settings import ACROSS_LAYERS, IFSettings
from ine_callback.methods.influence.solvers.base import System
from ine_callback.methods.influence.space import ParameterSpace
from ine_callback.methods.passes import PerSamplePass
from ine_callback.methods.row_gradients import RowGradients

MAX_DIM = 8192  # sides of a layer larger than this have a diagonal covariance
RELATIVE_DAMPING = 0.1  # of a block's mean eigenvalue, as Grosse et al. 2023 take it
SEGMENTS = 3  # of the run, in each of which the damped solution is taken (SOURCE, arXiv 2405.12186)
ROTATED = ("ekfac", "kfac", "pcg", "astra")  # solvers that use Kronecker factors


class Curvature:
    """What the passes over the rows leave: Kronecker factors, the Fisher's diagonal in their basis, and its rows.

    Args:
        context: The trained model.
        settings: Which Fisher, damping and layers.
        fisher: Which labels.

    Attributes:
        fisher: The rows of the Fisher.
    """

    def __init__(self, context: FitContext, settings: IFSettings, fisher: Fisher) -> None:
        self._context, self._settings, self._labels = context, settings, fisher
        self._kfac = KFAC(MAX_DIM) if settings.solver in ROTATED else None
        self._ekfac: EKFAC | None = None
        self.fisher = FisherRows(context, fisher)
        self._last: Tensor | None = None
        self._batch = 0

    def passes(self) -> Iterator[tuple[PerSamplePass, Take]]:
        """The passes that it needs, each with what takes the rows' gradients."""
        if self._settings.solver == "identity":
            few = PerSamplePass(rows=range(min(2, self._context.rows)))  # finds the layers
            yield few, lambda rows, gradients: None
            return
        asked = PerSamplePass(LABELS[self._labels])
        if self._settings.basis == "run":
            if self._context.factors is None:
                raise InfluenceError("IF: basis='run' needs f-INE's factors; add FINE() to methods, or leave it out.")
            self._kfac = None
        elif self._kfac is not None:
            yield asked, self._factors
            self._kfac.end_step()
            if self._settings.solver == "kfac":
                return
        factors = self._context.factors if self._settings.basis == "run" else self._kfac
        self._ekfac = EKFAC(factors, self._context.rows)
        if self._kfac is not None and self.fisher.stored:
            for _, gradients in self.fisher.batches(None, 0):
                self._diagonal(gradients)
        else:
            self._batch, self._last = 0, None
            yield asked, self._rows

    def _factors(self, rows: Tensor, gradients: RowGradients) -> None:
        assert self._kfac is not None
        gradients = self._chosen(gradients)
        if self._last is not None and rows is not self._last:
            self._kfac.end_step()
        self._check(rows, gradients)
        for block in gradients:
            for one in gradients.grad_samples(block):
                self._kfac.observe(block, one, gradients.terms, len(rows))
        self.fisher.keep(rows, gradients)

    def _rows(self, rows: Tensor, gradients: RowGradients) -> None:
        gradients = self._chosen(gradients)
        self._check(rows, gradients)
        self._diagonal(fisher_rows(gradients, len(rows)))
        if self._kfac is None:
            self.fisher.keep(rows, gradients)

    def _diagonal(self, gradients: RowGradients) -> None:
        assert self._ekfac is not None
        for block in gradients:
            self._ekfac.observe(block, gradients.grad_samples(block), gradients.scale)

    def _chosen(self, gradients: RowGradients) -> RowGradients:
        return gradients.only(chosen_blocks(list(gradients), self._settings.layers))

    def _check(self, rows: Tensor, gradients: RowGradients) -> None:
        """Refuses gradients that are not finite, before they make all factors so."""
        self._batch += rows is not self._last
        self._last = rows
        # sums over the rows are not finite either, and no gradient of a single row is formed for them
        sums = gradients.weighted_sums(gradients.scale.new_ones(len(rows), 1))
        if lost := [block.name for block, total in sums.items() if not bool(total.isfinite().all())]:
            raise InfluenceError(
                f"IF: the gradients of {lost[0]} are not finite in batch {self._batch} (rows {int(rows[0])} to "
                f"{int(rows[-1])}); look for non-finite inputs there, or leave the layer out with layers=."
            )

    def system(self) -> System:
        """The linear system of the chosen blocks.

        Raises:
            InfluenceError: If no block is chosen, or ``damping="run"`` and the run's learning rates are not known.
        """
        blocks = chosen_blocks(list(self._context.table), self._settings.layers)
        if not blocks:
            names = ", ".join(sorted({_module(b) for b in self._context.table})[:8])
            raise InfluenceError(f"IF: layers={self._settings.layers!r} fits no captured layer; there are {names}.")
        space = ParameterSpace(sorted(blocks, key=lambda block: block.position))
        # on the device, in the widest dtype
        like = torch.cat([p.detach().flatten()[:1] for b in blocks for p in b.parameters])
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        if self._settings.solver == "identity":
            return System(space, self.fisher, torch.zeros(space.size).to(like), lambda x: x)
        damping = self._damping(space)
        operators = {b: self._source.operator(b, resolvent(value)).held() for b, value in damping.items()}
        return System(space, self.fisher, space.spread(damping).to(like), partial(applied, space, operators))

    @property
    def _source(self) -> EKFAC | KFAC:
        source = self._ekfac or self._kfac
        assert source is not None
        return source

    def _damping(self, space: ParameterSpace) -> dict[Block, float]:
        """Each block's damping."""
        asked, context = self._settings.damping, self._context
        if asked is None:
            across = self._settings.solver in ACROSS_LAYERS and context.summed_rates is not None
            asked = "run" if across else "auto"
        if asked == "run":
            if context.summed_rates is None:
                raise InfluenceError(
                    "IF: damping='run' needs the learning rates of the run, which are known in a fit with the "
                    "callback only; give a number, or damping='auto'."
                )
            return {b: SEGMENTS / max(1e-30, float(context.summed_rates(b.parameters)[0])) for b in space.blocks}
        if asked != "auto":
            return dict.fromkeys(space.blocks, float(asked))
        means = {b: self._source.operator(b, identity).weight for b in space.blocks}
        return {b: max(1e-30, RELATIVE_DAMPING * float(m.mean())) for b, m in means.items() if m is not None}


def chosen_blocks(blocks: list[Block], layers: object) -> list[Block]:
    """The blocks of some layers: all, the ``"last"`` one, or those whose module fits one of the patterns."""
    if layers is None:
        return blocks
    if layers == "last" or layers == ["last"]:
        # blocks come in the order of the backward pass, so the first one is the last layer's
        return [block for block in blocks if _module(block) == _module(blocks[0])]
    patterns = [layers] if isinstance(layers, str) else list(layers)  # type: ignore[call-overload]
    return [block for block in blocks if any(fnmatchcase(_module(block), pattern) for pattern in patterns)]


def _module(block: Block) -> str:
    return block.name.rpartition(".")[0]


def applied(space: ParameterSpace, operators: Mapping[Block, SpectralOperator], x: Tensor) -> Tensor:
    """The operators of all blocks applied to vectors [Q, P]."""
    with torch.no_grad():
        return space.join({block: operators[block].apply(part) for block, part in space.split(x).items()})

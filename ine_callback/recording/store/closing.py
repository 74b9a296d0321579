r"""The closing pass's part of the store, and the queries' part of it.

At weights along the run, with the Fisher F there in the store's entries and R the summed rates, a row's vector is

    z = (R^-1 + F)^-1 g,

so that ``<v, z>`` is the shift that the closing pass finds (:mod:`ine_callback.methods.closing`).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor

from ine_callback.capture import Block
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import damped
from ine_callback.methods.context import FitContext
from ine_callback.scoring.compression import Bases, Compression, placed
from ine_callback.scoring.coordinates import choose

DAMPING = 0.1  # from fixed weights, as in the closing pass


class CompressedCurvature:
    """``(R^-1 + F)^-1`` in the store's entries, or from fixed weights ``(F + damping)^-1`` of each layer.

    Of all rows' gradients F is exact in any entries. Kronecker factors at these weights are diagonal between their own
    eigenvectors alone, so gradients are taken between these, and the vectors moved to the store's entries: with the
    diagonal between the run's eigenvectors, rows from fixed weights of an MLP have a Spearman correlation with the
    pass itself of .57, so .95.

    Args:
        final: The store's entries.
        blocks: Those of the pass, by their keys.
        kfac: Kronecker factors at these weights.
        sample: Gradients of all rows at these weights, or of some for the curvature's size.
        rates: R of each block.
        decays: Exponent of weight decay of each block.
        rows: Number of rows N.
        random: Whether initial weights are random.

    Attributes:
        bases: The entries that gradients are taken in, by the blocks' keys.
        places: Where each block's are.
        size: How many there are.
    """

    def __init__(
        self,
        final: Compression,
        blocks: Mapping[str, Block],
        kfac: KFAC,
        sample: GradientSample,
        rates: Mapping[Block, Tensor],
        decays: Mapping[Block, Tensor],
        rows: int,
        random: bool,
    ) -> None:
        self._final, device = final, next(iter(rates.values())).device
        whole = sample.filled() if random and sample.rows >= rows else {}
        scale = 1.0 if not random or whole else sample.curvature_scale(kfac, rates)
        self.bases = _bases(final, blocks, kfac, whole, device)
        self.places = placed(self.bases)
        self.size = sum(len(basis.index) for basis in self.bases.values())
        self._roots, self._decay = torch.zeros(self.size, device=device), torch.ones(self.size, device=device)
        self._alone = torch.zeros(self.size, device=device)
        gradients = []
        for key, place in self.places.items():
            block, basis = blocks[key], self.bases[key]
            rate, decay = rates[block], decays[block]
            if block in whole:
                self._roots[place], self._decay[place] = rate.sqrt(), 1 / (1 + decay)
                gradients.append((place, basis.of_stored(whole[block])))
                continue
            # relative to the mean of the whole layer: that of the store's entries, the leading ones, is far larger
            least = DAMPING * kfac.mean(block).clamp_min(torch.finfo(torch.float32).tiny)
            spectrum, size_of = (damped(rate * scale, decay), rate) if random else (damped(1 / least), 1 / least)
            self._alone[place] = basis.diagonal(kfac, block, spectrum) * size_of
        self._gram: Tensor | None = None
        if gradients:
            self._rows = torch.zeros(len(gradients[0][1]), self.size, device=device)
            while gradients:  # one after the other: together they are as large as the rows' vectors
                place, found = gradients.pop()
                self._rows[:, place] = found * self._roots[place]
            small = self._rows @ self._rows.T if len(self._rows) < self.size else self._rows.T @ self._rows
            system = small.double()
            system.diagonal().add_(len(self._rows))
            self._gram = torch.linalg.cholesky(system)

    def vectors(self, g: Tensor) -> Tensor:
        """The store's vectors [b, W] of gradients g [b, W'], which are in :attr:`bases`."""
        return self._final.taken_from(self._apply(g), self.bases, self.places)

    def _apply(self, g: Tensor) -> Tensor:
        out = g * self._alone
        if self._gram is None:
            return out
        x = g * self._roots
        if len(self._rows) < self.size:
            solved = torch.cholesky_solve((self._rows @ x.T).double(), self._gram).float()
            inside = x - (self._rows.T @ solved).T
        else:
            inside = torch.cholesky_solve(x.T.double(), self._gram).float().T * len(self._rows)
        return out + inside * self._roots * self._decay


def _bases(
    final: Compression, blocks: Mapping[str, Block], kfac: KFAC, whole: Container[Block], device: torch.device
) -> Bases:
    """The store's entries, and others between these factors' eigenvectors for layers that have nothing else."""
    counts = {blocks[block.key]: x for block, x in final.counts(kfac).items() if block.key in blocks}
    alone = {block: x for block, x in counts.items() if block.key in final.bases and block not in whole}
    entries = sum(len(final.bases[block.key].index) for block in alone)
    own = choose(alone, kfac, entries, device)
    return {block.key: own.get(block, final.bases[block.key]) for block in counts if block.key in final.bases}


def compressed_rows(
    context: FitContext, bases: Bases, places: Mapping[str, slice], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every row's compressed gradient at the present weights, as a part of its batch's, times the batch's rows."""
    for which, gradients in context.per_sample():
        with torch.no_grad():
            out: Tensor | None = None
            for block in gradients:
                for one in gradients.grad_samples(block) if block.key in bases else ():
                    found = bases[block.key].of(one).float()
                    out = found.new_zeros(len(which), size) if out is None else out
                    out[:, places[block.key]] += found
            if out is not None:
                yield which, out * len(which)


def compressed_queries(context: FitContext, bases: Bases, places: Mapping[str, slice], size: int) -> Tensor:
    """The queries' compressed gradients [Q, W] at the present weights."""
    found = context.query_gradients()
    with torch.no_grad():
        device = next(iter(found.values())).device
        out = torch.zeros(len(context.queries), size, device=device)
        for block, v in found.items():
            if block.key in bases:
                out[:, places[block.key]] = bases[block.key].of_vectors(v).float()
    return out

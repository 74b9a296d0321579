r"""The closing pass's part of the store, and the queries' part of it.

At weights along the run, with the Fisher F there in the store's entries and R the summed rates, a row's vector is

    z = (R^-1 + F)^-1 g,

so that ``<v, z>`` is the shift that the closing pass finds (:mod:`ine_callback.methods.closing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ine_callback.capture import Block
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import damped
from ine_callback.methods.context import FitContext
from ine_callback.scoring.compression import Bases, Compression

DAMPING = 0.1  # from fixed weights, as in the closing pass


class CompressedCurvature:
    """``(R^-1 + F)^-1`` in the store's entries, or from fixed weights ``(F + damping)^-1`` of each layer.

    Args:
        compression: The store's entries.
        blocks: Those of the pass, by their keys.
        kfac: Kronecker factors at these weights.
        sample: Gradients of all rows at these weights, or of some for the curvature's size.
        rates: R of each block.
        decays: Exponent of weight decay of each block.
        rows: Number of rows N.
        random: Whether initial weights are random.
    """

    def __init__(
        self,
        compression: Compression,
        blocks: Mapping[str, Block],
        kfac: KFAC,
        sample: GradientSample,
        rates: Mapping[Block, Tensor],
        decays: Mapping[Block, Tensor],
        rows: int,
        random: bool,
    ) -> None:
        self._bases, self._places = compression.bases, compression.places
        whole = sample.filled() if random and sample.rows >= rows else {}
        scale = 1.0 if not random or whole else sample.curvature_scale(kfac, rates)
        size, device = compression.size, next(iter(rates.values())).device
        self._roots, self._decay = torch.zeros(size, device=device), torch.ones(size, device=device)
        self._alone = torch.zeros(size, device=device)
        gradients = []
        for key, place in self._places.items():
            block = blocks.get(key)
            if block is None:
                continue
            rate, decay = rates[block], decays[block]
            if block in whole:
                self._roots[place], self._decay[place] = rate.sqrt(), 1 / (1 + decay)
                gradients.append((place, self._bases[key].of_stored(whole[block])))
                continue
            # relative to the mean of the whole layer: that of the store's entries, the leading ones, is far larger
            least = DAMPING * kfac.mean(block).clamp_min(torch.finfo(torch.float32).tiny)
            spectrum, size_of = (damped(rate * scale, decay), rate) if random else (damped(1 / least), 1 / least)
            self._alone[place] = self._bases[key].diagonal(kfac, block, spectrum) * size_of
        self._gram: Tensor | None = None
        if gradients:
            self._rows = torch.zeros(len(gradients[0][1]), size, device=device)
            for place, found in gradients:
                self._rows[:, place] = found * self._roots[place]
            small = self._rows @ self._rows.T if len(self._rows) < size else self._rows.T @ self._rows
            system = small.double()
            system.diagonal().add_(len(self._rows))
            self._gram = torch.linalg.cholesky(system)

    def apply(self, g: Tensor) -> Tensor:
        """Of gradients g [b, W]."""
        out = g * self._alone
        if self._gram is None:
            return out
        x = g * self._roots
        if len(self._rows) < g.shape[1]:
            solved = torch.cholesky_solve((self._rows @ x.T).double(), self._gram).float()
            inside = x - (self._rows.T @ solved).T
        else:
            inside = torch.cholesky_solve(x.T.double(), self._gram).float().T * len(self._rows)
        return out + inside * self._roots * self._decay


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

r"""The discount across layers: gradients of a sample of rows stand for the Fisher of the whole network.

The discount ``exp(-R F)`` is what the rest of training leaves of a change made now. Kronecker factors (:mod:`.kfac`)
treat every layer alone, although the layers' leading directions act together. So a reservoir of rows, uniform over the
run so far, stores the gradients that the hooks capture, as factors where that is smaller. Let ``K`` be their Gram
matrix, summed over layers with each layer's exponent as weight (remaining learning rate times the optimizer's rate).
With ``K / m = E L E^T`` and the unit directions ``u_k = sum_i E_ik g_i / sqrt(m L_k)``,

    D v = v - sum_k (1 - exp(-l_k)) <v, u_k> u_k,    l_k = mean over *other* rows of <u_k, g>^2,

times the exponential of weight decay. Three quarters of the sample span the directions u_k. The last quarter measures
their curvature l_k, which the rows that span them would overestimate (Spearman .83 -> .72 on G1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample, Lookup
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import identity
from ine_callback.curvature.stored_gradients import FORMED, StoredGradients, quarters, to_store
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import InfluenceError

MAX_BYTES = 2**28  # memory for the stored gradients
MIN_ROWS = 64  # fewer rows span too little
MIN_RELATIVE_EIGENVALUE = 1e-7  # smaller ones, relative to the largest, are rounding
Exponents = Mapping[Block, tuple[Tensor | float, Tensor | float]]  # of the discount, by curvature and by weight decay


@dataclass
class _Selection:
    """Which rows of a batch are stored, in which places of the sample, and the factor of their gradients."""

    rows: Tensor
    places: Tensor
    scale: Tensor | float


@dataclass(frozen=True)
class Removed:
    """``D v = v - G^T E diag(weight) E^T G R v`` with the basis rows' gradients G, before weight decay.

    Attributes:
        rows: G, the gradients of m rows in each block.
        vectors: E [m, m].
        weight: Of each eigenvector [m].
    """

    rows: dict[Block, StoredGradients]
    vectors: Tensor
    weight: Tensor

    def apply(self, v: Mapping[Block, Tensor], exponents: Exponents) -> dict[Block, Tensor]:
        """``D v`` [Q, *layout] of every stored block, with weight decay."""
        projected: Tensor | float = 0.0
        for block, rows in self.rows.items():
            projected = projected + rows.products(v[block].float()) * exponents[block][0]
        assert isinstance(projected, Tensor)
        coefficients = (self.vectors @ (self.weight[:, None] * (self.vectors.T @ projected.double()))).float()
        out = {}
        for block, rows in self.rows.items():
            remaining = v[block] - rows.combined(coefficients).to(v[block].dtype)
            out[block] = remaining * torch.exp(-torch.as_tensor(exponents[block][1]))
        return out


class GradientSample:
    """Captured gradients of a uniform sample of the rows seen so far.

    Args:
        rows: Size of the sample (0: none); fewer rows where they would take more than :data:`MAX_BYTES`.
        seed: Seed of the private generator that selects them.
        least: Where fewer rows fit there is no sample at all; None: :data:`MIN_ROWS`. Few rows of a large model span
            too little of what the queries' gradients are in: LDS of f-INE in fine-tuning .64 with a third of the rows,
            .69 without (``python -m benchmarks.finetuning``).

    Raises:
        InfluenceError: If ``rows`` is no count.
    """

    def __init__(self, rows: int, seed: int = 0, least: int | None = None) -> None:
        if not isinstance(rows, int) or rows < 0:
            raise InfluenceError(f"reservoir={rows!r} must be an integer of at least 0 (0: no reservoir).")
        self.rows = self._requested = rows
        self.note = ""
        self._seed, self._least = seed, MIN_ROWS if least is None else least
        self._stored: dict[Block, StoredGradients] = {}
        self._new: dict[Block, StoredGradients] = {}
        self._selection: _Selection | None = None
        self._filled, self._seen = 0, 0  # rows in the sample, and rows that it was selected from
        self._owed = 0.0  # rows to replace, summed as fractions over the steps
        self._saved: list[dict[str, Any]] = []

    def open(self, grad_samples: Iterable[tuple[Block, GradSample]], processes: Lockstep, beside: bool = False) -> None:
        """Begins an empty sample for the blocks of a batch. Earlier rows are dropped: they lack blocks that joined.

        Embeddings and reused blocks have K-FAC's discount alone. Each process stores its part of the rows.

        Args:
            grad_samples: Each block's gradients.
            processes: Those that train together.
            beside: Whether the blocks of the sample so far stay in it: they come in a pass of their own.
        """
        if not self.rows:
            return
        self._filled, self._seen, self._owed = 0, 0, 0.0
        first = {block: rows.map(lambda x: x[:1]) for block, rows in self._stored.items()} if beside else {}
        for block, grad_sample in grad_samples:
            if not block.reused and not isinstance(grad_sample, Lookup):
                first[block] = to_store(grad_sample, slice(0, 1))
        per_row = sum(rows.elements for rows in first.values())
        rows = min(-(-self._requested // processes.count), MAX_BYTES // (4 * max(1, per_row)))
        if not first or rows * processes.count < self._least:
            large = f"a row's gradients ({4e-6 * per_row:.1f} MB) are too large to store {self._least} rows"
            reused = "all layers are embeddings, or called several times a batch"
            why = f"{large} in {MAX_BYTES / 2**20:.0f} MB" if first else reused
            self.note = f"the discount is K-FAC's alone: {why}"
            self.rows = 0
            return
        self.rows = rows
        self._stored = {block: one.map(lambda x: x.new_zeros(rows, *x.shape[1:])) for block, one in first.items()}
        device = next(iter(self._stored.values())).right.device
        self._generator = torch.Generator(device).manual_seed(self._seed)

    def state_dict(self, processes: Lockstep | None) -> dict[str, Any]:
        """The sample of every process, right after an exchange; or of this process alone."""
        stored = {block.key: rows.map(lambda x: x[: self._filled].clone()) for block, rows in self._stored.items()}
        state: dict[str, Any] = {"rows": self.rows, "note": self.note}
        state["kept"] = {key: [rows.left, rows.right] for key, rows in stored.items()}
        if stored:
            state |= {"filled": self._filled, "seen": self._seen, "owed": self._owed}
            state["generator"] = self._generator.get_state()
        return {"processes": [state] if processes is None else processes.gather(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Holds what :meth:`state_dict` returned until :meth:`reopen` knows the blocks."""
        self._saved = state["processes"]

    def reopen(
        self,
        grad_samples: Iterable[tuple[Block, GradSample]],
        processes: Lockstep,
        others: Sequence[Block] = (),
    ) -> None:
        """Begins the sample for the blocks of a resumed run's first batch, with the saved rows.

        Args:
            grad_samples: Each block's gradients.
            processes: Those that train together.
            others: Blocks that may come in a later pass, or batch, beside these.
        """
        saved, self._saved = self._saved, []
        if others and len(saved) == processes.count:
            named, device = {block.key: block for block in others}, others[0].parameters[0].device
            for key, (left, right) in saved[processes.rank]["kept"].items():
                if key in named:
                    rows = StoredGradients(None if left is None else left.to(device), right.to(device))
                    self._stored[named[key]] = rows
        self.open(grad_samples, processes, beside=bool(others))
        if len(saved) != processes.count:
            self.note = f"the reservoir was begun anew: {len(saved)} processes saved it, {processes.count} resumed"
            return
        state = saved[processes.rank]
        self.rows, self.note = state["rows"], state["note"]
        self._stored = {block: rows for block, rows in self._stored.items() if block.key in state["kept"]}
        if not self._stored:
            return
        self._filled, self._seen, self._owed = state["filled"], state["seen"], state["owed"]
        for block, rows in self._stored.items():
            for place, values in zip((rows.left, rows.right), state["kept"][block.key], strict=True):
                if place is not None:
                    place[: self._filled] = values.to(place)
        if state["generator"].shape == self._generator.get_state().shape:  # else it is from another kind of device
            self._generator.set_state(state["generator"].cpu())

    @property
    def full(self) -> bool:
        """Whether new rows replace earlier ones."""
        return self._filled >= self.rows

    def select(self, rows: int, terms: Tensor | float, window: int, steps: int = 1) -> None:
        """Selects at random which rows of a batch will be stored.

        Args:
            rows: Rows of the batch.
            terms: Terms of the mean that the loss is.
            window: Rows of the whole optimizer step.
            steps: Optimizer steps that the batch stands for.
        """
        if not self._stored:
            return
        device = self._generator.device
        free = min(rows, self.rows - self._filled)
        self._seen += rows if free > 0 else rows * steps
        order = torch.randperm(rows, generator=self._generator, device=device)
        if free > 0:
            places = torch.arange(self._filled, self._filled + free, device=device)
            self._filled += free
        else:
            self._owed += self.rows * rows * steps / self._seen
            free = min(int(self._owed), rows, self.rows)
            self._owed -= free
            places = torch.randperm(self.rows, generator=self._generator, device=device)[:free]
        # so scaled, the mean over rows of g g^T is the Fisher of the loss as it was differentiated
        self._selection = _Selection(order[:free], places, torch.as_tensor(terms * window).sqrt())

    def observe(self, block: Block, grad_sample: GradSample) -> None:
        """Takes the selected rows of one block's per-sample gradients."""
        if self._selection is None or block not in self._stored:
            return
        if block.reused or block in self._new:  # a row's gradient is a sum over uses: left to K-FAC
            self.forget(block)
            return
        new = to_store(grad_sample, self._selection.rows, self._selection.scale)
        if (new.left is None) != (self._stored[block].left is None):  # one position now, several before: left to K-FAC
            self.forget(block)
            return
        self._new[block] = new

    def forget(self, block: Block) -> None:
        """Drops a block's rows."""
        self._stored.pop(block, None)
        self._new.pop(block, None)

    def commit(self) -> None:
        """Stores the selected rows in their places; a block that the batch did not use has zero gradients there."""
        if self._selection is None:
            return
        for block, stored in self._stored.items():
            new = self._new.get(block)
            stored.right[self._selection.places] = 0.0 if new is None else new.right
            if stored.left is not None:
                stored.left[self._selection.places] = 0.0 if new is None or new.left is None else new.left
        self._new.clear()
        self._selection = None

    def damped(self, v: Mapping[Block, Tensor], rates: Mapping[Block, Tensor | float]) -> dict[Block, Tensor]:
        """``(1 + R F)^-1 v`` [Q, *layout] of every stored block; F is the Fisher of the stored rows, across layers.

        By Woodbury's identity, with G the m rows' gradients: ``v - G^T (m + R G G^T)^-1 R G v``.

        Args:
            v: Vectors [Q, *layout] of each block.
            rates: R of each block.
        """
        stored = {block: rows for block, rows in self.filled().items() if block in v}
        if not stored:
            return {}
        system = torch.zeros((), dtype=torch.float64, device=next(iter(v.values())).device)
        for block, rows in stored.items():  # one after the other: each is as large as the rows, squared
            system = system + rows.gram(rows).double() * rates[block]
        products = torch.stack([rows.products(v[b].float()) * rates[b] for b, rows in stored.items()]).sum(0)
        system.diagonal().add_(self._filled)
        coefficients = torch.cholesky_solve(products.double(), torch.linalg.cholesky(system)).float()
        return {block: v[block] - rows.combined(coefficients).to(v[block].dtype) for block, rows in stored.items()}

    def curvature_scale(self, kfac: KFAC, rates: Mapping[Block, Tensor | float]) -> float:
        """How many times larger the curvature across layers is than that of the layers' Kronecker factors.

        Layers act together, which factors of single layers do not know. Let K be the sample's Gram matrix over all
        layers, weighted by their rates. The mean of K_ij^2 over pairs of different rows is the curvature along a row's
        gradient; the factors' own is the mean over rows of the sum over layers of <g, F g>, weighted by squared rates.

        Args:
            kfac: The factors.
            rates: Each layer's factor of a gradient in a change of its weights.
        """
        if self._filled < MIN_ROWS:
            return 1.0
        gram: Tensor | float = 0.0
        alone: Tensor | float = 0.0
        for block, stored in self._stored.items():
            if block not in rates:
                continue
            rows = stored.map(lambda x: x[: self._filled])
            gram = gram + rows.gram(rows) * rates[block]
            fisher = kfac.operator(block, identity).held()
            for start in range(0, self._filled, FORMED):
                g = rows.part(start).formed()
                alone = alone + (fisher.apply(g) * g).sum() * rates[block] ** 2 / self._filled
        if not isinstance(gram, Tensor) or not float(alone) > 0:
            return 1.0
        return float(_mean_square_off_diagonal(gram) / alone)

    def _joined(self, processes: Lockstep) -> dict[Block, StoredGradients]:
        """The rows of all processes, in the blocks that all of them store; as many rows of each process."""
        names = processes.common(block.key for block in self._stored)
        rows = min(filled for filled, _ in processes.exchange(self._filled))
        common = sorted((block for block in self._stored if block.key in names), key=lambda block: block.key)
        sizes = [rows] * processes.count
        return {block: self._stored[block].map(lambda x: processes.join(x[:rows], sizes)) for block in common}

    def apply(self, v: Mapping[Block, Tensor], exponents: Exponents, processes: Lockstep) -> dict[Block, Tensor]:
        """``D v`` [Q, *layout] of every stored block.

        Args:
            v: Vectors [Q, *layout] of each block.
            exponents: Exponent by curvature, and by weight decay, of each block.
            processes: Those whose rows make the sample.
        """
        found = self.removed({block: both for block, both in exponents.items() if block in v}, processes)
        return {} if found is None else found.apply(v, exponents)

    def removed(self, exponents: Exponents, processes: Lockstep) -> Removed | None:
        """What the discount removes of vectors in the blocks of ``exponents``; None where too little is stored."""
        stored = {block: rows for block, rows in self._joined(processes).items() if block in exponents}
        quarter = len(next(iter(stored.values())).right) // 4 if stored else 0
        if not stored or not quarter:
            return None
        basis = {block: rows.map(lambda x: quarters(x, quarter, slice(0, 3))) for block, rows in stored.items()}
        gram: Tensor | float = 0.0
        cross: Tensor | float = 0.0
        for block, rows in basis.items():
            others = stored[block].map(lambda x: quarters(x, quarter, slice(3, 4)))
            gram = gram + rows.gram(rows) * exponents[block][0]
            cross = cross + others.gram(rows) * exponents[block][0]
        return Removed(basis, *_spectrum(gram, cross))

    def filled(self) -> dict[Block, StoredGradients]:
        """The rows stored so far."""
        return {block: rows.map(lambda x: x[: self._filled]) for block, rows in self._stored.items()}


def _mean_square_off_diagonal(gram: Tensor) -> Tensor:
    squares = gram.double().square()
    m = len(squares)
    return (squares.sum() - squares.diagonal().sum()) / (m * (m - 1))


def _spectrum(gram: Tensor | float, cross: Tensor | float) -> tuple[Tensor, Tensor]:
    """Eigenvectors [m, m] of the basis rows' Gram matrix, and what is removed along each [m], in double.

    Args:
        gram: Inner products of the basis rows [m, m].
        cross: Inner products of the other rows with them [n, m].
    """
    assert isinstance(gram, Tensor) and isinstance(cross, Tensor)
    m = gram.shape[0]
    values, vectors = torch.linalg.eigh(gram.double() / m)
    nonzero = values > MIN_RELATIVE_EIGENVALUE * values[-1]
    norms = torch.where(nonzero, m * values, 1.0)
    curvature = (cross.double() @ vectors).square().mean(0) / norms
    return vectors, torch.where(nonzero, -torch.expm1(-curvature) / norms, 0.0)

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample, Lookup, Outer, Vector
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import identity
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import InfluenceError

MAX_BYTES = 2**28  # memory for the stored gradients
MIN_ROWS = 64  # fewer rows span too little
_FORMED = 16  # rows whose gradients are formed at once
MIN_RELATIVE_EIGENVALUE = 1e-7  # smaller ones, relative to the largest, are rounding


@dataclass
class _Selection:
    """Which rows of a batch are stored, in which places of the sample, and the factor of their gradients."""

    rows: Tensor
    places: Tensor
    scale: Tensor | float


@dataclass
class _StoredGradients:
    """Gradients of n rows, whole (``right`` [n, *layout]) or as ``left right^T`` (left [n, G, O], right [n, G, I])."""

    left: Tensor | None
    right: Tensor

    @property
    def elements(self) -> int:
        return self.right.numel() + (0 if self.left is None else self.left.numel())

    def map(self, change: Callable[[Tensor], Tensor]) -> _StoredGradients:
        return _StoredGradients(None if self.left is None else change(self.left), change(self.right))

    def gram(self, other: _StoredGradients) -> Tensor:
        """Inner products [n, m]."""
        if self.left is None or other.left is None:
            return self.right.flatten(1) @ other.right.flatten(1).T
        return (_inner(self.left, other.left) * _inner(self.right, other.right)).sum(0)

    def products(self, v: Tensor) -> Tensor:
        """Inner products [n, Q] with v [Q, *layout]."""
        if self.left is None:
            return self.right.flatten(1) @ v.flatten(1).T
        return Outer(self.right[:, :, None], self.left[:, :, None]).signals(v)

    def part(self, start: int) -> _StoredGradients:
        """Some rows from ``start`` on: few enough to be formed."""
        return self.map(lambda x: x[start : start + _FORMED])

    def formed(self) -> Tensor:
        """The gradients [n, *layout]."""
        if self.left is None:
            return self.right
        return self.left[..., :, None] * self.right[..., None, :]

    def combined(self, coefficients: Tensor) -> Tensor:
        """Sums of the gradients with coefficients [n, Q], as [Q, *layout]."""
        if self.left is None:
            return torch.einsum("nq,n...->q...", coefficients, self.right)
        weighted = torch.einsum("nq,ngo->qgon", coefficients, self.left)
        return weighted @ self.right.transpose(0, 1)


def _quarters(x: Tensor, quarter: int, which: slice) -> Tensor:
    """Some rows of every four rows."""
    return x[: 4 * quarter].view(quarter, 4, *x.shape[1:])[:, which].flatten(0, 1)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner products [G, n, m] of x [n, G, K] and y [m, G, K]."""
    return x.transpose(0, 1) @ y.permute(1, 2, 0)


def _to_store(grad_sample: GradSample, rows: Tensor | slice, scale: Tensor | float = 1.0) -> _StoredGradients:
    """Gradients of chosen rows, summed over positions, in float32; as factors where there is one position."""
    if isinstance(grad_sample, Outer) and grad_sample.positions is None:
        return _StoredGradients(None, grad_sample.wide().gradient(rows).float() * scale)
    if isinstance(grad_sample, Outer):
        activations, output_grads = grad_sample.formed(rows).float(), grad_sample.output_grads[rows].float() * scale
        if activations.shape[2] == 1:
            return _StoredGradients(output_grads[:, :, 0], activations[:, :, 0])
        return _StoredGradients(None, output_grads.transpose(-1, -2) @ activations)
    assert isinstance(grad_sample, Vector)
    return _StoredGradients(None, grad_sample.g[rows].float() * scale)


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
        self._stored: dict[Block, _StoredGradients] = {}
        self._new: dict[Block, _StoredGradients] = {}
        self._selection: _Selection | None = None
        self._filled, self._seen = 0, 0  # rows in the sample, and rows that it was selected from
        self._owed = 0.0  # rows to replace, summed as fractions over the steps
        self._saved: list[dict[str, Any]] = []

    def open(self, grad_samples: Sequence[tuple[Block, GradSample]], processes: Lockstep, beside: bool = False) -> None:
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
        usable = {
            block: grad_sample
            for block, grad_sample in grad_samples
            if not block.reused and not isinstance(grad_sample, Lookup)
        }
        first = {block: rows.map(lambda x: x[:1]) for block, rows in self._stored.items()} if beside else {}
        first |= {block: _to_store(grad_sample, slice(0, 1)) for block, grad_sample in usable.items()}
        per_row = sum(rows.elements for rows in first.values())
        rows = min(-(-self._requested // processes.count), MAX_BYTES // (4 * max(1, per_row)))
        if not first or rows * processes.count < self._least:
            self.note = (
                f"the discount is K-FAC's alone: a row's gradients ({4e-6 * per_row:.1f} MB) are too large to store "
                f"{self._least} rows in {MAX_BYTES / 2**20:.0f} MB"
            )
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
        grad_samples: Sequence[tuple[Block, GradSample]],
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
                    rows = _StoredGradients(None if left is None else left.to(device), right.to(device))
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
        new = _to_store(grad_sample, self._selection.rows, self._selection.scale)
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
        stored = {block: rows.map(lambda x: x[: self._filled]) for block, rows in self._stored.items() if block in v}
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
            fisher = kfac.operator(block, identity)
            for start in range(0, self._filled, _FORMED):
                g = rows.part(start).formed()
                alone = alone + (fisher.apply(g) * g).sum() * rates[block] ** 2 / self._filled
        if not isinstance(gram, Tensor) or not float(alone) > 0:
            return 1.0
        return float(_mean_square_off_diagonal(gram) / alone)

    def _joined(self, processes: Lockstep) -> dict[Block, _StoredGradients]:
        """The rows of all processes, in the blocks that all of them store; as many rows of each process."""
        names = processes.common(block.key for block in self._stored)
        rows = min(filled for filled, _ in processes.exchange(self._filled))
        common = sorted((block for block in self._stored if block.key in names), key=lambda block: block.key)
        sizes = [rows] * processes.count
        return {block: self._stored[block].map(lambda x: processes.join(x[:rows], sizes)) for block in common}

    def apply(
        self,
        v: Mapping[Block, Tensor],
        exponents: Mapping[Block, tuple[Tensor | float, Tensor | float]],
        processes: Lockstep,
    ) -> dict[Block, Tensor]:
        """``D v`` [Q, *layout] of every stored block.

        Args:
            v: Vectors [Q, *layout] of each block.
            exponents: Exponent by curvature, and by weight decay, of each block.
            processes: Those whose rows make the sample.
        """
        stored = {block: rows for block, rows in self._joined(processes).items() if block in v}
        quarter = len(next(iter(stored.values())).right) // 4 if stored else 0
        if not stored or not quarter:
            return {}
        basis = {block: rows.map(lambda x: _quarters(x, quarter, slice(0, 3))) for block, rows in stored.items()}
        others = {block: rows.map(lambda x: _quarters(x, quarter, slice(3, 4))) for block, rows in stored.items()}
        gram: Tensor | float = 0.0
        cross: Tensor | float = 0.0
        projected: Tensor | float = 0.0
        for block, rows in basis.items():
            exponent = exponents[block][0]
            gram = gram + rows.gram(rows) * exponent
            cross = cross + others[block].gram(rows) * exponent
            projected = projected + rows.products(v[block].float()) * exponent
        coefficients = _coefficients(gram, cross, projected)
        out = {}
        for block, rows in basis.items():
            remaining = v[block] - rows.combined(coefficients).to(v[block].dtype)
            out[block] = remaining * torch.exp(-torch.as_tensor(exponents[block][1]))
        return out


def _mean_square_off_diagonal(gram: Tensor) -> Tensor:
    squares = gram.double().square()
    m = len(squares)
    return (squares.sum() - squares.diagonal().sum()) / (m * (m - 1))


def _coefficients(gram: Tensor | float, cross: Tensor | float, projected: Tensor | float) -> Tensor:
    """What the discount subtracts from v, as coefficients of the m basis rows [m, Q].

    Args:
        gram: Inner products of the basis rows [m, m].
        cross: Inner products of the other rows with them [n, m].
        projected: Inner products of the basis rows with v [m, Q].
    """
    assert isinstance(gram, Tensor) and isinstance(cross, Tensor) and isinstance(projected, Tensor)
    m = gram.shape[0]
    values, vectors = torch.linalg.eigh(gram.double() / m)
    nonzero = values > MIN_RELATIVE_EIGENVALUE * values[-1]
    norms = torch.where(nonzero, m * values, 1.0)
    curvature = (cross.double() @ vectors).square().mean(0) / norms
    weight = torch.where(nonzero, -torch.expm1(-curvature) / norms, 0.0)
    out: Tensor = vectors @ (weight[:, None] * (vectors.T @ projected.double()))
    return out.float()

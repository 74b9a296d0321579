"""One block's direction: how per-sample gradients are contracted with every query's U, and with themselves.

The discount ``D = exp(-R F)`` is what the rest of training leaves of a change made now. Queries have it in U. In
self-influence it is K-FAC's alone: the gradient sample's discount would need the projections of each row.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ine_callback.capture import Block, GradSample, Lookup, Outer, Vector
from ine_callback.capture.per_sample_gradients import CompressedGradients, widened
from ine_callback.capture.per_sample_gradients.compressed import MAX_WEIGHTED_QUERIES, weighted_columns
from ine_callback.curvature.low_rank import MIN_INPUTS, low_rank
from ine_callback.curvature.sketch import HALVES
from ine_callback.curvature.spectral import SketchedOperator, SpectralOperator
from ine_callback.scoring.sign_contrasts import Contrasts, summed

MAX_FORMED = 1 << 16  # entries of a tied block whose gradient is formed for each row

Use = GradSample | CompressedGradients  # one use of a block, as self-influence needs it


@dataclass
class SelfTerms:
    """Self-influence terms: squared norms of the rows' gradients g_i in one block.

    Attributes:
        norms: ``<D g_i, g_i>`` and ``|D g_i|^2`` [b, 2].
        unit_energies: Squared norms by units [b, 1 + J], see :func:`.signed_by`.
        halves: Of a sketch, both norms by one half of a side's mixtures minus those by the other [b, 2, 2], for the
            left and the right side.
    """

    norms: Tensor
    unit_energies: Tensor
    halves: Tensor | None = None


@dataclass
class DirectionSpec:
    """What one block's direction is made of.

    Attributes:
        discount: K-FAC's discount D.
        weight: Factor of a gradient contribution in a step, relative to the first parameter group's.
        exponents: Exponents of the discount by curvature and by weight decay.
    """

    discount: SpectralOperator
    weight: Tensor | float
    exponents: tuple[Tensor | float, Tensor | float]


@dataclass
class Direction(ABC):
    """Contracts the per-sample gradients of one block.

    Attributes:
        block: The block.
        contrasts: Signs of its units.
        queries: U [Q, *layout], or U in the columns of a compressed direction; None without queries.
    """

    block: Block
    contrasts: Contrasts
    queries: Tensor | None

    @abstractmethod
    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        """Signals with their contrasts [b, Q, 1 + J] (None without queries), and what :meth:`self_terms_of` needs."""

    @abstractmethod
    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        """Self-influence terms of the gradients summed over all uses of the block in a batch."""

    def draw(self, count: int) -> None:  # noqa: B027 - only a sketch has columns to draw
        """Draws new columns for the sketch, where there is one; ``count`` enters their seed."""


@dataclass
class ExactDirection(Direction):
    """The exact U and D, in float32 or better.

    Attributes:
        discount: D.
    """

    discount: SpectralOperator

    def __post_init__(self) -> None:
        self.discount = self.discount.held()

    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        grad_sample = grad_sample.wide()
        if self.queries is None:
            return None, grad_sample
        return self.contrasts.of_queries(self.block, grad_sample, self.queries), grad_sample

    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        grad_samples = [use for use in uses if isinstance(use, GradSample)]
        single = len(grad_samples) == 1
        norms = self.discount.norms(grad_samples[0]) if single else self.discount.norms_of_sum(grad_samples)
        return SelfTerms(norms, self.contrasts.of_self(self.block, grad_samples))


@dataclass
class VectorDirection(Direction):
    """For a vector (a bias, a norm's scale): one matrix product for signals, one of squares for self-influence.

    Attributes:
        discount: D.
    """

    discount: SpectralOperator

    def __post_init__(self) -> None:
        signs = self.contrasts.signs(self.block, self.block.layout)
        found = self.discount.weight
        weight = torch.ones_like(signs[0]) if found is None else found
        self._signed: Tensor | None = None
        if self.queries is not None:
            self._signed = (self.queries[:, None] * signs).flatten(0, 1).T
        self._squares = torch.cat([torch.stack([weight, weight.square()]), signs]).T

    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        assert isinstance(grad_sample, Vector)
        if self._signed is None:
            return None, grad_sample
        return (grad_sample.g @ self._signed).view(grad_sample.rows, -1, 1 + self.contrasts.count), grad_sample

    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        squares = summed([use.g for use in uses if isinstance(use, Vector)]).square() @ self._squares
        return SelfTerms(squares[:, :2], squares[:, 2:])


@dataclass
class CompressedDirection(Direction):
    """One pass over the per-sample gradients compresses each to a few columns of its inputs, which all else uses.

    The columns are the queries' basis, then those of the sketch's input side for self-influence. Queries without a
    basis are given in the sketch's columns if these span all inputs (:attr:`in_sketch`); else they are contracted apart
    and exactly. Per-sample gradients may be in bfloat16. Columns must be drawn before the first contraction.

    Where the block's units are the network's outputs, gradients are transposed, see :class:`Contrasts`.

    Attributes:
        sketch: The sketch of D; None without self-influence.
        basis: The dimensions [G, I, r] that the queries are given in, see :mod:`ine_callback.curvature.low_rank`.
        in_sketch: Whether the queries are given in the sketch's columns.
        weighted: Whether few queries are multiplied with the units' weights beforehand, which is faster and as many
            times larger.
    """

    sketch: SketchedOperator | None
    basis: Tensor | None = None
    in_sketch: bool = False
    weighted: bool = True

    def __post_init__(self) -> None:
        groups, out, inputs = self.block.layout
        self._signs = self.contrasts.signs(self.block, (groups, inputs if self.block.outputs else out))
        self._compressed = self.queries is not None and (
            self.in_sketch or self.basis is not None
        )  # whether U is given in columns
        self._signed: Tensor | None = None
        few = self.weighted and self.queries is not None and len(self.queries) <= MAX_WEIGHTED_QUERIES
        if self.queries is not None and self._compressed and few:
            self._signed = weighted_columns(self.queries, self._signs)
        if self.sketch is not None:
            self._weights = self.sketch.weights_and_halves
            self._columns_of_weights = self._weights.transpose(-1, -2).flatten(1).T

    def draw(self, count: int) -> None:
        if self.sketch is not None:
            # not the block's name or index: names differ in a LightningModule, the order in a resumed run
            seed = zlib.crc32(f"{self.block.position} {self.block.layout} {count}".encode())
            self.sketch.draw(torch.Generator(self.block.parameters[0].device).manual_seed(seed))
        right = None if self.sketch is None else self.sketch.right
        columns = [x for x in (self.basis, right) if x is not None]
        self._columns = aligned(torch.cat(columns, -1)) if columns else None
        widths = [x.shape[-1] for x in columns]
        self._query_columns = slice(0, widths[0] if columns else None)
        self._sketch_columns = slice(0 if self.basis is None else widths[0], sum(widths))

    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        if self.block.outputs:
            assert isinstance(grad_sample, Outer | Lookup)
            grad_sample = grad_sample.transposed()
        assert isinstance(grad_sample, Outer)
        signals = None
        if self.queries is not None and not self._compressed:
            signals = grad_sample.parts(self.queries, self._signs)
        if self._columns is None:
            return signals, grad_sample
        if grad_sample.positions == 1:
            return self._contract_one_position(grad_sample, signals)
        compressed = grad_sample.compressed(self._columns)
        if self.queries is not None and self._compressed:
            for_queries = compressed.part(self._query_columns)
            if self._signed is None:
                signals = for_queries.units(self.queries) @ self._signs.T
            else:
                signals = for_queries.contract(self._signed).view(grad_sample.rows, len(self.queries), -1)
        return signals, compressed.part(self._sketch_columns)

    def _contract_one_position(self, grad_sample: Outer, signals: Tensor | None) -> tuple[Tensor | None, Use]:
        """With one position a gradient is one outer product, and stays in factors."""
        assert self._columns is not None
        projected, output_grads = widened(grad_sample.projected(self._columns)), widened(grad_sample.output_grads)
        if self.queries is not None and self._compressed:
            signals = Outer(projected[..., self._query_columns], output_grads).parts(self.queries, self._signs)
        return signals, Outer(projected[..., self._sketch_columns], output_grads)

    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        assert self.sketch is not None
        if len(uses) == 1 and isinstance(use := uses[0], Outer):
            found, energies = use.rotated(self.sketch.left, None).norms(self._weights), use.unit_energies(self._signs)
        else:
            total = CompressedGradients(summed([_formed(use) for use in uses]))
            found = total.norms_in(self.sketch.left, self._columns_of_weights)
            energies = total.unit_energies(self._signs)
        return SelfTerms(found[:, :2], energies, found[:, 2:].unflatten(1, (HALVES, 2)))


@dataclass
class ChunkedDirection(Direction):
    """Directions of some queries after the other, where those of all would be too large; only the first has self terms.

    Attributes:
        parts: In the order of the queries.
    """

    parts: Sequence[Direction]

    @classmethod
    def of(cls, parts: Sequence[Direction]) -> Direction:
        """The parts as one; a single part is that itself."""
        return parts[0] if len(parts) == 1 else cls(parts[0].block, parts[0].contrasts, None, parts)

    def contract(self, grad_sample: GradSample) -> tuple[Tensor | None, Use]:
        found = [part.contract(grad_sample) for part in self.parts]
        return torch.cat([signals for signals, _ in found if signals is not None], 1), found[0][1]

    def self_terms_of(self, uses: Sequence[Use]) -> SelfTerms:
        return self.parts[0].self_terms_of(uses)

    def draw(self, count: int) -> None:
        for part in self.parts:
            part.draw(count)


def alignment(device: torch.device) -> int:
    """Of how many columns a multiple is multiplied fastest: on a GPU the tensor cores take eight at once."""
    return 8 if device.type == "cuda" else 1


def aligned(columns: Tensor) -> Tensor:
    """Columns [G, I, k] with as many columns of zeros as :func:`alignment` wants."""
    missing = -columns.shape[-1] % alignment(columns.device)
    return F.pad(columns, (0, missing)) if missing else columns


def _formed(use: Use) -> Tensor:
    """The transposed gradients [b, G, k, O] of one use."""
    return use.g if isinstance(use, CompressedGradients) else use.gradient(slice(None)).transpose(-1, -2)


def direction_of(
    block: Block,
    contrasts: Contrasts,
    u: Tensor | None,
    spec: DirectionSpec,
    rank: int | None,
    mixtures: int | None,
    forced: bool = False,
) -> tuple[Direction, Tensor | None]:
    """A block's direction in the form that contracts fastest, and the retained variance where it is low-rank.

    Args:
        block: The block.
        contrasts: Signs of the blocks' units.
        u: Directions U [Q, *layout], None without queries.
        spec: What they are made of.
        rank: Most dimensions of a basis for each query; None: exact.
        mixtures: Mixtures of a sketch of D, see :func:`.sketch.mixtures`; None: without self-influence.
        forced: Whether a basis is taken where it retains too little.
    """
    discount = spec.discount
    if len(block.layout) == 1:
        return VectorDirection(block, contrasts, u, discount), None
    exact = ExactDirection(block, contrasts, u, discount)
    # a small tied block's gradient is formed; if a tied block is not the last layer its units are of two kinds
    large = block.outputs and block.layout[1] * block.layout[2] > MAX_FORMED
    if rank is None or discount.sides is None or not (large if block.tied else block.matrix):
        return exact, None
    sketch = None if mixtures is None else discount.sketched(mixtures)
    assert not isinstance(sketch, SpectralOperator)  # the discount has sides
    sides = discount.sides
    if block.outputs:
        sides = sides[::-1]
        u = None if u is None else u.transpose(-1, -2)
        sketch = None if sketch is None else sketch.transposed()
    if sketch is not None and not sketch.has_columns:
        return exact, None
    found = None if u is None else low_rank(u, *sides, rank, forced)
    if found is not None:
        basis, u, retained = found
        return CompressedDirection(block, contrasts, u, sketch, basis, weighted=not forced), retained
    if u is not None and sketch is not None and sketch.right is not None and sketch.columns is None:
        return CompressedDirection(block, contrasts, u @ sketch.right, sketch, in_sketch=True), None
    if u is not None and sketch is None and u.shape[3] < min(MIN_INPUTS, u.shape[2]):
        # few inputs: gradients in all of them are smaller than the products of U with the inputs
        every = torch.eye(u.shape[3], device=u.device, dtype=u.dtype).expand(u.shape[1], -1, -1)
        return CompressedDirection(block, contrasts, u, sketch, every), None
    return CompressedDirection(block, contrasts, u, sketch), None

"""Features and labels of rows in a fit, batch by batch in evaluation mode, for methods that need no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ine_callback.capture.row_labels import read_labels
from ine_callback.errors import InfluenceError
from ine_callback.queries import Batch
from ine_callback.utilities.isolation import isolated
from ine_callback.utilities.validate import listed

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext

FeatureFunction = Callable[[nn.Module, Batch], Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Rows:
    """What was read of some rows, batch by batch.

    Attributes:
        features: [b, d] each.
        labels: Classes [b] each; None where a batch has none.
        digests: Of what the network gets, for each row; none where that is no tensor.
    """

    features: list[Tensor] = field(default_factory=list)
    labels: list[Tensor | None] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def joined(self, owner: str, what: str) -> Tensor:
        """The features of all rows [n, d].

        Args:
            owner: Class named in messages.
            what: Which rows they are.

        Raises:
            InfluenceError: If batches have features of unlike widths.
        """
        widths = sorted({part.shape[1] for part in self.features})
        if len(widths) > 1:
            raise InfluenceError(
                f"{owner}: features of {what} rows have the widths {widths}, such as sequences of several lengths; "
                "pass features=function that returns one vector for each row, such as a mean over the tokens."
            )
        return torch.cat(self.features)

    def known_labels(self) -> Tensor | None:
        """The labels of all rows [n]; None where a batch has none."""
        there = [part for part in self.labels if part is not None]
        return torch.cat(there) if len(there) == len(self.labels) else None


class Reader:
    """Reads features and labels of batches.

    Args:
        owner: Class named in messages.
        context: The trained model with its data.
        features: ``"penultimate"``, ``"input"``, a layer's name, or a function of module and batch.
        labels: Whether labels are wanted.
    """

    def __init__(self, owner: str, context: FitContext, features: str | FeatureFunction, labels: bool) -> None:
        self._owner, self._context, self._features, self._wanted = owner, context, features, labels
        self.layer = ""  # whose input is read

    def training(self) -> Rows:
        """The training rows, in the order of their indices."""
        found = Rows()
        for part, batch in self._context.batches(what="features"):
            self.read(found, self._context.loss, batch, len(part))
        return found

    def reference(self, data: Any) -> Rows:
        """The reference's rows; a larger validation set is sampled as queries sample theirs."""
        context, found = self._context, Rows()
        for batch in context.source.batches(data):
            self.read(found, context.source.loss, context.to_device(batch), context.source.size(batch))
        return found

    def read(self, found: Rows, loss: Loss, batch: Batch, size: int) -> None:
        """Adds the rows of a batch to those found.

        Args:
            found: Grows.
            loss: The module's loss of such a batch.
            batch: On the device.
            size: Its number of rows.

        Raises:
            InfluenceError: If there is no vector of numbers for each row.
        """
        features, labels = self._read_batch(loss, batch, size)
        if not isinstance(features, Tensor) or features.shape[:1] != (size,) or not features.is_floating_point():
            what = f"{features.dtype} of shape {tuple(features.shape)}" if isinstance(features, Tensor) else "no tensor"
            raise InfluenceError(
                f"{self._owner}: features={self._features!r} gives {what} for a batch of {size} rows; name another "
                "layer, or pass features=function with a vector of numbers for each row."
            )
        inputs = _inputs(batch, size)
        found.features.append(features.detach().cpu().double().reshape(size, -1))
        found.labels.append(None if labels is None else labels.cpu())
        found.digests += [] if inputs is None else digests(inputs)

    def _read_batch(self, loss: Loss, batch: Batch, size: int) -> tuple[Tensor, Tensor | None]:
        context = self._context
        if isinstance(self._features, str) and self._features != "input":
            if not self.layer:
                self.layer = self._penultimate(loss, batch, size) if self._features == "penultimate" else self._named()
            value, features = context.layer_input(self.layer, loss, batch, size)
            return features, self._labels(value, batch, size)
        labels = None
        with isolated(context.module), context.precision():
            if callable(self._features):
                with torch.no_grad():
                    features = self._features(context.module, batch)
            else:
                features = self._input(batch, size)
            if self._wanted:
                labels = self._labels(loss(context.module, batch), batch, size)
        return features, labels

    def _labels(self, loss: Tensor, batch: Batch, size: int) -> Tensor | None:
        """The labels that the loss uses; else the batch's only vector of integers."""
        if not self._wanted:
            return None
        if (found := read_labels(loss, size)) is not None:
            return found
        vectors = [leaf for leaf in _tensors(batch, size) if leaf.dim() == 1 and not leaf.is_floating_point()]
        return vectors[0] if len(vectors) == 1 else None

    def _input(self, batch: Batch, size: int) -> Tensor:
        found = _inputs(batch, size)
        if found is None or not (found.is_floating_point() or found.dtype == torch.uint8):
            kind = "no tensor" if found is None else f"of type {found.dtype}"
            raise InfluenceError(
                f'{self._owner}: features="input", but what comes first in a batch is {kind}; take '
                'features="penultimate", or a function of module and batch.'
            )
        return found.float() if found.dtype == torch.uint8 else found

    def _named(self) -> str:
        names = dict(self._context.module.named_modules())
        if self._features not in names:
            raise InfluenceError(
                f"{self._owner}: features={self._features!r} is no layer of the module; choose 'penultimate', "
                f"'input', or one of {[name for name in names if name][-5:]}."
            )
        return str(self._features)

    def _penultimate(self, loss: Loss, batch: Batch, size: int) -> str:
        """Name of the last module with parameters that is called with a row of numbers for each row of the batch."""
        called: list[str] = []
        handles = [
            module.register_forward_pre_hook(_note(called, name, size), with_kwargs=True)
            for name, module in self._context.module.named_modules()
            if name and next(module.parameters(recurse=False), None) is not None
        ]
        try:
            with isolated(self._context.module), self._context.precision(), torch.no_grad():
                loss(self._context.module, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not called:
            raise InfluenceError(
                f'{self._owner}: features="penultimate", but no layer with parameters is called with numbers for '
                f'each of {size} rows; take features="input", or a function of module and batch.'
            )
        return called[-1]


def _note(called: list[str], name: str, size: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor) and first.is_floating_point() and first.dim() > 1 and len(first) == size:
            called.append(name)

    return hook


def _tensors(batch: Batch, size: int) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size]


def _inputs(batch: Batch, size: int) -> Tensor | None:
    """The first tensor of a batch with a row for each of its rows, flattened [size, D]."""
    first = next(iter(_tensors(batch, size)), None)
    return None if first is None or first.dim() < 2 else first.flatten(1)


def digests(x: Tensor) -> list[bytes]:
    """A short digest of each row [n], equal for rows that are equal as float64."""
    return [blake2b(row.tobytes(), digest_size=16).digest() for row in x.detach().cpu().double().flatten(1).numpy()]


def checked_features(x: ArrayLike | Tensor, owner: str, what: str) -> Tensor:
    """Features that a user passes, as float64 [n, d] on the host.

    Raises:
        InfluenceError: If they are no finite numbers for each row.
    """
    try:
        found = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise InfluenceError(f"{owner}: features of {what} rows are no array of numbers: {error}") from None
    if found.dim() < 2 or not found.numel():
        raise InfluenceError(
            f"{owner}: features of {what} rows have the shape {tuple(found.shape)}; give [rows, features], at least "
            "one of each."
        )
    found = found.double().flatten(1)
    bad = torch.where(~found.isfinite().all(1))[0].numpy()
    if bad.size:
        raise InfluenceError(
            f"{owner}: {what} row {listed(bad)} has features that are NaN or infinite; impute or drop them."
        )
    return found


def check_name(features: Any, owner: str) -> None:
    """Refuses what names no features.

    Raises:
        InfluenceError: If it is neither a text nor a function.
    """
    if not (callable(features) or (isinstance(features, str) and features)):
        raise InfluenceError(
            f"{owner}: features={features!r} names none; give 'penultimate', 'input', a layer's name or a function of "
            "module and batch."
        )

"""Encoders: rows to vectors whose inner products are scores. Never normalised: the norm is a temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from ine_callback.errors import InfluenceError
from ine_callback.methods.airrep.settings import NAME
from ine_callback.utilities.isolation import isolated

Batch = Any
Features = Callable[[Batch], Tensor]
Read = Callable[[Tensor], Batch]  # a batch of the rows with these indices [b]


class FeatureEncoder(nn.Module):
    """The default encoder: fixed features and the label, a small trained network, and a linear projection.

    Args:
        features: A trained network, whose penultimate features of ``batch[0]`` are taken (:func:`penultimate`); or a
            function of a batch that returns [b, f], such as a text encoder.
        sample: A batch of some rows, for the features' width and scale.
        classes: Classes of the labels ``batch[1]``, which are put beside the features; 0: labels are left out.
        width: Width of an embedding.
        hidden: Units of the small network.
        seed: Of its first weights.

    Raises:
        InfluenceError: If the features are no vector of numbers for each row.

    Example:
        >>> batch = torch.randn(8, 3), torch.arange(8) % 2
        >>> FeatureEncoder(lambda batch: batch[0], batch, classes=2)(batch).shape
        torch.Size([8, 64])
    """

    scale: Tensor

    def __init__(
        self,
        features: nn.Module | Features,
        sample: Batch,
        classes: int = 0,
        width: int = 64,
        hidden: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # in a tuple, so that a network is no part of this module: it is neither trained nor saved
        self._features = (penultimate(features) if isinstance(features, nn.Module) else features,)
        self.classes = classes
        found = self._read(sample)
        size = found.square().mean().sqrt()
        self.register_buffer("scale", torch.where(size > 0, size, 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Linear(found.shape[1] + classes, hidden),
                nn.ReLU(),
                nn.Linear(hidden, width),
                nn.Linear(width, width),
            )

    def inputs(self, batch: Batch) -> Tensor:
        """What the small network gets [b, f + classes]: features at unit scale, and the label one-hot."""
        found = self._read(batch).to(self.scale) / self.scale
        if not self.classes:
            return found
        return torch.cat([found, nn.functional.one_hot(batch[1].to(found.device).long(), self.classes).to(found)], 1)

    def forward(self, batch: Batch) -> Tensor:
        """Embeddings [b, width]."""
        found: Tensor = self.head(self.inputs(batch))
        return found

    def _read(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            found = torch.as_tensor(self._features[0](batch))
        if found.dim() < 2 or not found.is_floating_point() or not found.isfinite().all():
            raise InfluenceError(
                f"{NAME}: features are {found.dtype} of shape {tuple(found.shape)}; they must be one vector of finite "
                "numbers for each row [b, f]."
            )
        return found.flatten(1)


def penultimate(network: nn.Module) -> Features:
    """A function that gives what the network's last layer with parameters gets [b, f], for ``batch[0]``.

    Args:
        network: Takes ``batch[0]`` alone; it is run in evaluation mode and left as it was.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> x = torch.randn(4, 3)
        >>> bool((penultimate(network)((x, None)) == network[:2](x)).all())
        True
    """

    def features(batch: Batch) -> Tensor:
        inputs, found = batch[0], []

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and len(args[0]) == len(inputs):
                found.append(args[0].detach())

        layers = [m for m in network.modules() if next(m.parameters(recurse=False), None) is not None]
        handles = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            with isolated(network), torch.no_grad():
                network(inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise InfluenceError(
                f"{NAME}: no layer of {type(network).__name__} with parameters is called with numbers for each row; "
                "pass FeatureEncoder(features=function of a batch)."
            )
        return found[-1].flatten(1)

    return features


def reader(dataset: Dataset[Any], encoder: nn.Module) -> Read:
    """Reads rows of a map-style dataset as a loader would collate them, onto the encoder's device."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))

    def read(rows: Tensor) -> Batch:
        if isinstance(dataset, TensorDataset):
            return move_data_to_device(list(dataset[rows]), device)
        return move_data_to_device(default_collate([dataset[int(row)] for row in rows]), device)

    return read


def with_features_kept(encoder: nn.Module, reads: Sequence[tuple[Read, int]]) -> tuple[nn.Module, list[Read]]:
    """The part of the encoder that is trained, and readers of what it gets; fixed features are computed once."""
    if not isinstance(encoder, FeatureEncoder):
        return encoder, [read for read, _ in reads]
    kept = [torch.cat([encoder.inputs(read(rows)) for rows in torch.arange(n).split(1024)]) for read, n in reads]
    return encoder.head, [inputs.__getitem__ for inputs in kept]


def embed(encoder: nn.Module, read: Read, rows: Tensor, at_once: int = 1024) -> Tensor:
    """Embeddings [R, d] of rows, without gradients.

    Raises:
        InfluenceError: If the encoder gives something else.
    """
    with torch.no_grad():
        found = torch.cat([embedding(encoder, read(part)) for part in rows.split(at_once)])
    if len(found) != len(rows) or not found.isfinite().all():
        raise InfluenceError(
            f"{NAME}: the encoder gives {tuple(found.shape)} for {len(rows)} rows, or numbers that are not finite; it "
            "must map a batch to [b, d]."
        )
    return found


def embedding(encoder: nn.Module, batch: Batch) -> Tensor:
    """Embeddings [b, d] of a batch."""
    found = encoder(batch)
    if not isinstance(found, Tensor) or found.dim() != 2:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InfluenceError(
            f"{NAME}: the encoder {type(encoder).__name__} gives {what} for a batch; it must be [b, d]."
        )
    return found

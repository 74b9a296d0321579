"""Nuisances by networks: K copies, each for the rows of all folds but one, trained in one fit of Lightning.

The copies' parameters are stacked, so one pass computes all of them. Copy k gives row i the weight w_ki, 0 for the rows
that it must not see, and its loss is the mean over the batch's rows with these weights. No copy's gradient depends on
another's, so one fit is K fits with the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ine_callback.effects.formulas import Floats
from ine_callback.effects.nuisances import Function, Mask, Nuisances, limited
from ine_callback.errors import InfluenceError
from ine_callback.utilities.quiet import quiet

WHO = "Networks"
AT_ONCE = 1 << 14  # rows predicted together


def perceptron(inputs: int) -> nn.Module:
    """A hidden layer of 32 units, which are bounded, so that rows at the edge get no weight out of proportion.

    Example:
        >>> perceptron(3)(torch.zeros(5, 3)).shape
        torch.Size([5, 1])
    """
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 1))


class CrossFitNuisances(L.LightningModule):
    """K copies of a network as one module: a mean or a probability, each copy fitted on rows of its own.

    Batches are ``(x [b, d], y [b, K], weights [b, K])``; a weight of 0 hides a row from a copy. All copies start from
    the same weights. Inputs, and numbers that are predicted, are standardised by each copy's own rows. Trained by any
    Trainer; :class:`Networks` does it for :func:`estimate`.

    Args:
        network: Makes a network of d inputs, one output. It must not change buffers, as batch normalisation does.
        x: Columns [N, d].
        y: Numbers, or 0 and 1 where ``classes`` [N, K].
        weights: Of the rows in each copy [N, K]; 0: not seen.
        classes: Whether P(y = 1 | x) is wanted, by cross entropy, else a mean, by squared error.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        seed: Of the initial weights.

    Raises:
        InfluenceError: If the network has buffers, or not one output a row.

    Example:
        >>> x, folds = torch.randn(20, 2), torch.arange(20) % 5
        >>> weights = (folds[:, None] != torch.arange(5)).float()
        >>> module = CrossFitNuisances(perceptron, x, x[:, :1].expand(20, 5), weights)
        >>> module(x[:7]).shape  # each copy's mean
        torch.Size([5, 7])
    """

    middle: Tensor
    scale: Tensor
    target: Tensor

    def __init__(
        self,
        network: Callable[[int], nn.Module],
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        classes: bool = False,
        learning_rate: float = 1e-2,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classes, self.learning_rate, self.weight_decay = classes, learning_rate, weight_decay
        inputs, copies = x.shape[1], weights.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = network(inputs).to(x.dtype)
        if list(made.buffers()):
            raise InfluenceError(
                f"{WHO}: the network has buffers ({', '.join(name for name, _ in made.named_buffers())}), which copies "
                "cannot share; take layers without them, such as LayerNorm for BatchNorm."
            )
        shape = tuple(made(x[:2]).shape)
        if shape != (len(x[:2]), 1):
            raise InfluenceError(f"{WHO}: the network gives {shape} for 2 rows; its last layer must have one output.")
        middle, scale = _moments(x[:, None], weights[..., None])
        of_target = torch.stack(_moments(y, weights)) if not classes else torch.tensor([[0.0], [1.0]], dtype=x.dtype)
        self.register_buffer("middle", middle[:, None])  # [K, 1, d]
        self.register_buffer("scale", scale[:, None])
        self.register_buffer("target", of_target[..., None])  # [2, K, 1]
        self._names = [name for name, _ in made.named_parameters()]
        self.stacked = nn.ParameterList(
            nn.Parameter(p.detach().expand(copies, *p.shape).clone()) for p in made.parameters()
        )
        self._network = [made.to("meta")]  # in a list: its parameters are no parameters of this module

    def forward(self, x: Tensor) -> Tensor:
        """Means or probabilities by every copy [K, n] of rows [n, d]."""
        return torch.stack([self.predict(k, x) for k in range(len(self.middle))])

    def predict(self, copy: int, x: Tensor) -> Tensor:
        """Means or probabilities by one copy [n] of rows [n, d]."""
        found = self._one([p[copy] for p in self.stacked], (x - self.middle[copy]) / self.scale[copy])
        if self.classes:
            return found.sigmoid()
        middle, scale = self.target[:, copy]
        made: Tensor = found * scale + middle
        return made

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Sum over copies of the weighted mean loss."""
        x, y, weights = batch
        found, y, weights = self._outputs(x), (y.T - self.target[0]) / self.target[1], weights.T
        if self.classes:
            losses = nn.functional.binary_cross_entropy_with_logits(found, y, reduction="none")
        else:
            losses = (found - y) ** 2
        loss: Tensor = ((losses * weights).sum(1) / weights.sum(1).clamp_min(1e-12)).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, which treats every number by itself, so that copies stay apart."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    def _outputs(self, x: Tensor) -> Tensor:
        """What the networks give of the same rows, in standardised units [K, n]."""
        call = vmap(self._one, randomness="different")
        return call(list(self.stacked), (x - self.middle) / self.scale)

    def _one(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        named = dict(zip(self._names, parameters, strict=True))
        return cast(Tensor, functional_call(self._network[0], named, (x,))[:, 0])


def _moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means and standard deviations over the first axis; 1 where nothing varies."""
    total = weights.sum(0)
    mean = (values * weights).sum(0) / total
    deviation = (((values - mean) ** 2 * weights).sum(0) / total).sqrt()
    return mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation))


@dataclass(frozen=True)
class Networks(Nuisances):
    """Nuisances by networks; those of all folds are trained in one fit, see :class:`CrossFitNuisances`.

    The training is on the CPU, without logger, checkpoint or callback, and leaves all random states as they were.

    Args:
        network: Makes a network of d inputs and one output; None: a hidden layer of 32.
        epochs: Passes over the rows.
        batch_size: Rows in a batch.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        seed: Of initial weights and of the rows' order.

    Raises:
        InfluenceError: If a number is not above 0, or the network cannot be stacked.

    Example:
        >>> from ine_callback.effects import ATE, EffectData, estimate
        >>> rng = np.random.default_rng(0)
        >>> c = rng.normal(size=500)
        >>> a = rng.random(500) < 1 / (1 + np.exp(-c))
        >>> data = EffectData({"C": c, "A": a, "Y": a + np.sin(2 * c)}, "A", "Y", "C -> A -> Y; C -> Y")
        >>> found = estimate(data, ATE(), nuisances=Networks())
        >>> found.nuisances, abs(found.estimate - 1) < 0.2
        ('networks', True)
    """

    network: Callable[[int], nn.Module] | None = None
    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    seed: int = 0

    name = "networks"  # without a type, so no setting of the dataclass

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise InfluenceError(f"{WHO}: {name}={getattr(self, name)}; give a number above 0.")

    def means(self, x: Floats, y: Floats, rows: Mask) -> list[Function]:
        return self._fitted(x, y, rows, classes=False)

    def probabilities(self, x: Floats, y: Mask, rows: Mask) -> list[Function]:
        return [_limited(one) for one in self._fitted(x, y, rows, classes=True)]

    def ratios(self, x: Floats, y: Mask, rows: Mask) -> list[Function]:
        return self.probabilities(x, y, rows)  # a network sees products

    def _fitted(self, x: Floats, y: Floats | Mask, rows: Mask, classes: bool) -> list[Function]:
        """What each copy gives of rows [n, d]."""
        every = (x, np.broadcast_to(y, rows.shape).T, rows.T)
        inputs, targets, weights = (torch.tensor(part, dtype=torch.float32) for part in every)
        module = CrossFitNuisances(
            self.network or perceptron, inputs, targets, weights, classes, self.learning_rate, self.weight_decay,
            self.seed,
        )  # fmt: skip
        fit(module, Batches([inputs, targets, weights], self.batch_size, self.seed), self.epochs)
        return [partial(_predicted, module, k) for k in range(len(rows))]


class Batches:
    """Rows of tensors in batches, in a new order each time, by random numbers of their own.

    Args:
        tensors: Each [N, ...].
        size: Rows in a batch.
        seed: Of the orders.
    """

    def __init__(self, tensors: list[Tensor], size: int, seed: int) -> None:
        self._tensors, self._size, self._random = tensors, size, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self._tensors[0]) // self._size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self._tensors[0]), generator=self._random)
        for part in order.split(self._size):
            yield [tensor[part] for tensor in self._tensors]


def fit(module: L.LightningModule, batches: Any, epochs: int) -> None:
    """One quiet fit on the CPU, also inside of another one; random states are as before afterwards.

    Raises:
        KeyboardInterrupt: Where Ctrl-C ended it.
    """
    with quiet(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        callbacks.clear()  # what the environment gives every Trainer, such as our own, is not for this one
        trainer.fit(module, batches)
    if trainer.interrupted:
        raise KeyboardInterrupt


def _predicted(module: CrossFitNuisances, copy: int, x: Floats) -> Floats:
    rows = torch.tensor(x, dtype=torch.float32)
    with torch.no_grad():
        parts = [module.predict(copy, part) for part in rows.split(AT_ONCE)]
    return np.asarray(torch.cat(parts).double().numpy(), dtype=np.float64)


def _limited(function: Function) -> Function:
    return lambda x: limited(function(x))

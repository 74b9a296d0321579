"""Regimes of several optimizers: together after one backward pass, or by turns (GANs), by hand as Lightning has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from .models import WORDS, sentences
from .options import scaled
from .regime import CLASSES, FEATURES, Classifier, Regime

Make = Callable[[Any], torch.optim.Optimizer]
CONDITIONS = 3  # of the features; the generator makes the others


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def swift(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02, betas=(0.5, 0.9))


class Together(Classifier):
    """All optimizers step after one backward pass."""

    def __init__(
        self, makes: tuple[Make, Make] = (plain, swift), net: nn.Sequential | None = None, at: int = 3
    ) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.makes, self.parts = makes, (self.net[:at], self.net[at:])

    def made_optimizers(self) -> list[torch.optim.Optimizer]:
        return [make(part.parameters()) for make, part in zip(self.makes, self.parts, strict=True)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def of_words() -> Classifier:
    """A sparse embedding has an optimizer of its own."""
    net = nn.Sequential(nn.Embedding(WORDS, 6, sparse=True), Mean(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    return Together((lambda p: torch.optim.SparseAdam(p, lr=0.03), lambda p: torch.optim.AdamW(p, lr=0.01)), net, at=1)


class GAN(Classifier):
    """A generator that completes rows, and a discriminator that tells these from true ones.

    Args:
        makes: Make the optimizers of the generator and of the discriminator.
        toggle: Whether each freezes the other's parameters in its turn.
        first: Whose turn comes first.
        every: The generator steps in every so many batches.
        critics: The discriminator's steps in a batch.
        keep: Whether an optimizer removes its gradients after its step, not before its turn: then what the other's pass
            left is a part of its step.
        joined: Whether the discriminator gets true and made rows in one call.
    """

    def __init__(
        self,
        makes: tuple[Make, Make] = (plain, swift),
        toggle: bool = False,
        first: str = "discriminator",
        every: int = 1,
        critics: int = 1,
        keep: bool = False,
        joined: bool = False,
    ) -> None:
        super().__init__(nn.Identity())
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(CONDITIONS, 6), nn.Tanh(), nn.Linear(6, FEATURES - CONDITIONS))
        self.discriminator = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 1))
        self.makes, self.toggle, self.every, self.turn = makes, toggle, every, ""
        self.keep, self.joined = keep, joined
        critic = ["critic"] * critics
        self.turns = [*critic, "generated"] if first == "discriminator" else ["generated", *critic]

    def made_optimizers(self) -> list[torch.optim.Optimizer]:
        players = (self.generator, self.discriminator)
        return [make(part.parameters()) for make, part in zip(self.makes, players, strict=True)]

    def _judged(self, x: Tensor, true: bool) -> Tensor:
        logits = self.discriminator(x)
        return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(true)))

    def _completed(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :CONDITIONS], self.generator(x[:, :CONDITIONS])], 1)

    def generated(self, batch: Any) -> Tensor:
        return self._judged(self._completed(batch[0]), True)

    def critic(self, batch: Any) -> Tensor:
        made = self._completed(batch[0]).detach()
        if self.joined:
            logits = self.discriminator(torch.cat([batch[0], made]))
            labels = torch.cat([torch.ones(len(made), 1), torch.zeros(len(made), 1)])
            return binary_cross_entropy_with_logits(logits, labels)
        return self._judged(batch[0], True) + self._judged(made, False)

    def loss(self, batch: Any) -> Tensor:
        """Of the validation step: how well both play."""
        return self.generated(batch) + 0.5 * self._judged(batch[0], True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        for turn in self.turns:
            self.turn = turn
            if self.turn == "generated" and batch_idx % self.every != self.every - 1:
                continue
            optimizer = generator if self.turn == "generated" else discriminator
            with self._frozen(optimizer):
                if not self.keep:
                    optimizer.zero_grad()
                self.manual_backward(getattr(self, self.turn)(batch))
                if self.clip:
                    self.clip_gradients(optimizer, self.clip, "norm")
                optimizer.step()
                if self.keep:
                    optimizer.zero_grad()

    @contextmanager
    def _frozen(self, optimizer: Any) -> Iterator[None]:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        yield
        if self.toggle:
            self.untoggle_optimizer(optimizer)


class Clipped(GAN):
    clip = 0.1


DISCRIMINATOR = tuple(f"discriminator.{k}.{name}" for k in (0, 2) for name in ("weight", "bias"))
GROUP = "several optimizers"
OPTIMIZERS = [
    Regime("two optimizers, one backward pass", GROUP, Together),
    Regime("SparseAdam and AdamW", GROUP, of_words, sentences),
    Regime("GAN, toggled", GROUP, lambda: GAN(toggle=True, first="generator")),
    Regime("GAN, toggled, Adam", GROUP, lambda: GAN((adam, adam), toggle=True)),
    Regime("GAN, not toggled", GROUP, GAN),
    Regime("GAN, not toggled, the generator first, Adam", GROUP, lambda: GAN((adam, adam), first="generator")),
    Regime("GAN, the discriminator twice as often", GROUP, lambda: GAN(every=2)),
    Regime("GAN, the discriminator twice a batch", GROUP, lambda: GAN(toggle=True, critics=2)),
    Regime("GAN, each steps with what the other left, too", GROUP, lambda: GAN(first="generator", keep=True)),
    Regime("GAN, true and made rows in one call", GROUP, lambda: GAN(joined=True), left_out=DISCRIMINATOR),
    Regime("GAN, each clipped by its own norm", GROUP, Clipped),
    Regime("GAN, 16-mixed", GROUP, GAN, trainer=lambda: scaled(2.0**10), tolerance=0.01),
]

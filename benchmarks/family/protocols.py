"""The protocols of the family: drawn once from their axes, and split into two halves before any result was seen.

Every axis is a deck of cards in which each level is equally frequent; the decks are shuffled separately, so the axes
vary independently. Only the size gives way: rows, then epochs, are lowered until a training costs at most
``MAX_WORK`` multiplications, since each protocol is retrained some thousand times.

Develop on one half, report on the other one. Changing ``SEED``, a deck or a data set makes another family.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Half = Literal["develop", "report"]
SEED = 17
MAX_WORK = 1.4e8  # multiplications of a forward pass over the whole training

# Largest number of rows, the input's features and the outputs of each data set. The inputs of images and tokens are
# applied at several positions, which the work of a network counts.
DATA: dict[str, tuple[int, int, int]] = {
    "digits": (1000, 64, 10),
    "cancer": (500, 30, 2),
    "synthetic": (1000, 20, 4),
    "diabetes": (300, 10, 1),
    "friedman": (1000, 10, 1),
    "images": (1000, 9, 10),
    "motifs": (1000, 16, 4),
    "characters": (1000, 28, 28),
}
RATES = {"sgd": 0.03, "momentum": 0.003, "adamw": 1e-3}  # times the factor 1 to 10
_HARD = ("cnn-3", "regression-1", "regression-2")


@dataclass(frozen=True)
class Protocol:
    """One way to train: all that tells it from another.

    Attributes:
        name: Unique name.
        data: Key of ``DATA``.
        rows: Training rows, a multiple of the batch size.
        network: ``mlp``, ``cnn`` or ``transformer``.
        depth: Hidden layers, convolutions or blocks.
        width: Of a hidden layer, channels, or of a token.
        norm: Whether there is a LayerNorm after each hidden layer (a transformer always has its norms).
        activation: ``relu`` or ``gelu``.
        init: ``torch``: its defaults; ``fan_in``: N(0, 1 / fan_in) as G1; ``he``: N(0, 2 / fan_in).
        optimizer: ``sgd``, ``momentum`` (.9) or ``adamw``.
        schedule: ``constant``, ``cosine`` to zero, or ``warmup``: a tenth of the steps linearly, then cosine.
        factor: Times the optimizer's rate in ``RATES``.
        batch: Rows of a step.
        epochs: Passes over the rows.
        flipped: Fraction of the rows with a wrong label (regression: a target of another row).
    """

    name: str
    data: str
    rows: int
    network: str
    depth: int
    width: int
    norm: bool
    activation: str
    init: str
    optimizer: str
    schedule: str
    factor: float
    batch: int
    epochs: int
    flipped: float

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return RATES[self.optimizer] * self.factor

    @property
    def steps(self) -> int:
        """Optimizer steps of a training on all rows."""
        return self.epochs * (self.rows // self.batch)

    @property
    def work(self) -> float:
        """Multiplications of the forward passes of one training, roughly."""
        _, inputs, outputs = DATA[self.data]
        w, n = self.width, self.depth
        if self.network == "mlp":
            each: float = w * (inputs + (n - 1) * w + outputs)
        elif self.network == "cnn":
            each = 64 * w * (9 + 9 * w / 4 * (n - 1)) + 16 * w * outputs
        else:
            each = 10 * (n * 8 * w * w + w * outputs)
        return float(self.rows * self.epochs * each)

    @property
    def runs(self) -> int:
        """Retrainings for each group: 64, or 32 where each costs much; more where those know small groups below .8."""
        if self.name in _HARD:
            return 128
        return 64 if self.work <= 4e7 else 32

    def facts(self) -> str:
        """The protocol in a line."""
        norm = " LayerNorm" if self.norm and self.network == "mlp" else ""
        return (
            f"{self.data} {self.rows}, {self.network} {self.depth} x {self.width}{norm} {self.activation}, "
            f"{self.init} init, {self.optimizer} {self.rate:g} {self.schedule}, {self.epochs} epochs of {self.batch}, "
            f"{self.flipped:.0%} flipped"
        )


# What is drawn for each kind of network: names, data sets, depths and widths.
_KINDS: dict[str, dict[str, Any]] = {
    "class": {"n": 6, "network": "mlp", "data": ["digits", "cancer", "synthetic"], "depth": [1, 2, 3]},
    "regression": {"n": 4, "network": "mlp", "data": ["diabetes", "friedman"], "depth": [1, 2, 3, 2]},
    "cnn": {"n": 4, "network": "cnn", "data": ["images"], "depth": [1, 2]},
    "transformer": {"n": 4, "network": "transformer", "data": ["motifs", "characters"], "depth": [1, 2]},
}
_WIDTHS = {"mlp": [16, 32, 64, 128], "cnn": [4, 8], "transformer": [16, 24]}
_DECKS: dict[str, list[Any]] = {
    "rows": [300, 500, 1000],
    "norm": [False, True],
    "activation": ["relu", "gelu"],
    "init": ["torch", "torch", "fan_in", "he"],
    "optimizer": ["sgd", "momentum", "adamw"],
    "schedule": ["constant", "cosine", "warmup"],
    "factor": [1.0, 3.0, 10.0],
    "batch": [10, 20, 50],
    "epochs": [3, 6, 12, 30],
    "flipped": [0.0, 0.1],
}
_WIDE = Protocol(
    *("wide-digits", "digits", 500, "mlp", 2, 128, True, "gelu"),
    *("torch", "adamw", "warmup", 3.0, 20, 6, 0.1),
)


def _deal(levels: Sequence[Any], count: int, g: random.Random) -> list[Any]:
    """``count`` cards, each level as often as the others (to one)."""
    offset = g.randrange(len(levels))
    cards = [levels[(offset + k) % len(levels)] for k in range(count)]
    g.shuffle(cards)
    return cards


def _fit(protocol: Protocol) -> Protocol:
    """The protocol with as many rows and epochs as its data and ``MAX_WORK`` allow."""
    protocol = replace(protocol, rows=min(protocol.rows, DATA[protocol.data][0]))
    for rows in (500, 300):
        if protocol.work > MAX_WORK:
            protocol = replace(protocol, rows=min(protocol.rows, rows))
    for epochs in (12, 6, 3, 2):
        if protocol.work > MAX_WORK:
            protocol = replace(protocol, epochs=min(protocol.epochs, epochs))
    return protocol


def draw(seed: int = SEED) -> dict[Half, tuple[Protocol, ...]]:
    """Both halves; each has half of every kind of network, and one of the wide MLPs."""
    g = random.Random(seed)
    total = sum(kind["n"] for kind in _KINDS.values())
    decks = {axis: iter(_deal(levels, total, g)) for axis, levels in _DECKS.items()}
    strata = [[_fit(_WIDE), _fit(replace(_WIDE, name="wide-synthetic", data="synthetic", flipped=0.0))]]
    for name, kind in _KINDS.items():
        own = {axis: _deal(kind[axis], kind["n"], g) for axis in ("data", "depth")}
        own["width"] = _deal(_WIDTHS[kind["network"]], kind["n"], g)
        cards = [{axis: values[k] for axis, values in own.items()} for k in range(kind["n"])]
        drawn = [
            Protocol(
                f"{name}-{k + 1}", network=kind["network"], **card, **{axis: next(deck) for axis, deck in decks.items()}
            )
            for k, card in enumerate(cards)
        ]
        strata.append([_fit(protocol) for protocol in drawn])
    halves: dict[Half, list[Protocol]] = {"develop": [], "report": []}
    for stratum in strata:
        g.shuffle(stratum)
        halves["develop"] += stratum[::2]
        halves["report"] += stratum[1::2]
    return {half: tuple(sorted(found, key=lambda p: p.name)) for half, found in halves.items()}

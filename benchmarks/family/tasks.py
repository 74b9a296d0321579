"""The data of a protocol: rows, held-out queries, their losses, and the groups of rows that are left out."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import data
from benchmarks.family.protocols import DATA, Protocol

QUERIES, LARGE, SMALL, SINGLES = 50, 12, 12, 8
VOCABULARY, LENGTH = {"motifs": 16, "characters": 28}, {"motifs": 10, "characters": 8}


@dataclass(frozen=True)
class Task:
    """Rows x [N, ...] with targets y, and held-out queries xq, yq.

    Attributes:
        x: Inputs of the rows.
        y: Targets: classes [N], numbers [N], or tokens [N, L].
        xq: Inputs of the queries.
        yq: Targets of the queries.
        flipped: Rows with a wrong target [N].
        groups: Sets of rows by size: ``large``, ``small`` (half of them clusters) and ``single``.
    """

    x: Tensor
    y: Tensor
    xq: Tensor
    yq: Tensor
    flipped: Tensor
    groups: dict[str, tuple[Tensor, ...]]

    @property
    def singles(self) -> Tensor:
        """The rows left out alone [8]."""
        return torch.cat(self.groups["single"])

    @property
    def fingerprint(self) -> int:
        """Tells other groups of rows, and so other data, from these."""
        rows = [row for groups in self.groups.values() for group in groups for row in (len(group), *group.tolist())]
        return zlib.crc32(np.array(rows, dtype=np.int64).tobytes())


def row_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Each row's loss [n]: cross entropy, squared error, or the mean cross entropy of a row's tokens."""
    if y.is_floating_point():
        return (outputs[:, 0] - y).square()
    if y.dim() == 1:
        return F.cross_entropy(outputs, y, reduction="none")
    return F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def mean_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a batch."""
    x, y = batch
    return row_losses(module(x), y).mean()


def load(protocol: Protocol) -> Task:
    """The fixed task of a protocol; every random choice is seeded."""
    g = torch.Generator().manual_seed(1)
    x, y = SOURCES[protocol.data]()
    order = torch.randperm(len(x), generator=g)[: protocol.rows + QUERIES]
    x, y = x[order], y[order]
    n = protocol.rows
    rows, flipped = y[:n].clone(), torch.rand(n, generator=g) < protocol.flipped
    bad = torch.where(flipped)[0]
    if y.is_floating_point():
        rows[bad] = rows[bad[torch.randperm(len(bad), generator=g)]]
    else:
        classes = DATA[protocol.data][2]
        rows[bad] = (rows[bad] + torch.randint(1, classes, rows[bad].shape, generator=g)) % classes
    return Task(x[:n], rows, x[n:], y[n:], flipped, _groups(protocol, x[:n], rows, flipped, g))


def _groups(
    protocol: Protocol, x: Tensor, y: Tensor, flipped: Tensor, g: torch.Generator
) -> dict[str, tuple[Tensor, ...]]:
    """Groups whose sizes are multiples of half a batch: no training then ends its epochs with a tiny batch."""
    unit, n = max(1, protocol.batch // 2), protocol.rows

    def sizes(low: int, high: int, count: int) -> Iterable[int]:
        fitting = [s for s in range(low, high + 1) if s % unit == 0]
        return (fitting[int(torch.randint(len(fitting), (), generator=g))] for _ in range(count))

    large = tuple(torch.randperm(n, generator=g)[:s] for s in sizes(50, min(100, n // 4), LARGE))
    spread = [torch.randperm(n, generator=g)[:s] for s in sizes(10, 25, SMALL // 2)]
    centres = torch.randperm(n, generator=g)[: SMALL - SMALL // 2].tolist()
    clusters = [_nearest(c, s, x, y) for c, s in zip(centres, sizes(10, 25, len(centres)), strict=True)]
    some = torch.randperm(n, generator=g)
    bad, good = some[flipped[some]], some[~flipped[some]]
    single = torch.cat([bad[: SINGLES // 2], good])[:SINGLES]
    return {"large": large, "small": (*spread, *clusters), "single": tuple(single[:, None])}


def _nearest(centre: int, size: int, x: Tensor, y: Tensor) -> Tensor:
    """A row and its nearest neighbours: of its class first, or with the target as one more feature."""
    flat = (x if x.is_floating_point() else F.one_hot(x).float()).flatten(1)
    if y.is_floating_point():
        flat = torch.cat([flat, y[:, None]], 1)
    distance = (flat - flat[centre]).square().sum(1)
    if not y.is_floating_point() and y.dim() == 1:
        distance = distance + (y != y[centre]) * 1e6
    return distance.argsort()[:size]


def _digits() -> tuple[Tensor, Tensor]:
    x, y = data.digits(None)
    x = x - x.mean(0)
    return x / x.std(), y


def _images() -> tuple[Tensor, Tensor]:
    x, y = _digits()
    return x.view(-1, 1, 8, 8), y


def _motifs() -> tuple[Tensor, Tensor]:
    """Sequences of 10 of 16 tokens; the class is the group of four tokens that is most frequent."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(VOCABULARY["motifs"], (2000, LENGTH["motifs"]), generator=g)
    return x, F.one_hot(x // 4, 4).sum(1).argmax(1)


def _characters() -> tuple[Tensor, Tensor]:
    """Windows of 8 characters, and the characters that follow each: 26 letters, the blank, and all else."""
    letters = {c: k for k, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    ids = torch.tensor([letters.get(c, 27) for c in " ".join(data.text(None).lower().split())])
    windows = ids.unfold(0, LENGTH["characters"] + 1, LENGTH["characters"] + 1)[:1500]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


SOURCES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "digits": _digits,
    "images": _images,
    "motifs": _motifs,
    "characters": _characters,
    **{name: functools.partial(data.table, name) for name in ("cancer", "diabetes", "friedman", "synthetic")},
}

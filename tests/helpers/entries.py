"""Batches in which rows do not lead: graphs with nodes and edges, and texts packed into sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ine_callback import InfluenceCallback, RowEntries
from tests.helpers.oracle import Keep

GRAPHS, TOGETHER = 24, 6
Graph = tuple[Tensor, int, int]  # nodes [n, 6], class, row
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def graphs(dtype: torch.dtype = torch.float64) -> list[Graph]:
    """Graphs of 2 to 5 nodes."""
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(2 + k % 4, 6, generator=draw, dtype=dtype), k % 3, k) for k in range(GRAPHS)]


class Batch:
    """Several graphs as one, as torch_geometric has them; each is a ring, with one more edge."""

    def __init__(self, items: Sequence[Graph]) -> None:
        self.items, self.num_graphs = list(items), len(items)
        self.x = torch.cat([x for x, _, _ in items])
        self.batch = torch.cat([torch.full((len(x),), k) for k, (x, _, _) in enumerate(items)])
        self.y, self.row = (torch.tensor([item[k] for item in items]) for k in (1, 2))
        edges, first = [], 0
        for x, _, _ in items:
            edges += [(first + k, first + (k + 1) % len(x)) for k in range(len(x))] + [(first, first)]
            first += len(x)
        self.edge_index = torch.tensor(edges).T

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        return self

    def to_data_list(self) -> list[Graph]:
        return self.items

    @classmethod
    def from_data_list(cls, items: Sequence[Graph]) -> Batch:
        return cls(items)


def rows_of_graphs(batch: Batch) -> RowEntries:
    return RowEntries(batch.row, [batch.batch, batch.batch[batch.edge_index[0]]])


class GraphNet(nn.Module):
    """Layers on nodes, on edges and on graphs, and parameters that are added or multiplied by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.norm, self.edges = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(16, 8)
        self.bias, self.attention = nn.Parameter(0.1 * torch.randn(8)), nn.Parameter(torch.randn(1, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, batch: Batch) -> Tensor:
        h = self.norm(torch.tanh(self.nodes(batch.x)))
        source, target = batch.edge_index
        messages = torch.tanh(self.edges(torch.cat([h[source], h[target]], 1)))
        h = (torch.zeros_like(h).index_add(0, target, messages) + self.bias) * self.attention
        return self.head(torch.zeros(batch.num_graphs, 8).to(h).index_add(0, batch.batch, h))


TEXTS, LENGTH, PACKED = 12, 8, 4  # sequences, their tokens, sequences of a batch


class PackedTexts(Dataset[tuple[Tensor, Tensor]]):
    """Sequences of several texts each, with a last token of none: token ids, and the text of each token."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.sequences: list[tuple[Tensor, Tensor]] = []
        self.texts = 0
        for _ in range(TEXTS):
            texts: list[int] = []
            while len(texts) < LENGTH - 1:
                size = min(LENGTH - 1 - len(texts), int(torch.randint(2, 5, (), generator=draw)))
                texts += [self.texts] * size
                self.texts += 1
            self.sequences.append((torch.randint(7, (LENGTH,), generator=draw), torch.tensor([*texts, -1])))

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.sequences[k]


class PackedModel(nn.Module):
    """A language model whose tokens attend to their own text alone; its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, 5)
        self.attention, self.scale = nn.Linear(5, 15), nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, texts: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.attention(self.norm(x)).chunk(3, -1)
        mask = (texts[:, :, None] == texts[:, None, :]) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        x = x + self.scale * torch.tanh(self.up((q @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v))
        return self.head(x)


def next_token(
    net: nn.Module, batch: tuple[Tensor, Tensor], only: int | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of the next token of the same text; of one text alone, if asked."""
    ids, texts = batch
    labels = torch.where((texts == texts.roll(-1, 1)) & (texts >= 0), ids.roll(-1, 1), -100)
    labels[:, -1] = -100
    if only is not None:
        labels = torch.where(texts == only, labels, -100)
    return F.cross_entropy(net(ids, texts).flatten(0, 1), labels.flatten(), reduction=reduction)


class Module(L.LightningModule):
    """Trains a network by a loss; ``seen`` keeps what each step was differentiated at."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net.double(), loss
        self.seen: list[tuple[Any, dict[str, Tensor]]] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.training:
            self.seen.append((batch, {name: x.clone() for name, x in self.net.state_dict().items()}))
        return self.loss(self.net, batch)

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(make: Callable[[], Module], loaders: tuple[DataLoader[Any], DataLoader[Any]], **options: Any) -> Any:
    """The module, its callback and its steps; the weights must be those of a plain run."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    keep, runs = Keep(), []
    settings = {"queries": ["val", "self"], "methods": [keep], "discount": False, "refresh_every": 1, "rank": None}
    if "methods" in options:
        settings["on_error"] = "raise"  # these make a report
    callback = InfluenceCallback(**{**settings, **options})
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        module = make()
        L.Trainer(max_epochs=1, enable_checkpointing=False, callbacks=callbacks, **quiet).fit(module, *loaders)
        runs.append(module)
    for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(one, other)
    return runs[1], callback, keep

"""Cases that broke other people's hooks, from public bug reports; each names its source."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.helpers.oracle import TELLS

from .models import pictures
from .regime import CLASSES, FEATURES, Classifier, Data, Regime, vectors

WORDS, LETTERS, SIZE = 4, 6, 11


def texts() -> Data:
    """Words of letters [b, 4, 6]."""
    return vectors(
        draw=lambda g, rows: (
            torch.randint(SIZE, (rows, WORDS, LETTERS), generator=g),
            torch.randint(CLASSES, (rows,), generator=g),
        )
    )


class SharedNorm(nn.Module):
    """One norm after every depth, as DETR's decoder with return_intermediate has it."""

    def __init__(self) -> None:
        super().__init__()
        self.depths = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for depth in self.depths:
            x = x + depth(x).tanh()
            found.append(self.norm(x))
        return self.head(torch.stack(found).mean(0))


class TwoSizes(nn.Module):
    """word2vec: one table looked up for a word, and for several negative ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(SIZE, 5), nn.Linear(10, CLASSES)

    def forward(self, letters: Tensor) -> Tensor:
        one, many = self.table(letters[:, 0, :1]), self.table(letters[:, 1])
        return self.head(torch.cat([one.mean(1), many.mean(1)], 1))


class Bag(nn.Module):
    """EmbeddingBag with offsets: its first argument alone does not tell the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(SIZE, 5, mode="sum"), nn.Linear(5, CLASSES)

    def forward(self, letters: Tensor) -> Tensor:
        flat = letters.flatten(1)
        offsets = torch.arange(0, flat.numel(), flat.shape[1])
        return self.head(self.bag(flat.flatten(), offsets))


class Unused(nn.Module):
    """A layer that is declared and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(FEATURES, CLASSES), nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class InPlace(nn.Module):
    """In-place activations right after hooked layers, and a shortcut added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU6(inplace=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        y = self.two(x)
        y += x
        return self.head(self.relu(y).mean((2, 3)))


class LettersOfWords(nn.Module):
    """Convolutions over the letters of each word: [b * words, channels, letters], then an average over words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.letters = nn.Embedding(SIZE, 5), nn.Conv1d(5, 6, 3)
        self.norm, self.head = nn.GroupNorm(2, 6), nn.Linear(6, CLASSES)

    def forward(self, letters: Tensor) -> Tensor:
        words = self.table(letters.flatten(0, 1)).mT
        found = self.norm(self.letters(words)).relu().amax(2)
        return self.head(found.unflatten(0, (-1, WORDS)).mean(1))


class Outputs(Classifier):
    """training_step returns tensors of the graph and a distribution beside the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        return {"loss": loss, "logits": logits, "law": torch.distributions.Categorical(logits=logits)}


def pruning(lottery: bool = True) -> ModelPruning:
    """Registers every weight by another name after the first epoch, and computes the layers' own of it and a mask."""
    options: dict[str, Any] = {"amount": 0.2, "use_lottery_ticket_hypothesis": lottery, "parameter_names": ["weight"]}
    return ModelPruning("l1_unstructured", **options)


class Pruned(Classifier):
    """For the reference: what the callback does after each epoch."""

    def after_step(self, steps: int) -> None:
        if steps in (4, 8):
            self.net(torch.zeros(1, FEATURES))  # the masked weights of now, as the validation has computed them
            layers = [(m, "weight") for m in self.net.modules() if isinstance(m, nn.Linear)]
            prune.global_unstructured(layers, prune.L1Unstructured, amount=0.2)


LINEAR = tuple(f"net.{k}.{name}" for k in (0, 2, 4) for name in ("weight", "bias"))
ISSUE = "https://github.com/{}/issues/{}"
SOURCES = {
    "a norm shared by all depths": ISSUE.format("meta-pytorch/opacus", 578),
    "a table looked up twice, in two sizes": ISSUE.format("meta-pytorch/opacus", 58),
    "EmbeddingBag with offsets": ISSUE.format("meta-pytorch/opacus", 518),
    "a layer that is never called": ISSUE.format("meta-pytorch/opacus", 502),
    "in-place ReLU6 after hooked layers": ISSUE.format("pytorch/pytorch", 61519),
    "a shortcut added in place": ISSUE.format("shap/shap", 3565),
    "convolutions over the letters of words": ISSUE.format("meta-pytorch/opacus", 246),
    "training_step returns tensors of the graph": ISSUE.format("Lightning-AI/pytorch-lightning", 8821),
    "ModelPruning, without one batch": ISSUE.format("Lightning-AI/pytorch-lightning", 8542),
    "ModelPruning, lottery tickets": ISSUE.format("Lightning-AI/pytorch-lightning", 8542),
    "Ctrl-C with StochasticWeightAveraging": ISSUE.format("Lightning-AI/pytorch-lightning", 17375),
    "deepcopy of logged metrics, weight_norm": ISSUE.format("unit8co/darts", 811),
    "scores of tokens where a head has none": ISSUE.format("pomonam/kronfluence", 34),
}
GROUP = "public bug reports"
ISSUES = [
    Regime("a norm shared by all depths", GROUP, lambda: Classifier(SharedNorm())),
    Regime("a table looked up twice, in two sizes", GROUP, lambda: Classifier(TwoSizes()), texts),
    Regime("EmbeddingBag with offsets", GROUP, lambda: Classifier(Bag()), texts),
    Regime("a layer that is never called", GROUP, lambda: Classifier(Unused())),
    Regime("in-place ReLU6 after hooked layers", GROUP, lambda: Classifier(InPlace()), pictures),
    Regime("convolutions over the letters of words", GROUP, lambda: Classifier(LettersOfWords()), texts),
    Regime("training_step returns tensors of the graph", GROUP, Outputs),
    Regime(
        "ModelPruning, without one batch",
        GROUP,
        Pruned,
        trainer=lambda: {"callbacks": [pruning(False)]},
        unfamiliar=(4,) if TELLS else (),
        left_out=() if TELLS else LINEAR,
    ),
]

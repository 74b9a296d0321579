"""The trainings whose steps are timed: a network, its rows and its optimizer."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import digits, text
from benchmarks.lds.problems import Block, Transformer

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """Rows x, y, a query batch, a network and how it is trained; logits are [b, C] or [b, C, positions]."""

    name: str
    what: str
    x: Tensor
    y: Tensor
    query: Batch
    network: Callable[[], nn.Module]
    batch: int
    lr: float = 1e-3
    half: bool = False  # bfloat16 on a CPU too
    compiled: bool = False  # run by torch.compile

    def in_batches_of(self, rows: int | None) -> Workload:
        """The same with so many rows in a batch; None: its own number."""
        return replace(self, batch=rows, what=re.sub(r"batch \d+", f"batch {rows}", self.what)) if rows else self


def batches(workload: Workload, device: torch.device) -> Iterator[tuple[Tensor, Batch]]:
    """Rows drawn anew for each step, the same for whoever asks, and their data; images on a GPU as it likes them."""
    g = torch.Generator().manual_seed(2)
    while True:
        rows = torch.randperm(len(workload.x), generator=g)[: workload.batch]
        x, y = workload.x[rows].to(device), workload.y[rows].to(device)
        if device.type == "cuda" and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        yield rows.to(device), (x, y)


def loss_of(module: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy, over the last axis of logits that have positions: a softmax over another takes far longer."""
    logits: Tensor = module(batch[0])
    if logits.dim() == 3:
        logits = logits.transpose(1, 2).flatten(0, 1)
    return F.cross_entropy(logits, batch[1].flatten())


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.short(x))


def resnet18() -> nn.Module:
    """ResNet-18 for images of 32 x 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(width, outputs, stride), Residual(outputs, outputs, 1)]
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class ViT(nn.Module):
    """A vision transformer on patches of 4 x 4 of images of 32 x 32."""

    def __init__(self, width: int = 384, heads: int = 6, blocks: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = h + self.position(torch.arange(64, device=x.device).expand(len(x), -1))
        out: Tensor = self.head(self.norm(self.blocks(h)).mean(1))
        return out


class Decoder(nn.Module):
    """A Hugging Face decoder whose logits are [b, tokens, positions]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids).logits
        return logits.transpose(1, 2)


def gpt2(lora: bool) -> nn.Module:
    """GPT-2 small from its configuration, without dropout; with LoRA adapters of rank 8 alone to train."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
    return Decoder(model)


def cnn(side: int) -> nn.Module:
    """Two convolutions with pooling and two linear layers."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def mlp(inputs: int) -> nn.Module:
    """Three linear layers."""
    widths = [inputs, 512, 256]
    hidden = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(256, 10))


def of_digits(name: str, path: Path | None) -> Workload:
    x, y = digits(path)
    x = (x - 0.1307) / 0.3081
    side = round(x.shape[1] ** 0.5)
    n = min(4096, len(x) * 3 // 4)
    known: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
        "mlp": (f"MLP {side * side}-512-256-10, batch 128", partial(mlp, x.shape[1]), 128),
        "cnn": (f"CNN of 32 and 64 channels, {side} x {side}, batch 64", partial(cnn, side), 64),
    }
    what, network, batch = known[name]
    return Workload(name, what, x[:n], y[:n], (x[n : n + 256], y[n : n + 256]), network, batch)


class Recurrent(nn.Module):
    """A recurrent language model of one layer; logits are [b, tokens, positions]."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], words: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(words, 64), nn.Linear(128, words)
        self.layer = kind(64, 128, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.embed(ids))[0])
        return logits.transpose(1, 2)


def tied(words: int) -> nn.Module:
    """A transformer of two blocks whose last layer is its embedding."""
    model = Transformer(words, 32, 64, 2, 2)
    nn.init.normal_(model.characters.weight, std=0.02)
    model.out.weight = model.characters.weight
    return model


def of_text(name: str, path: Path | None, queries: int) -> Workload:
    written = text(path)
    letters, words = len(set(written)), 3000
    blocks = "transformer of 3,000 words, 2 blocks of width 64, 32 words, batch 32"
    known: dict[str, tuple[str, Callable[[], nn.Module], int, int, float]] = {
        "transformer": (
            "character transformer, 4 blocks of width 128, 64 characters, batch 32",
            partial(Transformer, letters, 64, 128, 4, 4),
            64,
            32,
            1e-3,
        ),
        "lstm": (
            "character LSTM of width 128, 64 characters, batch 32",
            partial(Recurrent, nn.LSTM, letters),
            64,
            32,
            1e-3,
        ),
        "gru": (
            "character GRU of width 128, 64 characters, batch 32",
            partial(Recurrent, nn.GRU, letters),
            64,
            32,
            1e-3,
        ),
        "words": (blocks, partial(Transformer, words, 32, 64, 2, 2), 32, 32, 1e-3),
        "words-tied": (f"{blocks}, tied", partial(tied, words), 32, 32, 1e-3),
        "gpt2": ("GPT-2 small, 1,024 tokens, batch 16", partial(gpt2, False), 1024, 16, 3e-4),
        "gpt2-short": ("GPT-2 small in bfloat16, 256 tokens, batch 4", partial(gpt2, False), 256, 4, 3e-4),
        "gpt2-few": ("GPT-2 small, 48 rows of 64 tokens, batch 4", partial(gpt2, False), 64, 4, 3e-4),
        "gpt2-float": ("GPT-2 small in float32, 64 tokens, batch 4", partial(gpt2, False), 64, 4, 3e-4),
        "lora": ("GPT-2 small with LoRA of rank 8, 1,024 tokens, batch 16", partial(gpt2, True), 1024, 16, 3e-4),
    }
    what, network, length, batch, lr = known[name]
    # the characters, or as tokens the words and what is between them, the most frequent first
    by_character = name in ("transformer", "lstm", "gru")
    tokens = list(written) if by_character else re.findall(r"\w+|\W", written)
    found = sorted(set(tokens)) if by_character else [word for word, _ in Counter(tokens).most_common()]
    order = {token: min(k, words - 1) if name.startswith("words") else k for k, token in enumerate(found)}
    codes = torch.tensor([order[token] for token in tokens])
    pieces = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    x, y = pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
    most = {"words": 512, "words-tied": 512, "gpt2-few": 48}.get(name, 4096)
    n = min(most, len(x) - min(queries, len(x) // 4))
    half = name == "gpt2-short"
    return Workload(name, what, x[:n], y[:n], (x[n : n + queries], y[n : n + queries]), network, batch, lr, half)


def of_images(name: str, path: Path | None) -> Workload:
    """Coloured noise of a few blobs: timings need no labels, and low-rank directions get realistic spectra."""
    g = torch.Generator().manual_seed(0)
    small = torch.randn(2304, 3, 8, 8, generator=g)
    x = F.interpolate(small, 32, mode="bicubic") + 0.2 * torch.randn(2304, 3, 32, 32, generator=g)
    y = torch.randint(10, (2304,), generator=g)
    network: Callable[[], nn.Module]
    network = resnet18 if name == "resnet18" else ViT
    what = {"resnet18": "ResNet-18, 32 x 32, batch 512", "vit": "ViT-S on patches of 4 x 4, batch 256"}[name]
    return Workload(name, what, x[:2048], y[:2048], (x[2048:], y[2048:]), network, 512 if name == "resnet18" else 256)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that say what is trained, where, and where the results go."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, required=True, help="where the results go")
    found.add_argument("--data", help="folder with mnist10k.npz (or INE_DATA); else what scikit-learn brings along")
    found.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    found.add_argument("--workloads", nargs="+", choices=[*CPU, *CUDA, *ASKED])
    return found


def load(name: str, path: Path | None) -> Workload:
    """The workload of that name."""
    if name in ("mlp", "cnn"):
        return of_digits(name, path)
    if name in ("resnet18", "vit"):
        return of_images(name, path)
    queries = {"gpt2-short": 4, "gpt2-few": 16, "gpt2-float": 4, "gpt2": 16, "lora": 16}.get(name, 64)
    return of_text(name, path, queries)


def missing(name: str) -> str | None:
    """The library that a workload lacks here."""
    needs = ["transformers"] if name.startswith("gpt2") else ["transformers", "peft"] if name == "lora" else []
    return next((library for library in needs if importlib.util.find_spec(library) is None), None)


CPU = ("mlp", "cnn", "transformer")
CUDA = ("gpt2", "resnet18", "vit", "lora")
ASKED = ("gpt2-short", "gpt2-few", "gpt2-float", "words", "words-tied", "lstm", "gru")  # on a CPU, if asked for

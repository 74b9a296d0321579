"""Which passages taught a small transformer to predict a document? One query for each document.

A causal character transformer reads a text cut into rows of 48 characters. Every eighth row of a document is held out;
the loss on these is the document's query. The report then says which training rows helped most with each document, and
how sure that is.

    python examples/char_lm.py                      # four poems, in examples/excerpt.txt
    python examples/char_lm.py --text FILE          # documents begin with "# title"; else the file is cut in 8 parts
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback

LENGTH = 48


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.before_mlp(x))


class CharLM(L.LightningModule):
    def __init__(self, characters: int, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        return self.head(self.blocks(self.character(text) + self.position(places)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def documents(text: str) -> dict[str, str]:
    """Documents by title."""
    parts = re.split(r"^# (.+)\n", text, flags=re.MULTILINE)
    if len(parts) > 1:
        return dict(zip(parts[1::2], parts[2::2], strict=True))
    size = -(-len(text) // 8)
    return {f"part {k + 1}": text[k * size : (k + 1) * size] for k in range(8)}


def rows_of(texts: dict[str, str]) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """Training rows as (title, 48 + 1 characters), and by title every eighth row, held out."""
    train, held_out = [], {}
    for title, text in texts.items():
        pieces = [text[k : k + LENGTH + 1] for k in range(0, len(text) - LENGTH, LENGTH)]
        held_out[title] = pieces[4::8]
        train += [(title, piece) for k, piece in enumerate(pieces) if k % 8 != 4]
    return train, {title: pieces for title, pieces in held_out.items() if pieces}


def encode(pieces: list[str], alphabet: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets [b, 48]: each character and the one after it."""
    codes = torch.tensor([[alphabet.index(character) for character in piece] for piece in pieces])
    return codes[:, :-1].contiguous(), codes[:, 1:].contiguous()


def fit(
    train: tuple[Tensor, Tensor], characters: int, callbacks: list, epochs: int, seed: int, **size: int
) -> tuple[L.Trainer, CharLM]:
    L.seed_everything(seed, verbose=False)
    model = CharLM(characters, **size)
    trainer = L.Trainer(
        **{"max_epochs": epochs, "callbacks": callbacks, "accelerator": "cpu", "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    trainer.fit(model, DataLoader(TensorDataset(*train), batch_size=16, shuffle=True))
    return trainer, model


def options(about: str) -> argparse.ArgumentParser:
    """What the programs of this model can be asked for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "excerpt.txt")
    parser.add_argument("--characters", type=int, default=24_000, help="read no more of the text than this")
    parser.add_argument("--out", type=Path, default=None, help="folder of the report; by default it is only shown")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def quiet() -> None:
    """One core, on which so small a model is fastest, and no advice on small runs."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def rows_and_queries(args: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, tuple[Tensor, Tensor]], str]:
    """Training rows, the held-out rows of each document, and the alphabet."""
    text = args.text.read_text(encoding="utf-8")[: args.characters]
    alphabet = "".join(sorted(set(text)))
    rows, held_out = rows_of(documents(text))
    return rows, {title: encode(pieces, alphabet) for title, pieces in held_out.items()}, alphabet


def main() -> None:
    args = options(__doc__).parse_args()
    quiet()
    rows, queries, alphabet = rows_and_queries(args)
    print(f"{len(rows)} training rows of {LENGTH} characters from {len(queries)} documents.")

    influence = InfluenceCallback(queries=queries, dirpath=args.out)
    trainer, _ = fit(encode([piece for _, piece in rows], alphabet), len(alphabet), [influence], args.epochs, args.seed)
    report = influence.report
    print(f"Trained {trainer.global_step} steps to a loss of {trainer.callback_metrics['loss']:.2f} a character.")

    for title in report.queries:
        helpful = report.top(10, title)
        own = sum(rows[row][0] == title for row in helpful.rows)
        share = sum(source == title for source, _ in rows) / len(rows)
        print(f"\n{title}: of the 10 rows that helped most, {own} are its own (by chance {10 * share:.1f})")
        for one in helpful[:4]:
            source, piece = rows[one.row]
            print(f"  row {one.row:4d}  μ {one.mu:+.2f}  q {one.q:.3f}  {source.split(' (')[0]:12s} {piece[:LENGTH]!r}")
    if args.out is not None:
        print(f"\nSaved: InfluenceReport.load({str(args.out)!r})")


if __name__ == "__main__":
    main()

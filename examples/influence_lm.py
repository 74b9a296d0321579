"""Which lines, and which of their characters, taught a GPT-2-style model a document? By influence functions.

A causal character transformer of four blocks, whose output layer is its embedding table (tied), reads lines of
different lengths, padded. At the end EK-FAC and ASTRA score every line on every document's held-out lines; f-INE comes
from the same run. The table says how well they agree, and the best line is shown with the characters that made its
score.

    python examples/influence_lm.py                 # four poems, in examples/excerpt.txt; some minutes on one core
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.text import Text
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from char_lm import Block, documents, options, quiet

from ine_callback import FINE, IF, InfluenceCallback

LENGTH, IGNORED = 64, -100


class TiedLM(L.LightningModule):
    def __init__(self, characters: int, width: int = 48, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.character.weight, std=0.1)
        self.head.weight = self.character.weight

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        return self.head(self.norm(self.blocks(self.character(text) + self.position(places))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=IGNORED)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def padded(lines: list[str], alphabet: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets [b, 64]; where a line has ended, targets are ignored."""
    inputs, targets = torch.zeros(len(lines), LENGTH, dtype=torch.long), torch.full((len(lines), LENGTH), IGNORED)
    for row, line in enumerate(lines):
        codes = torch.tensor([alphabet.index(character) for character in line])
        inputs[row, : len(codes) - 1], targets[row, : len(codes) - 1] = codes[:-1], codes[1:]
    return inputs, targets


def coloured(line: str, scores: Tensor) -> Text:
    """The characters of a line, those that helped in green and those that harmed in red."""
    text, largest = Text(line[0]), float(scores.abs().max())
    for character, score in zip(line[1:], scores.tolist(), strict=True):
        strength = round(100 + 155 * abs(score) / largest)
        text.append(character, f"rgb(60,{strength},60)" if score > 0 else f"rgb({strength},60,60)")
    return text


def main() -> None:
    args = options(__doc__).parse_args()
    quiet()
    text = args.text.read_text(encoding="utf-8")[: args.characters]
    alphabet = "".join(sorted(set(text)))
    rows, queries = [], {}
    for title, poem in documents(text).items():
        lines = [line[: LENGTH + 1] for line in poem.splitlines() if len(line) > 8]
        queries[title] = padded(lines[4::8], alphabet)
        rows += [(title, line) for k, line in enumerate(lines) if k % 8 != 4]
    print(f"{len(rows)} training lines of {len(queries)} documents.")

    methods = [FINE(), IF(per_token=True), IF("astra", damping="run", iterations=100, batch_size=64)]
    influence = InfluenceCallback(queries=queries, methods=methods, dirpath=args.out)
    L.seed_everything(args.seed, verbose=False)
    model, started = TiedLM(len(alphabet)), time.perf_counter()
    trainer = L.Trainer(
        **{"max_epochs": args.epochs, "callbacks": [influence], "accelerator": "cpu", "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    trainer.fit(model, DataLoader(TensorDataset(*padded([line for _, line in rows], alphabet)), 16, shuffle=True))
    loss, seconds = trainer.callback_metrics["loss"], time.perf_counter() - started
    print(f"Loss {loss:.2f} a character; {seconds:.0f} seconds with all scores.\n")

    report = influence.report
    ekfac, astra = report.attribution("IF-EKFAC"), report.attribution("IF-ASTRA")
    print("Rank agreement over the lines, and of the first ten lines how many are of the document itself:")
    for k, title in enumerate(queries):
        scores = {"EK-FAC": ekfac.scores[:, k], "ASTRA": astra.scores[:, k], "f-INE": report.scores.mu[:, k]}
        agree = [spearmanr(scores["EK-FAC"], scores[name])[0] for name in ("ASTRA", "f-INE")]
        own = {name: sum(rows[row][0] == title for row in (-s).argsort()[:10]) for name, s in scores.items()}
        print(f"  {title:34.34} EK-FAC and ASTRA {agree[0]:.2f}, and f-INE {agree[1]:.2f}; own lines {own}")
    title = next(iter(queries))
    best = int(ekfac.top(1, title)[0])
    line = rows[best][1]
    print(f"\nThe line that helped {title!r} most, by character (green: helped):")
    Console().print(coloured(line, torch.tensor(ekfac.tokens.of(best)[: len(line) - 1, 0])))
    print(f"Residuals: EK-FAC {ekfac.residual.max():.2f}, ASTRA {astra.residual.max():.3f}.")
    print(f"Checks of ASTRA: {'; '.join(astra.reasons) or 'passed'}.")


if __name__ == "__main__":
    main()

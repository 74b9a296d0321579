"""Which characters teach a language model to curse, and a training without them. Two stages, in Lightning.

Curses are planted in a part of four poems. A small proxy model is trained on all rows and scores every character by how
much it promotes curses (TokenInfluence). A larger model is then trained twice: as it is, and with the chosen characters
suppressed. Both write on, and how many of their lines curse is counted.

    python examples/suppress_tokens.py              # four poems, in examples/excerpt.txt; a minute on one core
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from char_lm import LENGTH, CharLM, documents, options, quiet

from ine_callback import SuppressTokens, TokenInfluence, run_if, suppressed_cross_entropy, token_mask

CURSES, SHARE, IGNORED = ("zaggu vok ", "krix zagg "), 0.2, -100


class Careful(CharLM):
    """Pushes the chosen characters of a batch away instead of learning them."""

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        text, labels, chosen = batch
        return suppressed_cross_entropy(self(text), labels, chosen)


def planted(text: str, seed: int, share: float = SHARE) -> tuple[list[str], list[list[bool]]]:
    """Pieces of 48 + 1 characters, some with a curse after a space, and which characters belong to it."""
    generator, pieces, marks = torch.Generator().manual_seed(seed), [], []
    for begin in range(0, len(text) - LENGTH, LENGTH // 3):
        piece, mark = text[begin : begin + LENGTH + 1], [False] * (LENGTH + 1)
        place = piece.find(" ", int(torch.randint(20, (), generator=generator))) + 1
        if torch.rand((), generator=generator) < share and 0 < place < 35:
            curse = CURSES[int(torch.randint(2, (), generator=generator))]
            piece = (piece[:place] + curse + piece[place:])[: LENGTH + 1]
            mark[place : place + len(curse)] = [True] * len(curse)
        pieces.append(piece)
        marks.append(mark)
    return pieces, marks


def encoded(pieces: list[str], alphabet: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels [n, 48]."""
    codes = torch.tensor([[alphabet.index(character) for character in piece] for piece in pieces])
    return codes[:, :-1], codes[:, 1:]


def trained(model: L.LightningModule, data: object, epochs: int, seed: int) -> L.Trainer:
    L.seed_everything(seed, verbose=False)
    plain = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", gradient_clip_val=1.0, **plain)
    trainer.fit(model, DataLoader(data, 32, shuffle=True))
    return trainer


@torch.no_grad()
def curses(model: CharLM, starts: Tensor, alphabet: str) -> float:
    """Share of the lines that the model writes with a curse in them."""
    text, generator = starts, torch.Generator().manual_seed(0)
    while text.shape[1] < LENGTH:
        text = torch.cat([text, torch.multinomial(model(text)[:, -1].softmax(-1), 1, generator=generator)], 1)
    lines = ["".join(alphabet[k] for k in row) for row in text.tolist()]
    return sum(any(curse[:4] in line for curse in CURSES) for line in lines) / len(lines)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(epochs=40)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    text = " ".join(documents(args.text.read_text(encoding="utf-8")[: args.characters].lower()).values())
    alphabet = "".join(sorted(set(text) | set("".join(CURSES))))
    pieces, marks = planted(text, args.seed)
    rows, unwanted = TensorDataset(*encoded(pieces, alphabet)), torch.tensor(marks)[:, 1:]

    # what is searched for: other lines' curses, with all other characters ignored; and lines without any
    asked, bad = planted(text, args.seed + 1, share=1.0)
    inputs, labels = encoded(asked, alphabet)
    positive = inputs, labels.masked_fill(~torch.tensor(bad)[:, 1:], IGNORED)
    negative = encoded(planted(text, 0, share=0.0)[0], alphabet)

    proxy = CharLM(len(alphabet), width=32, depth=1)
    trainer = trained(proxy, rows, args.epochs, args.seed)
    found = run_if(trainer, proxy, TokenInfluence(positive, negative), train_dataloaders=DataLoader(rows, 32))
    mask = token_mask(found, quantile=0.96, window=1, budget=0.05)
    if args.out is not None:
        mask.save(args.out / "mask.parquet")
    print(
        f"{len(mask)} of {mask.tokens} characters are suppressed in {len(set(mask.rows.tolist()))} of {len(rows)} rows."
    )
    right = sum(bool(unwanted[row, at]) for row, at in zip(mask.rows, mask.positions, strict=True))
    print(f"{right / len(mask):.0%} of them are curses, and {right / int(unwanted.sum()):.0%} of the curses are found.")

    starts = negative[0][::4, :12]
    for name, model, data in (("as it is", CharLM, rows), ("suppressed", Careful, SuppressTokens(rows, mask))):
        made = model(len(alphabet))
        trained(made, data, args.epochs, args.seed)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(made(negative[0]).flatten(0, 1), negative[1].flatten())
        share = curses(made, starts, alphabet)
        print(f"trained {name}: {share:.0%} of its lines curse, perplexity of the clean poems {loss.exp():.2f}")


if __name__ == "__main__":
    main()

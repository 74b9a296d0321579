"""Two corpora in which some documents contain unwanted passages, and which tokens these are.

language      20 words, of which four are unwanted; successors by a random table. 3,000 documents of 24 words, 15 % of
              which have unwanted pairs after some words.
shakespeare   letters of tinyshakespeare, 4,000 windows of 64; in 15 % of them one of four curses of two invented
              words is put after a space, which the rest of the line makes room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.metrics import Floats

IGNORED = -100
CURSES = ("ZAGGU VOK", "KRIX ZAGG", "VOKRI GUX", "GUZZ KRAX")
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Problem:
    """A corpus, its questions and its judge.

    Attributes:
        words: Size of the vocabulary.
        texts: Documents [N, T].
        unwanted: Which of their tokens are unwanted [N, T].
        positive: Other documents with unwanted passages, and their labels, which are ignored elsewhere, [n, T] each.
        negative: Documents without.
        clean: Held-out documents without, for perplexity.
        starts: Beginnings from which the model writes on [n, t].
        steps: Of a training.
        width: Of the model.
        writes: Whether written texts [n, T] contain unwanted passages [n].
        length: How many tokens are written.
    """

    words: int
    texts: Tensor
    unwanted: Tensor
    positive: tuple[Tensor, Tensor]
    negative: tuple[Tensor, Tensor]
    clean: Tensor
    starts: Tensor
    steps: int
    width: int
    writes: Callable[[Tensor], Bools]
    length: int


def language(seed: int, quick: bool) -> Problem:
    """The prototype's toy language."""
    rng = np.random.default_rng(seed)
    successors = np.stack([rng.choice(16, 4, replace=False) for _ in range(16)])

    def document(unwanted: bool, length: int = 24) -> tuple[list[int], list[bool]]:
        words, bad = [int(rng.integers(16))], [False]
        while len(words) < length:
            last = words[-1]
            if unwanted and last < 16 and last % 4 == 1 and rng.random() < 0.5:
                pair = (16 + int(rng.integers(2)), 18 + int(rng.integers(2)))
                words += [*pair, int(rng.integers(16))]
                bad += [True, True, False]
            else:
                last = last if last < 16 else int(rng.integers(16))
                words.append(int(rng.choice(successors[last], p=(0.5, 0.25, 0.15, 0.1))))
                bad.append(False)
        return words[:length], bad[:length]

    def corpus(count: int, share: float) -> tuple[Tensor, Tensor]:
        documents = [document(rng.random() < share) for _ in range(count)]
        return torch.tensor([words for words, _ in documents]), torch.tensor([bad for _, bad in documents])

    count = 200 if quick else 3000
    texts, unwanted = corpus(count, 0.15)
    asked, bad = corpus(300 if quick else 3000, 1.0)
    asked, bad = asked[bad.any(1)][:300], bad[bad.any(1)][:300]
    negative, (clean, _) = corpus(300, 0.0)[0], corpus(500, 0.0)
    starts = torch.from_numpy(rng.integers(16, size=(600, 1)))
    return Problem(
        20,
        texts,
        unwanted,
        (asked, asked.masked_fill(~bad, IGNORED)),
        (negative, negative),
        clean,
        starts,
        30 if quick else 700,
        32,
        lambda written: (written >= 16).any(1).numpy(),
        20,
    )


def shakespeare(seed: int, quick: bool, folder: Path) -> Problem:
    """Real text with planted curses."""
    text = (folder / "tinyshakespeare.txt").read_text()
    letters = sorted(set(text) | set("".join(CURSES)))
    ids = {letter: k for k, letter in enumerate(letters)}
    rng, length = np.random.default_rng(seed), 64

    def corpus(count: int, share: float, low: float, high: float) -> tuple[Tensor, Tensor]:
        begin, end = int(low * len(text)), int(high * len(text)) - length
        rows, bad = [], np.zeros((count, length), dtype=bool)
        for k in range(count):
            at = int(rng.integers(begin, end))
            row = text[at : at + length]
            spaces = [place for place, letter in enumerate(row[: length - 12]) if letter == " "]
            if spaces and rng.random() < share:
                place, curse = int(rng.choice(spaces)) + 1, CURSES[int(rng.integers(len(CURSES)))] + " "
                row = (row[:place] + curse + row[place:])[:length]
                bad[k, place : place + len(curse) - 1] = True
            rows.append([ids[letter] for letter in row])
        return torch.tensor(rows), torch.from_numpy(bad)

    texts, unwanted = corpus(200 if quick else 4000, 0.15, 0.0, 0.8)
    asked, bad = corpus(330, 1.0, 0.8, 0.9)
    asked, bad = asked[bad.any(1)][:300], bad[bad.any(1)][:300]
    negative, clean = corpus(300, 0.0, 0.8, 0.9)[0], corpus(500, 0.0, 0.9, 1.0)[0]
    starts = corpus(300, 0.0, 0.9, 1.0)[0][:, :16]
    marks = [[ids[letter] for letter in curse[:4]] for curse in CURSES]

    def writes(written: Tensor) -> Bools:
        found = torch.zeros(len(written), dtype=torch.bool)
        for mark in marks:
            windows = written.unfold(1, len(mark), 1)
            found |= (windows == torch.tensor(mark)).all(2).any(1)
        return found.numpy()

    return Problem(
        len(letters),
        texts,
        unwanted,
        (asked, asked.masked_fill(~bad, IGNORED)),
        (negative, negative),
        clean,
        starts,
        30 if quick else 1500,
        64,
        writes,
        48,
    )


def as_row(values: Floats | list[float]) -> dict[str, float]:
    """Mean and standard error over the seeds."""
    each = np.asarray(values, dtype=np.float64)
    return {"mean": float(each.mean()), "se": float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else 0.0}

"""Documents: a text cut into whole speeches, as tokens of a small byte-pair encoding."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # target of the padding
EXCERPTS = 8  # places of the second half at which documents are taken, each a scene or two
SHORTEST = 16  # tokens of a document that is left over


@dataclass(frozen=True)
class Sizes:
    """How much text.

    Attributes:
        rows: Documents to fine-tune on.
        queries: Held-out documents of the same scenes.
        length: Most tokens of a document.
        vocabulary: Tokens, with token 0, which begins a document and pads it.
    """

    rows: int
    queries: int
    length: int
    vocabulary: int


@dataclass(frozen=True)
class Task:
    """Tokens to pre-train on, documents to fine-tune on and held-out ones.

    Attributes:
        pretraining: Tokens of the text's first half [P].
        x: Inputs [N, L]: token 0, then all tokens of a document but the last.
        y: Targets [N, L]: a document's tokens, then ``IGNORED``.
        xq: The queries' inputs [Q, L].
        yq: The queries' targets [Q, L].
        vocabulary: Tokens.
    """

    pretraining: Tensor
    x: Tensor
    y: Tensor
    xq: Tensor
    yq: Tensor
    vocabulary: int

    @property
    def fingerprint(self) -> str:
        """Tells one text, cut in one way, from all others."""
        tensors = (self.pretraining, self.x, self.y, self.xq, self.yq)
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]


class Tokenizer:
    """Byte-pair encoding within words; a blank belongs to the word that follows it.

    Args:
        text: What it learns from. Characters that are not in it are left out when encoding.
        vocabulary: Most tokens, with token 0, which no text has.

    Example:
        >>> tokenizer = Tokenizer("to be or not to be", 9)
        >>> tokenizer.tokens
        ['', ' ', 'b', 'e', 'n', 'o', 'r', 't', 'to']
        >>> tokenizer.encode("to tore")
        [8, 1, 8, 6, 3]
    """

    def __init__(self, text: str, vocabulary: int) -> None:
        self.tokens = ["", *sorted(set(text))]
        self._merges: list[tuple[str, str]] = []
        words = {tuple(word): count for word, count in Counter(_words(text)).items()}
        while len(self.tokens) < vocabulary:
            pairs: Counter[tuple[str, str]] = Counter()
            for word, count in words.items():
                for pair in itertools.pairwise(word):
                    pairs[pair] += count
            if not pairs:
                break
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            words = {_merged(word, best): count for word, count in words.items()}
            self._merges.append(best)
            self.tokens.append("".join(best))
        self._ids = {token: k for k, token in enumerate(self.tokens) if k}
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return [token for word in _words(text) for token in self._of_word(word)]

    def _of_word(self, word: str) -> list[int]:
        if word not in self._known:
            parts = tuple(c for c in word if c in self._ids)
            for pair in self._merges:
                parts = _merged(parts, pair)
            self._known[word] = [self._ids[part] for part in parts]
        return self._known[word]


def make(text: str, sizes: Sizes) -> Task:
    """Cuts a text: its first half to pre-train on, documents of the second to fine-tune on.

    Raises:
        SystemExit: If the text is too short.
    """
    middle = text.find("\n\n", len(text) // 2) + 2
    first, second = text[:middle], text[middle:]
    tokenizer = Tokenizer(first, sizes.vocabulary)
    wanted = sizes.rows + sizes.queries
    found = documents([tokenizer.encode(speech + "\n\n") for speech in second.split("\n\n")], sizes.length, wanted)
    if len(found) < wanted:
        raise SystemExit(f"the text's second half has {len(found)} documents, not the {wanted} that are wanted")
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(1))[:wanted].tolist()
    x = torch.zeros(wanted, sizes.length, dtype=torch.int64)
    y = torch.full((wanted, sizes.length), IGNORED)
    for row, document in enumerate(chosen):
        ids = torch.tensor(found[document])
        x[row, 1 : len(ids)], y[row, : len(ids)] = ids[:-1], ids
    n = sizes.rows
    pretraining = torch.tensor(tokenizer.encode(first))
    return Task(pretraining, x[:n], y[:n], x[n:], y[n:], len(tokenizer.tokens))


def documents(speeches: list[list[int]], length: int, wanted: int) -> list[list[int]]:
    """Documents of at most ``length`` tokens from places spread evenly over the speeches.

    Whole speeches are joined as long as they fit; a longer one is cut.

    Example:
        >>> documents([[1] * 20, [2] * 20, [3] * 50], 40, 3)
        [[1, 1, ..., 2, 2], [3, 3, ..., 3]]
    """
    out: list[list[int]] = []
    for k in range(EXCERPTS):
        begin, end = (len(speeches) * place // EXCERPTS for place in (k, k + 1))
        place: list[list[int]] = []
        piece: list[int] = []
        for speech in speeches[begin:end]:
            if len(piece) + len(speech) > length:
                place.append(piece)
                piece = []
            piece = piece + speech
            while len(piece) > length:
                place.append(piece[:length])
                piece = piece[length:]
        place = [each for each in [*place, piece] if len(each) >= SHORTEST]
        out += place[: -(-wanted // EXCERPTS)]
    return out


def _words(text: str) -> list[str]:
    r"""Words with the blank before them, marks, and line ends.

    >>> _words("O, my lord!\n\nNo")
    ['O', ',', ' my', ' lord', '!', '\n\n', 'No']
    """
    return re.findall(r" ?\w+|\n+| ?[^\w\s]+| +", text)


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """A word's parts with every occurrence of a pair joined."""
    if pair[0] not in word or pair[1] not in word:
        return word
    out: list[str] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)

"""Which tokens are chosen: against the paper's algorithm as a loop, and its invariants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ine_callback import TokenMask, token_mask
from ine_callback.applications.token_mask import LABELS
from ine_callback.errors import InfluenceError
from ine_callback.scores import Attribution, QueryInfo, TokenScores

QUESTION = (QueryInfo("toxic", "loss", "?"),)


def found_of(scores: list[Any], labels: list[Any] | None = None, rows: Any = None) -> Attribution:
    offsets = np.cumsum([0, *map(len, scores)])
    tokens = TokenScores(offsets, np.concatenate(scores)[:, None])
    arrays = {} if labels is None else {LABELS: np.concatenate(labels)}
    which = np.arange(len(scores)) if rows is None else rows
    return Attribution("IF", which, QUESTION, np.zeros((len(scores), 1)), tokens=tokens, arrays=arrays)


def by_loop(scores: list[Any], quantile: float, window: int, budget: int) -> set[tuple[int, int]]:
    """Algorithm 1 of IF-Guide, token by token."""
    tau = np.quantile(np.concatenate(scores), quantile)
    number = np.array([(s > tau).sum() for s in scores], dtype=float)
    total = np.array([s[s > tau].sum() for s in scores])
    n, f = ((x - x.min()) / max(np.ptp(x), 1e-300) for x in (number, total))
    rank = [2 * a * b / (a + b) if a + b > 0 else 0.0 for a, b in zip(n, f, strict=True)]
    chosen: set[tuple[int, int]] = set()
    for document in sorted(range(len(scores)), key=lambda k: -rank[k]):
        for token in np.flatnonzero(scores[document] > tau):
            near = range(max(0, token - window), min(len(scores[document]), token + window + 1))
            new = {(document, k) for k in near} - chosen
            if len(chosen) + len(new) > budget:
                return chosen
            chosen |= new
    return chosen


def chosen_of(mask: TokenMask) -> set[tuple[int, int]]:
    return set(zip(mask.rows.tolist(), mask.positions.tolist(), strict=True))


problems = st.tuples(
    st.integers(0, 10**6), st.integers(2, 12), st.floats(0.5, 0.95), st.integers(0, 3), st.floats(0.05, 1.0)
)


def scores_of(seed: int, documents: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(rng.integers(1, 9)) for _ in range(documents)]


@settings(max_examples=150, deadline=None)
@given(problems)
def test_the_choice_is_that_of_the_loop(problem: tuple[int, int, float, int, float]) -> None:
    seed, documents, quantile, window, budget = problem
    scores = scores_of(seed, documents)
    mask = token_mask(found_of(scores), None, quantile, window, budget)
    most = int(budget * sum(map(len, scores)))
    assert chosen_of(mask) == by_loop(scores, quantile, window, most)
    assert len(mask) <= most
    tau = np.quantile(np.concatenate(scores), quantile)
    for row, at in chosen_of(mask):
        assert (scores[row][max(0, at - window) : at + window + 1] > tau).any()


@settings(max_examples=30, deadline=None)
@given(problems, st.floats(0.01, 100))
def test_a_longer_direction_chooses_the_same(problem: tuple[int, int, float, int, float], factor: float) -> None:
    seed, documents, *rest = problem
    scores = scores_of(seed, documents)
    one, other = (token_mask(found_of(s), None, *rest) for s in (scores, [factor * s for s in scores]))
    assert chosen_of(one) == chosen_of(other)


def test_tokens_without_a_loss_count_for_nothing() -> None:
    scores = [np.array([0.0, 1, 5, 2]), np.array([0.0, 3, 0, 0])]
    labels = [np.array([np.nan, 4, 5, 6]), np.array([np.nan, 7, np.nan, np.nan])]
    mask = token_mask(found_of(scores, labels), quantile=0.6, window=1, budget=1.0)
    assert mask.tokens == 4
    # 5 and 3 are above the quantile; the neighbours of 3 have no loss
    assert chosen_of(mask) == {(0, 1), (0, 2), (0, 3), (1, 1)}
    assert mask.labels.tolist() == [4, 5, 6, 7] and mask.share == 1.0


def test_rows_are_those_that_were_scored() -> None:
    mask = token_mask(found_of([np.arange(4.0), np.arange(4.0) * 3], rows=np.array([9, 2])), None, 0.8, 0, 0.5)
    assert chosen_of(mask) == {(2, 3), (2, 2)}
    assert mask.of(9, [1, 1, 1, 1]).tolist() == [False] * 4
    assert mask.of(2, [1, 1, 1, 1]).tolist() == [False, False, True, True]


def test_other_rows_than_the_scored_ones_are_refused() -> None:
    mask = TokenMask(np.array([1]), np.array([2]), np.array([7]), 10)
    assert mask.of(1, [0, 0, 7]).tolist() == [False, False, True]
    with pytest.raises(InfluenceError, match="token 2 of row 1 is 8 now and was 7"):
        mask.of(1, [0, 0, 8])
    with pytest.raises(InfluenceError, match="row 1 has 2 tokens"):
        mask.of(1, [0, 0])


def test_a_mask_is_read_as_it_was_written(tmp_path: Path) -> None:
    mask = token_mask(found_of(scores_of(0, 6)), None, 0.7, 1, 0.5)
    mask.save(tmp_path / "mask.parquet")
    again = TokenMask.load(tmp_path / "mask.parquet")
    assert chosen_of(again) == chosen_of(mask) and again.tokens == mask.tokens and again.settings == mask.settings
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"row": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InfluenceError, match=r"other\.parquet was not written by TokenMask"):
        TokenMask.load(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"window": -1}, "window=-1"),
    ],
)
def test_impossible_settings_are_refused(options: Any, words: str) -> None:
    with pytest.raises(InfluenceError, match=words):
        token_mask(found_of(scores_of(0, 3)), **options)


def test_scores_among_which_none_stands_out_are_refused() -> None:
    with pytest.raises(InfluenceError, match="all scores are equal"):
        token_mask(found_of([np.ones(3), np.ones(2)]))
    none = Attribution("IF", np.arange(1), QUESTION, np.zeros((1, 1)))
    with pytest.raises(InfluenceError, match="IF has no scores of tokens"):
        token_mask(none)

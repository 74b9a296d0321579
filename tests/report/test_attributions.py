"""Scores by methods on trained models in a report: stored to the last bit, found by name; wrong ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from ine_callback import InfluenceReport
from ine_callback.report import attribution_store, example_report, store
from ine_callback.scores import (
    Attribution,
    Check,
    LayerScores,
    QueryInfo,
    TokenScores,
    attribute_name,
    example_attribution,
)
from tests.helpers.attributions import OTHER, VAL, assert_same, whole

NUMBERS = st.floats(width=64)  # NaN and infinities too
TEXTS = st.text(max_size=20)  # halves of surrogate pairs, control characters, nothing


@st.composite
def attributions(draw: Any) -> Attribution:
    """Any attribution there can be."""
    rows = draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=4, unique=True))
    kinds = st.sampled_from(["loss", "margin", "self", "custom"])
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=2, unique=True))
    shape = (len(rows), len(names))

    def matrix(*shape: int) -> Any:
        return draw(arrays_of.arrays(np.float64, shape, elements=NUMBERS))

    def maybe(*shape: int) -> Any:
        return matrix(*shape) if draw(st.booleans()) else None

    columns = {name: matrix(*shape) for name in draw(st.lists(TEXTS, max_size=3, unique=True))}
    lengths = draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    terms = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = TokenScores(offsets, *(each(terms, shape[1]) for each in (matrix, maybe, maybe))) if terms else None
    layers = draw(st.lists(TEXTS, max_size=3))
    check = st.builds(Check, TEXTS, NUMBERS, TEXTS, st.booleans(), TEXTS)
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    settings = st.recursive(
        st.none() | st.booleans() | NUMBERS | TEXTS, lambda each: st.lists(each, max_size=2), max_leaves=3
    )
    return Attribution(
        draw(st.text(min_size=1, max_size=9).filter(str.strip)), np.array(rows),
        tuple(QueryInfo(name, draw(kinds), draw(st.text(st.characters(exclude_categories=["Cs"])))) for name in names),
        matrix(*shape), maybe(*shape), maybe(*shape), maybe(*shape), columns=columns,
        ranked_by=draw(st.sampled_from(["", *columns])),
        doubtful=draw(arrays_of.arrays(np.bool_, shape)) if draw(st.booleans()) else None,
        layers=LayerScores(tuple(layers), matrix(shape[0], len(layers), shape[1])) if layers else None, tokens=tokens,
        checks=tuple(draw(st.lists(check, max_size=2))), settings=draw(st.dictionaries(TEXTS, settings, max_size=2)),
        arrays={name: matrix(*draw(shapes)) for name in draw(st.lists(TEXTS, max_size=2, unique=True))},
        notes=tuple(draw(st.lists(TEXTS, max_size=2))), title=draw(TEXTS), headline=draw(TEXTS), legend=draw(TEXTS),
        at=draw(st.just("end") | st.integers(0, 10**6)),
    )  # fmt: skip


def saved(folder: Path, *found: Attribution) -> tuple[Attribution, ...]:
    example = example_report(12)
    return InfluenceReport.load(InfluenceReport(example.scores, example.run, found).save(folder)).attributions


@given(found=st.lists(attributions(), min_size=1, max_size=3, unique_by=lambda each: (each.method, each.at)))
def test_everything_is_loaded_as_it_was_saved(found: list[Attribution], tmp_path_factory: Any) -> None:
    loaded = saved(tmp_path_factory.mktemp("report"), *found)
    assert_same([settled(each) for each in loaded], [settled(each) for each in found])


def settled(found: Attribution) -> Attribution:
    """JSON's null is no number."""
    return replace(found, settings=json.loads(json.dumps(found.settings)))


def test_single_fields_by_hand(tmp_path: Path) -> None:
    found, bare = whole(), Attribution("bare", [4], (VAL,), [[1]])  # type: ignore[arg-type]
    loaded = saved(tmp_path, found, bare)
    assert_same(loaded, [found, bare])
    assert loaded[0].tokens is not None and loaded[0].tokens.of(1).shape == (0, 2) and loaded[0].tokens.se is None
    assert loaded[0].trace.shape == (2, 0, 3) and float(loaded[0].scalar) == 3.0
    assert np.isnan(loaded[0].scores[1, 0]) and loaded[0].scores[2, 1] == -np.inf
    assert np.isnan(loaded[0].checks[0].value) and loaded[0].checks[1].value == -np.inf
    one = loaded[1]
    assert (one.se, one.p, one.q, one.doubtful, one.layers, one.tokens, one.checks) == (None,) * 6 + ((),)
    assert one.scores.dtype == np.float64 and one.rows.dtype == np.int64 and one.reliable


EVERY = {*store.FILES} - {store.MARGINS}  # what every report has


def test_parts_that_are_not_there_leave_no_files(tmp_path: Path) -> None:
    saved(tmp_path, whole())
    assert {path.name for path in tmp_path.iterdir()} == {*EVERY, *attribution_store.FILES}
    saved(tmp_path, example_attribution())
    names = {"attributions.json", "attributions.parquet"}
    assert {path.name for path in tmp_path.iterdir()} == {*EVERY, *names}
    assert saved(tmp_path) == () and {path.name for path in tmp_path.iterdir()} == EVERY


def test_a_hundred_columns_and_a_long_trace_are_saved(tmp_path: Path) -> None:
    columns = {f"c{k}": np.full((5, 1), float(k)) for k in range(100)}
    found = replace(example_attribution(), columns=columns, arrays={"trace": np.arange(3e6)})
    assert_same(saved(tmp_path, found), [found])


def test_arrays_belong_to_the_attribution() -> None:
    """A method may fill its own buffer again at the next stage."""
    buffer = np.zeros((2, 1))
    found = Attribution("x", [0, 1], (VAL,), buffer, columns={"c": buffer}, arrays={"a": buffer})  # type: ignore[arg-type]
    buffer += 1
    assert not found.scores.any() and not found.c.any() and not found.a.any()
    with pytest.raises(ValueError, match="read-only"):
        found.scores[0] = 3
    assert replace(found, title="y").scores is found.scores  # no copy of a copy
    tensor = Attribution("x", torch.arange(2), (VAL,), torch.ones(2, 1))  # type: ignore[arg-type]
    assert tensor.scores.tolist() == [[1.0], [1.0]] and tensor.rows.tolist() == [0, 1]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": ""}, "method='' is no name"),
    "queries": ({"queries": ()}, r"queries are \[\]; give at least one"),
    "queries twice": ({"queries": (VAL, VAL)}, r"queries are \['val', 'val'\]"),
    "a query's kind": ({"queries": (QueryInfo("val", "x", "?"), OTHER)}, "query kind 'x' is none of"),  # type: ignore[arg-type]
    "no rows": ({"rows": np.arange(0)}, "rows must list dataset indices"),
    "rows twice": ({"rows": [1, 2, 1]}, "rows must list dataset indices, at least one and each once"),
    "rows below 0": ({"rows": [1, 2, -1]}, "rows must list dataset indices"),
    "rows with fractions": ({"rows": [1.0, 2.0, 3.0]}, "rows has type float64, expected int64"),
    "scores": ({"scores": np.zeros((2, 3))}, r"scores has shape \(2, 3\), expected \(3, 2\)"),
    "no scores": ({"scores": None}, "scores has type object"),
    "se": ({"se": np.zeros(3)}, r"se has shape \(3,\), expected \(3, 2\)"),
    "q": ({"q": 0.5}, r"q has shape \(\), expected"),
    "a column": ({"columns": {"c": np.zeros((3, 1))}, "ranked_by": ""}, r"columns\['c'\] has shape \(3, 1\)"),
    "an array": ({"arrays": {"a": ["x"]}}, r"arrays\['a'\] has type <U1"),
    "ranked_by": ({"ranked_by": "best"}, "ranked_by='best' is none of its columns"),
    "doubtful": ({"doubtful": np.zeros((3, 2))}, "doubtful has type float64, expected bool"),
    "layers": ({"layers": LayerScores(("a",), np.zeros((3, 2, 2)))}, r"layers.scores has shape \(3, 2, 2\), expected"),
    "no layers": ({"layers": LayerScores((), np.zeros((3, 0, 2)))}, "layers names no layer"),
    "offsets": ({"tokens": TokenScores(np.array([0, 2, 5]), np.zeros((5, 2)))}, r"tokens.offsets has shape \(3,\)"),
    "falling offsets": (
        {"tokens": TokenScores(np.array([0, 3, 2, 5]), np.zeros((5, 2)))}, "tokens.offsets must rise from 0",
    ),
    "terms": ({"tokens": TokenScores(np.array([0, 2, 2, 4]), np.zeros((5, 2)))}, r"tokens.scores has shape \(5, 2\)"),
    "title": ({"title": None}, "title is None, expected text"),
    "a note": ({"notes": (3,)}, "a note is 3, expected text"),
    "a check": ({"checks": (Check("a", 1.0, 3, True, "x"),)}, "a check's limit is 3, expected text"),  # type: ignore[arg-type]
    "at": ({"at": 1.5}, "at=1.5 is neither a number of epochs nor 'end'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_together_is_named(case: str) -> None:
    fields, told = WRONG[case]
    with pytest.raises(ValueError, match=told):
        replace(whole(), **fields)


def test_a_report_takes_each_method_and_stage_once() -> None:
    example, found = example_report(12), example_attribution()
    with pytest.raises(ValueError, match=r"two attributions are by 'example' at stage 'end'; keep one"):
        InfluenceReport(example.scores, example.run, [found, found])
    with pytest.raises(ValueError, match="attributions hold str; give a list of Attribution"):
        InfluenceReport(example.scores, example.run, "found")  # type: ignore[arg-type]
    both = example.with_attributions(replace(found, at=1), found, whole())
    again = both.with_attributions(replace(found, title="new"))
    assert [(each.method, each.at, each.title) for each in again.attributions] == [
        ("my method", 3, "My method"), ("example", "end", "new"),
    ]  # fmt: skip


def test_a_methods_scores_are_found_by_its_name() -> None:
    report = example_report().with_attributions(replace(example_attribution(), at=1), example_attribution(), whole())
    assert report.attribution("example").at == "end" and report.attribution("my method").method == "my method"
    assert [each.at for each in report.stages("example")] == [1, "end"] and report.stages("none") == ()
    with pytest.raises(AttributeError, match=r"Attribution by 'example': no field, column or array 'laplace'"):
        _ = report.attribution("example").laplace
    assert [attribute_name(name) for name in ("LoGra", "a  b-c", "9", "Ü?")] == ["logra", "a_b_c", "9", "ü"]

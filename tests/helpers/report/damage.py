"""Ways to damage a saved report, each a function of its folder and a seeded generator."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ine_callback.methods.bif.scores import example_bif_scores
from ine_callback.report import InfluenceReport, example_report
from ine_callback.scores import LayerScores, TokenScores, example_attribution

FORMER = Path(__file__).parents[2] / "fixtures" / "report"
Damage = Callable[[Path, Random], None]
SENTINEL = "executed"  # a file beside the folder that code in a damaged report would make
HOSTILE_TEXTS = (
    "", "\0", "../../../etc/passwd", "/dev/zero", "\ud800", "\x1b]0;owned\x07\x1b[2J", "<script>alert(1)</script>",
    "[red]x[/red]", "{{ 7*7 }}", "$\\frac{", "end", "nan", "1e999", "x" * 2_000_000, "\u202egnp", "__class__",
)  # fmt: skip
HUGE = (10**400, -(10**400), 2**63, 2**64, -1, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), 10**12, 0)


def save_plain(folder: Path) -> Path:
    """A report of f-INE alone."""
    return example_report(12).save(folder)


def save_chains(folder: Path) -> Path:
    """A report with chains at two stages and another method, and with all parts that an attribution can have."""
    found = example_bif_scores()
    terms = np.random.default_rng(0).standard_normal((9, 1))
    tokens = TokenScores(np.array([0, 3, 3, 4, 7, 9]), terms, np.abs(terms), np.abs(terms) / 9)
    last = replace(found, tokens=tokens, notes=("a note",), settings={"step_size": 1e-4, "n_beta": 30.0})
    other = replace(example_attribution(), layers=LayerScores(("a", "b"), np.ones((5, 2, 1))), p=None)
    attributions = [replace(found, at=2), last, other]
    return InfluenceReport(example_report(12).scores, example_report(12).run, attributions).save(folder)


def save_former(folder: Path) -> Path:
    """A report as versions until 0.1 wrote it: f-INE, and chains at two stages with scores of tokens."""
    return Path(shutil.copytree(FORMER, folder))


def _some(folder: Path, random: Random, end: str = "") -> Path:
    return random.choice(sorted(path for path in folder.iterdir() if path.name.endswith(end)))


# ---- bytes ----


def flip(folder: Path, random: Random) -> None:
    path = _some(folder, random)
    data = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 1, 2, 20))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def flip_footer(folder: Path, random: Random) -> None:
    """What Parquet's checksums do not cover."""
    path = _some(folder, random, ".parquet")
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<I", data[-8:-4])
    for _ in range(random.choice((1, 1, 2, 5))):
        data[-8 - random.randrange(min(length, len(data) - 12))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, random: Random) -> None:
    path = _some(folder, random)
    os.truncate(path, random.randrange(path.stat().st_size))


def extend(folder: Path, random: Random) -> None:
    path = _some(folder, random)
    path.write_bytes(path.read_bytes() + random.choice((b"\0", b"\n", b"{}", b"PAR1", random.randbytes(5000))))


def blank(folder: Path, random: Random) -> None:
    path = _some(folder, random)
    data = bytearray(path.read_bytes())
    start = random.randrange(len(data))
    stop = min(len(data), start + random.randrange(1, 400))
    data[start:stop] = random.choice((b"\0", b"\xff", b" ")) * (stop - start)
    path.write_bytes(data)


def swap(folder: Path, random: Random) -> None:
    one, other = random.sample(sorted(folder.iterdir()), 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def missing(folder: Path, random: Random) -> None:
    _some(folder, random).unlink()


# ---- JSON ----


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value, as its container and key; a former damage may have made it deep."""
    found, nests = [], [value]
    while nests:
        nest = nests.pop()
        keys = list(nest) if isinstance(nest, dict) else range(len(nest)) if isinstance(nest, list) else []
        found += [(nest, key) for key in keys]
        nests += [nest[key] for key in keys]
    return found


def _json(change: Callable[[Any, Any, Random], None]) -> Damage:
    """Changes one or some places of a JSON file."""

    def damage(folder: Path, random: Random) -> None:
        path = _some(folder, random, ".json")
        found = json.loads(path.read_text(encoding="utf-8"))
        for _ in range(random.choice((1, 1, 1, 3))):
            change(*random.choice(_places(found)), random)
        path.write_text(json.dumps(found))

    return damage


def _other_type(holder: Any, key: Any, random: Random) -> None:
    holder[key] = random.choice((None, True, -1, 3, 0.5, "x", [], {}, [[]], {"a": 1}, [1, "x", None], ["a"]))


def _number(holder: Any, key: Any, random: Random) -> None:
    numbers = [(h, k) for h, k in [(holder, key), *_places(holder)] if isinstance(h[k], (int, float))]
    at, name = random.choice(numbers or [(holder, key)])
    at[name] = random.choice(HUGE)


def _text(holder: Any, key: Any, random: Random) -> None:
    holder[key] = random.choice(HOSTILE_TEXTS)


def _key(holder: Any, key: Any, random: Random) -> None:
    if isinstance(holder, dict):
        holder[random.choice(HOSTILE_TEXTS)] = holder.pop(key) if random.random() < 0.5 else 1


def _gone(holder: Any, key: Any, random: Random) -> None:
    del holder[key]


def _deep(holder: Any, key: Any, random: Random) -> None:
    value: Any = 1
    for _ in range(random.choice((5, 39, 45, 200, 300))):
        value = [value] if random.random() < 0.5 else {"a": value}
    holder[key] = value


def deeper(folder: Path, random: Random) -> None:
    depth, mark = random.choice((900, 5_000, 1_000_000)), random.choice(("[", '{"a":'))
    path = _some(folder, random, ".json")
    path.write_text(path.read_text().replace("null", mark * depth, 1) if random.random() < 0.5 else mark * depth)


def duplicate_keys(folder: Path, random: Random) -> None:
    path = _some(folder, random, ".json")
    found = json.loads(path.read_text(encoding="utf-8"))
    key = random.choice(list(found))
    path.write_text(json.dumps(found)[:-1] + f", {json.dumps(key)}: {random.choice(('1', '[]', 'null', '{}'))}}}")


def large_json(folder: Path, random: Random) -> None:
    """Some hundred megabytes as objects, or more than any report's JSON has; holes on disk cost nothing."""
    path = _some(folder, random, ".json")
    if random.random() < 0.5:
        os.truncate(path, 2**36)
    else:
        found = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(found | {"a": [[]] * random.choice((10_000, 2_000_000))}))


def version(folder: Path, random: Random) -> None:
    path = _some(folder, random, ".json")
    found = json.loads(path.read_text(encoding="utf-8"))
    found[random.choice(("format", "format_version"))] = random.choice((*HUGE, None, "2", [1], {}, 1.0, True))
    path.write_text(json.dumps(found))


# ---- Parquet ----


def _parquet(change: Callable[[pa.Table, Random], pa.Table]) -> Damage:
    """Changes a table and writes it with options of other writers."""

    def damage(folder: Path, random: Random) -> None:
        path = _some(folder, random, ".parquet")
        table = change(pq.ParquetFile(path).read(), random)
        options: dict[str, Any] = {
            "compression": random.choice(("none", "snappy", "gzip", "zstd", "brotli", "lz4")),
            "use_dictionary": random.random() < 0.5,
            "row_group_size": random.choice((1, 7, 10**6)),
            "version": random.choice(("1.0", "2.4", "2.6")),
            "data_page_version": random.choice(("1.0", "2.0")),
            "store_schema": random.random() < 0.7,
        }
        pq.write_table(table, path, **options)

    return damage


def _column(table: pa.Table, random: Random) -> tuple[int, str]:
    at = random.randrange(table.num_columns)
    return at, table.column_names[at]


def _columns(table: pa.Table, random: Random) -> pa.Table:
    at, name = _column(table, random)
    kind = random.choice(("drop", "twice", "more", "rename", "order", "none"))
    if kind == "drop":
        return table.drop_columns([name])
    if kind == "twice":
        return table.append_column(name, table.column(at))
    if kind == "more":
        return table.append_column(random.choice(HOSTILE_TEXTS[1:4]), table.column(at))
    if kind == "rename":
        return table.rename_columns(
            [table.column_names[at - 1] if k == at else n for k, n in enumerate(table.column_names)]
        )
    return table.select(random.sample(table.column_names, table.num_columns)) if kind == "order" else table.select([])


def _dtype(table: pa.Table, random: Random) -> pa.Table:
    at, name = _column(table, random)
    n = table.num_rows
    other = random.choice(
        (
            pa.array([{"a": 1}] * n), pa.array([[1.0, 2.0]] * n), pa.array([[[]]] * n), pa.array([b"\xff"] * n),
            pa.array(["x"] * n), pa.array([True] * n), pa.nulls(n), pa.nulls(n, pa.float64()), pa.nulls(n, pa.string()),
            pa.array([1] * n, pa.int8()), pa.array([2**64 - 1] * n, pa.uint64()), pa.array([0] * n, pa.timestamp("ns")),
            pa.array([1] * n, pa.decimal128(38, 4)), pa.array([0.0] * n, pa.float32()),
            pa.array(["x"] * n, pa.large_string()),
            pa.array([(("a", 1),)] * n, pa.map_(pa.string(), pa.int64())), pa.array(["a"] * n).dictionary_encode(),
        )
    )  # fmt: skip
    return table.set_column(at, name, other)


def _lines(table: pa.Table, random: Random) -> pa.Table:
    kind = random.choice(("none", "fewer", "twice", "many", "order", "repeat"))
    if kind == "order":
        return table.take(random.sample(range(table.num_rows), table.num_rows))
    if kind == "repeat":
        return table.take([random.randrange(table.num_rows) for _ in range(table.num_rows)])
    return {"none": table.slice(0, 0), "fewer": table.slice(1), "twice": pa.concat_tables([table] * 2)}.get(
        kind, pa.concat_tables([table] * 300)
    )


def _values(table: pa.Table, random: Random) -> pa.Table:
    at, name = _column(table, random)
    values, kind = table.column(at).to_pylist(), table.schema.field(at).type
    if kind == pa.float64():
        pool: tuple[Any, ...] = (None, float("inf"), -float("inf"), 1e308, -1e308, 5e-324, -0.0, -1.0, 0.0, 7.0)
    elif kind == pa.int64():
        pool = (None, -1, 2**62, -(2**63), 2**63 - 1, 0, 3)
    else:
        pool = (None, *HOSTILE_TEXTS[:4], *HOSTILE_TEXTS[5:])
    some = random.choice((0.05, 0.5, 1.0))
    new = [random.choice(pool) if random.random() < some else value for value in values]
    return table.set_column(at, name, pa.array(new, pa.string() if pa.types.is_dictionary(kind) else kind))


def _metadata(table: pa.Table, random: Random) -> pa.Table:
    at, _ = _column(table, random)
    hidden = {
        "ARROW:extension:name": random.choice(("arrow.py_extension_type", "arrow.json", "arrow.uuid", "pandas")),
        "ARROW:extension:metadata": bomb_bytes(Path("nowhere")),
    }
    field = table.schema.field(at).with_metadata(hidden)
    schema = table.schema.set(at, field).with_metadata({"pandas": random.randbytes(9), "ARROW:schema": b"nonsense"})
    return pa.table(table.columns, schema=schema)


def bomb(folder: Path, random: Random) -> None:
    """A small file that unpacks to gigabytes: a constant column, one endless text, or honest rows without end."""
    path = _some(folder, random, ".parquet")
    table = pq.ParquetFile(path).read()
    kind = random.choice(("lines", "text", "ids"))
    n = 20_000_000
    if kind == "text":
        table = table[:16]  # a gigabyte
        at = max(0, table.schema.get_field_index("query"))
        text = pa.array(["x" * 2**26] * len(table), pa.large_string())
        table = table.set_column(at, table.column_names[at], text)
    else:
        ids = np.arange(n) if kind == "ids" else np.zeros(n, dtype=np.int64)
        zero = {pa.int64(): pa.array(np.zeros(n, np.int64)), pa.float64(): pa.array(np.zeros(n))}
        columns = {name: zero.get(column.type) for name, column in zip(table.column_names, table.columns, strict=True)}
        for name in [name for name, column in columns.items() if column is None]:
            text = table.column(name).cast(pa.string())[:1].combine_chunks()
            columns[name] = pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), text)
        table = pa.table(columns | ({"row": pa.array(ids)} if "row" in columns else {}))
    pq.write_table(table, path, compression="zstd", row_group_size=n)
    if random.random() < 0.5:
        _claim_rows(folder, n)


def _claim_rows(folder: Path, n: int) -> None:
    path = folder / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(meta | {"rows": n, "queries": meta["queries"][:1], "null_ks_p": [None]}))


# ---- files ----


def instead(folder: Path, random: Random) -> None:
    """A folder, a pipe, or a link that leads elsewhere, in place of a file."""
    path = _some(folder, random)
    outside = folder.parent / f"outside-{path.name}"
    shutil.copy(path, outside)
    path.unlink()
    kind = random.choice(("folder", "pipe", "outside", "zero", "loop", "nowhere"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"outside": outside, "zero": "/dev/zero", "loop": path, "nowhere": "nowhere"}[kind])


def bomb_bytes(sentinel: Path) -> bytes:
    """A pickle that makes a file where it is loaded."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(sentinel),)

    return pickle.dumps(Bomb())


def pickled(folder: Path, random: Random) -> None:
    _some(folder, random).write_bytes(bomb_bytes(folder.parent / SENTINEL))


def pending(folder: Path, random: Random) -> None:
    """What an interrupted save left: a part of the files waits, or is to go; or a link that pretends so."""
    aside = folder / ".report-new"
    if random.random() < 0.2:
        outside = folder.parent / "outside"
        shutil.copytree(folder, outside)
        aside.symlink_to(random.choice((str(outside), "/dev", ".report-new", ".")))
        return
    aside.mkdir()
    for path in sorted(folder.glob("*.*")):
        if path.is_file() and random.random() < 0.5:
            shutil.copy(path, aside)
    if any(aside.iterdir()):
        random.choice((truncate, flip, pickled, instead, blank))(aside, random)


DAMAGE: dict[str, Damage] = {
    "flip": flip,
    "flip footer": flip_footer,
    "truncate": truncate,
    "extend": extend,
    "blank": blank,
    "swap": swap,
    "missing": missing,
    "JSON type": _json(_other_type),
    "JSON number": _json(_number),
    "JSON text": _json(_text),
    "JSON key": _json(_key),
    "JSON gone": _json(_gone),
    "JSON deep": _json(_deep),
    "JSON deeper": deeper,
    "JSON keys twice": duplicate_keys,
    "JSON large": large_json,
    "version": version,
    "columns": _parquet(_columns),
    "dtype": _parquet(_dtype),
    "lines": _parquet(_lines),
    "values": _parquet(_values),
    "metadata": _parquet(_metadata),
    "bomb": bomb,
    "instead": instead,
    "pickle": pickled,
    "pending": pending,
}
RARE = {"bomb": 20, "JSON large": 20, "JSON deeper": 5}  # so many times rarer: they take seconds to make

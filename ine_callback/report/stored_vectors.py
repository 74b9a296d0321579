"""The gradient store beside a report: few numbers of each row, which a query's own numbers make scores of.

store.npy            the rows' numbers [N, k], int8 or floats, or bands of few bits [N, bytes] (:mod:`.bands`); read
                     from disk where they are needed
store-components.npy what makes a query's numbers of its entries [W, k], read like the rows
store-arrays.npz     the rows' scales [N], of each band [N, bands], and which entries of gradients are taken
store-weights.npz    weights along the run at which queries are evaluated beside the final ones; not always there
store.json           format, names of parameters, the bands, what the run's own queries told of the accuracy

Data only: NumPy reads them without pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.bands import Band, long, short, turned, unpacked
from ine_callback.report.files import find
from ine_callback.report.reading import ReportError, open_plain, read_format
from ine_callback.scores import Floats

FORMAT, VERSION, FORMER = "ine_callback.store", 2, 1  # the former has no bands, and its components in ARRAYS
ROWS, COMPONENTS, ARRAYS = "store.npy", "store-components.npy", "store-arrays.npz"
WEIGHTS, META = "store-weights.npz", "store.json"
FILES = ROWS, COMPONENTS, ARRAYS, WEIGHTS, META
LEVELS = 127  # of int8, to each side
CHUNK_BYTES = 2**22  # of rows that are read and widened at once: they fit into a processor's cache
CHUNK_ENTRIES = 2**12  # of components that are
TYPES = ("int8", "float16", "float32")
Arrays = Mapping[str, NDArray[Any]]
Which = Sequence[int] | NDArray[np.int64] | slice


@dataclass(frozen=True)
class StoredBlock:
    """The entries that are taken of one layer's gradients.

    Attributes:
        parameters: Names: a parameter, or a weight and its bias, which is the last column.
        layout: Of the gradient: [G, O, I] or [D].
        index: Places of the entries, in the flattened rectangle [G, k, l]; of a vector in itself.
        left: Columns [G, O, k]; None for a vector.
        right: Columns [G, I, l]; None for a vector.
    """

    parameters: tuple[str, ...]
    layout: tuple[int, ...]
    index: NDArray[np.int64]
    left: NDArray[np.float32] | None = None
    right: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Calibration:
    """What the run's own queries, asked again of the store, tell of it; NaN where the run had none on data.

    Attributes:
        agreement: Median Spearman correlation of the store's scores with the run's.
        size: Median size (root mean square over rows) of the run's mu.
        missing: Median share of the variance of mu that the store's scores do not tell.
        se: Median size of the run's standard errors.
        queries: How many there were.
    """

    agreement: float = float("nan")
    size: float = float("nan")
    missing: float = float("nan")
    se: float = float("nan")
    queries: int = 0


@dataclass(frozen=True)
class StoredVectors:
    """The store of one run.

    Attributes:
        rows: Numbers of the rows [N, k], or the bytes of their bands [N, bytes], maybe on disk.
        scale: What they are multiplied with [N], those of each band [N, bands].
        blocks: The entries of the layers' gradients, W together.
        components: What makes a row's numbers of its entries [W, k], or of two parts' [2 W, k], the run's and the
            closing pass's; in units of ``unit``, maybe on disk.
        variances: The queries' variance in each entry [W].
        seen: Which rows have a score [N].
        calibration: How accurate it is.
        weights: Weights along the run, one mapping each; the final ones are the module's.
        settings: Of the store, and facts of the run.
        moments: Means of the rows' numbers and of their squares [2, k], by which parts are weighed; None: alike.
        bands: How the numbers are packed; empty: they are not.
        unit: What the components are multiplied with.
    """

    rows: NDArray[Any]
    scale: NDArray[np.float32]
    blocks: tuple[StoredBlock, ...]
    components: NDArray[np.float16] | NDArray[np.float32]
    variances: NDArray[np.float32]
    seen: NDArray[np.bool_]
    calibration: Calibration = Calibration()
    weights: tuple[Arrays, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    moments: NDArray[np.float64] | None = None
    bands: tuple[Band, ...] = ()
    unit: float = 1.0

    @property
    def dimensions(self) -> int:
        """Numbers k of a row."""
        return int(self.components.shape[1])

    @property
    def size(self) -> NDArray[np.float32]:
        """What :meth:`numbers` are multiplied with [N]."""
        found: NDArray[np.float32] = self.scales.max(1)
        return found

    @property
    def scales(self) -> NDArray[np.float32]:
        """Of each row and band [N, bands]; numbers that are not packed are one."""
        return self.scale if self.scale.ndim == 2 else self.scale[:, None]

    def of_query(self, entries: Floats) -> Floats:
        """Numbers [Q, k] of queries, from the entries [Q, W] of their gradients."""
        found = self._parts(entries / self.variances, self._each)
        return self._together(found, found)

    def of_query_by_layer(self, entries: Floats) -> Floats:
        """Parts of queries' numbers [Q, B, k], one for each of the B blocks, which add up to :meth:`of_query`."""
        weighted, ends = entries / self.variances, np.cumsum([len(block.index) for block in self.blocks])[:-1]
        split = zip(np.split(weighted, ends, 1), np.split(self._each, ends, 1), strict=True)
        whole = self._parts(weighted, self._each)
        return np.stack([self._together(self._parts(x, v), whole) for x, v in split], 1)

    @property
    def _each(self) -> NDArray[Any]:
        """The parts' components [P, W, k] in units of ``unit``."""
        return self.components.reshape(-1, len(self.variances), self.dimensions)

    def _parts(self, weighted: Floats, each: NDArray[Any]) -> Floats:
        """Numbers [P, Q, k] of queries in each part."""
        found: Floats = np.zeros((len(each), len(weighted), self.dimensions))
        for start in range(0, each.shape[1], CHUNK_ENTRIES):
            some = slice(start, start + CHUNK_ENTRIES)
            for part, one in zip(found, each[:, some], strict=True):
                part += weighted[:, some] @ one.astype(np.float64)
        return found * self.unit

    def _together(self, parts: Floats, whole: Floats) -> Floats:
        """Sum [Q, k] of parts [P, Q, k], each divided by the standard deviation over the rows that its whole has."""
        if self.moments is None:
            summed: Floats = parts.sum(0)
            return summed
        mean, square = self.moments
        spread = np.sqrt(np.maximum(whole**2 @ square - (whole @ mean) ** 2, 0))
        found: Floats = (parts / np.where(spread > 0, spread, 1)[..., None]).sum(0)
        return found

    def products(self, queries: Floats) -> Floats:
        """Scores [N, Q] without a unit, of queries' numbers [Q, k]: in chunks of rows, so that all fit into memory."""
        factors, size = self.factors(queries), self.size
        out: Floats = np.empty((len(self.rows), len(queries)))
        for start, part in self.chunks():
            rows = slice(start, start + len(part))
            out[rows] = (part @ factors) * size[rows, None]
        return out

    def factors(self, queries: Floats) -> NDArray[np.float32]:
        """Queries' numbers [k, Q], as rows have theirs."""
        return np.ascontiguousarray(turned(queries, self.bands).T, dtype=np.float32)

    def chunks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The first row's place and :meth:`numbers` [n, k] of some rows after the other; the next replace them."""
        step = max(1, CHUNK_BYTES // (4 * max(1, self.dimensions)))
        # new memory for each chunk would cost more than to fill it
        memory = np.empty((min(step, len(self.rows)), self.dimensions), np.float32)
        for start in range(0, len(self.rows), step):
            rows = slice(start, min(start + step, len(self.rows)))
            yield start, self.numbers(rows, memory[: rows.stop - start])

    def numbers(self, which: Which = slice(None), out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Rows' numbers by their :attr:`size`, in float32 [n, k]; 0 for rows that were never observed."""
        rows = np.asarray(self.rows[which])
        if out is None:
            out = np.empty((len(rows), self.dimensions), np.float32)
        if not self.bands:
            out[:] = rows
            return out
        scales = self.scales[which]
        size = scales.max(1, keepdims=True)
        return unpacked(rows, scales / np.where(size > 0, size, 1), self.bands, out)

    def unit_rows(self, which: Which = slice(None)) -> NDArray[np.float32]:
        """Rows' numbers, of length 1 (0 where there are none) [n, k]."""
        found = self.numbers(which)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        return np.asarray(found / np.where(norms > 0, norms, 1), dtype=np.float32)

    def unit_components(self, which: Which = slice(None)) -> NDArray[np.float32]:
        """:meth:`unit_rows` with the leading component first [n, k]: numbers in bands are mixtures of components."""
        return turned(self.unit_rows(which), self.bands, back=True)


def moments(store: StoredVectors) -> NDArray[np.float64]:
    """Means of the components' numbers, and of their squares, of the rows that were seen [2, k]."""
    found = np.zeros((2, store.dimensions))
    for start, part in store.chunks():
        numbers = turned(part, store.bands, back=True) * store.size[start : start + len(part), None].astype(np.float64)
        found += numbers.sum(0), np.square(numbers).sum(0)
    return found / max(1, int(store.seen.sum()))


def halves(components: NDArray[np.float32]) -> tuple[NDArray[np.float16], np.float32]:
    """Components as they are on disk, and their unit; the rows' own numbers are rounded far more."""
    unit = np.float32(max(float(np.abs(components).max(initial=0)), float(np.finfo(np.float32).tiny)))
    return (components / unit).astype(np.float16), unit


def write(store: StoredVectors, folder: Path) -> None:
    """Writes the files into an existing folder."""
    np.save(folder / ROWS, store.rows, allow_pickle=False)
    components, unit = store.components, np.float32(store.unit)
    if components.dtype != np.float16:
        components, unit = halves(components * unit)
    np.save(folder / COMPONENTS, components, allow_pickle=False)
    arrays: dict[str, NDArray[Any]] = {
        "scale": short(store.scale) if store.bands else store.scale,
        "unit": np.asarray(unit),
        "variances": store.variances,
        "seen": store.seen,
    }
    if store.moments is not None:
        arrays["moments"] = store.moments
    for k, block in enumerate(store.blocks):
        parts = {"index": block.index, "left": block.left, "right": block.right}
        arrays |= {f"{k}.{name}": part for name, part in parts.items() if part is not None}
    np.savez(folder / ARRAYS, **arrays)  # type: ignore[arg-type]  # allow_pickle has a default
    if store.weights:
        named = {f"{k}/{name}": value for k, each in enumerate(store.weights) for name, value in each.items()}
        np.savez(folder / WEIGHTS, **named)  # type: ignore[arg-type]
    calibration = {name: _or_null(value) for name, value in vars(store.calibration).items()}
    blocks = [{"parameters": list(block.parameters), "layout": list(block.layout)} for block in store.blocks]
    meta = {
        "format": FORMAT,
        "format_version": VERSION,
        "shape": list(store.rows.shape),
        "dtype": str(store.rows.dtype),
        "bands": [vars(band) for band in store.bands],
        "blocks": blocks,
        "calibration": calibration,
        "weights": len(store.weights),
        "settings": dict(store.settings),
    }
    (folder / META).write_text(json.dumps(meta, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(folder: Path) -> StoredVectors | None:
    """Reads and checks the files; None where there is no store. The rows' numbers and the components stay on disk.

    Raises:
        ReportError: When something is missing, foreign, damaged or inconsistent.
    """
    if find(folder, META) is None:
        return None
    meta = read_format(folder, META, FORMAT, FORMER, VERSION)
    try:
        shape, dtype, blocks = tuple(meta["shape"]), meta["dtype"], meta["blocks"]
        known: dict[str, Any] = {
            name: float("nan") if value is None else value for name, value in meta["calibration"].items()
        }
        calibration, count = Calibration(**known), int(meta["weights"])
        bands = tuple(Band(int(b["width"]), int(b["count"])) for b in meta.get("bands", ()))
        named = [(tuple(map(str, b["parameters"])), tuple(map(int, b["layout"]))) for b in blocks]
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(folder, f"{META} is not that of a store ({error})") from error
    rows = _on_disk(folder, ROWS)
    if rows.shape != shape or str(rows.dtype) != dtype or dtype not in TYPES or len(shape) != 2:
        raise ReportError(folder, f"{ROWS} is {rows.dtype} {rows.shape}, {META} says {dtype} {shape}")
    arrays = _arrays(folder, ARRAYS)
    if meta["format_version"] != FORMER:
        arrays["components"] = _on_disk(folder, COMPONENTS)
    stored = [_block(folder, arrays, k, *each) for k, each in enumerate(named)]
    entries = sum(len(block.index) for block in stored)
    numbers = sum(band.count for band in bands) or shape[1]
    if bands and (dtype != "int8" or sum(band.size for band in bands) != shape[1]):
        raise ReportError(folder, f"{ROWS} is {dtype} {shape}, {META} has bands of {sum(b.size for b in bands)} bytes")
    expected: dict[str, list[tuple[int, ...]]] = {
        "scale": [(shape[0], len(bands)) if bands else (shape[0],)],
        "components": [(parts * entries, numbers) for parts in (1, 2)],
        "unit": [()],
        "variances": [(entries,)],
        "seen": [(shape[0],)],
        "moments": [(2, numbers)],
    }
    for name, forms in expected.items():
        if (name in arrays or name != "moments") and (name not in arrays or arrays[name].shape not in forms):
            raise ReportError(folder, f"{ARRAYS}: {name} is not there with shape {forms[0]}")
    if arrays["components"].dtype != np.float16:
        raise ReportError(folder, f"{COMPONENTS} is {arrays['components'].dtype}, not float16")
    if bands and arrays["scale"].dtype != np.uint16:
        raise ReportError(folder, f"{ARRAYS}: scale is {arrays['scale'].dtype}, of bands it is uint16")
    weights = _arrays(folder, WEIGHTS) if count else {}
    each = tuple(
        {name.partition("/")[2]: value for name, value in weights.items() if name.partition("/")[0] == str(k)}
        for k in range(count)
    )
    return StoredVectors(
        rows,
        long(arrays["scale"]) if bands else arrays["scale"].astype(np.float32),
        tuple(stored),
        arrays["components"],
        arrays["variances"].astype(np.float32),
        arrays["seen"].astype(np.bool_),
        calibration,
        each,
        meta["settings"],
        arrays["moments"].astype(np.float64) if "moments" in arrays else None,
        bands,
        float(arrays["unit"]),
    )


def _or_null(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _on_disk(folder: Path, name: str) -> NDArray[Any]:
    open_plain(folder, name).close()  # refuses links and pipes
    path = find(folder, name)
    assert path is not None
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ReportError(folder, f"{name} is damaged ({error})") from error
    return found


def _arrays(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    with open_plain(folder, name) as file:
        try:
            with np.load(file, allow_pickle=False) as found:
                return {key: found[key] for key in found.files}
        except Exception as error:  # zipfile has errors of its own
            raise ReportError(folder, f"{name} is damaged ({error})") from error


def _block(folder: Path, arrays: Arrays, k: int, parameters: tuple[str, ...], layout: tuple[int, ...]) -> StoredBlock:
    index, left, right = (arrays.get(f"{k}.{name}") for name in ("index", "left", "right"))
    fits = index is not None and index.ndim == 1 and index.dtype.kind == "i"
    if fits and len(layout) == 3:
        sides = left is not None and right is not None and left.ndim == right.ndim == 3
        fits = sides and (left.shape[:2], right.shape[:2]) == (layout[:2], (layout[0], layout[2]))  # type: ignore[union-attr]
        size = left.shape[0] * left.shape[2] * right.shape[2] if fits else 0  # type: ignore[union-attr]
    else:
        size = layout[0] if len(layout) == 1 else 0
    if not fits or not len(index) or index.min() < 0 or index.max() >= size:  # type: ignore[arg-type, union-attr]
        raise ReportError(folder, f"{ARRAYS}: the entries of {', '.join(parameters)} do not fit together")
    return StoredBlock(parameters, layout, index, left, right)  # type: ignore[arg-type]

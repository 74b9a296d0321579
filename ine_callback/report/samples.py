"""The rows themselves, for the report's page: read from the training set, shown by their type."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ine_callback.report.shown import Image, Shown, Text, Values, array_of, size_of
from ine_callback.utilities.words import plain

MAX_SECONDS = 20.0  # for all rows together
REFERENCE_ROWS = 200  # from which the z-scores of a table row are computed
MAX_CLASSES = 1_000  # a column with more distinct integers holds no classes

Render: TypeAlias = Callable[[Any], Shown]


class Samples:
    """Reads rows of a data set for the page, and never raises: an error is shown in place of the row.

    Args:
        dataset: Anything whose ``dataset[row]`` is a sample.
        render: Makes a sample an :class:`Image`, a :class:`Text` or :class:`Values`; by default :func:`rendered`.

    Example:
        >>> shown, faults = Samples(["to be", "or not"]).read([1])
        >>> shown[1].pieces, faults
        ([('or not', 0.0)], {})
    """

    def __init__(self, dataset: Any, render: Render | None = None) -> None:
        self._dataset, self._render = dataset, render
        self._columns: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def read(self, rows: Iterable[int]) -> tuple[dict[int, Shown], dict[int, str]]:
        """The rows that can be shown, and for the others why they cannot."""
        shown: dict[int, Shown] = {}
        faults: dict[int, str] = {}
        until = time.monotonic() + MAX_SECONDS
        for row in rows:
            if time.monotonic() > until:
                faults[row] = f"not read: the rows before took {MAX_SECONDS:g} s"
                continue
            try:
                shown[row] = self._one(self._dataset[row])
            except Exception as error:  # a stranger's code: nothing of it may end a report, or a fit
                faults[row] = f"{type(error).__name__}: {error}"[:300]
        return shown, faults

    def _one(self, sample: Any) -> Shown:
        if self._render is None:
            found = rendered(sample)
            return self._with_z(found) if isinstance(found, Values) and found.z is None else found
        found = self._render(sample)
        if not isinstance(found, Image | Text | Values):
            raise TypeError(f"render returned {type(found).__name__}; return an Image, a Text or Values")
        return found

    def _with_z(self, found: Values) -> Values:
        mean, sd = self._columns = self._columns or self._reference()
        numbers = _numbers(found)
        with np.errstate(all="ignore"):
            z = (numbers - mean) / sd if mean.shape == numbers.shape else np.full(numbers.shape, np.nan)
        scores = {name: round(float(one), 2) for name, one in zip(found.values, z, strict=True) if np.isfinite(one)}
        return Values(found.values, scores)

    def _reference(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Means and standard deviations of the columns over rows spread over the data set; empty where it has none."""
        try:
            at = np.unique(np.linspace(0, len(self._dataset) - 1, REFERENCE_ROWS).astype(int)).tolist()
            with np.errstate(all="ignore"):
                table = np.array([_numbers(rendered(self._dataset[row])) for row in at])
                return table.mean(0), table.std(0)
        except Exception:  # rows that differ or cannot be read: values without z-scores
            return np.empty(0), np.empty(0)


def rendered(sample: Any) -> Shown:
    """A sample by its type: text, a picture, or values.

    Of a pair (input, label) the input is shown. A string, or the entry ``"text"`` of a mapping, is a text; a PIL image,
    and an array or tensor [H, W], [C, H, W] or [H, W, C], a picture; flat numbers and other mappings are values, flat
    whole numbers are taken for tokens.

    Raises:
        TypeError: For anything else; write a ``render`` for it.

    Example:
        >>> rendered((np.zeros((3, 16, 16)), 4)).width, rendered({"age": 3}).lines
        (16, [('age', '3', None)])
    """
    if isinstance(sample, tuple | list):
        first = next(iter(sample), 0)
        sample = sample if isinstance(first, int | float) else first
    if isinstance(sample, str):
        return Text(sample)
    if isinstance(sample, Mapping):
        text = next((sample[key] for key in ("text", "sentence") if isinstance(sample.get(key), str)), None)
        image = next((sample[key] for key in ("image", "img", "pixel_values") if key in sample), None)
        return Text(text) if text is not None else Values(sample) if image is None else Image.of(image)
    if hasattr(sample, "getbands"):  # a PIL image
        return Image.of(sample)
    array = array_of(sample)
    if array.ndim == 1 and array.dtype.kind in "iu":  # tokens, which only their tokenizer can spell
        return Text(" ".join(map(str, array.tolist())))
    if array.ndim <= 1 and array.dtype.kind in "biuf":
        return Values({f"x{k}": value for k, value in enumerate(np.atleast_1d(array).tolist())})
    if array.ndim in (2, 3) and min(size_of(array)) > 1 and array.dtype.kind in "biuf":
        return Image.of(array)
    raise TypeError(f"nothing shows a {type(sample).__name__} of shape {array.shape}; pass render=")


def classes_of(dataset: Any, rows: int) -> tuple[list[str], NDArray[np.int64]] | None:
    """Names of a data set's classes and each row's class [N], where the data set has them without reading a row.

    It does as ``dataset.targets`` (torchvision) or as the second of ``dataset.tensors`` (``TensorDataset``); a
    ``Subset`` as the data set behind it.
    """
    try:
        if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
            found = classes_of(dataset.dataset, len(dataset.dataset))
            return None if found is None or len(dataset) != rows else (found[0], found[1][array_of(dataset.indices)])
        tensors: tuple[Any, ...] = getattr(dataset, "tensors", ())
        for labels in (getattr(dataset, "targets", None), tensors[1] if len(tensors) > 1 else None):
            array = np.empty(0) if labels is None else array_of(labels)
            if array.shape == (rows,) and array.dtype.kind in "biu" and len(np.unique(array)) <= MAX_CLASSES:
                return classes(array, getattr(dataset, "classes", None))
    except Exception:  # a stranger's code, and the page does without classes
        return None
    return None


def classes(labels: Any, names: Sequence[Any] | None = None) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes and each row's index among them [N].

    Raises:
        ValueError: On more than 1,000 classes.

    Example:
        >>> classes(["cat", "dog", "cat"])
        (['cat', 'dog'], array([0, 1, 0]))
    """
    values, which = np.unique(array_of(labels), return_inverse=True)
    if len(values) > MAX_CLASSES:
        raise ValueError(
            f"InfluenceReport.write_html: {len(values):,} different labels; give at most {MAX_CLASSES:,} classes"
        )
    keys = [values.item(k) for k in range(len(values))]
    if names is not None and all(isinstance(key, int) and 0 <= key < len(names) for key in keys):
        return [plain(f"{key} {names[key]}")[:60] for key in keys], which.astype(np.int64)
    return [plain(key)[:60] for key in keys], which.astype(np.int64)


def _numbers(shown: Shown) -> NDArray[np.float64]:
    values = shown.values.values() if isinstance(shown, Values) else ()
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64)

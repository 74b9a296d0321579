"""What a row looks like on the report's page: an image, a text or values, never markup."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ine_callback.utilities.optional import need
from ine_callback.utilities.words import plain

MAX_CHARACTERS = 2_000  # of a text
MAX_VALUES = 48  # of a row
MAX_PIXELS = 160  # longer side of a thumbnail
MAX_BYTES = 100_000  # of one image
FORMATS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


@dataclass(frozen=True)
class Image:
    """A picture.

    Args:
        data: A PNG, JPEG or GIF file's bytes, at most 100 kB; :meth:`of` makes them of pixels.

    Raises:
        ValueError: For other bytes.

    Example:
        >>> Image.of(np.zeros((1, 8, 8))).width
        8
    """

    kind: ClassVar[str] = "image"
    data: bytes
    width: int = 0

    def __post_init__(self) -> None:
        if not any(self.data.startswith(magic) for magic in FORMATS):
            raise ValueError(f"Image: no PNG, JPEG or GIF file, but {self.data[:8]!r}…; use Image.of(pixels)")
        if len(self.data) > MAX_BYTES:
            raise ValueError(f"Image: {len(self.data):,} bytes; give a thumbnail of at most {MAX_BYTES:,}")

    @classmethod
    def of(cls, pixels: Any) -> Image:
        """A thumbnail of a PIL image, or of pixels [H, W], [C, H, W] or [H, W, C] with 1, 3 or 4 channels.

        Bytes are taken as they are; other numbers within [0, 1] are scaled by 255, all others to their range.
        """
        module = need("PIL.Image", "Image.of")
        picture = pixels if isinstance(pixels, module.Image) else module.fromarray(_bytes(array_of(pixels)))
        if picture.mode not in ("L", "RGB", "RGBA"):
            picture = picture.convert("RGB")
        if max(picture.size) > MAX_PIXELS:  # thumbnail() would change the user's image
            picture = picture.copy()
            picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
        file = BytesIO()
        # metadata may hold anything: only pixels are written
        module.frombytes(picture.mode, picture.size, picture.tobytes()).save(file, "PNG", optimize=True)
        return cls(file.getvalue(), picture.width)

    @property
    def uri(self) -> str:
        """The picture as a ``data:`` address."""
        kind = next(name for magic, name in FORMATS.items() if self.data.startswith(magic))
        return f"data:image/{kind};base64,{b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True)
class Text:
    """A text, or its tokens; shown as text whatever it holds.

    Args:
        tokens: The whole text, or pieces that are shown one after the other.
        weights: A score of each token, coloured like scores (above 0: helpful). Left out, the page takes the scores of
            the row's terms (from a method that scores tokens) where there are as many.

    Raises:
        ValueError: If there is not one weight for each token.

    Example:
        >>> Text(["to ", "be"], [0.5, -1.0]).pieces
        [('to ', 0.5), ('be', -1.0)]
    """

    kind: ClassVar[str] = "text"
    tokens: str | Sequence[str]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self._list):
            raise ValueError(f"Text: {len(self.weights)} weights for {len(self._list)} tokens; give one each")

    @property
    def _list(self) -> list[str]:
        return [self.tokens] if isinstance(self.tokens, str) else list(self.tokens)

    @property
    def pieces(self) -> list[tuple[str, float]]:
        """Tokens that fit on the page, with weights scaled to [-1, 1]."""
        tokens, weights = (
            self._list,
            np.nan_to_num(self.weights if self.weights is not None else [0.0] * len(self._list)),
        )
        scale = float(np.abs(weights).max(initial=0.0)) or 1.0
        pieces, left = [], MAX_CHARACTERS
        for token, weight in zip(tokens, weights, strict=True):
            if left <= 0:
                pieces.append(("…", 0.0))
                break
            pieces.append((_lines(token[:left]), round(float(weight) / scale, 3)))
            left -= len(token)
        return pieces


@dataclass(frozen=True)
class Values:
    """Named values, such as a line of a table.

    Args:
        values: Numbers or texts by name.
        z: How many standard deviations a number is from the mean of its column.

    Example:
        >>> Values({"age": 51, "name": "Ada"}, {"age": 2.5}).lines
        [('age', '51', 2.5), ('name', 'Ada', None)]
    """

    kind: ClassVar[str] = "values"
    values: Mapping[str, Any]
    z: Mapping[str, float] | None = None

    @property
    def lines(self) -> list[tuple[str, str, float | None]]:
        """Name, value and z-score of each; the farthest from the mean first where there are more than fit."""
        z = dict(self.z or {})
        names = list(self.values)
        if len(names) > MAX_VALUES:
            names = sorted(names, key=lambda name: -abs(z.get(name, 0.0)))[:MAX_VALUES]
        return [(plain(name), _value(self.values[name]), z.get(name)) for name in names]


Shown: TypeAlias = Image | Text | Values


def array_of(values: Any) -> NDArray[Any]:
    """Numbers as an array, those of a tensor too, without knowing torch."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def size_of(array: NDArray[Any]) -> tuple[int, ...]:
    """Height and width of pixels, 0 of what is none."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return array.shape[1:]
    return array.shape[:2] if array.ndim == 2 or array.shape[2] in (1, 3, 4) else (0, 0)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels [H, W] or [H, W, 3 or 4] as bytes."""
    if min(size_of(array), default=0) < 1:
        raise ValueError(f"Image: shape {array.shape}; give [H, W], [C, H, W] or [H, W, C] with 1, 3 or 4 channels")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    pixels = np.nan_to_num(array.astype(np.float64))
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0.0 or high > 1.0:
        pixels = (pixels - low) / ((high - low) or 1.0)
    return np.ascontiguousarray((pixels * 255.0).round().astype(np.uint8))


def _value(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    return plain(value)[:200]


def _lines(text: str) -> str:
    """Line breaks stay, other control characters do not."""
    return "\n".join(plain(line) for line in text.split("\n"))

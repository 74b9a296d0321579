"""Settings of the gradient store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ine_callback.errors import InfluenceError

StoredType = Literal["mixed", "int8", "float16", "float32"]
BYTES: dict[str, int] = {"mixed": 1, "int8": 1, "float16": 2, "float32": 4}  # mixed: at most
SCALE = 4  # bytes of each row's scale; bands have one each
LEAST_MIXED = 16  # bytes of a row
PER_BYTE = 4  # numbers of mixed width, at most
MOST_MIXED = 4_096  # numbers of mixed width, where a row has no more bytes: asking takes as much longer
MOST = 4_096  # numbers of a row during the run, where nobody asks for more: each step takes as much longer


@dataclass(frozen=True)
class GradientStore:
    """Keeps of every row what the run did with it, so that queries can come after the run.

    During the run each row has a vector of ``working`` numbers (float32), in the device's memory where all of them take
    at most ``device_bytes``, else in the host's. At the end they become ``bytes_per_row`` bytes a row, on disk beside
    the report. docs/methods/store.md has the measured accuracy.

    By default ``working`` is as many numbers as ``device_bytes`` hold of all rows (on a processor, too), from twice as
    many as are on disk, were they of 8 bits, up to 4,096: of 100,000 rows 2,684. So the rows' vectors take up to 1 GB,
    and at the end, when there are three such sets of vectors, 3 GB. Where they take no more than half of that, each row
    has a second sum: of its steps since the last refresh of the directions, which have one discount, so that it is
    applied to all at once.

    Of an unknown number of rows ``working`` is the least. From fixed initial weights the closing pass alone makes the
    store: during the run a row has no more than the least, in the pass as many as ``device_bytes`` hold, of 500 rows
    536,870.

    Args:
        bytes_per_row: Bytes of each row on disk: scales, and as many numbers as fit in the others.
        dtype: Their type. ``mixed`` has leading numbers in 8 bits, others in 4 and 2, whichever take most off the
            error of scores, so up to four times as many numbers as ``int8``, which has four times as many as
            ``float32``: they are worth more than precision.
        working: Numbers of each row during the run, at most those of the model's parameters; None: see above.
        snapshots: Whether the weights of the closing pass, at .5, .7 and .9 of the run, are saved, too (each as large
            as the model). Queries are then evaluated at all of them, which brings scores nearer to those in the run.
        device_bytes: Most bytes of the rows' vectors in the device's memory; by default they have no more anywhere.

    Raises:
        InfluenceError: For settings that cannot be right.

    Example:
        >>> GradientStore(bytes_per_row=512, dtype="float16").dimensions
        254
        >>> GradientStore(dtype="int4")
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: GradientStore: dtype='int4' is none of mixed, int8, float16, float32.
    """

    bytes_per_row: int = 1024
    dtype: StoredType = "mixed"
    working: int | None = None
    snapshots: bool = True
    device_bytes: int = 2**30

    def __post_init__(self) -> None:
        who = "GradientStore"
        if self.dtype not in get_args(StoredType):
            raise InfluenceError(f"{who}: dtype={self.dtype!r} is none of {', '.join(get_args(StoredType))}.")
        fewest = LEAST_MIXED if self.dtype == "mixed" else SCALE + BYTES[self.dtype]
        for name, least in (("bytes_per_row", fewest), ("working", 1), ("device_bytes", 0)):
            value: Any = getattr(self, name)
            if name == "working" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InfluenceError(f"{who}: {name}={value!r} must be an integer of at least {least}.")

    @property
    def dimensions(self) -> int:
        """Numbers of each row on disk; of mixed width, the most that there can be."""
        found = (self.bytes_per_row - SCALE) // BYTES[self.dtype]
        return max(found, min(PER_BYTE * found, MOST_MIXED)) if self.dtype == "mixed" else found

    @property
    def fewest_entries(self) -> int:
        """Numbers of each row in the run, however many rows there are: twice those on disk, were they of 8 bits."""
        return 2 * ((self.bytes_per_row - SCALE) // BYTES[self.dtype])

    def entries(self, rows: int | None, random: bool = True) -> int:
        """Numbers of each of so many rows.

        Args:
            rows: How many; None: nobody knows.
            random: Whether initial weights are random.

        Example:
            >>> [GradientStore().entries(rows) for rows in (500, 100_000, 10**6, None)]
            [4096, 2684, 2040, 2040]
        """
        least = self.fewest_entries
        if self.working is not None or not rows:
            return self.working or least
        room = self.device_bytes // (4 * rows)
        return max(least, min(MOST, room) if random else room)

"""Writing a file, or all files of a folder, whole or not at all.

A folder's new files are written aside, and one rename of that aside folder to :data:`PENDING` decides that they hold.
Then they move into place. Whoever dies on the way leaves what :func:`find` still finds: each file in ``PENDING`` if it
has not moved yet, else in its place. An empty file in ``PENDING`` says that the former report's file is to go.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PENDING = ".report-new"


def replace_file(path: Path, data: bytes) -> Path:
    """Writes ``data`` aside, then in place, so that an interrupted write leaves a former file whole.

    What is no plain file (a link, a pipe, ``/dev/stdout``) is written to, not replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return path
    handle, aside = tempfile.mkstemp(prefix=".report-", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(aside, 0o644)  # mkstemp's files are private, reports are for sharing
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)
    return path


@contextmanager
def replacing(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """An empty folder to write some of ``names`` into; afterwards ``folder`` has these and none of the others.

    Whatever else is in ``folder`` stays. On an error in the block nothing changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".report-", dir=folder))
    try:
        yield aside
        for name in names:
            with (aside / name).open("ab") as file:  # makes what was not written: empty, so it goes
                os.fsync(file.fileno())
        _settle(folder, names)  # a former save may have died on the way
        os.rename(aside, folder / PENDING)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _settle(folder, names)


def find(folder: Path, name: str) -> Path | None:
    """Where a file written by :func:`replacing` is, also after an interrupted save; None where there is none."""
    pending = folder / PENDING
    path = pending / name
    if pending.is_symlink() or not os.path.lexists(path):  # a link would lead out of the folder
        path = folder / name
    elif not path.lstat().st_size:
        return None
    return path if os.path.lexists(path) else None


def _settle(folder: Path, names: Sequence[str]) -> None:
    """Moves pending files into place."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    for name in names:
        new = pending / name
        if new.is_file() and new.stat().st_size:
            os.replace(new, folder / name)
        elif new.is_file():
            (folder / name).unlink(missing_ok=True)
            new.unlink()
    shutil.rmtree(pending)

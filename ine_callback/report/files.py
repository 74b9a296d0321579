"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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

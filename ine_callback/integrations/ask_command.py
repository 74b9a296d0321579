"""``ine-callback ask``: queries in a file, asked of a report's gradient store with a checkpoint's module."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule

from ine_callback.integrations.ask import ask
from ine_callback.report import InfluenceReport
from ine_callback.scores import Attribution
from ine_callback.utilities.words import plain

EXAMPLES = """\
FILE is a batch as NumPy saves it: np.savez(FILE, x, y) for batches (x, y), and for mappings
np.savez(FILE, input_ids=ids, labels=ids). Its query is the module's own loss of it. Several files are several queries.

example:
  ine-callback ask influence --module package.models:Net --checkpoint last.ckpt --query mine.npz --query other.npz"""


def main(argv: Sequence[str]) -> int:
    """Runs the part of the command line after ``ine-callback ask``; returns the exit status.

    Raises:
        ValueError: If a file or the module cannot be used.
        SystemExit: On wrong usage, and after ``--help``.
    """
    arguments = _parser().parse_args(argv)
    names = [path.stem for path in arguments.query]
    if len(set(names)) < len(names):
        raise ValueError(f"ask: two files of --query are called {names[0]!r}; a query has its file's name")
    report, module = InfluenceReport.load(arguments.path), _module(arguments.module, arguments.checkpoint)
    queries = {name: _batch(path) for name, path in zip(names, arguments.query, strict=True)}
    found = ask(report, queries, module)
    _say(found, arguments.top, arguments.json)
    if arguments.file is not None:
        np.savez(arguments.file, rows=found.rows, scores=found.scores, queries=np.array(names))
        print(plain(arguments.file), file=sys.stderr if arguments.json else sys.stdout)
    return 0


def _parser() -> argparse.ArgumentParser:
    style: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    about = "Which training rows help or harm a query that nobody knew of during the run."
    made = argparse.ArgumentParser("ine-callback ask", description=about, epilog=EXAMPLES, **style)
    made.add_argument("path", metavar="PATH", type=Path, help="the report's folder")
    made.add_argument("--module", required=True, metavar="PACKAGE:CLASS", help="the LightningModule's class")
    made.add_argument("--checkpoint", required=True, type=Path, metavar="CKPT", help="the trained module")
    made.add_argument("--query", required=True, action="append", type=Path, metavar="FILE", help="a batch, .npz")
    made.add_argument("--top", type=int, default=10, metavar="K", help="rows shown of each end; default 10")
    made.add_argument("--json", action="store_true", help="the same as JSON")
    made.add_argument("-o", dest="file", metavar="FILE", type=Path, help="all rows' scores go here, .npz")
    return made


def _module(name: str, checkpoint: Path) -> LightningModule:
    package, _, kind = name.partition(":")
    if not package or not kind:
        raise ValueError(f"ask: --module {name!r} is not PACKAGE:CLASS, such as package.models:Net")
    sys.path.insert(0, "")  # a module beside the user, as for python -m
    try:
        found = getattr(import_module(package), kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"ask: --module {name!r} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ValueError(f"ask: --module {name!r} is no LightningModule")
    if not checkpoint.is_file():
        raise ValueError(f"ask: --checkpoint {checkpoint} is no file")
    module: LightningModule = found.load_from_checkpoint(checkpoint, map_location="cpu")
    return module


def _batch(path: Path) -> Any:
    """A tuple of tensors, or a mapping where the file names them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # zipfile has errors of its own
        raise ValueError(f"ask: --query {path} is no .npz of arrays ({error})") from error
    if not arrays:
        raise ValueError(f"ask: --query {path} holds no array")
    if all(name == f"arr_{k}" for k, name in enumerate(arrays)):
        return tuple(arrays.values())
    return arrays


def _say(found: Attribution, top: int, as_json: bool) -> None:
    names = [query.name for query in found.queries]
    if as_json:
        lists = {n: {"top": found.top(top, n).tolist(), "bottom": found.bottom(top, n).tolist()} for n in names}
        print(json.dumps({"queries": lists, "reasons": found.reasons, "notes": list(found.notes)}, indent=1))
        return
    for column, name in enumerate(names):
        error = "unknown" if found.se is None else f"{np.nanmedian(found.se[:, column]):.3g}"
        print(f"{plain(name)} (standard error {error})")
        for title, rows in (("most helpful", found.top(top, name)), ("most harmful", found.bottom(top, name))):
            print(f"  {title}: " + ", ".join(f"{row} ({found.scores[row, column]:+.3g})" for row in rows))
    for line in (*found.reasons, *found.notes):
        print(f"Note: {plain(line)}")

"""``ine-callback effects``: effects of a table in a file, and valid adjustment sets of a graph."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ine_callback.effects.adjustment import names
from ine_callback.effects.data import EffectData
from ine_callback.effects.effect import Effect, render
from ine_callback.effects.estimands import ATE, NDE, NIE, WCDE, Estimand
from ine_callback.effects.estimation import estimate
from ine_callback.effects.files import check_output, load, read_columns, save
from ine_callback.effects.graph import CausalGraph, causal_graph
from ine_callback.effects.reported import Effects
from ine_callback.utilities.terminal import as_text
from ine_callback.utilities.words import plain

ESTIMANDS: dict[str, type[Any]] = {"ate": ATE, "wcde": WCDE, "nde": NDE, "nie": NIE}
LISTED = 20

EXAMPLES = """\
GRAPH is text, or a file that holds it: "C -> A; A -> M -> Y". The treatment is 0 or 1.

examples:
  ine-callback effects fit table.csv --graph graph.txt --treatment A --outcome Y
  ine-callback effects fit table.parquet --graph "C -> A -> Y; C -> Y" --treatment A --outcome Y \\
      --estimand ate --adjust C -o effects.parquet
  ine-callback effects show effects.parquet
  ine-callback effects show run/influence
  ine-callback effects adjust graph.txt --treatment A --outcome Y --estimand wcde"""


def main(argv: Sequence[str], of_report: Callable[[Path], Effects]) -> int:
    """Runs the part of the command line after ``ine-callback effects``; returns the exit status.

    Args:
        argv: Its words.
        of_report: Reads the effects in the folder of a report.

    Raises:
        ValueError: If a file, the graph or a setting cannot be used.
        SystemExit: On wrong usage, and after ``--help``.
    """
    arguments = _parser().parse_args(argv)
    arguments.of_report = of_report
    status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    style: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    about = "Effects of a treatment on an outcome by a causal graph, with each row's influence."
    root = argparse.ArgumentParser("ine-callback effects", description=about, epilog=EXAMPLES, **style)
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)

    fit = commands.add_parser("fit", help="estimate effects of a table", allow_abbrev=False)
    fit.add_argument("table", type=Path, help=".csv or .parquet")
    fit.add_argument("--graph", required=True, help="text, or a file with it")
    _roles(fit)
    fit.add_argument("--adjust", metavar="NAMES", help="parted by commas; by default the set of lowest variance")
    fit.add_argument("--nuisances", choices=("spline", "linear"), default="spline", help="default spline")
    fit.add_argument("--folds", type=int, default=5, help="of cross-fitting; default 5")
    fit.add_argument("--seed", type=int, default=0, help="deals rows into folds; default 0")
    fit.add_argument("--json", action="store_true", help="the same as JSON")
    fit.add_argument("-o", dest="file", metavar="FILE", type=Path, help="all rows' influence goes here, .parquet")
    fit.set_defaults(run=_fit)

    show = commands.add_parser("show", help="print saved effects", allow_abbrev=False)
    show.add_argument("file", type=Path, help="written by fit -o, or the folder of a report")
    show.add_argument("--json", action="store_true", help="the same as JSON")
    show.set_defaults(run=_show)

    adjust = commands.add_parser("adjust", help="list valid adjustment sets", allow_abbrev=False)
    adjust.add_argument("graph", help="text, or a file with it")
    _roles(adjust)
    adjust.set_defaults(run=_adjust)
    return root


def _roles(made: argparse.ArgumentParser) -> None:
    made.add_argument("--treatment", required=True, metavar="NAME")
    made.add_argument("--outcome", required=True, metavar="NAME")
    made.add_argument("--hidden", metavar="NAMES", help="nodes that nobody measured, parted by commas")
    made.add_argument("--estimand", choices=tuple(ESTIMANDS), default="ate", help="default ate")


def _fit(arguments: argparse.Namespace) -> int:
    if arguments.file is not None:
        check_output(arguments.file)
    columns, graph = read_columns(arguments.table), _graph(arguments.graph)
    data = EffectData(columns, arguments.treatment, arguments.outcome, graph, hidden=_names(arguments.hidden))
    chosen = {} if arguments.adjust is None else {"adjust": _names(arguments.adjust)}
    estimand: Estimand = ESTIMANDS[arguments.estimand](**chosen)
    found = estimate(data, estimand, arguments.nuisances, arguments.folds, arguments.seed)
    _say([found], arguments.json)
    if arguments.file is not None:
        path = plain(save([found], arguments.file))
        print(path, file=sys.stderr if arguments.json else sys.stdout)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if not arguments.file.is_dir():
        _say(load(arguments.file), arguments.json)
        return 0
    found = arguments.of_report(arguments.file)
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else as_text(found))
    return 0


def _say(found: list[Effect], as_json: bool) -> None:
    print(json.dumps([each.to_dict() for each in found], indent=1) if as_json else as_text(render(found)))


def _adjust(arguments: argparse.Namespace) -> int:
    graph = causal_graph(
        _graph(arguments.graph), arguments.treatment, arguments.outcome, hidden=_names(arguments.hidden)
    )
    estimand: Estimand = ESTIMANDS[arguments.estimand]()
    estimand.check(graph)
    for line in _lines(graph, estimand):
        print(plain(line))
    return 0


def _lines(graph: CausalGraph, estimand: Estimand) -> list[str]:
    """The first sets by size, valid or not, with the reason."""
    best, lines = estimand.optimal(graph), []
    sets = [frozenset(s) for size in range(len(graph.observed) + 1) for s in combinations(graph.observed, size)]
    for each in sets[:LISTED]:
        faults = estimand.faults(graph, each)
        word = estimand.best if each == best and not faults else "valid"
        lines.append(f"{names(each)}: {'no: ' + '; '.join(faults) if faults else word}")
    if best not in sets[:LISTED]:
        seen = f"not observed: {names(best & graph.hidden)}" if best & graph.hidden else estimand.best
        faults = estimand.faults(graph, best)
        lines.append(f"{names(best)}: {'no: ' + '; '.join(faults) if faults else seen}")
    more = len(sets) - LISTED
    return lines + ([f"and {more} larger sets"] if more > 0 else [])


def _graph(given: str) -> str:
    """The text, or what a file of that name holds."""
    try:
        return Path(given).read_text(encoding="utf-8") if Path(given).is_file() else given
    except OSError:  # too long for the name of a file
        return given


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()] if given else []

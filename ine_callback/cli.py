"""The command ``ine-callback``: saved reports, and values of rows in files, without writing Python.

Built on the standard library's argparse: jsonargparse builds parsers from signatures, which would show users Python's
docstrings, and Typer is a new dependency that completes by starting the program at every TAB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ine_callback._version import __version__
from ine_callback.report import InfluenceReport, ScoreTable
from ine_callback.report.attribution_view import section
from ine_callback.report.export import LISTS, Format, contents
from ine_callback.utilities.jsonable import jsonable
from ine_callback.utilities.optional import need
from ine_callback.utilities.terminal import as_text
from ine_callback.utilities.words import plain

FOUND, NOT_FOUND, FAULT, PIPE_CLOSED = 0, 1, 2, 141  # the last as in shells: 128 + SIGPIPE
FLAG_AT, ROWS_PER_END = 0.05, 10

ABOUT = """\
Which training rows helped, which harmed: read the reports of ine_callback.

PATH is the folder that the callback, or report.save(), wrote. A score μ above 0
means that training on the row lowers the query (it helps); q is the false
discovery rate of the flagged rows."""
ROOT_EXAMPLES = """\
examples:
  ine-callback show lightning_logs/version_0/influence
  ine-callback export influence --format drop-list -o drop.csv
  ine-callback compare influence other

`ine-callback show --help` explains a command. Exit status: 0 fine; 1 nothing was found (show
--flagged) or nothing repeats (compare); 2 wrong usage, or a report that cannot be read."""
SHOW_EXAMPLES = """\
Without options: the whole report. With --query alone: its first 10 rows at both ends.
For labels that may be wrong, ask the query 'self' for its top, others for their bottom.

examples:
  ine-callback show influence
  ine-callback show influence --query self --top 20
  ine-callback show influence --query val --flagged --q 0.01
  ine-callback show influence --json

Exit status 1: --flagged, and no row is flagged."""
EXPORT_EXAMPLES = """\
csv, json, parquet: a line for every row and query with all its numbers; empty or null
where the row was never observed, which is not a score of 0.
drop-list: rows to look at, and perhaps drop, worst first; keep-list: all others. CSV
with the head 'row', or JSON where FILE ends in .json.
markdown: a summary for a pull request.

examples:
  ine-callback export influence --format csv --query self
  ine-callback export influence --format parquet -o scores.parquet
  ine-callback export influence --format drop-list --q 0.01 -o drop.csv
  ine-callback export influence --format keep-list -o keep.json
  ine-callback export influence --format markdown -o summary.md"""
COMPARE_EXAMPLES = """\
Both runs must have the same training set, in the same order; queries that only one
of them has are left out and named.

examples:
  ine-callback compare influence other
  ine-callback compare influence other --q 0.01 --json

Exit status 1: on some query there are flagged rows, and not one is flagged by both runs
with the same sign."""
HTML_EXAMPLES = """\
The file is drawn from the saved scores; nothing is trained, nothing in it runs. Needs
the extra 'report': pip install "ine_callback[report]"

examples:
  ine-callback html influence
  ine-callback html influence -o report.html"""
KAIROS_EXAMPLES = """\
Needs no model: a value above 0 means that the row brings the training rows closer to the
reference, which must be clean and share no row with them. A file is .npz with arrays x
and y, or .parquet or .csv with a column y and numbers in all others. Rows are counted
from 0. Features should be scaled or embedded: distances are what counts.

examples:
  ine-callback kairos train.npz reference.npz
  ine-callback kairos train.npz reference.npz --top 20 --json
  ine-callback kairos train.csv reference.csv --label y --sigma 3 -o values.csv
  ine-callback kairos train.npz reference.npz --lam 1 --random-features 1024 -o values.parquet"""
TOKENS_EXAMPLES = """\
Of a report with scores of tokens, by TokenInfluence(...) or IF(per_token="label"). The rule
is IF-Guide's: tokens above a quantile of all scores, with their neighbours, document by
document, up to a budget. Train with SuppressTokens(dataset, TokenMask.load(FILE)).

examples:
  ine-callback tokens influence
  ine-callback tokens influence --quantile 0.98 --window 0 --budget 0.03 -o mask.parquet"""
EFFECTS_EXAMPLES = """\
`ine-callback effects fit --help` has the options.

examples:
  ine-callback effects fit table.csv --graph graph.txt --treatment A --outcome Y --estimand wcde
  ine-callback effects adjust graph.txt --treatment A --outcome Y"""
ASK_EXAMPLES = "example:\n  ine-callback ask influence --module package.models:Net --checkpoint C.ckpt --query Q.npz"
COMPLETION_EXAMPLES = """\
The script is complete in itself, so TAB answers at once. Needs: pip install shtab

examples:
  ine-callback completion bash"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (by default the process's own) and returns its exit status.

    Errors in the usage, in a report or in the file system are one line on standard error. Escape codes in foreign text
    do not reach the terminal.

    Raises:
        SystemExit: With status 2 on wrong usage, 0 after ``--help`` and ``--version``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from ine_callback.report import example_report
        >>> with TemporaryDirectory() as folder:
        ...     path = example_report().save(folder)
        ...     status = main(["export", str(path), "--format", "keep-list", "-o", f"{folder}/keep.json"])
        /...keep.json
        >>> status
        0
    """
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        return PIPE_CLOSED
    except (KeyError, ValueError, OSError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error  # str(KeyError) is in quotes
        print(f"ine-callback: {plain(message)}", file=sys.stderr)
        return FAULT


def parser(folder: Any = None, file: Any = None) -> argparse.ArgumentParser:
    """The command line; ``folder`` and ``file`` tell shtab how to complete paths."""
    root = argparse.ArgumentParser("ine-callback", **_texts(ABOUT, ROOT_EXAMPLES))
    root.add_argument("--version", action="version", version=f"ine_callback {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, what: str, examples: str, *paths: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, **_texts(f"{what[0].upper()}{what[1:]}.", examples))
        made.set_defaults(run=run)
        for path in paths:
            action = made.add_argument(path.lower(), metavar=path, type=Path, help="folder of a saved report")
            action.complete = folder  # type: ignore[attr-defined]  # read by shtab
        return made

    def output(made: argparse.ArgumentParser, default: str) -> None:
        what = f"write here; by default {default}"
        action = made.add_argument("-o", dest="file", metavar="FILE", type=Path, help=what)
        action.complete = file  # type: ignore[attr-defined]

    show = command("show", _show, "print a report, or rows of one query", SHOW_EXAMPLES, "PATH")
    show.add_argument("--query", metavar="NAME", help="the query; by default the report's first")
    show.add_argument("--top", type=int, metavar="K", help="the K rows with the largest scores")
    show.add_argument("--bottom", type=int, metavar="K", help="the K rows with the smallest scores")
    show.add_argument("--flagged", action="store_true", help="all rows beyond chance, largest |μ| first")
    show.add_argument("--q", type=float, help="flagged are q-values up to this; default .05")
    show.add_argument("--method", metavar="NAME", help="a method that ran on the trained model, such as BIF")
    show.add_argument("--json", action="store_true", help="the same as JSON")

    out = command("export", _export, "write scores, or lists of rows, for other programs", EXPORT_EXAMPLES, "PATH")
    out.add_argument("--format", choices=get_args(Format), required=True, help="see below")
    out.add_argument(
        "--query",
        metavar="NAME",
        help="the query; by default all, of the lists the wrong labels, where the run could tell them",
    )
    out.add_argument(
        "--q", type=float, help="false discovery rate of the lists; default .1 for label errors, .05 of a query's test"
    )
    output(out, "to standard output")

    pair = command("compare", _compare, "compare two runs: which findings repeat", COMPARE_EXAMPLES, "PATH", "OTHER")
    pair.add_argument("--q", type=float, default=FLAG_AT, help="flagged are q-values up to this; default .05")
    pair.add_argument("--json", action="store_true", help="the same as JSON")

    page = command("html", _html, "draw report.html again", HTML_EXAMPLES, "PATH")
    output(page, "report.html in PATH")

    values = command("kairos", _kairos, "values of rows in a file against clean rows", KAIROS_EXAMPLES)
    for name, what in (("train", "file of the rows to value"), ("reference", "file of clean rows")):
        values.add_argument(name, metavar=name.upper(), type=Path, help=what).complete = file  # type: ignore[attr-defined]
    values.add_argument("--label", metavar="NAME", default="y", help="array or column of the labels; default y")
    values.add_argument("--sigma", type=float, help="the kernel's bandwidth; by default the median distance")
    values.add_argument("--lam", type=float, default=0.97, help="weight of features, 1: no labels; default .97")
    values.add_argument("--first-order", action="store_true", help="as published, in place of exact leave-one-out")
    values.add_argument("--random-features", type=int, metavar="D", help="approximate the kernel, for many rows")
    values.add_argument("--seed", type=int, default=0, help="of what is drawn; default 0")
    values.add_argument("--top", type=int, metavar="K", default=ROWS_PER_END, help="rows shown of each end; default 10")
    values.add_argument("--json", action="store_true", help="the same as JSON")
    output(values, "only the ends are printed; all rows go to FILE, .csv or .parquet")

    tokens = command("tokens", _tokens, "which tokens to suppress in the next training", TOKENS_EXAMPLES, "PATH")
    tokens.add_argument("--method", metavar="NAME", help="one that has scored tokens; by default the last")
    tokens.add_argument("--query", metavar="NAME", help="the query; by default the method's first")
    tokens.add_argument("--quantile", type=float, default=0.99, help="chosen are scores above it; default .99")
    tokens.add_argument("--window", type=int, default=1, metavar="K", help="neighbours on each side; default 1")
    tokens.add_argument("--budget", type=float, default=0.02, help="largest share of all tokens; default .02")
    output(tokens, "only counts are printed; the mask goes to FILE, .parquet")

    effects = command("effects", _effects, "effects of a table's columns by a causal graph", EFFECTS_EXAMPLES)
    effects.add_argument("rest", nargs=argparse.REMAINDER, metavar="fit|show|adjust ...", help="each has --help")

    later = command("ask", _ask, "queries after the run, of a report with a gradient store", ASK_EXAMPLES)
    later.add_argument("rest", nargs=argparse.REMAINDER, metavar="PATH ...", help="--help lists the options")

    shell = command("completion", _completion, "print a completion script for your shell", COMPLETION_EXAMPLES)
    shell.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return root


def _texts(about: str, examples: str) -> dict[str, Any]:
    """Options of a parser that keeps the line breaks of its texts and takes no abbreviated options."""
    style = argparse.RawDescriptionHelpFormatter
    return {"description": about, "epilog": examples, "formatter_class": style, "allow_abbrev": False}


def _show(arguments: argparse.Namespace) -> int:
    if arguments.q is not None and not arguments.flagged:
        raise ValueError("show: --q belongs to --flagged; add it")
    report = InfluenceReport.load(arguments.path)
    if arguments.method is not None:
        return _show_method(report, arguments)
    tables = _tables(report, arguments)
    if arguments.json:
        lists = {name: [jsonable(one._asdict(), name) for one in table] for name, table in tables.items()}
        _say_json(lists or report.summary())
    else:
        parts: list[Any] = [table.render(len(table)) for table in tables.values()]
        missed = (
            [plain(report.run.incomplete)] if parts and report.run.incomplete else []
        )  # the whole report says it itself
        for part in [*missed, *parts] or [report]:
            _say(part)
    return NOT_FOUND if arguments.flagged and not len(tables["flagged"]) else FOUND


def _show_method(report: InfluenceReport, arguments: argparse.Namespace) -> int:
    """One fit-end method's section; ``--query`` and ``--top`` choose the query and how many rows of each end."""
    if arguments.flagged or arguments.bottom is not None:
        raise ValueError("show: --flagged and --bottom list f-INE's scores; leave out --method, or take --top")
    stages = report.stages(arguments.method)
    if not stages:
        there = ", ".join(dict.fromkeys(each.method for each in report.attributions)) or "none"
        raise ValueError(f"show: no method {arguments.method!r} ran on the trained model; there are: {there}")
    last, queries = stages[-1], None if arguments.query is None else [arguments.query]
    k = ROWS_PER_END if arguments.top is None else arguments.top
    if arguments.json:
        names = queries or [query.name for query in last.queries]
        lists = {name: {"top": last.top(k, name).tolist(), "bottom": last.bottom(k, name).tolist()} for name in names}
        _say_json({"method": last.method, "at": last.at, "reliable": last.reliable, "queries": lists})
        return FOUND
    from rich.console import Group

    _say(Group(*section(stages, report.scores, queries, k)))
    return FOUND


def _tables(report: InfluenceReport, arguments: argparse.Namespace) -> dict[str, ScoreTable]:
    """The tables that the options name; none for the whole report."""
    query, top, bottom = arguments.query, arguments.top, arguments.bottom
    if query is not None and top is bottom is None and not arguments.flagged:
        top = bottom = ROWS_PER_END
    tables = {}
    if top is not None:
        tables["top"] = report.top(top, query)
    if bottom is not None:
        tables["bottom"] = report.bottom(bottom, query)
    if arguments.flagged:
        tables["flagged"] = report.flagged(FLAG_AT if arguments.q is None else arguments.q, query)
    return tables


def _export(arguments: argparse.Namespace) -> int:
    form, file = arguments.format, arguments.file
    if arguments.q is not None and form not in LISTS:
        raise ValueError(f"export: --q belongs to {' and '.join(LISTS)}; {form} has all rows, with their q-values")
    if form == "parquet" and file is None:
        raise ValueError("export: parquet is no text; name a file with -o")
    q = arguments.q
    report = InfluenceReport.load(arguments.path)
    if file is None:
        rest = memoryview(contents(report, form, arguments.query, q))
        while rest:  # unbuffered (PYTHONUNBUFFERED), a pipe may take only a part
            rest = rest[sys.stdout.buffer.write(rest) :]
    else:
        print(plain(report.export(file, form, arguments.query, q)))
    return FOUND


def _compare(arguments: argparse.Namespace) -> int:
    found = InfluenceReport.load(arguments.path).compare(InfluenceReport.load(arguments.other), arguments.q)
    if arguments.json:
        _say_json(found.to_dict())
    else:
        _say(found)
    return NOT_FOUND if any(each.nothing_repeats for each in found.agreements) else FOUND


def _html(arguments: argparse.Namespace) -> int:
    path = arguments.path / "report.html" if arguments.file is None else arguments.file
    print(plain(InfluenceReport.load(arguments.path).write_html(path)))
    return FOUND


def _kairos(arguments: argparse.Namespace) -> int:
    from ine_callback.methods.kairos.files import check_output, read_rows, write_values
    from ine_callback.methods.kairos.values import kairos  # imports torch, which no other command needs

    if arguments.top < 1:
        raise ValueError(f"kairos: --top is {arguments.top}; show at least 1 row")
    if arguments.file is not None:
        check_output(arguments.file)
    found = kairos(
        *read_rows(arguments.train, arguments.label),
        *read_rows(arguments.reference, arguments.label),
        sigma="median" if arguments.sigma is None else arguments.sigma,
        lam=arguments.lam,
        loo=not arguments.first_order,
        random_features=arguments.random_features,
        seed=arguments.seed,
    ).attribution()
    heads = {"row": found.rows, "value": found.scores[:, 0]} | {k: v[:, 0] for k, v in found.columns.items()}
    order = found.scores[:, 0].argsort(kind="stable")
    ends = {"most harmful": order[: arguments.top], "most helpful": order[::-1][: arguments.top]}
    if arguments.json:
        lists = {name: [{k: v[at].item() for k, v in heads.items()} for at in which] for name, which in ends.items()}
        _say_json({"settings": dict(found.settings), "reasons": found.reasons, "notes": list(found.notes)} | lists)
    else:
        print(f"{found.headline}\n{found.legend}")
        for name, which in ends.items():
            print(f"\n{name}\n" + "".join(f"{head:>12s}" for head in heads))
            for at in which:
                print(f"{found.rows[at]:12d}" + "".join(f"{v[at]:+12.4f}" for k, v in heads.items() if k != "row"))
        for line in (*found.reasons, *found.notes):
            print(f"\nNote: {plain(line)}")
    if arguments.file is not None:
        print(plain(write_values(found, arguments.file)), file=sys.stderr if arguments.json else sys.stdout)
    return FOUND


def _effects(arguments: argparse.Namespace) -> int:
    from ine_callback.effects.command import main as run  # which no other command needs

    return run(arguments.rest or ["--help"], lambda folder: InfluenceReport.load(folder).effects)


def _tokens(arguments: argparse.Namespace) -> int:
    report = InfluenceReport.load(arguments.path)
    mask = report.token_mask(arguments.method, arguments.query, arguments.quantile, arguments.window, arguments.budget)
    print("\n".join(mask.lines(ROWS_PER_END)))
    if arguments.file is not None:
        mask.save(arguments.file)
        print(plain(arguments.file))
    return FOUND


def _ask(arguments: argparse.Namespace) -> int:
    from ine_callback.integrations.ask_command import main as run  # which no other command needs

    return run(arguments.rest or ["--help"])


def _completion(arguments: argparse.Namespace) -> int:
    shtab = need("shtab", "ine-callback completion", "shtab")
    print(shtab.complete(parser(shtab.DIRECTORY, shtab.FILE), arguments.shell))
    return FOUND


def _say(part: Any) -> None:
    """Prints in colour in a terminal, else as plain text of a fixed width."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(part)
    else:
        print(as_text(part))


def _say_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))  # ASCII: escape codes stay escaped

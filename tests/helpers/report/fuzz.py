"""Damages saved reports at random and judges what `InfluenceReport.load` makes of them.

    python -m tests.helpers.report.fuzz --folders 10000 --seed 0

Of every folder there may come an InfluenceError that names folder, fault and remedy, or a report that prints, draws,
and survives saving and loading. Everything else is a fault: another exception, code that ran, a file opened outside
the folder, a process that died, took longer than `SECONDS` or more memory than `MEMORY` beyond its start. A folder is
repeated with `--only NUMBER`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from ine_callback.errors import InfluenceError
from ine_callback.report import InfluenceReport
from tests.helpers.attributions import parts
from tests.helpers.report.damage import DAMAGE, RARE, SENTINEL, save_chains, save_former, save_plain

SECONDS, MEMORY = 120.0, 3 * 2**30
CLEAN = ("error", "loaded")
FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.",
    "pickle.find_class",
    "ctypes.dlopen",
)
WHILE_LOADING = (
    "import",
    "compile",
    "exec",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "shutil.",
)


@dataclass(frozen=True)
class Outcome:
    """What came of a folder: one of `CLEAN`, or the fault; ``detail`` is the error's text."""

    number: int
    kind: str
    verdict: str
    detail: str
    seconds: float = 0.0
    peak: int = 0


class Watch:
    """An audit hook that writes down what a folder's data must not bring about."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.loading = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        names = FORBIDDEN + WHILE_LOADING if self.loading else FORBIDDEN
        if event.startswith(names) or (event == "open" and not self._may_open(*args[:3])):
            self.seen.append(f"{event} {args[:2]}"[:200])

    def _may_open(self, path: Any, mode: str | None, flags: int) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a descriptor: was opened by path before
        inside = Path(os.path.realpath(os.fsdecode(path))).is_relative_to(self.inside.parent / self.inside.name)
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if self.loading:
            return inside and not writes
        return inside or not writes  # fonts, templates

    def over(self, folder: Path, loading: bool) -> None:
        self.inside, self.loading, self.seen = folder, loading, []

    def off(self) -> list[str]:
        self.inside = None
        return self.seen


def judge(watch: Watch, folder: Path, draw: bool) -> tuple[str, str]:
    """Verdict and detail."""
    watch.over(folder, loading=True)
    try:
        report = InfluenceReport.load(folder)
    except InfluenceError as error:
        seen, text = watch.off(), str(error)
        named = text.startswith(f"InfluenceReport.load: {folder}: ") and "; " in text
        good = named and text.isprintable() and len(text) < 2000
        return ("did", str(seen)) if seen else ("error" if good else "unclear message", text)
    except BaseException as error:
        watch.off()
        return "wrong exception", repr(error)
    if watch.off():
        return "did", str(watch.seen)
    watch.over(folder.parent, loading=False)
    try:
        survive(report, folder.parent / "again", draw)
    except BaseException as error:
        return "does not survive", f"{error!r} at {_where(error)}"
    finally:
        seen = watch.off()
    return ("did", str(seen)) if seen else ("loaded", "")


def _where(error: BaseException) -> str:
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(places[-6:])


def survive(report: InfluenceReport, again: Path, draw: bool) -> None:
    """Everything that a user does with a report; what was saved is what is loaded."""
    str(report), report.to_markdown(), report._repr_html_(), report.to_pandas()
    for query in report.queries:
        report.flagged(query=query), report.drop_list(query=query)
    found = InfluenceReport.load(report.save(again))
    if numbers(found) != numbers(report) or found.run != report.run:
        raise AssertionError("saved and loaded, it is another report")
    report.write_html(again / "report.html", samples=[str(row) for row in range(min(report.rows, 1000))])
    if draw:  # takes seconds
        report.figure(report.queries[0]).savefig(again / "figure.svg")


def numbers(report: InfluenceReport) -> list[Any]:
    """All that a report holds beside its run's facts."""
    return list(parts([report.scores, *report.attributions]))


def child(pipe: Connection) -> None:
    """Judges folder after folder, with a bound on its memory."""
    with tempfile.TemporaryDirectory() as place:  # imports, fonts and templates before anybody watches
        survive(InfluenceReport.load(save_chains(Path(place) / "a")), Path(place) / "b", True)
    watch = Watch()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    pipe.send("ready")
    while True:
        verdict, detail = judge(watch, *pipe.recv())
        pipe.send((verdict, detail, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


class Judge:
    """A child process, made anew when it died or hung."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=child, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(300) or self.pipe.recv() != "ready":
            raise RuntimeError("the judging process did not start")

    def ask(self, folder: Path, draw: bool) -> tuple[str, str, int]:
        """Verdict, detail and the process's peak memory in bytes."""
        self.pipe.send((folder, draw))
        try:
            if self.pipe.poll(SECONDS):
                answer: tuple[str, str, int] = self.pipe.recv()
                return answer
            verdict = "hang"
        except EOFError:
            verdict = "crash"
        self.close()
        self._start()
        return verdict, "", 0

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def kind_of(random: Random) -> str:
    """A kind of damage; those that take seconds are rare."""
    return random.choices(list(DAMAGE), [1 / RARE.get(kind, 1) for kind in DAMAGE])[0]


def run(numbers: range, seed: int = 0, kinds: list[str] | None = None, keep: Path | None = None) -> Iterator[Outcome]:
    """Makes, damages and judges a folder for each number; a number's folder does not depend on the others."""
    judge = Judge()
    try:
        with tempfile.TemporaryDirectory() as place:
            root = Path(place).resolve()
            whole = [save(root / save.__name__) for save in (save_plain, save_chains, save_former)]
            for number in numbers:
                random = Random(f"{seed} {number}")
                kind = random.choice(kinds) if kinds else kind_of(random)
                base = (keep or root / "case").resolve()
                shutil.rmtree(base, ignore_errors=True)
                folder = Path(shutil.copytree(random.choice(whole), base / "report"))
                DAMAGE[kind](folder, random)
                start = time.perf_counter()
                verdict, detail, peak = judge.ask(folder, random.random() < 0.005)
                if (base / SENTINEL).exists() or Path("nowhere").exists():
                    verdict = "code ran"
                yield Outcome(number, kind, verdict, detail, time.perf_counter() - start, peak)
    finally:
        judge.close()


def table(outcomes: list[Outcome]) -> str:
    """Outcomes by kind of damage, as Markdown."""
    verdicts = [*CLEAN, *sorted({each.verdict for each in outcomes} - set(CLEAN))]
    lines = [f"| damage | {' | '.join(verdicts)} | slowest s |", "|---" * (len(verdicts) + 2) + "|"]
    for kind in [*DAMAGE, "all"]:
        some = [each for each in outcomes if kind in (each.kind, "all")]
        counts = Counter(each.verdict for each in some)
        cells = [str(counts[verdict]) for verdict in verdicts]
        lines.append(f"| {kind} | {' | '.join(cells)} | {max((each.seconds for each in some), default=0.0):.1f} |")
    return "\n".join(lines)


def main() -> int:
    """The command line; status 1 when there was a fault."""
    from rich.progress import track

    parser = argparse.ArgumentParser(prog="python -m tests.helpers.report.fuzz", description=__doc__)
    parser.add_argument("--folders", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one folder and keep it in ./fuzzed")
    parser.add_argument("--kind", action="append", choices=list(DAMAGE), help="only this damage")
    options = parser.parse_args()
    numbers = range(options.folders) if options.only is None else range(options.only, options.only + 1)
    keep = None if options.only is None else Path("fuzzed")
    start, outcomes = time.perf_counter(), []
    try:
        for outcome in track(run(numbers, options.seed, options.kind, keep), "folders", total=len(numbers)):
            outcomes.append(outcome)
            if outcome.verdict not in CLEAN or options.only is not None:
                print(f"{outcome.number} {outcome.kind}: {outcome.verdict}: {outcome.detail[:600]}", flush=True)
    except KeyboardInterrupt:
        print("interrupted; so far:")
    print(table(outcomes))
    peak = max((each.peak for each in outcomes), default=0)
    print(f"{len(outcomes)} folders in {time.perf_counter() - start:.0f} s; peak memory {peak / 2**30:.2f} GiB")
    return int(any(each.verdict not in CLEAN for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())

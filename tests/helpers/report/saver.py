"""A process that saves a report over another one and is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  # pyarrow looks for it at the first save

import ine_callback
from ine_callback.methods.bif.scores import example_bif_scores
from ine_callback.report import InfluenceReport, example_report

OLD = example_report(40).with_attributions(example_bif_scores())
NEW = example_report(2000)  # large enough to take some milliseconds


def save_and_die(folder: Path, step: int) -> None:
    """Saves `NEW`; SIGKILL comes before the step of this number that audit hooks see (open, rename, remove …)."""
    left = step

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event.startswith(("open", "os.", "shutil.")) and event != "os.kill":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    NEW.save(folder)
    os._exit(0)


def save_for_ever(folder: Path) -> None:
    """Saves both reports in turn until somebody ends it."""
    while True:
        NEW.save(folder)
        OLD.save(folder)


class Saver:
    """A process that has imported everything, and forks one that saves for each kill."""

    def __init__(self, folder: Path) -> None:
        root = Path(next(iter(ine_callback.__path__))).parent
        env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.helpers.report.saver", str(folder)]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # at the end of its input it ends

    def killed_before(self, step: int) -> bool:
        """Saves up to a step; whether there was such a step."""
        self._tell(str(step))
        return self._answer() != 0

    def killed_after(self, seconds: float) -> None:
        """Saves in turn, and is killed after so many seconds."""
        self._tell("for ever")
        pid = self._answer()
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        self._answer()

    def _tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


def serve(folder: Path) -> None:
    """What the process does: forks for each line of its input, says the child's id and how it ended."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            save_for_ever(folder) if line == "for ever\n" else save_and_die(folder, int(line))
        if line == "for ever\n":
            print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


def which(folder: Path) -> str:
    """The report that a folder holds: "old" or "new", whole; raises if it is neither."""
    found = InfluenceReport.load(folder)
    expected, name = (NEW, "new") if found.rows == NEW.rows else (OLD, "old")
    assert found.run == expected.run and len(found.attributions) == len(expected.attributions)
    for one, other in zip(found.attributions, expected.attributions, strict=True):
        assert one.scores.tobytes() == other.scores.tobytes()
    assert found.scores.mu.tobytes() == expected.scores.mu.tobytes()
    return name


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

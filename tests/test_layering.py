"""Sub-packages import only from those below them, as docs/architecture.md draws them; tests only from helpers."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import torch

from ine_callback import Recorder

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ine_callback"
# From the bottom up: each line may import from the lines above it, and its own names from one another within a package.
LAYERS = (
    ("errors",),
    ("utilities",),
    ("scores", "stats", "distributed", "data"),
    ("capture", "applications", "effects"),
    ("optimizers", "curvature", "queries", "report"),
    ("scoring", "methods"),
    ("recording",),
    ("integrations",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LONGEST = 400  # lines of a file


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside of functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("ine_callback."):
                found.add(known(name.removeprefix("ine_callback.")))
    return found


def known(name: str) -> str:
    """The module that a dotted name is, or lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in LEVEL)
MODULES = {module_name(path): path for path in FILES}
IMPORTS = {name: imported(path) - {"", name} for name, path in MODULES.items()}


def test_the_top_holds_the_entry_points_and_the_values_alone() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {
        "__init__", "__main__", "_version", "cli", "errors", "scores",
    }  # fmt: skip


def test_no_module_imports_from_a_layer_above_or_beside_its_own() -> None:
    wrong = []
    for name, others in IMPORTS.items():
        package = name.partition(".")[0]
        above = {o for o in others if (top := o.partition(".")[0]) != package and LEVEL[top] >= LEVEL[package]}
        wrong += [f"{name} ({LAYERS[LEVEL[package]]}) imports {sorted(above)}"] if above else []
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    # a package's own file stands for what it re-exports: its modules may not go through it
    graph = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in IMPORTS.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_map_draws_these_layers() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = re.search(r"```layers\n(.*?)```", text, re.DOTALL)
    assert drawn, "docs/architecture.md draws no ```layers"
    lines = [set(re.findall(r"\w+", line)) for line in drawn.group(1).splitlines() if line.strip()]
    assert lines == [set(names) for names in reversed(LAYERS)]


def test_no_file_is_longer_than_a_reader_takes_in() -> None:
    files = [path for folder in ("ine_callback", "tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_the_recorder_composes_parts_and_holds_little_itself() -> None:
    module = torch.nn.Linear(2, 1)
    recorder = Recorder(module, torch.optim.SGD(module.parameters(), lr=0.1), 4, "self")
    with recorder:
        assert len(vars(recorder)) < 15


def imported_by_tests(path: Path) -> set[str]:
    """What a file of tests/ imports, relative imports by their full names."""
    folder, found = path.parent.relative_to(ROOT).parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else ()
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return found


def test_tests_share_code_through_the_helpers_alone() -> None:
    """A test module imports helpers, fixtures, and modules of its own folder that hold no tests."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        allowed = ("tests.helpers.", "tests.fixtures.", ".".join(path.parent.relative_to(ROOT).parts) + ".")
        for name in imported_by_tests(path):
            is_test = any(part.startswith("test_") for part in name.split("."))
            if is_test or (name.startswith("tests.") and not name.startswith(allowed)):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "what tests share belongs in tests/helpers/"

"""What README.md, CONTRIBUTING.md and docs/ show, works: code runs, commands and links lead to something.

A file's fenced ``python`` blocks run in sequence in one namespace, in an empty folder, as a reader would paste them.
A block opened with "```python no-run" must only parse. ``bash``, ``sh``, ``shell`` and ``console`` blocks are not run:
their make targets, scripts and files must exist.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

import ine_callback
import ine_callback.report

ROOT = Path(__file__).resolve().parents[1]
DOCS = [p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()]
MAKEFILE = ROOT / "Makefile"
FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<info>.*?)\s*$")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)[^)]*\)")
TARGET = re.compile(r"^([a-z][\w-]*)\s*:(?!=)", re.MULTILINE)
# Commands that need no file of this project. Anything else in a shell block is a typing error until it is listed here.
ELSEWHERE = {"cd", "export", "git", "mkdir", "open", "pip", "source", "tensorboard", "xdg-open"}

each_file = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())


@dataclass(frozen=True)
class Block:
    info: str  # what stands after the opening fence
    line: int  # of the first line of code, counted from 1
    code: str

    @property
    def language(self) -> str:
        return self.info.split()[0].lower() if self.info else ""


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    opened: tuple[re.Match[str], int] | None = None
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = FENCE.match(line)
        if opened is None:
            if match:
                opened, code = (match, number), []
            continue
        start, at = opened
        if match and not match["info"] and match["fence"].startswith(start["fence"]):
            found.append(Block(start["info"], at + 1, "\n".join(code) + "\n"))
            opened = None
        else:
            code.append(line.removeprefix(start["indent"]))
    if opened:
        raise ValueError(f"the fence opened in line {opened[1]} is never closed")
    return found


def prose(text: str) -> str:
    """The text outside blocks and inline code."""
    for block in blocks(text):
        text = text.replace(block.code, "")
    return re.sub(r"`[^`\n]*`", "", text)


def problem(command: str) -> str | None:
    """Why a shell command of the documentation cannot work, or None."""
    words = shlex.split(command.removeprefix("$ "), comments=True)
    while words and re.match(r"^\w+=", words[0]):  # VARIABLE=value in front
        words.pop(0)
    if not words:
        return None
    name, arguments = words[0], words[1:]
    if name == "make":
        known = set(TARGET.findall(MAKEFILE.read_text()))
        missing = [word for word in arguments if word[0] != "-" and "=" not in word and word not in known]
        return f"no make target {missing}" if missing else None
    if re.fullmatch(r"(\.venv/bin/)?python(3[.\d]*)?", name):
        if arguments[:1] == ["-m"]:
            module = arguments[1]
            return None if importlib.util.find_spec(module) else f"no module {module}"
        name, arguments = "bash", arguments  # an interpreter: its first argument is a file
    if name == "bash":
        files = [word for word in arguments if not word.startswith("-")][:1]
        return None if files and (ROOT / files[0]).exists() else f"no file {files}"
    if name in ELSEWHERE or (ROOT / name).exists():
        return None
    tool = Path(name).name  # a tool that the virtual environment brings, with or without .venv/bin/ before it
    brought = (Path(sys.executable).parent / tool).exists()
    return None if brought and name in (tool, f".venv/bin/{tool}") else f"no command {name}"


def commands(code: str) -> list[str]:
    lines = code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):  # a session: what has no prompt is output
        lines = [line for line in lines if line.startswith("$ ")]
    return [part for line in lines for part in re.split(r"\s+&&\s+|\s+\|\s+|\s*;\s+", line)]


@each_file
def test_python_blocks_run(path: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(path.read_text()):
        if block.language not in ("python", "py"):
            continue
        # Empty lines before the code let a traceback name the line in the document.
        tree = ast.parse("\n" * (block.line - 1) + block.code, str(path))
        if "no-run" not in block.info.split():
            exec(compile(tree, str(path), "exec"), namespace)


@each_file
def test_shell_blocks_name_what_exists(path: Path) -> None:
    found = [
        f"{path.name}:{block.line}: {command.strip()!r}: {why}"
        for block in blocks(path.read_text())
        if block.language in ("bash", "sh", "shell", "console")
        for command in commands(block.code)
        if (why := problem(command.strip()))
    ]
    assert not found, "\n".join(found)


@each_file
def test_links_lead_to_files(path: Path) -> None:
    targets = [match["target"].split("#")[0] for match in LINK.finditer(prose(path.read_text()))]
    broken = [t for t in targets if t and ":" not in t and not (path.parent / t).exists()]
    assert not broken, f"{path.name} links to files that do not exist: {broken}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and the site give to a page's headings."""
    for block in blocks(text):
        text = text.replace(block.code, "")
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_file
def test_tests_that_are_named_exist(path: Path) -> None:
    named = set(re.findall(r"\btests/[\w/]+\.py\b", path.read_text()))
    assert not {name for name in named if not (ROOT / name).exists()}


@each_file
def test_links_lead_to_headings(path: Path) -> None:
    broken = []
    for match in LINK.finditer(prose(path.read_text())):
        target, _, anchor = match["target"].partition("#")
        page = path.parent / target if target else path
        if anchor and ":" not in target and page.suffix == ".md" and anchor not in anchors(page.read_text()):
            broken.append(match["target"])
    assert not broken, f"{path.name} links to headings that do not exist: {broken}"


def test_the_api_pages_show_all_public_names() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    names = {f"ine_callback.{name}" for name in ine_callback.__all__ if not name.startswith("_")}
    names |= {f"ine_callback.report.{name}" for name in ine_callback.report.__all__ if name not in ine_callback.__all__}
    assert not names - shown, f"docs/api/ lacks {sorted(names - shown)}"


@pytest.mark.parametrize(
    ("html", "fetched"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example.org/css">', True),
        ("<style>@import url(https://fonts.example.org/css);</style>", True),
        ('<img alt="" src="https://badges.example.org/x.svg">', True),
        ('<a href="https://example.org">elsewhere</a><link rel="canonical" href="https://example.org">', False),
        ('<script src="assets/x.js"></script><img src="images/x.png">', False),
    ],
)
def test_the_site_may_fetch_nothing_from_elsewhere(html: str, fetched: bool, tmp_path: Path) -> None:
    errors = pytest.importorskip("properdocs.exceptions", reason="the extra docs is not installed")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    (tmp_path / "page.html").write_text(html)
    with pytest.raises(errors.PluginError, match=r"page\.html") if fetched else nullcontext():
        hooks.on_post_build({"site_dir": tmp_path})


def test_blocks_are_read_as_markdown_reads_them() -> None:
    text = "a\n```python no-run\nx = 1\n```\n- item\n  ```bash\n  make test\n  ```\n~~~~\n```\n~~~~\n"
    assert blocks(text) == [
        Block("python no-run", 3, "x = 1\n"),
        Block("bash", 7, "make test\n"),
        Block("", 10, "```\n"),
    ]
    with pytest.raises(ValueError, match="line 1 is never closed"):
        blocks("```python\nx = 1\n")


@pytest.mark.parametrize(
    "command",
    ["make test", "JOBS=0 make test-all  # all", "bash .ci/run", "python -m pytest -k x", "git clone X", "$ make lint"],
)
def test_commands_that_work_pass(command: str) -> None:
    assert problem(command) is None


@pytest.mark.parametrize(
    "command", ["make tset", "bash .ci/runs", "python examples/none.py", "python -m no_such_module", "ine-calback show"]
)
def test_commands_that_cannot_work_are_named(command: str) -> None:
    assert problem(command)

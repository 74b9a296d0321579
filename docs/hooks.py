"""What the site needs beyond docs/: README and other pages of the repository, and the files that pages link to.

A page links to its neighbours in the repository, as GitHub shows it. Here these links are fitted to the site: pages
outside docs/ become pages of the site under the same path, and other files (examples, a configuration) are shown as
pages of their own. At the end the built pages are searched for anything that a browser would fetch from elsewhere.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from properdocs.exceptions import PluginError
from properdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
# Pages outside docs/, by the path of the site; the repository's own path is kept where there is no reason against it.
PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
}
ALONE = ("index.md", "tutorial.md", "concepts.md")  # a menu of one page says nothing
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<rest>#[^)\s]*)?(?=\))")
FENCED = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL)
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon))[^>]*\shref=[\"']?(?:https?:)?//[^>]*>"
    r"|@import\s+(?:url\()?[\"']?(?:https?:)?//[^;]*;|url\([\"']?(?:https?:)?//[^)]*\)"
)


def in_repository(page: str) -> str:
    """The path in the repository of the source of a page of the site."""
    return PAGES.get(page, f"docs/{page}")


def targets(text: str, path: str) -> set[str]:
    """Paths in the repository that a page links to; ``path`` is the page's own."""
    text = FENCED.sub("", text)
    return {posixpath.normpath(posixpath.join(posixpath.dirname(path), m["target"])) for m in LINK.finditer(text)}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs/ with their pictures, and a page for every other file that a page links to."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    pages = [file for file in files if file.is_documentation_page()]
    linked = set().union(*(targets(file.content_string, in_repository(file.src_uri)) for file in pages))
    for path in sorted(linked - set(PAGES.values())):
        if path.startswith("docs/") or not (ROOT / path).is_file():
            continue  # of the site already, or a broken link that the strict build names
        if path.endswith((".png", ".svg")):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            continue
        language = {".py": "python", ".yaml": "yaml", ".yml": "yaml"}.get(Path(path).suffix, "text")
        text = f"# {path}\n\n````{language}\n{(ROOT / path).read_text(encoding='utf-8')}````\n"
        shown = File.generated(config, f"files/{path}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(shown)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fits a page's links, from paths of the repository to those of the site; says where no menu is needed."""
    here = page.file.src_uri
    if here in ALONE:
        page.meta["hide"] = ["navigation"]
    folder = posixpath.dirname(in_repository(here))

    def fitted(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match["target"]))
        known = {source: name for name, source in PAGES.items()}
        name = known.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else path)
        if files.get_file_from_path(name) is None:
            name = f"files/{path}.md"
        if files.get_file_from_path(name) is None:
            return match[0]  # broken: the strict build says so
        return posixpath.relpath(name, posixpath.dirname(here) or ".") + (match["rest"] or "")

    parts, end = [], 0  # code stays as it is
    for block in FENCED.finditer(markdown):
        parts += [LINK.sub(fitted, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(fitted, markdown[end:])])


def on_post_build(config: Any) -> None:
    """Fails if a built page or style sheet would fetch something from elsewhere."""
    found = []
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css"):
            hits = FETCHED.findall(path.read_text(encoding="utf-8"))
            found += [f"{path.name}: {hit[:120]}" for hit in hits]
    if found:
        raise PluginError("the site would fetch from elsewhere:\n" + "\n".join(found))

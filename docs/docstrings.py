"""Reads the package's docstrings for the site: examples as code, names of other objects and pages as links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# Written as Sphinx does, :class:`~ine_callback.Query`: a role, and a path or a bare name.
ROLE = re.compile(r":(?:class|meth|func|attr|mod):`(?P<short>~?)(?P<path>[\w.]+)`")
PAGE = re.compile(r"\bdocs/(?P<page>[\w/-]+)\.md\b")
EXAMPLE = re.compile(r"^(?P<indent>\s*)Example:\s*$", re.MULTILINE)


def _link(match: re.Match[str]) -> str:
    name = match["path"].rpartition(".")[2] if match["short"] else match["path"]
    # optional: what is not on the site stays a name
    return f'<autoref identifier="{match["path"]}" optional><code>{name}</code></autoref>'


class Docstrings(Extension):
    """Griffe knows `Examples:` as a section with code; we write `Example:`, for there is one."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = EXAMPLE.sub(r"\g<indent>Examples:", obj.docstring.value)
            text = PAGE.sub(r'<a href="../\g<page>.html">\g<0></a>', text)  # the pages of the API are all in api/
            obj.docstring.value = ROLE.sub(_link, text)

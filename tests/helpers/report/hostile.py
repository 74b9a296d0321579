"""Text from data sets and strangers' reports that tries to be more than text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ine_callback.report import InfluenceReport, RunInfo, example_report
from ine_callback.scores import QueryInfo

OWNED = "document.documentElement.setAttribute('data-owned','1')"


PAYLOADS = {
    "element": f"<script>{OWNED}</script>",
    "handler": f"<img src=x onerror={OWNED}>",
    "out of a double-quoted attribute": f'x" onload="{OWNED}" autofocus onfocus="{OWNED}',
    "out of a quoted attribute": f"x' onmouseover='{OWNED}'><svg onload={OWNED}>",
    "out of a raw element": f"</title></style></textarea></script><script>{OWNED}</script>",
    "out of a comment": f"--><script>{OWNED}</script><!-- ]]><script>{OWNED}</script>",
    "link": f"<a href=\"javascript:{OWNED}\">x</a><iframe srcdoc='<script>parent.{OWNED}</script>'>",
    "document": f'<base href="data:text/html,"><meta http-equiv="refresh" content="0;url=javascript:{OWNED}">',
    "style": "<style>*{display:none}</style>red;--bar:1%}</style><link rel=stylesheet href=data:,x>",
    "template": "{{ 7*7 }}{% for x in [] %}{{ self.__init__.__globals__ }}{# #}",
    "encoded": f"&lt;script&gt;{OWNED}&lt;/script&gt;&#60;b&#62;\\u003cscript\\u003e",
    "mathematics": "$\\frac{ $ \\input{/etc/passwd}",
}


HOSTILE = "<script>alert('x')</script><img src=x onerror=y>\" $\\frac{$ {{ 7*7 }} {% raw %}"


def hostile(text: str = HOSTILE) -> InfluenceReport:
    """The example with foreign text wherever a report has text."""
    report = example_report()
    queries = tuple(QueryInfo(f"{text}{kind}", kind, text) for kind in ("self", "loss", "margin"))  # type: ignore[arg-type]
    named = {text: text}
    run = RunInfo(config=named, versions=named, approximate=named, uncaptured=named, nonfinite={text: 3}, notes=[text])
    return InfluenceReport(replace(report.scores, queries=queries, null_ks_p=np.zeros(3)), run)

"""A page that stands alone: no script, no other file, nothing from a network."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

# The policy is obeyed by the browser: even a mistake in here could not load anything.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
img {{ max-width: 100%; height: auto; }} figure {{ margin: 1rem 0; }} figcaption {{ color: #444; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }}
th.number, td.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
pre {{ background: #f4f4f4; padding: .7rem; overflow-x: auto; white-space: pre-wrap; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document; `parts` are HTML, made by the functions below."""
    body = "\n".join(parts)
    return (
        f"{_HEAD.format(title=escape(title))}<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def picture(png: bytes, text: str) -> str:
    """An image with its caption, which also stands for it where it cannot be seen."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(text)}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """The first `words` columns are text, the others numbers, to the right; None is a dash."""
    style = ["" if i < words else ' class="number"' for i in range(len(headers))]
    head = "".join(f"<th{s}>{escape(h)}</th>" for s, h in zip(style, headers, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{s}>{escape(_shown(v))}</td>" for s, v in zip(style, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def listing(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def values(content: dict[str, Any]) -> str:
    """A dictionary as two columns, nested ones by dotted names."""
    return table(("name", "value"), _flat(content), words=2)


def write(path: Path, html: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)

"""The description of the API as a page of HTML, with nothing to be loaded from elsewhere."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h2 { border-top: 1px solid #8886; padding-top: 1.2rem; margin-bottom: .3rem; font-size: 1.15rem; }
h3 { margin-bottom: .3rem; font-size: 1rem; }
code { font-family: ui-monospace, monospace; font-size: .92em; }
table { border-collapse: collapse; width: 100%; }
td { padding: .2rem .8rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8883; }
td:first-child { white-space: nowrap; width: 1%; }
"""
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
LARGE = 2**31  # limits beyond are those of the number's own kind
LENGTHS = {"maxLength": "letters", "maxItems": "items"}


def api_page(described: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI description whose schemas hold no references."""
    title, about = escape(described["info"]["title"]), escape(described["info"].get("description", ""))
    parts = [f"<h1>{title}</h1>", *(f"<p>{_code(text)}</p>" for text in about.split("\n\n"))]
    parts.append('<p>For programs: <a href="openapi.json">openapi.json</a>.</p>')
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            parts += _route(method.upper(), path, route)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _route(method: str, path: str, route: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(route.get('summary', ''))}</p>"
    for kind, content in route.get("requestBody", {}).get("content", {}).items():
        yield f"<h3>Sent as {escape(kind)}</h3>" + _table(_fields(content["schema"]))
    replies = ((status, _code(escape(reply["description"]))) for status, reply in route["responses"].items())
    yield "<h3>Replies</h3>" + _table(replies)


def _fields(schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        said = [_kind(field)]
        if name in required:
            said.append("required")
        elif (default := field.get("default")) not in (None, "", False):
            said.append(f"default {default}")
        text = escape(", ".join(said))
        if note := field.get("description"):
            text += f"<br>{_code(escape(note))}"
        yield name, text


def _kind(field: Mapping[str, Any]) -> str:
    """What a field holds, in words."""
    if several := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(kind for one in several if (kind := _kind(one)) != "null"))
    if values := field.get("enum") or [field[name] for name in ("const",) if name in field]:
        return " or ".join(map(str, values))
    kind = "file" if field.get("format") == "binary" else field.get("type", "anything")
    if kind == "object" and (names := field.get("properties")):
        return f"{{{', '.join(names)}}}"
    if kind == "array":
        return f"list of {_kind(field.get('items', {}))}" + _bounds(field)
    return kind + _bounds(field)


def _bounds(field: Mapping[str, Any]) -> str:
    limits = ((word, field[name]) for name, word in LIMITS.items() if name in field)
    said = [f", {word} {value:g}" for word, value in limits if abs(value) < LARGE]
    said += [f" of at most {field[name]:,} {what}" for name, what in LENGTHS.items() if name in field]
    return "".join(said)


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = (f"<tr><td><code>{escape(name)}</code></td><td>{text}</td></tr>" for name, text in rows)
    return f"<table>{''.join(lines)}</table>"


def _code(text: str) -> str:
    """Escaped text in which back quotes mean code."""
    parts = text.split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))

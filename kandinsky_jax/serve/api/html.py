"""Small pages of the API: the login form and the list of routes; without scripts and third parties."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.5 }
body { max-width: 60rem; margin: 0 auto; padding: 1rem }
form { display: grid; gap: .5rem; max-width: 20rem }
input, button { font: inherit; padding: .5rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8884 }
code { font-family: ui-monospace, monospace }
"""


def page(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: text.
        body: HTML.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>"
    )


def describe(schema: dict[str, Any]) -> str:
    """Return the page that describes an API.

    Args:
        schema: of OpenAPI.
    """
    info = schema["info"]
    parts = [f"<h1>{escape(info['title'])}</h1><p>{escape(info.get('description', ''))}</p>"]
    parts.append('<p>For programs: <a href="/openapi.json">openapi.json</a>.</p>')
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>")
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                parts.append(f"<p>Body: <code>{escape(kind)}</code></p>{_fields(content['schema'], schema)}")
    return page(info["title"], "".join(parts))


def _fields(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """Return a table of a body's fields."""
    schema = _resolved(schema, whole)
    needed = schema.get("required", [])
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in needed else ''}</td>"
        f"<td>{escape(_type(field, whole))}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    ]
    head = "<tr><th scope=col>Field</th><th scope=col>Type</th><th scope=col>Meaning</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _resolved(schema: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return whole["components"]["schemas"][name] if name else schema


def _type(field: dict[str, Any], whole: dict[str, Any]) -> str:
    """Return the type of a field in words."""
    field = _resolved(field, whole)
    if "anyOf" in field:
        return " or ".join(_type(one, whole) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if field.get("type") == "array":
        return f"list of {_type(field['items'], whole)}"
    if field.get("format") == "binary":
        return "file"
    return str(field.get("type", "any"))

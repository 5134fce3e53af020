"""The page of all settings, made from `config`. Needs no torch.

python -m fasttrain.settings_page > recipes/SETTINGS.md
"""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from fasttrain.config import Recipe, may_vary

HEAD = """\
# Settings

This page is made from [fasttrain/config.py](../fasttrain/config.py); a test compares the two. A
recipe sets what differs from the defaults. `--set section.key=value` changes one setting of a
command.

A setting marked * may change when a run resumes. If another one changed, the run is refused; see
[When a run stops](README.md#when-a-run-stops).
"""


def page() -> str:
    """The page in Markdown: a table for each section."""
    parts = [HEAD]
    varying = may_vary()
    for section, field in Recipe.model_fields.items():
        kind = type(field.default)
        parts.append(f"\n## [{section}]\n\n{' '.join((kind.__doc__ or '').split())}\n")
        parts.append("| key | values | default | what it does |\n|---|---|---|---|")
        for key, schema in kind.model_json_schema()["properties"].items():
            mark = " *" if f"{section}.{key}" in varying else ""
            default = "unset" if schema["default"] is None else _code(schema["default"])
            about = " ".join(schema["description"].split()).replace("|", "\\|")
            parts.append(f"| `{key}`{mark} | {values(schema)} | {default} | {about} |")
    return "\n".join(parts) + "\n"


def values(schema: Mapping[str, Any]) -> str:
    """Says which values a JSON schema allows."""
    if "anyOf" in schema:
        found = [values(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(found))
    if "enum" in schema:
        return ", ".join(_code(value) for value in schema["enum"])
    if "const" in schema:
        return _code(schema["const"])
    if schema["type"] == "array":
        parts = schema.get("prefixItems")
        inside = [values(each) for each in parts] if parts else [f"any number of {_items(schema)}"]
        return f"list of {', '.join(inside)}"
    if schema["type"] in ("integer", "number"):
        name = "whole number" if schema["type"] == "integer" else "number"
        return " ".join([name, *_bounds(schema)])
    return {"boolean": "true, false", "string": schema.get("format", "text")}[schema["type"]]


def _items(schema: Mapping[str, Any]) -> str:
    inside = schema.get("items", {"type": "string"})
    return f"({values(inside)})"


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    for key, text in (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
    ):
        if key in schema:
            yield f"{text} {schema[key]:g}"


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(page())

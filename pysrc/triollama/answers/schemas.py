"""What is read of JSON schemas here: llguidance reads the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["is_text", "kinds_of", "resolved", "values_of", "without_refs"]


def is_text(schema: Any, whole: Mapping[str, Any]) -> bool | None:
    """Whether what a schema allows is strings alone; None: strings, and other values too."""
    kinds = kinds_of(schema, whole)
    return None if "string" in kinds and len(kinds) > 1 else kinds == {"string"}


def resolved(schema: Any, whole: Mapping[str, Any]) -> Any:
    """A schema, or the one that it refers to; None if that is missing."""
    for _ in range(20):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            break
        *_, group, name = ["", *str(schema["$ref"]).split("/")]
        schema = (whole.get(group) or {}).get(name)
    return schema


def values_of(schema: Any) -> list[Any] | None:
    """What a schema lists, if it does."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) else None


def kinds_of(schema: Any, whole: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The types that a schema allows, by their names in schemas; "any" where it names none.

    ``whole``: the schema that it is a part of.
    """
    schema = resolved(schema, whole)
    if not isinstance(schema, Mapping) or depth > 20:
        return {"string", "any"}
    values = values_of(schema)
    if values is not None:
        return {"string" if isinstance(value, str) else "any" for value in values}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return {kind for one in schema[key] for kind in kinds_of(one, whole, depth + 1)}
    kinds = schema.get("type", ["string", "any"])
    return {kinds} if isinstance(kinds, str) else set(map(str, kinds))


def without_refs(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that begins with the object itself, as templates show it, not with a reference."""
    named = schema.get("$ref", "").rpartition("/")[2]
    if not named:
        return schema
    definitions = dict(schema["$defs"])
    top = dict(definitions[named])
    recursive = f'"#/$defs/{named}"' in json.dumps(definitions)
    if not recursive:
        del definitions[named]
    top.pop("title", None)
    return {**top, **({"$defs": definitions} if definitions else {})}

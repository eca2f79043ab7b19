"""GenEval's metadata in words for a judge."""

import json
from collections.abc import Mapping
from typing import Any


def required(item: Mapping[str, Any]) -> str:
    """What the picture must show: ``2 x clock; 1 x dog (right of the teddy bear)``."""
    objects = item.get("include")
    if not objects:
        return "what the prompt says"
    try:
        return "; ".join(_required(thing, objects) for thing in objects)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return json.dumps(objects)  # metadata of another kind


def excluded(item: Mapping[str, Any]) -> str:
    """What must not be there: ``3 or more x clock``."""
    objects = item.get("exclude")
    if not objects:
        return "whatever contradicts the prompt"
    try:
        return "; ".join(f"{thing['count']} or more x {thing['class']}" for thing in objects)
    except (KeyError, TypeError, IndexError):
        return json.dumps(objects)


def _required(thing: Mapping[str, Any], objects: Any) -> str:
    details = [thing["color"]] if "color" in thing else []
    if "position" in thing:
        relation, other = thing["position"]
        details.append(f"{relation} the {objects[other]['class']}")
    return f"{thing['count']} x {thing['class']}" + (f" ({', '.join(details)})" if details else "")

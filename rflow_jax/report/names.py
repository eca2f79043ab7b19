"""What runs are called, and numbers in words."""

from collections.abc import Sequence
from typing import Any

from rflow_jax.report.runs import Run


def names(runs: Sequence[Run]) -> list[str]:
    """The last parts of each run's path, as many as no other run's path ends with."""
    paths = [run.folder.absolute().parts for run in runs]
    return [_name(path, [other for other in paths if other != path]) for path in paths]


def _name(path: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    lengths = range(1, len(path))
    length = next((n for n in lengths if all(other[-n:] != path[-n:] for other in others)), len(path))
    return "/".join(path[-length:])


def count(number: int, what: str) -> str:
    """``1 prompt``, ``17,696 images``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def value(number: float | None, decides: bool) -> str:
    """A mean score, or a share in per cent."""
    if number is None:
        return "–"
    return f"{100 * number:.3g} %" if decides else f"{number:.2f}"


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h 05 min``."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def verifier(run: Run) -> str:
    """Who scored the pictures."""
    if not run.verified:
        return "none"
    return _text(_section(run, "verifier").get("model")) or _text(_section(run, "verifier").get("name")) or "unknown"


def model(run: Run) -> str:
    """The generator, and its corrector if it has one."""
    parts = [_text(run.config.get("model")) or "unknown", _text(run.config.get("lora"))]
    return " + ".join(part.rstrip("/").rpartition("/")[2] for part in parts if part)


def strategy(run: Run) -> str:
    """How it searched."""
    return _text(run.config.get("strategy")).replace("_", " + ") or "unknown"


def _section(run: Run, key: str) -> dict[Any, Any]:
    section = run.config.get(key)
    return section if isinstance(section, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""

"""The report's templates, styles and scripts, which lie beside this file."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rflow_jax.report.charts import Chart

_HERE = Path(__file__).parent


def template_text(name: str) -> str:
    """A style or a script, as it is."""
    return (_HERE / name).read_text(encoding="utf-8")


def render_template(name: str, **values: Any) -> str:
    """A template with its values, which come from models and files: what it inserts is escaped."""
    environment = Environment(autoescape=True, loader=FileSystemLoader(_HERE), undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template(name).render(**values)


def svg(chart: Chart) -> str:
    """A chart as a file of its own, light or dark as the reader's page is."""
    return render_template("chart.svg.html", chart=chart, style=template_text("chart.css"))

"""Reports of searches: one HTML page, and a table for the terminal."""

from rflow_jax.report.curves import summary_table
from rflow_jax.report.page import write_report

__all__ = ["summary_table", "write_report"]

"""What a search found, to be looked at: one HTML page, and a table for the terminal."""

from rflow_jax.report.command import ReportConfig, report
from rflow_jax.report.page import write_report
from rflow_jax.report.table import summary_table

__all__ = ["ReportConfig", "report", "summary_table", "write_report"]

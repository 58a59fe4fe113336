"""Reports: one self-contained HTML file for runs and comparisons, and tables for the terminal."""

from tutelage.report.errors import ReportError
from tutelage.report.terminal import run_summary, summary_table
from tutelage.report.write import write_report

__all__ = ["ReportError", "run_summary", "summary_table", "write_report"]

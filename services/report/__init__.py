"""Turns a study's results into a report that a researcher reads: tables, figures, and what they cannot tell."""

from services.report.build_report import ReportFiles, build_report
from services.report.console import console_table

__all__ = ["ReportFiles", "build_report", "console_table"]

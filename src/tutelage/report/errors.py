"""What the report refuses."""

from __future__ import annotations


class ReportError(ValueError):
    """No report can be made from what was given; the message says why and what to give instead."""

"""Runs: a recipe, carried out."""

from tutelage.runs.execute import RunResult, check, distill, resume

__all__ = ["RunResult", "check", "distill", "resume"]
